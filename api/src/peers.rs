//! WireGuard peers: laptops that join an organization's network.

use axum::extract::State;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::StatusCode;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use tern_catalog::{
    CatalogError, Host, OrgSlug, Peer, PeerName, PrivateAddress, Record as _, Snapshot,
};

use crate::error::ApiError;
use crate::extract::{Json, Path};
use crate::number;
use crate::server::Shared;

/// Length of a Curve25519 public key.
const KEY_BYTES: usize = 32;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Create {
    name: String,
    /// Base64. The private key stays with the laptop.
    public_key: String,
    region: Option<String>,
}

/// `GET /v1/orgs/{org}/wireguard_peers`.
pub async fn list(
    State(shared): State<Shared>,
    Path(org): Path<OrgSlug>,
) -> Result<Json<Value>, ApiError> {
    let snapshot = shared.view.snapshot();
    let peers: Vec<Value> = snapshot
        .peers
        .values()
        .filter(|p| p.organization == org)
        .map(|p| shape(&snapshot, p))
        .collect();
    Ok(Json(json!({"peers": peers})))
}

/// `POST /v1/orgs/{org}/wireguard_peers`.
pub async fn create(
    State(shared): State<Shared>,
    Path(org): Path<OrgSlug>,
    Json(create): Json<Create>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let name: PeerName = create.name.parse()?;
    if STANDARD.decode(&create.public_key).map(|k| k.len()) != Ok(KEY_BYTES) {
        return Err(ApiError::invalid(
            "public_key is not a WireGuard key: 32 bytes in base64",
        ));
    }
    let snapshot = shared.view.snapshot();
    let organization = snapshot
        .organizations
        .get(&org)
        .ok_or_else(|| ApiError::not_found(format!("organization {org}")))?;
    if snapshot
        .peers
        .values()
        .any(|p| p.public_key == create.public_key)
    {
        return Err(ApiError::invalid(
            "another peer has this public key; make a new one",
        ));
    }
    let region = create.region.as_deref().unwrap_or(&shared.config.region);
    let host = gateway_in(&snapshot, region)?;
    let network = organization.default_network;
    let number = number::next_in_network(&**shared.catalog.store(), network).await?;
    let peer = Peer {
        name,
        organization: org,
        network,
        host: host.id,
        number,
        address: PrivateAddress::of_peer(network, host.id, number),
        public_key: create.public_key,
        created_at: Timestamp::now(),
    };
    match shared.catalog.create(&peer).await {
        Ok(revision) => shared.seen(revision).await,
        Err(CatalogError::Exists(_)) => {
            return Err(ApiError::name_taken(format!("peer name {}", peer.name)));
        }
        Err(other) => return Err(other.into()),
    }
    Ok((
        StatusCode::CREATED,
        Json(shape(&shared.view.snapshot(), &peer)),
    ))
}

/// `DELETE /v1/orgs/{org}/wireguard_peers/{name}`.
pub async fn remove(
    State(shared): State<Shared>,
    Path((org, name)): Path<(OrgSlug, PeerName)>,
) -> Result<StatusCode, ApiError> {
    let snapshot = shared.view.snapshot();
    let mut found = snapshot
        .peers
        .values()
        .filter(|p| p.organization == org && p.name == name);
    let peer = found
        .next()
        .ok_or_else(|| ApiError::not_found(format!("peer {name}")))?;
    let revision = shared.catalog.delete::<Peer>(&peer.id()).await?;
    shared.seen(revision).await;
    Ok(StatusCode::NO_CONTENT)
}

/// The host of a region that a laptop connects to: one that is there, before one that is not or gets nothing new.
fn gateway_in<'a>(snapshot: &'a Snapshot, region: &str) -> Result<&'a Host, ApiError> {
    let here = snapshot.hosts.values().filter(|h| h.region == region);
    let rank = |h: &&std::sync::Arc<Host>| {
        let away = !snapshot.host_alive.contains_key(&h.id);
        (away, snapshot.host_cordons.contains_key(&h.id), h.id)
    };
    let host = here.min_by_key(rank).map(|h| &**h);
    host.ok_or_else(|| ApiError::no_capacity(format!("no host is in region \"{region}\"")))
}

/// A peer with all that its client's configuration needs.
fn shape(snapshot: &Snapshot, peer: &Peer) -> Value {
    let host: Option<&Host> = snapshot.hosts.get(&peer.host).map(|h| &**h);
    json!({
        "name": peer.name,
        "organization": peer.organization,
        "address": format!("{}/120", peer.address),
        "allowed_ips": peer.network.prefix().to_string(),
        "dns": peer.network.resolver(),
        "endpoint": host.map(|h| h.endpoint),
        "server_public_key": host.map(|h| &h.public_key),
        "public_key": peer.public_key,
        "region": host.map(|h| &h.region),
        "created_at": peer.created_at,
    })
}
