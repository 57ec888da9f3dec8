//! Apps.

use axum::extract::State;
use http::StatusCode;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use tern_catalog::{
    App, AppName, Compare, Hostname, HostnameRoute, Op, OrgSlug, Record as _, Snapshot, StoreError,
    Transaction,
};

use crate::auth::Caller;
use crate::deletion::{self, Left};
use crate::error::ApiError;
use crate::extract::{Json, Path, Query};
use crate::server::Shared;

/// Both spellings of the name are in use.
#[derive(Debug, Deserialize)]
pub struct Create {
    #[serde(alias = "name")]
    app_name: String,
    org_slug: String,
    network: Option<String>,
}

#[derive(Debug, Deserialize)]
pub struct ListQuery {
    org_slug: Option<OrgSlug>,
}

#[derive(Debug, Default, Deserialize)]
pub struct DestroyQuery {
    #[serde(default)]
    force: bool,
}

/// `GET /v1/apps`.
pub async fn list(
    State(shared): State<Shared>,
    caller: Caller,
    Query(query): Query<ListQuery>,
) -> Json<Value> {
    let snapshot = shared.view.snapshot();
    let asked = |app: &&std::sync::Arc<App>| {
        query
            .org_slug
            .as_ref()
            .is_none_or(|org| *org == app.organization)
    };
    let apps: Vec<Value> = snapshot
        .apps
        .values()
        .filter(|app| caller.sees_app(app))
        .filter(asked)
        .map(|app| shape(&snapshot, app))
        .collect();
    Json(json!({"total_apps": apps.len(), "apps": apps}))
}

/// `POST /v1/apps`.
pub async fn create(
    State(shared): State<Shared>,
    Json(create): Json<Create>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let (name, org): (AppName, OrgSlug) = (create.app_name.parse()?, create.org_slug.parse()?);
    let snapshot = shared.view.snapshot();
    let organization = snapshot.organizations.get(&org).ok_or_else(|| {
        ApiError::invalid(format!("there is no organization {org}; see GET /v1/orgs"))
    })?;
    if create
        .network
        .is_some_and(|n| !n.is_empty() && n != "default")
    {
        return Err(ApiError::invalid(
            "networks of an app's own are not supported yet; leave `network` out",
        ));
    }
    // Also of one whose record went before them, as it did once.
    let left = Left::of(&snapshot, &name);
    if !snapshot.apps.contains_key(&name) && !left.is_nothing() {
        return Err(left.refusal(&name));
    }
    let app = App {
        name: name.clone(),
        organization: org,
        network: organization.default_network,
        deleting: false,
        created_at: Timestamp::now(),
    };
    let mut transaction = Transaction {
        compares: vec![Compare::absent(&app)],
        ops: vec![Op::put(&app)],
    };
    if let Some(domain) = &shared.config.domain {
        let hostname: Hostname = format!("{name}.{domain}").parse()?;
        let route = HostnameRoute {
            hostname,
            app: name.clone(),
            created_at: app.created_at,
        };
        transaction.compares.push(Compare::absent(&route));
        transaction.ops.push(Op::put(&route));
    }
    match shared.catalog.store().commit(transaction).await {
        Ok(revision) => shared.seen(revision).await,
        Err(StoreError::Conflict { .. }) => {
            let found = shared.catalog.get::<App>(name.as_str()).await?;
            return Err(match found {
                Some((app, _)) if app.deleting => left.refusal(&name),
                _ => ApiError::name_taken(format!("app name {name}")),
            });
        }
        Err(other) => return Err(other.into()),
    }
    Ok((
        StatusCode::CREATED,
        Json(shape(&shared.view.snapshot(), &app)),
    ))
}

/// `GET /v1/apps/{app}`.
pub async fn get(
    State(shared): State<Shared>,
    caller: Caller,
    Path(name): Path<AppName>,
) -> Result<Json<Value>, ApiError> {
    let snapshot = shared.view.snapshot();
    let app = caller.app(&snapshot, &name)?;
    Ok(Json(shape(&snapshot, app)))
}

/// `DELETE /v1/apps/{app}`: answered when it has begun. The app is `deleting` until its hosts have removed all that
/// they have of it, and found no more when its name is free.
pub async fn destroy(
    State(shared): State<Shared>,
    caller: Caller,
    Path(name): Path<AppName>,
    Query(query): Query<DestroyQuery>,
) -> Result<StatusCode, ApiError> {
    let snapshot = shared.view.snapshot();
    let app = caller.app(&snapshot, &name)?;
    if !query.force && !app.deleting {
        let machines = snapshot.machines_of(&name).count();
        if machines > 0 {
            return Err(ApiError::conflict(format!(
                "app {name} has {machines} Machines; destroy them too with ?force=true"
            )));
        }
        let volumes = snapshot.volumes_of(&name).count();
        if volumes > 0 {
            return Err(ApiError::conflict(format!(
                "app {name} has {volumes} volumes with data; destroy them too with ?force=true"
            )));
        }
    }
    deletion::begin(&shared, app).await?;
    Ok(StatusCode::ACCEPTED)
}

/// Makes a transaction fail if the app is gone by then, or is being removed: it must not get a Machine or a volume that
/// nobody sees. An error too where the name is by now that of an app which is none of the caller's: the view, by which it
/// was let in, may be behind.
pub async fn still_there(
    shared: &Shared,
    caller: &Caller,
    app: &AppName,
) -> Result<Compare, ApiError> {
    let found = shared.catalog.get::<App>(app.as_str()).await?;
    let found = found.filter(|(found, _)| caller.principal().on_app(found).is_some());
    let (app, revision) = found.ok_or_else(|| ApiError::not_found(format!("app {app}")))?;
    if app.deleting {
        return Err(ApiError::conflict(format!(
            "app {} is being destroyed",
            app.name
        )));
    }
    Ok(Compare {
        key: app.key(),
        revision: Some(revision),
    })
}

fn shape(snapshot: &Snapshot, app: &App) -> Value {
    let machines = snapshot.machines_of(&app.name).count();
    let organization = snapshot.organizations.get(&app.organization);
    json!({
        "id": app.name,
        "name": app.name,
        "status": match machines {
            _ if app.deleting => "deleting",
            0 => "pending",
            _ => "deployed",
        },
        "machine_count": machines,
        "volume_count": snapshot.volumes_of(&app.name).count(),
        "deleting": app.deleting.then(|| Left::of(snapshot, &app.name).to_string()),
        "network": organization.map(|_| "default"),
        "organization": {"slug": app.organization, "name": organization.map(|o| &o.name)},
        "created_at": app.created_at.as_millisecond(),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use async_trait::async_trait;
    use axum::body::Body;
    use http::Method;
    use parking_lot::Mutex;
    use tern_catalog::{
        Catalog, Entry, LeaseId, Listing, Revision, Store, StoreError, Transaction, Watch,
    };
    use tower::ServiceExt as _;

    use crate::testing::{ADMIN, World};

    /// A store that leaves a commit that deletes an app unanswered, and does it only when told.
    struct Late {
        store: Arc<dyn Store>,
        held: Mutex<Option<Transaction>>,
    }

    #[async_trait]
    impl Store for Late {
        async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
            self.store.get(key).await
        }
        async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
            self.store.list(prefix).await
        }
        async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
            *self.held.lock() = Some(transaction);
            Err(StoreError::Unknown("the answer is lost".to_owned()))
        }
        async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
            self.store.watch(prefix, after).await
        }
        async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
            self.store.grant(ttl).await
        }
        async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
            self.store.keep_alive(lease).await
        }
        async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
            self.store.revoke(lease).await
        }
    }

    #[tokio::test]
    async fn a_removal_that_lands_late_leaves_the_names_next_owner_alone() {
        let world = World::new().await;
        let body = || Body::from(r#"{"app_name":"shop","org_slug":"personal"}"#);
        let create = || world.call(ADMIN, Method::POST, "/v1/apps", body());
        assert_eq!(create().await.status, 201);
        let late = Arc::new(Late {
            store: Arc::clone(world.catalog.store()),
            held: Mutex::new(None),
        });
        let mut shared = world.shared.clone();
        shared.catalog = Catalog::new(Arc::clone(&late) as Arc<dyn Store>);
        let request = http::Request::delete("/v1/apps/shop")
            .header("authorization", format!("Bearer {ADMIN}"))
            .body(Body::empty())
            .unwrap();
        let answer = crate::routes::router(shared)
            .oneshot(request)
            .await
            .unwrap();
        assert_eq!(answer.status(), 503);

        // It is looked at, done again, and the name is taken by somebody else.
        let path = "/v1/apps/shop";
        let removed = world.call(ADMIN, Method::DELETE, path, Body::empty()).await;
        assert_eq!(removed.status, 202);
        assert_eq!(create().await.status, 201);
        let held = late.held.lock().take().unwrap();
        let outcome = world.catalog.store().commit(held).await;
        assert!(
            matches!(outcome, Err(StoreError::Conflict { .. })),
            "{outcome:?}"
        );
        let found = world.call(ADMIN, Method::GET, path, Body::empty()).await;
        assert_eq!(found.status, 200);
    }
}
