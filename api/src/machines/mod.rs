//! Machines.

mod change;
mod checks;
mod config;
mod exec;
pub(crate) mod lease;
pub mod metadata;
pub(crate) mod place;
mod ports;
mod run;
pub(crate) mod shape;
mod wait;
mod wire;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use axum::extract::State;
use http::HeaderMap;
use serde::Deserialize;
use serde_json::{Value, json};
use tern_catalog::{AppName, DesiredState, Machine, MachineId, Snapshot};

pub use change::{create, update};
pub use exec::{exec, exec_stream};
pub use lease::{NONCE, get_lease, release_lease, take_lease};
pub use run::{boot_trace, limit_memory, memory, port, signal};
pub use wait::{MOST, wait};

use crate::auth::Caller;
use crate::error::ApiError;
use crate::extract::{self, Json, Path, Query};
use crate::server::Shared;

/// Which Machine of which app.
#[derive(Debug, Deserialize)]
pub struct At {
    app: AppName,
    id: MachineId,
}

#[derive(Debug, Default, Deserialize)]
pub struct ListQuery {
    region: Option<String>,
    state: Option<String>,
}

/// Both spellings are in use.
#[derive(Debug, Default, Deserialize)]
pub struct DestroyQuery {
    #[serde(default, alias = "kill")]
    force: bool,
}

/// How to stop: flyctl sends the Machine's id too.
#[derive(Debug, Default, Deserialize)]
pub struct Stop {
    signal: Option<SignalName>,
    timeout: Option<tern_catalog::GoDuration>,
}

#[derive(Debug, Default, Deserialize)]
pub struct RestartQuery {
    #[serde(default)]
    force_stop: bool,
}

#[derive(Debug, Default, Deserialize)]
pub struct EventsQuery {
    limit: Option<usize>,
}

/// A signal by name or number; flyctl sends both.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum SignalName {
    /// As in `signal(7)`.
    Number(i32),
    /// `SIGTERM`, or `TERM`.
    Name(String),
}

/// `GET …/machines`.
pub async fn list(
    State(shared): State<Shared>,
    caller: Caller,
    Path(app): Path<AppName>,
    Query(query): Query<ListQuery>,
    Query(all): Query<BTreeMap<String, String>>,
) -> Result<Json<Vec<Value>>, ApiError> {
    // `metadata.{key}={value}`, as often as one likes; all must hold.
    let labels: Vec<(&str, &String)> = all
        .iter()
        .filter_map(|(k, v)| Some((k.strip_prefix("metadata.")?, v)))
        .collect();
    let snapshot = shared.view.snapshot();
    caller.app(&snapshot, &app)?;
    let shown = snapshot
        .machines_of(&app)
        .filter(|(m, _)| query.region.as_ref().is_none_or(|r| *r == m.region))
        .filter(|(m, _)| {
            labels
                .iter()
                .all(|(k, v)| m.config.metadata.get(*k) == Some(*v))
        })
        .map(|(m, status)| shape::machine(m, status.map(|s| &**s)))
        .filter(|m| query.state.as_ref().is_none_or(|s| m["state"] == **s));
    Ok(Json(shown.collect()))
}

/// `GET …/machines/{id}`.
pub async fn get(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
) -> Result<Json<Value>, ApiError> {
    let snapshot = shared.view.snapshot();
    let machine = find(&snapshot, &caller, &at)?;
    Ok(Json(shape::machine(
        machine,
        snapshot.machine_status.get(&at.id).map(|s| &**s),
    )))
}

/// `GET …/events`, newest first.
pub async fn events(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    Query(query): Query<EventsQuery>,
) -> Result<Json<Vec<Value>>, ApiError> {
    let snapshot = shared.view.snapshot();
    find(&snapshot, &caller, &at)?;
    let mut events = snapshot
        .machine_status
        .get(&at.id)
        .map(|s| shape::events(s))
        .unwrap_or_default();
    events.truncate(query.limit.unwrap_or(usize::MAX));
    Ok(Json(events))
}

/// `POST …/start`.
pub async fn start(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    let snapshot = shared.view.snapshot();
    let previous = snapshot.machine_status.get(&at.id).map(|s| s.state);
    desire(&shared, &caller, &at, &headers, DesiredState::Started).await?;
    Ok(Json(json!({"previous_state": previous})))
}

/// `POST …/stop`.
pub async fn stop(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    headers: HeaderMap,
    body: bytes::Bytes,
) -> Result<Json<Value>, ApiError> {
    let stop: Stop = optional(&body)?;
    let signal = stop.signal.map(|s| s.number()).transpose()?;
    let timeout_ms = stop
        .timeout
        .map(|t| u64::try_from(t.0.as_millis()).unwrap_or(u64::MAX));
    desire(
        &shared,
        &caller,
        &at,
        &headers,
        DesiredState::Stopped { signal, timeout_ms },
    )
    .await?;
    Ok(ok())
}

/// `POST …/restart`.
pub async fn restart(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    Query(query): Query<RestartQuery>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    desire(
        &shared,
        &caller,
        &at,
        &headers,
        DesiredState::Restarted {
            force: query.force_stop,
        },
    )
    .await?;
    Ok(ok())
}

/// `POST …/suspend`.
pub async fn suspend(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    let snapshot = shared.view.snapshot();
    let machine = find(&snapshot, &caller, &at)?;
    let status = snapshot.machine_status.get(&at.id);
    let state = shape::state(machine, status.map(|s| &**s));
    // Otherwise it would be so for ever, and who waits for the sleep would as well.
    if !shape::is_running(state) && state != tern_catalog::MachineState::Suspended {
        return Err(ApiError::precondition(format!(
            "machine {} is {state}; only a started machine can be suspended",
            at.id
        )));
    }
    desire(&shared, &caller, &at, &headers, DesiredState::Suspended).await?;
    Ok(ok())
}

/// `DELETE …/machines/{id}`: answered when its host has removed it, or after the patience of `wait`.
pub async fn destroy(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    Query(query): Query<DestroyQuery>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    let snapshot = shared.view.snapshot();
    find(&snapshot, &caller, &at)?;
    let running = snapshot
        .machine_status
        .get(&at.id)
        .is_some_and(|s| shape::is_running(s.state));
    if running && !query.force {
        return Err(ApiError::precondition(format!(
            "machine {} is running; stop it first, or destroy it with ?force=true",
            at.id
        )));
    }
    desire(
        &shared,
        &caller,
        &at,
        &headers,
        DesiredState::Destroyed { force: query.force },
    )
    .await?;
    let gone = shared
        .view
        .wait_for(|s| (!s.machines.contains_key(&at.id)).then_some(()));
    match tokio::time::timeout(MOST, gone).await {
        Ok(()) => Ok(ok()),
        Err(_) => Err(ApiError::timeout(format!(
            "machine {} is being destroyed, but is not gone yet",
            at.id
        ))),
    }
}

/// `POST …/cordon`.
pub async fn cordon(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    set_cordoned(&shared, &caller, &at, &headers, true).await
}

/// `POST …/uncordon`.
pub async fn uncordon(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    set_cordoned(&shared, &caller, &at, &headers, false).await
}

async fn set_cordoned(
    shared: &Shared,
    caller: &Caller,
    at: &At,
    headers: &HeaderMap,
    cordoned: bool,
) -> Result<Json<Value>, ApiError> {
    change::edit(shared, caller, at, headers, |machine| {
        machine.cordoned = cordoned;
        Ok(())
    })
    .await?;
    Ok(ok())
}

/// Writes what is wanted of a Machine: one more wish.
async fn desire(
    shared: &Shared,
    caller: &Caller,
    at: &At,
    headers: &HeaderMap,
    state: DesiredState,
) -> Result<Machine, ApiError> {
    change::edit(shared, caller, at, headers, |machine| {
        if matches!(machine.desired.state, DesiredState::Destroyed { .. }) {
            return Err(ApiError::precondition(format!(
                "machine {} is being destroyed",
                machine.id
            )));
        }
        machine.desired.state = state.clone();
        machine.desired.generation += 1;
        Ok(())
    })
    .await
}

/// The Machine, where the caller may see it.
fn find<'a>(snapshot: &'a Snapshot, caller: &Caller, at: &At) -> Result<&'a Machine, ApiError> {
    let app = caller.app(snapshot, &at.app)?;
    let machine = snapshot.machines.get(&at.id);
    // An earlier app of this name was another owner's.
    let machine = machine.filter(|m| m.app == at.app && m.network == app.network);
    machine
        .map(|m| &**m)
        .ok_or_else(|| ApiError::not_found(format!("machine {}", at.id)))
}

/// A body that may be left out.
pub(crate) fn optional<T: serde::de::DeserializeOwned + Default>(
    body: &[u8],
) -> Result<T, ApiError> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok(T::default());
    }
    extract::read(body)
}

fn ok() -> Json<Value> {
    Json(json!({"ok": true}))
}

impl SignalName {
    /// Its number on Linux (`signal(7)`, x86).
    fn number(&self) -> Result<i32, ApiError> {
        const NAMES: &[(&str, i32)] = &[
            ("HUP", 1),
            ("INT", 2),
            ("QUIT", 3),
            ("ABRT", 6),
            ("KILL", 9),
            ("USR1", 10),
            ("USR2", 12),
            ("TERM", 15),
            ("CONT", 18),
            ("STOP", 19),
            ("WINCH", 28),
        ];
        let number = match self {
            Self::Number(n) => Some(*n).filter(|n| (1..=64).contains(n)),
            Self::Name(name) => {
                let upper = name.to_ascii_uppercase();
                let short = upper.strip_prefix("SIG").unwrap_or(&upper);
                NAMES
                    .iter()
                    .find(|(n, _)| *n == short)
                    .map(|(_, number)| *number)
            }
        };
        number.ok_or_else(|| {
            ApiError::invalid(format!(
                "there is no signal {self:?}; write for example SIGTERM"
            ))
        })
    }
}
