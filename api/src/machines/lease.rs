//! Leases of Machines: whoever holds one is alone in changing it, until it ends.

use axum::Json;
use axum::extract::{Path, Query, State};
use http::{HeaderMap, StatusCode};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tern_catalog::{Compare, Op, Record, StoreError, Transaction};

use super::{At, find, optional};
use crate::auth::Caller;
use crate::error::ApiError;
use crate::server::Shared;

/// Where the holder shows that it holds.
const NONCE: &str = "fly-machine-lease-nonce";
const DEFAULT_TTL_S: i64 = 30;
const MAX_TTL_S: i64 = 3600;

/// A lease as it is kept. Only this API reads it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct MachineLease {
    machine: String,
    nonce: String,
    expires_at: i64,
    description: String,
}

impl Record for MachineLease {
    const PREFIX: &'static str = "machine_leases/";
    fn id(&self) -> String {
        self.machine.clone()
    }
}

/// Both the body and the query are in use.
#[derive(Debug, Default, Deserialize)]
pub struct Take {
    ttl: Option<i64>,
    #[serde(default)]
    description: String,
}

#[derive(Debug, Default, Deserialize)]
pub struct TakeQuery {
    ttl: Option<i64>,
}

/// `POST …/lease`: takes it, or with the nonce makes it last longer.
pub async fn take_lease(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    Query(query): Query<TakeQuery>,
    headers: HeaderMap,
    body: bytes::Bytes,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    find(&shared.view.snapshot(), &caller, &at)?;
    let take: Take = optional(&body)?;
    let ttl = take
        .ttl
        .or(query.ttl)
        .unwrap_or(DEFAULT_TTL_S)
        .clamp(1, MAX_TTL_S);
    let found = shared.catalog.get::<MachineLease>(at.id.as_str()).await?;
    let now = Timestamp::now().as_second();
    let nonce = match &found {
        Some((held, _)) if held.expires_at > now => {
            if given(&headers) != Some(held.nonce.as_str()) {
                return Err(ApiError::locked());
            }
            held.nonce.clone()
        }
        _ => hex::encode(rand::random::<[u8; 16]>()),
    };
    let lease = MachineLease {
        machine: at.id.to_string(),
        nonce,
        expires_at: now + ttl,
        description: take.description.chars().take(200).collect(),
    };
    let compares = vec![Compare {
        key: lease.key(),
        revision: found.map(|(_, revision)| revision),
    }];
    match shared
        .catalog
        .store()
        .commit(Transaction {
            compares,
            ops: vec![Op::put(&lease)],
        })
        .await
    {
        Ok(_) => Ok((StatusCode::CREATED, Json(shape(&lease)))),
        Err(StoreError::Conflict { .. }) => Err(ApiError::locked()),
        Err(other) => Err(other.into()),
    }
}

/// `GET …/lease`.
pub async fn get_lease(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
) -> Result<Json<Value>, ApiError> {
    find(&shared.view.snapshot(), &caller, &at)?;
    let lease = current(&shared, &at)
        .await?
        .ok_or_else(|| ApiError::not_found("lease"))?;
    let mut shown = shape(&lease);
    // The nonce is the holder's proof: others must not learn it.
    if let Some(data) = shown["data"].as_object_mut() {
        data.remove("nonce");
    }
    Ok(Json(shown))
}

/// `DELETE …/lease`.
pub async fn release_lease(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    find(&shared.view.snapshot(), &caller, &at)?;
    let lease = current(&shared, &at)
        .await?
        .ok_or_else(|| ApiError::not_found("lease"))?;
    if given(&headers) != Some(lease.nonce.as_str()) {
        return Err(ApiError::bad_request(format!(
            "the header {NONCE} does not hold this lease's nonce"
        )));
    }
    shared
        .catalog
        .delete::<MachineLease>(at.id.as_str())
        .await?;
    Ok(super::ok())
}

/// An error while somebody else holds the Machine's lease.
pub(super) async fn must_hold(
    shared: &Shared,
    at: &At,
    headers: &HeaderMap,
) -> Result<(), ApiError> {
    match current(shared, at).await? {
        Some(lease) if given(headers) != Some(lease.nonce.as_str()) => Err(ApiError::locked()),
        _ => Ok(()),
    }
}

async fn current(shared: &Shared, at: &At) -> Result<Option<MachineLease>, ApiError> {
    let found = shared.catalog.get::<MachineLease>(at.id.as_str()).await?;
    let now = Timestamp::now().as_second();
    Ok(found
        .map(|(lease, _)| lease)
        .filter(|lease| lease.expires_at > now))
}

fn given(headers: &HeaderMap) -> Option<&str> {
    headers.get(NONCE).and_then(|n| n.to_str().ok())
}

fn shape(lease: &MachineLease) -> Value {
    json!({"status": "success", "data": {
        "nonce": lease.nonce,
        "expires_at": lease.expires_at,
        "owner": "",
        "description": lease.description,
    }})
}
