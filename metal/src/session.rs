//! The host that is up: where its facts are written for `exec`, `status` and `down`.
//!
//! One directory per checkout and name. The `up` process holds an exclusive `flock` on the `lock`
//! file in it for as long as it lives: that lock, not the file `state.json`, says whether a host is
//! up, so what a killed process leaves is recognized as old.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::forward::Forward;
use crate::host::Agent;
use crate::mode::Mode;
use crate::share::Share;

/// How long `down` waits after a polite request, before it kills.
const DOWN_PATIENCE: Duration = Duration::from_secs(15);

/// Facts of a host that is up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The `up` process.
    pub pid: i32,
    /// How to run commands.
    pub agent: Agent,
    /// What the host is made of.
    pub mode: Mode,
    /// What is visible inside.
    pub shares: Vec<Share>,
    /// The directory for results.
    pub results: PathBuf,
    /// Forwarded ports.
    pub forwards: Vec<Forward>,
    /// Memory.
    pub memory_mib: u32,
    /// CPUs.
    pub cpus: u32,
}

/// A place for the state of one host.
#[derive(Debug, Clone)]
pub struct Session {
    directory: PathBuf,
}

/// The right to be the host of a [`Session`]. Its end removes what it wrote.
#[derive(Debug)]
pub struct Claim {
    session: Session,
    _lock: Flock<File>,
}

impl Session {
    /// The session of a checkout; `runtime` is the user's runtime directory, if there is one.
    pub fn of(checkout: &Path, name: &str, runtime: Option<&str>) -> Result<Self> {
        let root = match runtime.filter(|path| !path.is_empty()) {
            Some(path) => Path::new(path).join("tern-metal"),
            None => PathBuf::from(format!("/tmp/tern-metal-{}", geteuid())),
        };
        make_private(&root)?;
        let hash = Sha256::digest(checkout.as_os_str().as_encoded_bytes());
        Ok(Self {
            directory: root.join(format!("{name}-{}", hex::encode(&hash[..8]))),
        })
    }

    /// Becomes the host; refused while another one is.
    pub fn claim(&self) -> Result<Claim> {
        loop {
            make_private(&self.directory)?;
            let path = self.directory.join("lock");
            let file = File::create(&path).context("cannot make the lock file")?;
            let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => lock,
                Err((_, Errno::EWOULDBLOCK)) => bail!(self.already_up()),
                Err((_, error)) => return Err(error).context("cannot lock the session"),
            };
            // Its last owner removes the file: what was locked must still be what has the name.
            let ours = lock.metadata()?;
            if fs::metadata(&path).is_ok_and(|named| named.ino() == ours.ino()) {
                return Ok(Claim {
                    session: self.clone(),
                    _lock: lock,
                });
            }
        }
    }

    fn already_up(&self) -> String {
        let who = match self.read() {
            Ok(state) => format!("process {}, {}", state.pid, state.mode),
            Err(_) => "starting".to_owned(),
        };
        format!(
            "a host is up already for this checkout ({who}): use `tern-metal exec`, end it with \
             `tern-metal down`, or start another with --name"
        )
    }

    /// The host that is up, if one is.
    pub fn find(&self) -> Result<Option<State>> {
        let Ok(file) = File::open(self.directory.join("lock")) else {
            return Ok(None);
        };
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(_) => Ok(None),
            Err((_, Errno::EWOULDBLOCK)) => match self.read() {
                Ok(state) => Ok(Some(state)),
                Err(_) => bail!("a host is starting or ending just now: try again"),
            },
            Err((_, error)) => Err(error).context("cannot look at the session's lock"),
        }
    }

    /// The host that is up, or what to do.
    pub fn require(&self) -> Result<State> {
        self.find()?.with_context(|| {
            let log = self.log();
            let more = match fs::metadata(&log) {
                Ok(_) => format!(" (last words of the one before: {})", log.display()),
                Err(_) => String::new(),
            };
            format!("no host is up for this checkout: `tern-metal up` starts one{more}")
        })
    }

    /// Ends the host and waits until it is gone; false if none was up.
    pub fn down(&self) -> Result<bool> {
        let Some(state) = self.find()? else {
            return Ok(false);
        };
        // While the lock is held, the number is the process's own.
        let process = Pid::from_raw(state.pid);
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            match kill(process, signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(error).context("cannot signal the `up` process"),
            }
            if self.wait_until_free(DOWN_PATIENCE)? {
                return Ok(true);
            }
        }
        bail!("the `up` process {process} does not end")
    }

    fn wait_until_free(&self, patience: Duration) -> Result<bool> {
        let Ok(file) = File::open(self.directory.join("lock")) else {
            return Ok(true);
        };
        let (done, free) = mpsc::channel();
        thread::spawn(move || {
            let result = Flock::lock(file, FlockArg::LockShared).map(drop);
            // Nobody listens when patience ended first.
            let _ = done.send(result.map_err(|(_, error)| error));
        });
        match free.recv_timeout(patience) {
            Ok(result) => result
                .map(|()| true)
                .context("cannot wait for the session's lock"),
            Err(_) => Ok(false),
        }
    }

    /// Where the `up` process writes what it has to say once nobody listens.
    pub fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    fn read(&self) -> Result<State> {
        Ok(serde_json::from_slice(&fs::read(
            self.directory.join("state.json"),
        )?)?)
    }
}

impl Claim {
    /// Tells others that the host takes commands.
    pub fn publish(&self, state: &State) -> Result<()> {
        let directory = &self.session.directory;
        let file = tempfile::NamedTempFile::new_in(directory).context("cannot write the state")?;
        serde_json::to_writer(&file, state)?;
        file.persist(directory.join("state.json"))
            .context("cannot name the state")?;
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // The lock is still held. What cannot be removed is harmless: the lock tells the truth.
        let Session { directory } = &self.session;
        let _ = fs::remove_file(directory.join("state.json"));
        // Last words stay, and with them the directory.
        let log = self.session.log();
        if fs::metadata(&log).is_ok_and(|log| log.len() == 0) {
            let _ = fs::remove_file(log);
        }
        let _ = fs::remove_file(directory.join("lock"));
        let _ = fs::remove_dir(directory);
    }
}

/// Makes a directory for this user alone, or checks that it is one: /tmp is everyone's.
fn make_private(path: &Path) -> Result<()> {
    let shown = path.display();
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("cannot make {shown}"))
        }
        _ => {
            let found =
                fs::symlink_metadata(path).with_context(|| format!("cannot see {shown}"))?;
            ensure!(
                found.is_dir() && found.uid() == geteuid().as_raw() && found.mode() & 0o077 == 0,
                "{shown} is not a directory of this user alone: remove it"
            );
            Ok(())
        }
    }
}

/// Opens the log of the `up` process, emptied.
pub fn open_log(path: &Path) -> Result<File> {
    File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot make {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(root: &Path, checkout: &str, name: &str) -> Session {
        Session::of(Path::new(checkout), name, root.to_str()).unwrap()
    }

    fn state(pid: i32) -> State {
        State {
            pid,
            agent: Agent {
                address: "127.0.0.1:1".parse().unwrap(),
                token: "t".into(),
            },
            mode: Mode::Qemu,
            shares: vec![],
            results: "/r".into(),
            forwards: vec![],
            memory_mib: 1,
            cpus: 1,
        }
    }

    #[test]
    fn one_host_per_checkout_and_name() {
        let dir = tempfile::tempdir().unwrap();
        let one = session(dir.path(), "/a", "x");
        assert_eq!(one.find().unwrap(), None);
        let claim = one.claim().unwrap();
        assert!(one.find().is_err(), "not ready yet");
        claim.publish(&state(7)).unwrap();
        assert_eq!(one.find().unwrap(), Some(state(7)));
        let refused = one.claim().unwrap_err().to_string();
        assert!(
            refused.contains("process 7") && refused.contains("down"),
            "{refused}"
        );
        session(dir.path(), "/a", "y").claim().unwrap();
        session(dir.path(), "/b", "x").claim().unwrap();
        drop(claim);
        assert!(!one.directory.exists());
        assert_eq!(one.find().unwrap(), None);
        assert!(
            one.require()
                .unwrap_err()
                .to_string()
                .contains("tern-metal up")
        );
        one.claim().unwrap();
    }

    #[test]
    fn last_words_are_kept_and_pointed_to() {
        let dir = tempfile::tempdir().unwrap();
        let session = session(dir.path(), "/a", "x");
        let claim = session.claim().unwrap();
        std::io::Write::write_all(&mut open_log(&session.log()).unwrap(), b"it crashed").unwrap();
        drop(claim);
        let error = session.require().unwrap_err().to_string();
        assert!(error.contains(session.log().to_str().unwrap()), "{error}");
        assert_eq!(fs::read(session.log()).unwrap(), b"it crashed");
        let claim = session.claim().unwrap();
        open_log(&session.log()).unwrap();
        drop(claim);
        assert!(!session.directory.exists());
    }

    #[test]
    fn what_a_killed_host_leaves_counts_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let session = session(dir.path(), "/a", "x");
        let claim = session.claim().unwrap();
        claim.publish(&state(7)).unwrap();
        // As if killed: files stay, the lock goes.
        let copy = dir.path().join("copy");
        fs::create_dir(&copy).unwrap();
        for file in ["lock", "state.json"] {
            fs::copy(session.directory.join(file), copy.join(file)).unwrap();
        }
        drop(claim);
        fs::rename(&copy, &session.directory).unwrap();
        fs::set_permissions(
            &session.directory,
            std::os::unix::fs::PermissionsExt::from_mode(0o700),
        )
        .unwrap();
        assert_eq!(session.find().unwrap(), None);
        assert!(!session.down().unwrap());
        session.claim().unwrap();
    }

    #[test]
    fn a_directory_of_others_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("tern-metal");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let error = Session::of(Path::new("/a"), "x", dir.path().to_str()).unwrap_err();
        assert!(error.to_string().contains("of this user alone"), "{error}");
    }
}
