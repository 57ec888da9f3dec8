use axum::body::Body;
use http::{Method, Request, StatusCode};
use serde_json::json;
use tern_catalog::{Machine, Op, Record as _, Transaction};

use super::lease::{MachineLease, sweep_leases};
use crate::machines::NONCE;
use crate::testing::{ADMIN, World};

#[tokio::test]
async fn an_update_has_its_image_beside_the_machine_before_anything_changes() {
    let world = World::new().await;
    world.app("shop").await;
    let id = world.machine("shop").await;
    let at = format!("/v1/apps/shop/machines/{id}");
    assert_eq!(
        world
            .get(&format!("{at}/wait?state=started&timeout=20"))
            .await
            .status,
        StatusCode::OK
    );
    let before = world.get(&at).await.json();
    let absent = json!({"config": {"image": "example.com/absent:1"}});
    let refused = world.post(&at, absent).await;
    assert_eq!(refused.status, StatusCode::UNPROCESSABLE_ENTITY);
    let said = refused.json()["error"].to_string();
    assert!(
        said.contains("manifest unknown") && said.contains("left as it was"),
        "{said}"
    );
    assert_eq!(world.get(&at).await.json(), before);
    // Who may not change it, or changes another version, has no image fetched.
    let stale = json!({"config": {"image": "example.com/x:2"}, "current_version": "0"});
    assert_eq!(
        world.post(&at, stale).await.status,
        StatusCode::PRECONDITION_FAILED
    );
    assert!(world.gateway.prepared.lock().is_empty());
    let good = json!({"config": {"image": "example.com/x:2"}});
    assert_eq!(world.post(&at, good).await.status, StatusCode::OK);
    assert_eq!(*world.gateway.prepared.lock(), ["example.com/x:2"]);
}

#[tokio::test]
async fn a_null_is_as_good_as_nothing() {
    let world = World::new().await;
    world.app("shop").await;
    let config = json!({
        "image": "example.com/x:1", "services": null, "mounts": null, "env": null, "checks": null, "metadata": null,
        "files": null, "init": null, "stop_config": null, "restart": null, "schedule": null, "auto_destroy": null,
        "guest": {"gpu_kind": null, "cpus": 2, "memory_mb": null},
    });
    let body = json!({"config": config, "name": null, "region": null, "lease_ttl": null, "skip_launch": null});
    let made = world.post("/v1/apps/shop/machines", body).await;
    assert_eq!(made.status, StatusCode::OK, "{made:?}");
    let made = made.json();
    assert_eq!(
        (&made["config"]["guest"]["cpus"], &made["warnings"]),
        (&json!(2), &json!(null))
    );
    let at = format!("/v1/apps/shop/machines/{}", made["id"].as_str().unwrap());
    let stopped = world
        .post(
            &format!("{at}/stop"),
            json!({"signal": null, "timeout": null}),
        )
        .await;
    assert_eq!(stopped.status, StatusCode::OK, "{stopped:?}");
    // But where it says that something is to go, it does.
    let patch = json!({"a": null}).to_string();
    world
        .post(&format!("{at}/metadata/a"), json!({"value": "1"}))
        .await;
    world
        .call(ADMIN, Method::PATCH, &format!("{at}/metadata"), patch)
        .await;
    assert_eq!(world.get(&format!("{at}/metadata")).await.json(), json!({}));
}

#[tokio::test]
async fn what_is_not_acted_on_is_told_in_the_answer() {
    let world = World::new().await;
    world.app("shop").await;
    let config = json!({"image": "example.com/x:1", "metrics": {"port": 9091}, "colour": "red"});
    let made = world
        .post("/v1/apps/shop/machines", json!({"config": config}))
        .await;
    assert_eq!(made.status, StatusCode::OK, "{made:?}");
    let made = made.json();
    let warnings = made["warnings"].to_string();
    assert!(
        warnings.contains("config.metrics") && warnings.contains("config.colour"),
        "{warnings}"
    );
    let at = format!("/v1/apps/shop/machines/{}", made["id"].as_str().unwrap());
    let updated = world.post(&at, json!({"config": config})).await.json();
    assert_eq!(updated["warnings"], made["warnings"]);
}

#[tokio::test]
async fn the_only_region_stands_for_any() {
    let world = World::new().await;
    world.app("shop").await;
    let body = json!({"config": {"image": "example.com/x:1"}, "region": "ams"});
    let made = world
        .post("/v1/apps/shop/machines", body.clone())
        .await
        .json();
    assert_eq!(made["region"], "local", "{made}");
    assert!(made["warnings"].to_string().contains("ams"), "{made}");
    world.host(2, "fra", 4096).await;
    let refused = world.post("/v1/apps/shop/machines", body).await;
    assert_eq!(refused.json()["status"], "insufficient_capacity");
    assert!(
        refused.json()["error"].to_string().contains("fra, local"),
        "{refused:?}"
    );
}

#[tokio::test]
async fn only_what_runs_is_suspended() {
    let world = World::new().await;
    world.app("shop").await;
    let id = world.machine("shop").await;
    let at = format!("/v1/apps/shop/machines/{id}");
    let wait = |state: &str| format!("{at}/wait?state={state}&timeout=20");
    world.post(&format!("{at}/stop"), json!({})).await;
    assert_eq!(world.get(&wait("stopped")).await.status, StatusCode::OK);
    let refused = world.post(&format!("{at}/suspend"), json!({})).await;
    assert_eq!(refused.status, StatusCode::PRECONDITION_FAILED);
    assert!(
        refused.json()["error"].to_string().contains("stopped"),
        "{refused:?}"
    );
    world.post(&format!("{at}/start"), json!({})).await;
    assert_eq!(world.get(&wait("started")).await.status, StatusCode::OK);
    for _ in 0..2 {
        // Twice is as good as once.
        let done = world.post(&format!("{at}/suspend"), json!({})).await;
        assert_eq!(done.status, StatusCode::OK);
        assert_eq!(world.get(&wait("suspended")).await.status, StatusCode::OK);
    }
}

#[tokio::test]
async fn a_port_is_asked_for_by_its_number() {
    let world = World::new().await;
    world.app("shop").await;
    let id = world.machine("shop").await;
    let ports = format!("/v1/apps/shop/machines/{id}/ports");
    assert_eq!(
        world.get(&format!("{ports}/3000")).await.json()["open"],
        true
    );
    assert_eq!(
        world.get(&format!("{ports}/8080")).await.json()["open"],
        false
    );
    for bad in ["0", "65536", "http"] {
        let answer = world.get(&format!("{ports}/{bad}")).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{bad}");
    }
}

#[tokio::test]
async fn a_public_port_that_is_another_apps_or_not_open_is_refused() {
    let world = World::new().await;
    world.app("shop").await;
    world.app("other").await;
    let with = |ports: serde_json::Value| json!({"config": {"image": "example.com/x:1", "services": [{"internal_port": 9, "ports": ports}]}});
    let raw = with(json!([{"port": 2000}]));
    let made = world.post("/v1/apps/shop/machines", raw.clone()).await;
    assert_eq!(made.status, StatusCode::OK, "{made:?}");
    // More Machines of the same app are welcome.
    let second = world.post("/v1/apps/shop/machines", raw.clone()).await;
    assert_eq!(second.status, StatusCode::OK, "{second:?}");
    for taken in [
        json!([{"port": 2000}]),
        json!([{"start_port": 1999, "end_port": 2001, "handlers": ["tls"]}]),
    ] {
        let refused = world.post("/v1/apps/other/machines", with(taken)).await;
        assert_eq!(refused.status, StatusCode::CONFLICT, "{refused:?}");
        assert!(
            refused.json()["error"]
                .to_string()
                .contains("port 2000 is another app's")
        );
    }
    let id = world.machine("other").await;
    let at = format!("/v1/apps/other/machines/{id}");
    assert_eq!(world.post(&at, raw).await.status, StatusCode::CONFLICT);
    for (ports, said) in [
        (json!([{"port": 22}]), "port 22 is not open to services"),
        (
            json!([{"start_port": 3000, "end_port": 3300}]),
            "more than 256 public ports",
        ),
    ] {
        let refused = world.post("/v1/apps/other/machines", with(ports)).await;
        assert_eq!(
            refused.status,
            StatusCode::UNPROCESSABLE_ENTITY,
            "{refused:?}"
        );
        assert!(
            refused.json()["error"].to_string().contains(said),
            "{refused:?}"
        );
    }
    // What says for whom it is can be shared.
    let tls =
        with(json!([{"port": 443, "handlers": ["tls"]}, {"port": 5432, "handlers": ["pg_tls"]}]));
    for app in ["shop", "other"] {
        let shared = world
            .post(&format!("/v1/apps/{app}/machines"), tls.clone())
            .await;
        assert_eq!(shared.status, StatusCode::OK, "{shared:?}");
    }
}

/// Somebody else's lease, for when they are faster.
fn lease_of_another(id: &str) -> Transaction {
    let lease = MachineLease::new(&id.parse().unwrap(), 60);
    Transaction::of(vec![Op::put(&lease)])
}

#[tokio::test]
async fn a_lease_that_is_taken_meanwhile_keeps_a_change_out() {
    let world = World::new().await;
    world.app("shop").await;
    let id = world.machine("shop").await;
    let at = format!("/v1/apps/shop/machines/{id}");
    let before = world.get(&at).await.json();
    let config = json!({"image": "example.com/x:2"});
    let changes = [
        ("", json!({ "config": config })),
        ("", json!({"config": config, "lease_ttl": 60})),
        ("/stop", json!({})),
        ("/cordon", json!({})),
        ("/metadata/a", json!({"value": "1"})),
    ];
    for (path, body) in changes {
        world
            .catalog
            .delete::<MachineLease>(id.as_str())
            .await
            .unwrap();
        *world.crossed.first.lock() = Some(lease_of_another(&id));
        let refused = world.post(&format!("{at}{path}"), body).await;
        assert_eq!(refused.status, StatusCode::CONFLICT, "{path}: {refused:?}");
    }
    let after = world.get(&at).await.json();
    assert_eq!(after["instance_id"], before["instance_id"]);
    assert_eq!(after["config"]["metadata"], before["config"]["metadata"]);
}

#[tokio::test]
async fn a_lease_is_given_back_by_its_holder_alone() {
    let world = World::new().await;
    world.app("shop").await;
    let id = world.machine("shop").await;
    let at = format!("/v1/apps/shop/machines/{id}/lease");
    let taken = world.post(&at, json!({"ttl": 60})).await.json();
    let nonce = taken["data"]["nonce"].as_str().unwrap();
    // It has ended, and is somebody else's when the holder's goodbye arrives.
    let others = lease_of_another(&id);
    *world.crossed.first.lock() = Some(others);
    let goodbye = Request::delete(&at)
        .header("authorization", format!("Bearer {ADMIN}"))
        .header(NONCE, nonce)
        .body(Body::empty())
        .unwrap();
    let late = world.send(goodbye).await;
    assert_eq!(late.status, StatusCode::BAD_REQUEST, "{late:?}");
    assert_eq!(world.get(&at).await.status, StatusCode::OK);
}

#[tokio::test]
async fn what_changes_nothing_leaves_no_lease_behind() {
    let world = World::new().await;
    world.app("shop").await;
    let id = world.machine("shop").await;
    let at = format!("/v1/apps/shop/machines/{id}");
    let machine = world.catalog.get::<Machine>(&id).await.unwrap().unwrap().0;
    // The version that the caller changes is replaced after all checks, just before the write.
    let mut newer = machine.clone();
    newer.instance_id = "another".into();
    *world.crossed.first.lock() = Some(Transaction::of(vec![Op::put(&newer)]));
    let update = json!({
        "config": {"image": "example.com/x:2"},
        "current_version": machine.instance_id,
        "lease_ttl": 60,
    });
    let refused = world.post(&at, update).await;
    assert_eq!(
        refused.status,
        StatusCode::PRECONDITION_FAILED,
        "{refused:?}"
    );
    let lease = world.get(&format!("{at}/lease")).await;
    assert_eq!(lease.status, StatusCode::NOT_FOUND, "{lease:?}");
}

#[tokio::test]
async fn a_new_configuration_alone_asks_nothing_of_what_runs() {
    let world = World::new().await;
    world.app("shop").await;
    let id = world.machine("shop").await;
    let at = format!("/v1/apps/shop/machines/{id}");
    let before = world.catalog.get::<Machine>(&id).await.unwrap().unwrap().0;
    let update = json!({"config": {"image": "example.com/x:2"}, "skip_launch": true});
    let updated = world.post(&at, update).await;
    assert_eq!(updated.status, StatusCode::OK, "{updated:?}");
    let after = world.catalog.get::<Machine>(&id).await.unwrap().unwrap().0;
    assert_eq!(after.desired, before.desired);
    assert_eq!(after.config.image, "example.com/x:2");
    assert_ne!(after.instance_id, before.instance_id);
}

#[tokio::test]
async fn the_dead_have_no_lease() {
    let world = World::new().await;
    world.app("shop").await;
    let (dead, alive) = (world.machine("shop").await, world.machine("shop").await);
    for id in [&dead, &alive] {
        let lease = MachineLease::new(&id.parse().unwrap(), 60);
        world.catalog.put(&lease).await.unwrap();
    }
    // One that is going may not be taken any more, not even by a call that was begun before.
    let machine = world.catalog.get::<Machine>(&dead).await.unwrap().unwrap();
    let gone = Op::Delete {
        key: machine.0.key(),
    };
    let over = Op::Delete {
        key: MachineLease::key_of(&dead),
    };
    world
        .catalog
        .store()
        .commit(Transaction::of(vec![over.clone()]))
        .await
        .unwrap();
    *world.crossed.first.lock() = Some(Transaction::of(vec![gone]));
    let at = format!("/v1/apps/shop/machines/{dead}/lease");
    let refused = world.post(&at, json!({"ttl": 60})).await;
    assert_eq!(refused.status, StatusCode::NOT_FOUND, "{refused:?}");

    // What was left behind before is swept up, and nobody else's.
    let left = MachineLease::new(&dead.parse().unwrap(), 60);
    world.catalog.put(&left).await.unwrap();
    sweep_leases(&world.shared).await.unwrap();
    let kept = world.catalog.store().list(MachineLease::PREFIX).await;
    let kept: Vec<_> = kept.unwrap().entries.into_iter().map(|e| e.key).collect();
    assert_eq!(kept, [MachineLease::key_of(&alive)]);
}
