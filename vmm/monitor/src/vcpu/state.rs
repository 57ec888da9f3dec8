//! Everything of one processor that a snapshot must hold, and the order to put it back in.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::features;
use crate::kvm::{KvmError, Supported, call};

/// One processor, saved.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// The 1024 words of `kvm_xsave`, and behind them what a processor with more state (AMX) adds.
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// MTRRs: KVM keeps them, but some kernels leave them out of the list of what to save.
const MTRRS: [u32; 28] = [
    0x2ff, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f, 0x200,
    0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c, 0x20d,
    0x20e, 0x20f,
];
const TSC: u32 = 0x10;
/// Arms the local APIC's timer; only means something when the TSC is back.
const TSC_DEADLINE: u32 = 0x6e0;
/// KVM takes at most 256 in one call.
const MSRS_PER_CALL: usize = 128;

impl VcpuState {
    /// Reads a processor that is outside `KVM_RUN` and has no I/O half done.
    pub fn save(fd: &VcpuFd, extra: usize, msrs_to_save: &[u32]) -> Result<Self, KvmError> {
        // Asking for the MP state makes KVM handle pending INIT and SIPI first; so it goes first.
        let mp_state = fd.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?;
        let regs = fd.get_regs().map_err(call("KVM_GET_REGS"))?;
        let sregs = fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        let mut xsave = new_xsave(extra)?;
        // SAFETY: `extra` is what `extra_xsave_words` computed from the size KVM reported, and no
        // extended feature is enabled by `arch_prctl` after start.
        unsafe { fd.get_xsave2(&mut xsave) }.map_err(call("KVM_GET_XSAVE2"))?;
        let cpuid = save_cpuid(fd)?;
        Ok(Self {
            // Zero where the host's TSC is unstable; then there is nothing to keep.
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
            mp_state,
            regs,
            sregs,
            xsave: [&xsave.as_fam_struct_ref().xsave.region, xsave.as_slice()].concat(),
            xcrs: fd.get_xcrs().map_err(call("KVM_GET_XCRS"))?,
            debugregs: fd.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?,
            lapic: fd.get_lapic().map_err(call("KVM_GET_LAPIC"))?,
            msrs: save_msrs(fd, msrs_to_save, &cpuid)?,
            cpuid,
            events: fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Puts the state into a new processor.
    pub fn restore(&self, fd: &VcpuFd, extra: usize) -> Result<(), KvmError> {
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| KvmError::Call {
            call: "KVM_SET_CPUID2",
            source: kvm_ioctls::Error::new(libc::E2BIG),
        })?;
        fd.set_cpuid2(&cpuid).map_err(call("KVM_SET_CPUID2"))?;
        if self.tsc_khz != 0 && fd.get_tsc_khz().ok() != Some(self.tsc_khz) {
            fd.set_tsc_khz(self.tsc_khz)
                .map_err(call("KVM_SET_TSC_KHZ"))?;
        }
        fd.set_mp_state(self.mp_state)
            .map_err(call("KVM_SET_MP_STATE"))?;
        fd.set_regs(&self.regs).map_err(call("KVM_SET_REGS"))?;
        fd.set_sregs(&self.sregs).map_err(call("KVM_SET_SREGS"))?;
        let (region, more) = self.xsave.split_first_chunk().ok_or(KvmError::Call {
            call: "KVM_SET_XSAVE",
            source: kvm_ioctls::Error::new(libc::EINVAL),
        })?;
        let mut xsave = new_xsave(extra.max(more.len()))?;
        xsave.as_mut_slice()[..more.len()].copy_from_slice(more);
        // SAFETY: only the leading, fixed part of the structure is assigned; its length field, which
        // the wrapper relies on, stays as `Xsave::new` set it.
        unsafe { xsave.as_mut_fam_struct().xsave.region = *region };
        // SAFETY: the buffer has at least the size this KVM reads, see `save`.
        unsafe { fd.set_xsave2(&xsave) }.map_err(call("KVM_SET_XSAVE"))?;
        fd.set_xcrs(&self.xcrs).map_err(call("KVM_SET_XCRS"))?;
        fd.set_debug_regs(&self.debugregs)
            .map_err(call("KVM_SET_DEBUGREGS"))?;
        fd.set_lapic(&self.lapic).map_err(call("KVM_SET_LAPIC"))?;
        self.restore_msrs(fd)?;
        fd.set_vcpu_events(&self.events)
            .map_err(call("KVM_SET_VCPU_EVENTS"))?;
        // Tells a guest that watches for stalls that it was not its own fault. Fails where the guest
        // does not use KVM's clock; then it has nothing to be told.
        let _ = fd.kvmclock_ctrl();
        Ok(())
    }

    /// Checks that this host's processors have every feature the guest was shown, and no vulnerability
    /// that it was told they do not have.
    pub fn check_processor(&self, supported: &Supported) -> Result<(), String> {
        features::check(&self.cpuid, supported)?;
        match features::told(&self.msrs, &self.cpuid) {
            Some(told) => features::check_guards(told, supported.arch_capabilities()),
            None => Ok(()),
        }
    }

    fn restore_msrs(&self, fd: &VcpuFd) -> Result<(), KvmError> {
        let (deadline, rest): (Vec<_>, Vec<_>) =
            self.msrs.iter().partition(|msr| msr.index == TSC_DEADLINE);
        let tsc = self
            .msrs
            .iter()
            .find(|msr| msr.index == TSC)
            .map_or(0, |msr| msr.data);
        for chunk in rest.chunks(MSRS_PER_CALL) {
            set_msrs(fd, chunk)?;
        }
        // A deadline of zero is "not armed", and also what a timer reads that fired while it was being
        // saved and whose interrupt was not delivered yet. Firing once more is harmless, a timer that
        // never fires is not: so arm it for now.
        let deadline: Vec<_> = deadline
            .into_iter()
            .map(|msr| {
                if msr.data == 0 {
                    kvm_msr_entry { data: tsc, ..msr }
                } else {
                    msr
                }
            })
            .collect();
        set_msrs(fd, &deadline)
    }
}

/// How many words beyond `kvm_xsave` this VM's processors have.
pub fn extra_xsave_words(vm: &VmFd) -> usize {
    let reported = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    reported
        .saturating_sub(size_of::<kvm_xsave>())
        .div_ceil(size_of::<u32>())
}

fn new_xsave(extra: usize) -> Result<Xsave, KvmError> {
    Xsave::new(extra).map_err(|_| KvmError::Call {
        call: "KVM_GET_XSAVE2",
        source: kvm_ioctls::Error::new(libc::E2BIG),
    })
}

fn save_cpuid(fd: &VcpuFd) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
    let cpuid = fd
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(call("KVM_GET_CPUID2"))?;
    let mut entries = cpuid.as_slice().to_vec();
    // Some kernels do not say how many entries they filled in; the others stay as they were made.
    while entries.last() == Some(&kvm_cpuid_entry2::default()) {
        entries.pop();
    }
    Ok(entries)
}

fn save_msrs(
    fd: &VcpuFd,
    indices: &[u32],
    shown: &[kvm_cpuid_entry2],
) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut wanted: Vec<u32> = indices.iter().chain(&MTRRS).copied().collect();
    wanted.retain(|msr| !features::is_hidden(*msr, shown));
    wanted.sort_unstable();
    wanted.dedup();
    let mut saved = Vec::with_capacity(wanted.len());
    let mut rest = wanted.as_slice();
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(MSRS_PER_CALL)];
        let entries: Vec<_> = chunk
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = msr_list(&entries)?;
        let read = fd
            .get_msrs(&mut msrs)
            .map_err(call("KVM_GET_MSRS"))?
            .min(chunk.len());
        saved.extend_from_slice(&msrs.as_slice()[..read]);
        // KVM stops at the first register it cannot read: one that this processor does not have.
        let skip = usize::from(read < chunk.len());
        rest = &rest[read + skip..];
    }
    Ok(saved)
}

fn set_msrs(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let written = fd
            .set_msrs(&msr_list(rest)?)
            .map_err(call("KVM_SET_MSRS"))?;
        // KVM stops at the first it will not write. Those it lists but only lets the guest write hold
        // zero; any other would come back wrong.
        match rest.get(written) {
            None => break,
            Some(refused) if refused.data == 0 => rest = &rest[written + 1..],
            Some(refused) => {
                tracing::warn!(
                    index = format_args!("{:#x}", refused.index),
                    data = refused.data,
                    "cannot restore a model-specific register"
                );
                return Err(KvmError::Call {
                    call: "KVM_SET_MSRS",
                    source: kvm_ioctls::Error::new(libc::EINVAL),
                });
            }
        }
    }
    Ok(())
}

fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|_| KvmError::Call {
        call: "KVM_SET_MSRS",
        source: kvm_ioctls::Error::new(libc::E2BIG),
    })
}
