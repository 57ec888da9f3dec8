//! What there is besides apps.

use std::collections::BTreeSet;

use axum::extract::State;
use http::StatusCode;
use serde_json::{Value, json};

use crate::extract::Json;
use crate::server::Shared;

/// `GET /healthz`: the API can answer from a catalog that is current. What of it cannot be read is told too, and
/// is no reason to ask another: all have the same.
pub async fn health(State(shared): State<Shared>) -> (StatusCode, String) {
    if shared.view.stale_for().is_some() {
        let text = "the catalog is not being followed\n".to_owned();
        return (StatusCode::SERVICE_UNAVAILABLE, text);
    }
    // Anybody may ask this: which ones they are is for the log.
    let text = match shared.view.snapshot().unreadable.len() {
        0 => "ok\n".to_owned(),
        count => format!(
            "ok, but {count} records of the catalog cannot be read, and older ones are acted on; the server's log names \
             them\n"
        ),
    };
    (StatusCode::OK, text)
}

/// `GET /v1/platform/regions`.
pub async fn regions(State(shared): State<Shared>) -> Json<Value> {
    let snapshot = shared.view.snapshot();
    let codes: BTreeSet<&str> = snapshot.hosts.values().map(|h| h.region.as_str()).collect();
    let regions: Vec<Value> = codes
        .into_iter()
        .map(|code| json!({"code": code, "name": code, "gateway_available": true, "deprecated": false}))
        .collect();
    Json(json!({"regions": regions, "nearest": shared.config.region}))
}
