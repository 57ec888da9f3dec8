//! The disk (virtio 1.2, section 5.2): a raw file, read-only or writable, with flushes.
//!
//! Requests are carried out one after the other in the device's thread, by `preadv` and `pwritev`
//! between the page cache and guest memory. A write is answered when the page cache has it, and is on
//! the disk after the guest's next flush, as the driver has been told.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::AsFd;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};

use super::chain::Chain;
use super::{Context, Device, DeviceState, Kind};
use crate::config::DiskConfig;

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
/// Type (4 bytes), reserved (4), sector (8).
const HEADER_BYTES: usize = 16;
const STATUS_BYTES: usize = 1;
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
            _ => Err(Refusal::Unsupported),
        }
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
        let read_only = if self.read_only {
            1 << VIRTIO_BLK_F_RO
        } else {
            0
        };
        1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_SEG_MAX | read_only
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    /// `struct virtio_blk_config`: capacity (8 bytes), size_max (4), seg_max (4), then what is only
    /// there with features not offered.
    fn config(&self) -> Vec<u8> {
        let mut config = self.sectors.to_le_bytes().to_vec();
        config.extend_from_slice(&0_u32.to_le_bytes());
        config.extend_from_slice(&SEGMENTS.to_le_bytes());
        config.resize(60, 0);
        config
    }

    fn start(&mut self, _cx: &mut Context) -> io::Result<()> {
        Ok(())
    }

    fn on_queue(&mut self, cx: &mut Context, index: usize) {
        let ram = cx.ram.clone();
        let queue = &mut cx.queues[index];
        queue.mute(&ram);
        for _ in 0..queue.size() {
            let Some(descriptors) = queue.pop(&ram) else {
                break;
            };
            let head = descriptors.head_index();
            let written = match Chain::map(&ram, descriptors) {
                Ok(chain) => self.process(&chain),
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

/// Why a request is answered with an error.
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
