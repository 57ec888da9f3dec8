//! Why a monitor ended: the exit file, the exit code, the pid file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

/// The `reason` of `exit.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The guest powered itself off.
    GuestShutdown,
    /// The guest reset itself, which is how Tern's init ends a Machine.
    GuestReset,
    /// The host asked, by the control API or SIGTERM.
    Stopped,
    /// The snapshot is damaged, of another Machine, or of another kind of host.
    SnapshotRefused,
    /// Anything else.
    Error,
}

impl Reason {
    /// The process's exit code.
    pub fn code(self) -> u8 {
        match self {
            Self::GuestShutdown | Self::GuestReset | Self::Stopped => 0,
            Self::Error => 1,
            Self::SnapshotRefused => 4,
        }
    }
}

/// The content of `exit.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// What kind of end.
    pub reason: Reason,
    /// For people.
    pub message: String,
}

impl Exit {
    /// An end with its message.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
        }
    }

    /// Writes the file whole or not at all.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let temporary = path.with_extension("json.tmp");
        fs::write(&temporary, serde_json::to_vec(self)?)?;
        fs::rename(&temporary, path)
    }
}

/// The pid file, locked for as long as this value lives.
///
/// Its lock is how an agent that was restarted knows that a monitor still runs; a process id alone
/// may have been given to somebody else since.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    lock: Flock<File>,
    pid: u32,
}

impl PidFile {
    /// Locks `path` and writes this process's id into it, as the host numbers it.
    ///
    /// Fails if another monitor holds it: then nothing of that Machine may be touched.
    pub fn acquire(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false) // it may be somebody else's until it is locked
            .write(true)
            .mode(0o644)
            .open(path)?;
        let mut lock =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
                io::Error::new(
                    io::Error::from(errno).kind(),
                    format!(
                        "another monitor of this Machine runs (it holds {})",
                        path.display()
                    ),
                )
            })?;
        let pid = host_pid()?;
        lock.set_len(0)?;
        writeln!(lock, "{pid}")?;
        Ok(Self {
            path: path.to_owned(),
            lock,
            pid,
        })
    }

    /// The number in it.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Empties the file, so that nobody reads a dead process's id; the lock goes with `self`.
    pub fn release(self) -> io::Result<()> {
        self.lock.set_len(0)
    }
}

/// The number by which the host knows this process.
///
/// A jailed monitor is started as the first process of a PID namespace, and number 1 to itself. The host's
/// `/proc`, which it sees until it enters its jail, tells everybody's number in the host.
fn host_pid() -> io::Result<u32> {
    let link = fs::read_link("/proc/self")
        .map_err(|e| io::Error::new(e.kind(), format!("/proc/self (is /proc mounted?): {e}")))?;
    let number = link.to_str().and_then(|number| number.parse().ok());
    number.ok_or_else(|| io::Error::other(format!("/proc/self leads to {}", link.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_the_documented_json() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exit.json");
        Exit::new(Reason::SnapshotRefused, "bit flip")
            .write(&path)
            .unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            r#"{"reason":"snapshot_refused","message":"bit flip"}"#
        );
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "no temporary file is left"
        );
    }

    #[test]
    fn a_second_monitor_is_refused_until_the_first_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm.pid");
        let first = PidFile::acquire(&path).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.trim(), std::process::id().to_string());
        assert_eq!(first.pid(), std::process::id());
        let error = PidFile::acquire(&path).unwrap_err();
        assert!(error.to_string().contains("another monitor"), "{error}");
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            text,
            "the refused one wrote nothing"
        );
        first.release().unwrap();
        PidFile::acquire(&path).unwrap();
    }
}
