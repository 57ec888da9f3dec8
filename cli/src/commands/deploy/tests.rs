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

/// What a deploy must leave alone: a Machine but for the time at which it was last written.
async fn lone(world: &World) -> Value {
    let mut machine = world.machine("shop").await;
    machine["updated_at"] = Value::Null;
    machine
}

#[tokio::test]
async fn an_app_that_exits_fails_the_deploy_and_what_was_there_never_stopped() {
    let world = World::new().await;
    let dir = world.app("shop", HTTP).await;
    deploy(&world, &dir, "good:1").await.unwrap();
    let before = lone(&world).await;
    for code in [0, 1] {
        let failed = deploy(&world, &dir, &format!("exits-{code}")).await;
        let failed = failed.unwrap_err();
        assert!(failed.contains("nothing was changed"), "{failed}");
        assert!(
            failed.contains(&format!("exited with code {code}")),
            "{failed}"
        );
        assert_eq!(lone(&world).await, before);
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
    let before = lone(&world).await;
    let failed = deploy(&world, &dir, "absent:2").await.unwrap_err();
    assert!(failed.contains("manifest unknown"), "{failed}");
    assert!(!failed.contains("undone"), "{failed}");
    assert_eq!(lone(&world).await, before);
    deploy(&world, &dir, "good:2").await.unwrap();
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

const VOLUME: &str =
    "[http_service]\ninternal_port = 8080\n[mounts]\nsource = \"data\"\ndestination = \"/data\"\n";

async fn get(world: &World, path: &str) -> Value {
    let path = format!("/v1/apps/shop/{path}");
    world.client.get(&path).await.unwrap()
}

/// Images of an app's Machines.
async fn images(world: &World) -> Vec<String> {
    let all = get(world, "machines").await;
    let image = |m: &Value| m["config"]["image"].as_str().unwrap().to_owned();
    all.as_array().unwrap().iter().map(image).collect()
}

/// Its releases, newest first: version, status, description.
async fn releases_of(world: &World) -> Vec<(u64, String, String)> {
    let all = get(world, "releases").await;
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    let one = |r: &Value| {
        (
            r["version"].as_u64().unwrap(),
            text(&r["status"]),
            text(&r["description"]),
        )
    };
    all["releases"]
        .as_array()
        .unwrap()
        .iter()
        .map(one)
        .collect()
}

async fn scale(world: &World, count: usize) -> Result<()> {
    change(
        &world.client,
        &"shop".parse().unwrap(),
        Change::default(),
        |found| {
            let mut groups = own_groups(found, &serde_json::Map::new());
            for group in &mut groups {
                (group.keep, group.count) = (true, Some(count));
            }
            Ok(groups)
        },
    )
    .await
}

#[tokio::test]
async fn at_every_moment_of_a_deploy_a_machine_serves() {
    let world = World::new().await;
    let dir = world.app("shop", HTTP).await;
    deploy(&world, &dir, "good:0").await.unwrap();
    let view = world.view.clone();
    let watch = tokio::spawn(async move {
        let mut changes = view.changes();
        loop {
            let snapshot = view.snapshot();
            let serves = snapshot.machines.values().any(|m| {
                let status = snapshot.machine_status.get(&m.id);
                let started =
                    status.is_some_and(|s| s.state == tern_catalog::MachineState::Started);
                let wanted = m.desired.state == tern_catalog::DesiredState::Started;
                // Those whose image exits never do.
                started && wanted && !m.cordoned && m.config.image.contains("good")
            });
            assert!(serves, "{:?}", snapshot.machines);
            changes.changed().await.unwrap();
        }
    });
    for n in 1..5 {
        let before = world.machine("shop").await["id"].clone();
        deploy(&world, &dir, &format!("good:{n}")).await.unwrap();
        deploy(&world, &dir, "exits-1").await.unwrap_err();
        let now = world.machine("shop").await;
        assert_ne!(now["id"], before);
        assert_eq!(now["config"]["image"], format!("example.com/good:{n}"));
        assert_eq!(now["cordoned"], false);
        assert_eq!(now["config"]["metadata"]["tern_replaces"], Value::Null);
    }
    assert!(!watch.is_finished(), "{:?}", watch.await);
    watch.abort();
}

#[tokio::test]
async fn a_machine_with_a_volume_is_updated_in_its_place_and_put_back() {
    let world = World::new().await;
    let dir = world.app("shop", VOLUME).await;
    deploy(&world, &dir, "good:1").await.unwrap();
    let before = world.machine("shop").await;
    deploy(&world, &dir, "good:2").await.unwrap();
    let failed = deploy(&world, &dir, "exits-1").await.unwrap_err();
    assert!(failed.contains("the deploy was undone"), "{failed}");
    let now = world.machine("shop").await;
    assert_eq!(now["id"], before["id"]);
    assert_eq!(now["config"]["mounts"], before["config"]["mounts"]);
    assert_eq!(now["config"]["image"], "example.com/good:2");
    assert_eq!(now["state"], "started");
}

/// The volumes that Machines of the app hold.
async fn held(world: &World) -> Vec<String> {
    let machines = get(world, "machines").await;
    let machines = machines.as_array().unwrap().iter();
    let mounts = machines.map(|m| m["config"]["mounts"][0]["volume"].as_str());
    let mut all: Vec<String> = mounts.map(|v| v.unwrap_or("none").to_owned()).collect();
    all.sort();
    all
}

#[tokio::test]
async fn a_machine_keeps_its_volume_whatever_is_changed_of_it() {
    let world = World::new().await;
    let dir = world.app("shop", VOLUME).await;
    deploy(&world, &dir, "good:1").await.unwrap();
    let before = world.machine("shop").await;
    // As a Machine is written that was made by the API: the volume alone.
    let mut config = before["config"].clone();
    config["mounts"][0].as_object_mut().unwrap().remove("name");
    let path = format!("/v1/apps/shop/machines/{}", before["id"].as_str().unwrap());
    let body = json!({"config": config});
    let updated = world.client.post::<Value>(&path, &body);
    updated.await.unwrap();
    let volume = held(&world).await;
    for detach in [false, true] {
        let set = crate::args::Secrets::Set {
            pairs: vec![format!("KEY={detach}")],
            stage: false,
            detach,
            app: crate::args::AppArg {
                app: Some("shop".parse().unwrap()),
                config: dir.clone(),
                json: false,
            },
        };
        let set = crate::commands::secrets::run(&world.client, set);
        set.await.unwrap();
        assert_eq!(world.machine("shop").await["id"], before["id"]);
        assert_eq!(held(&world).await, volume);
    }
}

#[tokio::test]
async fn what_an_undone_deploy_has_taken_volumes_from_gets_them_back() {
    let world = World::new().await;
    let dir = world.app("shop", VOLUME).await;
    deploy(&world, &dir, "good:1").await.unwrap();
    scale(&world, 2).await.unwrap();
    let volumes = held(&world).await;
    assert!(
        volumes.len() == 2 && !volumes.contains(&"none".to_owned()),
        "{volumes:?}"
    );
    std::fs::write(dir.join("fly.toml"), format!("app = \"shop\"\n{HTTP}")).unwrap();
    let failed = deploy(&world, &dir, "lonely").await.unwrap_err();
    assert!(failed.contains("the deploy was undone"), "{failed}");
    assert_eq!(held(&world).await, volumes);
    assert_eq!(images(&world).await, ["example.com/good:1"; 2]);
}

#[tokio::test]
async fn a_volume_of_another_name_is_not_taken_for_the_one_there_is() {
    let world = World::new().await;
    let dir = world.app("shop", VOLUME).await;
    deploy(&world, &dir, "good:1").await.unwrap();
    let before = lone(&world).await;
    let file = dir.join("fly.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let renamed = text.replace("source = \"data\"", "source = \"other\"");
    assert_ne!(renamed, text);
    std::fs::write(&file, renamed).unwrap();
    let failed = deploy(&world, &dir, "good:2").await.unwrap_err();
    assert!(failed.contains("wants one named \"other\""), "{failed}");
    assert_eq!(lone(&world).await, before);
}

#[tokio::test]
async fn a_deploy_that_fails_on_its_way_is_undone_as_a_whole() {
    let world = World::new().await;
    let dir = world.app("shop", HTTP).await;
    deploy(&world, &dir, "good:1").await.unwrap();
    scale(&world, 3).await.unwrap();
    assert_eq!(images(&world).await, ["example.com/good:1"; 3]);
    // The first takes over, and the second ends.
    let failed = deploy(&world, &dir, "lonely").await.unwrap_err();
    assert!(failed.contains("the deploy was undone"), "{failed}");
    assert_eq!(images(&world).await, ["example.com/good:1"; 3]);
    deploy(&world, &dir, "good:2").await.unwrap();
    assert_eq!(images(&world).await, ["example.com/good:2"; 3]);
    scale(&world, 1).await.unwrap();
    assert_eq!(images(&world).await, ["example.com/good:2"]);
}

#[tokio::test]
async fn a_release_tells_what_came_of_it_and_a_rollback_is_one_too() {
    let world = World::new().await;
    let dir = world.app("shop", HTTP).await;
    for image in ["good:1", "good:2"] {
        deploy(&world, &dir, image).await.unwrap();
    }
    deploy(&world, &dir, "exits-1").await.unwrap_err();
    let failed = get(&world, "releases/3").await;
    let message = failed["message"].as_str().unwrap();
    assert!(message.contains("exited with code 1"), "{message}");
    let args = crate::args::Rollback {
        version: None,
        wait_timeout: None,
        app: crate::args::AppArg {
            app: Some("shop".parse().unwrap()),
            config: dir,
            json: false,
        },
    };
    rollback(&world.client, &args).await.unwrap();
    assert_eq!(images(&world).await, ["example.com/good:1"]);
    let told = |version, status: &str, what: &str| (version, status.to_owned(), what.to_owned());
    assert_eq!(
        releases_of(&world).await,
        [
            told(4, "succeeded", "Rollback to v1"),
            told(3, "failed", "Deploy"),
            told(2, "succeeded", "Deploy"),
            told(1, "succeeded", "Deploy"),
        ]
    );
    let metadata = &world.machine("shop").await["config"]["metadata"];
    assert_eq!(metadata["fly_release_version"], "4");
}

/// Breaks a deploy off once its app has so many Machines.
async fn broken_off(world: &World, dir: &Path, image: &str, machines: usize) {
    let view = world.view.clone();
    let seen = view.wait_for(|s| (s.machines.len() == machines).then_some(()));
    // At that very moment: its maker has no answer yet.
    let args = Deploy {
        directory: dir.to_owned(),
        image: Some(format!("example.com/{image}")),
        ..Deploy::default()
    };
    tokio::select! {
        () = seen => {}
        ended = run(&world.client, args) => panic!("{ended:?}"),
    }
    cleaned_up().await;
}

#[tokio::test]
async fn a_deploy_that_is_broken_off_leaves_nothing_and_says_so() {
    let world = World::new().await;
    let dir = world.app("shop", HTTP).await;
    deploy(&world, &dir, "good:1").await.unwrap();
    let before = lone(&world).await;
    // It waits for a port that never opens.
    broken_off(&world, &dir, "elsewhere", 2).await;
    let gone = |s: &tern_catalog::Snapshot| (s.machines.len() == 1).then_some(());
    world.view.wait_for(gone).await;
    assert_eq!(lone(&world).await, before);
    assert_eq!(releases_of(&world).await[0].1, "interrupted");
    // And for a release command that never ends.
    let release = format!("app = \"shop\"\n{HTTP}[deploy]\nrelease_command = \"migrate\"\n");
    std::fs::write(dir.join("fly.toml"), release).unwrap();
    broken_off(&world, &dir, "good:2", 2).await;
    world.view.wait_for(gone).await;
    assert_eq!(lone(&world).await, before);
}

#[tokio::test]
async fn what_a_deploy_that_vanished_has_left_is_removed_by_the_next() {
    let world = World::new().await;
    let dir = world.app("shop", HTTP).await;
    deploy(&world, &dir, "good:1").await.unwrap();
    let old = world.machine("shop").await["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let path = "/v1/apps/shop/machines";
    let beside = |cordoned| {
        let metadata = json!({"fly_process_group": "app", "tern_replaces": old});
        json!({
            "config": {"image": "example.com/good:2", "metadata": metadata},
            "skip_service_registration": cordoned,
        })
    };
    // It vanished before its Machine took over: that one goes.
    let _: Value = world.client.post(path, &beside(true)).await.unwrap();
    deploy(&world, &dir, "good:3").await.unwrap();
    assert_eq!(images(&world).await, ["example.com/good:3"]);
    // And after: the one that was replaced goes.
    let old = world.machine("shop").await["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let mut after = beside(false);
    after["config"]["metadata"]["tern_replaces"] = json!(old);
    let _: Value = world.client.post(path, &after).await.unwrap();
    deploy(&world, &dir, "good:4").await.unwrap();
    assert_eq!(images(&world).await, ["example.com/good:4"]);
}

/// A way to the API that loses the answer to one call that begins like this.
async fn lossy(api: std::net::SocketAddr, begins: &'static str) -> std::net::SocketAddr {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let lost = Arc::new(AtomicBool::new(false));
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let lost = Arc::clone(&lost);
            tokio::spawn(async move {
                let mut server = tokio::net::TcpStream::connect(api).await.unwrap();
                let (mut asked, mut answered) = ([0; 16384], [0; 16384]);
                let mut losing = false;
                loop {
                    tokio::select! {
                        read = client.read(&mut asked) => {
                            let Ok(n @ 1..) = read else { return };
                            let call = String::from_utf8_lossy(&asked[..n]).into_owned();
                            losing |= call.starts_with(begins) && !lost.swap(true, Ordering::Relaxed);
                            server.write_all(&asked[..n]).await.unwrap();
                        }
                        read = server.read(&mut answered) => {
                            let Ok(n @ 1..) = read else { return };
                            if losing {
                                return;
                            }
                            client.write_all(&answered[..n]).await.unwrap();
                        }
                    }
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn a_lost_answer_to_an_update_is_found_out_and_the_update_is_judged() {
    let mut world = World::new().await;
    let dir = world.app("shop", VOLUME).await;
    deploy(&world, &dir, "good:1").await.unwrap();
    for (image, fails) in [("exits-1", true), ("good:2", false)] {
        let way = lossy(world.address, "POST /v1/apps/shop/machines/").await;
        world.client = crate::commands::testing::client_of(way);
        let outcome = deploy(&world, &dir, image).await;
        assert_eq!(outcome.is_err(), fails, "{outcome:?}");
        let expected = if fails { "good:1" } else { "good:2" };
        assert_eq!(images(&world).await, [format!("example.com/{expected}")]);
    }
}

#[tokio::test]
async fn a_lost_answer_to_a_new_machine_leaves_no_second_one() {
    let mut world = World::new().await;
    let dir = world.app("shop", HTTP).await;
    let way = lossy(world.address, "POST /v1/apps/shop/machines ").await;
    world.client = crate::commands::testing::client_of(way);
    deploy(&world, &dir, "good:1").await.unwrap();
    assert_eq!(images(&world).await, ["example.com/good:1"]);
}

#[tokio::test]
async fn a_plan_changes_nothing() {
    let world = World::new().await;
    let dir = world.app("shop", HTTP).await;
    let args = Deploy {
        directory: dir,
        plan: true,
        ..Deploy::default()
    };
    run(&world.client, args).await.unwrap();
    assert_eq!(images(&world).await, [] as [String; 0]);
}

#[tokio::test]
async fn secrets_are_deployed_beside_what_runs() {
    let world = World::new().await;
    let dir = world.app("shop", HTTP).await;
    deploy(&world, &dir, "good:1").await.unwrap();
    let before = world.machine("shop").await["id"].clone();
    let app = crate::args::AppArg {
        app: Some("shop".parse().unwrap()),
        config: dir,
        json: false,
    };
    let set = |value: &str, stage| crate::args::Secrets::Set {
        pairs: vec![format!("KEY={value}")],
        stage,
        detach: false,
        app: app.clone(),
    };
    let secrets = crate::commands::secrets::run;
    secrets(&world.client, set("a", true)).await.unwrap();
    assert_eq!(world.machine("shop").await["id"], before);
    secrets(&world.client, set("b", false)).await.unwrap();
    let after = world.machine("shop").await;
    assert_ne!(after["id"], before);
    assert_eq!(after["config"]["image"], "example.com/good:1");
    // What is so already restarts nobody.
    secrets(&world.client, set("b", false)).await.unwrap();
    assert_eq!(world.machine("shop").await["id"], after["id"]);
    assert_eq!(get(&world, "secrets").await["version"], 2);
    assert_eq!(releases_of(&world).await[0].2, "Secrets");
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
