use axum::body::Body;
use http::{Method, StatusCode};
use serde_json::{Value, json};
use tern_catalog::{HostnameRoute, NetworkId};

use super::*;
use crate::apps::still_there;
use crate::auth::authorize;
use crate::rights::{AppRight, Right};
use crate::testing::{ADMIN, Answer, RIVAL, World};

async fn create_as_rival(world: &World) -> Answer {
    let body = json!({"app_name": "shop", "org_slug": "rivals"}).to_string();
    world.call(RIVAL, Method::POST, "/v1/apps", body).await
}

async fn destroy(world: &World) -> StatusCode {
    let path = "/v1/apps/shop?force=true";
    let answer = world.call(ADMIN, Method::DELETE, path, Body::empty()).await;
    answer.status
}

async fn free(world: &World) {
    let gone = |s: &Snapshot| (!s.apps.contains_key("shop")).then_some(());
    world.shared.view.wait_for(gone).await;
}

/// That the next owner has nothing of this Machine.
async fn assert_is_not_the_rivals(world: &World, machine: &str) {
    let at = format!("/v1/apps/shop/machines/{machine}");
    for (method, path, body) in [
        (Method::GET, at.clone(), json!({})),
        (
            Method::POST,
            format!("{at}/exec"),
            json!({"command": ["env"]}),
        ),
        (
            Method::GET,
            format!("/v1/apps/shop/logs?machine={machine}"),
            json!({}),
        ),
    ] {
        let answer = world.call(RIVAL, method, &path, body.to_string()).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{path}: {answer:?}");
    }
    for path in ["/v1/apps/shop/machines", "/v1/apps/shop/logs"] {
        let answer = world.call(RIVAL, Method::GET, path, Body::empty()).await;
        let shown = String::from_utf8_lossy(&answer.body).into_owned();
        assert!(!shown.contains(machine), "{path}: {shown}");
    }
}

#[tokio::test]
async fn a_name_is_free_when_nothing_of_its_owner_is_left() {
    let mut world = World::new().await;
    world.app("shop").await;
    let machine = world.machine("shop").await;
    let volume = json!({"name": "data", "size_gb": 1, "region": "local"});
    let volume = world.post("/v1/apps/shop/volumes", volume).await;
    assert_eq!(volume.status, StatusCode::OK, "{volume:?}");
    let (shop, registry) = ("shop".parse().unwrap(), &world.shared.registry);
    registry
        .put_manifest(&shop, Some("v1"), "m", b"{}")
        .unwrap();
    world.host_goes_away().await;

    assert_eq!(destroy(&world).await, StatusCode::ACCEPTED);
    let shown = world.get("/v1/apps/shop").await.json();
    assert_eq!(shown["status"], "deleting");
    assert_eq!(shown["deleting"], "1 Machine and 1 volume");
    let taken = create_as_rival(&world).await;
    assert_eq!(taken.status, StatusCode::CONFLICT);
    let said = taken.json()["error"].as_str().unwrap().to_owned();
    assert!(said.contains("1 Machine and 1 volume"), "{said}");
    // It gets nothing new.
    for (path, body) in [
        ("machines", json!({"config": {"image": "example.com/x:1"}})),
        (
            "volumes",
            json!({"name": "data", "size_gb": 1, "region": "local"}),
        ),
        ("certificates/acme", json!({"hostname": "shop.example.com"})),
        ("lease", json!({})),
    ] {
        let answer = world.post(&format!("/v1/apps/shop/{path}"), body).await;
        assert_eq!(answer.status, StatusCode::CONFLICT, "{path}: {answer:?}");
    }
    let push = "/v2/shop/blobs/uploads/";
    assert_eq!(
        world.post(push, json!({})).await.status,
        StatusCode::NOT_FOUND
    );
    // Its public name leads nowhere at once, and to be asked again does no harm.
    let route = world.catalog.get::<HostnameRoute>("shop.tern.test").await;
    assert!(route.unwrap().is_none());
    assert_eq!(destroy(&world).await, StatusCode::ACCEPTED);

    world.host_is_back();
    free(&world).await;
    assert_eq!(create_as_rival(&world).await.status, StatusCode::CREATED);
    assert_is_not_the_rivals(&world, &machine).await;
    let image = world.shared.registry.find_manifest(&shop, "v1").unwrap();
    assert!(image.is_none(), "{image:?}");
}

/// A Machine as earlier versions left it: they gave an app's name away at once.
async fn left_behind(world: &mut World) -> String {
    world.app("shop").await;
    let machine = world.machine("shop").await;
    let running = |s: &Snapshot| s.machine_status.values().next().is_some().then_some(());
    world.shared.view.wait_for(running).await;
    world.host_goes_away().await;
    world.catalog.delete::<App>("shop").await.unwrap();
    let route = world
        .catalog
        .delete::<HostnameRoute>("shop.tern.test")
        .await;
    world.shared.seen(route.unwrap()).await;
    machine
}

#[tokio::test]
async fn a_name_whose_record_went_first_is_not_free_either() {
    let mut world = World::new().await;
    left_behind(&mut world).await;
    let taken = create_as_rival(&world).await;
    assert_eq!(taken.status, StatusCode::CONFLICT, "{taken:?}");
}

#[tokio::test]
async fn what_an_earlier_owner_has_left_is_not_the_next_one_s() {
    let mut world = World::new().await;
    let machine = left_behind(&mut world).await;
    let app = App {
        name: "shop".parse().unwrap(),
        organization: "rivals".parse().unwrap(),
        network: NetworkId(2),
        deleting: false,
        created_at: Timestamp::now(),
    };
    let revision = world.catalog.put(&app).await.unwrap();
    world.shared.seen(revision).await;
    assert_is_not_the_rivals(&world, &machine).await;
}

#[tokio::test]
async fn what_an_earlier_api_has_begun_is_done() {
    let world = World::new().await;
    world.app("shop").await;
    world.machine("shop").await;
    // It died between the mark and all that follows.
    let mark = |app: &mut App| {
        app.deleting = true;
        Ok::<_, ()>(())
    };
    let marked = world.catalog.update("shop", mark).await.unwrap();
    assert!(marked.unwrap().is_some());
    free(&world).await;
    assert_eq!(create_as_rival(&world).await.status, StatusCode::CREATED);
    let value: Value = world.get("/v1/apps").await.json();
    assert_eq!(value["total_apps"], 1);
}

#[tokio::test]
async fn another_owners_app_of_the_same_name_is_not_meant() {
    let world = World::new().await;
    world.app("shop").await;
    let before = world.shared.view.snapshot().apps["shop"].clone();
    assert_eq!(destroy(&world).await, StatusCode::ACCEPTED);
    free(&world).await;
    assert_eq!(create_as_rival(&world).await.status, StatusCode::CREATED);
    // Somebody's calls that began before, on a host that heard of nothing since.
    let header = format!("Bearer {RIVAL}");
    let right = Right::App(AppRight::Deploy);
    let (token, now) = (&world.shared.config.internal_token, Timestamp::now());
    let decided = |with: &str, snapshot: &Snapshot| {
        authorize(snapshot, token, now, Some(with), right, Some("shop"))
    };
    let theirs = decided(&header, &world.shared.view.snapshot());
    let theirs = theirs.unwrap().unwrap();
    let name = &before.name;
    assert!(still_there(&world.shared, &theirs, name).await.is_ok());
    let org = json!({"name": "ours", "org_slug": "personal"}).to_string();
    let ours = world.call(ADMIN, Method::POST, "/v1/tokens", org).await;
    let ours = format!("Bearer {}", ours.json()["token"].as_str().unwrap());
    let mut old = Snapshot::clone(&world.shared.view.snapshot());
    old.apps.insert(name.clone(), before.clone());
    let ours = decided(&ours, &old).unwrap().unwrap();
    assert!(still_there(&world.shared, &ours, name).await.is_err());
    begin(&world.shared, &before).await.unwrap();
    let (app, _) = world.catalog.get::<App>("shop").await.unwrap().unwrap();
    assert!(
        !app.deleting && app.organization.as_str() == "rivals",
        "{app:?}"
    );
}
