//! The disk (virtio 1.2, section 5.2): a raw file, read-only or writable, with flushes. What the guest
//! discards is a hole in the file, so that a disk is as large on the host as what is in use of it.
//!
//! Requests are carried out one after the other in the device's thread, by `preadv` and `pwritev`
//! between the page cache and guest memory. A write is answered when the page cache has it, and is on
//! the disk after the guest's next flush, as the driver has been told.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::AsFd;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::chain::{Buffers, Chain};
use super::{Context, Device, DeviceState, Kind};
use crate::config::DiskConfig;
use ranges::{Ranges, Zeroing};

mod ranges;

/// A disk.
#[derive(Debug)]
pub struct Block {
    file: File,
    sectors: u64,
    read_only: bool,
    /// What `/sys/block/vda/serial` shows.
    serial: [u8; SERIAL_BYTES],
}

/// What a snapshot must hold: only what must not have changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    sectors: u64,
    read_only: bool,
}

const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 256;
/// Data pieces in one request: what fits a descriptor table beside header and status.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// A request holds up the device's thread, and so a pause, for as long as it takes. Linux asks for some
/// MiB at a time at most.
const MAX_REQUEST_BYTES: usize = 64 << 20;
/// A ring of the longest requests would take seconds. After this many bytes the device looks whether it is
/// to stop.
const MAX_ROUND_BYTES: usize = MAX_REQUEST_BYTES;
/// Type (4 bytes), reserved (4), sector (8).
const HEADER_BYTES: usize = 16;
const STATUS_BYTES: usize = 1;
/// Where `max_discard_sectors` is in `struct virtio_blk_config`, and the length of that.
const DISCARD_AT: usize = 36;
const CONFIG_BYTES: usize = 60;
const SERIAL_BYTES: usize = 20;

impl Block {
    /// Opens the disk's file.
    pub fn open(config: &DiskConfig, index: usize) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(!config.read_only)
            .open(&config.path)?;
        if !config.read_only {
            // Two writers are the end of a file system. Whoever copies the disk takes this lock too.
            file.try_lock().map_err(|error| match error {
                TryLockError::WouldBlock => io::Error::other("it is in use by another process"),
                TryLockError::Error(error) => error,
            })?;
        }
        let len = file.metadata()?.len();
        if len == 0 || !len.is_multiple_of(SECTOR) {
            return Err(io::Error::other(format!(
                "{len} bytes long, a disk is a multiple of {SECTOR}"
            )));
        }
        let mut serial = [0; SERIAL_BYTES];
        let name = format!("tern-disk-{index}");
        serial[..name.len()].copy_from_slice(name.as_bytes());
        Ok(Self {
            file,
            sectors: len / SECTOR,
            read_only: config.read_only,
            serial,
        })
    }

    /// Checks that a snapshot's guest finds the disk it knew.
    pub fn check(&self, state: &BlockState) -> io::Result<()> {
        let now = self.state();
        if *state == now {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "the disk had {} sectors ({}) when the snapshot was taken, and now has {} ({})",
            state.sectors,
            access(state.read_only),
            now.sectors,
            access(now.read_only),
        )))
    }

    fn state(&self) -> BlockState {
        BlockState {
            sectors: self.sectors,
            read_only: self.read_only,
        }
    }

    /// Carries out one request; returns how many bytes were written for the guest, the status byte
    /// included.
    fn process(&self, chain: &Chain<'_>) -> u32 {
        // The last byte the device may write is the status; where there is none, there is no answer.
        let Some(data_len) = chain.writable.len().checked_sub(STATUS_BYTES) else {
            return 0;
        };
        let (status, written) = match self.execute(chain, data_len) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Refusal::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Refusal::Invalid(what)) => {
                tracing::debug!(what, "the guest made a senseless disk request");
                (VIRTIO_BLK_S_IOERR, 0)
            }
            Err(Refusal::Io(error)) => {
                if super::may_log() {
                    tracing::error!(%error, "disk request failed");
                }
                (VIRTIO_BLK_S_IOERR, 0)
            }
        };
        chain.writable.write(data_len, &[status as u8]);
        written + STATUS_BYTES as u32
    }

    fn execute(&self, chain: &Chain<'_>, data_len: usize) -> Result<u32, Refusal> {
        let mut header = [0; HEADER_BYTES];
        if chain.readable.read(0, &mut header) < HEADER_BYTES {
            return Err(Refusal::Invalid("no header"));
        }
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([a, b, c, d]) {
            VIRTIO_BLK_T_IN => {
                let target = chain.writable.part(0, data_len);
                let offset = self.offset(sector, target.len())?;
                target.read_file_at(self.file.as_fd(), offset)?;
                Ok(target.len() as u32) // a chain has less than 2^32 bytes
            }
            VIRTIO_BLK_T_OUT => {
                if self.read_only {
                    return Err(Refusal::Invalid("write to a read-only disk"));
                }
                let source = chain.readable.part(HEADER_BYTES, usize::MAX);
                let offset = self.offset(sector, source.len())?;
                source.write_file_at(self.file.as_fd(), offset)?;
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => {
                if !self.read_only {
                    self.file.sync_data()?;
                }
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => {
                let part = chain.writable.part(0, data_len);
                Ok(part.write(0, &self.serial) as u32)
            }
            VIRTIO_BLK_T_DISCARD => self.zero(Zeroing::Discard, &chain.readable),
            VIRTIO_BLK_T_WRITE_ZEROES => self.zero(Zeroing::WriteZeroes, &chain.readable),
            _ => Err(Refusal::Unsupported),
        }
    }

    /// Empties parts of the disk: all that the request names, or none.
    fn zero(&self, what: Zeroing, readable: &Buffers<'_>) -> Result<u32, Refusal> {
        if self.read_only {
            return Err(Refusal::Invalid("discard on a read-only disk"));
        }
        let ranges = Ranges::read(what, &readable.part(HEADER_BYTES, usize::MAX), self.sectors)?;
        ranges.apply(&self.file)?;
        Ok(0)
    }

    /// Where `len` bytes from `sector` on are in the file, if they are.
    fn offset(&self, sector: u64, len: usize) -> Result<u64, Refusal> {
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

impl Device for Block {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn features(&self) -> u64 {
        let access = if self.read_only {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_SEG_MAX | access
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    /// `struct virtio_blk_config`: capacity (8 bytes), size_max (4), seg_max (4), then what is only
    /// there with features not offered, and after them the limits of discards.
    fn config(&self) -> Vec<u8> {
        let mut config = self.sectors.to_le_bytes().to_vec();
        config.extend_from_slice(&0_u32.to_le_bytes());
        config.extend_from_slice(&SEGMENTS.to_le_bytes());
        config.resize(DISCARD_AT, 0);
        if !self.read_only {
            config.extend_from_slice(&ranges::limits());
        }
        config.resize(CONFIG_BYTES, 0);
        config
    }

    fn start(&mut self, _cx: &mut Context) -> io::Result<()> {
        Ok(())
    }

    fn on_queue(&mut self, cx: &mut Context, index: usize) {
        let ram = cx.ram.clone();
        let queue = &mut cx.queues[index];
        queue.mute(&ram);
        let mut bytes = 0;
        for _ in 0..queue.size() {
            if bytes >= MAX_ROUND_BYTES {
                break; // `unmute` finds the rest, for the next round
            }
            let Some(descriptors) = queue.pop(&ram) else {
                break;
            };
            let head = descriptors.head_index();
            let written = match Chain::map(&ram, descriptors) {
                Ok(chain) => {
                    bytes += work(&chain);
                    self.process(&chain)
                }
                Err(error) => {
                    tracing::debug!(%error, "the guest made a broken disk request");
                    0
                }
            };
            queue.push(&ram, head, written);
        }
        let more = queue.unmute(&ram);
        cx.interrupt(index);
        if more {
            cx.again(index);
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(self.state())
    }
}

/// What a request may cost, in bytes moved. Few bytes can discard a gigabyte: a round has one of those.
fn work(chain: &Chain<'_>) -> usize {
    let mut kind = [0; 4];
    chain.readable.read(0, &mut kind);
    match u32::from_le_bytes(kind) {
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => MAX_ROUND_BYTES,
        _ => chain.readable.len() + chain.writable.len(),
    }
}

/// Why a request is answered with an error.
#[derive(Debug)]
enum Refusal {
    Unsupported,
    Invalid(&'static str),
    Io(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn access(read_only: bool) -> &'static str {
    if read_only { "read-only" } else { "writable" }
}

#[cfg(test)]
mod tests;
