//! Leases of Machines: whoever holds one is alone in changing it, until it ends.

use axum::extract::State;
use http::{HeaderMap, StatusCode};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tern_catalog::{
    Compare, DesiredState, Machine, MachineId, Op, Record, Revision, StoreError, Transaction,
};

use super::{At, find, optional};
use crate::auth::Caller;
use crate::error::ApiError;
use crate::extract::{Json, Path, Query};
use crate::server::Shared;

/// Where the holder shows that it holds.
pub const NONCE: &str = "fly-machine-lease-nonce";
/// How often a change that others are faster with is tried.
const ATTEMPTS: u32 = 16;
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

    fn lasts(&self) -> bool {
        self.expires_at > Timestamp::now().as_second()
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
    let body: Take = optional(&body)?;
    let ttl = body.ttl.or(query.ttl).unwrap_or(DEFAULT_TTL_S);
    for _ in 0..ATTEMPTS {
        let held = must_hold(&shared, &at, &headers).await?;
        let mut lease = held.lasting(&at.id, ttl);
        lease.description = body.description.chars().take(200).collect();
        let transaction = Transaction {
            // A Machine that is gone by then must leave no lease behind.
            compares: vec![held.unchanged(&at.id), still_there(&shared, &at).await?],
            ops: vec![Op::put(&lease)],
        };
        match shared.catalog.store().commit(transaction).await {
            Ok(_) => return Ok((StatusCode::CREATED, Json(shape(&lease)))),
            // Somebody else has it now, or the Machine was changed.
            Err(StoreError::Conflict { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Err(ApiError::conflict(format!(
        "machine {} is changed by others all the time; try again",
        at.id
    )))
}

/// `GET …/lease`.
pub async fn get_lease(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
) -> Result<Json<Value>, ApiError> {
    find(&shared.view.snapshot(), &caller, &at)?;
    let (lease, _) = current(&shared, &at)
        .await?
        .ok_or_else(|| ApiError::not_found("lease"))?;
    let mut shown = shape(&lease);
    // The nonce is the holder's proof: others must not learn it.
    if let Some(data) = shown["data"].as_object_mut() {
        data.remove("nonce");
    }
    Ok(Json(shown))
}

/// `DELETE …/lease`, by who holds it.
pub async fn release_lease(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    find(&shared.view.snapshot(), &caller, &at)?;
    for _ in 0..ATTEMPTS {
        let (lease, revision) = current(&shared, &at)
            .await?
            .ok_or_else(|| ApiError::not_found("lease"))?;
        if given(&headers) != Some(lease.nonce.as_str()) {
            return Err(ApiError::bad_request(format!(
                "the header {NONCE} does not hold this lease's nonce"
            )));
        }
        match remove(&shared, &lease, revision).await {
            Ok(()) => return Ok(super::ok()),
            // It has ended, and is somebody else's by now; or its holder has just made it last longer.
            Err(StoreError::Conflict { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Err(ApiError::conflict(format!(
        "the lease of machine {} changes all the time; try again",
        at.id
    )))
}

/// A Machine's lease as its caller has found it: nobody's, or the caller's own.
///
/// What is done on the strength of it has [`Held::unchanged`] among its comparisons.
#[derive(Debug)]
pub(super) struct Held {
    /// The record, where there is one, and whether it is a lease still.
    found: Option<(MachineLease, Revision)>,
    lasts: bool,
}

impl Held {
    /// Holds as long as nobody else has taken it.
    pub(super) fn unchanged(&self, machine: &MachineId) -> Compare {
        Compare {
            key: MachineLease::key_of(machine.as_str()),
            revision: self.found.as_ref().map(|(_, revision)| *revision),
        }
    }

    /// The lease for `ttl` seconds from now: the caller's own made to last longer, or a new one.
    pub(super) fn lasting(&self, machine: &MachineId, ttl: i64) -> MachineLease {
        let mut lease = MachineLease::new(machine, ttl);
        if let Some((own, _)) = self.found.as_ref().filter(|_| self.lasts) {
            lease.nonce.clone_from(&own.nonce);
        }
        lease
    }
}

/// An error while somebody else holds the Machine's lease.
pub(super) async fn must_hold(
    shared: &Shared,
    at: &At,
    headers: &HeaderMap,
) -> Result<Held, ApiError> {
    let found = shared.catalog.get::<MachineLease>(at.id.as_str()).await?;
    let lasts = found.as_ref().is_some_and(|(lease, _)| lease.lasts());
    match &found {
        Some((lease, _)) if lasts && given(headers) != Some(lease.nonce.as_str()) => {
            Err(ApiError::locked())
        }
        _ => Ok(Held { found, lasts }),
    }
}

/// Removes leases of Machines that are no more: hosts remove the records of their Machines, and know of no leases.
pub(crate) async fn sweep_leases(shared: &Shared) -> Result<(), ApiError> {
    let listing = shared.catalog.store().list(MachineLease::PREFIX).await?;
    for entry in listing.entries {
        let Some(id) = entry.key.strip_prefix(MachineLease::PREFIX) else {
            continue;
        };
        // Asked of the store after the listing: a Machine that is made with its lease is there with it.
        let key = Machine::key_of(id);
        if shared.catalog.store().get(&key).await?.is_some() {
            continue;
        }
        let transaction = Transaction {
            compares: vec![Compare {
                key: entry.key.clone(),
                revision: Some(entry.revision),
            }],
            ops: vec![Op::Delete { key: entry.key }],
        };
        match shared.catalog.store().commit(transaction).await {
            Ok(_) | Err(StoreError::Conflict { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Ok(())
}

/// Holds as long as the Machine is as it is, and is not on its way out.
async fn still_there(shared: &Shared, at: &At) -> Result<Compare, ApiError> {
    let found = shared.catalog.get::<Machine>(at.id.as_str()).await?;
    let (machine, revision) =
        found.ok_or_else(|| ApiError::not_found(format!("machine {}", at.id)))?;
    if matches!(machine.desired.state, DesiredState::Destroyed { .. }) {
        return Err(ApiError::precondition(format!(
            "machine {} is being destroyed",
            at.id
        )));
    }
    Ok(Compare {
        key: machine.key(),
        revision: Some(revision),
    })
}

async fn remove(
    shared: &Shared,
    lease: &MachineLease,
    revision: Revision,
) -> Result<(), StoreError> {
    let transaction = Transaction {
        compares: vec![Compare {
            key: lease.key(),
            revision: Some(revision),
        }],
        ops: vec![Op::Delete { key: lease.key() }],
    };
    shared.catalog.store().commit(transaction).await.map(drop)
}

async fn current(shared: &Shared, at: &At) -> Result<Option<(MachineLease, Revision)>, ApiError> {
    let found = shared.catalog.get::<MachineLease>(at.id.as_str()).await?;
    Ok(found.filter(|(lease, _)| lease.lasts()))
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
