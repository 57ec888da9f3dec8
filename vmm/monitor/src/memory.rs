//! Guest memory: one private mapping per range, anonymous or over a snapshot's memory file.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use crate::boot::layout;

/// The guest's RAM as devices see it. It never changes shape while a Machine lives.
pub type GuestRam = GuestMemoryMmap<()>;

/// x86's page size; the unit of what a snapshot writes or leaves out.
pub const PAGE_SIZE: usize = 4096;

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
            let mut flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
            let mut builder =
                MmapRegionBuilder::new(size).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
            match &backing {
                Some(file) => {
                    builder = builder
                        .with_file_offset(FileOffset::from_arc(file.clone(), range.file_offset));
                }
                None => flags |= libc::MAP_ANONYMOUS,
            }
            let mapping =
                builder
                    .with_mmap_flags(flags)
                    .build()
                    .map_err(|error| MemoryError::Map {
                        mib: bytes >> 20,
                        source: io::Error::other(error),
                    })?;
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

    /// All of it, in bytes.
    pub fn size(&self) -> u64 {
        self.ram.iter().map(|region| region.len()).sum()
    }
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
