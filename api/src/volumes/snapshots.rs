//! Snapshots of volumes. They stay on the volume's host until they are removed, or it is destroyed.

use axum::extract::State;
use http::StatusCode;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use tern_catalog::{AppName, Snapshot, SnapshotId, Volume, VolumeId};

use super::{At, edit, find, must_stand_still};
use crate::auth::Caller;
use crate::error::ApiError;
use crate::extract::{Json, Path};
use crate::machines::MOST;
use crate::server::Shared;

/// Most snapshots of a volume.
const MAX_SNAPSHOTS: usize = 60;

/// Which snapshot of which volume.
#[derive(Debug, Deserialize)]
pub struct SnapshotAt {
    app: AppName,
    id: VolumeId,
    snapshot: SnapshotId,
}

/// `GET …/volumes/{id}/snapshots`, newest first.
pub async fn list(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
) -> Result<Json<Vec<Value>>, ApiError> {
    let snapshot = shared.view.snapshot();
    let volume = find(&snapshot, &caller, &at)?;
    let mut ids: Vec<_> = volume.snapshots.iter().collect();
    ids.sort_by_key(|(_, wanted)| std::cmp::Reverse(**wanted));
    let shown = ids.into_iter().map(|(id, _)| shape(&snapshot, volume, id));
    Ok(Json(shown.collect()))
}

/// `POST …/volumes/{id}/snapshots`: answered when its host has made it, or after the patience of `wait`.
pub async fn create(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
) -> Result<Json<Value>, ApiError> {
    let before = shared.view.snapshot();
    must_stand_still(&before, find(&before, &caller, &at)?)?;
    let id = SnapshotId::random();
    let volume = edit(&shared, &caller, &at, |volume| {
        if volume.snapshots.len() >= MAX_SNAPSHOTS {
            return Err(ApiError::invalid(format!(
                "volume {} has {MAX_SNAPSHOTS} snapshots; remove one first",
                volume.id
            )));
        }
        volume.snapshots.insert(id.clone(), Timestamp::now());
        Ok(())
    })
    .await?;
    let made = shared.view.wait_for(|s| {
        let status = s.volume_status.get(&volume.id)?;
        status.snapshots.contains_key(&id).then_some(())
    });
    // A large one takes longer: it is shown as being made.
    let _ = tokio::time::timeout(MOST, made).await;
    Ok(Json(shape(&shared.view.snapshot(), &volume, &id)))
}

/// `DELETE …/volumes/{id}/snapshots/{snapshot}`.
pub async fn remove(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<SnapshotAt>,
) -> Result<StatusCode, ApiError> {
    let id = at.snapshot;
    let at = At {
        app: at.app,
        id: at.id,
    };
    edit(&shared, &caller, &at, |volume| {
        match volume.snapshots.remove(&id) {
            Some(_) => Ok(()),
            None => Err(ApiError::not_found(format!("snapshot {id}"))),
        }
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

fn shape(snapshot: &Snapshot, volume: &Volume, id: &SnapshotId) -> Value {
    let status = snapshot.volume_status.get(&volume.id);
    let made = status.and_then(|s| s.snapshots.get(id));
    let state = match made.map(|m| m.reason.is_none()) {
        None => "running",
        Some(true) => "created",
        Some(false) => "failed",
    };
    json!({
        "id": id,
        "status": state,
        "reason": made.and_then(|m| m.reason.as_deref()),
        "size": made.map(|m| m.bytes),
        "volume_size": volume.bytes(),
        "created_at": made.map(|m| m.created_at).or(volume.snapshots.get(id).copied()),
    })
}
