//! `GET /v1/apps/{app}/logs`: one JSON object a line.

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::StreamExt as _;
use http::header::CONTENT_TYPE;
use serde::Deserialize;
use tern_catalog::{AppName, MachineId};

use crate::auth::Caller;
use crate::error::ApiError;
use crate::extract::{Path, Query};
use crate::gateway::{LogLine, LogQuery};
use crate::server::Shared;

#[derive(Debug, Default, Deserialize)]
pub struct Ask {
    #[serde(default)]
    follow: bool,
    machine: Option<MachineId>,
}

pub async fn stream(
    State(shared): State<Shared>,
    caller: Caller,
    Path(app): Path<AppName>,
    Query(ask): Query<Ask>,
) -> Result<Response, ApiError> {
    let snapshot = shared.view.snapshot();
    caller.app(&snapshot, &app)?;
    let mut machines: Vec<MachineId> = snapshot
        .machines_of(&app)
        .map(|(m, _)| m.id.clone())
        .collect();
    if let Some(only) = &ask.machine {
        machines.retain(|id| id == only);
        if machines.is_empty() {
            return Err(ApiError::not_found(format!("machine {only}")));
        }
    }
    // Another host's are not there to be merged: each of its Machines has a line that says where.
    let elsewhere: Vec<LogLine> = machines
        .iter()
        .filter_map(|id| snapshot.machines.get(id))
        .filter(|m| m.host != shared.config.host)
        .map(|m| LogLine {
            machine: m.id.clone(),
            unix_ms: jiff::Timestamp::now().as_millisecond(),
            stream: "tern".to_owned(),
            line: format!(
                "this Machine is on host {0}: ask the API of host {0} for what it prints",
                m.host
            ),
        })
        .collect();
    machines.retain(|id| !elsewhere.iter().any(|line| line.machine == *id));
    let lines = shared
        .gateway
        .logs(LogQuery {
            machines,
            follow: ask.follow,
        })
        .await?;
    let lines = futures::stream::iter(elsewhere).chain(lines);
    let body =
        Body::from_stream(lines.map(|line| Ok::<_, std::convert::Infallible>(encode(&line))));
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

fn encode(line: &LogLine) -> Bytes {
    let mut text = serde_json::to_vec(line).unwrap_or_default();
    text.push(b'\n');
    text.into()
}
