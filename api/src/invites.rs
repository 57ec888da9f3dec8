//! `POST /v1/hosts/invites`: lets one more server into the cloud. For the operator's token alone.

use std::fmt::Debug;
use std::time::Duration;

use async_trait::async_trait;
use axum::extract::State;
use http::StatusCode;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::extract::Json;
use crate::server::Shared;

const DEFAULT_TTL: Duration = Duration::from_secs(3600);
/// An invite holds what all secrets of the cloud hang on: it does not lie about for days.
const MAX_TTL: Duration = Duration::from_secs(24 * 3600);
const MIN_TTL: Duration = Duration::from_secs(60);

/// Makes invites. `tern serve` implements it.
#[async_trait]
pub trait Inviter: Debug + Send + Sync {
    /// An invite that is good once and for this long; a new server without a region of its own gets this one, or else
    /// this host's. An error is for the caller.
    async fn invite(&self, region: Option<String>, time: Duration) -> Result<Invitation, String>;
}

/// What lets a server in.
#[derive(Debug, Clone)]
pub struct Invitation {
    /// For `tern serve --join`: a secret.
    pub join: String,
    /// The region that the server gets.
    pub region: String,
    /// Until when it is good.
    pub expires_at: Timestamp,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Create {
    region: Option<String>,
    ttl_seconds: Option<u64>,
}

/// `POST /v1/hosts/invites`: the only answer that ever holds the secret.
pub async fn create(
    State(shared): State<Shared>,
    Json(create): Json<Create>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let time = create.ttl_seconds.map_or(DEFAULT_TTL, Duration::from_secs);
    if !(MIN_TTL..=MAX_TTL).contains(&time) {
        return Err(ApiError::invalid(format!(
            "ttl_seconds is {}; {} to {} are possible",
            time.as_secs(),
            MIN_TTL.as_secs(),
            MAX_TTL.as_secs()
        )));
    }
    let made = shared.config.inviter.invite(create.region, time).await;
    let made = made.map_err(ApiError::precondition)?;
    let body = json!({"join": made.join, "region": made.region, "expires_at": made.expires_at});
    Ok((StatusCode::CREATED, Json(body)))
}
