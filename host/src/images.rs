//! Keeps the host's images within their budget.
//!
//! An image stays while a Machine's directory says that its disk or snapshot is of it (`agent.json`),
//! while its last status names it, or while a config is pinned to it whose network was given it. When in doubt (a directory that
//! cannot be read) nothing is collected: a full disk is told, a missing image is an outage.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tern_catalog::{MachineId, Snapshot};
use tern_image::{Budget, Collected, Digest, ImageError};

use crate::dir::MachineDir;
use crate::host::Host;

/// How often a budget is looked at. Images come in minutes, not in seconds.
const EVERY: Duration = Duration::from_secs(10 * 60);
/// What was used so lately stays, whoever refers to it. A start that takes longer holds a lease.
const MIN_AGE: Duration = Duration::from_secs(10 * 60);
/// Images may fill one in so many bytes of their file system, where nothing else is said.
const SHARE: u64 = 4;

/// Collects from time to time, for ever.
pub(crate) async fn keep_within_budget(host: Arc<Host>) {
    let mut times = tokio::time::interval(EVERY);
    times.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        times.tick().await;
        let host = Arc::clone(&host);
        let collected = tokio::task::spawn_blocking(move || collect(&host, MIN_AGE)).await;
        match collected {
            Ok(Ok(done)) if done.freed > 0 => tracing::info!(
                images = ?done.images, layers = done.layers.len(), freed = done.freed,
                kept = done.kept, "images that no Machine uses were removed"
            ),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(error = %told(&error), "images cannot be collected"),
            Err(error) => tracing::error!(%error, "collecting images has failed"),
        }
    }
}

fn told(error: &ImageError) -> String {
    let source = std::error::Error::source(error);
    source.map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

/// One round.
pub(crate) fn collect(host: &Host, min_age: Duration) -> Result<Collected, ImageError> {
    // First: what is handed out while we look for references is spared.
    let round = host.images.round();
    let machines = host.config.machines_dir();
    let failed = |action, path: std::path::PathBuf| {
        move |source| ImageError::Io {
            action,
            path,
            source,
        }
    };
    let in_use = references(host).map_err(failed("read", machines))?;
    let bytes = match host.config.image_budget {
        Some(bytes) => bytes,
        None => {
            let dir = &host.config.data_dir;
            let fs = rustix::fs::statvfs(dir).map_err(io::Error::from);
            let fs = fs.map_err(failed("inspect", dir.clone()))?;
            fs.f_blocks.saturating_mul(fs.f_frsize) / SHARE
        }
    };
    let done = host
        .images
        .collect(round, &in_use, &Budget { bytes, min_age })?;
    if done.kept > bytes {
        tracing::warn!(
            kept = done.kept,
            budget = bytes,
            "images exceed their budget, and all of them are in use"
        );
    }
    Ok(done)
}

/// The images that Machines of this host refer to.
fn references(host: &Host) -> io::Result<HashSet<Digest>> {
    // The catalog before the directories: what starts meanwhile is newer than the round.
    let mut digests = named(&host.view.snapshot(), host);
    for entry in fs::read_dir(host.config.machines_dir())? {
        let name = entry?.file_name();
        // Of Machines that the catalog no longer knows, too, until their directory is gone.
        let Some(id) = name
            .to_str()
            .and_then(|name| name.parse::<MachineId>().ok())
        else {
            continue;
        };
        let memo = MachineDir::new(&host.config.machines_dir(), &id).memo()?;
        let digest = memo.and_then(|memo| memo.image_digest);
        digests.extend(digest.and_then(|digest| digest.parse::<Digest>().ok()));
    }
    Ok(digests)
}

fn named(snapshot: &Snapshot, host: &Host) -> HashSet<Digest> {
    let own = |id: &&Arc<tern_catalog::Machine>| id.host == host.config.host;
    let mut digests = HashSet::new();
    for machine in snapshot.machines.values().filter(own) {
        let status = snapshot.machine_status.get(&machine.id);
        let ran = status.and_then(|status| status.image_digest.as_deref());
        digests.extend(ran.and_then(|digest| digest.parse::<Digest>().ok()));
        // Naming another's digest keeps nothing of theirs.
        let source = host.source(&machine.config.image, machine.network, None);
        digests.extend(source.ok().and_then(|source| host.images.given(&source)));
    }
    digests
}
