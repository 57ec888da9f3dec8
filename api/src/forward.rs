//! Calls that only a Machine's own host can answer, sent on to that host's API.
//!
//! The whole call goes as it is, over the mesh, to the API at the host's own address there; the caller's token is good
//! on every host, for tokens are in the catalog. A call is sent on once: a host that does not have the Machine either
//! says so. Logs are the exception: they are of several Machines, see `logs`.

use std::net::SocketAddr;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use http::header::{CONNECTION, HOST};
use http::{HeaderName, HeaderValue, Method, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tern_catalog::{HostId, Machine, MachineId};

use crate::error::ApiError;
use crate::server::Shared;

/// Says that a host has sent the call on; its value is that host.
const FORWARDED: HeaderName = HeaderName::from_static("tern-forwarded-by");
/// The port of hosts' APIs on the mesh.
pub const PORT: u16 = 4280;
/// Longest that a host may take to be reached.
const CONNECT: Duration = Duration::from_secs(5);

/// How hosts reach each other's APIs.
pub type Peers = fn(HostId) -> SocketAddr;

/// At the host's own address in the private network.
pub fn on_the_mesh(host: HostId) -> SocketAddr {
    SocketAddr::new(host.address().into(), PORT)
}

/// The way to other hosts.
#[derive(Clone)]
pub struct Forwarder {
    http: Client<HttpConnector, Body>,
    peers: Peers,
}

impl Forwarder {
    pub fn new(peers: Peers) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT));
        Self {
            http: Client::builder(TokioExecutor::new()).build(connector),
            peers,
        }
    }
}

/// Sends a Machine's call on where its host must answer it, and is another. Asked only once the call is allowed.
pub async fn to_host(State(shared): State<Shared>, request: Request, next: Next) -> Response {
    let Some(machine) = elsewhere(&shared, &request) else {
        return next.run(request).await;
    };
    if request.headers().contains_key(&FORWARDED) {
        return ApiError::unreachable(format!(
            "machine {} is on host {}, and the call was sent to host {}; try again",
            machine.id, machine.host, shared.config.host
        ))
        .into_response();
    }
    match send(&shared, machine.host, request).await {
        Ok(response) => response,
        Err(error) => ApiError::unreachable(format!(
            "machine {} is on host {}, whose API does not answer: {error}. See `tern hosts show {}`",
            machine.id, machine.host, machine.host
        ))
        .into_response(),
    }
}

/// The Machine of a call that another host must answer.
fn elsewhere(shared: &Shared, request: &Request) -> Option<std::sync::Arc<Machine>> {
    let path = request.uri().path().strip_prefix("/v1/apps/")?;
    let (app, path) = path.split_once("/machines/")?;
    let mut parts = path.split('/');
    let (id, what) = (parts.next()?, parts.next().unwrap_or_default());
    if !needs_host(request.method(), what) {
        return None;
    }
    let id: MachineId = id.parse().ok()?;
    let snapshot = shared.view.snapshot();
    let machine = snapshot.machines.get(&id)?;
    // The caller may do this to the app of the path. Of other apps' Machines nothing is told, their hosts neither.
    (machine.app.as_str() == app && machine.host != shared.config.host).then(|| machine.clone())
}

/// Whether a call asks the agent, and does not only read or write the catalog.
fn needs_host(method: &Method, what: &str) -> bool {
    match what {
        // An update has the image on the Machine's host first.
        "" => method == Method::POST,
        "exec" | "signal" | "memory" | "boot-trace" | "ports" => true,
        _ => false,
    }
}

async fn send(
    shared: &Shared,
    host: HostId,
    request: Request,
) -> Result<Response, hyper_util::client::legacy::Error> {
    let (mut parts, body) = request.into_parts();
    let address = (shared.forwarder.peers)(host);
    let path = parts.uri.path_and_query().map_or("/", |p| p.as_str());
    parts.uri = Uri::builder()
        .scheme("http")
        .authority(address.to_string())
        .path_and_query(path)
        .build()
        .unwrap_or_default();
    parts.extensions.clear();
    for hop in [HOST, CONNECTION] {
        parts.headers.remove(hop);
    }
    let by = HeaderValue::from(shared.config.host.0);
    parts.headers.insert(FORWARDED, by);
    let sent = Request::from_parts(parts, body);
    let answer = shared.forwarder.http.request(sent).await?;
    Ok(answer.map(Body::new))
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tern_catalog::HostId;

    use super::*;
    use crate::testing::World;

    #[test]
    fn what_only_the_host_can_answer_is_known() {
        for (method, what, needs) in [
            (Method::POST, "", true),
            (Method::GET, "", false),
            (Method::DELETE, "", false),
            (Method::POST, "exec", true),
            (Method::GET, "ports", true),
            (Method::POST, "start", false),
            (Method::GET, "wait", false),
            (Method::POST, "lease", false),
        ] {
            assert_eq!(needs_host(&method, what), needs, "{method} {what}");
        }
    }

    #[tokio::test]
    async fn a_call_for_another_hosts_machine_is_answered_by_that_host() {
        let mut world = World::new().await;
        world.host(2, "local", 1 << 16).await;
        world.app("shop").await;
        world.post("/v1/hosts/1/cordon", json!({})).await;
        let id = world.machine("shop").await;
        let exec = format!("/v1/apps/shop/machines/{id}/exec");
        let command = json!({"command": ["echo", "hello"]});
        // Nobody answers for host 2 yet.
        let refused = world.post(&exec, command.clone()).await;
        let said = refused.json()["error"].to_string();
        assert_eq!(refused.status, http::StatusCode::BAD_GATEWAY, "{said}");
        assert!(said.contains("is on host 2"), "{said}");
        // Two hosts, one catalog.
        let second = world.as_host(HostId(2)).await;
        let answer = world.post(&exec, command.clone()).await;
        assert_eq!(answer.json()["stdout"], "echo|hello", "{answer:?}");
        assert_eq!(second.gateway.commands(), 1);
        assert_eq!(world.gateway.commands(), 0, "host 1 was not asked");
        let update = format!("/v1/apps/shop/machines/{id}");
        let config = json!({"config": {"image": "example.com/x:2"}});
        let answer = world.post(&update, config).await;
        assert_eq!(answer.json()["config"]["image"], "example.com/x:2");
        assert_eq!(second.gateway.prepared.lock().len(), 1);
        // A stranger's call goes nowhere.
        let body = command.to_string();
        let refused = world.call("wrong", Method::POST, &exec, body).await;
        assert_eq!(refused.status, http::StatusCode::UNAUTHORIZED);
        assert_eq!(second.gateway.commands(), 1);
    }
}
