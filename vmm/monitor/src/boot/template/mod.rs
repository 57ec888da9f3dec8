//! CPU templates: a guest is shown one fixed set of features rather than all that its host has, so that its
//! snapshot can be resumed on every host of the same maker that has these.
//!
//! The levels are those of the x86-64 psABI (<https://gitlab.com/x86-psABIs/x86-64-ABI>, table "Micro-Architecture
//! Levels"), which compilers and distributions know by the same names. Bits are those of the Intel SDM,
//! volume 2A, CPUID, and of the AMD APM, volume 3, appendix E; names those of `/proc/cpuinfo`.
//!
//! | what | in a template |
//! |---|---|
//! | a feature of its level, or that every processor of the level and KVM have | always shown, and a host without it is refused |
//! | a guard: what protects the guest's kernel and programs (SMEP, SMAP, speculation controls and "not affected" bits, Intel's of which are in a register of their own) | shown where the host has it: a template must not leave a guest open. Its snapshot then wants it, too |
//! | AMD's bits for the kind of cores, and its second list of the baseline | shown where the host has them; Intel's have none |
//! | the processor's name, model, caches and topology, KVM's own leaves | as without a template: they describe, and come with the snapshot |
//! | everything else: later instructions, their register state, performance counters, nested virtualization, Processor Trace, … | not there |

use std::fmt;
use std::str::FromStr;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

/// What a guest is shown of its host's processor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum CpuTemplate {
    /// All that this host's KVM supports.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// About what Intel's Nehalem (2008) and AMD's Jaguar (2013) have.
    #[serde(rename = "x86-64-v2")]
    X86_64V2,
    /// About what Intel's Haswell (2013) and AMD's Excavator (2015) have.
    #[serde(rename = "x86-64-v3")]
    X86_64V3,
}

/// Why a guest cannot be started under a template.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this host's processors lack {missing} of the CPU template {template}; start it with a lower cpu_template (host takes what there is), or on another host"
)]
pub struct Lacking {
    template: CpuTemplate,
    missing: String,
}

/// A register of CPUID's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// Who is shown a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// Guests of every template.
    Always,
    /// Those of x86-64-v3.
    V3,
    /// Those whose host has it.
    IfThere,
}

struct Features {
    leaf: u32,
    index: u32,
    register: Register,
    when: When,
    /// Bits and their names.
    bits: &'static [(u8, &'static str)],
}

const fn features(
    leaf: u32,
    index: u32,
    register: Register,
    when: When,
    bits: &'static [(u8, &'static str)],
) -> Features {
    Features {
        leaf,
        index,
        register,
        when,
        bits,
    }
}

#[rustfmt::skip]
const FEATURES: &[Features] = &[
    // The baseline, and what Linux's 64-bit kernel needs or finds in all of them.
    features(1, 0, Edx, When::Always, &[
        (0, "fpu"), (2, "de"), (3, "pse"), (4, "tsc"), (5, "msr"), (6, "pae"), (7, "mce"), (8, "cx8"),
        (9, "apic"), (11, "sep"), (12, "mtrr"), (13, "pge"), (14, "mca"), (15, "cmov"), (16, "pat"),
        (17, "pse36"), (19, "clflush"), (23, "mmx"), (24, "fxsr"), (25, "sse"), (26, "sse2"),
    ]),
    features(0x8000_0001, 0, Edx, When::Always, &[
        (11, "syscall"), (20, "nx"), (27, "rdtscp"), (29, "lm"),
    ]),
    // x86-64-v2, and what KVM emulates on every host: the x2APIC and the TSC's offset.
    features(1, 0, Ecx, When::Always, &[
        (0, "sse3"), (9, "ssse3"), (13, "cx16"), (19, "sse4_1"), (20, "sse4_2"), (21, "x2apic"),
        (23, "popcnt"),
    ]),
    features(7, 0, Ebx, When::Always, &[(1, "tsc_adjust")]),
    features(0x8000_0001, 0, Ecx, When::Always, &[(0, "lahf_lm")]),
    // x86-64-v3, and what all its processors have beyond: AES, carry-less products, random numbers, the
    // segment bases' instructions, XSAVEOPT.
    features(1, 0, Ecx, When::V3, &[
        (1, "pclmulqdq"), (12, "fma"), (22, "movbe"), (25, "aes"), (26, "xsave"), (28, "avx"), (29, "f16c"),
        (30, "rdrand"),
    ]),
    features(7, 0, Ebx, When::V3, &[(0, "fsgsbase"), (3, "bmi1"), (5, "avx2"), (8, "bmi2")]),
    features(0x8000_0001, 0, Ecx, When::V3, &[(5, "abm")]),
    features(0xd, 0, Eax, When::V3, &[(0, "x87 state"), (1, "sse state"), (2, "avx state")]),
    features(0xd, 1, Eax, When::V3, &[(0, "xsaveopt")]),
    // Guards of the kernel against its programs.
    features(7, 0, Ebx, When::IfThere, &[(7, "smep"), (20, "smap")]),
    // Guards against leaks by speculation: Intel's, then AMD's.
    features(7, 0, Edx, When::IfThere, &[
        (10, "md_clear"), (26, "spec_ctrl"), (27, "intel_stibp"), (28, "flush_l1d"),
        (29, "arch_capabilities"), (31, "spec_ctrl_ssbd"),
    ]),
    features(7, 2, Edx, When::IfThere, &[
        (0, "psfd"), (1, "ipred_ctrl"), (2, "rrsba_ctrl"), (4, "bhi_ctrl"), (5, "mcdt_no"),
    ]),
    features(0x8000_0008, 0, Ebx, When::IfThere, &[
        (12, "ibpb"), (14, "ibrs"), (15, "stibp"), (17, "stibp_always_on"), (24, "amd_ssbd"),
        (25, "virt_ssbd"), (26, "amd_ssb_no"), (28, "amd_psfd"), (29, "btc_no"), (30, "ibpb_ret"),
    ]),
    features(0x8000_0021, 0, Eax, When::IfThere, &[
        (2, "lfence_rdtsc"), (5, "verw_clear"), (27, "sbpb"), (28, "ibpb_brtype"), (29, "srso_no"),
    ]),
    features(0x8000_0021, 0, Ecx, When::IfThere, &[(1, "tsa_sq_no"), (2, "tsa_l1_no")]),
    // AMD's description of cores, without which kernels guess, and its second list of the baseline.
    features(0x8000_0001, 0, Ecx, When::IfThere, &[(1, "cmp_legacy"), (22, "topoext")]),
    features(0x8000_0001, 0, Edx, When::IfThere, &[
        (0, "fpu"), (2, "de"), (3, "pse"), (4, "tsc"), (5, "msr"), (6, "pae"), (7, "mce"), (8, "cx8"),
        (9, "apic"), (12, "mtrr"), (13, "pge"), (14, "mca"), (15, "cmov"), (16, "pat"), (17, "pse36"),
        (23, "mmx"), (24, "fxsr"),
    ]),
];

/// The last leaves that a guest is told of; what is in between and not named below answers zeroes.
const LAST_BASIC_LEAF: u32 = 0xd;
const LAST_EXTENDED_LEAF: u32 = 0x8000_0021;
/// Last part of leaf 7 with something in it.
const LAST_PART_OF_7: u32 = 2;
/// The local APIC's timer does not stop, of leaf 6.
const ARAT: u32 = 1 << 2;
/// Width of physical addresses: what server processors of these levels have at least, and enough for the
/// largest Machine (256 GiB, and the gap below 4 GiB).
const PHYSICAL_BITS: u32 = 39;
/// Of linear addresses: four levels of page tables.
const LINEAR_BITS: u32 = 48;
/// Bytes of an XSAVE area's fixed part, x87 and SSE: 512 and a header (SDM, volume 1, 13.4).
const XSAVE_FIXED_BYTES: u32 = 512 + 64;

/// Hides from a guest that it could have guests of its own (VMX; SVM and its leaf). One that was shown it before it
/// was suspended goes on with it: a resumed guest sees what it saw.
pub fn hide_nesting(shown: &mut CpuId) {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    for entry in shown.as_mut_slice() {
        match entry.function {
            1 => entry.ecx &= !VMX,
            0x8000_0001 => entry.ecx &= !SVM,
            0x8000_000a => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            _ => {}
        }
    }
}

impl CpuTemplate {
    /// Whether it hides nothing.
    pub fn is_host(&self) -> bool {
        *self == Self::Host
    }

    /// What a guest sees of `supported`, what KVM supports here.
    pub fn apply(self, supported: &CpuId) -> Result<CpuId, Lacking> {
        if self.is_host() {
            return Ok(supported.clone());
        }
        self.check(supported)?;
        let mut shown = supported.clone();
        // The area grows with the components that are left: a leaf of its own for each from 2 on.
        let area = supported
            .as_slice()
            .iter()
            .filter(|e| e.function == 0xd && (2..32).contains(&e.index))
            .filter(|e| self.mask(0xd, 0, Eax) & 1 << e.index != 0)
            .map(|e| e.ebx.saturating_add(e.eax))
            .fold(XSAVE_FIXED_BYTES, u32::max);
        shown.retain(|entry| self.keeps(entry));
        for entry in shown.as_mut_slice() {
            self.fit(entry, area);
        }
        Ok(shown)
    }

    /// Whether this host has all that the template promises.
    pub fn check(self, supported: &CpuId) -> Result<(), Lacking> {
        let mut missing = Vec::new();
        let promised = |features: &&Features| features.when != When::IfThere;
        for features in self.features().filter(promised) {
            let there = find(supported, features.leaf, features.index)
                .map_or(0, |entry| register(entry, features.register));
            let absent = features
                .bits
                .iter()
                .filter(|(bit, _)| there & 1 << bit == 0);
            missing.extend(absent.map(|(_, name)| (*name).to_owned()));
        }
        let widths = find(supported, 0x8000_0008, 0).map_or(0, |entry| entry.eax);
        if !self.is_host() && (widths & 0xff) < PHYSICAL_BITS {
            missing.push(format!("{PHYSICAL_BITS} bits of physical addresses"));
        }
        if missing.is_empty() {
            return Ok(());
        }
        Err(Lacking {
            template: self,
            missing: missing.join(", "),
        })
    }

    /// Whether the guest is shown something of this leaf.
    fn keeps(self, entry: &kvm_cpuid_entry2) -> bool {
        match (entry.function, entry.index) {
            // Names, models, caches, topology.
            (0..=2 | 4 | 6 | 0xb, _) | (0x8000_0000..=0x8000_0006, _) => true,
            (0x8000_0008 | 0x8000_001d | 0x8000_001e | 0x8000_0021, _) => true,
            (0x4000_0000..=0x4000_00ff, _) => true,
            (7, 0) => true,
            (7, LAST_PART_OF_7) => true,
            (0xd, 0 | 1) => self.mask(0xd, 0, Eax) != 0,
            (0xd, component @ 2..32) => self.mask(0xd, 0, Eax) & 1 << component != 0,
            _ => false,
        }
    }

    fn fit(self, entry: &mut kvm_cpuid_entry2, xsave_area: u32) {
        let (leaf, index) = (entry.function, entry.index);
        let mask = |register| self.mask(leaf, index, register);
        match (leaf, index) {
            (0, _) => entry.eax = entry.eax.min(LAST_BASIC_LEAF),
            (0x8000_0000, _) => entry.eax = entry.eax.min(LAST_EXTENDED_LEAF),
            (1 | 0x8000_0001, _) => {
                entry.ecx &= mask(Ecx);
                entry.edx &= mask(Edx);
            }
            (6, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (entry.eax & ARAT, 0, 0, 0),
            (7, _) => {
                entry.eax = if index == 0 {
                    entry.eax.min(LAST_PART_OF_7)
                } else {
                    0
                };
                entry.ebx &= mask(Ebx);
                entry.ecx &= mask(Ecx);
                entry.edx &= mask(Edx);
            }
            (0xd, 0) => {
                entry.eax &= mask(Eax);
                (entry.ebx, entry.ecx, entry.edx) = (xsave_area, xsave_area, 0);
            }
            (0xd, 1) => {
                entry.eax &= mask(Eax);
                (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0);
            }
            (0x8000_0008, _) => {
                entry.eax = LINEAR_BITS << 8 | PHYSICAL_BITS;
                entry.ebx &= mask(Ebx);
                entry.edx = 0;
            }
            (0x8000_0021, _) => {
                entry.eax &= mask(Eax);
                entry.ecx &= mask(Ecx);
                (entry.ebx, entry.edx) = (0, 0);
            }
            _ => {}
        }
    }

    fn features(self) -> impl Iterator<Item = &'static Features> {
        FEATURES.iter().filter(move |features| match features.when {
            When::Always | When::IfThere => !self.is_host(),
            When::V3 => self >= Self::X86_64V3,
        })
    }

    /// The bits of a register that a guest may see.
    fn mask(self, leaf: u32, index: u32, register: Register) -> u32 {
        self.features()
            .filter(|f| (f.leaf, f.index, f.register) == (leaf, index, register))
            .flat_map(|f| f.bits)
            .fold(0, |mask, (bit, _)| mask | 1 << bit)
    }
}

impl fmt::Display for CpuTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::X86_64V2 => "x86-64-v2",
            Self::X86_64V3 => "x86-64-v3",
        })
    }
}

impl FromStr for CpuTemplate {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let all = [Self::Host, Self::X86_64V2, Self::X86_64V3];
        all.into_iter()
            .find(|template| template.to_string() == name)
            .ok_or_else(|| "must be host, x86-64-v2 or x86-64-v3".to_owned())
    }
}

/// The entry of a leaf; `index` is 0 where a leaf has one part only.
pub fn find(cpuid: &CpuId, leaf: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    cpuid
        .as_slice()
        .iter()
        .find(|entry| (entry.function, entry.index) == (leaf, index))
}

/// A register of an entry.
pub fn register(entry: &kvm_cpuid_entry2, register: Register) -> u32 {
    match register {
        Eax => entry.eax,
        Ebx => entry.ebx,
        Ecx => entry.ecx,
        Edx => entry.edx,
    }
}

/// A feature's name, or where it is in the manuals.
pub fn name(leaf: u32, index: u32, register: Register, bit: u8) -> String {
    let known = FEATURES
        .iter()
        .filter(|f| (f.leaf, f.index, f.register) == (leaf, index, register))
        .flat_map(|f| f.bits)
        .find(|(b, _)| *b == bit);
    known.map_or_else(
        || format!("bit {bit} of {register:?} in CPUID leaf {leaf:#x}.{index}"),
        |(_, name)| (*name).to_owned(),
    )
}

#[cfg(test)]
pub mod testing;
#[cfg(test)]
mod tests;
