//! Is this KVM a real one? A tiny guest that counts down tells.
//!
//! On hardware, or inside `tern-metal`, the guest executes hundreds of millions of instructions a
//! second. Some machines offer a `/dev/kvm` that emulates every instruction, at about one million: a
//! Linux kernel would not leave its decompressor there, and an error now is better than a time-out then.
//!
//! A start does not measure (it would cost milliseconds each time): the host's agent probes once, and
//! [`crate::kvm::Vm::create`] refuses on the one sign that costs nothing, a missing interval timer.

use std::time::Instant;

use kvm_ioctls::{VcpuExit, VcpuFd};
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress};

use crate::boot::template::{CpuTemplate, Lacking};
use crate::kvm::{KvmError, USE_METAL, Vm, call, open};
use crate::memory::Memory;
use crate::trace::Trace;

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Report {
    /// Millions of guest instructions in a second.
    pub mips: f64,
}

/// Why this machine cannot run Machines.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// KVM is missing, forbidden or lacks something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host has less than Machines are to be shown.
    #[error(transparent)]
    Template(#[from] Lacking),
    /// KVM only emulates.
    #[error(
        "this /dev/kvm executes {0:.1} million instructions a second, at least {MIN_MIPS} are needed: it only emulates a processor; {USE_METAL}"
    )]
    Slow(f64),
    /// The tiny guest did something else than counting.
    #[error("this KVM did not run the test guest: {0}; {USE_METAL}")]
    Guest(String),
}

/// Hardware does thousands, KVM inside an emulated host 200 to 400 (a fifth of that while the machine
/// around it is busy), an emulating KVM 1 to 2.
const MIN_MIPS: f64 = 20.0;
/// Enough for an emulating KVM to be caught: 0.1 s there, 0.1 ms on hardware, milliseconds inside an
/// emulated host, where the first entry into a guest is slow.
const FIRST_ROUND: u32 = 100_000;
/// The first round only sorts out those that would take seconds for the second.
const MIN_FIRST_MIPS: f64 = 5.0;
/// Enough for a steady figure on a real one: some 10 ms.
const SECOND_ROUND: u32 = 10_000_000;
/// Real mode, at address 0: `dec ecx` (with operand-size prefix), `jnz` back to it, `hlt`.
const PROGRAM: [u8; 5] = [0x66, 0x49, 0x75, 0xfc, 0xf4];
const INSTRUCTIONS_PER_TURN: f64 = 2.0;
/// Measurements before a host is told that it is too slow.
const ATTEMPTS: u32 = 5;
const GUEST_BYTES: u64 = 64 << 10;

/// Runs the tiny guest, and looks whether the host has all of `template`.
pub fn probe(template: CpuTemplate) -> Result<Report, ProbeError> {
    let memory = Memory::anonymous(GUEST_BYTES).map_err(|e| ProbeError::Guest(e.to_string()))?;
    let kvm = open()?;
    let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
    memory
        .ram()
        .write_slice(&PROGRAM, GuestAddress(0))
        .map_err(|e| ProbeError::Guest(e.to_string()))?;
    let (_, host) = memory.mappings().next().expect("there is one range");
    let region = kvm_bindings::kvm_userspace_memory_region {
        memory_size: GUEST_BYTES,
        userspace_addr: host as u64,
        ..Default::default()
    };
    // SAFETY: the mapping has this size, and nothing runs the guest after `memory` is dropped: vCPU and
    // VM are dropped before it below, or are declared after it where an error returns.
    unsafe { vm.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(call("KVM_CREATE_VCPU"))?;
    let mut mips = best(&mut vcpu, FIRST_ROUND, MIN_FIRST_MIPS)?;
    if mips >= MIN_FIRST_MIPS {
        mips = best(&mut vcpu, SECOND_ROUND, MIN_MIPS)?;
    }
    drop((vcpu, vm));
    if mips < MIN_MIPS {
        return Err(ProbeError::Slow(mips));
    }
    // What a Machine needs beyond instructions.
    let vm = Vm::create(&Trace::new(Instant::now()))?;
    template.check(vm.supported_cpuid())?;
    Ok(Report { mips })
}

/// The best of some measurements, or the first that is enough: a host that is busy at one moment is not
/// one that emulates.
fn best(vcpu: &mut VcpuFd, turns: u32, enough: f64) -> Result<f64, ProbeError> {
    let mut best = 0.0;
    for _ in 0..ATTEMPTS {
        best = f64::max(best, measure(vcpu, turns)?);
        if best >= enough {
            break;
        }
    }
    Ok(best)
}

fn measure(vcpu: &mut VcpuFd, turns: u32) -> Result<f64, ProbeError> {
    let mut sregs = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
    let mut regs = vcpu.get_regs().map_err(call("KVM_GET_REGS"))?;
    regs.rip = 0;
    regs.rcx = turns.into();
    regs.rflags = 2;
    vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
    let start = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => break,
            Ok(VcpuExit::Intr) => {}
            Ok(other) => return Err(ProbeError::Guest(format!("it stopped with {other:?}"))),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(call("KVM_RUN")(error).into()),
        }
    }
    let micros = start.elapsed().as_secs_f64() * 1e6;
    let left = vcpu.get_regs().map_err(call("KVM_GET_REGS"))?.rcx as u32;
    if left != 0 {
        return Err(ProbeError::Guest(format!(
            "it stopped with {left} turns left"
        )));
    }
    Ok(f64::from(turns) * INSTRUCTIONS_PER_TURN / micros)
}
