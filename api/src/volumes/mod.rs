//! Volumes: what is wanted of them. Their hosts' agents make it so.

pub mod attach;
pub mod snapshots;

use axum::extract::State;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use tern_catalog::{
    AppName, Compare, MachineState, Op, Record as _, Snapshot, SnapshotId, Transaction, Volume,
    VolumeId, VolumeName, VolumeSource, VolumeState,
};

use crate::apps;
use crate::auth::Caller;
use crate::error::ApiError;
use crate::extract::{Json, Path};
use crate::machines::{MOST, place, shape as machine_shape};
use crate::server::Shared;

/// Size where none is asked for, in GiB.
const DEFAULT_GB: u32 = 3;
/// Largest size, in GiB.
const MAX_GB: u32 = 500;
/// Most volumes of an app.
const MAX_VOLUMES: usize = 100;

/// Which volume of which app.
#[derive(Debug, Deserialize)]
pub struct At {
    app: AppName,
    id: VolumeId,
}

#[derive(Debug, Deserialize)]
pub struct Create {
    name: VolumeName,
    region: Option<String>,
    size_gb: Option<u32>,
    fstype: Option<String>,
    /// Make it from this snapshot.
    snapshot_id: Option<SnapshotId>,
    /// Make it from this volume as it is.
    source_volume_id: Option<VolumeId>,
}

#[derive(Debug, Deserialize)]
pub struct Extend {
    size_gb: u32,
}

/// `GET …/volumes`.
pub async fn list(
    State(shared): State<Shared>,
    caller: Caller,
    Path(app): Path<AppName>,
) -> Result<Json<Vec<Value>>, ApiError> {
    let snapshot = shared.view.snapshot();
    caller.app(&snapshot, &app)?;
    let volumes = snapshot.volumes_of(&app).map(|v| shape(&snapshot, v));
    Ok(Json(volumes.collect()))
}

/// `GET …/volumes/{id}`.
pub async fn get(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
) -> Result<Json<Value>, ApiError> {
    let snapshot = shared.view.snapshot();
    Ok(Json(shape(&snapshot, find(&snapshot, &caller, &at)?)))
}

/// `POST …/volumes`: answered when its host has made it, or after the patience of `wait`.
pub async fn create(
    State(shared): State<Shared>,
    caller: Caller,
    Path(app): Path<AppName>,
    Json(create): Json<Create>,
) -> Result<Json<Value>, ApiError> {
    let snapshot = shared.view.snapshot();
    caller.app(&snapshot, &app)?;
    if create.fstype.as_deref().is_some_and(|t| t != "ext4") {
        return Err(ApiError::invalid("fstype: only ext4 is possible"));
    }
    if snapshot.volumes_of(&app).count() >= MAX_VOLUMES {
        return Err(ApiError::invalid(format!(
            "app {app} has {MAX_VOLUMES} volumes already"
        )));
    }
    let source = source(&snapshot, &app, &create)?;
    let size_gb = create
        .size_gb
        .unwrap_or(source.as_ref().map_or(DEFAULT_GB, |(_, v)| v.size_gb));
    must_be_possible(size_gb)?;
    if let Some((_, origin)) = source.as_ref().filter(|(_, v)| size_gb < v.size_gb) {
        return Err(ApiError::invalid(format!(
            "size_gb is {size_gb}; what it is made of has {} GB",
            origin.size_gb
        )));
    }
    // Its data is there already, and is not sent to another host.
    let origin = source.as_ref().map(|(_, origin)| origin);
    let region = origin.map(|o| &o.region).or(create.region.as_ref());
    let wanted = place::Wanted {
        app: &app,
        region: region.unwrap_or(&shared.config.region),
        guest: None,
        starts: false,
        volume: origin.map(|o| (&o.id, o.host)),
        image_on: None,
    };
    let host = place::on(&snapshot, &wanted)?;
    let (host, region) = (host.id, host.region.clone());
    let volume = Volume {
        id: VolumeId::random(),
        name: create.name,
        app,
        host,
        region,
        size_gb,
        source: source.map(|(source, _)| source),
        machine: None,
        snapshots: Default::default(),
        destroyed: false,
        created_at: Timestamp::now(),
    };
    let still_there = apps::still_there(&shared, &caller, &volume.app).await?;
    let mut transaction = Transaction {
        compares: vec![still_there, Compare::absent(&volume)],
        ops: vec![Op::put(&volume)],
    };
    let still_open = place::still_open(&shared, host).await?;
    transaction.compares.extend(still_open);
    let revision = shared.catalog.store().commit(transaction).await?;
    shared.seen(revision).await;
    let made = shared
        .view
        .wait_for(|s| s.volume_status.contains_key(&volume.id).then_some(()));
    // A large copy takes longer: it is shown as being made.
    let _ = tokio::time::timeout(MOST, made).await;
    Ok(Json(shape(&shared.view.snapshot(), &volume)))
}

/// `PUT …/volumes/{id}/extend`.
pub async fn extend(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    Json(extend): Json<Extend>,
) -> Result<Json<Value>, ApiError> {
    must_be_possible(extend.size_gb)?;
    let volume = edit(&shared, &caller, &at, |volume| {
        if extend.size_gb < volume.size_gb {
            return Err(ApiError::invalid(format!(
                "volume {} has {} GB already; volumes only grow",
                volume.id, volume.size_gb
            )));
        }
        volume.size_gb = extend.size_gb;
        Ok(())
    })
    .await?;
    let snapshot = shared.view.snapshot();
    // A Machine sees the new size when it next starts cold.
    let needs_restart = snapshot.holder_of(&volume).is_some();
    Ok(Json(
        json!({"needs_restart": needs_restart, "volume": shape(&snapshot, &volume)}),
    ))
}

/// `DELETE …/volumes/{id}`: its data and its snapshots are removed.
pub async fn destroy(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
) -> Result<Json<Value>, ApiError> {
    let snapshot = shared.view.snapshot();
    let volume = find(&snapshot, &caller, &at)?;
    if let Some(machine) = snapshot.holder_of(volume) {
        return Err(ApiError::precondition(format!(
            "volume {} is mounted by machine {}; destroy the machine, or take the mount out of its config",
            volume.id, machine.id
        )));
    }
    // A Machine that takes it at this moment writes the record too, and one of the two is refused.
    let volume = edit(&shared, &caller, &at, |volume| {
        if volume.machine != snapshot.volumes.get(&at.id).and_then(|v| v.machine.clone()) {
            return Err(ApiError::conflict(format!(
                "volume {} has just been mounted",
                volume.id
            )));
        }
        volume.destroyed = true;
        Ok(())
    })
    .await?;
    let gone = shared
        .view
        .wait_for(|s| (!s.volumes.contains_key(&at.id)).then_some(()));
    let _ = tokio::time::timeout(MOST, gone).await;
    Ok(Json(shape(&shared.view.snapshot(), &volume)))
}

/// What a new volume is made of, and the volume that is or was.
fn source(
    snapshot: &Snapshot,
    app: &AppName,
    create: &Create,
) -> Result<Option<(VolumeSource, Volume)>, ApiError> {
    // Only of the same app: another's data must not be had by naming it.
    let mut own = snapshot.volumes_of(app);
    let found = match (&create.snapshot_id, &create.source_volume_id) {
        (None, None) => return Ok(None),
        (Some(_), Some(_)) => {
            return Err(ApiError::invalid(
                "give snapshot_id or source_volume_id, not both",
            ));
        }
        (Some(id), None) => own
            .find(|v| v.snapshots.contains_key(id))
            .ok_or_else(|| ApiError::not_found(format!("snapshot {id}")))?,
        (None, Some(id)) => {
            let volume = own.find(|v| v.id == *id);
            let volume = volume.ok_or_else(|| ApiError::not_found(format!("volume {id}")))?;
            must_stand_still(snapshot, volume)?;
            volume
        }
    };
    let source = VolumeSource {
        volume: found.id.clone(),
        snapshot: create.snapshot_id.clone(),
    };
    Ok(Some((source, Volume::clone(found))))
}

/// An error while a Machine may be writing to the volume: what is copied then is torn.
fn must_stand_still(snapshot: &Snapshot, volume: &Volume) -> Result<(), ApiError> {
    let Some(machine) = snapshot.holder_of(volume) else {
        return Ok(());
    };
    let status = snapshot.machine_status.get(&machine.id).map(|s| &**s);
    match machine_shape::state(machine, status) {
        MachineState::Created
        | MachineState::Stopped
        | MachineState::Suspended
        | MachineState::Failed => Ok(()),
        state => Err(ApiError::precondition(format!(
            "volume {} is in use: machine {} is {state}; suspend or stop it first",
            volume.id, machine.id
        ))),
    }
}

fn must_be_possible(size_gb: u32) -> Result<(), ApiError> {
    if !(1..=MAX_GB).contains(&size_gb) {
        return Err(ApiError::invalid(format!(
            "size_gb is {size_gb}; 1 to {MAX_GB} are possible"
        )));
    }
    Ok(())
}

/// The volume, where the caller may see it.
fn find<'a>(snapshot: &'a Snapshot, caller: &Caller, at: &At) -> Result<&'a Volume, ApiError> {
    caller.app(snapshot, &at.app)?;
    let volume = snapshot.volumes.get(&at.id).filter(|v| v.app == at.app);
    volume
        .map(|v| &**v)
        .ok_or_else(|| ApiError::not_found(format!("volume {}", at.id)))
}

/// Changes a volume that is not being destroyed.
async fn edit(
    shared: &Shared,
    caller: &Caller,
    at: &At,
    mut change: impl FnMut(&mut Volume) -> Result<(), ApiError>,
) -> Result<Volume, ApiError> {
    find(&shared.view.snapshot(), caller, at)?;
    let changed = shared
        .catalog
        .update(at.id.as_str(), |volume: &mut Volume| {
            if volume.destroyed {
                return Err(ApiError::precondition(format!(
                    "volume {} is being destroyed",
                    volume.id
                )));
            }
            change(volume)
        })
        .await??;
    let volume = changed.ok_or_else(|| ApiError::not_found(format!("volume {}", at.id)))?;
    let entry = shared.catalog.store().get(&volume.key()).await?;
    shared.seen(entry.map_or(0, |e| e.revision)).await;
    Ok(volume)
}

/// A volume as the API shows it.
fn shape(snapshot: &Snapshot, volume: &Volume) -> Value {
    let status = snapshot.volume_status.get(&volume.id);
    let state = match status.map(|s| s.state) {
        _ if volume.destroyed => "pending_destroy",
        None => "creating",
        Some(VolumeState::Created) => "created",
        Some(VolumeState::Failed) => "failed",
    };
    json!({
        "id": volume.id,
        "name": volume.name,
        "state": state,
        "reason": status.and_then(|s| s.reason.as_deref()),
        "size_gb": volume.size_gb,
        "region": volume.region,
        "zone": volume.host.to_string(),
        "encrypted": false,
        "attached_machine_id": snapshot.holder_of(volume).map(|m| &m.id),
        "attached_alloc_id": null,
        "created_at": volume.created_at,
        "fstype": "ext4",
        "auto_backup_enabled": false,
        "host_status": "ok",
    })
}

#[cfg(test)]
mod tests;
