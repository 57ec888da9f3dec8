//! `/dev/kvm` and one virtual machine: interrupt controllers, timer, memory slots, clock.

use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd as _;

use kvm_bindings::{
    CpuId, KVM_CAP_PRE_FAULT_MEMORY, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY,
    Msrs, kvm_clock_data, kvm_irqchip, kvm_msr_entry, kvm_pit_config, kvm_pit_state2,
    kvm_pre_fault_memory, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::boot::layout;
use crate::memory::Memory;
use crate::trace::Trace;
use crate::vcpu::features::ARCH_CAPABILITIES;

/// What to do when there is no usable KVM; part of every error that says so.
pub const USE_METAL: &str =
    "run it inside `tern-metal`, which provides a virtual host with true KVM";

/// KVM's side of one Machine.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    supported: Supported,
    msrs_to_save: Vec<u32>,
    can_pre_fault: bool,
    /// Keeps the mappings alive that the memory slots point to. `None` until memory is attached.
    memory: Option<Memory>,
}

/// What this host's KVM can show to a guest: CPUID, and the register that one of its bits announces and
/// that goes on with the list.
#[derive(Debug)]
pub struct Supported {
    cpuid: CpuId,
    arch_capabilities: u64,
}

impl Supported {
    fn read(kvm: &Kvm) -> Result<Self, KvmError> {
        Ok(Self {
            cpuid: kvm
                .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
                .map_err(call("KVM_GET_SUPPORTED_CPUID"))?,
            arch_capabilities: feature_msr(kvm, ARCH_CAPABILITIES),
        })
    }

    /// IA32_ARCH_CAPABILITIES, as KVM gives it to a new processor.
    pub fn arch_capabilities(&self) -> u64 {
        self.arch_capabilities
    }
}

impl Deref for Supported {
    type Target = CpuId;

    fn deref(&self) -> &CpuId {
        &self.cpuid
    }
}

/// A model-specific register that says what KVM can do. Zero where KVM does not have it: nothing is
/// promised then.
fn feature_msr(kvm: &Kvm, index: u32) -> u64 {
    let asked = kvm_msr_entry {
        index,
        ..Default::default()
    };
    let Ok(mut msrs) = Msrs::from_entries(&[asked]) else {
        return 0;
    };
    match (kvm.get_msrs(&mut msrs), msrs.as_slice()) {
        (Ok(1), [msr]) => msr.data,
        _ => 0,
    }
}

/// The part of a snapshot that is the VM's own: interrupt controllers, timer, clock.
#[derive(Default, Serialize, Deserialize)]
pub struct VmState {
    irqchips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
    /// The host's wall clock when `clock` was read, in nanoseconds since 1970.
    saved_at_unix_nanos: u64,
}

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The machine has no KVM.
    #[error(
        "/dev/kvm does not exist: this machine has no hardware virtualization, or kvm-intel/kvm-amd is not loaded; {USE_METAL}"
    )]
    Missing,
    /// KVM is there, but not for this user.
    #[error("no permission to open /dev/kvm: add this user to the group `kvm`, or {USE_METAL}")]
    Permission,
    /// KVM could not be opened for another reason.
    #[error("cannot open /dev/kvm: {0}; {USE_METAL}")]
    Open(io::Error),
    /// KVM is too old.
    #[error("this KVM lacks {0:?}")]
    MissingCapability(Cap),
    /// A sure sign of a `/dev/kvm` that only emulates.
    #[error(
        "this /dev/kvm has no interval timer ({0}): it only emulates a processor, about a thousand times too slowly; {USE_METAL}"
    )]
    Emulated(kvm_ioctls::Error),
    /// A call that works on every KVM failed.
    #[error("{call}: {source}")]
    Call {
        /// The ioctl.
        call: &'static str,
        /// Why.
        source: kvm_ioctls::Error,
    },
}

/// Shorthand for `map_err`: names the ioctl that failed.
pub(crate) fn call(name: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Call { call: name, source }
}

/// Opens `/dev/kvm`, with errors that say what to do.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
        libc::EACCES | libc::EPERM => KvmError::Permission,
        errno => KvmError::Open(io::Error::from_raw_os_error(errno)),
    })?;
    const NEEDED: [Cap; 8] = [
        Cap::Irqchip,
        Cap::Ioeventfd,
        Cap::Irqfd,
        Cap::UserMemory,
        Cap::SetTssAddr,
        Cap::Pit2,
        Cap::ImmediateExit,
        Cap::AdjustClock,
    ];
    for cap in NEEDED {
        if !kvm.check_extension(cap) {
            return Err(KvmError::MissingCapability(cap));
        }
    }
    Ok(kvm)
}

impl Vm {
    /// Opens KVM and makes an empty VM with its interrupt controllers and timer.
    ///
    /// Needs no guest memory yet, so that it can run beside the loading of a kernel: creating a VM is
    /// among the slowest calls of a start.
    pub fn create(trace: &Trace) -> Result<Self, KvmError> {
        let kvm = open()?;
        trace.mark("kvm_opened");
        let fd = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        trace.mark("vm_created");
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(layout::KVM_TSS)
            .map_err(call("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
        // The speaker port is answered inside KVM too; guests read it while they calibrate.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).map_err(KvmError::Emulated)?;
        let supported = Supported::read(&kvm)?;
        let msrs_to_save = kvm
            .get_msr_index_list()
            .map_err(call("KVM_GET_MSR_INDEX_LIST"))?
            .as_slice()
            .to_vec();
        let can_pre_fault = kvm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) > 0;
        Ok(Self {
            fd,
            supported,
            msrs_to_save,
            can_pre_fault,
            memory: None,
        })
    }

    /// Gives the VM its memory, once.
    pub fn attach_memory(&mut self, memory: &Memory) -> Result<(), KvmError> {
        for (slot, (range, host)) in memory.mappings().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: range.start,
                memory_size: range.len,
                userspace_addr: host as u64,
            };
            // SAFETY: `host` is a mapping of `range.len` bytes, no other slot overlaps it, and
            // `self.memory` keeps it mapped for as long as the VM's descriptor lives in `self`.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
        }
        self.memory = Some(memory.clone());
        Ok(())
    }

    /// The VM's descriptor, for vCPUs, ioeventfds and irqfds.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// What this host's KVM can show to a guest.
    pub fn supported_cpuid(&self) -> &Supported {
        &self.supported
    }

    /// Whether [`pre_fault`] works on it.
    pub fn can_pre_fault(&self) -> bool {
        self.can_pre_fault
    }

    /// The model-specific registers a snapshot must hold.
    pub fn msrs_to_save(&self) -> &[u32] {
        &self.msrs_to_save
    }

    /// Reads interrupt controllers, timer and clock. All vCPUs must be paused.
    pub fn save(&self) -> Result<VmState, KvmError> {
        let mut irqchips = [
            kvm_irqchip {
                chip_id: KVM_IRQCHIP_PIC_MASTER,
                ..Default::default()
            },
            kvm_irqchip {
                chip_id: KVM_IRQCHIP_PIC_SLAVE,
                ..Default::default()
            },
            kvm_irqchip {
                chip_id: KVM_IRQCHIP_IOAPIC,
                ..Default::default()
            },
        ];
        for chip in &mut irqchips {
            self.fd.get_irqchip(chip).map_err(call("KVM_GET_IRQCHIP"))?;
        }
        Ok(VmState {
            irqchips,
            pit: self.fd.get_pit2().map_err(call("KVM_GET_PIT2"))?,
            clock: self.fd.get_clock().map_err(call("KVM_GET_CLOCK"))?,
            saved_at_unix_nanos: unix_nanos(),
        })
    }

    /// Restores what [`Vm::save`] read, after the vCPUs' own state. The guest's clock is set on by the
    /// time that has passed since, so that its wall clock is right from the first instruction.
    pub fn restore(&self, state: &VmState) -> Result<(), KvmError> {
        for chip in &state.irqchips {
            self.fd.set_irqchip(chip).map_err(call("KVM_SET_IRQCHIP"))?;
        }
        self.fd.set_pit2(&state.pit).map_err(call("KVM_SET_PIT2"))?;
        self.fd
            .set_clock(&advanced(state, unix_nanos()))
            .map_err(call("KVM_SET_CLOCK"))
    }
}

mod ioctl {
    // Linux, Documentation/virt/kvm/api.rst, 4.143 "KVM_PRE_FAULT_MEMORY".
    nix::ioctl_readwrite!(
        pre_fault_memory,
        kvm_bindings::KVMIO,
        0xd5,
        kvm_bindings::kvm_pre_fault_memory
    );
}

/// Maps `len` bytes of guest memory at `start` into the page tables that `vcpu` runs on, as its own accesses would.
/// It must have all its state.
pub fn pre_fault(vcpu: &VcpuFd, start: u64, len: u64) -> io::Result<()> {
    let mut range = kvm_pre_fault_memory {
        gpa: start,
        size: len,
        ..Default::default()
    };
    // Each call maps at least a page, and says what is left.
    while range.size > 0 {
        let before = range.size;
        // SAFETY: the descriptor is a vCPU's, and the kernel reads and writes this one structure. That it maps
        // guest memory changes nothing that Rust sees.
        match unsafe { ioctl::pre_fault_memory(vcpu.as_raw_fd(), &mut range) } {
            Ok(_) if range.size < before => {}
            Ok(_) => return Err(io::Error::other("KVM has mapped nothing")),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The clock to set at `now`. Where KVM paired the guest's clock with the host's wall clock in one
/// reading, KVM itself adds what has passed; else the pair is ours, a few microseconds apart.
fn advanced(state: &VmState, now: u64) -> kvm_clock_data {
    let mut clock = kvm_clock_data {
        clock: state.clock.clock,
        ..Default::default()
    };
    if state.clock.flags & KVM_CLOCK_REALTIME != 0 {
        clock.flags = KVM_CLOCK_REALTIME;
        clock.realtime = state.clock.realtime;
    } else {
        clock.clock = clock
            .clock
            .saturating_add(now.saturating_sub(state.saved_at_unix_nanos));
    }
    clock
}

fn unix_nanos() -> u64 {
    // CLOCK_REALTIME cannot fail with a valid pointer, and is after 1970 on any host that runs TLS.
    let now = clock_gettime(ClockId::CLOCK_REALTIME).unwrap_or(nix::sys::time::TimeSpec::new(0, 0));
    (now.tv_sec().max(0) as u64)
        .saturating_mul(1_000_000_000)
        .saturating_add(now.tv_nsec() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(flags: u32) -> VmState {
        VmState {
            irqchips: Default::default(),
            pit: Default::default(),
            clock: kvm_clock_data {
                clock: 5_000,
                flags,
                realtime: 90,
                ..Default::default()
            },
            saved_at_unix_nanos: 1_000,
        }
    }

    #[test]
    fn sleep_is_added_to_the_clock() {
        assert_eq!(advanced(&state(0), 4_000).clock, 8_000);
        // A host clock that was set back must not set the guest's back.
        assert_eq!(advanced(&state(0), 10).clock, 5_000);
        let paired = advanced(&state(KVM_CLOCK_REALTIME), 4_000);
        assert_eq!(
            (paired.clock, paired.realtime, paired.flags),
            (5_000, 90, KVM_CLOCK_REALTIME)
        );
    }
}
