//! Volumes: data that outlives Machines.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tern_e2e::{World, fly_toml};

/// The shop, whose volume `data` is where `hello` writes.
fn shop_toml() -> String {
    let mounts =
        "\n[mounts]\n  source = \"data\"\n  destination = \"/data\"\n  initial_size = \"1gb\"\n";
    fly_toml("shop") + mounts
}

fn volumes(world: &World) -> Result<Vec<Value>> {
    let list = world
        .server
        .tern_json(&["volumes", "list", "--app", "shop"])?;
    Ok(list.as_array().context("no list")?.clone())
}

fn disk(world: &World, volume: &Value) -> Result<PathBuf> {
    let id = volume["id"].as_str().context("no id")?;
    Ok(world.server.data.join("volumes").join(id).join("disk.ext4"))
}

/// The size that a disk's file system has given itself, from its superblock.
fn file_system_bytes(disk: &PathBuf) -> Result<u64> {
    let mut word = [0; 4];
    // `s_blocks_count_lo` of the superblock at 1024; blocks have 4 KiB.
    File::open(disk)?.read_exact_at(&mut word, 1024 + 4)?;
    Ok(u64::from(u32::from_le_bytes(word)) * 4096)
}

#[test]
fn data_survives_all_but_the_volumes_end() -> Result<()> {
    let world = World::new("volume")?;
    let app = world.launch_with("shop", "personal", "hello", &shop_toml())?;
    app.wait_for_https()?;
    let made = volumes(&world)?;
    ensure!(
        made.len() == 1 && made[0]["attached_machine_id"] == app.machine.as_str(),
        "{made:?}"
    );
    app.body("/write?k=kept&v=gold")?;

    // A stop throws the Machine's own disk away, and not the volume.
    app.machine("stop")?;
    assert_eq!(app.body("/read?k=kept")?, "gold");

    // It grows when the Machine next starts cold.
    let id = made[0]["id"].as_str().unwrap();
    let grown = world
        .server
        .tern(&["volumes", "extend", id, "--size", "3", "--app", "shop"])?;
    assert!(grown.contains("starts cold"), "{grown}");
    app.machine("stop")?;
    assert_eq!(app.body("/read?k=kept")?, "gold");
    app.machine("stop")?;
    assert_eq!(file_system_bytes(&disk(&world, &made[0])?)?, 3 << 30);

    // The Machine goes, the volume stays, and the next deploy takes it.
    let destroyed = world
        .server
        .tern(&["volumes", "destroy", id, "--yes", "--app", "shop"]);
    assert!(
        destroyed
            .unwrap_err()
            .to_string()
            .contains("is mounted by machine")
    );
    app.machine("destroy")?;
    let dir = world.dir().join("apps").join("shop");
    let dir = dir.to_str().unwrap();
    world
        .server
        .tern(&["deploy", dir, "--image", &world.image("hello")?])?;
    assert_eq!(app.body("/read?k=kept")?, "gold");
    let after = volumes(&world)?;
    ensure!(
        after.len() == 1 && after[0]["id"] == made[0]["id"],
        "{after:?}"
    );
    assert_ne!(after[0]["attached_machine_id"], app.machine.as_str());

    let next = after[0]["attached_machine_id"].as_str().unwrap();
    world
        .server
        .tern(&["machine", "destroy", next, "--force", "--app", "shop"])?;
    world
        .server
        .tern(&["volumes", "destroy", id, "--yes", "--app", "shop"])?;
    assert!(volumes(&world)?.is_empty());
    assert!(!disk(&world, &made[0])?.exists());
    Ok(())
}

#[test]
fn a_sleeping_machines_volume_is_copied_and_the_machine_sleeps_on() -> Result<()> {
    let world = World::new("snapshot")?;
    let app = world.launch_with("shop", "personal", "hello", &shop_toml())?;
    app.wait_for_https()?;
    let id = volumes(&world)?[0]["id"].as_str().unwrap().to_owned();
    let snapshots = |verb: &str| {
        world
            .server
            .tern(&["volumes", "snapshots", verb, &id, "--app", "shop"])
    };
    app.body("/write?k=kept&v=first")?;
    let count = app.get("/counter")?.json()?["count"].as_u64().unwrap();
    let refused = snapshots("create").unwrap_err().to_string();
    assert!(refused.contains("suspend or stop it first"), "{refused}");

    app.machine("suspend")?;
    let made = snapshots("create")?;
    let snapshot = made
        .split_whitespace()
        .find(|w| w.starts_with("vs_"))
        .context(made.clone())?;
    world
        .server
        .tern(&["volumes", "fork", &id, "--name", "fork", "--app", "shop"])?;
    // Its memory was not touched: the counter, which is nowhere else, goes on.
    assert_eq!(app.get("/counter")?.json()?["count"], count + 1);
    app.body("/write?k=kept&v=later")?;

    let restore = [
        "volumes",
        "create",
        "data",
        "--snapshot",
        snapshot,
        "--app",
        "shop",
    ];
    world.server.tern(&restore)?;
    app.machine("stop")?;
    app.machine("destroy")?;
    world
        .server
        .tern(&["volumes", "destroy", &id, "--yes", "--app", "shop"])?;
    let dir = world.dir().join("apps").join("shop");
    world.server.tern(&[
        "deploy",
        dir.to_str().unwrap(),
        "--image",
        &world.image("hello")?,
    ])?;
    assert_eq!(app.body("/read?k=kept")?, "first");
    let left = volumes(&world)?;
    assert_eq!(
        left.iter().filter(|v| v["name"] == "fork").count(),
        1,
        "{left:?}"
    );
    Ok(())
}
