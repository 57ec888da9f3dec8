//! A Machine's metadata: labels that may change while it runs. A change makes no new version.

use std::collections::BTreeMap;

use axum::extract::State;
use http::{HeaderMap, StatusCode};
use serde::Deserialize;

use super::config::check_metadata;
use super::{At, change, find};
use crate::auth::Caller;
use crate::error::ApiError;
use crate::extract::{Json, JsonWithNulls, Path};
use crate::server::Shared;

type Metadata = BTreeMap<String, String>;

/// Which key of which Machine.
#[derive(Debug, Deserialize)]
pub struct AtKey {
    #[serde(flatten)]
    at: At,
    key: String,
}

#[derive(Debug, Deserialize)]
pub struct NewValue {
    value: String,
}

/// `GET …/metadata`.
pub async fn get_all(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
) -> Result<Json<Metadata>, ApiError> {
    let snapshot = shared.view.snapshot();
    Ok(Json(find(&snapshot, &caller, &at)?.config.metadata.clone()))
}

/// `PUT …/metadata`: these and no others.
pub async fn replace(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    headers: HeaderMap,
    Json(new): Json<Metadata>,
) -> Result<StatusCode, ApiError> {
    edit(&shared, &caller, &at, &headers, |metadata| {
        metadata.clone_from(&new)
    })
    .await
}

/// `PATCH …/metadata`: these anew, the others as they are; `null` removes one.
pub async fn merge(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    headers: HeaderMap,
    JsonWithNulls(changes): JsonWithNulls<BTreeMap<String, Option<String>>>,
) -> Result<StatusCode, ApiError> {
    edit(&shared, &caller, &at, &headers, |metadata| {
        for (key, value) in &changes {
            match value {
                Some(value) => drop(metadata.insert(key.clone(), value.clone())),
                None => drop(metadata.remove(key)),
            }
        }
    })
    .await
}

/// `GET …/metadata/{key}`.
pub async fn get(
    State(shared): State<Shared>,
    caller: Caller,
    Path(AtKey { at, key }): Path<AtKey>,
) -> Result<Json<serde_json::Value>, ApiError> {
    let snapshot = shared.view.snapshot();
    let value = find(&snapshot, &caller, &at)?.config.metadata.get(&key);
    let value = value.ok_or_else(|| ApiError::not_found(format!("metadata {key}")))?;
    Ok(Json(serde_json::json!({"value": value})))
}

/// `POST …/metadata/{key}`.
pub async fn set(
    State(shared): State<Shared>,
    caller: Caller,
    Path(AtKey { at, key }): Path<AtKey>,
    headers: HeaderMap,
    Json(new): Json<NewValue>,
) -> Result<StatusCode, ApiError> {
    edit(&shared, &caller, &at, &headers, |metadata| {
        metadata.insert(key.clone(), new.value.clone());
    })
    .await
}

/// `DELETE …/metadata/{key}`. A key that is not there is as good as removed.
pub async fn remove(
    State(shared): State<Shared>,
    caller: Caller,
    Path(AtKey { at, key }): Path<AtKey>,
    headers: HeaderMap,
) -> Result<StatusCode, ApiError> {
    edit(&shared, &caller, &at, &headers, |metadata| {
        drop(metadata.remove(&key))
    })
    .await
}

async fn edit(
    shared: &Shared,
    caller: &Caller,
    at: &At,
    headers: &HeaderMap,
    mut change: impl FnMut(&mut Metadata),
) -> Result<StatusCode, ApiError> {
    change::edit(shared, caller, at, headers, |machine| {
        change(&mut machine.config.metadata);
        check_metadata(&machine.config.metadata)
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}
