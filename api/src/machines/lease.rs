//! Leases of Machines: whoever holds one is alone in changing it, until it ends.

use axum::extract::State;
use http::{HeaderMap, HeaderValue, StatusCode};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tern_catalog::{Compare, MachineId, Op, Record, StoreError, Transaction};

use super::{At, find, optional};
use crate::auth::Caller;
use crate::error::ApiError;
use crate::extract::{Json, Path, Query};
use crate::server::Shared;

/// Where the holder shows that it holds.
pub const NONCE: &str = "fly-machine-lease-nonce";
const DEFAULT_TTL_S: i64 = 30;
const MAX_TTL_S: i64 = 3600;

/// A lease as it is kept. Only this API reads it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct MachineLease {
    machine: String,
    /// What the holder shows to be known.
    pub(super) nonce: String,
    /// In seconds since 1970.
    expires_at: i64,
    description: String,
}

impl Record for MachineLease {
    const PREFIX: &'static str = "machine_leases/";
    fn id(&self) -> String {
        self.machine.clone()
    }
}

impl MachineLease {
    /// A lease of `ttl` seconds from now, within bounds.
    pub(super) fn new(machine: &MachineId, ttl: i64) -> Self {
        Self {
            machine: machine.to_string(),
            nonce: hex::encode(rand::random::<[u8; 16]>()),
            expires_at: Timestamp::now().as_second() + ttl.clamp(1, MAX_TTL_S),
            description: String::new(),
        }
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
    mut headers: HeaderMap,
    body: bytes::Bytes,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    find(&shared.view.snapshot(), &caller, &at)?;
    let body: Take = optional(&body)?;
    let ttl = body.ttl.or(query.ttl).unwrap_or(DEFAULT_TTL_S);
    let lease = take(&shared, &at, &mut headers, ttl, body.description).await?;
    Ok((StatusCode::CREATED, Json(shape(&lease))))
}

/// Takes the lease for `ttl` seconds, or makes it last longer for the holder whose nonce is in `headers`;
/// afterwards the nonce is there in any case.
pub(super) async fn take(
    shared: &Shared,
    at: &At,
    headers: &mut HeaderMap,
    ttl: i64,
    description: String,
) -> Result<MachineLease, ApiError> {
    let found = shared.catalog.get::<MachineLease>(at.id.as_str()).await?;
    let mut lease = MachineLease::new(&at.id, ttl);
    lease.description = description.chars().take(200).collect();
    if let Some((held, _)) = &found
        && held.expires_at > Timestamp::now().as_second()
    {
        if given(headers) != Some(held.nonce.as_str()) {
            return Err(ApiError::locked());
        }
        lease.nonce.clone_from(&held.nonce);
    }
    let transaction = Transaction {
        compares: vec![Compare {
            key: lease.key(),
            revision: found.map(|(_, revision)| revision),
        }],
        ops: vec![Op::put(&lease)],
    };
    match shared.catalog.store().commit(transaction).await {
        Ok(_) => {
            // A nonce is hexadecimal: always a header's value.
            headers.insert(
                NONCE,
                HeaderValue::from_str(&lease.nonce).map_err(|_| ApiError::locked())?,
            );
            Ok(lease)
        }
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
