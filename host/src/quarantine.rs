//! Machines that are on the disk of this host and that its catalog does not know.
//!
//! The agent removes a Machine's records last, so a directory without any is not what is left of a destroyed
//! Machine: the catalog is another than the one that the Machine was made with, an old copy perhaps, or an empty
//! one. So nothing of it is touched. Its directory is marked, its place in the network stays its own, and a
//! monitor that runs goes on, cut off from the network. When the catalog knows it again the agent takes it up as
//! it is; until then a person may have it removed.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tern_catalog::MachineId;

use crate::cgroup::Groups;
use crate::dir::{Durability, absent_is_fine, write_whole};
use crate::monitor::Monitor;

/// A Machine that the catalog does not know.
#[derive(Debug, Clone, Serialize)]
pub struct Quarantined {
    /// Which it was.
    pub id: MachineId,
    /// Where everything of it is.
    pub path: PathBuf,
    /// When the agent first missed its record.
    pub since: Timestamp,
    /// What it takes of the disk.
    pub bytes: u64,
    /// The process of its monitor, if that runs.
    pub process: Option<i32>,
}

#[derive(Serialize, Deserialize)]
struct Mark {
    since: Timestamp,
}

const MARK: &str = "quarantined.json";
/// The end of the name of a directory that is being removed.
pub(crate) const GONE: &str = "gone";

/// Marks a Machine's directory, unless it is. Nothing else of it is touched.
pub(crate) fn mark(dir: &Path) -> io::Result<()> {
    let path = dir.join(MARK);
    if path.exists() {
        return Ok(());
    }
    let since = Timestamp::now();
    write_whole(
        &path,
        &serde_json::to_vec(&Mark { since })?,
        Durability::Synced,
    )
}

/// Takes the mark off: the catalog knows the Machine.
pub(crate) fn unmark(dir: &Path) -> io::Result<()> {
    absent_is_fine(fs::remove_file(dir.join(MARK)))
}

/// The Machines in an agent's data directory that its catalog did not know when it last looked.
pub async fn quarantined(data_dir: &Path) -> io::Result<Vec<Quarantined>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(data_dir.join("machines"))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str());
        let Some(Ok(id)) = name.map(str::parse) else {
            continue;
        };
        let mark = match fs::read(path.join(MARK)) {
            Ok(mark) => mark,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let Mark { since } = serde_json::from_slice(&mark)?;
        let monitor = Monitor::adopt(&path.join("vmm.pid"))?;
        found.push(Quarantined {
            id,
            since,
            bytes: size(&path)?,
            process: monitor.map(|m| m.pid()),
            path,
        });
    }
    found.sort_by(|a, b| (a.since, &a.id).cmp(&(b.since, &b.id)));
    Ok(found)
}

/// Ends and removes for good a Machine that the catalog does not know: its disk, and its memory.
pub async fn purge(data_dir: &Path, id: &MachineId) -> io::Result<()> {
    let path = data_dir.join("machines").join(id.as_str());
    if !path.join(MARK).exists() {
        let why = format!("{}: not in quarantine", path.display());
        return Err(io::Error::new(io::ErrorKind::NotFound, why));
    }
    // No agent takes it up from here on, and the next one goes on with this.
    let gone = path.with_extension(GONE);
    fs::rename(&path, &gone)?;
    if let Some(monitor) = Monitor::adopt(&gone.join("vmm.pid"))? {
        monitor.kill();
        monitor.ended().await;
    }
    Groups::forget(id.as_str())?;
    fs::remove_dir_all(&gone)
}

/// What a directory takes of the disk; holes in sparse files take nothing.
fn size(path: &Path) -> io::Result<u64> {
    let own = fs::symlink_metadata(path)?;
    // Blocks of 512 bytes, whatever the file system's (stat(2)).
    let mut bytes = own.blocks() * 512;
    if own.is_dir() {
        for entry in fs::read_dir(path)? {
            bytes += size(&entry?.path())?;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_what_is_marked_is_listed_and_purged() {
        let data = tempfile::tempdir().unwrap();
        let [known, lost] = [MachineId::random(), MachineId::random()];
        let dir = |id: &MachineId| data.path().join("machines").join(id.as_str());
        for id in [&known, &lost] {
            fs::create_dir_all(dir(id).join("jail")).unwrap();
            fs::write(dir(id).join("disk.ext4"), [1; 8192]).unwrap();
        }
        fs::create_dir(data.path().join("machines/lost+found")).unwrap();
        assert!(quarantined(data.path()).await.unwrap().is_empty());
        mark(&dir(&lost)).unwrap();
        let [found] = &quarantined(data.path()).await.unwrap()[..] else {
            panic!("one is marked");
        };
        assert_eq!((&found.id, found.process), (&lost, None));
        assert!(found.bytes >= 8192, "{found:?}");
        mark(&dir(&lost)).unwrap();
        let again = quarantined(data.path()).await.unwrap();
        assert_eq!(again[0].since, found.since);

        let refused = purge(data.path(), &known).await.unwrap_err();
        assert!(refused.to_string().contains("not in quarantine"));
        purge(data.path(), &lost).await.unwrap();
        assert!(dir(&known).join("disk.ext4").exists());
        let left = fs::read_dir(data.path().join("machines")).unwrap().count();
        assert_eq!(left, 2);

        mark(&dir(&known)).unwrap();
        unmark(&dir(&known)).unwrap();
        unmark(&dir(&known)).unwrap();
        assert!(quarantined(data.path()).await.unwrap().is_empty());
    }
}
