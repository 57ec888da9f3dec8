//! The ACPI tables, by which a stock kernel finds its processors and virtio-mmio devices.
//!
//! Debian's kernels take neither an MP table nor `virtio_mmio.device=` on the command line, so devices
//! are announced in the DSDT with the id `LNRO0005`. The platform is "hardware-reduced" (ACPI 6.5,
//! section 4.1): no PM timer, no legacy interrupt controller, no keyboard controller or CMOS clock to
//! be probed for. Powering off is one write to the sleep control register. Where there is no interrupt
//! controller of ACPI's own, events come by a "Generic Event Device" (ACPI 6.5, section 5.6.9): there is one,
//! for a new [`super::generation`].

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, layout};
use crate::memory::GuestRam;

/// The value of the sleep type field that means "off" (`\_S5`).
pub const SLEEP_TYPE_OFF: u8 = 5;

const OEM: [u8; 6] = *b"TERN  ";
const TABLE: [u8; 8] = *b"TERNVM  ";
const REVISION: u32 = 1;
/// The firmware tables are one page apart from the RSDP, so that it stands alone at its address.
const TABLES: u64 = layout::ACPI + 0x40;

/// Writes all tables for `vcpus` processors and `devices` virtio devices; returns the RSDP's address.
pub fn write(ram: &GuestRam, vcpus: u8, devices: usize) -> Result<u64, BootError> {
    let mut image = Vec::with_capacity(4096);
    let place = |image: &mut Vec<u8>, table: &dyn Aml| {
        image.resize(image.len().next_multiple_of(16), 0);
        let address = TABLES + image.len() as u64;
        table.to_aml_bytes(image);
        address
    };
    let dsdt = place(&mut image, &dsdt(devices));
    let fadt = place(&mut image, &fadt(dsdt));
    let madt = place(&mut image, &madt(vcpus));
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&mut image, &xsdt);
    if image.len() > layout::ACPI_MAX - 0x40 {
        return Err(BootError::Acpi(image.len()));
    }
    let mut rsdp = Vec::with_capacity(Rsdp::len());
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    ram.write_slice(&rsdp, GuestAddress(layout::ACPI))?;
    ram.write_slice(&image, GuestAddress(TABLES))?;
    Ok(layout::ACPI)
}

fn dsdt(devices: usize) -> Sdt {
    let mut sdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, REVISION);
    let mut body = Vec::new();
    serial_port(&mut body);
    generation_id(&mut body);
    for index in 0..devices {
        virtio_mmio(index, &mut body);
    }
    let scope = Scope::raw("\\_SB_".into(), body);
    sdt.append_slice(&scope);
    let (sleep, zero) = (SLEEP_TYPE_OFF, 0_u8);
    let mut off = Vec::new();
    Name::new("\\_S5_".into(), &Package::new(vec![&sleep, &zero])).to_aml_bytes(&mut off);
    sdt.append_slice(&off);
    sdt
}

fn serial_port(sink: &mut Vec<u8>) {
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0_u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, layout::SERIAL_GSI),
                    &IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}

/// The device whose memory is the generation ID, and the one that says that it has changed. Its names are
/// given by Microsoft's paper, but for the first, which is the maker's.
fn generation_id(sink: &mut Vec<u8>) {
    /// The paper's event: the ID has changed.
    const CHANGED: u8 = 0x80;
    let (low, high) = (
        layout::GENERATION_ID as u32,
        (layout::GENERATION_ID >> 32) as u32,
    );
    Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"TERNVGID"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(sink);
    Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0_u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(
                    true,
                    true,
                    false,
                    false,
                    layout::GENERATION_GSI,
                )]),
            ),
            // There is one line, so which it was need not be asked.
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &CHANGED)],
            ),
        ],
    )
    .to_aml_bytes(sink);
}

fn virtio_mmio(index: usize, sink: &mut Vec<u8>) {
    let window = layout::MMIO_GAP_START + index as u64 * layout::MMIO_WINDOW;
    let gsi = layout::FIRST_DEVICE_GSI + index as u32;
    Device::new(
        format!("V{index:03}").as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &(index as u8)),
            &Name::new("_CCA".into(), &1_u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, window as u32, layout::MMIO_WINDOW as u32),
                    &Interrupt::new(true, true, false, false, gsi),
                ]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}

fn fadt(dsdt: u64) -> impl Aml {
    /// No VGA, no MSI, no PCIe ASPM, no CMOS clock (ACPI 6.5, table 5.10); bit 1, a keyboard
    /// controller, stays clear too.
    const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5;
    let register = |port: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(port),
        )
    };
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.sleep_control_reg = register(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = register(layout::SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"TERNVMM ").into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let mut madt = MADT::new(
        OEM,
        TABLE,
        REVISION,
        LocalInterruptController::Address(layout::LAPIC),
    );
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    madt
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;
    use vm_memory::Bytes;

    /// Follows the pointers a kernel follows, checking each table's signature and checksum.
    fn table(ram: &GuestRam, address: u64, signature: &[u8; 4]) -> Vec<u8> {
        let mut header = [0; 8];
        ram.read_slice(&mut header, GuestAddress(address)).unwrap();
        assert_eq!(&header[..4], signature);
        let len = u32::from_le_bytes(header[4..].try_into().unwrap()) as usize;
        let mut bytes = vec![0; len];
        ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        assert_eq!(
            bytes.iter().fold(0_u8, |sum, b| sum.wrapping_add(*b)),
            0,
            "{signature:?}"
        );
        bytes
    }

    fn pointer(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn tables_are_found_by_their_pointers() {
        let memory = Memory::anonymous(32 << 20).unwrap();
        let ram = memory.ram();
        let rsdp = write(ram, 3, 19).unwrap();
        let mut bytes = [0; 36];
        ram.read_slice(&mut bytes, GuestAddress(rsdp)).unwrap();
        assert_eq!(&bytes[..8], b"RSD PTR ");
        let xsdt = table(ram, pointer(&bytes, 24), b"XSDT");
        let fadt = table(ram, pointer(&xsdt, 36), b"FACP");
        let madt = table(ram, pointer(&xsdt, 44), b"APIC");
        assert_eq!(madt.len(), 44 + 3 * 8 + 12);
        let dsdt = table(ram, pointer(&fadt, 140), b"DSDT");
        let ids = dsdt.windows(8).filter(|w| *w == b"LNRO0005").count();
        assert_eq!(ids, 19);
    }

    /// The part of `table` from `start` on, as far as a test wants to look.
    fn after<'a>(table: &'a [u8], start: &[u8]) -> &'a [u8] {
        let at = table.windows(start.len()).position(|w| w == start);
        &table[at.unwrap_or_else(|| panic!("no {:?}", start.escape_ascii())) + start.len()..]
    }

    #[test]
    fn the_generation_id_is_announced_where_it_is() {
        let mut dsdt_bytes = Vec::new();
        dsdt(19).to_aml_bytes(&mut dsdt_bytes);
        // 0x0d opens a string, 0x12 a package, 0x0c a double word; 0 is a byte of its own (ACPI 6.5, 20.2).
        after(&dsdt_bytes, b"_CID\x0dVM_Gen_Counter\0");
        let package = after(&dsdt_bytes, b"ADDR\x12");
        let mut expected = vec![2, 0x0c];
        expected.extend((layout::GENERATION_ID as u32).to_le_bytes());
        expected.push(0);
        assert_eq!(package[1..=expected.len()], expected);
        assert_eq!(layout::GENERATION_ID % 8, 0);
        assert!(layout::GENERATION_ID >= layout::ACPI + layout::ACPI_MAX as u64);
        const { assert!(layout::GENERATION_ID + 16 <= layout::HIGH_MEMORY_START) };

        let events = after(&dsdt_bytes, b"_HID\x0dACPI0013\0");
        // An extended interrupt descriptor: consumer, edge, active high, exclusive, one line (6.4.3.6).
        let line = after(events, &[0x89, 6, 0, 0b0011, 1]);
        assert_eq!(line[..4], layout::GENERATION_GSI.to_le_bytes());
        // One argument, serialized; then Notify (0x86) of a root path of two names, with 0x80.
        let method = after(events, b"_EVT");
        assert!(method.starts_with(b"\x09\x86\\\x2e_SB_VGEN\x0a\x80"));
        assert!((0..19).all(|device| layout::FIRST_DEVICE_GSI + device != layout::GENERATION_GSI));
    }
}
