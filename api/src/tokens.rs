//! Tokens.

use axum::extract::State;
use http::StatusCode;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use tern_catalog::{OrgSlug, Token};

use crate::auth::{Caller, token_hash};
use crate::error::ApiError;
use crate::extract::{Json, Path};
use crate::server::Shared;

/// Digits of a token's hash that name it to people; enough to be unique.
const ID_DIGITS: usize = 16;
/// Randomness of a token.
const TOKEN_BYTES: usize = 32;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Create {
    name: String,
    org_slug: Option<OrgSlug>,
}

/// `GET /v1/tokens`.
pub async fn list(State(shared): State<Shared>, caller: Caller) -> Json<Value> {
    let snapshot = shared.view.snapshot();
    let mut tokens: Vec<_> = snapshot
        .tokens
        .values()
        .filter(|t| sees(&caller, t))
        .collect();
    tokens.sort_by_key(|t| t.created_at);
    Json(json!({"tokens": tokens.into_iter().map(|t| shape(t)).collect::<Vec<_>>()}))
}

/// `POST /v1/tokens`: the only answer that ever holds the token.
pub async fn create(
    State(shared): State<Shared>,
    caller: Caller,
    Json(create): Json<Create>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    match &create.org_slug {
        Some(org) => {
            caller.must(org)?;
            if !shared.view.snapshot().organizations.contains_key(org) {
                return Err(ApiError::not_found(format!("organization {org}")));
            }
        }
        None => caller.must_be_admin()?,
    }
    let token = format!("tern_{}", hex::encode(rand::random::<[u8; TOKEN_BYTES]>()));
    let record = Token {
        hash: token_hash(&token),
        name: create.name.chars().take(100).collect(),
        organization: create.org_slug,
        created_at: Timestamp::now(),
    };
    let revision = shared.catalog.create(&record).await?;
    shared.seen(revision).await;
    let mut shown = shape(&record);
    shown["token"] = json!(token);
    Ok((StatusCode::CREATED, Json(shown)))
}

/// `DELETE /v1/tokens/{id}`.
pub async fn revoke(
    State(shared): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    let snapshot = shared.view.snapshot();
    let found = snapshot
        .tokens
        .values()
        .find(|t| id.len() >= ID_DIGITS && t.hash.starts_with(&id));
    let token = found
        .filter(|t| sees(&caller, t))
        .ok_or_else(|| ApiError::not_found(format!("token {id}")))?;
    let revision = shared.catalog.delete::<Token>(&token.hash).await?;
    shared.seen(revision).await;
    Ok(StatusCode::NO_CONTENT)
}

fn sees(caller: &Caller, token: &Token) -> bool {
    token
        .organization
        .as_ref()
        .map_or(caller.is_admin(), |org| caller.may(org))
}

fn shape(token: &Token) -> Value {
    json!({
        "id": token.hash.get(..ID_DIGITS),
        "name": token.name,
        "org_slug": token.organization,
        "created_at": token.created_at,
    })
}
