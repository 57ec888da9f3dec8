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
    let lines = shared
        .gateway
        .logs(LogQuery {
            machines,
            follow: ask.follow,
        })
        .await?;
    let body =
        Body::from_stream(lines.map(|line| Ok::<_, std::convert::Infallible>(encode(&line))));
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

fn encode(line: &LogLine) -> Bytes {
    let mut text = serde_json::to_vec(line).unwrap_or_default();
    text.push(b'\n');
    text.into()
}
