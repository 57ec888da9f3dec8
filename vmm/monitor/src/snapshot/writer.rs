//! Writing guest memory into its file: whole, or what has changed.
//!
//! A guest that was restored has its memory file mapped privately, so a page is one of two things. It is the
//! guest's own copy, because it was written (or mapped beforehand as if): [`update`] writes it to the
//! file, where it has changed. Or it is the file's page: there it is already. So an update writes only where the
//! guest has copies of its own, and the guest never sees it: it may fail half-way, on a full
//! disk, and the guest runs on. The next one has the same pages to write, and the index remembers which
//! checksums can no longer be trusted.
//!
//! Two things must stay so. A page that has become zero is punched out of the file, which leaves private
//! copies alone; cutting the file off (`ftruncate`) would drop them. And a page that the guest's balloon has
//! given back shows the file again: then it may hold what the last update wrote, instead of what the guest
//! woke with. Both are the guest's own, and it has been told to expect neither.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

use super::memory_file::{CHUNK_BYTES, MemoryIndex, PAGES_PER_CHUNK, next_data, zero_checksum};
use super::pagemap::{Entries, Entry};
use super::seal::Seal;
use crate::memory::{Memory, PAGE_SIZE};

/// The longest single write; longer ones would be no faster.
const WRITE_BYTES: usize = 4 << 20;

/// Writes all of `memory` to a new file at `path`.
pub fn write_whole(path: &Path, memory: &Memory) -> io::Result<MemoryIndex> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)?;
    file.set_len(memory.size())?;
    let zero_checksum = zero_checksum();
    let mut checksums = Vec::with_capacity((memory.size() as usize).div_ceil(CHUNK_BYTES));
    // What is no hole of the file under pages that are not the guest's own, if there is a file.
    let mut under: Range<u64> = 0..0;
    for range in ranges(memory) {
        let mut data = Run::new(&file, &range, Do::Write);
        range.each_chunk(|chunk| {
            if let Some(file) = memory.backing()
                && under.end <= chunk.offset
            {
                under = next_data(file, chunk.offset, memory.size())?;
            }
            let end = chunk.offset + chunk.bytes.len() as u64;
            let is_bare = memory.backing().is_none() || under.start >= end;
            if is_bare && !chunk.is_private() {
                checksums.push(zero_checksum);
                return Ok(());
            }
            let mut hasher = Xxh3Default::new();
            for (at, page, entry) in chunk.pages() {
                let absent = is_bare && !entry.is_there();
                let page = if absent { &ZERO_PAGE } else { page };
                hasher.update(page);
                if !absent && !is_zero(page) {
                    data.add(at)?;
                }
            }
            checksums.push(hasher.digest());
            Ok(())
        })?;
        data.flush()?;
    }
    Ok(MemoryIndex {
        bytes: memory.size(),
        checksums,
        seal: file.seal()?,
        doubtful: BTreeSet::new(),
    })
}

/// Writes to the file under `memory` what has changed, of which `index` says what it holds. After an error
/// `index` still says what is known; the file is no snapshot's then.
pub fn update(file: &impl Target, memory: &Memory, index: &mut MemoryIndex) -> io::Result<()> {
    index.seal = None;
    let MemoryIndex {
        checksums,
        doubtful,
        ..
    } = index;
    for range in ranges(memory) {
        let mut data = Run::new(file, &range, Do::Write);
        let mut holes = Run::new(file, &range, Do::Punch);
        range.each_chunk(|chunk| {
            let number = (chunk.offset / CHUNK_BYTES as u64) as usize;
            let known = checksums.get_mut(number);
            let known = known.ok_or_else(|| io::Error::other("memory beyond its file"))?;
            let certain = !doubtful.contains(&number);
            if certain && !chunk.is_private() {
                return Ok(());
            }
            let checksum = xxh3_64(chunk.bytes);
            // Mapped beforehand and never written, or written to be the same.
            if certain && checksum == *known {
                return Ok(());
            }
            doubtful.insert(number);
            *known = checksum;
            for (at, page, entry) in chunk.pages() {
                if entry.holds_private_data() {
                    let run = if is_zero(page) { &mut holes } else { &mut data };
                    run.add(at)?;
                }
            }
            Ok(())
        })?;
        data.flush()?;
        holes.flush()?;
    }
    doubtful.clear();
    index.seal = file.seal()?;
    Ok(())
}

/// What is written to: a memory file. Tests have one that fails.
pub trait Target {
    /// Writes all of `bytes` at `offset`.
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes a hole of `len` bytes at `offset`, if the file system can.
    fn punch(&self, offset: u64, len: u64) -> nix::Result<()>;
    /// The seal of what was written.
    fn seal(&self) -> io::Result<Option<Seal>>;
}

impl Target for File {
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn punch(&self, offset: u64, len: u64) -> nix::Result<()> {
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(self, hole, offset as i64, len as i64)
    }

    fn seal(&self) -> io::Result<Option<Seal>> {
        Seal::close(self)
    }
}

/// A range of guest memory, and where it is in the memory file.
struct Ram<'a> {
    bytes: &'a [u8],
    file_offset: u64,
}

/// [`CHUNK_BYTES`] of it.
struct Chunk<'a> {
    bytes: &'a [u8],
    /// In its range.
    start: usize,
    /// In the memory file.
    offset: u64,
    entries: &'a [Entry],
}

/// The ranges of a memory that stands still.
fn ranges(memory: &Memory) -> impl Iterator<Item = Ram<'_>> {
    memory.mappings().map(|(range, host)| {
        // SAFETY: `host` is a mapping of `range.len` bytes that `memory` keeps. It is not written to
        // while this borrow lives: vCPUs and device workers are stopped, which the caller promises by
        // calling a Machine paused, no other thread has access to it, and the file under it is
        // written only where the mapping has copies of its own.
        let bytes = unsafe { std::slice::from_raw_parts(host, range.len as usize) };
        let file_offset = range.file_offset;
        Ram { bytes, file_offset }
    })
}

impl Ram<'_> {
    fn each_chunk(&self, mut visit: impl FnMut(Chunk<'_>) -> io::Result<()>) -> io::Result<()> {
        let mut entries = Entries::new(ENTRIES);
        for (number, part) in self.bytes.chunks(ENTRIES * PAGE_SIZE).enumerate() {
            let part_start = number * ENTRIES * PAGE_SIZE;
            let entries = entries.read(part.as_ptr(), part.len() / PAGE_SIZE)?;
            let chunks = part.chunks(CHUNK_BYTES);
            for (number, (bytes, entries)) in
                chunks.zip(entries.chunks(PAGES_PER_CHUNK)).enumerate()
            {
                let start = part_start + number * CHUNK_BYTES;
                visit(Chunk {
                    bytes,
                    start,
                    offset: self.file_offset + start as u64,
                    entries,
                })?;
            }
        }
        Ok(())
    }
}

impl<'a> Chunk<'a> {
    /// Whether the guest has a copy of its own of any page.
    fn is_private(&self) -> bool {
        let mut entries = self.entries.iter();
        entries.any(|entry| entry.holds_private_data())
    }

    /// Its pages, each with where it starts in the range.
    fn pages(&self) -> impl Iterator<Item = (usize, &'a [u8], Entry)> {
        let starts = (self.start..).step_by(PAGE_SIZE);
        let pages = self.bytes.chunks(PAGE_SIZE);
        let pages = starts.zip(pages).zip(self.entries);
        pages.map(|((start, page), entry)| (start, page, *entry))
    }
}

/// Entries of the page map read at once, of 2 MiB of memory: a whole number of chunks.
const ENTRIES: usize = 32 * PAGES_PER_CHUNK;

const ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

fn is_zero(page: &[u8]) -> bool {
    // Most pages with something in them have it at the start.
    page[..64].iter().all(|byte| *byte == 0) && page == ZERO_PAGE
}

/// Pages that follow one another, and to which the same is done: together.
struct Run<'a, T> {
    file: &'a T,
    ram: &'a Ram<'a>,
    what: Do,
    pages: Range<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Do {
    Write,
    /// They are zero.
    Punch,
}

impl<'a, T: Target> Run<'a, T> {
    fn new(file: &'a T, ram: &'a Ram<'a>, what: Do) -> Self {
        Self {
            file,
            ram,
            what,
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
        if pages.is_empty() {
            return Ok(());
        }
        let offset = self.ram.file_offset + pages.start as u64;
        if self.what == Do::Punch {
            match self.file.punch(offset, pages.len() as u64) {
                // Not every file system has holes that can be made later.
                Err(Errno::EOPNOTSUPP) => {}
                done => return done.map_err(io::Error::from),
            }
        }
        self.file.write(&self.ram.bytes[pages], offset)
    }
}

#[cfg(test)]
mod tests;
