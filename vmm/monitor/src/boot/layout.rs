//! Where things are in the guest's physical address space.
//!
//! ```text
//! 0x0000_0000  real-mode leftovers, GDT, boot parameters, first page tables
//! 0x0002_0000  kernel command line
//! 0x000e_0000  ACPI tables
//! 0x000e_f000  generation ID, in a page of its own
//! 0x0010_0000  RAM: kernel from 1 or 16 MiB up, initramfs at the top of low RAM
//! 0xd000_0000  virtio-mmio windows, 4 KiB each            (end of low RAM at most)
//! 0xfec0_0000  IOAPIC, 0xfee0_0000 local APICs, 0xfffb_d000 KVM's own pages
//! 0x1_0000_0000  RAM beyond 3.25 GiB
//! ```

/// Low RAM ends here at the latest, and the virtio windows start.
pub const MMIO_GAP_START: u64 = 0xd000_0000;
/// High RAM starts here.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// Bytes of one virtio-mmio window.
pub const MMIO_WINDOW: u64 = 0x1000;
/// First interrupt line of a virtio device; below are the PIT, keyboard, cascade, generation ID and serial
/// port.
pub const FIRST_DEVICE_GSI: u32 = 5;
/// The in-kernel IOAPIC has 24 pins.
pub const LAST_DEVICE_GSI: u32 = 23;

/// Conventional memory ends here; above is what PCs keep for their firmware.
pub const EBDA_START: u64 = 0x9_fc00;
/// Where RAM goes on.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;

/// Global descriptor table of the first instruction.
pub const GDT: u64 = 0x500;
/// Interrupt descriptor table of the first instruction: empty.
pub const IDT: u64 = 0x520;
/// `struct boot_params`, the "zero page".
pub const BOOT_PARAMS: u64 = 0x7000;
/// Stack pointer of the first instruction.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables of the first instruction, three pages.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Linux's `COMMAND_LINE_SIZE` on x86.
pub const CMDLINE_MAX: usize = 2048;
/// ACPI tables; the RSDP first, as firmware would have it.
pub const ACPI: u64 = 0xe_0000;
/// The tables end before the generation ID.
pub const ACPI_MAX: usize = (GENERATION_ID - ACPI) as usize;
/// The 16 bytes by which a guest tells that it was restored; in the memory that is reserved for firmware,
/// as the paper asks, and in a page that nothing else is in. A snapshot's guest knows it by this address.
pub const GENERATION_ID: u64 = 0xe_f000;

/// The IOAPIC's registers.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs' registers.
pub const LAPIC: u32 = 0xfee0_0000;
/// Three pages for KVM on Intel (real mode emulation); used by nobody else.
pub const KVM_TSS: usize = 0xfffb_d000;
/// One page for KVM on Intel: its identity map, behind the three of the TSS.
pub const KVM_IDENTITY_MAP: u64 = 0xfffc_0000;

/// COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt line.
pub const SERIAL_GSI: u32 = 4;
/// The interrupt line of a new generation ID: a PC's second serial port, which is not here. All lines above
/// the first serial port's may be virtio devices'.
pub const GENERATION_GSI: u32 = 3;
/// ACPI's sleep control register: writing "sleep, type 5" powers off.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI's sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
