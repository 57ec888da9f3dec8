//! The end of an app: all that it has goes first, and its name last.
//!
//! ```text
//! there ── DELETE ──► deleting ── nothing of it is left ──► gone: its name is free
//! ```
//!
//! An app that is `deleting` gets nothing new. Its Machines and volumes are removed by their hosts, which may be away
//! for long; until then the name is not given to anybody, for whoever had it next would be taken for their owner.
//! One task per API does what a call or an earlier API has begun; steps may be done twice.

use std::collections::HashSet;
use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use tern_catalog::{
    App, AppName, Compare, Desired, DesiredState, Machine, Op, Record as _, Snapshot, StoreError,
    Transaction, Volume, limits,
};
use tokio::time::MissedTickBehavior;

use crate::error::ApiError;
use crate::server::Shared;

/// How often what could not be done is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// What is still there of a name's last owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Left {
    machines: usize,
    volumes: usize,
}

impl Left {
    /// Of the app, or of one whose record is gone already.
    pub(crate) fn of(snapshot: &Snapshot, app: &AppName) -> Self {
        Self {
            machines: snapshot.machines_of(app).count(),
            // Those too that are being destroyed.
            volumes: snapshot.volumes.values().filter(|v| v.app == *app).count(),
        }
    }

    pub(crate) fn is_nothing(self) -> bool {
        self.machines == 0 && self.volumes == 0
    }

    /// What whoever wants the name is told.
    pub(crate) fn refusal(self, app: &AppName) -> ApiError {
        ApiError::conflict(format!(
            "app name {app} is not free yet: {self} of its last owner's are being removed; try again later"
        ))
    }
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let some = |n: usize, what: &str| match n {
            1 => format!("1 {what}"),
            n => format!("{n} {what}s"),
        };
        match (self.machines, self.volumes) {
            (0, 0) => f.write_str("some records"),
            (machines, 0) => f.write_str(&some(machines, "Machine")),
            (0, volumes) => f.write_str(&some(volumes, "volume")),
            (machines, volumes) => write!(
                f,
                "{} and {}",
                some(machines, "Machine"),
                some(volumes, "volume")
            ),
        }
    }
}

/// Begins it, and ends it where nothing is left. From when this returns nothing is added to the app.
pub(crate) async fn begin(shared: &Shared, app: &App) -> Result<(), ApiError> {
    // Written once: whoever does the same at the same time names that revision. Not another of that name: by now it may
    // be somebody else's.
    let same = |other: &App| {
        (other.created_at, &other.organization) == (app.created_at, &app.organization)
    };
    let mark = |found: &mut App| {
        let marked = !same(found) || std::mem::replace(&mut found.deleting, true);
        if marked { Err(()) } else { Ok(()) }
    };
    let _marked_before = shared.catalog.update(app.name.as_str(), mark).await?;
    let app = &app.name;
    // What was added before must be seen to be removed.
    let marked = shared.catalog.get::<App>(app.as_str()).await?;
    if let Some((_, revision)) = marked {
        shared.seen(revision).await;
    }
    clear(shared, app).await?;
    if Left::of(&shared.view.snapshot(), app).is_nothing() {
        finish(shared, app).await?;
    }
    Ok(())
}

/// Does what has been begun, for ever.
pub(crate) async fn finish_all(shared: Shared) {
    let mut changes = shared.view.changes();
    // Those whose hosts have been told.
    let mut cleared: HashSet<AppName> = HashSet::new();
    let mut retries = tokio::time::interval(RETRY);
    retries.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let retry = tokio::select! {
            _ = retries.tick() => true,
            changed = changes.changed() => match changed {
                Ok(()) => false,
                Err(_) => return, // the catalog is closed
            },
        };
        let snapshot = shared.view.snapshot();
        let deleting = |name: &AppName| snapshot.apps.get(name).is_some_and(|app| app.deleting);
        cleared.retain(deleting);
        for app in snapshot.apps.values().filter(|app| app.deleting) {
            let outcome = if Left::of(&snapshot, &app.name).is_nothing() {
                finish(&shared, &app.name).await
            } else if cleared.insert(app.name.clone()) || retry {
                clear(&shared, &app.name).await
            } else {
                Ok(())
            };
            if let Err(error) = outcome {
                tracing::warn!(app = %app.name, ?error, "an app cannot be removed yet");
            }
        }
    }
}

/// Has hosts remove what they have of it, and removes what others may want before they have.
async fn clear(shared: &Shared, app: &AppName) -> Result<(), ApiError> {
    let snapshot = shared.view.snapshot();
    for (machine, _) in snapshot.machines_of(app) {
        let destroy = |machine: &mut Machine| {
            if !matches!(
                machine.desired.state,
                DesiredState::Destroyed { force: true }
            ) {
                machine.desired = Desired {
                    state: DesiredState::Destroyed { force: true },
                    generation: machine.desired.generation + 1,
                };
                machine.updated_at = Timestamp::now();
            }
            Ok::<_, ApiError>(())
        };
        shared
            .catalog
            .update(machine.id.as_str(), destroy)
            .await??;
    }
    for volume in snapshot.volumes_of(app) {
        let destroy = |volume: &mut Volume| {
            volume.destroyed = true;
            Ok::<_, ApiError>(())
        };
        shared.catalog.update(volume.id.as_str(), destroy).await??;
    }
    let ops = records(shared, &snapshot, app).await?;
    remove(shared, app, ops).await
}

/// The records of an app that are the API's alone. Certificates go with their host names.
async fn records(shared: &Shared, snapshot: &Snapshot, app: &AppName) -> Result<Vec<Op>, ApiError> {
    let mut ops = vec![crate::lease::removal(app), crate::secrets::removal(app)];
    ops.extend(crate::releases::removal(shared, app).await?);
    let hostnames = snapshot.hostnames.values().filter(|r| r.app == *app);
    ops.extend(hostnames.map(|route| Op::Delete { key: route.key() }));
    Ok(ops)
}

/// The last step: nothing is left that a host has.
async fn finish(shared: &Shared, name: &AppName) -> Result<(), ApiError> {
    // What is known of it may be old: it may have been removed, and made anew by its next owner.
    match shared.catalog.get::<App>(name.as_str()).await? {
        Some((app, _)) if app.deleting => {}
        _ => return Ok(()),
    }
    // Whoever takes the name next must not find this owner's images under it.
    let (registry, own) = (std::sync::Arc::clone(&shared.registry), name.clone());
    let forgotten = tokio::task::spawn_blocking(move || registry.forget(&own)).await;
    if let Err(error) = forgotten
        .map_err(std::io::Error::other)
        .and_then(|done| done)
    {
        return Err(ApiError::conflict(format!(
            "the images of app {name} cannot be removed: {error}"
        )));
    }
    let snapshot = shared.view.snapshot();
    let ops = records(shared, &snapshot, name).await?;
    remove(shared, name, ops).await?;
    let Some((app, revision)) = shared.catalog.get::<App>(name.as_str()).await? else {
        return Ok(());
    };
    let transaction = Transaction {
        compares: vec![Compare {
            key: app.key(),
            revision: Some(revision),
        }],
        ops: vec![Op::Delete { key: app.key() }],
    };
    // It may have been removed, and made anew by its next owner.
    if !app.deleting {
        return Ok(());
    }
    match shared.catalog.store().commit(transaction).await {
        Ok(revision) => {
            shared.seen(revision).await;
            Ok(())
        }
        // Another call was faster.
        Err(StoreError::Conflict { .. }) => Ok(()),
        Err(other) => Err(other.into()),
    }
}

/// Removes records while the app is `deleting`, in as many transactions as it takes.
async fn remove(shared: &Shared, name: &AppName, mut ops: Vec<Op>) -> Result<(), ApiError> {
    let Some((app, revision)) = shared.catalog.get::<App>(name.as_str()).await? else {
        return Ok(());
    };
    if !app.deleting {
        return Ok(());
    }
    while !ops.is_empty() {
        let rest = ops.split_off(ops.len().min(limits::MAX_OPS));
        // Not what the name's next owner has by now.
        let still_deleting = Compare {
            key: app.key(),
            revision: Some(revision),
        };
        let transaction = Transaction {
            compares: vec![still_deleting],
            ops: std::mem::replace(&mut ops, rest),
        };
        match shared.catalog.store().commit(transaction).await {
            Ok(_) => {}
            Err(StoreError::Conflict { .. }) => {
                let now = shared.catalog.get::<App>(name.as_str()).await?;
                if now.is_some_and(|(app, _)| app.deleting) {
                    return Err(ApiError::conflict(format!(
                        "app {name} is being destroyed by others too; try again"
                    )));
                }
                // They were faster.
                return Ok(());
            }
            Err(other) => return Err(other.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
