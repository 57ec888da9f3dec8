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
/// What becomes of the mark when somebody purges the Machine.
const CLAIM: &str = "purged.json";
/// The end of the name of a directory that is being removed.
const GONE: &str = "gone";

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

/// Takes the mark off: the catalog knows the Machine. Refused where somebody has begun to purge it; otherwise nobody
/// does from here on.
pub(crate) fn unmark(dir: &Path) -> io::Result<()> {
    absent_is_fine(fs::remove_file(dir.join(MARK)))?;
    // In this order: whoever purges takes the mark for themselves first, and the directory away then.
    if dir.join(CLAIM).exists() {
        return Err(io::Error::other("it is being purged"));
    }
    fs::symlink_metadata(dir).map(drop)
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
            bytes: absent_is_empty(size(&path))?,
            process: monitor.map(|m| m.pid()),
            path,
        });
    }
    found.sort_by(|a, b| (a.since, &a.id).cmp(&(b.since, &b.id)));
    Ok(found)
}

/// Ends and removes for good a Machine that the catalog does not know: its disk, and its memory.
pub async fn purge(data_dir: &Path, id: &MachineId) -> io::Result<()> {
    let machines = data_dir.join("machines");
    let path = machines.join(id.as_str());
    // At once, and by one alone: an agent that has taken the mark off has taken the Machine up.
    if let Err(error) = fs::rename(path.join(MARK), path.join(CLAIM)) {
        let begun = path.join(CLAIM).exists() || gone(&machines, id.as_str()).exists();
        if error.kind() != io::ErrorKind::NotFound || !begun {
            let why = format!("{}: not in quarantine", path.display());
            return Err(io::Error::new(error.kind(), why));
        }
    }
    // What an earlier one has left there first. Where there is nothing, what runs is ended below, by its new place.
    if gone(&machines, id.as_str()).exists() {
        finish(&machines, id.as_str()).await?;
    }
    // No agent takes it up from here on, and the next one goes on with this.
    absent_is_fine(fs::rename(&path, gone(&machines, id.as_str())))?;
    finish(&machines, id.as_str()).await
}

/// Goes on with what was begun, when an agent starts and has taken nothing up.
pub(crate) async fn finish_purges(machines: &Path) {
    for entry in fs::read_dir(machines).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = path.file_stem().and_then(|name| name.to_str());
        if let Some(id) = name.filter(|_| path.extension().is_some_and(|e| e == GONE))
            && let Err(error) = finish(machines, id).await
        {
            tracing::error!(path = %path.display(), %error, "what is left of a purged Machine cannot be removed");
        }
    }
}

fn gone(machines: &Path, id: &str) -> PathBuf {
    machines.join(format!("{id}.{GONE}"))
}

/// Ends what runs of a Machine that is being removed, and removes it. Two may be at it.
async fn finish(machines: &Path, id: &str) -> io::Result<()> {
    let gone = gone(machines, id);
    if let Some(monitor) = Monitor::adopt(&gone.join("vmm.pid"))? {
        monitor.kill();
        monitor.ended().await;
    }
    Groups::forget(id)?;
    absent_is_fine(fs::remove_dir_all(&gone))
}

fn absent_is_empty(size: io::Result<u64>) -> io::Result<u64> {
    match size {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        other => other,
    }
}

/// What a directory takes of the disk; holes in sparse files take nothing.
fn size(path: &Path) -> io::Result<u64> {
    let own = fs::symlink_metadata(path)?;
    // Blocks of 512 bytes, whatever the file system's (stat(2)).
    let mut bytes = own.blocks() * 512;
    if own.is_dir() {
        for entry in fs::read_dir(path)? {
            // What goes on in it goes on.
            bytes += absent_is_empty(size(&entry?.path()))?;
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

    #[tokio::test]
    async fn a_purge_and_an_agent_do_not_both_have_a_machine() {
        let data = tempfile::tempdir().unwrap();
        let machines = data.path().join("machines");
        let id = MachineId::random();
        let dir = machines.join(id.as_str());
        let made = || {
            fs::create_dir_all(dir.join("jail")).unwrap();
            mark(&dir).unwrap();
        };
        // The agent was first.
        made();
        unmark(&dir).unwrap();
        let refused = purge(data.path(), &id).await.unwrap_err();
        assert!(refused.to_string().contains("not in quarantine"));
        assert!(dir.join("jail").exists());
        // The purge was, and has come to its first step, or to its second.
        made();
        fs::rename(dir.join(MARK), dir.join(CLAIM)).unwrap();
        assert!(unmark(&dir).unwrap_err().to_string().contains("purged"));
        fs::rename(&dir, gone(&machines, id.as_str())).unwrap();
        unmark(&dir).unwrap_err();
        // What was left by one that died there is in nobody's way, nor is another that is at it.
        made();
        fs::rename(dir.join(MARK), dir.join(CLAIM)).unwrap();
        purge(data.path(), &id).await.unwrap();
        assert_eq!(fs::read_dir(&machines).unwrap().count(), 0);
        made();
        fs::rename(&dir, gone(&machines, id.as_str())).unwrap();
        finish_purges(&machines).await;
        assert_eq!(fs::read_dir(&machines).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn what_runs_of_a_machine_whose_purge_was_broken_off_is_ended() {
        let machines = tempfile::tempdir().unwrap();
        let gone = gone(machines.path(), MachineId::random().as_str());
        fs::create_dir(&gone).unwrap();
        let pid_file = gone.join("vmm.pid");
        let script = "exec 9>>\"$0\" && flock -x 9 && echo $$ > \"$0\" && echo ready && exec cat";
        let mut child = std::process::Command::new("sh")
            .args(["-c", script])
            .arg(&pid_file)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        finish_purges(machines.path()).await;
        let ended = child.wait().unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&ended),
            Some(9)
        );
        assert!(!gone.exists());
    }
}
