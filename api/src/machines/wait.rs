//! `GET …/wait`: answered when a Machine gets where it is awaited.

use std::time::Duration;

use axum::extract::{RawQuery, State};
use serde_json::{Value, json};
use tern_catalog::{MachineState, Snapshot};

use super::{At, find, shape};
use crate::auth::Caller;
use crate::error::ApiError;
use crate::extract::{Json, Path};
use crate::server::Shared;

/// Longest wait of one call.
pub const MOST: Duration = Duration::from_secs(60);

/// What is awaited. `state` may be given several times.
#[derive(Debug, Default)]
struct Awaited {
    states: Vec<String>,
    instance: Option<String>,
    timeout: Duration,
}

pub async fn wait(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, ApiError> {
    let awaited = Awaited::parse(query.as_deref().unwrap_or_default())?;
    let snapshot = shared.view.snapshot();
    // `destroyed` may be asked for when it is so already.
    if !awaited.is_destroyed() || snapshot.machines.contains_key(&at.id) {
        find(&snapshot, &caller, &at)?;
    } else {
        caller.app(&snapshot, &at.app)?;
    }
    let reached = shared
        .view
        .wait_for(|snapshot| awaited.reached(snapshot, &at));
    match tokio::time::timeout(awaited.timeout, reached).await {
        Ok(Ok(answer)) => Ok(Json(answer)),
        Ok(Err(error)) => Err(error),
        Err(_) => {
            let states = awaited.states.join(" or ");
            Err(ApiError::timeout(format!(
                "machine {} did not get to {states} in time",
                at.id
            )))
        }
    }
}

impl Awaited {
    fn parse(query: &str) -> Result<Self, ApiError> {
        const STATES: &[&str] = &[
            "started",
            "stopped",
            "suspended",
            "destroyed",
            "settled",
            "failed",
            "created",
        ];
        let mut awaited = Self {
            timeout: MOST,
            ..Self::default()
        };
        for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            match name {
                "state" if STATES.contains(&value) => awaited.states.push(value.to_owned()),
                "state" => {
                    let all = STATES.join(", ");
                    return Err(ApiError::bad_request(format!(
                        "\"{value}\" cannot be waited for; write one of {all}"
                    )));
                }
                "instance_id" | "version" => awaited.instance = Some(value.to_owned()),
                "timeout" => {
                    let seconds = value
                        .trim_end_matches('s')
                        .parse::<u64>()
                        .ok()
                        .filter(|s| (1..=60).contains(s));
                    awaited.timeout = seconds
                        .map(Duration::from_secs)
                        .ok_or_else(|| ApiError::bad_request("timeout is 1 to 60 seconds"))?;
                }
                _ => {}
            }
        }
        if awaited.states.is_empty() {
            awaited.states.push("started".to_owned());
        }
        Ok(awaited)
    }

    fn is_destroyed(&self) -> bool {
        self.states.iter().any(|s| s == "destroyed")
    }

    fn reached(&self, snapshot: &Snapshot, at: &At) -> Option<Result<Value, ApiError>> {
        let Some(machine) = snapshot.machines.get(&at.id) else {
            let gone = ApiError::not_found(format!("machine {}", at.id));
            let done = json!({"ok": true, "state": "destroyed"});
            return Some(if self.is_destroyed() {
                Ok(done)
            } else {
                Err(gone)
            });
        };
        let status = snapshot.machine_status.get(&at.id).map(|s| &**s);
        // The state of an older version is not what is awaited.
        let current = status.filter(|s| s.generation >= machine.desired.generation)?;
        if self
            .instance
            .as_ref()
            .is_some_and(|i| *i != machine.instance_id && *i != current.instance_id)
        {
            return None;
        }
        let state = shape::state(machine, status);
        let is = |awaited: &String| {
            awaited == state.as_str() || (awaited == "settled" && is_settled(state))
        };
        self.states.iter().any(is).then(|| {
            let event = current.events.last().map(|e| e.id.as_str());
            Ok(json!({"ok": true, "state": state, "version": machine.instance_id, "event_id": event}))
        })
    }
}

fn is_settled(state: MachineState) -> bool {
    use MachineState::{Created, Destroyed, Failed, Started, Stopped, Suspended};
    matches!(
        state,
        Created | Started | Stopped | Suspended | Failed | Destroyed
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_checked() {
        let awaited =
            Awaited::parse("state=started&state=failed&timeout=5s&instance_id=X").unwrap();
        assert_eq!(
            (awaited.states.len(), awaited.timeout),
            (2, Duration::from_secs(5))
        );
        assert_eq!(Awaited::parse("").unwrap().states, ["started"]);
        for bad in ["state=asleep", "timeout=0", "timeout=61", "timeout=x"] {
            assert!(Awaited::parse(bad).is_err(), "{bad}");
        }
    }
}
