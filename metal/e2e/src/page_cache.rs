//! What of a file is in the host's memory.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

const PAGE: usize = 4096;

/// How many bytes of a file the page cache holds.
pub fn cached(path: &Path) -> io::Result<usize> {
    let file = File::open(path)?;
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let mut pages = vec![0_u8; length.div_ceil(PAGE)];
    let (read, shared) = (libc::PROT_READ, libc::MAP_SHARED);
    // SAFETY: maps the file where there is room, and touches none of it; `mincore` writes a byte for each page.
    let told = unsafe {
        let map = libc::mmap(
            std::ptr::null_mut(),
            length,
            read,
            shared,
            file.as_raw_fd(),
            0,
        );
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let told = libc::mincore(map, length, pages.as_mut_ptr());
        libc::munmap(map, length);
        told
    };
    if told != 0 {
        return Err(io::Error::other("mincore fails"));
    }
    Ok(pages.iter().filter(|&&page| page & 1 != 0).count() * PAGE)
}
