//! The host names of an app and their certificates.

use axum::extract::State;
use http::StatusCode;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use tern_catalog::{
    AppName, Compare, Hostname, HostnameRoute, Op, Record as _, Snapshot, StoreError, Transaction,
};

use crate::apps;
use crate::auth::Caller;
use crate::error::ApiError;
use crate::extract::{Json, Path};
use crate::server::Shared;

#[derive(Debug, Deserialize)]
pub struct Add {
    hostname: String,
}

/// `GET …/certificates`.
pub async fn list(
    State(shared): State<Shared>,
    caller: Caller,
    Path(app): Path<AppName>,
) -> Result<Json<Value>, ApiError> {
    let snapshot = shared.view.snapshot();
    caller.app(&snapshot, &app)?;
    let mut routes: Vec<_> = snapshot
        .hostnames
        .values()
        .filter(|r| r.app == app)
        .collect();
    routes.sort_by(|a, b| (a.created_at, &a.hostname).cmp(&(b.created_at, &b.hostname)));
    let shown: Vec<Value> = routes.into_iter().map(|r| shape(&snapshot, r)).collect();
    Ok(Json(
        json!({"certificates": shown, "total_count": shown.len()}),
    ))
}

/// `GET …/certificates/{hostname}`.
pub async fn get(
    State(shared): State<Shared>,
    caller: Caller,
    Path((app, hostname)): Path<(AppName, Hostname)>,
) -> Result<Json<Value>, ApiError> {
    let snapshot = shared.view.snapshot();
    let route = find(&snapshot, &caller, &app, &hostname)?;
    Ok(Json(shape(&snapshot, route)))
}

/// `POST …/certificates/acme`.
pub async fn add(
    State(shared): State<Shared>,
    caller: Caller,
    Path(app): Path<AppName>,
    Json(add): Json<Add>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    caller.app(&shared.view.snapshot(), &app)?;
    let hostname: Hostname = add.hostname.to_ascii_lowercase().parse()?;
    if shared
        .config
        .domain
        .as_ref()
        .is_some_and(|d| hostname.as_str().ends_with(&format!(".{d}")))
    {
        // Otherwise an app could take the name that another's creation will need.
        return Err(ApiError::invalid(format!(
            "{hostname} belongs to the platform's own domain"
        )));
    }
    let route = HostnameRoute {
        hostname: hostname.clone(),
        app,
        created_at: Timestamp::now(),
    };
    let still_there = apps::still_there(&shared, &route.app).await?;
    let transaction = Transaction {
        compares: vec![Compare::absent(&route), still_there],
        ops: vec![Op::put(&route)],
    };
    match shared.catalog.store().commit(transaction).await {
        Ok(revision) => shared.seen(revision).await,
        Err(StoreError::Conflict { key }) if key == route.key() => {
            return Err(ApiError::name_taken(hostname));
        }
        Err(other) => return Err(other.into()),
    }
    Ok((
        StatusCode::CREATED,
        Json(shape(&shared.view.snapshot(), &route)),
    ))
}

/// `DELETE …/certificates/{hostname}`.
pub async fn remove(
    State(shared): State<Shared>,
    caller: Caller,
    Path((app, hostname)): Path<(AppName, Hostname)>,
) -> Result<StatusCode, ApiError> {
    find(&shared.view.snapshot(), &caller, &app, &hostname)?;
    let revision = shared
        .catalog
        .delete::<HostnameRoute>(hostname.as_str())
        .await?;
    shared.seen(revision).await;
    Ok(StatusCode::NO_CONTENT)
}

fn find<'a>(
    snapshot: &'a Snapshot,
    caller: &Caller,
    app: &AppName,
    hostname: &Hostname,
) -> Result<&'a HostnameRoute, ApiError> {
    caller.app(snapshot, app)?;
    let route = snapshot.hostnames.get(hostname).filter(|r| r.app == *app);
    route
        .map(|r| &**r)
        .ok_or_else(|| ApiError::not_found(format!("host name {hostname}")))
}

fn shape(snapshot: &Snapshot, route: &HostnameRoute) -> Value {
    let certificate = snapshot.certificates.get(&route.hostname);
    json!({
        "hostname": route.hostname,
        "status": certificate.map_or(json!("pending"), |c| json!(c.state)),
        "not_after": certificate.and_then(|c| c.not_after),
        "next_attempt": certificate.and_then(|c| c.next_attempt),
        "last_error": certificate.and_then(|c| c.last_error.as_deref()),
        "created_at": route.created_at,
    })
}
