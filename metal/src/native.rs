//! This machine itself as the host: the same agent as inside a virtual host, in mount, process and
//! IPC namespaces of its own, as process 1 of which it takes every leftover with it when it ends.
//! The network is the machine's own, so that forwarded ports are simply there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::host::Wanted;
use crate::plan::{Kind, Plan};
use crate::process::spawn_bound;

/// Where data directories are, one per host: a real disk, as for a virtual host.
const DATA: &str = "/var/tmp/tern-metal";
/// Where the commands' control groups are, one directory per host.
const GROUPS: &str = "/sys/fs/cgroup";

/// A running native host. It ends, and leaves nothing, when this is dropped.
#[derive(Debug)]
pub struct Native {
    child: Child,
    groups: PathBuf,
    // In this order: the lock says to others that the directory is in use.
    directory: TempDir,
    _lock: Flock<fs::File>,
}

impl Native {
    /// Starts it; returns it, its events, and what else it has to say.
    pub fn start(token: &str, wanted: &Wanted) -> Result<(Self, ChildStdout, ChildStderr)> {
        for share in &wanted.shares {
            ensure!(
                share.inner == share.outer,
                "this machine itself is the host, so {} cannot be shown as {}: share it at the \
                 same path, or set TERN_METAL=qemu",
                share.outer.display(),
                share.inner.display()
            );
        }
        fs::create_dir_all(DATA).with_context(|| format!("cannot make {DATA}"))?;
        sweep(Path::new(DATA));
        let directory = tempfile::Builder::new()
            .prefix("native-")
            .tempdir_in(DATA)
            .with_context(|| format!("cannot make a directory in {DATA}"))?;
        let lock = lock(directory.path()).context("cannot lock the host's directory")?;
        let name = directory.path().file_name().unwrap_or_default();
        let groups = Path::new(GROUPS).join(format!("tern-metal-{}", name.display()));
        let data = directory.path().join("data");
        fs::create_dir(&data)?;
        let plan = Plan {
            token: token.to_owned(),
            events: "/proc/self/fd/1".into(),
            groups: groups.clone(),
            idle_seconds: wanted.idle.map(|idle| idle.as_secs().max(1)),
            kind: Kind::Native { data },
        };
        let plan_file = directory.path().join("plan.json");
        // The directory is readable by its owner alone, so the token in it is too.
        fs::write(&plan_file, serde_json::to_vec(&plan)?)?;
        let mut command = Command::new("unshare");
        command
            .args([
                "--mount",
                "--pid",
                "--ipc",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "--",
            ])
            .arg(std::env::current_exe().context("tern-metal's own program is gone")?)
            .args(["init", "--plan"])
            .arg(&plan_file)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = spawn_bound(&mut command, Signal::SIGKILL)
            .context("cannot run unshare: apt-get install util-linux")?;
        let events = child.stdout.take().context("its output is a pipe")?;
        let stderr = child.stderr.take().context("its output is a pipe")?;
        let native = Self {
            child,
            groups,
            directory,
            _lock: lock,
        };
        Ok((native, events, stderr))
    }

    /// Ends it, and every process in it.
    pub fn kill(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        self.kill();
        remove_groups(&self.groups);
        // What cannot be removed now is swept by the next host.
        let _ = fs::remove_dir_all(self.directory.path());
    }
}

/// Removes a directory of control groups. They are empty: their processes have ended.
fn remove_groups(root: &Path) {
    let groups = fs::read_dir(root).into_iter().flatten().flatten();
    for group in groups.filter(|entry| entry.path().is_dir()) {
        let _ = fs::remove_dir(group.path());
    }
    let _ = fs::remove_dir(root);
}

fn lock(directory: &Path) -> Result<Flock<fs::File>> {
    let file = fs::File::open(directory)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error.into())
}

/// Removes what hosts left whose tern-metal was killed.
fn sweep(data: &Path) {
    for entry in fs::read_dir(data).into_iter().flatten().flatten() {
        if let Ok(_lock) = lock(&entry.path()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_dead_are_swept() {
        let data = tempfile::tempdir().unwrap();
        let alive = data.path().join("alive");
        let dead = data.path().join("dead");
        fs::create_dir_all(alive.join("data")).unwrap();
        fs::create_dir_all(dead.join("data")).unwrap();
        let _lock = lock(&alive).unwrap();
        sweep(data.path());
        assert!(alive.exists() && !dead.exists());
    }
}
