//! The state in which a processor starts: 64-bit mode, flat segments, first gigabyte mapped one to one.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, Msrs, kvm_cpuid_entry2, kvm_msr_entry, kvm_regs,
    kvm_segment, kvm_sregs,
};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, Entry, layout};
use crate::memory::GuestRam;

/// Writes the tables the first instruction needs (GDT, page tables) and fits `sregs` to them.
pub fn long_mode(ram: &GuestRam, sregs: &mut kvm_sregs) -> Result<(), BootError> {
    const CODE: u64 = 0x00af_9b00_0000_ffff;
    const DATA: u64 = 0x00cf_9300_0000_ffff;
    const TSS: u64 = 0x008f_8b00_0000_ffff;
    const CODE_SELECTOR: u16 = 0x10;
    const DATA_SELECTOR: u16 = 0x18;
    const TSS_SELECTOR: u16 = 0x20;
    // The 64-bit boot protocol asks for __BOOT_CS at 0x10 and __BOOT_DS at 0x18.
    let gdt = [0, 0, CODE, DATA, TSS];
    for (index, entry) in gdt.iter().enumerate() {
        ram.write_obj(*entry, GuestAddress(layout::GDT + 8 * index as u64))?;
    }
    ram.write_obj(0_u64, GuestAddress(layout::IDT))?;
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 8 * gdt.len() as u16 - 1;
    sregs.idt.base = layout::IDT;
    sregs.idt.limit = 7;
    sregs.cs = segment(CODE, CODE_SELECTOR);
    let data = segment(DATA, DATA_SELECTOR);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TSS, TSS_SELECTOR);

    identity_map(ram)?;
    const CR0_PE: u64 = 1;
    const CR0_PG: u64 = 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME: u64 = 1 << 8;
    const EFER_LMA: u64 = 1 << 10;
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
    Ok(())
}

/// Maps the first GiB one to one with 2 MiB pages: PML4, one PDPT, one page directory.
fn identity_map(ram: &GuestRam) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const HUGE: u64 = 1 << 7;
    let (pml4, pdpt, pd) = (
        layout::PAGE_TABLES,
        layout::PAGE_TABLES + 0x1000,
        layout::PAGE_TABLES + 0x2000,
    );
    ram.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4))?;
    ram.write_obj(pd | PRESENT_WRITABLE, GuestAddress(pdpt))?;
    for index in 0..512_u64 {
        ram.write_obj(
            index << 21 | HUGE | PRESENT_WRITABLE,
            GuestAddress(pd + 8 * index),
        )?;
    }
    Ok(())
}

/// The registers of the boot processor: its instruction pointer, and `boot_params` in RSI.
pub fn entry_registers(entry: Entry) -> kvm_regs {
    kvm_regs {
        rflags: 2, // the bit that is always set
        rip: entry.rip,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rsi: entry.boot_params,
        ..Default::default()
    }
}

/// What the processor must find in its model-specific registers: memory is write-back by default
/// (there is no firmware to set up MTRRs), fast string operations are on.
pub fn boot_msrs() -> Msrs {
    const MISC_ENABLE: u32 = 0x1a0;
    const MISC_ENABLE_FAST_STRING: u64 = 1;
    const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
    const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[
        entry(MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MTRR_DEFAULT_TYPE, MTRR_ENABLE_WRITE_BACK),
    ])
    .expect("two entries are fewer than the limit")
}

/// Turns what KVM supports, or a template leaves of it, into what processor `id` of `count` shows.
///
/// The topology is one package of `count` cores with one thread each. The invariant-TSC bit is
/// hidden: with it Linux would prefer the TSC to KVM's clock, and the TSC knows nothing of the time
/// a Machine slept. Asynchronous page faults are hidden too: after a resume every page is first read
/// from the snapshot, KVM then tells the guest of each by a page fault and an interrupt whose state no
/// snapshot can hold, and guests die of it (Cloud Hypervisor 2498 and Firecracker 3043 met the same).
pub fn cpuid(supported: &CpuId, id: u8, count: u8) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        fix_entry(entry, id, count);
    }
    cpuid
}

fn fix_entry(entry: &mut kvm_cpuid_entry2, id: u8, count: u8) {
    const HYPERVISOR: u32 = 1 << 31;
    const TSC_DEADLINE: u32 = 1 << 24;
    const MULTI_THREADING: u32 = 1 << 28;
    const INVARIANT_TSC: u32 = 1 << 8;
    // KVM_FEATURE_ASYNC_PF, _ASYNC_PF_VMEXIT and _ASYNC_PF_INT of KVM_CPUID_FEATURES.
    const ASYNC_PAGE_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;
    let (id, count) = (u32::from(id), u32::from(count));
    // Bits of the APIC id that number the cores of a package.
    let core_bits = count.next_power_of_two().trailing_zeros();
    match entry.function {
        0x1 => {
            entry.ebx = entry.ebx & 0xffff | id << 24 | count << 16;
            entry.ecx |= HYPERVISOR | TSC_DEADLINE;
            if count > 1 {
                entry.edx |= MULTI_THREADING;
            } else {
                entry.edx &= !MULTI_THREADING;
            }
        }
        0x4 => {
            // Level 1 and 2 caches belong to a core, those above to the package.
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << core_bits) - 1) << 26;
        }
        0xb | 0x1f => {
            entry.flags |= KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
            entry.edx = id;
            let (shift, processors, kind) = match entry.index {
                0 => (0, 1, 1),             // threads of a core
                1 => (core_bits, count, 2), // cores of a package
                _ => (0, 0, 0),
            };
            entry.eax = shift;
            entry.ebx = processors;
            entry.ecx = entry.index | kind << 8;
        }
        0x4000_0001 => entry.eax &= !ASYNC_PAGE_FAULTS,
        0x8000_0007 => entry.edx &= !INVARIANT_TSC,
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | core_bits << 12 | (count - 1),
        0x8000_001d => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        0x8000_001e => {
            entry.eax = id;
            entry.ebx = id; // core id, one thread per core
            entry.ecx = 0; // node 0 of one
        }
        _ => {}
    }
}

/// Unpacks a descriptor as the GDT holds it into the form KVM takes.
fn segment(descriptor: u64, selector: u16) -> kvm_segment {
    let bits = |shift: u32, width: u32| (descriptor >> shift) & ((1 << width) - 1);
    let bit = |shift: u32| bits(shift, 1) as u8;
    let base = bits(16, 24) | bits(56, 8) << 24;
    let limit = (bits(0, 16) | bits(48, 4) << 16) as u32;
    let granular = bit(55) == 1;
    kvm_segment {
        base,
        limit: if granular { limit << 12 | 0xfff } else { limit },
        selector,
        type_: bits(40, 4) as u8,
        s: bit(44),
        dpl: bits(45, 2) as u8,
        present: bit(47),
        avl: bit(52),
        l: bit(53),
        db: bit(54),
        g: u8::from(granular),
        unusable: 0,
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;

    #[test]
    fn descriptors_unpack_as_the_manual_says() {
        let code = segment(0x00af_9b00_0000_ffff, 0x10);
        assert_eq!(
            (code.base, code.limit, code.selector),
            (0, 0xffff_ffff, 0x10)
        );
        assert_eq!(
            (code.type_, code.s, code.present, code.l, code.db),
            (0xb, 1, 1, 1, 0)
        );
        let data = segment(0x00cf_9300_0000_ffff, 0x18);
        assert_eq!((data.type_, data.l, data.db, data.g), (3, 0, 1, 1));
    }

    #[test]
    fn the_first_gigabyte_is_mapped_one_to_one() {
        let memory = Memory::anonymous(32 << 20).unwrap();
        let mut sregs = kvm_sregs::default();
        long_mode(memory.ram(), &mut sregs).unwrap();
        let last: u64 = memory
            .ram()
            .read_obj(GuestAddress(layout::PAGE_TABLES + 0x2000 + 8 * 511))
            .unwrap();
        assert_eq!(last, 0x3fe0_0083);
        assert_eq!(sregs.cr0 & 0x8000_0001, 0x8000_0001);
    }

    #[test]
    fn every_processor_gets_its_own_apic_id() {
        let entry = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            ..Default::default()
        };
        let supported = CpuId::from_entries(&[
            entry(1, 0),
            entry(0xb, 0),
            entry(0xb, 1),
            entry(0x8000_0007, 0),
        ])
        .unwrap();
        let seen = cpuid(&supported, 2, 3);
        let [one, threads, cores, power] = seen.as_slice() else {
            panic!()
        };
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (2, 3));
        assert_eq!((threads.edx, threads.eax, threads.ebx), (2, 0, 1));
        assert_eq!((cores.eax, cores.ebx, cores.ecx), (2, 3, 0x201));
        assert_eq!(power.edx & 1 << 8, 0);
    }
}
