//! Every path there is.

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{delete, get, post, put};
use http::{HeaderName, HeaderValue, StatusCode};

use crate::server::Shared;
use crate::{
    apps, certificates, forward, hosts, invites, lease, logs, machines, orgs, peers, platform,
    registry, releases, secrets, tokens, volumes,
};

/// Largest body of a call: a configuration with files in it. Images go to the registry, which streams.
const MAX_BODY_BYTES: usize = 4 << 20;

/// Tells a call in our log and the caller's.
const REQUEST_ID: HeaderName = HeaderName::from_static("fly-request-id");

pub fn router(shared: Shared) -> Router {
    let machine = Router::new()
        .route(
            "/",
            get(machines::get)
                .post(machines::update)
                .delete(machines::destroy),
        )
        .route("/start", post(machines::start))
        .route("/stop", post(machines::stop))
        .route("/restart", post(machines::restart))
        .route("/suspend", post(machines::suspend))
        .route("/signal", post(machines::signal))
        .route("/exec", post(machines::exec))
        .route("/memory", get(machines::memory).put(machines::limit_memory))
        .route("/boot-trace", get(machines::boot_trace))
        .route("/ports/{port}", get(machines::port))
        .route("/wait", get(machines::wait))
        .route("/events", get(machines::events))
        .route(
            "/metadata",
            get(machines::metadata::get_all)
                .put(machines::metadata::replace)
                .patch(machines::metadata::merge),
        )
        .route(
            "/metadata/{key}",
            get(machines::metadata::get)
                .post(machines::metadata::set)
                .delete(machines::metadata::remove),
        )
        .route("/cordon", post(machines::cordon))
        .route("/uncordon", post(machines::uncordon))
        .route(
            "/lease",
            get(machines::get_lease)
                .post(machines::take_lease)
                .delete(machines::release_lease),
        );
    let v1 = Router::new()
        .route("/apps", get(apps::list).post(apps::create))
        .route("/apps/{app}", get(apps::get).delete(apps::destroy))
        .route(
            "/apps/{app}/machines",
            get(machines::list).post(machines::create),
        )
        .nest("/apps/{app}/machines/{id}", machine)
        .route(
            "/apps/{app}/volumes",
            get(volumes::list).post(volumes::create),
        )
        .route(
            "/apps/{app}/volumes/{id}",
            get(volumes::get).delete(volumes::destroy),
        )
        .route("/apps/{app}/volumes/{id}/extend", put(volumes::extend))
        .route(
            "/apps/{app}/volumes/{id}/snapshots",
            get(volumes::snapshots::list).post(volumes::snapshots::create),
        )
        .route(
            "/apps/{app}/volumes/{id}/snapshots/{snapshot}",
            delete(volumes::snapshots::remove),
        )
        .route("/apps/{app}/certificates", get(certificates::list))
        .route("/apps/{app}/certificates/acme", post(certificates::add))
        .route(
            "/apps/{app}/certificates/{hostname}",
            get(certificates::get).delete(certificates::remove),
        )
        .route(
            "/apps/{app}/secrets",
            get(secrets::list).post(secrets::change),
        )
        .route(
            "/apps/{app}/secrets/{name}",
            get(secrets::get).post(secrets::set).delete(secrets::unset),
        )
        .route("/platform/regions", get(platform::regions))
        // From here on: what Fly.io keeps outside its Machines API.
        .route("/apps/{app}/logs", get(logs::stream))
        .route(
            "/apps/{app}/lease",
            get(lease::get).post(lease::take).delete(lease::release),
        )
        .route(
            "/apps/{app}/releases",
            get(releases::list).post(releases::create),
        )
        .route(
            "/apps/{app}/releases/{version}",
            get(releases::get).put(releases::end),
        )
        .route("/orgs", get(orgs::list).post(orgs::create))
        .route(
            "/orgs/{org}/wireguard_peers",
            get(peers::list).post(peers::create),
        )
        .route("/orgs/{org}/wireguard_peers/{name}", delete(peers::remove))
        .route("/hosts", get(hosts::list))
        .route("/hosts/invites", post(invites::create))
        .route("/hosts/{id}", get(hosts::get).delete(hosts::remove))
        .route("/hosts/{id}/cordon", post(hosts::cordon))
        .route("/hosts/{id}/uncordon", post(hosts::uncordon))
        .route("/tokens", get(tokens::list).post(tokens::create))
        .route("/tokens/{id}", delete(tokens::revoke))
        // As Fly.io's: a method that a path does not have is a path that is not there.
        .method_not_allowed_fallback(nothing_here)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES));
    Router::new()
        .nest("/v1", v1)
        .merge(registry::router())
        .route("/healthz", get(platform::health))
        .fallback(nothing_here)
        .layer(middleware::from_fn_with_state(
            shared.clone(),
            forward::to_host,
        ))
        .layer(middleware::from_fn(tell))
        .with_state(shared)
}

async fn nothing_here() -> (StatusCode, &'static str) {
    (StatusCode::NOT_FOUND, "404 page not found\n")
}

/// Gives every call an id, and tells of it when it is done.
async fn tell(request: Request, next: Next) -> Response {
    let id = hex::encode(rand::random::<[u8; 12]>());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let begun = std::time::Instant::now();
    let mut response = next.run(request).await;
    let micros = begun.elapsed().as_micros();
    tracing::debug!(%method, path, status = response.status().as_u16(), micros, id, "call");
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}
