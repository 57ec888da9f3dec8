//! Everything of one Machine on disk, and when which of it is true.
//!
//! Most files belong to the monitor (see `ARCHITECTURE.md`). The agent's own are:
//!
//! - `agent.json` ([`Memo`]): the slot, which config the disk belongs to, which image that is.
//!   Written whole, by rename.
//! - `suspended.json` ([`Seal`]): the snapshot beside it is good. **Without it a snapshot is
//!   rubbish.** A wake removes it before the monitor starts, so that no snapshot is ever resumed
//!   twice against a disk that has moved on.
//!
//! - `suspending`: the monitor may be writing its snapshot, and be silent for as long as that takes. It is there
//!   before the catalog says so.
//!
//! # A crash at any step
//!
//! *Suspending*: the monitor is paused; it writes `snapshot/`, or updates the one that it woke from; the
//! seal is written; the monitor is stopped. Whoever comes after a crash finds the monitor alive
//! until the last step, and a living monitor wins: the seal is removed, then the vCPUs run on. A
//! monitor that died before the seal was written leaves a crashed Machine. One that still writes when the next
//! agent comes answers nobody before it has done; it is waited for, however long that takes.
//!
//! *Waking*: everything around the snapshot is made ready; the seal is removed; the monitor starts from
//! `snapshot/`; the guest is told the time. What fails before the seal is removed leaves the Machine asleep, and a
//! seal for which no monitor could be started is put back. A crash after it is leaves either a monitor to adopt or a Machine that starts cold from
//! its disk.
//!
//! *Awake*, `snapshot/` stays where it is: its memory file lies under the guest's memory, and has its room on
//! the disk with a name or without; and the next snapshot need only write what has changed. It is
//! removed when the monitor has ended and nothing sealed it, and before a cold start.
//!
//! *Losing power* in these moments: a removed seal must not come back once the guest has written to
//! its disk, which it may do unasked as soon as it runs; so where the seal was good in any boot of the
//! host (see below), its directory is synced before the monitor starts. And the snapshot may be only
//! half on disk though its seal is whole, or what its guest takes for written, which may be but in the
//! host's page cache; therefore a seal names the boot of the host that it was written in, and is good in
//! that boot alone, until the snapshot and the disks under it have been synced in the background and the
//! seal is written anew.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, openat};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tern_catalog::MachineId;

use crate::last_words::last_words;
use crate::monitor::config::writable_disks;

/// The directory of one Machine.
#[derive(Debug, Clone)]
pub(crate) struct MachineDir {
    path: PathBuf,
}

/// What the agent must remember of a Machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Memo {
    /// Its place in the host's network.
    pub(crate) slot: u16,
    /// The config that the disk belongs to.
    #[serde(default)]
    pub(crate) instance_id: Option<String>,
    /// The image of that config.
    #[serde(default)]
    pub(crate) image_digest: Option<String>,
    /// Counts cold starts; a guest's log lines are numbered anew with each.
    #[serde(default)]
    pub(crate) boots: u64,
}

/// Says that the snapshot is good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seal {
    /// The config that was suspended.
    pub(crate) instance_id: String,
    /// The boot of the host in which it is good; `None` once the snapshot and its disks outlast that boot.
    pub(crate) boot_id: Option<String>,
}

/// What a monitor leaves when it ends.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct ExitFile {
    pub(crate) reason: String,
    #[serde(default)]
    pub(crate) message: String,
}

impl MachineDir {
    /// The directory of this Machine, whether or not it exists.
    pub(crate) fn new(machines: &Path, id: &MachineId) -> Self {
        Self {
            path: machines.join(id.as_str()),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn vm_json(&self) -> PathBuf {
        self.path.join("vm.json")
    }

    pub(crate) fn run_cpio(&self) -> PathBuf {
        self.path.join("run.cpio")
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.path.join("disk.ext4")
    }

    pub(crate) fn pid_file(&self) -> PathBuf {
        self.path.join("vmm.pid")
    }

    pub(crate) fn control(&self) -> PathBuf {
        self.path.join("vmm.sock")
    }

    pub(crate) fn vsock(&self) -> PathBuf {
        self.path.join("vsock.sock")
    }

    pub(crate) fn serial_log(&self) -> PathBuf {
        self.path.join("serial.log")
    }

    pub(crate) fn vmm_log(&self) -> PathBuf {
        self.path.join("vmm.log")
    }

    /// All that a monitor sees of the host, and where it alone writes.
    pub(crate) fn jail(&self) -> PathBuf {
        self.path.join("jail")
    }

    pub(crate) fn exit_file(&self) -> PathBuf {
        self.jail().join("exit.json")
    }

    pub(crate) fn snapshot(&self) -> PathBuf {
        self.jail().join("snapshot")
    }

    pub(crate) fn console_log(&self) -> PathBuf {
        self.path.join("console.log")
    }

    fn suspending_file(&self) -> PathBuf {
        self.path.join("suspending")
    }

    fn seal_file(&self) -> PathBuf {
        self.path.join("suspended.json")
    }

    fn memo_file(&self) -> PathBuf {
        self.path.join("agent.json")
    }

    /// Says that the monitor is about to write a snapshot, and to answer nobody meanwhile; or that it is not.
    pub(crate) fn set_suspending(&self, is: bool) -> io::Result<()> {
        match is {
            true => File::create(self.suspending_file()).map(drop),
            false => absent_is_fine(fs::remove_file(self.suspending_file())),
        }
    }

    /// Whether that was said.
    pub(crate) fn is_suspending(&self) -> bool {
        self.suspending_file().exists()
    }

    /// What is remembered; `None` where there is nothing, or nothing that can be read.
    pub(crate) fn memo(&self) -> io::Result<Option<Memo>> {
        read_json(&self.memo_file())
    }

    /// Remembers.
    pub(crate) fn set_memo(&self, memo: &Memo) -> io::Result<()> {
        write_json(&self.memo_file(), memo, Durability::Synced)
    }

    /// The seal of a snapshot that is good now, in this boot of the host.
    pub(crate) fn seal(&self, boot_id: &str) -> io::Result<Option<Seal>> {
        let seal: Option<Seal> = read_json(&self.seal_file())?;
        Ok(seal.filter(|s| s.boot_id.as_deref().is_none_or(|b| b == boot_id)))
    }

    /// Says that the snapshot is good.
    pub(crate) fn write_seal(&self, seal: &Seal, durability: Durability) -> io::Result<()> {
        write_json(&self.seal_file(), seal, durability)
    }

    /// Writes a seal durably to one side; what is returned puts it in place at once.
    pub(crate) fn prepare_seal(&self, seal: &Seal) -> io::Result<impl FnOnce() -> io::Result<()>> {
        let (path, aside) = (self.seal_file(), self.path.join("suspended.next"));
        write_json(&aside, seal, Durability::Synced)?;
        Ok(move || fs::rename(aside, path))
    }

    /// Takes that back. [`Self::sync`] makes it outlast a loss of power.
    pub(crate) fn break_seal(&self) -> io::Result<()> {
        absent_is_fine(fs::remove_file(self.seal_file()))
    }

    /// Makes what was created, renamed and removed here outlast a loss of power.
    pub(crate) fn sync(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    /// Makes the snapshot outlast a loss of power, and what its guest has written to its disks: without a flush
    /// that is in the host's page cache alone, and the snapshot's memory holds it for written. Nothing else need
    /// wait: what a wake or a cold start changes meanwhile is not this snapshot any more, which its seal tells.
    pub(crate) fn sync_snapshot(&self) -> io::Result<()> {
        for disk in writable_disks(&fs::read(self.vm_json())?)? {
            File::open(disk)?.sync_data()?;
        }
        let dir = self.open_snapshot()?;
        for (name, needed) in [("memory", true), ("state", true), ("working_set", false)] {
            match open_theirs_at(&dir, name) {
                Err(error) if !needed && error.kind() == io::ErrorKind::NotFound => {}
                file => file?.sync_all()?,
            }
        }
        dir.sync_all()?;
        File::open(self.jail())?.sync_all()?;
        self.sync()
    }

    /// Drops the page cache of the snapshot's memory, which must have been synced.
    ///
    /// Safe at any time: the kernel drops clean pages that nobody has mapped, and whoever reads them
    /// then, a monitor that wakes meanwhile, reads the same from the disk.
    pub(crate) fn drop_snapshot_cache(&self) -> io::Result<()> {
        let memory = open_theirs_at(&self.open_snapshot()?, "memory")?;
        rustix::fs::fadvise(&memory, 0, None, rustix::fs::Advice::DontNeed)?;
        Ok(())
    }

    /// The snapshot's directory, which is the monitor's: a link in its place is not followed.
    fn open_snapshot(&self) -> io::Result<File> {
        File::options()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_DIRECTORY)
            .open(self.snapshot())
    }

    /// Removes the snapshot, whose seal must be broken, and one that was never finished.
    pub(crate) fn remove_snapshot(&self) -> io::Result<()> {
        for path in [self.snapshot(), self.jail().join("snapshot.tmp")] {
            match fs::symlink_metadata(&path) {
                Ok(there) if there.is_dir() => absent_is_fine(fs::remove_dir_all(path))?,
                // Not what a monitor that is itself would leave.
                Ok(_) => absent_is_fine(fs::remove_file(path))?,
                Err(error) => absent_is_fine(Err(error))?,
            }
        }
        Ok(())
    }

    /// Removes what a monitor that has ended would leave in the way of the next, which will be `user`, or
    /// whoever runs this where that is nobody else.
    pub(crate) fn prepare_for_monitor(&self, user: Option<u32>) -> io::Result<()> {
        let mut builder = fs::DirBuilder::new();
        match std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700).create(self.jail()) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        if user.is_some() {
            std::os::unix::fs::lchown(self.jail(), user, user)?;
        }
        for path in [self.control(), self.vsock(), self.exit_file()] {
            absent_is_fine(fs::remove_file(path))?;
        }
        Ok(())
    }

    /// How the last monitor ended, if it said.
    pub(crate) fn exit(&self) -> io::Result<Option<ExitFile>> {
        match open_theirs(&self.exit_file()) {
            Ok(file) => parse_json(&self.exit_file(), file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The end of a log file, for a reason that a person can act on.
    pub(crate) fn tail(path: &Path) -> String {
        let read = || -> io::Result<Vec<u8>> {
            use std::io::Seek as _;
            let mut file = File::open(path)?;
            let length = file.metadata()?.len();
            file.seek(io::SeekFrom::Start(length.saturating_sub(TAIL)))?;
            let mut bytes = Vec::new();
            file.take(TAIL).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        last_words(String::from_utf8_lossy(&read().unwrap_or_default()).lines())
    }
}

/// Whether a write is to outlast a loss of power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durability {
    Synced,
    Unsynced,
}

/// The boot of this host, as the kernel numbers it.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// No file is there: no error.
pub(crate) fn absent_is_fine(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Replaces a file whole.
pub(crate) fn write_whole(path: &Path, bytes: &[u8], durability: Durability) -> io::Result<()> {
    // Behind the whole name: `suspended.json` and `suspended.next` may be written at the same time.
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        // Configurations hold apps' secrets.
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(bytes)?;
    if durability == Durability::Synced {
        file.sync_all()?;
    }
    fs::rename(&temporary, path)?;
    if durability == Durability::Synced
        && let Some(parent) = path.parent()
    {
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}

fn write_json<T: Serialize>(path: &Path, value: &T, durability: Durability) -> io::Result<()> {
    write_whole(path, &serde_json::to_vec(value)?, durability)
}

/// Opens what a monitor has written, which may have been taken over by its guest: no link is followed,
/// and nothing but a file is waited for.
fn open_theirs(path: &Path) -> io::Result<File> {
    open_theirs_at(rustix::fs::CWD, path)
}

/// The same in a directory that is open.
fn open_theirs_at(dir: impl AsFd, path: impl AsRef<Path>) -> io::Result<File> {
    let path = path.as_ref();
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(openat(dir, path, flags, Mode::empty())?);
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other(format!(
            "{}: not a plain file",
            path.display()
        )))
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match File::open(path) {
        Ok(file) => parse_json(path, file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn parse_json<T: DeserializeOwned>(path: &Path, file: File) -> io::Result<Option<T>> {
    let mut bytes = Vec::new();
    file.take(MAX_JSON).read_to_end(&mut bytes)?;
    match serde_json::from_slice(&bytes) {
        Ok(value) => Ok(Some(value)),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "a file cannot be understood and is ignored");
            Ok(None)
        }
    }
}

/// These files are some hundred bytes long.
const MAX_JSON: u64 = 64 * 1024;
/// As much of the end of a log as is looked at: more than its last words may be.
const TAIL: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::config::Disk;
    use std::os::fd::AsRawFd;

    fn dir() -> (tempfile::TempDir, MachineDir) {
        let temporary = tempfile::tempdir().unwrap();
        let dir = MachineDir::new(temporary.path(), &MachineId::random());
        fs::create_dir(dir.path()).unwrap();
        (temporary, dir)
    }

    #[test]
    fn a_seal_is_good_in_its_own_boot_until_the_snapshot_is_safe() {
        let (_guard, dir) = dir();
        assert_eq!(dir.seal("now").unwrap(), None);
        let mut seal = Seal {
            instance_id: "01".into(),
            boot_id: Some("now".into()),
        };
        dir.write_seal(&seal, Durability::Unsynced).unwrap();
        assert_eq!(dir.seal("now").unwrap(), Some(seal.clone()));
        assert_eq!(dir.seal("after a loss of power").unwrap(), None);
        seal.boot_id = None;
        dir.write_seal(&seal, Durability::Synced).unwrap();
        assert_eq!(dir.seal("after a loss of power").unwrap(), Some(seal));
        dir.break_seal().unwrap();
        dir.break_seal().unwrap();
        assert_eq!(dir.seal("now").unwrap(), None);
    }

    #[test]
    fn what_cannot_be_understood_is_as_good_as_absent() {
        let (_guard, dir) = dir();
        fs::write(dir.memo_file(), b"{\"slot\": \"many\"}").unwrap();
        assert_eq!(dir.memo().unwrap(), None);
        dir.prepare_for_monitor(None).unwrap();
        fs::write(dir.exit_file(), b"").unwrap();
        assert_eq!(dir.exit().unwrap(), None);
    }

    /// How many pages of a file the host's page cache holds.
    fn cached(path: &Path) -> usize {
        let file = File::open(path).unwrap();
        let length = usize::try_from(file.metadata().unwrap().len()).unwrap();
        let mut pages = vec![0_u8; length.div_ceil(4096)];
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
            assert_ne!(map, libc::MAP_FAILED);
            let told = libc::mincore(map, length, pages.as_mut_ptr());
            libc::munmap(map, length);
            told
        };
        assert_eq!(told, 0);
        pages.iter().filter(|&&page| page & 1 != 0).count()
    }

    #[test]
    fn the_page_cache_of_a_snapshot_is_dropped_and_its_memory_is_what_it_was() {
        // A real disk: what is in a tmpfs is there and nowhere else.
        let temporary = tempfile::tempdir_in("/var/tmp").unwrap();
        let dir = MachineDir::new(temporary.path(), &MachineId::random());
        fs::create_dir_all(dir.snapshot()).unwrap();
        fs::write(dir.vm_json(), r#"{"disks": []}"#).unwrap();
        let (path, memory) = (dir.snapshot().join("memory"), vec![0x5a; 8 << 20]);
        fs::write(&path, &memory).unwrap();
        assert!(dir.sync_snapshot().is_err(), "it is not whole");
        fs::write(dir.snapshot().join("state"), b"state").unwrap();
        dir.sync_snapshot().unwrap();
        assert_eq!(cached(&path), 2048);
        dir.drop_snapshot_cache().unwrap();
        assert!(cached(&path) < 32, "{} pages", cached(&path));
        assert!(fs::read(&path).unwrap() == memory);
        // A monitor that its guest took over may have left anything there.
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert!(dir.drop_snapshot_cache().is_err(), "a link is followed");
        dir.remove_snapshot().unwrap();
        let elsewhere = temporary.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        for name in ["memory", "state"] {
            fs::write(elsewhere.join(name), b"x").unwrap();
        }
        std::os::unix::fs::symlink(&elsewhere, dir.snapshot()).unwrap();
        assert!(dir.sync_snapshot().is_err(), "a link is followed");
        fs::write(dir.jail().join("snapshot.tmp"), b"a file").unwrap();
        dir.remove_snapshot().unwrap();
        assert_eq!(fs::read_dir(dir.jail()).unwrap().count(), 0);
        assert!(elsewhere.join("memory").exists());
    }

    /// In how many places a new file is in the page cache and has no place on the disk yet.
    fn unwritten(path: &Path) -> usize {
        const EXTENTS: usize = 8;
        const EXTENT_WORDS: usize = 7;
        const FLAGS_WORD: usize = 5;
        const HEAD_WORDS: usize = 4;
        const DELALLOC: u64 = 4;
        nix::ioctl_readwrite_bad!(fiemap, nix::request_code_readwrite!(b'f', 11, 32), u64);
        // `struct fiemap` and its `struct fiemap_extent`s (linux/fiemap.h): all of the file.
        let mut map = [0_u64; HEAD_WORDS + EXTENTS * EXTENT_WORDS];
        (map[1], map[3]) = (u64::MAX, EXTENTS as u64);
        let file = File::open(path).unwrap();
        // SAFETY: the kernel writes as many extents as the head says that there is room for.
        unsafe { fiemap(file.as_raw_fd(), map.as_mut_ptr()) }.unwrap();
        let found = (map[2] >> 32) as usize;
        let extents = map[HEAD_WORDS..].chunks(EXTENT_WORDS).take(found);
        extents.filter(|e| e[FLAGS_WORD] & DELALLOC != 0).count()
    }

    #[test]
    fn a_snapshot_is_safe_when_its_disks_are() {
        // A real disk: what is in a tmpfs is never written to one.
        let temporary = tempfile::tempdir_in("/var/tmp").unwrap();
        let dir = MachineDir::new(temporary.path(), &MachineId::random());
        fs::create_dir_all(dir.snapshot()).unwrap();
        for name in ["memory", "state"] {
            fs::write(dir.snapshot().join(name), b"x").unwrap();
        }
        let [volume, image] = ["volume.ext4", "image.erofs"].map(|n| temporary.path().join(n));
        let disk = |path: &Path, read_only| Disk {
            path: path.to_owned(),
            read_only,
            rate_limit: None,
        };
        let disks = [
            disk(&image, true),
            disk(&dir.disk(), false),
            disk(&volume, false),
        ];
        let vm = serde_json::json!({"id": "x", "disks": disks});
        fs::write(dir.vm_json(), vm.to_string()).unwrap();
        assert!(dir.sync_snapshot().is_err(), "its disks are gone");
        for path in [dir.disk(), volume.clone()] {
            let waits = (0..20).any(|_| {
                let _ = fs::remove_file(&path); // what replaces a file's content is written soon (ext4)
                fs::write(&path, vec![1; 1 << 20]).unwrap();
                unwritten(&path) > 0 // unless the host has been quicker
            });
            assert!(waits, "/var/tmp must be on ext4, xfs or btrfs");
        }
        // Images are many Machines', and nobody writes to them.
        assert!(!image.exists());
        dir.sync_snapshot().unwrap();
        assert_eq!((unwritten(&dir.disk()), unwritten(&volume)), (0, 0));
        fs::remove_file(volume).unwrap();
        assert!(dir.sync_snapshot().is_err(), "a disk is gone");
    }

    #[test]
    fn a_tail_is_short_and_printable() {
        let (_guard, dir) = dir();
        let mut log = vec![b'x'; 10_000];
        log.extend_from_slice(b"\r\n\x1b[31mpanic\xff\n\n  no root\n");
        fs::write(dir.serial_log(), log).unwrap();
        let tail = MachineDir::tail(&dir.serial_log());
        assert!(tail.ends_with("| no root") && tail.len() < 3000, "{tail}");
        assert!(!tail.contains('\x1b'));
        assert_eq!(MachineDir::tail(Path::new("/nonexistent")), "");
    }
}
