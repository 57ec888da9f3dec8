//! The memory file: writing the pages that hold something, checking them again.
//!
//! Which pages those are is read from `/proc/self/pagemap`
//! (<https://docs.kernel.org/admin-guide/mm/pagemap.html>), because looking at a page that the guest has
//! never touched would allocate it. After a restore the same bits tell which pages the guest has
//! written: those are anonymous now, the others still belong to the file of the last snapshot, from
//! which they are copied without passing through this process.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;

use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

use super::Refused;
use super::seal::Seal;
use crate::memory::{Memory, PAGE_SIZE};

/// How much of the memory file one checksum covers.
pub const CHUNK_BYTES: usize = 64 << 10;
/// The longest single write.
const WRITE_BYTES: usize = 4 << 20;
const PAGES_PER_CHUNK: usize = CHUNK_BYTES / PAGE_SIZE;

/// What a memory file must hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryIndex {
    bytes: u64,
    checksums: Vec<u64>,
    seal: Option<Seal>,
}

/// Opened while there is a `/proc`, by a process that is going to lose it.
static PAGEMAP: OnceLock<File> = OnceLock::new();

/// `/proc/self/pagemap`, opened once and for good: call it while there is a `/proc`.
pub(super) fn pagemap() -> io::Result<&'static File> {
    if PAGEMAP.get().is_none() {
        let _ = PAGEMAP.set(open_pagemap()?); // by another thread: the same one
    }
    PAGEMAP.get().ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Without capabilities, even where this process has some: so it never shows where in the host's memory a
/// page is (`pagemap_read` asks whoever opened the file).
fn open_pagemap() -> io::Result<File> {
    crate::jail::without_capabilities(|| File::open("/proc/self/pagemap"))?
}

/// Writes `memory` to a new file at `path`. `base` is the index of the file under it, if there is one.
pub fn write(path: &Path, memory: &Memory, base: Option<&MemoryIndex>) -> io::Result<MemoryIndex> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)?;
    file.set_len(memory.size())?;
    let pagemap = pagemap()?;
    let base = memory.backing().zip(base);
    let zero_checksum = zero_checksum();
    let mut checksums = Vec::with_capacity((memory.size() as usize).div_ceil(CHUNK_BYTES));
    let mut entries = [0; PAGES_PER_CHUNK * 8];
    for (range, host) in memory.mappings() {
        // SAFETY: `host` is a mapping of `range.len` bytes that `memory` keeps. It is not written to
        // while this borrow lives: vCPUs and device workers are stopped, which the caller promises by
        // calling a Machine paused, and no other thread has access to it.
        let ram = unsafe { std::slice::from_raw_parts(host, range.len as usize) };
        let mut out = Run::new(&file, ram, range.file_offset);
        let mut clean = Copy::new(&file, base.map(|(file, _)| file));
        for (number, chunk) in ram.chunks(CHUNK_BYTES).enumerate() {
            let start = number * CHUNK_BYTES;
            let pages = chunk.len() / PAGE_SIZE;
            let entries = &mut entries[..pages * 8];
            let first_page = (host as u64 + start as u64) / PAGE_SIZE as u64;
            pagemap.read_exact_at(entries, first_page * 8)?;
            let entries = entries
                .as_chunks()
                .0
                .iter()
                .map(|bytes| Entry(u64::from_le_bytes(*bytes)));
            let offset = range.file_offset + start as u64;
            if !entries.clone().any(Entry::holds_private_data) {
                let inherited =
                    base.and_then(|(_, index)| index.checksums.get(offset as usize / CHUNK_BYTES));
                checksums.push(*inherited.unwrap_or(&zero_checksum));
                clean.add(offset, chunk.len() as u64)?;
                continue;
            }
            let mut hasher = Xxh3Default::new();
            for (index, (page, entry)) in chunk.chunks(PAGE_SIZE).zip(entries).enumerate() {
                // Without a file below, a page that is not there is a page of zeroes.
                let absent = base.is_none() && !entry.is_there();
                let page = if absent { &ZERO_PAGE } else { page };
                hasher.update(page);
                if !absent && !is_zero(page) {
                    out.add(start + index * PAGE_SIZE)?;
                }
            }
            checksums.push(hasher.digest());
        }
        out.flush()?;
        clean.flush()?;
    }
    Ok(MemoryIndex {
        bytes: memory.size(),
        checksums,
        seal: Seal::close(&file)?,
    })
}

/// Opens the memory file of a snapshot, and checks it: by its seal, or byte for byte.
pub fn open(path: &Path, bytes: u64, index: &MemoryIndex) -> Result<File, Refused> {
    let read = |source| Refused::Read {
        path: path.to_owned(),
        source,
    };
    let file = super::open_plain(path).map_err(read)?;
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
fn verify(file: &File, index: &MemoryIndex) -> io::Result<Result<(), Refused>> {
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
fn next_data(file: &File, offset: u64, end: u64) -> io::Result<std::ops::Range<u64>> {
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

/// One page's entry in `/proc/self/pagemap`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry(pub(super) u64);

impl Entry {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const OF_FILE: u64 = 1 << 61;

    pub(super) fn is_there(self) -> bool {
        self.0 & (Self::PRESENT | Self::SWAPPED) != 0
    }

    /// Whether the page is the guest's own, not the page cache's.
    pub(super) fn holds_private_data(self) -> bool {
        self.is_there() && self.0 & Self::OF_FILE == 0
    }
}

const ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

fn is_zero(page: &[u8]) -> bool {
    // Most pages with something in them have it at the start.
    page[..64].iter().all(|byte| *byte == 0) && page == ZERO_PAGE
}

fn zero_checksum() -> u64 {
    let mut hasher = Xxh3Default::new();
    for _ in 0..PAGES_PER_CHUNK {
        hasher.update(&ZERO_PAGE);
    }
    hasher.digest()
}

/// Pages to be written that follow one another: written together.
struct Run<'a> {
    file: &'a File,
    ram: &'a [u8],
    file_offset: u64,
    pages: std::ops::Range<usize>,
}

impl<'a> Run<'a> {
    fn new(file: &'a File, ram: &'a [u8], file_offset: u64) -> Self {
        Self {
            file,
            ram,
            file_offset,
            pages: 0..0,
        }
    }

    /// Adds the page that starts at `at`.
    fn add(&mut self, at: usize) -> io::Result<()> {
        if at != self.pages.end || self.pages.len() >= WRITE_BYTES {
            self.flush()?;
            self.pages = at..at;
        }
        self.pages.end = at + PAGE_SIZE;
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let pages = std::mem::replace(&mut self.pages, 0..0);
        let offset = self.file_offset + pages.start as u64;
        self.file.write_all_at(&self.ram[pages], offset)
    }
}

/// Chunks that are the same in the file below: copied together, inside the kernel, without the holes.
struct Copy<'a> {
    to: &'a File,
    from: Option<&'a File>,
    part: std::ops::Range<u64>,
}

impl<'a> Copy<'a> {
    fn new(to: &'a File, from: Option<&'a File>) -> Self {
        Self {
            to,
            from,
            part: 0..0,
        }
    }

    fn add(&mut self, offset: u64, len: u64) -> io::Result<()> {
        if offset != self.part.end {
            self.flush()?;
            self.part = offset..offset;
        }
        self.part.end = offset + len;
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let part = std::mem::replace(&mut self.part, 0..0);
        let Some(from) = self.from else { return Ok(()) };
        let mut at = part.start;
        while at < part.end {
            let data = next_data(from, at, part.end)?;
            let (start, end) = (data.start.min(part.end), data.end.min(part.end));
            copy(from, self.to, start, end)?;
            at = end;
        }
        Ok(())
    }
}

fn copy(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut at_from, mut at_to) = (start as libc::loff_t, start as libc::loff_t);
    while (at_to as u64) < end {
        let left = (end - at_to as u64) as usize;
        // Not by the C library's name for it: std refers to that weakly, and a static program optimized as a
        // whole then finds nothing behind it.
        // SAFETY: both offsets are ours and outlive the call.
        let copied = unsafe {
            libc::syscall(
                libc::SYS_copy_file_range,
                from.as_raw_fd(),
                &raw mut at_from,
                to.as_raw_fd(),
                &raw mut at_to,
                left,
                0_u32,
            )
        };
        match usize::try_from(copied) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(_) => {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // Other file systems than the old file's may need it done by hand.
                    Some(libc::EXDEV | libc::ENOSYS | libc::EOPNOTSUPP | libc::EINVAL) => {
                        return copy_by_hand(from, to, at_to as u64, end);
                    }
                    _ => return Err(error),
                }
            }
        }
    }
    Ok(())
}

fn copy_by_hand(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut at = start;
    while at < end {
        let len = (end - at).min(CHUNK_BYTES as u64) as usize;
        from.read_exact_at(&mut buffer[..len], at)?;
        to.write_all_at(&buffer[..len], at)?;
        at += len as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use vm_memory::{Bytes, GuestAddress};

    const BYTES: u64 = 32 << 20;

    fn put(memory: &Memory, at: u64, text: &[u8]) {
        memory.ram().write_slice(text, GuestAddress(at)).unwrap();
    }

    fn get(memory: &Memory, at: u64) -> [u8; 4] {
        let mut text = [0; 4];
        memory
            .ram()
            .read_slice(&mut text, GuestAddress(at))
            .unwrap();
        text
    }

    #[test]
    fn only_pages_that_hold_something_take_room() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let memory = Memory::anonymous(BYTES).unwrap();
        put(&memory, 0x5000, b"here");
        put(&memory, 0x80_0000, &[0; 4096]); // touched, and zero
        put(&memory, BYTES - 4, b"last");
        let index = write(&path, &memory, None).unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), BYTES);
        assert!(
            metadata.blocks() * 512 <= 4 * 4096,
            "{} blocks",
            metadata.blocks()
        );
        let restored = Memory::from_file(open(&path, BYTES, &index).unwrap(), BYTES).unwrap();
        assert_eq!(
            (&get(&restored, 0x5000), &get(&restored, BYTES - 4)),
            (b"here", b"last")
        );
        verify(&File::open(&path).unwrap(), &index)
            .unwrap()
            .unwrap();
    }

    #[test]
    fn a_second_snapshot_holds_old_and_new_pages() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        let memory = Memory::anonymous(BYTES).unwrap();
        for at in [0x1000, 0x1_2000, 0x40_0000, 0x123_0000] {
            put(&memory, at, b"old ");
        }
        let index = write(&one, &memory, None).unwrap();
        let memory = Memory::from_file(open(&one, BYTES, &index).unwrap(), BYTES).unwrap();
        assert_eq!(&get(&memory, 0x40_0000), b"old ");
        put(&memory, 0x1000, b"new ");
        put(&memory, 0x1_3000, b"new ");
        put(&memory, 0x123_0000, &[0; 4]); // a page that held something is all zero now
        let second = write(&two, &memory, Some(&index)).unwrap();
        verify(&File::open(&two).unwrap(), &second)
            .unwrap()
            .unwrap();
        let restored = Memory::from_file(open(&two, BYTES, &second).unwrap(), BYTES).unwrap();
        for (at, text) in [
            (0x1000, b"new "),
            (0x1_2000, b"old "),
            (0x1_3000, b"new "),
            (0x40_0000, b"old "),
            (0x123_0000, b"\0\0\0\0"),
        ] {
            assert_eq!(&get(&restored, at), text, "{at:#x}");
        }
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let memory = Memory::anonymous(BYTES).unwrap();
        put(&memory, 0x5000, b"here");
        let index = write(&path, &memory, None).unwrap();
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
        let index = write(&path, &Memory::anonymous(BYTES).unwrap(), None).unwrap();
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
