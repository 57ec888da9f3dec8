//! What there is besides apps.

use std::collections::BTreeSet;

use axum::extract::State;
use http::StatusCode;
use serde_json::{Value, json};

use crate::extract::Json;
use crate::server::Shared;

/// `GET /healthz`: the API can answer from a catalog that is current.
pub async fn health(State(shared): State<Shared>) -> (StatusCode, &'static str) {
    match shared.view.stale_for() {
        None => (StatusCode::OK, "ok\n"),
        Some(_) => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the catalog is not being followed\n",
        ),
    }
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
