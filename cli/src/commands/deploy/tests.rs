use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::commands::testing::World;

const HTTP: &str = "[http_service]\ninternal_port = 8080\n";

async fn deploy(world: &World, dir: &Path, image: &str) -> Result<(), String> {
    let args = Deploy {
        directory: dir.to_owned(),
        image: Some(format!("example.com/{image}")),
        // Long enough for what is well to be found so.
        wait_timeout: Some(Duration::from_secs(if image.contains("elsewhere") {
            1
        } else {
            120
        })),
        ..Deploy::default()
    };
    let outcome = run(&world.client, args).await;
    outcome.map(drop).map_err(|e| output::chain(&e))
}

#[tokio::test]
async fn an_app_that_exits_fails_the_deploy_and_what_was_there_is_back() {
    let world = World::new().await;
    let dir = world.app("shop", HTTP).await;
    deploy(&world, &dir, "good:1").await.unwrap();
    for code in [0, 1] {
        let failed = deploy(&world, &dir, &format!("exits-{code}")).await;
        let failed = failed.unwrap_err();
        assert!(failed.contains("the deploy was undone"), "{failed}");
        assert!(
            failed.contains(&format!("exited with code {code}")),
            "{failed}"
        );
        let machine = world.machine("shop").await;
        assert_eq!(machine["config"]["image"], "example.com/good:1");
        assert_eq!(machine["state"], "started");
    }
}

#[tokio::test]
async fn an_app_that_exits_fails_its_first_deploy_too() {
    let world = World::new().await;
    for (name, toml) in [("shop", HTTP), ("worker", "")] {
        let dir = world.app(name, toml).await;
        let failed = deploy(&world, &dir, "exits-0").await.unwrap_err();
        assert!(failed.contains("exited with code 0"), "{failed}");
    }
}

#[tokio::test]
async fn an_image_that_cannot_be_had_changes_nothing() {
    let world = World::new().await;
    let dir = world.app("shop", HTTP).await;
    deploy(&world, &dir, "good:1").await.unwrap();
    let before = world.machine("shop").await;
    let failed = deploy(&world, &dir, "absent:2").await.unwrap_err();
    assert!(failed.contains("manifest unknown"), "{failed}");
    assert!(!failed.contains("undone"), "{failed}");
    assert_eq!(world.machine("shop").await, before);
    deploy(&world, &dir, "good:2").await.unwrap();
    assert_eq!(*world.host.prepared.lock(), ["example.com/good:2"]);
}

#[tokio::test]
async fn an_app_that_listens_elsewhere_is_told_where() {
    let world = World::new().await;
    for (name, image) in [("shop", "elsewhere"), ("bare", "elsewhere-scratch")] {
        let dir = world.app(name, HTTP).await;
        let failed = deploy(&world, &dir, image).await.unwrap_err();
        let said = "listens on 3000, fly.toml says 8080";
        assert!(failed.contains(said), "{failed}");
    }
}

#[tokio::test]
async fn the_second_of_two_deploys_is_refused_and_free_again_after_the_first() {
    let world = World::new().await;
    let dir = world.app("shop", HTTP).await;
    let lease = "/v1/apps/shop/lease";
    let held: Value = world
        .client
        .post(
            lease,
            &json!({"ttl": 300, "description": "tern deploy by ann@laptop"}),
        )
        .await
        .unwrap();
    let refused = deploy(&world, &dir, "good:1").await.unwrap_err();
    let since = &held["data"]["taken_at"].as_str().unwrap()[..19];
    for said in ["another deploy is under way", "ann@laptop", since] {
        assert!(refused.contains(said), "{said}: {refused}");
    }
    let all: Vec<Value> = world.client.get("/v1/apps/shop/machines").await.unwrap();
    assert!(all.is_empty(), "{all:?}");
    let release = world
        .client
        .request(http::Method::DELETE, lease)
        .header(
            "fly-machine-lease-nonce",
            held["data"]["nonce"].as_str().unwrap(),
        )
        .body(crate::client::empty())
        .unwrap();
    world.client.call(release).await.unwrap();
    deploy(&world, &dir, "good:1").await.unwrap();
    // Ours goes with the deploy.
    deploy(&world, &dir, "good:2").await.unwrap();
}

#[tokio::test]
async fn the_only_region_is_used_and_told_to_the_app() {
    let world = World::new().await;
    let toml = format!("primary_region = \"ams\"\n{HTTP}");
    let dir = world.app("shop", &toml).await;
    deploy(&world, &dir, "good:1").await.unwrap();
    let machine = world.machine("shop").await;
    assert_eq!(machine["region"], "local");
    assert_eq!(machine["config"]["env"]["PRIMARY_REGION"], "local");
}

#[tokio::test]
async fn a_release_command_that_fails_stops_the_deploy() {
    let world = World::new().await;
    let release = format!("{HTTP}[deploy]\nrelease_command = \"sh -c 'migrate --all'\"\n");
    let dir = world.app("shop", &release).await;
    let failed = deploy(&world, &dir, "exits-1").await.unwrap_err();
    assert!(
        failed.contains("the release command failed, and nothing was deployed"),
        "{failed}"
    );
    assert!(failed.contains("exited with code 1"), "{failed}");
    let all: Vec<Value> = world.client.get("/v1/apps/shop/machines").await.unwrap();
    assert!(all.is_empty(), "{all:?}");
}

#[tokio::test]
async fn a_release_command_that_ends_well_leaves_the_app_alone() {
    let world = World::new().await;
    let release = format!("{HTTP}[deploy]\nrelease_command = \"migrate\"\n");
    let dir = world.app("shop", &release).await;
    deploy(&world, &dir, "once").await.unwrap();
    let machine = world.machine("shop").await;
    assert_eq!(machine["config"]["metadata"]["fly_process_group"], "app");
}

#[test]
fn a_release_runs_with_the_apps_environment_and_serves_nothing() {
    let text = format!(
        "[env]\nA = \"1\"\n{HTTP}[deploy]\nrelease_command = \"sh -c 'a b'\"\n\
         [deploy.release_command_vm]\nmemory = \"1gb\"\n"
    );
    let (config, warnings) = crate::appconfig::AppConfig::parse(&text).unwrap();
    assert_eq!(warnings, []);
    let release = release_config(&config, "img", Path::new("."))
        .unwrap()
        .unwrap();
    assert_eq!(release.init.cmd.as_deref().unwrap(), ["sh", "-c", "a b"]);
    assert_eq!(
        (&*release.env["A"], &*release.env["RELEASE_COMMAND"]),
        ("1", "1")
    );
    assert!(release.services.is_empty() && release.mounts.is_empty());
    assert_eq!(release.guest.memory_mb, 1024);
    assert_eq!(release.restart.policy, tern_catalog::RestartPolicy::No);
}
