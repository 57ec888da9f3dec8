//! What one request of the guest asks for (virtio 1.2, section 5.2.6), checked before anything is done.

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::engine::{Action, Job};
use super::ranges::{Ranges, Zeroing};
use super::{Refusal, SECTOR};
use crate::memory::GuestRam;
use crate::virtio::chain::{Buffers, Chain};

/// A disk as requests see it.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    /// Its length.
    pub sectors: u64,
    /// Whether it may be written.
    pub read_only: bool,
}

/// One request.
#[derive(Debug)]
pub enum Request<'m> {
    /// So many bytes to or from the file, or a flush.
    Job(Job, usize),
    /// Nothing is to be done.
    Nothing,
    /// The disk's name goes there.
    Serial(Buffers<'m>),
    /// Parts of the disk are to read as zeroes.
    Zero(Ranges),
}

/// A pause waits for what is under way. Linux asks for some MiB at a time at most.
pub const MAX_REQUEST_BYTES: usize = 64 << 20;
/// Type (4 bytes), reserved (4), sector (8).
const HEADER_BYTES: usize = 16;

impl<'m> Request<'m> {
    /// Reads the request in `chain`, a chain of `ram`'s whose writable part begins with `data_len` bytes of data.
    pub fn read(
        chain: &Chain<'m>,
        ram: &Arc<GuestRam>,
        data_len: usize,
        disk: Geometry,
    ) -> Result<Self, Refusal> {
        let mut header = [0; HEADER_BYTES];
        if chain.readable.read(0, &mut header) < HEADER_BYTES {
            return Err(Refusal::Invalid("no header"));
        }
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let job = |action, offset, data: &Buffers<'_>| {
            if data.is_empty() && action != Action::Flush {
                return Ok(Self::Nothing);
            }
            // SAFETY: `Chain::map` has mapped this chain from `ram`, by the caller's word.
            let memory = unsafe { data.hold(ram) };
            let job = Job {
                action,
                offset,
                memory,
            };
            Ok(Self::Job(job, data.len()))
        };
        match u32::from_le_bytes([a, b, c, d]) {
            VIRTIO_BLK_T_IN => {
                let target = chain.writable.part(0, data_len);
                let offset = disk.offset(sector, target.len())?;
                job(Action::Read, offset, &target)
            }
            VIRTIO_BLK_T_OUT => {
                if disk.read_only {
                    return Err(Refusal::Invalid("write to a read-only disk"));
                }
                let source = chain.readable.part(HEADER_BYTES, usize::MAX);
                let offset = disk.offset(sector, source.len())?;
                job(Action::Write, offset, &source)
            }
            VIRTIO_BLK_T_FLUSH if disk.read_only => Ok(Self::Nothing),
            VIRTIO_BLK_T_FLUSH => job(Action::Flush, 0, &Buffers::default()),
            VIRTIO_BLK_T_GET_ID => Ok(Self::Serial(chain.writable.part(0, data_len))),
            VIRTIO_BLK_T_DISCARD => disk.zero(Zeroing::Discard, chain),
            VIRTIO_BLK_T_WRITE_ZEROES => disk.zero(Zeroing::WriteZeroes, chain),
            _ => Err(Refusal::Unsupported),
        }
    }
}

impl Geometry {
    fn zero<'m>(self, what: Zeroing, chain: &Chain<'m>) -> Result<Request<'m>, Refusal> {
        if self.read_only {
            return Err(Refusal::Invalid("discard on a read-only disk"));
        }
        let data = chain.readable.part(HEADER_BYTES, usize::MAX);
        Ranges::read(what, &data, self.sectors).map(Request::Zero)
    }

    /// Where `len` bytes from `sector` on are in the file, if they are.
    fn offset(self, sector: u64, len: usize) -> Result<u64, Refusal> {
        if len > MAX_REQUEST_BYTES {
            return Err(Refusal::Invalid("more than a request may have"));
        }
        let len = len as u64;
        if !len.is_multiple_of(SECTOR) {
            return Err(Refusal::Invalid("part of a sector"));
        }
        sector
            .checked_add(len / SECTOR)
            .filter(|end| *end <= self.sectors)
            .map(|_| sector * SECTOR)
            .ok_or(Refusal::Invalid("beyond the end of the disk"))
    }
}
