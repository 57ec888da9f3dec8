//! The volumes of this host: `volumes/<id>/disk.ext4`, sparse, and `volumes/<id>/snapshots/<id>.ext4`.
//!
//! A volume's data is the one thing here that cannot be made again. So a disk is made once, when nothing
//! was ever seen of its volume; one that was there and is not is told of, and never replaced by an empty
//! one. What the catalog does not know is left alone. Only a record that says `destroyed` removes data.
//!
//! # A crash at any step
//!
//! *Making* a disk or a snapshot: it is written beside its place, synced, and renamed. *Destroying*: the
//! directory is renamed to `<id>.gone`, then removed, then the records are. What is half made or half gone
//! is removed when the agent starts.
//!
//! # Who may write
//!
//! The monitor holds an exclusive `flock` on each disk that it may write, from before it looks at it until
//! it ends. Whoever copies a disk takes that lock first. A *turn* keeps starts, wakes and copies of one
//! volume in this process from failing for each other's sake: they wait.

mod keeper;

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use tern_catalog::{SnapshotId, Volume, VolumeId, VolumeSource};
use tokio::sync::{Notify, OwnedMutexGuard};

use crate::dir::absent_is_fine;
use crate::disk;
use crate::disk_space::room_for;

pub(crate) use keeper::Keeper;

/// The volumes' directory.
#[derive(Debug)]
pub(crate) struct Volumes {
    dir: PathBuf,
    turns: Mutex<HashMap<VolumeId, Arc<tokio::sync::Mutex<()>>>>,
    /// A disk has grown: its status is to be told anew.
    pub(crate) grown: Notify,
}

/// The right to be the only one here to use a volume's disk.
pub(crate) type Turn = OwnedMutexGuard<()>;

/// Why something was not done to a volume.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    /// A Machine uses it.
    #[error("it is in use by a running Machine")]
    Busy,
    /// Its disk is not where it was.
    #[error("its disk {0} is not there")]
    Gone(PathBuf),
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

impl Volumes {
    /// Opens the directory, and removes what a crash left half made or half gone.
    pub(crate) fn open(dir: PathBuf) -> Result<Self, VolumeError> {
        let at = |source| VolumeError::Io {
            path: dir.clone(),
            source,
        };
        // Apps' data: nobody's business but root's.
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(at)?;
        for entry in fs::read_dir(&dir).map_err(at)? {
            let path = entry.map_err(at)?.path();
            let removed = match path.extension().and_then(|e| e.to_str()) {
                Some(GONE) => fs::remove_dir_all(&path),
                _ => remove_unfinished(&path),
            };
            removed.map_err(|source| VolumeError::Io { path, source })?;
        }
        Ok(Self {
            dir,
            turns: Mutex::default(),
            grown: Notify::new(),
        })
    }

    /// The disk of this volume, whether or not it exists.
    pub(crate) fn disk(&self, id: &VolumeId) -> PathBuf {
        self.home(id).join("disk.ext4")
    }

    fn home(&self, id: &VolumeId) -> PathBuf {
        self.dir.join(id.as_str())
    }

    fn snapshot(&self, volume: &VolumeId, id: &SnapshotId) -> PathBuf {
        self.home(volume)
            .join("snapshots")
            .join(format!("{id}.ext4"))
    }

    /// Waits for one's turn at this volume.
    pub(crate) async fn turn(&self, id: &VolumeId) -> Turn {
        let turn = {
            let mut turns = self.turns.lock();
            turns.retain(|other, turn| other == id || Arc::strong_count(turn) > 1);
            Arc::clone(turns.entry(id.clone()).or_default())
        };
        turn.lock_owned().await
    }

    /// Makes the disk ready for a cold start: it is there, and as large as it is wanted.
    ///
    /// It grows here and nowhere else, for a guest that is suspended must find the disk it knew. The guest's
    /// init makes the file system larger.
    pub(crate) fn ready(&self, volume: &Volume) -> Result<(), VolumeError> {
        let path = self.disk(&volume.id);
        let file = open_alone(&path)?;
        let at = |source| VolumeError::Io {
            path: path.clone(),
            source,
        };
        if file.metadata().map_err(at)?.len() < volume.bytes() {
            file.set_len(volume.bytes()).map_err(at)?;
            file.sync_all().map_err(at)?;
            self.grown.notify_one();
        }
        Ok(())
    }

    /// The size of a volume's disk, in bytes.
    pub(crate) fn size(&self, id: &VolumeId) -> Result<u64, VolumeError> {
        let path = self.disk(id);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(metadata.len()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(VolumeError::Gone(path)),
            Err(source) => Err(VolumeError::Io { path, source }),
        }
    }

    /// Makes the disk of a volume of which nothing was ever seen.
    fn make(&self, volume: &Volume) -> Result<(), VolumeError> {
        let path = self.disk(&volume.id);
        let at = |source| VolumeError::Io {
            path: path.clone(),
            source,
        };
        if path.exists() {
            // Made by an agent that died before it could tell.
            return Ok(());
        }
        let home = self.home(&volume.id);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(home.join("snapshots"))
            .map_err(at)?;
        room_for(&home, 0).map_err(at)?;
        put_in_place(&path, |unfinished| match &volume.source {
            None => disk::make_ext4(unfinished, volume.bytes(), "volume").map_err(at),
            Some(VolumeSource {
                volume: origin,
                snapshot,
            }) => {
                let from = match snapshot {
                    Some(snapshot) => self.snapshot(origin, snapshot),
                    None => self.disk(origin),
                };
                copy(&from, unfinished)?;
                let file = File::options().write(true).open(unfinished).map_err(at)?;
                let size = file.metadata().map_err(at)?.len().max(volume.bytes());
                file.set_len(size)
                    .and_then(|()| file.sync_all())
                    .map_err(at)
            }
        })?;
        File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .map_err(at)
    }

    /// Makes a snapshot; returns the bytes it takes.
    fn take_snapshot(&self, volume: &VolumeId, id: &SnapshotId) -> Result<u64, VolumeError> {
        use std::os::unix::fs::MetadataExt as _;
        let path = self.snapshot(volume, id);
        let at = |source| VolumeError::Io {
            path: path.clone(),
            source,
        };
        if !path.exists() {
            put_in_place(&path, |unfinished| copy(&self.disk(volume), unfinished))?;
        }
        // Blocks of 512 bytes, whatever the file system's (stat(2)).
        fs::metadata(&path).map(|m| m.blocks() * 512).map_err(at)
    }

    fn remove_snapshot(&self, volume: &VolumeId, id: &SnapshotId) -> Result<(), VolumeError> {
        let path = self.snapshot(volume, id);
        absent_is_fine(fs::remove_file(&path)).map_err(|source| VolumeError::Io { path, source })
    }

    /// Removes a volume's data and its snapshots.
    fn destroy(&self, id: &VolumeId) -> Result<(), VolumeError> {
        match open_alone(&self.disk(id)) {
            Ok(_) | Err(VolumeError::Gone(_)) => {}
            Err(other) => return Err(other),
        }
        let (home, gone) = (self.home(id), self.home(id).with_extension(GONE));
        absent_is_fine(fs::rename(&home, &gone))
            .and_then(|()| absent_is_fine(fs::remove_dir_all(&gone)))
            .map_err(|source| VolumeError::Io { path: home, source })
    }
}

/// Makes a file under another name, and gives it its own when it is whole. What fails leaves nothing.
fn put_in_place(
    path: &Path,
    make: impl FnOnce(&Path) -> Result<(), VolumeError>,
) -> Result<(), VolumeError> {
    let unfinished = path.with_extension(UNFINISHED);
    let at = |source| VolumeError::Io {
        path: path.to_owned(),
        source,
    };
    if let Err(error) = make(&unfinished) {
        // What matters is why it failed; what is left is removed at the next start.
        let _ = fs::remove_file(&unfinished);
        return Err(error);
    }
    fs::rename(&unfinished, path).map_err(at)?;
    match path.parent() {
        Some(parent) => File::open(parent)
            .and_then(|dir| dir.sync_all())
            .map_err(at),
        None => Ok(()),
    }
}

/// A copy of a disk that nobody writes to meanwhile, on the host's disk when this returns.
fn copy(from: &Path, to: &Path) -> Result<(), VolumeError> {
    let source = open_alone(from)?;
    // Where blocks are shared a copy takes next to nothing.
    let room = room_for(to.parent().unwrap_or(to), 0);
    let copied = room.and_then(|()| disk::copy_whole(&source, to));
    copied.map_err(|source| VolumeError::Io {
        path: to.to_owned(),
        source,
    })
}

/// Opens a disk that no monitor has open, and keeps it so until the file is closed.
fn open_alone(path: &Path) -> Result<File, VolumeError> {
    let file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(VolumeError::Gone(path.to_owned()));
        }
        Err(source) => {
            return Err(VolumeError::Io {
                path: path.to_owned(),
                source,
            });
        }
    };
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(VolumeError::Busy),
        Err(TryLockError::Error(source)) => Err(VolumeError::Io {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Removes what was being written in a volume's directory.
fn remove_unfinished(home: &Path) -> io::Result<()> {
    for dir in [home.to_owned(), home.join("snapshots")] {
        let Ok(entries) = fs::read_dir(&dir) else {
            continue;
        };
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == UNFINISHED) {
                fs::remove_file(path)?;
            }
        }
    }
    Ok(())
}

/// The end of the name of a disk that is being made.
const UNFINISHED: &str = "new";
/// The end of the name of a volume that is being removed.
const GONE: &str = "gone";

#[cfg(test)]
mod tests;
