//! Hosts: who is there, what they have, and which of them get new Machines. For the operator's token alone.

use axum::extract::State;
use http::StatusCode;
use jiff::Timestamp;
use serde_json::{Value, json};
use tern_catalog::{
    Compare, Host, HostCordon, HostId, HostStatus, Machine, Op, Peer, Record as _, Snapshot,
    Transaction, Volume,
};

use crate::error::ApiError;
use crate::extract::{Json, Path};
use crate::machines::shape as machine_shape;
use crate::server::Shared;

/// Most names that a refusal lists.
const MAX_NAMED: usize = 10;

/// `GET /v1/hosts`.
pub async fn list(State(shared): State<Shared>) -> Result<Json<Value>, ApiError> {
    let snapshot = shared.view.snapshot();
    let hosts: Vec<Value> = snapshot
        .hosts
        .values()
        .map(|h| shape(&snapshot, h))
        .collect();
    Ok(Json(json!({"hosts": hosts})))
}

/// `GET /v1/hosts/{id}`: with what is on it.
pub async fn get(
    State(shared): State<Shared>,
    Path(id): Path<u32>,
) -> Result<Json<Value>, ApiError> {
    let snapshot = shared.view.snapshot();
    let host = find(&snapshot, HostId(id))?;
    let mut shown = shape(&snapshot, host);
    let machine = |m: &std::sync::Arc<Machine>| {
        let status = snapshot.machine_status.get(&m.id).map(|s| &**s);
        json!({
            "id": m.id, "app": m.app, "name": m.name, "state": machine_shape::state(m, status),
            "memory_mb": m.config.guest.memory_mb,
        })
    };
    let machines = snapshot.machines.values().filter(|m| m.host == host.id);
    shown["machines"] = machines.map(machine).collect();
    let volumes = snapshot.volumes.values().filter(|v| v.host == host.id);
    shown["volumes"] = volumes
        .map(|v| json!({"id": v.id, "app": v.app, "name": v.name, "size_gb": v.size_gb}))
        .collect();
    Ok(Json(shown))
}

/// `POST /v1/hosts/{id}/cordon`: no new Machines. Those that are there go on, and start and stop as before.
pub async fn cordon(
    State(shared): State<Shared>,
    Path(id): Path<u32>,
) -> Result<Json<Value>, ApiError> {
    let id = find(&shared.view.snapshot(), HostId(id))?.id;
    let cordon = HostCordon {
        id,
        since: Timestamp::now(),
    };
    let revision = match shared.catalog.create(&cordon).await {
        Err(tern_catalog::CatalogError::Exists(_)) => 0,
        other => other?,
    };
    shared.seen(revision).await;
    let snapshot = shared.view.snapshot();
    Ok(Json(shape(&snapshot, find(&snapshot, id)?)))
}

/// `POST /v1/hosts/{id}/uncordon`.
pub async fn uncordon(
    State(shared): State<Shared>,
    Path(id): Path<u32>,
) -> Result<Json<Value>, ApiError> {
    let id = find(&shared.view.snapshot(), HostId(id))?.id;
    let revision = shared.catalog.delete::<HostCordon>(&id.to_string()).await?;
    shared.seen(revision).await;
    let snapshot = shared.view.snapshot();
    Ok(Json(shape(&snapshot, find(&snapshot, id)?)))
}

/// `DELETE /v1/hosts/{id}`: a host that is cordoned, down and empty is forgotten. Its number is not used again.
///
/// The cordon's record is what makes it sound: a Machine is placed only while there is none ([`still_open`]), so all
/// that was placed before it is in the store when it is listed here, and an uncordon meanwhile makes this fail.
///
/// [`still_open`]: crate::machines::place::still_open
pub async fn remove(
    State(shared): State<Shared>,
    Path(id): Path<u32>,
) -> Result<StatusCode, ApiError> {
    let id = HostId(id);
    let catalog = &shared.catalog;
    let found = catalog.get::<Host>(&id.to_string()).await?;
    let (host, host_at) = found.ok_or_else(|| ApiError::not_found(format!("host {id}")))?;
    let cordon = catalog.get::<HostCordon>(&id.to_string()).await?;
    let (cordon, cordon_at) = cordon.ok_or_else(|| {
        ApiError::precondition(format!(
            "host {id} is not cordoned and may get Machines; `tern hosts cordon {id}` first"
        ))
    })?;
    let machines = catalog.list::<Machine>().await?;
    let machines = machines.iter().filter(|m| m.host == id);
    let mut there: Vec<String> = machines
        .map(|m| format!("machine {} of {}", m.id, m.app))
        .collect();
    let volumes = catalog.list::<Volume>().await?;
    let volumes = volumes.iter().filter(|v| v.host == id);
    there.extend(volumes.map(|v| format!("volume {} of {}", v.id, v.app)));
    let peers = catalog.list::<Peer>().await?;
    let peers = peers.iter().filter(|p| p.host == id);
    there.extend(peers.map(|p| format!("WireGuard peer {} of {}", p.name, p.organization)));
    if !there.is_empty() {
        let more = there.len().saturating_sub(MAX_NAMED);
        there.truncate(MAX_NAMED);
        if more > 0 {
            there.push(format!("{more} more"));
        }
        return Err(ApiError::precondition(format!(
            "host {id} still has {}: destroy these first, or deploy their apps anew",
            there.join(", ")
        )));
    }
    if shared.view.snapshot().host_alive.contains_key(&id) {
        return Err(ApiError::precondition(format!(
            "host {id} is alive: stop its `tern serve` for good first"
        )));
    }
    let at = |key: String, revision| Compare {
        key,
        revision: Some(revision),
    };
    let delete = |key: String| Op::Delete { key };
    let transaction = Transaction {
        compares: vec![at(host.key(), host_at), at(cordon.key(), cordon_at)],
        ops: vec![
            delete(host.key()),
            delete(cordon.key()),
            delete(HostStatus::key_of(&id.to_string())),
        ],
    };
    let revision = catalog.store().commit(transaction).await?;
    shared.seen(revision).await;
    Ok(StatusCode::NO_CONTENT)
}

fn find(snapshot: &Snapshot, id: HostId) -> Result<&Host, ApiError> {
    let host = snapshot.hosts.get(&id).map(|h| &**h);
    host.ok_or_else(|| ApiError::not_found(format!("host {id}")))
}

/// A host as the API shows it.
///
/// `state`: `alive`, `unreachable` (its `tern serve` is not heard; its Machines may run), `draining` (cordoned, and
/// something is still there) or `cordoned` (and empty).
fn shape(snapshot: &Snapshot, host: &Host) -> Value {
    let status = snapshot.host_status.get(&host.id);
    let alive = snapshot.host_alive.get(&host.id);
    let cordon = snapshot.host_cordons.get(&host.id);
    let machines = snapshot.machines.values().filter(|m| m.host == host.id);
    let volumes = snapshot.volumes.values().filter(|v| v.host == host.id);
    let (machines, volumes) = (machines.count(), volumes.count());
    let state = match (alive, cordon) {
        (None, _) => "unreachable",
        (Some(_), None) => "alive",
        (Some(_), Some(_)) if machines + volumes > 0 => "draining",
        (Some(_), Some(_)) => "cordoned",
    };
    json!({
        "id": host.id,
        "name": host.name,
        "region": host.region,
        "state": state,
        "alive_since": alive.map(|a| a.since),
        "unreachable_since": alive.is_none().then_some(status.map(|s| s.seen_at)).flatten(),
        "cordoned_since": cordon.map(|c| c.since),
        "version": status.map(|s| &s.version),
        "memory_mib": status.map(|s| json!({"all": s.all.memory_mib, "taken": s.taken.memory_mib})),
        "cpus": status.map(|s| json!({"all": s.all.cpus(), "taken": s.taken.cpus()})),
        "machine_count": machines,
        "volume_count": volumes,
        "endpoint": host.endpoint,
        "public_key": host.public_key,
        "started_at": host.started_at,
    })
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use http::Method;
    use tern_catalog::HostAlive;

    use super::*;
    use crate::testing::{ADMIN, RIVAL, World};

    async fn second_host(world: &World) {
        world.host(2, "local", 4096).await;
    }

    #[tokio::test]
    async fn hosts_are_the_operators_and_show_what_they_have() {
        let world = World::new().await;
        second_host(&world).await;
        let refused = world
            .call(RIVAL, Method::GET, "/v1/hosts", Body::empty())
            .await;
        assert_eq!(refused.status, StatusCode::FORBIDDEN);
        let hosts = world.get("/v1/hosts").await.json();
        assert_eq!(hosts["hosts"].as_array().unwrap().len(), 2);
        let one = &hosts["hosts"][1];
        assert_eq!(one["state"], "alive");
        assert_eq!(one["memory_mib"], json!({"all": 4096, "taken": 0}));
        let gone = world.catalog.delete::<HostAlive>("2").await.unwrap();
        world.shared.seen(gone).await;
        let host = world.get("/v1/hosts/2").await.json();
        assert_eq!(host["state"], "unreachable");
        assert!(host["unreachable_since"].is_string(), "{host}");
    }

    #[tokio::test]
    async fn a_cordoned_host_gets_no_machines_and_one_that_is_away_neither() {
        let world = World::new().await;
        second_host(&world).await;
        world.app("shop").await;
        let on = async |id: &str| {
            let machine = world.catalog.get::<Machine>(id).await.unwrap().unwrap();
            machine.0.host.0
        };
        let (first, second) = (world.machine("shop").await, world.machine("shop").await);
        assert_ne!(on(&first).await, on(&second).await, "they spread");
        let answer = world.post("/v1/hosts/1/cordon", json!({})).await;
        assert_eq!(answer.json()["state"], "draining");
        for _ in 0..3 {
            let id = world.machine("shop").await;
            assert_eq!(on(&id).await, 2);
        }
        let gone = world.catalog.delete::<HostAlive>("2").await.unwrap();
        world.shared.seen(gone).await;
        let body = json!({"config": {"image": "example.com/x:1"}});
        let refused = world.post("/v1/apps/shop/machines", body.clone()).await;
        let said = refused.json()["error"].to_string();
        assert_eq!(refused.json()["status"], "insufficient_capacity");
        assert!(said.contains("host 1 (one) is cordoned"), "{said}");
        assert!(said.contains("host 2 (h2) is unreachable since"), "{said}");
        world.post("/v1/hosts/1/uncordon", json!({})).await;
        let id = world.machine("shop").await;
        assert_eq!(on(&id).await, 1);
    }

    #[tokio::test]
    async fn a_host_is_removed_only_when_nothing_is_on_it_and_it_is_down() {
        let world = World::new().await;
        second_host(&world).await;
        world.app("shop").await;
        let remove = async || {
            let answer = world
                .call(ADMIN, Method::DELETE, "/v1/hosts/2", Body::empty())
                .await;
            let text = String::from_utf8_lossy(&answer.body).into_owned();
            (answer.status, text)
        };
        let volume = json!({"name": "data", "region": "local"});
        world.post("/v1/hosts/1/cordon", json!({})).await;
        let volume = world.post("/v1/apps/shop/volumes", volume).await.json();
        let machine = world.machine("shop").await;
        assert!(remove().await.1.contains("is not cordoned"));
        world.post("/v1/hosts/2/cordon", json!({})).await;
        let (status, said) = remove().await;
        assert_eq!(status, StatusCode::PRECONDITION_FAILED);
        assert!(
            said.contains(&format!("machine {machine} of shop")),
            "{said}"
        );
        let volume = volume["id"].as_str().unwrap();
        assert!(said.contains(&format!("volume {volume} of shop")), "{said}");
        for path in [
            format!("/v1/apps/shop/machines/{machine}?force=true"),
            format!("/v1/apps/shop/volumes/{volume}"),
        ] {
            let answer = world
                .call(ADMIN, Method::DELETE, &path, Body::empty())
                .await;
            assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        }
        assert!(remove().await.1.contains("is alive"));
        let gone = world.catalog.delete::<HostAlive>("2").await.unwrap();
        world.shared.seen(gone).await;
        assert_eq!(remove().await.0, StatusCode::NO_CONTENT);
        assert_eq!(remove().await.0, StatusCode::NOT_FOUND);
    }

    #[tokio::test]
    async fn an_invite_is_the_operators_to_make_and_lasts_a_day_at_most() {
        let world = World::new().await;
        let invite = async |token: &str, body: Value| {
            let path = "/v1/hosts/invites";
            let answer = world.call(token, Method::POST, path, body.to_string());
            answer.await
        };
        let body = json!({"region": "ams"});
        let made = invite(ADMIN, body.clone()).await;
        assert_eq!(made.status, StatusCode::CREATED);
        assert_eq!(made.json()["join"], "address/fingerprint/secret");
        assert_eq!(invite(RIVAL, body).await.status, StatusCode::FORBIDDEN);
        for ttl in [0, 59, 86_401] {
            let refused = invite(ADMIN, json!({"region": "ams", "ttl_seconds": ttl})).await;
            assert_eq!(refused.status, StatusCode::UNPROCESSABLE_ENTITY, "{ttl}");
        }
        let refused = invite(ADMIN, json!({})).await;
        assert_eq!(refused.status, StatusCode::PRECONDITION_FAILED);
        assert_eq!(refused.json()["error"], "no region");
    }

    #[tokio::test]
    async fn what_is_too_large_for_every_host_is_refused_with_what_they_have() {
        let world = World::new().await;
        world.app("shop").await;
        let config =
            json!({"image": "example.com/x:1", "guest": {"memory_mb": 1 << 17, "cpus": 8}});
        let refused = world
            .post("/v1/apps/shop/machines", json!({"config": config}))
            .await;
        let said = refused.json()["error"].to_string();
        assert_eq!(refused.json()["status"], "insufficient_capacity", "{said}");
        assert!(
            said.contains("host 1 (one) has 65536 MiB of memory"),
            "{said}"
        );
    }
}
