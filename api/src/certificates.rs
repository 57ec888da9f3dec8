//! The host names of an app and their certificates.

use axum::extract::{Query, State};
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

/// Names that one app may have, and all apps of an organization: each costs orders, and room in every edge.
const NAMES_OF_APP: usize = 100;
const NAMES_OF_ORGANIZATION: usize = 1000;

#[derive(Debug, Deserialize)]
pub struct Add {
    hostname: String,
}

#[derive(Debug, Deserialize)]
pub struct RemoveQuery {
    #[serde(default)]
    force: bool,
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

/// A name that an app may have. Some were taken before that would be refused now: they can still be looked at, and removed.
fn known(given: &str) -> Result<Hostname, ApiError> {
    Hostname::typed(given).or_else(|error| given.parse().map_err(|_| ApiError::from(error)))
}

/// `GET …/certificates/{hostname}`.
pub async fn get(
    State(shared): State<Shared>,
    caller: Caller,
    Path((app, hostname)): Path<(AppName, String)>,
) -> Result<Json<Value>, ApiError> {
    let hostname = known(&hostname)?;
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
    let hostname = Hostname::typed(&add.hostname)?;
    admit(&shared, &caller, &app, &hostname)?;
    let route = HostnameRoute {
        hostname: hostname.clone(),
        app,
        created_at: Timestamp::now(),
    };
    let still_there = apps::still_there(&shared, &caller, &route.app).await?;
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
    Path((app, hostname)): Path<(AppName, String)>,
    Query(query): Query<RemoveQuery>,
) -> Result<StatusCode, ApiError> {
    let hostname = known(&hostname)?;
    find(&shared.view.snapshot(), &caller, &app, &hostname)?;
    if !query.force && own_name(&shared, &app).as_ref() == Some(&hostname) {
        return Err(ApiError::invalid(format!(
            "{hostname} is the app's own name: without it {app} may be out of reach. Remove it with --force \
             (?force=true); adding it again brings it back"
        )));
    }
    let found = shared
        .catalog
        .get::<HostnameRoute>(hostname.as_str())
        .await?;
    // The view may be behind: by now it may be another app's.
    let (route, revision) = found
        .filter(|(route, _)| route.app == app)
        .ok_or_else(|| ApiError::not_found(format!("host name {hostname}")))?;
    let key = route.key();
    let transaction = Transaction {
        compares: vec![Compare {
            key: key.clone(),
            revision: Some(revision),
        }],
        ops: vec![Op::Delete { key }],
    };
    let revision = shared.catalog.store().commit(transaction).await?;
    shared.seen(revision).await;
    Ok(StatusCode::NO_CONTENT)
}

/// Whether the app may have this name.
fn admit(
    shared: &Shared,
    caller: &Caller,
    app: &AppName,
    hostname: &Hostname,
) -> Result<(), ApiError> {
    let snapshot = shared.view.snapshot();
    let organization = &caller.app(&snapshot, app)?.organization;
    let own = own_name(shared, app).as_ref() == Some(hostname);
    if let Some(domain) = shared.config.domain.as_deref()
        && hostname.is_in(domain)
        && !own
    {
        // Otherwise an app could take the name that another's creation will need.
        return Err(ApiError::invalid(format!(
            "{hostname} belongs to the platform's own domain; below it {app} may have {app}.{domain} alone"
        )));
    }
    let (mut of_app, mut of_organization) = (0, 0);
    for route in snapshot.hostnames.values() {
        of_app += usize::from(route.app == *app);
        let its = snapshot.apps.get(&route.app);
        of_organization += usize::from(its.is_some_and(|a| a.organization == *organization));
    }
    // The app's own name can always be brought back.
    if !own && of_app >= NAMES_OF_APP {
        return Err(ApiError::invalid(format!(
            "{app} has {of_app} host names, which is the most; remove one first"
        )));
    }
    if !own && of_organization >= NAMES_OF_ORGANIZATION {
        return Err(ApiError::invalid(format!(
            "the apps of {organization} have {of_organization} host names, which is the most; remove one first"
        )));
    }
    Ok(())
}

/// The name that an app has from its creation.
fn own_name(shared: &Shared, app: &AppName) -> Option<Hostname> {
    let domain = shared.config.domain.as_ref()?;
    format!("{app}.{domain}").parse().ok()
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

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use http::Method;

    use super::*;
    use crate::testing::{ADMIN, RIVAL, World};

    const CERTIFICATES: &str = "/v1/apps/shop/certificates";
    const ADD: &str = "/v1/apps/shop/certificates/acme";

    async fn delete(world: &World, hostname: &str) -> StatusCode {
        let path = format!("{CERTIFICATES}/{hostname}");
        world
            .call(ADMIN, Method::DELETE, &path, Body::empty())
            .await
            .status
    }

    #[tokio::test]
    async fn a_name_is_stored_in_one_form_however_it_is_written() {
        let world = World::new().await;
        world.app("shop").await;
        let added = world
            .post(ADD, json!({"hostname": "Bücher.Example."}))
            .await;
        assert_eq!(added.status, StatusCode::CREATED, "{added:?}");
        assert_eq!(added.json()["hostname"], "xn--bcher-kva.example");
        let same = world
            .post(ADD, json!({"hostname": "xn--BCHER-kva.example"}))
            .await;
        assert_eq!(same.json()["status"], "name_taken");
        let got = world
            .get(&format!("{CERTIFICATES}/b%C3%BCcher.example"))
            .await;
        assert_eq!(got.json()["hostname"], "xn--bcher-kva.example");
        assert_eq!(
            delete(&world, "b%C3%BCcher.example.").await,
            StatusCode::NO_CONTENT
        );
    }

    #[tokio::test]
    async fn addresses_private_names_and_the_platforms_own_are_refused() {
        let world = World::new().await;
        world.app("shop").await;
        for (hostname, reason) in [
            ("1.2.3.4", "IP address"),
            ("::1", "IP address"),
            ("shop.internal", "private"),
            ("tern.test", "platform's own domain"),
            ("TERN.test.", "platform's own domain"),
            ("other.tern.test", "platform's own domain"),
            ("a.shop.tern.test", "platform's own domain"),
        ] {
            let refused = world.post(ADD, json!({"hostname": hostname})).await;
            assert_eq!(
                refused.status,
                StatusCode::UNPROCESSABLE_ENTITY,
                "{hostname}"
            );
            let text = refused.json()["error"].to_string();
            assert!(text.contains(reason), "{hostname}: {text}");
        }
        // Ends with the same letters, and is somebody's own.
        let foreign = world.post(ADD, json!({"hostname": "mytern.test"})).await;
        assert_eq!(foreign.status, StatusCode::CREATED);
    }

    #[tokio::test]
    async fn an_apps_own_name_is_not_lost_by_mistake_and_can_be_brought_back() {
        let world = World::new().await;
        world.app("shop").await;
        assert_eq!(
            delete(&world, "shop.tern.test").await,
            StatusCode::UNPROCESSABLE_ENTITY
        );
        assert_eq!(
            world.get(CERTIFICATES).await.json()["certificates"][0]["hostname"],
            "shop.tern.test"
        );
        assert_eq!(
            delete(&world, "shop.tern.test?force=true").await,
            StatusCode::NO_CONTENT
        );
        assert_eq!(world.get(CERTIFICATES).await.json()["total_count"], 0);
        let back = world.post(ADD, json!({"hostname": "shop.tern.test"})).await;
        assert_eq!(back.status, StatusCode::CREATED, "{back:?}");
        // By its own organization alone.
        let rival = json!({"hostname": "shop.tern.test"}).to_string();
        let rival = world.call(RIVAL, Method::POST, ADD, rival).await;
        assert!(rival.status.is_client_error(), "{rival:?}");
    }

    #[tokio::test]
    async fn an_app_has_so_many_names_and_its_own_beyond_them() {
        let world = World::new().await;
        world.app("shop").await;
        assert_eq!(
            delete(&world, "shop.tern.test?force=true").await,
            StatusCode::NO_CONTENT
        );
        for i in 0..NAMES_OF_APP {
            let added = world
                .post(ADD, json!({"hostname": format!("a{i}.example")}))
                .await;
            assert_eq!(added.status, StatusCode::CREATED);
        }
        let more = world.post(ADD, json!({"hostname": "more.example"})).await;
        assert_eq!(more.status, StatusCode::UNPROCESSABLE_ENTITY);
        assert!(more.json()["error"].to_string().contains("is the most"));
        let own = world.post(ADD, json!({"hostname": "shop.tern.test"})).await;
        assert_eq!(own.status, StatusCode::CREATED, "{own:?}");
    }
}
