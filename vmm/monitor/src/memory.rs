//! Guest memory: one private mapping per range, anonymous or over a snapshot's memory file.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress, VolatileSlice,
};

use crate::boot::layout;

/// The guest's RAM as devices see it. It never changes shape while a Machine lives.
pub type GuestRam = GuestMemoryMmap<()>;

/// x86's page size; the unit of what a snapshot writes or leaves out.
pub const PAGE_SIZE: usize = 4096;

/// What the host's and the guest's page tables can map at once (x86's next larger page).
const HUGE_PAGE_SIZE: usize = 2 << 20;

/// The guest's RAM and, after a restore, the file that lies under its untouched pages.
#[derive(Debug, Clone)]
pub struct Memory {
    ram: Arc<GuestRam>,
    backing: Option<Arc<File>>,
}

/// A contiguous range of RAM, and where it is in a memory file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Guest physical address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Offset in a memory file, where the ranges lie one behind the other.
    pub file_offset: u64,
}

/// A part of a [`Range`], and where it is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Guest physical address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// The first of them.
    pub host: *mut u8,
}

/// Why there is no memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host would not map it.
    #[error("cannot map {mib} MiB of guest memory: {source}")]
    Map {
        /// How much.
        mib: u64,
        /// Why.
        source: io::Error,
    },
    /// The ranges do not fit together.
    #[error("cannot lay out guest memory: {0}")]
    Layout(String),
}

impl Memory {
    /// Fresh memory, all zeroes, not yet backed by anything.
    pub fn anonymous(bytes: u64) -> Result<Self, MemoryError> {
        Self::build(bytes, None)
    }

    /// Memory whose content is that of `file`; writes stay private, untouched pages come from the
    /// page cache when they are first used.
    pub fn from_file(file: File, bytes: u64) -> Result<Self, MemoryError> {
        Self::build(bytes, Some(Arc::new(file)))
    }

    fn build(bytes: u64, backing: Option<Arc<File>>) -> Result<Self, MemoryError> {
        let mut regions = Vec::with_capacity(2);
        for range in ranges(bytes) {
            let size = usize::try_from(range.len)
                .map_err(|_| MemoryError::Layout(format!("{} bytes", range.len)))?;
            let refused = |source| MemoryError::Map {
                mib: bytes >> 20,
                source,
            };
            let builder = MmapRegionBuilder::new(size)
                .with_mmap_prot(PROTECTION)
                .with_mmap_flags(FLAGS);
            let builder = match &backing {
                Some(file) => {
                    builder.with_file_offset(FileOffset::from_arc(file.clone(), range.file_offset))
                }
                None => {
                    let address = map_aligned(size).map_err(refused)?;
                    // SAFETY: `size` bytes are mapped there for reading and writing, for nobody else,
                    // and stay so to the end of the process.
                    unsafe { builder.with_raw_mmap_pointer(address) }
                }
            };
            let mapping = builder
                .build()
                .map_err(|error| refused(io::Error::other(error)))?;
            let region = GuestRegionMmap::new(mapping, GuestAddress(range.start))
                .ok_or_else(|| MemoryError::Layout(format!("{range:?} overflows")))?;
            regions.push(region);
        }
        let ram = GuestRam::from_regions(regions)
            .map_err(|error| MemoryError::Layout(error.to_string()))?;
        Ok(Self {
            ram: Arc::new(ram),
            backing,
        })
    }

    /// What devices and the loader read and write.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The memory file under this memory, if it came from a snapshot.
    pub fn backing(&self) -> Option<&File> {
        self.backing.as_deref()
    }

    /// The ranges with the host address of each.
    pub fn mappings(&self) -> impl Iterator<Item = (Range, *mut u8)> + '_ {
        let mut file_offset = 0;
        self.ram.iter().map(move |region| {
            let range = Range {
                start: region.start_addr().0,
                len: region.len(),
                file_offset,
            };
            file_offset += region.len();
            (range, region.as_ptr())
        })
    }

    /// Has ready what belongs to `len` bytes at `offset` of a memory file, before anybody touches it: `written`
    /// as private copies, else in the page cache, from where faults then map several pages each; the host's
    /// disk is not waited for. Content does not change.
    pub fn populate(&self, offset: u64, len: u64, written: bool) -> io::Result<()> {
        let advice = if written {
            libc::MADV_POPULATE_WRITE
        } else {
            libc::MADV_WILLNEED
        };
        for piece in self.pieces(offset, len) {
            // SAFETY: the piece is mapped for as long as this borrow lives. Either advice only has pages
            // brought in (madvise(2)), as the guest's own accesses would at any time.
            let done = unsafe { libc::madvise(piece.host.cast(), piece.len as usize, advice) };
            if done < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// Where `len` bytes at `offset` of a memory file are.
    pub fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = Piece> + '_ {
        let end = offset.saturating_add(len);
        self.mappings().filter_map(move |(range, host)| {
            let from = offset.max(range.file_offset);
            let to = end.min(range.file_offset + range.len);
            let into = from.saturating_sub(range.file_offset);
            (from < to).then(|| Piece {
                start: range.start + into,
                len: to - from,
                host: host.wrapping_add(into as usize),
            })
        })
    }

    /// All of it, in bytes.
    pub fn size(&self) -> u64 {
        self.ram.iter().map(|region| region.len()).sum()
    }
}

const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_NORESERVE;

/// Maps `size` zeroed bytes at a multiple of [`HUGE_PAGE_SIZE`], and never unmaps them.
///
/// KVM maps a huge page of the host's as one into the guest only where both addresses agree in their
/// low bits; and `mmap` aligns to no more than a page. Whether there are huge pages is the host's
/// policy (`/sys/kernel/mm/transparent_hugepage/enabled`), which this leaves alone.
fn map_aligned(size: usize) -> io::Result<*mut u8> {
    let room = size
        .checked_add(HUGE_PAGE_SIZE)
        .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
    let flags = FLAGS | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, at an address that the kernel chooses, takes nothing from anybody.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), room, PROTECTION, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = start.cast::<u8>();
    let before = start.align_offset(HUGE_PAGE_SIZE); // less than a huge page, so within the room
    let aligned = start.wrapping_add(before);
    let after = HUGE_PAGE_SIZE - before;
    for (address, length) in [(start, before), (aligned.wrapping_add(size), after)] {
        if length > 0 {
            // SAFETY: both ends belong to the mapping just made, which nobody has seen yet; each is a
            // number of whole pages. Should it fail, some addresses stay taken, and no memory.
            unsafe { libc::munmap(address.cast(), length) };
        }
    }
    Ok(aligned)
}

/// Gives what lies in guest memory of these `len` bytes at `address` back to the host, in whole pages: it
/// reads as in [`give_back`].
pub fn discard(ram: &GuestRam, address: u64, len: usize) -> io::Result<()> {
    let end = address.saturating_add(len as u64);
    for region in ram.iter() {
        let (first, past) = (region.start_addr().0, region.start_addr().0 + region.len());
        let (from, to) = (address.max(first), end.min(past));
        if from < to
            && let Ok(slice) =
                region.get_slice(MemoryRegionAddress(from - first), (to - from) as usize)
        {
            give_back(&slice)?;
        }
    }
    Ok(())
}

/// Gives the whole pages of `slice` back to the host. They read as zeroes from then on or, in memory over a
/// file, as they are in that: what the last snapshot of them wrote.
pub fn give_back(slice: &VolatileSlice<'_>) -> io::Result<()> {
    let guard = slice.ptr_guard_mut();
    let before = guard.as_ptr().align_offset(PAGE_SIZE);
    let Some(len) = slice
        .len()
        .checked_sub(before)
        .map(|len| len - len % PAGE_SIZE)
    else {
        return Ok(());
    };
    if len == 0 {
        return Ok(());
    }
    // SAFETY: `before + len` is at most the slice's length, and the slice is mapped, privately and for
    // nobody but the guest, as long as this borrow lives. Its pages stay mapped and readable; the guest's
    // memory may change at any time, and nobody holds a Rust reference to it.
    let done =
        unsafe { libc::madvise(guard.as_ptr().add(before).cast(), len, libc::MADV_DONTNEED) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// How `bytes` of RAM are laid out around the gap below 4 GiB.
pub fn ranges(bytes: u64) -> Vec<Range> {
    let low = bytes.min(layout::MMIO_GAP_START);
    let mut ranges = vec![Range {
        start: 0,
        len: low,
        file_offset: 0,
    }];
    if bytes > low {
        ranges.push(Range {
            start: layout::HIGH_RAM_START,
            len: bytes - low,
            file_offset: low,
        });
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::Bytes;

    #[test]
    fn memory_beyond_the_gap_goes_on_at_4_gib() {
        let gib = 1 << 30;
        assert_eq!(
            ranges(gib),
            [Range {
                start: 0,
                len: gib,
                file_offset: 0
            }]
        );
        assert_eq!(
            ranges(4 * gib),
            [
                Range {
                    start: 0,
                    len: 0xd000_0000,
                    file_offset: 0
                },
                Range {
                    start: 4 * gib,
                    len: 0x3000_0000,
                    file_offset: 0xd000_0000
                },
            ]
        );
    }

    #[test]
    fn host_and_guest_addresses_agree_in_their_low_bits() {
        for bytes in [32 << 20, (64 << 20) + 4096, 4 << 30] {
            let memory = Memory::anonymous(bytes).unwrap();
            for (range, address) in memory.mappings() {
                let mask = HUGE_PAGE_SIZE as u64 - 1;
                assert_eq!(address as u64 & mask, range.start & mask, "{range:?}");
                let last = GuestAddress(range.start + range.len - 8);
                memory.ram().write_obj(1_u64, last).unwrap();
            }
            assert_eq!(memory.size(), bytes);
        }
    }

    #[test]
    fn a_part_of_a_memory_file_is_found_on_both_sides_of_the_gap() {
        let memory = Memory::anonymous(4 << 30).unwrap();
        let places = |offset, len| -> Vec<_> {
            let pieces = memory.pieces(offset, len);
            pieces.map(|piece| (piece.start, piece.len)).collect()
        };
        assert_eq!(places(0x1000, 0x2000), [(0x1000, 0x2000)]);
        let low = 0xd000_0000;
        let both = [(low - 0x1000, 0x1000), (4 << 30, 0x2000)];
        assert_eq!(places(low - 0x1000, 0x3000), both);
        assert_eq!(
            places(low + 0x5000, u64::MAX),
            [((4 << 30) + 0x5000, 0x2fff_b000)]
        );
        assert_eq!(places(4 << 30, 1), []);
        let (_, host) = memory.mappings().next().unwrap();
        let piece = memory.pieces(0x1000, 1).next().unwrap();
        assert_eq!(piece.host, host.wrapping_add(0x1000));
    }

    #[test]
    fn a_file_shows_through_and_is_never_written() {
        let mut file = tempfile::tempfile().unwrap();
        let bytes = 32 << 20;
        file.set_len(bytes).unwrap();
        file.write_all(b"from the file").unwrap();
        let memory = Memory::from_file(file.try_clone().unwrap(), bytes).unwrap();
        let mut word = [0; 4];
        memory.ram().read_slice(&mut word, GuestAddress(0)).unwrap();
        assert_eq!(&word, b"from");
        memory.ram().write_slice(b"FROM", GuestAddress(0)).unwrap();
        let again = Memory::from_file(file, bytes).unwrap();
        again.ram().read_slice(&mut word, GuestAddress(0)).unwrap();
        assert_eq!(&word, b"from");
    }
}
