//! Every path there is, and what each needs of who calls it.
//!
//! A route is declared with its right or not at all, and [`authorize`] is asked before its handler sees the request.

use axum::extract::{DefaultBodyLimit, FromRequestParts as _, RawPathParams, Request, State};
use axum::handler::Handler;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{MethodFilter, MethodRouter, on};
use axum::{Router, body::Body};
use http::header::AUTHORIZATION;
use http::{HeaderName, HeaderValue, StatusCode};
use jiff::Timestamp;
use serde::Deserialize;
use tern_catalog::OrgSlug;

use crate::auth::authorize;
use crate::error::ApiError;
use crate::extract;
use crate::registry::{Refusal, blobs, manifests, uploads};
use crate::rights::AppRight::{Deploy, Exec, Manage, Pull, Read};
use crate::rights::Right::{App, Known, Organization, OrganizationInBody, Own, Platform, Public};
use crate::rights::{Denied, OrganizationRight, Right};
use crate::server::Shared;
use crate::{
    apps, certificates, forward, hosts, invites, lease, logs, machines, orgs, peers, platform,
    registry, releases, secrets, tokens, volumes,
};

/// Largest body of a call: a configuration with files in it, or a manifest, of which the registry's specification asks
/// for 4 MiB. Images go to the registry's uploads, which stream.
const MAX_BODY_BYTES: usize = 4 << 20;

/// Tells a call in our log and the caller's.
const REQUEST_ID: HeaderName = HeaderName::from_static("fly-request-id");

/// What the paths of one Machine begin with.
const MACHINE: &str = "/v1/apps/{app}/machines/{id}";
/// What the registry's paths begin with.
const REGISTRY: &str = "/v2/";

/// A method of a path, what it needs, and what answers it.
pub struct Route {
    #[cfg_attr(
        not(test),
        expect(
            dead_code,
            reason = "the handler knows it; the walk over all routes reads it"
        )
    )]
    pub method: &'static str,
    pub path: &'static str,
    pub right: Right,
    handler: MethodRouter<Shared>,
}

/// All of them.
pub fn table() -> Vec<Route> {
    let mut table = machine_routes();
    table.extend(app_routes());
    table.extend(registry_routes());
    table.extend([
        get("/healthz", Public, platform::health),
        get("/v1/platform/regions", Own, platform::regions),
        get("/v1/apps", Own, apps::list),
        post(
            "/v1/apps",
            OrganizationInBody(OrganizationRight::Write),
            apps::create,
        ),
        // What Fly.io keeps outside its Machines API.
        get("/v1/orgs", Own, orgs::list),
        post("/v1/orgs", Platform, orgs::create),
        get(
            "/v1/orgs/{org}/wireguard_peers",
            Organization(OrganizationRight::Read),
            peers::list,
        ),
        post(
            "/v1/orgs/{org}/wireguard_peers",
            Organization(OrganizationRight::Write),
            peers::create,
        ),
        delete(
            "/v1/orgs/{org}/wireguard_peers/{name}",
            Organization(OrganizationRight::Write),
            peers::remove,
        ),
        get("/v1/hosts", Platform, hosts::list),
        post("/v1/hosts/invites", Platform, invites::create),
        get("/v1/hosts/{id}", Platform, hosts::get),
        delete("/v1/hosts/{id}", Platform, hosts::remove),
        post("/v1/hosts/{id}/cordon", Platform, hosts::cordon),
        post("/v1/hosts/{id}/uncordon", Platform, hosts::uncordon),
        // Which tokens: `tokens.rs` asks what the caller's own covers.
        get("/v1/tokens", Own, tokens::list),
        get("/v1/tokens/current", Own, tokens::current_one),
        post("/v1/tokens", Own, tokens::create),
        delete("/v1/tokens/{id}", Own, tokens::revoke),
    ]);
    table
}

fn app_routes() -> Vec<Route> {
    vec![
        get("/v1/apps/{app}", App(Read), apps::get),
        delete("/v1/apps/{app}", App(Manage), apps::destroy),
        get("/v1/apps/{app}/volumes", App(Read), volumes::list),
        post("/v1/apps/{app}/volumes", App(Deploy), volumes::create),
        get("/v1/apps/{app}/volumes/{id}", App(Read), volumes::get),
        delete("/v1/apps/{app}/volumes/{id}", App(Manage), volumes::destroy),
        put(
            "/v1/apps/{app}/volumes/{id}/extend",
            App(Deploy),
            volumes::extend,
        ),
        get(
            "/v1/apps/{app}/volumes/{id}/snapshots",
            App(Read),
            volumes::snapshots::list,
        ),
        post(
            "/v1/apps/{app}/volumes/{id}/snapshots",
            App(Deploy),
            volumes::snapshots::create,
        ),
        delete(
            "/v1/apps/{app}/volumes/{id}/snapshots/{snapshot}",
            App(Manage),
            volumes::snapshots::remove,
        ),
        get("/v1/apps/{app}/certificates", App(Read), certificates::list),
        post(
            "/v1/apps/{app}/certificates/acme",
            App(Deploy),
            certificates::add,
        ),
        get(
            "/v1/apps/{app}/certificates/{hostname}",
            App(Read),
            certificates::get,
        ),
        delete(
            "/v1/apps/{app}/certificates/{hostname}",
            App(Deploy),
            certificates::remove,
        ),
        get("/v1/apps/{app}/secrets", App(Read), secrets::list),
        post("/v1/apps/{app}/secrets", App(Deploy), secrets::change),
        get("/v1/apps/{app}/secrets/{name}", App(Read), secrets::get),
        post("/v1/apps/{app}/secrets/{name}", App(Deploy), secrets::set),
        delete("/v1/apps/{app}/secrets/{name}", App(Deploy), secrets::unset),
        post(
            "/v1/apps/{app}/deploy_token",
            App(Deploy),
            tokens::create_to_deploy,
        ),
        // From here on: what Fly.io keeps outside its Machines API.
        get("/v1/apps/{app}/logs", App(Read), logs::stream),
        get("/v1/apps/{app}/lease", App(Read), lease::get),
        post("/v1/apps/{app}/lease", App(Deploy), lease::take),
        delete("/v1/apps/{app}/lease", App(Deploy), lease::release),
        get("/v1/apps/{app}/releases", App(Read), releases::list),
        post("/v1/apps/{app}/releases", App(Deploy), releases::create),
        get(
            "/v1/apps/{app}/releases/{version}",
            App(Read),
            releases::get,
        ),
        put(
            "/v1/apps/{app}/releases/{version}",
            App(Deploy),
            releases::end,
        ),
    ]
}

fn machine_routes() -> Vec<Route> {
    /// A path of one Machine.
    macro_rules! machine {
        ($rest:literal) => {
            concat!("/v1/apps/{app}/machines/{id}", $rest)
        };
    }
    use machines::metadata;
    vec![
        get("/v1/apps/{app}/machines", App(Read), machines::list),
        post("/v1/apps/{app}/machines", App(Deploy), machines::create),
        get(machine!(""), App(Read), machines::get),
        post(machine!(""), App(Deploy), machines::update),
        delete(machine!(""), App(Deploy), machines::destroy),
        post(machine!("/start"), App(Deploy), machines::start),
        post(machine!("/stop"), App(Deploy), machines::stop),
        post(machine!("/restart"), App(Deploy), machines::restart),
        post(machine!("/suspend"), App(Deploy), machines::suspend),
        post(machine!("/signal"), App(Deploy), machines::signal),
        post(machine!("/exec"), App(Exec), machines::exec),
        post(machine!("/exec/stream"), App(Exec), machines::exec_stream),
        get(machine!("/memory"), App(Read), machines::memory),
        put(machine!("/memory"), App(Deploy), machines::limit_memory),
        get(machine!("/boot-trace"), App(Read), machines::boot_trace),
        // It knocks in the Machine.
        get(machine!("/ports/{port}"), App(Exec), machines::port),
        get(machine!("/wait"), App(Read), machines::wait),
        get(machine!("/events"), App(Read), machines::events),
        get(machine!("/metadata"), App(Read), metadata::get_all),
        put(machine!("/metadata"), App(Deploy), metadata::replace),
        patch(machine!("/metadata"), App(Deploy), metadata::merge),
        get(machine!("/metadata/{key}"), App(Read), metadata::get),
        post(machine!("/metadata/{key}"), App(Deploy), metadata::set),
        delete(machine!("/metadata/{key}"), App(Deploy), metadata::remove),
        post(machine!("/cordon"), App(Deploy), machines::cordon),
        post(machine!("/uncordon"), App(Deploy), machines::uncordon),
        get(machine!("/lease"), App(Read), machines::get_lease),
        post(machine!("/lease"), App(Deploy), machines::take_lease),
        delete(machine!("/lease"), App(Deploy), machines::release_lease),
    ]
}

fn registry_routes() -> Vec<Route> {
    vec![
        get("/v2/", Known, registry::version),
        post("/v2/{app}/blobs/uploads/", App(Deploy), uploads::begin),
        patch("/v2/{app}/blobs/uploads/{id}", App(Deploy), uploads::append),
        put("/v2/{app}/blobs/uploads/{id}", App(Deploy), uploads::finish),
        get(
            "/v2/{app}/blobs/uploads/{id}",
            App(Deploy),
            uploads::progress,
        ),
        delete("/v2/{app}/blobs/uploads/{id}", App(Deploy), uploads::cancel),
        get("/v2/{app}/blobs/{digest}", App(Pull), blobs::get),
        head("/v2/{app}/blobs/{digest}", App(Pull), blobs::head),
        get("/v2/{app}/manifests/{reference}", App(Pull), manifests::get),
        head(
            "/v2/{app}/manifests/{reference}",
            App(Pull),
            manifests::head,
        ),
        put(
            "/v2/{app}/manifests/{reference}",
            App(Deploy),
            manifests::put,
        ),
        get("/v2/{app}/tags/list", App(Pull), manifests::tags),
    ]
}

/// Makes the functions that declare routes.
macro_rules! methods {
    ($($name:ident $method:ident),*) => {$(
        fn $name<H, T>(path: &'static str, right: Right, handler: H) -> Route
        where
            H: Handler<T, Shared>,
            T: 'static,
        {
            Route {
                method: stringify!($method),
                path,
                right,
                handler: on(MethodFilter::$method, handler),
            }
        }
    )*};
}

methods!(get GET, head HEAD, post POST, put PUT, patch PATCH, delete DELETE);

pub fn router(shared: Shared) -> Router {
    let (mut api, mut images) = (Router::new(), Router::new());
    for route in table() {
        let gate = middleware::from_fn_with_state((shared.clone(), route.right), guard);
        let mut handler = route.handler;
        if route.path.starts_with(MACHINE) {
            // Inside the gate: what may not be done here is not asked of others.
            let elsewhere = middleware::from_fn_with_state(shared.clone(), forward::to_host);
            handler = handler.route_layer(elsewhere);
        }
        let guarded = handler.route_layer(gate);
        if route.path.starts_with(REGISTRY) {
            images = images.route(route.path, guarded);
        } else {
            api = api.route(route.path, guarded);
        }
    }
    // As Fly.io's: a method that a path does not have is a path that is not there.
    api.method_not_allowed_fallback(nothing_here)
        .merge(images)
        .fallback(nothing_here)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(middleware::from_fn(tell))
        .with_state(shared)
}

/// What a call names in its body, when its right is on that.
#[derive(Deserialize)]
struct Named {
    org_slug: OrgSlug,
}

/// Lets a request through to its handler if it may, and tells the handler who sent it.
async fn guard(
    State((shared, right)): State<(Shared, Right)>,
    request: Request,
    next: Next,
) -> Response {
    let refuse = |path: &str, denied: Denied| match path.starts_with(REGISTRY) {
        true => Refusal::from(denied).into_response(),
        false => ApiError::from(denied).into_response(),
    };
    let (mut parts, mut body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let decide = |right, named: Option<&str>, header: Option<&HeaderValue>| {
        authorize(
            &shared.view.snapshot(),
            &shared.config.internal_token,
            Timestamp::now(),
            header.and_then(|h| h.to_str().ok()),
            right,
            named,
        )
    };
    let named = match right {
        App(_) => named_in_path(&mut parts, "app").await,
        Organization(_) => named_in_path(&mut parts, "org").await,
        OrganizationInBody(_) => {
            // Nobody without a token makes us read a body.
            if let Err(denied) = decide(Own, None, parts.headers.get(AUTHORIZATION)) {
                return refuse(&path, denied);
            }
            let whole = Request::from_parts(parts.clone(), body);
            match named_in_body(whole).await {
                Ok((org, bytes)) => {
                    body = Body::from(bytes);
                    Some(org.to_string())
                }
                Err(error) => return error.into_response(),
            }
        }
        Public | Known | Own | Platform => None,
    };
    match decide(right, named.as_deref(), parts.headers.get(AUTHORIZATION)) {
        Ok(Some(caller)) => drop(parts.extensions.insert(caller)),
        Ok(None) => {}
        Err(denied) => return refuse(&path, denied),
    }
    next.run(Request::from_parts(parts, body)).await
}

async fn named_in_path(parts: &mut http::request::Parts, name: &str) -> Option<String> {
    let all = RawPathParams::from_request_parts(parts, &()).await.ok()?;
    let found = all.iter().find(|(key, _)| *key == name);
    found.map(|(_, value)| value.to_owned())
}

async fn named_in_body(request: Request) -> Result<(OrgSlug, bytes::Bytes), ApiError> {
    let bytes = extract::body(request, &()).await?;
    let named: Named = extract::read(&bytes)?;
    Ok((named.org_slug, bytes))
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

#[cfg(test)]
mod tests;
