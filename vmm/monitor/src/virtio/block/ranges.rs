//! Discards and zeroes (virtio 1.2, section 5.2.6): which parts of a disk are to read as zeroes, and how
//! a file gets there.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use virtio_bindings::virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

use super::{Refusal, SECTOR};
use crate::virtio::chain::Buffers;

/// Which request it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeroing {
    /// The content is of no use any more.
    Discard,
    /// The content is to be zeroes.
    WriteZeroes,
}

/// What one request names, checked: inside the disk, and not too much.
#[derive(Debug)]
pub struct Ranges {
    what: Zeroing,
    list: Vec<Range>,
}

#[derive(Debug, PartialEq, Eq)]
struct Range {
    offset: libc::off_t,
    len: libc::off_t,
    /// The room may be given back.
    unmap: bool,
}

/// Sectors in one range: a gigabyte. A file system frees that in milliseconds, and the thread is to
/// look now and then whether it is to stop.
const MAX_SECTORS: u32 = 1 << 21;
/// Ranges in one request.
const MAX_RANGES: u32 = 16;
/// Finer than the host's file systems' blocks, nothing is freed: 4096 bytes.
const ALIGNMENT_SECTORS: u32 = 8;
/// Sector (8 bytes), number of sectors (4), flags (4).
const RANGE_BYTES: usize = 16;

/// The end of `struct virtio_blk_config`, from `max_discard_sectors` on.
pub fn limits() -> Vec<u8> {
    let discard = [MAX_SECTORS, MAX_RANGES, ALIGNMENT_SECTORS];
    let write_zeroes = [MAX_SECTORS, MAX_RANGES];
    let may_unmap = [1];
    let words = discard.iter().chain(&write_zeroes);
    words
        .flat_map(|word| word.to_le_bytes())
        .chain(may_unmap)
        .collect()
}

impl Ranges {
    /// Reads what follows a request's header.
    pub fn read(what: Zeroing, data: &Buffers<'_>, disk: u64) -> Result<Self, Refusal> {
        let count = data.len() / RANGE_BYTES;
        if !data.len().is_multiple_of(RANGE_BYTES) || count > MAX_RANGES as usize {
            return Err(Refusal::Invalid("not a list of ranges"));
        }
        // Copied before it is checked: the guest may change its memory at any time.
        let mut bytes = vec![0; data.len()];
        data.read(0, &mut bytes);
        let list = bytes.as_chunks().0.iter();
        let list = list
            .map(|range| Range::parse(what, range, disk))
            .collect::<Result<_, _>>()?;
        Ok(Self { what, list })
    }

    /// Has the file read as zeroes there. Its length stays.
    pub fn apply(&self, file: &File) -> Result<(), Refusal> {
        for range in self.list.iter().filter(|range| range.len != 0) {
            let result = match (self.what, range.unmap) {
                (Zeroing::WriteZeroes, false) => {
                    fallocate(file, libc::FALLOC_FL_ZERO_RANGE, range).or_else(|error| {
                        if is_unsupported(&error) {
                            punch(file, range) // tmpfs has only this
                        } else {
                            Err(error)
                        }
                    })
                }
                _ => punch(file, range),
            };
            match result {
                // What is discarded may stay as it is.
                Err(error) if is_unsupported(&error) && self.what == Zeroing::Discard => {}
                // The driver will write them itself.
                Err(error) if is_unsupported(&error) => return Err(Refusal::Unsupported),
                other => other?,
            }
        }
        Ok(())
    }
}

impl Range {
    fn parse(what: Zeroing, bytes: &[u8; RANGE_BYTES], disk: u64) -> Result<Self, Refusal> {
        let words = bytes.as_chunks().0;
        let [low, high, sectors, flags] =
            std::array::from_fn(|word| u32::from_le_bytes(words[word]));
        let sector = u64::from(high) << 32 | u64::from(low);
        let known = match what {
            Zeroing::Discard => 0,
            Zeroing::WriteZeroes => VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
        };
        if flags & !known != 0 {
            return Err(Refusal::Unsupported);
        }
        let inside = sector
            .checked_add(u64::from(sectors))
            .is_some_and(|end| end <= disk);
        if sectors > MAX_SECTORS || !inside {
            return Err(Refusal::Invalid("a range beyond the end of the disk"));
        }
        let bytes = |sectors: u64| {
            sectors
                .checked_mul(SECTOR)
                .and_then(|bytes| libc::off_t::try_from(bytes).ok())
                .ok_or(Refusal::Invalid("a range beyond any file"))
        };
        Ok(Self {
            offset: bytes(sector)?,
            len: bytes(u64::from(sectors))?,
            unmap: what == Zeroing::Discard || flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
        })
    }
}

fn punch(file: &File, range: &Range) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_PUNCH_HOLE, range)
}

fn fallocate(file: &File, mode: libc::c_int, range: &Range) -> io::Result<()> {
    let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
    loop {
        // SAFETY: a call by value on an open descriptor.
        let done = unsafe { libc::fallocate(file.as_raw_fd(), mode, range.offset, range.len) };
        if done == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EOPNOTSUPP)
}
