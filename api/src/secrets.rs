//! An app's secrets: names, digests and versions. A value comes in and never goes out again but into the app's Machines,
//! which get the current ones at their next cold start or update.

use std::collections::BTreeMap;
use std::fmt::Debug;

use axum::extract::State;
use http::StatusCode;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use tern_catalog::{
    AppName, AppSecret, AppSecrets, Compare, Op, Record as _, SealedKey, SecretName, Snapshot,
    StoreError, Transaction,
};

use crate::apps;
use crate::auth::Caller;
use crate::error::ApiError;
use crate::extract::{Json, JsonWithNulls, Path, Query};
use crate::server::Shared;

/// Most secrets of one app.
const MAX_SECRETS: usize = 256;
/// Longest value, in bytes. Linux takes no longer words into an environment than 128 KiB.
const MAX_VALUE: usize = 64 << 10;
/// Most bytes of all values of one app: they are one record, of which every host has a copy in memory.
const MAX_TOTAL: usize = 512 << 10;
/// How often a change that others are faster with is tried.
const ATTEMPTS: u32 = 16;

/// Encrypts secrets with a key that the API never sees.
pub trait SecretSealer: Debug + Send + Sync {
    /// Encrypts a value, for this purpose and no other.
    fn seal(&self, purpose: &str, value: &[u8]) -> Result<SealedKey, String>;

    /// What may be shown of a value: tells equal ones from others, and nothing to who has not the key.
    fn digest(&self, purpose: &str, value: &[u8]) -> String;
}

#[derive(Debug, Default, Deserialize)]
pub struct ListQuery {
    /// The least version that the caller knows of.
    #[serde(alias = "version")]
    min_version: Option<u64>,
    #[serde(default)]
    show_secrets: bool,
}

#[derive(Deserialize)]
pub struct Set {
    value: String,
}

/// `null` takes a secret away.
#[derive(Deserialize)]
pub struct Change {
    values: BTreeMap<SecretName, Option<String>>,
}

/// Which secret of which app.
#[derive(Debug, Deserialize)]
pub struct At {
    app: AppName,
    name: SecretName,
}

/// `GET …/secrets`.
pub async fn list(
    State(shared): State<Shared>,
    caller: Caller,
    Path(app): Path<AppName>,
    Query(query): Query<ListQuery>,
) -> Result<Json<Value>, ApiError> {
    let snapshot = shared.view.snapshot();
    caller.app(&snapshot, &app)?;
    never_shown(&query)?;
    must_have(&snapshot, &app, query.min_version)?;
    let secrets = snapshot.secrets.get(&app);
    Ok(Json(match secrets {
        Some(secrets) => shape(secrets),
        None => json!({"secrets": [], "version": 0}),
    }))
}

/// `GET …/secrets/{name}`.
pub async fn get(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    Query(query): Query<ListQuery>,
) -> Result<Json<Value>, ApiError> {
    let snapshot = shared.view.snapshot();
    caller.app(&snapshot, &at.app)?;
    never_shown(&query)?;
    must_have(&snapshot, &at.app, query.min_version)?;
    let secrets = snapshot.secrets.get(&at.app);
    let found = secrets.and_then(|s| Some((s.secrets.get(&at.name)?, s.version)));
    let (secret, version) =
        found.ok_or_else(|| ApiError::not_found(format!("secret {}", at.name)))?;
    Ok(Json(one(&at.name, secret, version)))
}

/// `POST …/secrets`: sets some and takes others away, all or none.
pub async fn change(
    State(shared): State<Shared>,
    caller: Caller,
    Path(app): Path<AppName>,
    JsonWithNulls(change): JsonWithNulls<Change>,
) -> Result<Json<Value>, ApiError> {
    let changed = write(&shared, &caller, &app, &change.values).await?;
    Ok(Json(shape(&changed)))
}

/// `POST …/secrets/{name}`.
pub async fn set(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    Json(set): Json<Set>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let values = [(at.name.clone(), Some(set.value))].into();
    let changed = write(&shared, &caller, &at.app, &values).await?;
    let secret = changed.secrets.get(&at.name);
    let secret = secret.ok_or_else(|| ApiError::not_found(format!("secret {}", at.name)))?;
    Ok((
        StatusCode::CREATED,
        Json(one(&at.name, secret, changed.version)),
    ))
}

/// `DELETE …/secrets/{name}`.
pub async fn unset(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
) -> Result<Json<Value>, ApiError> {
    let snapshot = shared.view.snapshot();
    caller.app(&snapshot, &at.app)?;
    let known = snapshot.secrets.get(&at.app);
    if !known.is_some_and(|s| s.secrets.contains_key(&at.name)) {
        return Err(ApiError::not_found(format!("secret {}", at.name)));
    }
    let changed = write(&shared, &caller, &at.app, &[(at.name, None)].into()).await?;
    Ok(Json(json!({"version": changed.version})))
}

/// What removes an app's secrets with the app.
pub fn removal(app: &AppName) -> Op {
    Op::Delete {
        key: AppSecrets::key_of(app.as_str()),
    }
}

/// An error unless the app's secrets are of this version, or a later one.
pub fn must_have(snapshot: &Snapshot, app: &AppName, least: Option<u64>) -> Result<(), ApiError> {
    let version = snapshot.secrets.get(app).map_or(0, |s| s.version);
    match least {
        Some(least) if least > version => Err(ApiError::precondition(format!(
            "the secrets of app {app} have version {version}; there is no version {least} yet"
        ))),
        _ => Ok(()),
    }
}

fn never_shown(query: &ListQuery) -> Result<(), ApiError> {
    if query.show_secrets {
        return Err(ApiError::forbidden(
            "values of secrets are never shown; a Machine that has them can be asked by `exec`",
        ));
    }
    Ok(())
}

/// Changes an app's secrets. Values that are there already change nothing, the version neither.
async fn write(
    shared: &Shared,
    caller: &Caller,
    app: &AppName,
    values: &BTreeMap<SecretName, Option<String>>,
) -> Result<AppSecrets, ApiError> {
    caller.app(&shared.view.snapshot(), app)?;
    check(values)?;
    for _ in 0..ATTEMPTS {
        let found = shared.catalog.get::<AppSecrets>(app.as_str()).await?;
        let (before, revision) = match found {
            Some((secrets, revision)) => (Some(secrets), Some(revision)),
            None => (None, None),
        };
        let before = before.unwrap_or_else(|| AppSecrets {
            app: app.clone(),
            version: 0,
            secrets: BTreeMap::new(),
        });
        let mut after = before.clone();
        put(shared, &mut after, values)?;
        if after == before {
            return Ok(before);
        }
        after.version += 1;
        bounded(&after)?;
        let transaction = Transaction {
            compares: vec![
                apps::still_there(shared, caller, app).await?,
                Compare {
                    key: after.key(),
                    revision,
                },
            ],
            ops: vec![Op::put(&after)],
        };
        match shared.catalog.store().commit(transaction).await {
            Ok(revision) => {
                shared.seen(revision).await;
                return Ok(after);
            }
            Err(StoreError::Conflict { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Err(ApiError::conflict(format!(
        "the secrets of app {app} are changed by others all the time; try again"
    )))
}

fn put(
    shared: &Shared,
    secrets: &mut AppSecrets,
    values: &BTreeMap<SecretName, Option<String>>,
) -> Result<(), ApiError> {
    let now = Timestamp::now();
    let sealer = &shared.config.sealer;
    for (name, value) in values {
        let Some(value) = value else {
            secrets.secrets.remove(name);
            continue;
        };
        let purpose = AppSecrets::purpose(&secrets.app, name);
        let digest = sealer.digest(&purpose, value.as_bytes());
        let known = secrets.secrets.get(name);
        if known.is_some_and(|known| known.digest == digest) {
            continue;
        }
        let sealed = sealer.seal(&purpose, value.as_bytes()).map_err(|error| {
            tracing::error!(%error, app = %secrets.app, "a secret cannot be sealed");
            ApiError::of_status(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the secret cannot be sealed; the server's log says why",
            )
        })?;
        let secret = AppSecret {
            sealed,
            digest,
            created_at: known.map_or(now, |known| known.created_at),
            updated_at: now,
        };
        secrets.secrets.insert(name.clone(), secret);
    }
    Ok(())
}

/// Values that can stand in an environment. An error never repeats one.
fn check(values: &BTreeMap<SecretName, Option<String>>) -> Result<(), ApiError> {
    for (name, value) in values {
        let value = value.as_deref().unwrap_or_default();
        if value.len() > MAX_VALUE {
            return Err(ApiError::invalid(format!(
                "the value of secret {name} has {} bytes; {MAX_VALUE} are possible",
                value.len()
            )));
        }
        if value.contains('\0') {
            return Err(ApiError::invalid(format!(
                "the value of secret {name} holds a NUL, which no environment can; encode it, as in base64"
            )));
        }
    }
    Ok(())
}

fn bounded(secrets: &AppSecrets) -> Result<(), ApiError> {
    let count = secrets.secrets.len();
    if count > MAX_SECRETS {
        return Err(ApiError::invalid(format!(
            "app {} would have {count} secrets; {MAX_SECRETS} are possible",
            secrets.app
        )));
    }
    // As they are kept, in base64 and with a tag: a third more.
    let kept = secrets.secrets.values();
    let total: usize = kept.map(|s| s.sealed.ciphertext.len() / 4 * 3).sum();
    if total > MAX_TOTAL {
        return Err(ApiError::invalid(format!(
            "the secrets of app {} would have {total} bytes; {MAX_TOTAL} are possible. Put large files on a volume",
            secrets.app
        )));
    }
    Ok(())
}

fn shape(secrets: &AppSecrets) -> Value {
    let all = secrets.secrets.iter();
    let all: Vec<Value> = all
        .map(|(name, secret)| {
            json!({
                "name": name,
                "digest": secret.digest,
                "created_at": secret.created_at,
                "updated_at": secret.updated_at,
            })
        })
        .collect();
    json!({"secrets": all, "version": secrets.version})
}

fn one(name: &SecretName, secret: &AppSecret, version: u64) -> Value {
    json!({
        "name": name,
        "digest": secret.digest,
        "created_at": secret.created_at,
        "updated_at": secret.updated_at,
        "version": version,
    })
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use http::Method;

    use super::*;
    use crate::testing::{ADMIN, RIVAL, World};

    const PATH: &str = "/v1/apps/shop/secrets";

    async fn delete(world: &World, path: &str) -> crate::testing::Answer {
        world.call(ADMIN, Method::DELETE, path, Body::empty()).await
    }

    #[tokio::test]
    async fn values_go_in_and_only_digests_come_out() {
        let world = World::new().await;
        world.app("shop").await;
        let none = world.get(PATH).await.json();
        assert_eq!(none, json!({"secrets": [], "version": 0}));
        let values = json!({"values": {"DATABASE_URL": "postgres://hunter2", "B": ""}});
        let set = world.post(PATH, values.clone()).await;
        assert_eq!(set.status, StatusCode::OK, "{set:?}");
        assert_eq!(set.json()["version"], 1);
        let one = world.get("/v1/apps/shop/secrets/DATABASE_URL").await;
        let digest = one.json()["digest"].clone();
        assert_eq!(digest.as_str().unwrap().len(), 16, "{one:?}");
        let listed = world.get(PATH).await;
        assert_eq!(listed.json()["secrets"].as_array().unwrap().len(), 2);
        for answer in [&set, &one, &listed] {
            assert!(!format!("{answer:?}").contains("hunter2"), "{answer:?}");
        }
        let shown = world.get("/v1/apps/shop/secrets?show_secrets=true").await;
        assert_eq!(shown.status, StatusCode::FORBIDDEN);
        // At rest neither.
        let kept = world.catalog.get::<AppSecrets>("shop").await.unwrap();
        let kept = serde_json::to_string(&kept.unwrap().0).unwrap();
        assert!(!kept.contains("hunter2"), "{kept}");

        // What is there already is no change.
        let again = world.post(PATH, values).await;
        assert_eq!(again.json()["version"], 1);
        let other = world.post("/v1/apps/shop/secrets/B", json!({"value": "b"}));
        let other = other.await;
        assert_eq!(other.status, StatusCode::CREATED);
        assert_eq!(other.json()["version"], 2);
        let created = &listed.json()["secrets"][0]["created_at"];
        assert_eq!(other.json()["created_at"], *created);
        // One call takes away and sets, and takes away what is not there.
        let mixed = json!({"values": {"B": null, "NOT_THERE": null, "C": "c"}});
        let mixed = world.post(PATH, mixed).await.json();
        let names: Vec<&str> = mixed["secrets"]
            .as_array()
            .unwrap()
            .iter()
            .map(|s| s["name"].as_str().unwrap())
            .collect();
        assert_eq!(
            (names, &mixed["version"]),
            (vec!["C", "DATABASE_URL"], &json!(3))
        );
        assert_eq!(
            delete(&world, "/v1/apps/shop/secrets/C").await.json()["version"],
            4
        );
        let gone = delete(&world, "/v1/apps/shop/secrets/C").await;
        assert_eq!(gone.status, StatusCode::NOT_FOUND);
    }

    #[tokio::test]
    async fn what_no_environment_holds_is_refused_and_never_repeated() {
        let world = World::new().await;
        world.app("shop").await;
        let long = "hunter2".repeat(10_000);
        let many: BTreeMap<String, String> = (0..=MAX_SECRETS)
            .map(|n| (format!("S{n}"), String::new()))
            .collect();
        let much: BTreeMap<String, String> = (0..9)
            .map(|n| (format!("S{n}"), "x".repeat(MAX_VALUE)))
            .collect();
        for values in [
            json!({"A": long}),
            json!({"A": "hunter2\0"}),
            json!({"A-B": "hunter2"}),
            json!({"": "hunter2"}),
            json!({"A": 7}),
            json!(many),
            json!(much),
        ] {
            let answer = world.post(PATH, json!({"values": values})).await;
            assert_eq!(
                answer.status,
                StatusCode::UNPROCESSABLE_ENTITY,
                "{answer:?}"
            );
            assert!(!format!("{answer:?}").contains("hunter2"), "{answer:?}");
        }
        assert_eq!(world.get(PATH).await.json()["version"], 0);
    }

    #[tokio::test]
    async fn they_are_the_owners_alone_and_go_with_the_app() {
        let world = World::new().await;
        world.app("shop").await;
        let values = json!({"values": {"A": "a"}});
        world.post(PATH, values.clone()).await;
        for (method, path) in [
            (Method::GET, PATH),
            (Method::POST, PATH),
            (Method::GET, "/v1/apps/shop/secrets/A"),
            (Method::DELETE, "/v1/apps/shop/secrets/A"),
        ] {
            let answer = world.call(RIVAL, method, path, values.to_string()).await;
            assert_eq!(answer.status, StatusCode::NOT_FOUND, "{answer:?}");
        }
        delete(&world, "/v1/apps/shop").await;
        world.app("shop").await;
        assert_eq!(world.get(PATH).await.json()["version"], 0);
    }

    #[tokio::test]
    async fn of_many_changes_at_once_none_is_lost() {
        let world = World::new().await;
        world.app("shop").await;
        let changes = (0..8).map(|n| world.post(PATH, json!({"values": {format!("S{n}"): "x"}})));
        for answer in futures::future::join_all(changes).await {
            assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        }
        let all = world.get(PATH).await.json();
        assert_eq!(all["version"], 8);
        assert_eq!(all["secrets"].as_array().unwrap().len(), 8);
    }

    #[tokio::test]
    async fn a_machine_may_ask_for_secrets_that_were_set_before_it() {
        let world = World::new().await;
        world.app("shop").await;
        let path = "/v1/apps/shop/machines";
        let body = |version| {
            let file = json!({"guest_path": "/key", "secret_name": "KEY"});
            json!({"config": {"image": "example.com/x:1", "files": [file]}, "min_secrets_version": version})
        };
        let early = world.post(path, body(1)).await;
        assert_eq!(early.status, StatusCode::PRECONDITION_FAILED, "{early:?}");
        world
            .post(PATH, json!({"values": {"KEY": "aHVudGVyMg=="}}))
            .await;
        let machine = world.post(path, body(1)).await;
        assert_eq!(machine.status, StatusCode::OK, "{machine:?}");
        let id = machine.json()["id"].as_str().unwrap().to_owned();
        let shown = world.get(&format!("{path}/{id}")).await;
        assert_eq!(shown.json()["config"]["files"][0]["secret_name"], "KEY");
        assert!(!format!("{shown:?}").contains("aHVudGVyMg"), "{shown:?}");
        let mut both = body(1);
        both["config"]["files"][0]["raw_value"] = json!("aGk=");
        let both = world.post(path, both).await;
        assert_eq!(both.status, StatusCode::UNPROCESSABLE_ENTITY, "{both:?}");
    }
}
