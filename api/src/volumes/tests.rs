use axum::body::Body;
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::testing::{ADMIN, RIVAL, World};

const VOLUMES: &str = "/v1/apps/shop/volumes";
const MACHINES: &str = "/v1/apps/shop/machines";

async fn shop() -> World {
    let world = World::new().await;
    world.app("shop").await;
    world
}

async fn volume(world: &World) -> String {
    let made = world
        .post(VOLUMES, json!({"name": "data", "size_gb": 1}))
        .await
        .json();
    assert_eq!(
        (&made["state"], &made["size_gb"]),
        (&json!("created"), &json!(1)),
        "{made}"
    );
    made["id"].as_str().unwrap().to_owned()
}

fn mounting(volume: &str) -> Value {
    json!({"config": {"image": "x", "mounts": [{"volume": volume, "path": "/data"}]}})
}

async fn delete(world: &World, path: &str) -> StatusCode {
    world
        .call(ADMIN, Method::DELETE, path, Body::empty())
        .await
        .status
}

#[tokio::test]
async fn a_volume_is_made_extended_and_destroyed() {
    let world = shop().await;
    let id = volume(&world).await;
    let at = format!("{VOLUMES}/{id}");
    assert_eq!(world.get(VOLUMES).await.json()[0]["id"], json!(id));
    let extend = async |size: u32| {
        let body = json!({"size_gb": size}).to_string();
        world
            .call(ADMIN, Method::PUT, &format!("{at}/extend"), body)
            .await
    };
    let extended = extend(5).await.json();
    assert_eq!(
        (&extended["needs_restart"], &extended["volume"]["size_gb"]),
        (&json!(false), &json!(5))
    );
    assert_eq!(extend(4).await.status, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(
        extend(50_000).await.status,
        StatusCode::UNPROCESSABLE_ENTITY
    );
    assert_eq!(delete(&world, &at).await, StatusCode::OK);
    assert_eq!(world.get(&at).await.status, StatusCode::NOT_FOUND);
    for wrong in [
        json!({"name": "No-Dashes"}),
        json!({"name": "a", "size_gb": 0}),
        json!({"name": "a", "fstype": "raw"}),
        json!({"size_gb": 1}),
    ] {
        assert_eq!(
            world.post(VOLUMES, wrong).await.status,
            StatusCode::UNPROCESSABLE_ENTITY
        );
    }
}

#[tokio::test]
async fn one_machine_at_a_time_mounts_a_volume() {
    let world = shop().await;
    let id = volume(&world).await;
    let at = format!("{VOLUMES}/{id}");
    let first = world.post(MACHINES, mounting(&id)).await.json();
    let first = first["id"].as_str().unwrap();
    assert_eq!(
        world.get(&at).await.json()["attached_machine_id"],
        json!(first)
    );
    let second = world.post(MACHINES, mounting(&id)).await;
    assert_eq!(
        second.status,
        StatusCode::UNPROCESSABLE_ENTITY,
        "{second:?}"
    );
    assert!(second.json()["error"].as_str().unwrap().contains(first));
    assert_eq!(delete(&world, &at).await, StatusCode::PRECONDITION_FAILED);

    // Unmounted by a new config, it is free for another.
    let path = format!("{MACHINES}/{first}");
    assert_eq!(
        world
            .post(&path, json!({"config": {"image": "x"}}))
            .await
            .status,
        StatusCode::OK
    );
    assert_eq!(
        world.get(&at).await.json()["attached_machine_id"],
        Value::Null
    );
    let second = world.post(MACHINES, mounting(&id)).await.json();
    let second = second["id"].as_str().unwrap();
    let back = world.post(&path, mounting(&id)).await;
    assert_eq!(back.status, StatusCode::UNPROCESSABLE_ENTITY);

    // And with its Machine gone it is free too.
    assert_eq!(
        delete(&world, &format!("{MACHINES}/{second}?force=true")).await,
        StatusCode::OK
    );
    assert_eq!(
        world.post(&path, mounting(&id)).await.status,
        StatusCode::OK
    );
}

#[tokio::test]
async fn of_many_at_once_one_gets_the_volume() {
    let world = shop().await;
    let id = volume(&world).await;
    let tries = (0..8).map(|_| world.post(MACHINES, mounting(&id)));
    let statuses: Vec<u16> = futures::future::join_all(tries)
        .await
        .iter()
        .map(|a| a.status.as_u16())
        .collect();
    assert_eq!(
        statuses.iter().filter(|s| **s == 200).count(),
        1,
        "{statuses:?}"
    );
    assert_eq!(
        world.get(MACHINES).await.json().as_array().unwrap().len(),
        1
    );
}

#[tokio::test]
async fn snapshots_are_made_of_what_stands_still() {
    let world = shop().await;
    let id = volume(&world).await;
    let machine = world.post(MACHINES, mounting(&id)).await.json();
    let machine = format!("{MACHINES}/{}", machine["id"].as_str().unwrap());
    assert_eq!(
        world
            .get(&format!("{machine}/wait?state=started"))
            .await
            .status,
        StatusCode::OK
    );
    let snapshots = format!("{VOLUMES}/{id}/snapshots");
    let running = world.post(&snapshots, json!({})).await;
    assert_eq!(running.status, StatusCode::PRECONDITION_FAILED);
    assert_eq!(
        world
            .post(&format!("{machine}/suspend"), json!({}))
            .await
            .status,
        StatusCode::OK
    );
    assert_eq!(
        world
            .get(&format!("{machine}/wait?state=suspended"))
            .await
            .status,
        StatusCode::OK
    );
    let made = world.post(&snapshots, json!({})).await.json();
    assert_eq!(
        (&made["status"], &made["size"]),
        (&json!("created"), &json!(4096))
    );
    let snapshot = made["id"].as_str().unwrap();
    assert_eq!(world.get(&snapshots).await.json()[0]["id"], json!(snapshot));

    let restored = world
        .post(VOLUMES, json!({"name": "again", "snapshot_id": snapshot}))
        .await
        .json();
    assert_eq!(
        (&restored["state"], &restored["size_gb"]),
        (&json!("created"), &json!(1))
    );
    let small = json!({"name": "again", "snapshot_id": snapshot, "source_volume_id": id});
    assert_eq!(
        world.post(VOLUMES, small).await.status,
        StatusCode::UNPROCESSABLE_ENTITY
    );
    let path = format!("{snapshots}/{snapshot}");
    assert_eq!(delete(&world, &path).await, StatusCode::NO_CONTENT);
    assert_eq!(delete(&world, &path).await, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn another_apps_volume_is_out_of_reach() {
    let world = shop().await;
    let id = volume(&world).await;
    let body = json!({"app_name": "spy", "org_slug": "rivals"}).to_string();
    let spy = world.call(RIVAL, Method::POST, "/v1/apps", body).await;
    assert_eq!(spy.status, StatusCode::CREATED);
    let theft = mounting(&id).to_string();
    let theft = world
        .call(RIVAL, Method::POST, "/v1/apps/spy/machines", theft)
        .await;
    assert_eq!(theft.status, StatusCode::NOT_FOUND);
    let fork = json!({"name": "a", "source_volume_id": id}).to_string();
    let fork = world
        .call(RIVAL, Method::POST, "/v1/apps/spy/volumes", fork)
        .await;
    assert_eq!(fork.status, StatusCode::NOT_FOUND);
    for path in [
        format!("{VOLUMES}/{id}"),
        format!("/v1/apps/spy/volumes/{id}"),
    ] {
        let seen = world.call(RIVAL, Method::GET, &path, Body::empty()).await;
        assert!(seen.status.is_client_error(), "{path}");
    }
    let app = delete(&world, "/v1/apps/shop").await;
    assert_eq!(app, StatusCode::CONFLICT, "it has data");
    assert_eq!(
        delete(&world, "/v1/apps/shop?force=true").await,
        StatusCode::ACCEPTED
    );
}

#[tokio::test]
async fn places_that_are_none_are_refused() {
    let world = shop().await;
    let id = volume(&world).await;
    for path in ["/", "data", "/a/../..", "", "/a\u{0}"] {
        let body = json!({"config": {"image": "x", "mounts": [{"volume": id, "path": path}]}});
        let answer = world.post(MACHINES, body).await;
        assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{path:?}");
    }
}
