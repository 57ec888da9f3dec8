//! Which pages of guest memory there are, and whose: `/proc/self/pagemap`
//! (<https://docs.kernel.org/admin-guide/mm/pagemap.html>).
//!
//! It is asked because looking at a page that the guest has never touched would allocate it. After a
//! restore the same bits tell what the guest has written: those pages are anonymous now, and the others
//! still belong to the snapshot's memory file.
//!
//! KVM's dirty log would tell the second too, and pays for it while the guest runs: it write-protects
//! pages and takes a fault for each, does not see what devices write, and knows nothing of what was
//! mapped beforehand or given back. These bits are there anyway, exact to the page, whoever wrote it: the
//! kernel's vhost-net too, whose thread writes through this process's mapping.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use crate::memory::PAGE_SIZE;

const ENTRY_BYTES: usize = 8;

/// Opened while there is a `/proc`, by a process that is going to lose it.
static PAGEMAP: OnceLock<File> = OnceLock::new();

/// `/proc/self/pagemap`, opened once and for good: call it while there is a `/proc`.
pub fn pagemap() -> io::Result<&'static File> {
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

/// One page's entry.
#[derive(Debug, Clone, Copy)]
pub struct Entry(u64);

impl Entry {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const OF_FILE: u64 = 1 << 61;

    pub fn is_there(self) -> bool {
        self.0 & (Self::PRESENT | Self::SWAPPED) != 0
    }

    /// Whether the page is the guest's own, not the page cache's.
    pub fn holds_private_data(self) -> bool {
        self.is_there() && self.0 & Self::OF_FILE == 0
    }
}

/// Entries of pages that follow one another, in buffers that are used again.
pub struct Entries {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

impl Entries {
    /// Room for the entries of `pages` pages.
    pub fn new(pages: usize) -> Self {
        Self {
            bytes: vec![0; pages * ENTRY_BYTES],
            entries: Vec::with_capacity(pages),
        }
    }

    /// Reads those of `pages` pages from `host` on, or of as many as there is room for.
    pub fn read(&mut self, host: *const u8, pages: usize) -> io::Result<&[Entry]> {
        let most = self.bytes.len();
        let bytes = &mut self.bytes[..most.min(pages * ENTRY_BYTES)];
        let at = host as usize / PAGE_SIZE * ENTRY_BYTES;
        pagemap()?.read_exact_at(bytes, at as u64)?;
        let entries = bytes.as_chunks().0.iter();
        self.entries.clear();
        self.entries
            .extend(entries.map(|entry| Entry(u64::from_le_bytes(*entry))));
        Ok(&self.entries)
    }
}
