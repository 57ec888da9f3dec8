//! What the kernel says of a file, by which to see that nobody has written to it since.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A file as it was. Equal seals mean an unwritten file: the kernel sets the change time on every
/// write, and no program can set it back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    /// Change times of another boot say nothing about what a crash has left on the disk.
    boot_id: String,
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// This boot of the host; read once, since a jail has no `/proc`.
pub fn boot_id() -> io::Result<&'static str> {
    static BOOT_ID: OnceLock<String> = OnceLock::new();
    if let Some(id) = BOOT_ID.get() {
        return Ok(id);
    }
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(BOOT_ID.get_or_init(|| id.trim().to_owned()))
}

/// A timer tick is 1 to 10 ms.
const TICK_PATIENCE: Duration = Duration::from_millis(100);

impl Seal {
    /// The seal of `file` as it is now.
    pub fn read(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            boot_id: boot_id()?.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }

    /// Seals a file that has just been written.
    ///
    /// File times move on with the timer tick, so a write within the same tick would leave no trace:
    /// this returns in the next one. `None` if the clock does not move on, or was set back.
    pub fn close(file: &File) -> io::Result<Option<Self>> {
        let seal = Self::read(file)?;
        let start = Instant::now();
        while start.elapsed() < TICK_PATIENCE {
            let now = clock_gettime(ClockId::CLOCK_REALTIME_COARSE)?;
            if (now.tv_sec(), now.tv_nsec()) > seal.changed {
                return Ok((Self::read(file)? == seal).then_some(seal));
            }
            // There is no event for a tick of the file system's clock; it is a millisecond or a few.
            thread::sleep(Duration::from_micros(500));
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_write_breaks_the_seal_and_reading_does_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(b"one", 0).unwrap();
        let seal = Seal::close(file.as_file()).unwrap().unwrap();
        fs::read(file.path()).unwrap();
        let moved = file.path().with_extension("moved");
        assert_eq!(Seal::read(file.as_file()).unwrap(), seal);
        fs::copy(file.path(), &moved).unwrap();
        assert_ne!(Seal::read(&File::open(&moved).unwrap()).unwrap(), seal);
        fs::remove_file(moved).unwrap();
        // The very same bytes, at once.
        file.as_file().write_all_at(b"one", 0).unwrap();
        assert_ne!(Seal::read(file.as_file()).unwrap(), seal);
    }
}
