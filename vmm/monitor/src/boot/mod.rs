//! From files to a guest about to run: kernel, initramfs, command line, boot parameters, ACPI.
//!
//! Both kernel forms are entered by Linux's 64-bit boot protocol
//! (<https://docs.kernel.org/arch/x86/boot.html#id1>): an ELF `vmlinux` at its entry point, a bzImage
//! 0x200 bytes behind its start. No firmware runs, and nothing of a PC is emulated for one.

pub mod acpi;
pub mod cpu;
pub mod generation;
pub mod layout;
pub mod template;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, ReadVolatile};

use crate::config::VmConfig;
use crate::memory::{self, GuestRam, Memory, PAGE_SIZE};

/// Where the boot processor starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Address of the first instruction.
    pub rip: u64,
    /// Address of `struct boot_params`.
    pub boot_params: u64,
}

/// Why a guest cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Neither an ELF `vmlinux` nor a bzImage, or one that does not fit.
    #[error("cannot load {path} as a kernel: {source}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// Why.
        source: linux_loader::loader::Error,
    },
    /// A bzImage for something else than x86-64.
    #[error("{0} has no 64-bit entry point")]
    Not64Bit(PathBuf),
    /// Kernel, initramfs and memory size do not go together.
    #[error(
        "{memory_mib} MiB of memory is too little for this kernel and {initramfs} bytes of initramfs"
    )]
    TooSmall {
        /// What the guest has.
        memory_mib: u64,
        /// What must fit.
        initramfs: u64,
    },
    /// The complete command line is longer than Linux takes.
    #[error("the kernel command line has {0} bytes, Linux takes {max}", max = layout::CMDLINE_MAX - 1)]
    CommandLine(usize),
    /// The ACPI tables outgrew their place.
    #[error("the ACPI tables have {0} bytes, {max} fit", max = layout::ACPI_MAX)]
    Acpi(usize),
    /// The host has no random numbers.
    #[error("cannot draw a generation ID: {0}")]
    Random(io::Error),
    /// Guest memory refused a write.
    #[error("cannot write guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Words every guest is started with.
///
/// - `reboot=k panic=-1`: the end of init, or of a broken kernel, is a keyboard-controller reset, which
///   ends the monitor.
/// - `pci=off`, `8250.nr_uarts=1`, `8250.skip_txen_test=1`, `i8042.*`: no time spent looking for what is not there.
/// - `console=ttyS0 quiet loglevel=3`: every character on the serial port costs an exit of 50 us and
///   more, so only what is critical is printed.
/// - `tsc=reliable no_timer_check`: no calibration against clocks that are not there.
/// - `noreplace-smp`: with one vCPU the kernel would take the lock prefixes out of its code one by one, some
///   thousand times by way of another address space: a sixth of a boot, for a few cycles per lock after it.
/// - `random.trust_cpu=on`: no wait for entropy on the way to init.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=3 reboot=k panic=-1 pci=off 8250.nr_uarts=1 \
    8250.skip_txen_test=1 i8042.noaux i8042.nomux i8042.dumbkbd tsc=reliable no_timer_check noreplace-smp random.trust_cpu=on";

/// Loads everything `config` names into `memory`, and says where to start.
pub fn load(config: &VmConfig, memory: &Memory, devices: usize) -> Result<Entry, BootError> {
    let ram = memory.ram();
    let kernel = load_kernel(&config.kernel, ram)?;
    let low_ram_end = memory::ranges(memory.size())[0].len;
    let initramfs = load_initramfs(&config.initramfs, ram, kernel.end, low_ram_end)?;
    let cmdline = write_cmdline(&config.cmdline, ram)?;
    let rsdp = acpi::write(ram, config.vcpus, devices)?;
    generation::renew(ram)?;

    let mut params = boot_params {
        hdr: kernel.header,
        ..Default::default()
    };
    params.hdr.type_of_loader = 0xff; // "undefined": we have no number of our own
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = 0x5372_6448; // "HdrS"
    params.hdr.kernel_alignment = 0x0100_0000;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline;
    params.hdr.ramdisk_image = initramfs.start as u32; // below 3.25 GiB
    params.hdr.ramdisk_size = initramfs.len as u32;
    params.acpi_rsdp_addr = rsdp;
    write_e820(&mut params, memory);
    ram.write_obj(params, GuestAddress(layout::BOOT_PARAMS))?;
    Ok(Entry {
        rip: kernel.entry,
        boot_params: layout::BOOT_PARAMS,
    })
}

struct Kernel {
    entry: u64,
    /// First byte behind the kernel, its BSS included.
    end: u64,
    header: linux_loader::loader::bootparam::setup_header,
}

fn load_kernel(path: &Path, ram: &GuestRam) -> Result<Kernel, BootError> {
    let read = |source| BootError::Read {
        path: path.to_owned(),
        source,
    };
    let unloadable = |source| BootError::Kernel {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(read)?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic).map_err(read)?;
    let high = Some(GuestAddress(layout::HIGH_MEMORY_START));
    if magic == *b"\x7fELF" {
        let loaded = Elf::load(ram, None, &mut file, high).map_err(unloadable)?;
        return Ok(Kernel {
            entry: loaded.kernel_load.0,
            end: loaded.kernel_end,
            header: Default::default(),
        });
    }
    let loaded = BzImage::load(ram, None, &mut file, high).map_err(unloadable)?;
    bzimage_entry(loaded).ok_or_else(|| BootError::Not64Bit(path.to_owned()))
}

/// A bzImage is entered at 0x200, if its header says that it has a 64-bit entry there.
fn bzimage_entry(loaded: KernelLoaderResult) -> Option<Kernel> {
    const XLF_KERNEL_64: u16 = 1;
    const ENTRY_64_OFFSET: u64 = 0x200;
    let header = loaded.setup_header?;
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return None;
    }
    // While it unpacks itself, a bzImage uses `init_size` bytes from where it will be unpacked.
    let unpacked_end = header
        .pref_address
        .checked_add(u64::from(header.init_size))?;
    Some(Kernel {
        entry: loaded.kernel_load.0.checked_add(ENTRY_64_OFFSET)?,
        end: loaded.kernel_end.max(unpacked_end),
        header,
    })
}

struct Placed {
    start: u64,
    len: u64,
}

/// Puts the archives one after the other, each aligned to 4 bytes as the kernel wants, at the top of
/// low RAM.
fn load_initramfs(
    paths: &[PathBuf],
    ram: &GuestRam,
    kernel_end: u64,
    low_ram_end: u64,
) -> Result<Placed, BootError> {
    let mut files = Vec::with_capacity(paths.len());
    let mut total = 0_u64;
    for path in paths {
        let read = |source| BootError::Read {
            path: path.clone(),
            source,
        };
        let mut file = File::open(path).map_err(read)?;
        let len = file.seek(SeekFrom::End(0)).map_err(read)?;
        file.rewind().map_err(read)?;
        files.push((path, file, len, total));
        total = len
            .checked_next_multiple_of(4)
            .and_then(|l| total.checked_add(l))
            .ok_or(BootError::TooSmall {
                memory_mib: low_ram_end >> 20,
                initramfs: u64::MAX,
            })?;
    }
    if total == 0 {
        return Ok(Placed { start: 0, len: 0 });
    }
    let start = low_ram_end
        .checked_sub(total)
        .map(|start| start & !(PAGE_SIZE as u64 - 1))
        .filter(|start| *start >= kernel_end)
        .ok_or(BootError::TooSmall {
            memory_mib: low_ram_end >> 20,
            initramfs: total,
        })?;
    for (path, mut file, len, offset) in files {
        read_exact_at(ram, start + offset, &mut file, len).map_err(|source| BootError::Read {
            path: path.clone(),
            source,
        })?;
    }
    Ok(Placed { start, len: total })
}

fn read_exact_at<F: ReadVolatile>(
    ram: &GuestRam,
    start: u64,
    file: &mut F,
    len: u64,
) -> io::Result<()> {
    let len = usize::try_from(len).map_err(io::Error::other)?;
    ram.read_exact_volatile_from(GuestAddress(start), file, len)
        .map_err(io::Error::other)
}

/// Writes the command line and returns its length without the NUL.
fn write_cmdline(extra: &str, ram: &GuestRam) -> Result<u32, BootError> {
    let mut line = format!("{CMDLINE} {extra}");
    line.truncate(line.trim_end().len());
    let len = line.len();
    if len >= layout::CMDLINE_MAX {
        return Err(BootError::CommandLine(len));
    }
    line.push('\0');
    ram.write_slice(line.as_bytes(), GuestAddress(layout::CMDLINE))?;
    Ok(len as u32)
}

fn write_e820(params: &mut boot_params, memory: &Memory) {
    const RAM: u32 = 1;
    const RESERVED: u32 = 2;
    let mut map = vec![
        (0, layout::EBDA_START, RAM),
        (layout::ACPI, layout::HIGH_MEMORY_START, RESERVED),
    ];
    for range in memory::ranges(memory.size()) {
        let start = range.start.max(layout::HIGH_MEMORY_START);
        map.push((start, range.start + range.len, RAM));
    }
    for (entry, (start, end, kind)) in params.e820_table.iter_mut().zip(&map) {
        entry.addr = *start;
        entry.size = end - start;
        entry.r#type = *kind;
    }
    params.e820_entries = map.len() as u8; // four at most
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn ram() -> Memory {
        Memory::anonymous(64 << 20).unwrap()
    }

    fn message(result: Result<impl Sized, BootError>) -> String {
        match result {
            Ok(_) => panic!("loaded"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn initramfs_parts_are_aligned_and_end_at_the_top() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        fs::write(&one, b"12345").unwrap();
        fs::write(&two, b"abc").unwrap();
        let memory = ram();
        let placed = load_initramfs(&[one, two], memory.ram(), 32 << 20, 64 << 20).unwrap();
        assert_eq!((placed.start, placed.len), ((64 << 20) - 4096, 12));
        let mut bytes = [0; 12];
        memory
            .ram()
            .read_slice(&mut bytes, GuestAddress(placed.start))
            .unwrap();
        assert_eq!(&bytes, b"12345\0\0\0abc\0");
    }

    #[test]
    fn initramfs_must_not_reach_into_the_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("big");
        File::create(&path).unwrap().set_len(8 << 20).unwrap();
        let error = message(load_initramfs(&[path], ram().ram(), 60 << 20, 64 << 20));
        assert!(error.contains("too little"), "{error}");
    }

    #[test]
    fn what_is_no_kernel_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        for content in [&b""[..], b"\x7fELF", b"#!/bin/sh\n", &[0; 4096]] {
            fs::write(&path, content).unwrap();
            let error = message(load_kernel(&path, ram().ram()));
            assert!(error.contains("kernel"), "{error}");
        }
    }

    #[test]
    fn the_command_line_is_bounded() {
        let memory = ram();
        let len = write_cmdline("tern.x=1", memory.ram()).unwrap() as usize;
        let mut line = vec![0; len + 1];
        memory
            .ram()
            .read_slice(&mut line, GuestAddress(layout::CMDLINE))
            .unwrap();
        assert!(line.ends_with(b" tern.x=1\0"));
        let error = message(write_cmdline(&"x".repeat(2048), memory.ram()));
        assert!(error.contains("2047"), "{error}");
    }
}
