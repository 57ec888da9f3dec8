//! What is asked of a running Machine, and done to it. Commands: see `exec.rs`.

use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{At, SignalName, find};
use crate::auth::Caller;
use crate::error::ApiError;
use crate::extract::{Json, Path};
use crate::gateway::{MachineMemory, StartTrace};
use crate::server::Shared;

#[derive(Debug, Deserialize)]
pub struct Signal {
    signal: SignalName,
}

/// `GET …/boot-trace`.
pub async fn boot_trace(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
) -> Result<Json<StartTrace>, ApiError> {
    find(&shared.view.snapshot(), &caller, &at)?;
    Ok(Json(shared.gateway.start_trace(&at.id).await?))
}

/// The least that a guest can be asked to live with: `tern-vmm`'s own limit.
const LEAST_MEMORY_MB: u32 = 32;

#[derive(Debug, Deserialize)]
pub struct MemoryLimit {
    limit_mb: u32,
}

/// `GET …/memory`.
pub async fn memory(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
) -> Result<Json<MachineMemory>, ApiError> {
    find(&shared.view.snapshot(), &caller, &at)?;
    Ok(Json(shared.gateway.memory(&at.id).await?))
}

/// `PUT …/memory`: the guest gives the rest back, as fast as it can, until its next cold start.
pub async fn limit_memory(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    Json(wanted): Json<MemoryLimit>,
) -> Result<Json<MachineMemory>, ApiError> {
    let limit = wanted.limit_mb;
    let most = find(&shared.view.snapshot(), &caller, &at)?
        .config
        .guest
        .memory_mb;
    if !(LEAST_MEMORY_MB..=most).contains(&limit) {
        return Err(ApiError::invalid(format!(
            "limit_mb is {limit}; {LEAST_MEMORY_MB} to {most} are possible, what the Machine has"
        )));
    }
    shared.gateway.limit_memory(&at.id, limit).await?;
    Ok(Json(shared.gateway.memory(&at.id).await?))
}

/// Which port of which Machine.
#[derive(Debug, Deserialize)]
pub struct AtPort {
    #[serde(flatten)]
    at: At,
    port: String,
}

/// `GET …/ports/{port}`: whether the running Machine takes connections there. What `tern deploy` asks of services
/// without checks.
pub async fn port(
    State(shared): State<Shared>,
    caller: Caller,
    Path(AtPort { at, port }): Path<AtPort>,
) -> Result<Json<Value>, ApiError> {
    find(&shared.view.snapshot(), &caller, &at)?;
    let number = port.parse().ok().filter(|n| *n > 0);
    let number = number.ok_or_else(|| {
        ApiError::bad_request(format!("{port:?} is no TCP port; 1 to 65535 are possible"))
    })?;
    let open = shared.gateway.accepts(&at.id, number).await?;
    Ok(Json(json!({"port": number, "open": open})))
}

/// `POST …/signal`.
pub async fn signal(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    Json(signal): Json<Signal>,
) -> Result<Json<Value>, ApiError> {
    find(&shared.view.snapshot(), &caller, &at)?;
    shared
        .gateway
        .signal(&at.id, signal.signal.number()?)
        .await?;
    Ok(super::ok())
}
