//! Organizations. Making one makes its network.

use axum::extract::State;
use http::StatusCode;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use tern_catalog::{Compare, Network, Op, Organization, StoreError, Transaction};

use crate::auth::Caller;
use crate::error::ApiError;
use crate::extract::Json;
use crate::number;
use crate::server::Shared;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Create {
    slug: String,
    name: Option<String>,
}

/// `GET /v1/orgs`.
pub async fn list(State(shared): State<Shared>, caller: Caller) -> Json<Value> {
    let snapshot = shared.view.snapshot();
    let mut orgs: Vec<_> = snapshot
        .organizations
        .values()
        .filter(|o| caller.sees_organization(&o.slug))
        .collect();
    orgs.sort_by(|a, b| a.slug.cmp(&b.slug));
    Json(json!({"organizations": orgs.into_iter().map(|o| shape(o)).collect::<Vec<_>>()}))
}

/// `POST /v1/orgs`.
pub async fn create(
    State(shared): State<Shared>,
    Json(create): Json<Create>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let slug: tern_catalog::OrgSlug = create.slug.parse()?;
    let snapshot = shared.view.snapshot();
    if snapshot.organizations.contains_key(&slug) {
        return Err(ApiError::name_taken(format!("organization {slug}")));
    }
    let id = number::next_network(&**shared.catalog.store(), &snapshot).await?;
    let network = Network {
        id,
        organization: slug.clone(),
        name: "default".to_owned(),
    };
    let organization = Organization {
        name: create.name.unwrap_or_else(|| slug.to_string()),
        slug: slug.clone(),
        default_network: id,
        created_at: Timestamp::now(),
    };
    let transaction = Transaction {
        compares: vec![Compare::absent(&organization), Compare::absent(&network)],
        ops: vec![Op::put(&organization), Op::put(&network)],
    };
    match shared.catalog.store().commit(transaction).await {
        Ok(revision) => shared.seen(revision).await,
        Err(StoreError::Conflict { .. }) => {
            return Err(ApiError::name_taken(format!("organization {slug}")));
        }
        Err(other) => return Err(other.into()),
    }
    Ok((StatusCode::CREATED, Json(shape(&organization))))
}

fn shape(organization: &Organization) -> Value {
    json!({
        "slug": organization.slug,
        "name": organization.name,
        "network": organization.default_network.prefix().to_string(),
        "created_at": organization.created_at,
    })
}
