//! The memory file: what it must hold, and checking that it does.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

use super::Refused;
use super::seal::Seal;
use crate::memory::{Memory, PAGE_SIZE};

/// How much of the memory file one checksum covers.
pub const CHUNK_BYTES: usize = 64 << 10;
pub(super) const PAGES_PER_CHUNK: usize = CHUNK_BYTES / PAGE_SIZE;

/// What a memory file must hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryIndex {
    pub(super) bytes: u64,
    pub(super) checksums: Vec<u64>,
    pub(super) seal: Option<Seal>,
    /// Chunks of which an update that failed may have written a part: what is in the file there, only the
    /// file knows.
    #[serde(skip)]
    pub(super) doubtful: BTreeSet<usize>,
}

/// Opens for writing the memory file at `path`, if it is the one that lies under `memory`, and nobody
/// else's.
pub fn reopen(path: &Path, memory: &Memory) -> io::Result<File> {
    let under = memory
        .backing()
        .ok_or_else(|| no("it lies under no memory"))?;
    let file = super::open_plain(path, OFlag::O_RDWR)?;
    let (found, expected) = (file.metadata()?, under.metadata()?);
    if (found.dev(), found.ino()) != (expected.dev(), expected.ino()) {
        return Err(no("it is not the one under this Machine's memory"));
    }
    // Who made another name for it wants to keep what it holds.
    if found.nlink() != 1 {
        return Err(no("it has more than one name"));
    }
    Ok(file)
}

fn no(reason: &str) -> io::Error {
    io::Error::other(reason)
}

/// Opens the memory file of a snapshot, and checks it: by its seal, or byte for byte.
pub fn open(path: &Path, bytes: u64, index: &MemoryIndex) -> Result<File, Refused> {
    let read = |source| Refused::Read {
        path: path.to_owned(),
        source,
    };
    let file = super::open_plain(path, OFlag::O_RDONLY).map_err(read)?;
    let found = file.metadata().map_err(read)?.len();
    let chunks = (bytes as usize).div_ceil(CHUNK_BYTES);
    if found != bytes || index.bytes != bytes || index.checksums.len() != chunks {
        return Err(Refused::MemoryLength {
            found,
            expected: bytes,
        });
    }
    let sealed = index
        .seal
        .as_ref()
        .is_some_and(|seal| Seal::read(&file).ok().as_ref() == Some(seal));
    if !sealed {
        verify(&file, index).map_err(read)??;
    }
    Ok(file)
}

/// Reads the whole file, but for its holes, and compares.
pub(super) fn verify(file: &File, index: &MemoryIndex) -> io::Result<Result<(), Refused>> {
    let zero_checksum = zero_checksum();
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut data = 0..0;
    for (number, expected) in index.checksums.iter().enumerate() {
        let offset = (number * CHUNK_BYTES) as u64;
        let len = (index.bytes - offset).min(CHUNK_BYTES as u64);
        if data.end <= offset {
            data = next_data(file, offset, index.bytes)?;
        }
        let hole = data.start >= offset + len;
        let found = if hole && len == CHUNK_BYTES as u64 {
            zero_checksum
        } else {
            let chunk = &mut buffer[..len as usize];
            file.read_exact_at(chunk, offset)?;
            xxh3_64(chunk)
        };
        if found != *expected {
            return Ok(Err(Refused::MemoryDamaged { offset }));
        }
    }
    Ok(Ok(()))
}

/// The first part of `file` at or behind `offset` that is not a hole.
pub(super) fn next_data(file: &File, offset: u64, end: u64) -> io::Result<std::ops::Range<u64>> {
    let at = i64::try_from(offset).map_err(io::Error::other)?;
    match lseek(file.as_fd(), at, Whence::SeekData) {
        Ok(start) => {
            let stop = lseek(file.as_fd(), start, Whence::SeekHole)?;
            Ok(start as u64..stop as u64)
        }
        Err(nix::errno::Errno::ENXIO) => Ok(end..end),
        Err(errno) => Err(errno.into()),
    }
}

/// The checksum of a chunk of zeroes.
pub(super) fn zero_checksum() -> u64 {
    let mut hasher = Xxh3Default::new();
    for _ in 0..PAGES_PER_CHUNK {
        hasher.update(&[0; PAGE_SIZE]);
    }
    hasher.digest()
}

#[cfg(test)]
mod tests {
    use super::super::writer::write_whole;
    use super::*;
    use std::fs::OpenOptions;
    use vm_memory::{Bytes, GuestAddress};

    const BYTES: u64 = 32 << 20;

    #[test]
    fn every_flipped_bit_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let memory = Memory::anonymous(BYTES).unwrap();
        memory
            .ram()
            .write_slice(b"here", GuestAddress(0x5000))
            .unwrap();
        let index = write_whole(&path, &memory).unwrap();
        for at in [0x5001, 0x5fff, 0, 0x7f_ffff, BYTES - 1] {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
            match open(&path, BYTES, &index) {
                Err(Refused::MemoryDamaged { offset }) => {
                    assert_eq!(offset, at / CHUNK_BYTES as u64 * CHUNK_BYTES as u64);
                }
                other => panic!("{at:#x}: {other:?}"),
            }
            file.write_all_at(&byte, at).unwrap();
            open(&path, BYTES, &index).unwrap();
        }
    }

    #[test]
    fn another_length_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let index = write_whole(&path, &Memory::anonymous(BYTES).unwrap()).unwrap();
        for len in [0, BYTES - 1, BYTES + 1] {
            OpenOptions::new()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(len)
                .unwrap();
            assert!(matches!(
                open(&path, BYTES, &index),
                Err(Refused::MemoryLength { found, .. }) if found == len
            ));
        }
    }
}
