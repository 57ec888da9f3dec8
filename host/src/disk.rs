//! A Machine's own disk: a sparse ext4 file system, the upper layer of its root.
//!
//! `mkfs.ext4` takes half a second, and its result is the same for all: it runs once, and every disk
//! is a copy of what it has made. Only the parts that hold data are copied, or nothing at all where
//! the file system under the data directory can share blocks (`FICLONE`).

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::SeekFrom;

/// Blank disks of one size.
#[derive(Debug)]
pub(crate) struct Blank {
    path: PathBuf,
    size: u64,
    making: parking_lot::Mutex<()>,
}

impl Blank {
    /// Blank disks of `size` bytes, made from a template in `dir`.
    pub(crate) fn new(dir: &Path, size: u64) -> Self {
        // The kernel wants whole sectors, ext4 whole blocks.
        let size = size.next_multiple_of(4096);
        Self {
            path: dir.join(format!("blank-{size}.ext4")),
            size,
            making: parking_lot::Mutex::new(()),
        }
    }

    /// Puts a blank disk at `path`, whole, in place of what was there.
    pub(crate) fn put(&self, path: &Path) -> io::Result<()> {
        let template = self.template()?;
        let temporary = path.with_extension("new");
        let disk = new_file(&temporary)?;
        copy_sparsely(&template, &disk, self.size)?;
        fs::rename(&temporary, path)
    }

    fn template(&self) -> io::Result<File> {
        let _turn = self.making.lock();
        match File::open(&self.path) {
            Ok(file) if file.metadata()?.len() == self.size => return Ok(file),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let temporary = self.path.with_extension("tmp");
        make_ext4(&temporary, self.size, "tern")?;
        let file = File::open(&temporary)?;
        fs::rename(&temporary, &self.path)?;
        Ok(file)
    }
}

/// Makes an empty ext4 file system in a sparse file, on disk when this returns.
pub(crate) fn make_ext4(path: &Path, size: u64, label: &str) -> io::Result<()> {
    let file = new_file(path)?;
    file.set_len(size)?;
    let made = Command::new("mkfs.ext4")
        // No blocks kept back for root. A new sparse file reads as zeroes, which is what the tables of
        // inodes must be: else every guest would write them after its first start, 128 MiB of a disk
        // of 8 GiB.
        .args(["-q", "-F", "-m", "0", "-L", label])
        .args(["-E", "assume_storage_prezeroed=1,nodiscard"])
        .arg(path)
        .output()
        .map_err(|e| io::Error::new(e.kind(), format!("mkfs.ext4 (package e2fsprogs): {e}")))?;
    if !made.status.success() {
        let why = String::from_utf8_lossy(&made.stderr).trim().to_owned();
        return Err(io::Error::other(format!(
            "mkfs.ext4: {}: {why}",
            made.status
        )));
    }
    file.sync_all()
}

/// Copies a disk to a new file, on disk when this returns.
pub(crate) fn copy_whole(from: &File, to: &Path) -> io::Result<()> {
    let copy = new_file(to)?;
    copy_sparsely(from, &copy, from.metadata()?.len())?;
    copy.sync_all()
}

fn new_file(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

/// Makes `to` the same as the first `size` bytes of `from`, with holes where that has holes.
fn copy_sparsely(from: &File, to: &File, size: u64) -> io::Result<()> {
    // SAFETY: FICLONE takes a file descriptor by value and touches no memory of ours.
    if unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) } == 0 {
        return Ok(());
    }
    to.set_len(size)?;
    let mut buffer = vec![0; 256 * 1024];
    let mut at = 0;
    loop {
        let start = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data behind this offset.
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(from, SeekFrom::Hole(start))?.min(size);
        at = start;
        while at < end {
            let length = usize::try_from(end - at).map_or(buffer.len(), |l| l.min(buffer.len()));
            let part = &mut buffer[..length];
            from.read_exact_at(part, at)?;
            // File systems that cannot tell holes call everything data.
            if part.iter().any(|&b| b != 0) {
                to.write_all_at(part, at)?;
            }
            at += length as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_blank_disk_is_sparse_ext4_and_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let blank = Blank::new(dir.path(), 1 << 30);
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        blank.put(&one).unwrap();
        let made = fs::metadata(&blank.path).unwrap().modified().unwrap();
        blank.put(&two).unwrap();
        assert_eq!(fs::metadata(&blank.path).unwrap().modified().unwrap(), made);
        let metadata = fs::metadata(&one).unwrap();
        assert_eq!(metadata.len(), 1 << 30);
        assert!(
            metadata.blocks() * 512 < 64 << 20,
            "{} blocks",
            metadata.blocks()
        );
        let mut magic = [0; 2];
        File::open(&two)
            .unwrap()
            .read_exact_at(&mut magic, 1024 + 56)
            .unwrap();
        assert_eq!(magic, [0x53, 0xef], "ext4's magic number");
        let check = Command::new("fsck.ext4")
            .args(["-fn"])
            .arg(&two)
            .output()
            .unwrap();
        assert!(check.status.success(), "{check:?}");
    }

    #[test]
    fn a_copy_replaces_what_a_machine_has_written() {
        let dir = tempfile::tempdir().unwrap();
        let blank = Blank::new(dir.path(), 64 << 20);
        let disk = dir.path().join("disk.ext4");
        blank.put(&disk).unwrap();
        let fresh = fs::read(&disk).unwrap();
        File::options()
            .write(true)
            .open(&disk)
            .unwrap()
            .write_all_at(b"written", 1 << 20)
            .unwrap();
        assert_ne!(fs::read(&disk).unwrap(), fresh);
        blank.put(&disk).unwrap();
        assert_eq!(fs::read(&disk).unwrap(), fresh);
    }
}
