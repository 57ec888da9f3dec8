//! Keeps this host's volumes as the catalog says, and tells what it sees.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tern_catalog::{
    Catalog, Snapshot, SnapshotStatus, Volume, VolumeId, VolumeState, VolumeStatus,
};

use super::{Turn, VolumeError, Volumes};
use crate::host::Host;
use crate::watched::Watched;

/// How soon a volume is looked at again that could not be done justice.
const RETRY: Duration = Duration::from_secs(2);

/// Keeps this host's volumes. Aborted with its task: what it does to files is done whole or removed later.
pub(crate) struct Keeper {
    host: Arc<Host>,
    catalog: Catalog,
    /// Each tells whether its volume was done justice.
    work: Watched<VolumeId, bool>,
    resting: Resting,
}

/// Volumes that were not done justice, and when each is looked at again.
#[derive(Debug, Default)]
struct Resting(HashMap<VolumeId, Instant>);

impl Resting {
    fn rest(&mut self, id: VolumeId, now: Instant) {
        self.0.insert(id, now + RETRY);
    }

    fn has(&self, id: &VolumeId) -> bool {
        self.0.contains_key(id)
    }

    /// Ends the rest of those whose time has come.
    fn wake(&mut self, now: Instant) {
        self.0.retain(|_, until| *until > now);
    }

    /// When the next one's has, whatever happens meanwhile.
    fn next(&self) -> Option<Instant> {
        self.0.values().copied().min()
    }
}

impl Keeper {
    pub(crate) fn new(host: Arc<Host>, catalog: Catalog) -> Self {
        Self {
            host,
            catalog,
            work: Watched::new(),
            resting: Resting::default(),
        }
    }

    /// Follows the catalog until the view ends.
    pub(crate) async fn run(mut self) {
        let view = self.host.view.clone();
        let mut changes = view.changes();
        loop {
            changes.mark_unchanged();
            self.resting.wake(Instant::now());
            self.look(&view.snapshot());
            let next = self.resting.next();
            let next = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            let host = Arc::clone(&self.host);
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = host.volumes.grown.notified() => {}
                Some((id, done)) = self.work.next() => {
                    let well = done.unwrap_or_else(|error| {
                        tracing::error!(volume = %id, %error, "a volume's task has failed");
                        false
                    });
                    if !well {
                        self.resting.rest(id, Instant::now());
                    }
                }
                () = next => {}
            }
        }
    }

    fn look(&mut self, snapshot: &Snapshot) {
        let own = self.host.config.host;
        for volume in snapshot.volumes.values().filter(|v| v.host == own) {
            let status = snapshot.volume_status.get(&volume.id);
            let left_alone = self.work.has(&volume.id) || self.resting.has(&volume.id);
            if left_alone || self.is_well(volume, status) {
                continue;
            }
            let (host, catalog) = (Arc::clone(&self.host), self.catalog.clone());
            let (volume, status) = (Arc::clone(volume), status.cloned());
            self.work.spawn(volume.id.clone(), async move {
                let outcome = tend(&host, &catalog, &volume, status.as_deref()).await;
                if let Err(error) = &outcome {
                    tracing::warn!(volume = %volume.id, %error, "a volume waits");
                }
                outcome.is_ok()
            });
        }
    }

    /// Whether the status says all that is wanted.
    fn is_well(&self, volume: &Volume, status: Option<&Arc<VolumeStatus>>) -> bool {
        let Some(status) = status else { return false };
        let size = self.host.volumes.size(&volume.id);
        !volume.destroyed
            && status.snapshots.keys().eq(volume.snapshots.keys())
            && match status.state {
                VolumeState::Created => size.is_ok_and(|size| gib(size) == status.size_gb),
                // One that was never made stays so; one whose disk is back is told of.
                VolumeState::Failed => size.is_err(),
            }
    }
}

/// Does what a volume lacks, and tells. An error is worth another try.
async fn tend(
    host: &Arc<Host>,
    catalog: &Catalog,
    volume: &Arc<Volume>,
    status: Option<&VolumeStatus>,
) -> Result<(), String> {
    let origin = volume.source.as_ref().filter(|_| status.is_none());
    // Those who wait for a new volume's turn hold no other: there is no circle.
    let origin = match origin {
        Some(source) => Some(host.volumes.turn(&source.volume).await),
        None => None,
    };
    let turns = (origin, host.volumes.turn(&volume.id).await);
    let (shared, wanted, seen) = (Arc::clone(host), Arc::clone(volume), status.cloned());
    let work = move || work(&shared.volumes, &wanted, seen.as_ref(), turns);
    let done = tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| e.to_string())?;
    match done.map_err(|e| e.to_string())? {
        Some(now) if status.is_none_or(|before| differs(before, &now)) => {
            catalog.put(&now).await.map(drop).map_err(|e| e.to_string())
        }
        Some(_) => Ok(()),
        None => {
            let id = volume.id.as_str();
            catalog
                .delete::<VolumeStatus>(id)
                .await
                .map_err(|e| e.to_string())?;
            catalog
                .delete::<Volume>(id)
                .await
                .map_err(|e| e.to_string())?;
            tracing::info!(volume = id, app = %volume.app, "a volume is destroyed");
            Ok(())
        }
    }
}

/// The part that touches files. `None`: the volume is gone.
fn work(
    volumes: &Volumes,
    volume: &Volume,
    status: Option<&VolumeStatus>,
    _turns: (Option<Turn>, Turn),
) -> Result<Option<VolumeStatus>, VolumeError> {
    if volume.destroyed {
        return volumes.destroy(&volume.id).map(|()| None);
    }
    let made = match status {
        None => volumes.make(volume).and_then(|()| volumes.size(&volume.id)),
        Some(_) => volumes.size(&volume.id),
    };
    let (state, reason, size_gb) = match made {
        Ok(size) => (VolumeState::Created, None, gib(size)),
        Err(error) => (VolumeState::Failed, Some(error.to_string()), 0),
    };
    let known = status.map(|s| &s.snapshots);
    for id in known.into_iter().flatten().map(|(id, _)| id) {
        if !volume.snapshots.contains_key(id) {
            volumes.remove_snapshot(&volume.id, id)?;
        }
    }
    let mut snapshots = BTreeMap::new();
    for id in volume.snapshots.keys() {
        let status = match known.and_then(|k| k.get(id)) {
            Some(status) => status.clone(),
            None => snapshot_status(volumes.take_snapshot(&volume.id, id)),
        };
        snapshots.insert(id.clone(), status);
    }
    Ok(Some(VolumeStatus {
        id: volume.id.clone(),
        state,
        reason,
        size_gb,
        snapshots,
        updated_at: Timestamp::now(),
    }))
}

fn snapshot_status(taken: Result<u64, VolumeError>) -> SnapshotStatus {
    let (bytes, reason) = match taken {
        Ok(bytes) => (bytes, None),
        Err(error) => (0, Some(error.to_string())),
    };
    SnapshotStatus {
        created_at: Timestamp::now(),
        bytes,
        reason,
    }
}

fn differs(before: &VolumeStatus, now: &VolumeStatus) -> bool {
    let mut same_time = before.clone();
    same_time.updated_at = now.updated_at;
    same_time != *now
}

fn gib(bytes: u64) -> u32 {
    u32::try_from(bytes >> 30).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_looked_at_again_however_much_happens_meanwhile() {
        let mut resting = Resting::default();
        let (one, other) = (VolumeId::random(), VolumeId::random());
        let begun = Instant::now();
        resting.rest(one.clone(), begun);
        // Something happens every second.
        let second = Duration::from_secs(1);
        resting.wake(begun + second);
        resting.rest(other.clone(), begun + second);
        assert!(resting.has(&one) && resting.next() == Some(begun + RETRY));
        resting.wake(begun + second * 2);
        assert!(!resting.has(&one) && resting.has(&other));
        assert_eq!(resting.next(), Some(begun + second + RETRY));
        resting.wake(begun + second * 3);
        assert_eq!(resting.next(), None);
    }
}
