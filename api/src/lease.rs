//! An app's lease: whoever deploys holds it, so that two deploys of one app do not undo each other.
//!
//! It ends by itself: a laptop that is closed in the middle locks nobody out for long. It guards nothing but
//! itself: the Machines' own calls ask for their own leases, as Fly.io's do.

use axum::extract::State;
use http::{HeaderMap, StatusCode};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tern_catalog::{AppName, Compare, Op, Record, StoreError, Transaction};

use crate::apps;
use crate::auth::Caller;
use crate::error::ApiError;
use crate::extract::{Json, Path};
use crate::machines::{NONCE, optional};
use crate::server::Shared;

const DEFAULT_TTL_S: i64 = 30;
/// Longest time between two signs of life of who holds it.
const MAX_TTL_S: i64 = 300;
/// How often a change that others are faster with is tried.
const ATTEMPTS: u32 = 16;
/// Longest description, in characters.
const MAX_DESCRIPTION: usize = 200;

/// A lease as it is kept. Only this API reads it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct AppLease {
    app: AppName,
    /// What the holder shows to be known.
    nonce: String,
    /// Who holds it, and what for.
    description: String,
    /// Since when, however often it was made to last longer.
    taken_at: Timestamp,
    /// In seconds since 1970.
    expires_at: i64,
}

impl Record for AppLease {
    const PREFIX: &'static str = "app_leases/";
    fn id(&self) -> String {
        self.app.to_string()
    }
}

#[derive(Debug, Default, Deserialize)]
pub struct Take {
    /// Seconds.
    ttl: Option<i64>,
    #[serde(default)]
    description: String,
}

/// `POST …/lease`: takes it, or with the nonce makes it last longer.
pub async fn take(
    State(shared): State<Shared>,
    caller: Caller,
    Path(app): Path<AppName>,
    headers: HeaderMap,
    body: bytes::Bytes,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    caller.app(&shared.view.snapshot(), &app)?;
    let take: Take = optional(&body)?;
    let found = shared.catalog.get::<AppLease>(app.as_str()).await?;
    let now = Timestamp::now();
    let ttl = take.ttl.unwrap_or(DEFAULT_TTL_S).clamp(1, MAX_TTL_S);
    let mut lease = AppLease {
        app: app.clone(),
        nonce: hex::encode(rand::random::<[u8; 16]>()),
        description: take.description.chars().take(MAX_DESCRIPTION).collect(),
        taken_at: now,
        expires_at: now.as_second() + ttl,
    };
    let held = found.as_ref().map(|(held, _)| held);
    let own = held.filter(|held| given(&headers) == Some(held.nonce.as_str()));
    match (own, held.filter(|held| held.lasts(now)), given(&headers)) {
        // However late: nobody else has taken it since.
        (Some(own), ..) => {
            lease.nonce.clone_from(&own.nonce);
            lease.taken_at = own.taken_at;
            lease.description.clone_from(&own.description);
        }
        (None, Some(held), _) => return Err(held.refusal(now)),
        (None, None, Some(_)) => {
            return Err(ApiError::conflict(format!(
                "the lease of app {app} has ended; somebody else may have held it since"
            )));
        }
        (None, None, None) => {}
    }
    let transaction = Transaction {
        compares: vec![
            apps::still_there(&shared, &caller, &app).await?,
            Compare {
                key: lease.key(),
                revision: found.map(|(_, revision)| revision),
            },
        ],
        ops: vec![Op::put(&lease)],
    };
    match shared.catalog.store().commit(transaction).await {
        Ok(_) => Ok((StatusCode::CREATED, Json(lease.shown(true)))),
        Err(StoreError::Conflict { .. }) => {
            let holder = current(&shared, &app).await?;
            // Its own call before this one was just answered: it holds it all the same.
            let own = holder.as_ref();
            let own = own.filter(|held| given(&headers) == Some(held.nonce.as_str()));
            if let Some(own) = own {
                return Ok((StatusCode::CREATED, Json(own.shown(true))));
            }
            Err(holder.map_or_else(
                || ApiError::conflict(format!("the lease of app {app} was just taken; try again")),
                |held| held.refusal(now),
            ))
        }
        Err(other) => Err(other.into()),
    }
}

/// `GET …/lease`: who holds it, without the proof.
pub async fn get(
    State(shared): State<Shared>,
    caller: Caller,
    Path(app): Path<AppName>,
) -> Result<Json<Value>, ApiError> {
    caller.app(&shared.view.snapshot(), &app)?;
    let lease = current(&shared, &app).await?;
    let lease = lease.ok_or_else(|| ApiError::not_found("lease"))?;
    Ok(Json(lease.shown(false)))
}

/// `DELETE …/lease`, by who holds it.
pub async fn release(
    State(shared): State<Shared>,
    caller: Caller,
    Path(app): Path<AppName>,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    caller.app(&shared.view.snapshot(), &app)?;
    for _ in 0..ATTEMPTS {
        let found = shared.catalog.get::<AppLease>(app.as_str()).await?;
        let (lease, revision) = found.ok_or_else(|| ApiError::not_found("lease"))?;
        if given(&headers) != Some(lease.nonce.as_str()) {
            return Err(ApiError::bad_request(format!(
                "the header {NONCE} does not hold this lease's nonce"
            )));
        }
        // It may have ended, and be somebody else's by now.
        let transaction = Transaction {
            compares: vec![Compare {
                key: lease.key(),
                revision: Some(revision),
            }],
            ops: vec![Op::Delete { key: lease.key() }],
        };
        match shared.catalog.store().commit(transaction).await {
            Ok(_) => return Ok(Json(json!({"ok": true}))),
            // Or its holder's last sign of life came at the same time.
            Err(StoreError::Conflict { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Err(ApiError::conflict(format!(
        "the lease of app {app} changes all the time; try again"
    )))
}

/// What its holder shows, while somebody holds it.
pub async fn nonce(shared: &Shared, app: &AppName) -> Result<Option<String>, ApiError> {
    Ok(current(shared, app).await?.map(|lease| lease.nonce))
}

/// What removes an app's lease with the app.
pub fn removal(app: &AppName) -> Op {
    Op::Delete {
        key: AppLease::key_of(app.as_str()),
    }
}

async fn current(shared: &Shared, app: &AppName) -> Result<Option<AppLease>, ApiError> {
    let found = shared.catalog.get::<AppLease>(app.as_str()).await?;
    let now = Timestamp::now();
    Ok(found.map(|(lease, _)| lease).filter(|held| held.lasts(now)))
}

fn given(headers: &HeaderMap) -> Option<&str> {
    headers.get(NONCE).and_then(|n| n.to_str().ok())
}

impl AppLease {
    fn lasts(&self, now: Timestamp) -> bool {
        self.expires_at > now.as_second()
    }

    fn refusal(&self, now: Timestamp) -> ApiError {
        let who = match self.description.as_str() {
            "" => "somebody else",
            told => told,
        };
        ApiError::conflict(format!(
            "app {} is held by {who} since {:.0}; without a sign of life it is free again in {} s",
            self.app,
            self.taken_at,
            (self.expires_at - now.as_second()).max(1)
        ))
    }

    fn shown(&self, with_nonce: bool) -> Value {
        let mut data = json!({
            "description": self.description,
            "taken_at": self.taken_at,
            "expires_at": self.expires_at,
        });
        if with_nonce {
            data["nonce"] = json!(self.nonce);
        }
        json!({"status": "success", "data": data})
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use http::{Method, Request};

    use super::*;
    use crate::testing::{ADMIN, Answer, RIVAL, World};

    async fn call(world: &World, method: Method, nonce: Option<&str>, body: Value) -> Answer {
        let mut request = Request::builder()
            .method(method)
            .uri("/v1/apps/shop/lease")
            .header("authorization", format!("Bearer {ADMIN}"));
        if let Some(nonce) = nonce {
            request = request.header(NONCE, nonce);
        }
        world
            .send(request.body(Body::from(body.to_string())).unwrap())
            .await
    }

    #[tokio::test]
    async fn the_second_is_told_who_holds_it_and_since_when() {
        let world = World::new().await;
        world.app("shop").await;
        let ann = json!({"ttl": 60, "description": "tern deploy by ann@laptop"});
        let first = call(&world, Method::POST, None, ann).await;
        assert_eq!(first.status, StatusCode::CREATED, "{first:?}");
        let data = first.json()["data"].clone();
        let nonce = data["nonce"].as_str().unwrap();

        let second = call(&world, Method::POST, None, json!({})).await;
        assert_eq!(second.status, StatusCode::CONFLICT, "{second:?}");
        let said = second.json()["error"].as_str().unwrap().to_owned();
        let since = &data["taken_at"].as_str().unwrap()[..19];
        assert!(
            said.contains("ann@laptop") && said.contains(since),
            "{said}"
        );
        let shown = call(&world, Method::GET, None, json!({})).await.json();
        assert_eq!(shown["data"]["nonce"], Value::Null);
        assert_eq!(shown["data"]["taken_at"], data["taken_at"]);

        // Its holder goes on, and lets it go.
        let longer = call(&world, Method::POST, Some(nonce), json!({"ttl": 90})).await;
        assert_eq!(longer.json()["data"]["taken_at"], data["taken_at"]);
        assert_eq!(
            longer.json()["data"]["description"],
            "tern deploy by ann@laptop"
        );
        let other = call(&world, Method::DELETE, Some("00"), json!({})).await;
        assert_eq!(other.status, StatusCode::BAD_REQUEST);
        let gone = call(&world, Method::DELETE, Some(nonce), json!({})).await;
        assert_eq!(gone.status, StatusCode::OK);
        let third = call(&world, Method::POST, None, json!({})).await;
        assert_eq!(third.status, StatusCode::CREATED);
        // Who comes back late learns that it is somebody else's.
        let late = call(&world, Method::POST, Some(nonce), json!({})).await;
        assert_eq!(late.status, StatusCode::CONFLICT);
        let rival = world
            .call(RIVAL, Method::POST, "/v1/apps/shop/lease", Body::empty())
            .await;
        assert_eq!(rival.status, StatusCode::NOT_FOUND);
    }

    #[tokio::test]
    async fn one_that_has_ended_is_free_but_not_for_who_has_lost_it() {
        let world = World::new().await;
        world.app("shop").await;
        let lease = AppLease {
            app: "shop".parse().unwrap(),
            nonce: "aa".into(),
            description: "a closed laptop".into(),
            taken_at: Timestamp::UNIX_EPOCH,
            expires_at: 1,
        };
        world.catalog.put(&lease).await.unwrap();
        let none = call(&world, Method::GET, None, json!({})).await;
        assert_eq!(none.status, StatusCode::NOT_FOUND);
        let lost = call(&world, Method::POST, Some("bb"), json!({})).await;
        assert_eq!(lost.status, StatusCode::CONFLICT);
        // Nobody has held it since.
        let back = call(&world, Method::POST, Some("aa"), json!({})).await;
        assert_eq!(back.status, StatusCode::CREATED, "{back:?}");
    }

    #[tokio::test]
    async fn it_is_given_back_beside_signs_of_life() {
        let world = World::new().await;
        world.app("shop").await;
        for _ in 0..8 {
            let taken = call(&world, Method::POST, None, json!({"ttl": 60})).await;
            let nonce = taken.json()["data"]["nonce"].as_str().unwrap().to_owned();
            let alive = (0..8).map(|_| call(&world, Method::POST, Some(&nonce), json!({})));
            let alive = futures::future::join_all(alive);
            let given_back = call(&world, Method::DELETE, Some(&nonce), json!({}));
            let (_, given_back) = tokio::join!(alive, given_back);
            assert_eq!(given_back.status, StatusCode::OK, "{given_back:?}");
            call(&world, Method::DELETE, Some(&nonce), json!({})).await;
        }
    }

    #[tokio::test]
    async fn of_many_at_once_one_gets_it_and_it_goes_with_the_app() {
        let world = World::new().await;
        world.app("shop").await;
        let calls = (0..8).map(|_| call(&world, Method::POST, None, json!({"ttl": 60})));
        let answers = futures::future::join_all(calls).await;
        let got = answers.iter().filter(|a| a.status == StatusCode::CREATED);
        assert_eq!(got.count(), 1, "{answers:?}");
        world
            .call(ADMIN, Method::DELETE, "/v1/apps/shop", Body::empty())
            .await;
        world.app("shop").await;
        let anew = call(&world, Method::POST, None, json!({})).await;
        assert_eq!(anew.status, StatusCode::CREATED, "{anew:?}");
    }
}
