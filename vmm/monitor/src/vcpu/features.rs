//! What a snapshot's guest was shown of its processors, held against a host; and which model-specific
//! registers go with it.
//!
//! Nothing here knows of templates: a guest was shown what its saved CPUID says, however that came about.

use kvm_bindings::{CpuId, kvm_cpuid_entry2, kvm_msr_entry};

use crate::boot::template::{self, Register, find};
use Register::{Eax, Ebx, Ecx, Edx};

/// Every bit.
const ALL: u32 = u32::MAX;

/// The registers that are lists of features, and which of their bits are. Left out are those that the
/// guest's own settings or KVM turn on (leaf 1: OSXSAVE, hypervisor, TSC deadline, MONITOR, APIC,
/// multi-threading; leaf 7: OSPKE), or that come with the description of cores (`cmp_legacy`, `topoext`).
const FEATURES: [(u32, u32, Register, u32); 19] = [
    (1, 0, Ecx, !(1 << 31 | 1 << 27 | 1 << 24 | 1 << 3)),
    (1, 0, Edx, !(1 << 28 | 1 << 9)),
    (7, 0, Ebx, ALL),
    (7, 0, Ecx, !(1 << 4)),
    (7, 0, Edx, ALL),
    (7, 1, Eax, ALL),
    (7, 1, Ebx, ALL),
    (7, 1, Ecx, ALL),
    (7, 1, Edx, ALL),
    (7, 2, Edx, ALL),
    (0xd, 0, Eax, ALL),
    (0xd, 0, Edx, ALL),
    (0xd, 1, Eax, ALL),
    // KVM's own: what a guest has been promised of its hypercalls and clocks.
    (0x4000_0001, 0, Eax, ALL),
    (0x8000_0001, 0, Ecx, !(1 << 22 | 1 << 1)),
    (0x8000_0001, 0, Edx, !(1 << 9)),
    (0x8000_0008, 0, Ebx, ALL),
    (0x8000_0021, 0, Eax, ALL),
    (0x8000_0021, 0, Ecx, ALL),
];

/// Checks that a host has everything the guest was shown; a program that found a feature missing after a
/// resume would be killed in the middle of what it did.
pub fn check(shown: &[kvm_cpuid_entry2], supported: &CpuId) -> Result<(), String> {
    let mut missing = Vec::new();
    for entry in shown {
        let here = find(supported, entry.function, entry.index)
            .copied()
            .unwrap_or_default();
        if entry.function == 0 {
            let vendor = |e: &kvm_cpuid_entry2| (e.ebx, e.edx, e.ecx);
            if vendor(entry) != vendor(&here) {
                return Err("its maker is another".into());
            }
        }
        if entry.function == 0x8000_0008 {
            let bits = |e: &kvm_cpuid_entry2| e.eax & 0xff;
            if bits(entry) > bits(&here) {
                missing.push(format!("{} bits of physical addresses", bits(entry)));
            }
        }
        for (leaf, index, register, mask) in FEATURES {
            if (leaf, index) != (entry.function, entry.index) {
                continue;
            }
            let of = |entry| template::register(entry, register);
            let absent = of(entry) & mask & !of(&here);
            let bits = (0..32).filter(|bit| absent & 1 << bit != 0);
            missing.extend(bits.map(|bit| template::name(leaf, index, register, bit)));
        }
    }
    if missing.is_empty() {
        Ok(())
    } else {
        Err(format!("this host's lacks {}", missing.join(", ")))
    }
}

/// IA32_ARCH_CAPABILITIES: what Intel's CPUID has no room for, most of it vulnerabilities that a processor
/// does not have.
pub const ARCH_CAPABILITIES: u32 = 0x10a;

/// What makes a guest do without a guard, or trust in one.
struct Guard {
    bit: u8,
    name: &'static str,
    /// Where the processor has all of these it is not open to what the guard is for, and needs none.
    unneeded: u64,
}

const fn guard(bit: u8, name: &'static str) -> Guard {
    Guard {
        bit,
        name,
        unneeded: 0,
    }
}

/// The bits of [`ARCH_CAPABILITIES`] that a guest relies on (SDM, volume 4, table 2-2; names as there).
/// Left out are those that only announce another register: KVM refuses the value in it where it has none.
#[rustfmt::skip]
const GUARDS: [Guard; 17] = [
    guard(0, "RDCL_NO"),
    guard(1, "IBRS_ALL"),
    guard(3, "SKIP_L1DFL_VMENTRY"),
    guard(4, "SSB_NO"),
    guard(5, "MDS_NO"),
    guard(6, "IF_PSCHANGE_MC_NO"),
    guard(8, "TAA_NO"),
    guard(13, "SBDR_SSDP_NO"),
    guard(14, "FBSDP_NO"),
    guard(15, "PSDP_NO"),
    // VERW empties the fill buffers; for the three above.
    Guard { bit: 17, name: "FB_CLEAR", unneeded: 1 << 13 | 1 << 14 | 1 << 15 },
    guard(20, "BHI_NO"),
    guard(24, "PBRSB_NO"),
    guard(26, "GDS_NO"),
    guard(27, "RFDS_NO"),
    // VERW empties the register file.
    Guard { bit: 28, name: "RFDS_CLEAR", unneeded: 1 << 27 },
    // No processor sets it: KVM does, and Linux looks for it.
    guard(62, "ITS_NO"),
];

/// The bits of the same register that are the other way round: they tell of a weakness.
const WEAKNESSES: [(u8, &str); 2] = [
    (2, "RSBA"),   // returns are predicted by more than the return stack
    (19, "RRSBA"), // so they are, within the same privilege
];

/// What the guest was told in [`ARCH_CAPABILITIES`]; nothing where CPUID does not announce the register.
pub fn told(msrs: &[kvm_msr_entry], shown: &[kvm_cpuid_entry2]) -> Option<u64> {
    if is_hidden(ARCH_CAPABILITIES, shown) {
        return None;
    }
    let saved = msrs.iter().find(|msr| msr.index == ARCH_CAPABILITIES)?;
    Some(saved.data)
}

/// Holds what a guest was told in [`ARCH_CAPABILITIES`] against what this host has. A guest looks once, when
/// it starts, and leaves out the guards it does not need; and KVM lets it be told anything. So nothing
/// else would notice that it goes on unguarded on a processor that needs them.
pub fn check_guards(told: u64, here: u64) -> Result<(), String> {
    let lost: Vec<_> = GUARDS
        .iter()
        .filter(|guard| told & !here & 1 << guard.bit != 0)
        .filter(|guard| guard.unneeded == 0 || here & guard.unneeded != guard.unneeded)
        .map(|guard| guard.name)
        .collect();
    let untold: Vec<_> = WEAKNESSES
        .iter()
        .filter(|(bit, _)| here & !told & 1 << bit != 0)
        .map(|(_, name)| *name)
        .collect();
    let mut wrong = Vec::new();
    for (names, what) in [(lost, "lacks"), (untold, "has the weakness")] {
        if !names.is_empty() {
            wrong.push(format!("{what} {}", names.join(", ")));
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    Err(format!(
        "this host's {} (IA32_ARCH_CAPABILITIES), and the guest would go on without a guard",
        wrong.join(" and ")
    ))
}

/// Where a feature is announced.
type Owner = (u32, u32, Register, u32);

/// Intel's performance counters: leaf 0xa has their version, and 0 is none.
const INTEL_COUNTERS: Owner = (0xa, 0, Eax, 0xff);
/// AMD's SVM.
const SVM: Owner = (0x8000_0001, 0, Ecx, 1 << 2);

/// Model-specific registers, first and last, that are a feature's (SDM, volume 4; APM, volume 2, appendix A):
/// a guest that is not shown it cannot use them. KVM has them all the same, some of them not zero, and
/// another host's may refuse what is in them.
const OWNED: [(u32, u32, Owner); 17] = [
    (0x0e1, 0x0e1, (7, 0, Ecx, 1 << 5)),   // UMWAIT_CONTROL: WAITPKG
    (0x10a, 0x10a, (7, 0, Edx, 1 << 29)),  // ARCH_CAPABILITIES
    (0x1c4, 0x1c5, (0xd, 1, Eax, 1 << 4)), // XFD, XFD_ERR
    (0x345, 0x345, (1, 0, Ecx, 1 << 15)),  // PERF_CAPABILITIES: PDCM
    (0x480, 0x493, (1, 0, Ecx, 1 << 5)),   // what VMX can do
    (0x560, 0x587, (7, 0, Ebx, 1 << 25)),  // Processor Trace
    (0xd90, 0xd90, (7, 0, Ebx, 1 << 14)),  // BNDCFGS: MPX
    (0xda0, 0xda0, (0xd, 1, Eax, 1 << 3)), // XSS: XSAVES
    (0x0c1, 0x0c8, INTEL_COUNTERS),        // counters
    (0x186, 0x18d, INTEL_COUNTERS),        // what they count
    (0x309, 0x30c, INTEL_COUNTERS),        // fixed counters
    (0x38d, 0x390, INTEL_COUNTERS),        // control and status
    (0x4c1, 0x4c8, INTEL_COUNTERS),        // counters in their full width
    (0x600, 0x600, INTEL_COUNTERS),        // debug store
    (0xc000_0104, 0xc000_0104, SVM),       // TSC ratio
    (0xc001_0117, 0xc001_0117, SVM),       // host save area
    // Six counters, and what they count: PERFCTR_CORE
    (0xc001_0200, 0xc001_020b, (0x8000_0001, 0, Ecx, 1 << 23)),
];

/// Whether a model-specific register belongs to a feature that the guest is not shown. It is not saved
/// then: in a new processor it is what it was in the old one, before a guest.
pub fn is_hidden(msr: u32, shown: &[kvm_cpuid_entry2]) -> bool {
    let sees = |(leaf, index, register, mask): Owner| {
        shown.iter().any(|entry| {
            (entry.function, entry.index) == (leaf, index)
                && template::register(entry, register) & mask != 0
        })
    };
    OWNED
        .into_iter()
        .any(|(first, last, owner)| (first..=last).contains(&msr) && !sees(owner))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::template::CpuTemplate;
    use crate::boot::template::testing::{bare, with, without};

    fn shown(template: CpuTemplate, host: &CpuId) -> Vec<kvm_cpuid_entry2> {
        template.apply(host).unwrap().as_slice().to_vec()
    }

    #[test]
    fn a_template_is_what_a_snapshot_wants_of_its_next_host() {
        let rich = with(&bare(CpuTemplate::X86_64V3), 7, Ebx, 1 << 16); // AVX-512
        let least = bare(CpuTemplate::X86_64V2);
        let v2 = shown(CpuTemplate::X86_64V2, &rich);
        check(&v2, &rich).unwrap();
        check(&v2, &least).unwrap();
        let error = check(&shown(CpuTemplate::X86_64V3, &rich), &least).unwrap_err();
        for name in ["avx2", "bmi2", "fma", "avx state", "xsaveopt"] {
            assert!(error.contains(name), "{error}");
        }
        let error = check(rich.as_slice(), &bare(CpuTemplate::X86_64V3)).unwrap_err();
        assert_eq!(error, "this host's lacks bit 16 of Ebx in CPUID leaf 0x7.0");
        for (leaf, register, bit, name) in [
            (1, Ecx, 20, "sse4_2"),
            (0x8000_0001, Ecx, 0, "lahf_lm"),
            (7, Ebx, 1, "tsc_adjust"),
        ] {
            let error = check(&v2, &without(&least, leaf, register, 1 << bit)).unwrap_err();
            assert_eq!(error, format!("this host's lacks {name}"));
        }
    }

    #[test]
    fn a_guard_that_the_guest_relies_on_must_be_there() {
        let least = bare(CpuTemplate::X86_64V2);
        let guarded = with(&least, 7, Edx, 1 << 26);
        let guest = shown(CpuTemplate::X86_64V2, &guarded);
        check(&guest, &guarded).unwrap();
        let error = check(&guest, &least).unwrap_err();
        assert_eq!(error, "this host's lacks spec_ctrl");
        // The other way there is nothing to lose.
        check(&shown(CpuTemplate::X86_64V2, &least), &guarded).unwrap();
    }

    #[test]
    fn another_maker_and_shorter_addresses_are_refused() {
        let host = bare(CpuTemplate::X86_64V2);
        let guest = shown(CpuTemplate::X86_64V2, &host);
        let error = check(&guest, &with(&host, 0, Ebx, 1 << 1)).unwrap_err();
        assert!(error.contains("maker"), "{error}");
        let error = check(&guest, &without(&host, 0x8000_0008, Eax, 0x7f)).unwrap_err();
        assert!(error.contains("39 bits of physical addresses"), "{error}");
    }

    const RDCL_NO: u64 = 1 << 0;
    const MDS_NO: u64 = 1 << 5;
    const FB_CLEAR: u64 = 1 << 17;
    const RFDS_NO: u64 = 1 << 27;
    const RFDS_CLEAR: u64 = 1 << 28;
    const NO_STALE_DATA: u64 = 0b111 << 13;
    const RSBA: u64 = 1 << 2;
    const RRSBA: u64 = 1 << 19;
    const TSX_CTRL: u64 = 1 << 7;

    #[test]
    fn a_host_with_the_same_guards_or_more_is_taken() {
        for (told, here) in [
            (0, 0),
            (RDCL_NO | MDS_NO | RRSBA, RDCL_NO | MDS_NO | RRSBA),
            (RDCL_NO, RDCL_NO | MDS_NO | RFDS_NO),
            (0, !(RSBA | RRSBA)),
            // Weaknesses that the guest guards against in vain.
            (RSBA | RRSBA, 0),
            // A register of its own, which is restored or refused as such.
            (TSX_CTRL, 0),
            // Nothing to clear.
            (FB_CLEAR, NO_STALE_DATA),
            (RFDS_CLEAR, RFDS_NO),
        ] {
            assert_eq!(check_guards(told, here), Ok(()), "{told:#x} {here:#x}");
        }
    }

    #[test]
    fn a_host_that_needs_more_guards_is_refused_by_name() {
        let every = GUARDS.iter().fold(0, |all, guard| all | 1 << guard.bit);
        for (told, here, named) in [
            (RDCL_NO | MDS_NO, 0, "lacks RDCL_NO, MDS_NO ("),
            (RDCL_NO | MDS_NO, RDCL_NO | RFDS_NO, "lacks MDS_NO ("),
            (FB_CLEAR, NO_STALE_DATA & !(1 << 15), "lacks FB_CLEAR ("),
            (RFDS_NO, RFDS_CLEAR, "lacks RFDS_NO ("),
            (every, every & !(1 << 62), "lacks ITS_NO ("),
            (0, RSBA, "has the weakness RSBA ("),
            (RSBA, RSBA | RRSBA, "has the weakness RRSBA ("),
            (
                MDS_NO,
                RSBA | RRSBA,
                "lacks MDS_NO and has the weakness RSBA, RRSBA (",
            ),
        ] {
            let error = check_guards(told, here).unwrap_err();
            assert!(
                error.starts_with(&format!("this host's {named}")),
                "{error}"
            );
        }
        for guard in GUARDS.iter().filter(|guard| guard.unneeded == 0) {
            let error = check_guards(every, every & !(1 << guard.bit)).unwrap_err();
            assert!(error.contains(guard.name), "{error}");
        }
    }

    #[test]
    fn a_guest_without_the_register_was_told_nothing() {
        let msr = |index, data| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let saved = [msr(0x10, 7), msr(ARCH_CAPABILITIES, MDS_NO)];
        let amd = bare(CpuTemplate::X86_64V2);
        let intel = with(&amd, 7, Edx, 1 << 29);
        assert_eq!(told(&saved, amd.as_slice()), None);
        assert_eq!(told(&saved, intel.as_slice()), Some(MDS_NO));
        assert_eq!(told(&saved[..1], intel.as_slice()), None);
        let guest = shown(CpuTemplate::X86_64V2, &intel);
        assert_eq!(told(&saved, &guest), Some(MDS_NO));
    }

    #[test]
    fn registers_of_hidden_features_are_left_out() {
        const VMX_BASIC: u32 = 0x480;
        const LSTAR: u32 = 0xc000_0082;
        let host = with(&bare(CpuTemplate::X86_64V2), 1, Ecx, 1 << 5);
        let host = with(&host, 7, Edx, 1 << 29);
        let all = host.as_slice();
        let guest = shown(CpuTemplate::X86_64V2, &host);
        for (msr, hidden_from_all, hidden_from_guest) in [
            (VMX_BASIC, false, true),
            (ARCH_CAPABILITIES, false, false),
            (LSTAR, false, false),
            (0xc1, true, true),
        ] {
            assert_eq!(is_hidden(msr, all), hidden_from_all, "{msr:#x}");
            assert_eq!(is_hidden(msr, &guest), hidden_from_guest, "{msr:#x}");
        }
    }
}
