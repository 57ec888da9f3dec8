//! Releases: what was deployed, by whom, and what came of it.
//!
//! Whoever deploys holds the app's lease, makes a record with it, and tells in the end how it went. One whose maker has
//! gone away says so: it is `interrupted` as soon as the lease has ended, whether anybody has written that or not.

use axum::extract::State;
use http::{HeaderMap, StatusCode};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use tern_catalog::{
    AppName, CatalogError, Compare, Op, Release, ReleaseStatus, StoreError, Transaction,
};

use crate::apps;
use crate::auth::{Caller, token_hash};
use crate::error::ApiError;
use crate::extract::{Json, Path, Query};
use crate::lease;
use crate::machines::NONCE;
use crate::server::Shared;

/// Releases that are kept of an app.
const KEPT: usize = 100;
/// Longest text of its maker's, in characters.
const MAX_TEXT: usize = 1000;
/// Longest configuration, in bytes of JSON.
const MAX_CONFIG: usize = 1 << 20;
/// How often a change that others are faster with is tried.
const ATTEMPTS: u32 = 16;

#[derive(Debug, Deserialize)]
pub struct Create {
    image: String,
    /// Machines' configurations by process group.
    config: Value,
    #[serde(default)]
    description: String,
    #[serde(default)]
    user: String,
}

#[derive(Debug, Deserialize)]
pub struct End {
    status: ReleaseStatus,
    message: Option<String>,
}

#[derive(Debug, Deserialize)]
pub struct ListQuery {
    limit: Option<usize>,
}

/// Which release of which app.
#[derive(Debug, Deserialize)]
pub struct At {
    app: AppName,
    version: u64,
}

/// `GET …/releases`, newest first, without their configurations.
pub async fn list(
    State(shared): State<Shared>,
    caller: Caller,
    Path(app): Path<AppName>,
    Query(query): Query<ListQuery>,
) -> Result<Json<Value>, ApiError> {
    caller.app(&shared.view.snapshot(), &app)?;
    let holder = holder(&shared, &app).await?;
    let (releases, _) = all(&shared, &app).await?;
    let newest = releases.iter().rev().take(query.limit.unwrap_or(KEPT));
    let shown: Vec<Value> = newest.map(|r| shape(r, holder.as_deref(), false)).collect();
    Ok(Json(json!({"releases": shown})))
}

/// `GET …/releases/{version}`.
pub async fn get(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
) -> Result<Json<Value>, ApiError> {
    caller.app(&shared.view.snapshot(), &at.app)?;
    let holder = holder(&shared, &at.app).await?;
    let id = Release::id_of(&at.app, at.version);
    let found = shared.catalog.get::<Release>(&id).await?;
    let (release, _) = found.ok_or_else(|| none(&at))?;
    Ok(Json(shape(&release, holder.as_deref(), true)))
}

/// `POST …/releases`, by who holds the app's lease.
pub async fn create(
    State(shared): State<Shared>,
    caller: Caller,
    Path(app): Path<AppName>,
    headers: HeaderMap,
    Json(create): Json<Create>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    caller.app(&shared.view.snapshot(), &app)?;
    let lease = must_hold(&shared, &app, &headers).await?;
    if create.config.to_string().len() > MAX_CONFIG {
        return Err(ApiError::invalid(format!(
            "the configuration of a release has {MAX_CONFIG} bytes at most; put large files into the image, or on a volume"
        )));
    }
    for _ in 0..ATTEMPTS {
        let (releases, keys) = all(&shared, &app).await?;
        let release = Release {
            app: app.clone(),
            version: releases.last().map_or(0, |last| last.version) + 1,
            image: short(&create.image),
            config: create.config.clone(),
            description: short(&create.description),
            user: short(&create.user),
            created_at: Timestamp::now(),
            ended_at: None,
            status: ReleaseStatus::Running,
            message: None,
            lease: lease.clone(),
        };
        let mut transaction = Transaction {
            compares: vec![
                apps::still_there(&shared, &caller, &app).await?,
                Compare::absent(&release),
            ],
            ops: vec![Op::put(&release)],
        };
        let surplus = (releases.len() + 1).saturating_sub(KEPT);
        for key in keys.iter().take(surplus) {
            transaction.ops.push(Op::Delete { key: key.clone() });
        }
        // What runs under the lease of somebody who is gone.
        for over in releases.iter().skip(surplus) {
            if over.status == ReleaseStatus::Running {
                let over = Release {
                    status: ReleaseStatus::Interrupted,
                    ended_at: Some(release.created_at),
                    ..over.clone()
                };
                transaction.ops.push(Op::put(&over));
            }
        }
        match shared.catalog.store().commit(transaction).await {
            Ok(_) => {
                let shown = shape(&release, Some(&lease), true);
                return Ok((StatusCode::CREATED, Json(shown)));
            }
            Err(StoreError::Conflict { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Err(ApiError::conflict(format!(
        "releases of app {app} are made by others all the time; try again"
    )))
}

/// `PUT …/releases/{version}`: how it ended, by who made it.
pub async fn end(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    headers: HeaderMap,
    Json(end): Json<End>,
) -> Result<Json<Value>, ApiError> {
    caller.app(&shared.view.snapshot(), &at.app)?;
    let lease = must_hold(&shared, &at.app, &headers).await?;
    if !matches!(end.status, ReleaseStatus::Succeeded | ReleaseStatus::Failed) {
        return Err(ApiError::invalid(
            "status: a release ends as succeeded or failed",
        ));
    }
    let change = |release: &mut Release| {
        if release.lease != lease || release.status != ReleaseStatus::Running {
            return Err(ApiError::conflict(format!(
                "release {} of app {} is over",
                at.version, at.app
            )));
        }
        release.status = end.status;
        release.message = end.message.as_deref().map(short);
        release.ended_at = Some(Timestamp::now());
        Ok(())
    };
    let id = Release::id_of(&at.app, at.version);
    let ended = shared.catalog.update(&id, change).await??;
    let ended = ended.ok_or_else(|| none(&at))?;
    Ok(Json(shape(&ended, Some(&lease), true)))
}

/// What removes an app's releases with the app.
pub async fn removal(shared: &Shared, app: &AppName) -> Result<Vec<Op>, ApiError> {
    let (_, keys) = all(shared, app).await?;
    Ok(keys.into_iter().map(|key| Op::Delete { key }).collect())
}

/// All of an app, oldest first, and their keys.
async fn all(shared: &Shared, app: &AppName) -> Result<(Vec<Release>, Vec<String>), ApiError> {
    let listing = shared
        .catalog
        .store()
        .list(&Release::prefix_of(app))
        .await?;
    let read = listing.entries.iter().map(|entry| {
        serde_json::from_slice(&entry.value).map_err(|source| {
            ApiError::from(CatalogError::Malformed {
                key: entry.key.clone(),
                source,
            })
        })
    });
    let releases = read.collect::<Result<_, _>>()?;
    Ok((
        releases,
        listing.entries.into_iter().map(|e| e.key).collect(),
    ))
}

/// By what the releases of who holds the app's lease are known.
async fn holder(shared: &Shared, app: &AppName) -> Result<Option<String>, ApiError> {
    let nonce = lease::nonce(shared, app).await?;
    Ok(nonce.map(|nonce| token_hash(&nonce)))
}

async fn must_hold(
    shared: &Shared,
    app: &AppName,
    headers: &HeaderMap,
) -> Result<String, ApiError> {
    let given = headers.get(NONCE).and_then(|n| n.to_str().ok());
    let given = given.map(token_hash);
    let holder = holder(shared, app).await?;
    holder.filter(|holder| given.as_ref() == Some(holder)).ok_or_else(|| {
        ApiError::conflict(format!(
            "who makes a release of app {app} holds its lease, and shows the nonce in the header {NONCE}"
        ))
    })
}

fn none(at: &At) -> ApiError {
    ApiError::not_found(format!("release {} of app {}", at.version, at.app))
}

fn short(text: impl AsRef<str>) -> String {
    text.as_ref().chars().take(MAX_TEXT).collect()
}

fn shape(release: &Release, holder: Option<&str>, with_config: bool) -> Value {
    let status = match release.status {
        ReleaseStatus::Running if holder != Some(&release.lease) => ReleaseStatus::Interrupted,
        status => status,
    };
    let mut shown = json!({
        "id": format!("{}-v{}", release.app, release.version),
        "version": release.version,
        "status": status,
        "description": release.description,
        "user": release.user,
        "image_ref": release.image,
        "created_at": release.created_at,
        "ended_at": release.ended_at,
        "message": release.message,
    });
    if with_config {
        shown["config"] = release.config.clone();
    }
    shown
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use http::{Method, Request};

    use super::*;
    use crate::testing::{ADMIN, Answer, RIVAL, World};

    async fn call(world: &World, method: Method, path: &str, nonce: &str, body: Value) -> Answer {
        let request = Request::builder()
            .method(method)
            .uri(format!("/v1/apps/shop/{path}"))
            .header("authorization", format!("Bearer {ADMIN}"))
            .header(NONCE, nonce);
        world
            .send(request.body(Body::from(body.to_string())).unwrap())
            .await
    }

    async fn lease(world: &World) -> String {
        let taken = world.post("/v1/apps/shop/lease", json!({"ttl": 60})).await;
        taken.json()["data"]["nonce"].as_str().unwrap().to_owned()
    }

    async fn begin(world: &World, nonce: &str, image: &str) -> Answer {
        let body =
            json!({"image": image, "config": {"app": {"image": image}}, "user": "ann@laptop"});
        call(world, Method::POST, "releases", nonce, body).await
    }

    async fn listed(world: &World) -> Vec<(u64, String)> {
        let all = world.get("/v1/apps/shop/releases").await.json();
        let all = all["releases"].as_array().unwrap().iter();
        all.map(|r| {
            let status = r["status"].as_str().unwrap().to_owned();
            (r["version"].as_u64().unwrap(), status)
        })
        .collect()
    }

    #[tokio::test]
    async fn a_release_is_made_ended_and_kept_by_who_holds_the_lease() {
        let world = World::new().await;
        world.app("shop").await;
        let refused = begin(&world, "00", "x:1").await;
        assert_eq!(refused.status, StatusCode::CONFLICT, "{refused:?}");
        let nonce = lease(&world).await;
        let made = begin(&world, &nonce, "x:1").await;
        assert_eq!(made.status, StatusCode::CREATED, "{made:?}");
        assert_eq!(listed(&world).await, [(1, "running".to_owned())]);
        let failed = json!({"status": "failed", "message": "it exited"});
        let stranger = call(&world, Method::PUT, "releases/1", "00", failed.clone()).await;
        assert_eq!(stranger.status, StatusCode::CONFLICT);
        let ended = call(&world, Method::PUT, "releases/1", &nonce, failed.clone()).await;
        assert_eq!(ended.json()["message"], "it exited", "{ended:?}");
        let again = call(&world, Method::PUT, "releases/1", &nonce, failed).await;
        assert_eq!(again.status, StatusCode::CONFLICT, "it is over");
        let one = world.get("/v1/apps/shop/releases/1").await.json();
        assert_eq!(one["config"]["app"]["image"], "x:1");
        assert_eq!(
            (&one["status"], &one["user"]),
            (&json!("failed"), &json!("ann@laptop"))
        );
        let none = world.get("/v1/apps/shop/releases/2").await;
        assert_eq!(none.status, StatusCode::NOT_FOUND);
        let path = "/v1/apps/shop/releases";
        let rival = world.call(RIVAL, Method::GET, path, Body::empty()).await;
        assert_eq!(rival.status, StatusCode::NOT_FOUND);
    }

    #[tokio::test]
    async fn one_whose_maker_went_away_says_so() {
        let world = World::new().await;
        world.app("shop").await;
        let nonce = lease(&world).await;
        begin(&world, &nonce, "x:1").await;
        call(&world, Method::DELETE, "lease", &nonce, json!({})).await;
        assert_eq!(listed(&world).await, [(1, "interrupted".to_owned())]);
        let late = json!({"status": "succeeded"});
        let late = call(&world, Method::PUT, "releases/1", &nonce, late).await;
        assert_eq!(late.status, StatusCode::CONFLICT, "{late:?}");
        // The next writes it down.
        let nonce = lease(&world).await;
        assert_eq!(listed(&world).await, [(1, "interrupted".to_owned())]);
        begin(&world, &nonce, "x:2").await;
        let kept = world.catalog.get::<Release>("shop/0000000001").await;
        assert_eq!(kept.unwrap().unwrap().0.status, ReleaseStatus::Interrupted);
        assert_eq!(listed(&world).await[0], (2, "running".to_owned()));
    }

    #[tokio::test]
    async fn old_ones_are_let_go_and_all_go_with_the_app() {
        let world = World::new().await;
        world.app("shop").await;
        let nonce = lease(&world).await;
        for n in 0..KEPT + 3 {
            let made = begin(&world, &nonce, &format!("x:{n}")).await;
            assert_eq!(made.status, StatusCode::CREATED, "{made:?}");
        }
        let kept = listed(&world).await;
        assert_eq!((kept.len(), kept[0].0, kept[KEPT - 1].0), (KEPT, 103, 4));
        let large = json!({"image": "x", "config": "x".repeat(MAX_CONFIG)});
        let large = call(&world, Method::POST, "releases", &nonce, large).await;
        assert_eq!(large.status, StatusCode::UNPROCESSABLE_ENTITY);
        world
            .call(ADMIN, Method::DELETE, "/v1/apps/shop", Body::empty())
            .await;
        world.app("shop").await;
        assert_eq!(listed(&world).await, []);
    }
}
