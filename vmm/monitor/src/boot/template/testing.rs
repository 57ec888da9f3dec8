//! Made-up hosts, for tests.

#![allow(clippy::unwrap_used)] // helpers of tests

use super::*;

/// A host with what a template promises and nothing more.
pub fn bare(template: CpuTemplate) -> CpuId {
    let entry = |function, index| kvm_cpuid_entry2 {
        function,
        index,
        ..Default::default()
    };
    let leaves = [
        (0, 0),
        (1, 0),
        (2, 0),
        (4, 0),
        (6, 0),
        (7, 0),
        (7, 1),
        (7, 2),
        (0xa, 0),
        (0xb, 0),
        (0xd, 0),
        (0xd, 1),
        (0xd, 2),
        (0xd, 5),
        (0x14, 0),
        (0x4000_0001, 0),
        (0x8000_0000, 0),
        (0x8000_0001, 0),
        (0x8000_0007, 0),
        (0x8000_0008, 0),
        (0x8000_000a, 0),
        (0x8000_0021, 0),
    ];
    let entries = leaves.map(|(leaf, index)| entry(leaf, index));
    let mut host = CpuId::from_entries(&entries).unwrap();
    for entry in host.as_mut_slice() {
        match (entry.function, entry.index) {
            (0, _) => (entry.eax, entry.ebx) = (0x20, 0x6874_7541),
            (7, 0) => entry.eax = 2,
            (0xd, 2) => (entry.eax, entry.ebx) = (256, 576),
            (0xd, 5) => (entry.eax, entry.ebx) = (64, 1088),
            (0x8000_0000, _) => entry.eax = 0x8000_0022,
            (0x8000_0008, _) => entry.eax = 48 << 8 | PHYSICAL_BITS,
            _ => {}
        }
    }
    for features in template.features().filter(|f| f.when != When::IfThere) {
        let bits = features
            .bits
            .iter()
            .fold(0, |bits, (bit, _)| bits | 1 << bit);
        let (leaf, index) = (features.leaf, features.index);
        change(&mut host, leaf, index, features.register, |value| {
            value | bits
        });
    }
    host
}

/// The same with more bits in part 0 of a leaf.
pub fn with(host: &CpuId, leaf: u32, register: Register, bits: u32) -> CpuId {
    let mut host = host.clone();
    change(&mut host, leaf, 0, register, |value| value | bits);
    host
}

/// The same with fewer.
pub fn without(host: &CpuId, leaf: u32, register: Register, bits: u32) -> CpuId {
    let mut host = host.clone();
    change(&mut host, leaf, 0, register, |value| value & !bits);
    host
}

fn change(host: &mut CpuId, leaf: u32, index: u32, of: Register, to: impl Fn(u32) -> u32) {
    let entries = host.as_mut_slice().iter_mut();
    let mut found = entries.filter(|e| (e.function, e.index) == (leaf, index));
    let entry = found.next().unwrap();
    let value = match of {
        Eax => &mut entry.eax,
        Ebx => &mut entry.ebx,
        Ecx => &mut entry.ecx,
        Edx => &mut entry.edx,
    };
    *value = to(*value);
}
