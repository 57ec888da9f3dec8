//! New work is refused while there is still room for what goes on: guests that write to their sparse disks, the
//! catalog, logs. A file system without its last bytes breaks all of these at once.

use std::io;
use std::path::Path;

/// Whether the file system of a directory has room for so many bytes more, and what it keeps beside.
pub(crate) fn room_for(dir: &Path, bytes: u64) -> io::Result<()> {
    let told = rustix::fs::statvfs(dir)?;
    let free = told.f_bavail.saturating_mul(told.f_frsize);
    let all = told.f_blocks.saturating_mul(told.f_frsize);
    if fits(free, all, bytes) {
        return Ok(());
    }
    let mib = |bytes: u64| bytes >> 20;
    Err(io::Error::new(
        io::ErrorKind::StorageFull,
        format!(
            "the disk of {} is nearly full: {} MiB are free, {} are needed, and {} are kept for what runs. Remove \
             images, volumes or snapshots, or make it larger",
            dir.display(),
            mib(free),
            mib(bytes),
            mib(kept(all))
        ),
    ))
}

fn fits(free: u64, all: u64, bytes: u64) -> bool {
    free.checked_sub(kept(all))
        .is_some_and(|room| room >= bytes)
}

fn kept(all: u64) -> u64 {
    (all / KEPT_SHARE).min(MOST_KEPT)
}

/// One in so many bytes is kept,
const KEPT_SHARE: u64 = 20;
/// and no more than this, however large the disk.
const MOST_KEPT: u64 = 1 << 30;

#[cfg(test)]
mod tests {
    use super::*;
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};

    /// A disk of its own of 64 MiB, in a mount namespace of the test's own, which ends with it.
    fn on_small_disk(test: impl FnOnce(&Path) + Send) {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            let run = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNS)
                    .expect("this test needs root, for a mount namespace of its own");
                let none = None::<&str>;
                let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
                mount(none, "/", none, private, none).unwrap();
                let flags = MsFlags::empty();
                mount(none, dir.path(), Some("tmpfs"), flags, Some("size=64m")).unwrap();
                test(dir.path());
            });
            if let Err(panic) = run.join() {
                std::panic::resume_unwind(panic);
            }
        });
    }

    #[test]
    fn new_work_is_refused_before_the_last_bytes_are_gone() {
        on_small_disk(|dir| {
            room_for(dir, 0).unwrap();
            room_for(dir, 48 << 20).unwrap();
            let refused = room_for(dir, 63 << 20).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::StorageFull);
            let file = dir.join("guest");
            std::fs::write(&file, vec![1; 62 << 20]).unwrap();
            let refused = room_for(dir, 0).unwrap_err().to_string();
            assert!(refused.contains("nearly full: 2 MiB are free"), "{refused}");
            // What runs has what was kept for it.
            std::fs::write(dir.join("catalog"), vec![1; 1 << 20]).unwrap();
            std::fs::remove_file(&file).unwrap();
            room_for(dir, 0).unwrap();
        });
    }

    #[test]
    fn a_large_disk_keeps_no_more_than_it_must() {
        let gib = 1 << 30;
        assert!(fits(2 * gib, 1000 * gib, gib));
        assert!(!fits(gib, 1000 * gib, 1));
        assert!(fits(gib, 10 * gib, gib / 2));
        assert!(!fits(0, 0, 1));
    }
}
