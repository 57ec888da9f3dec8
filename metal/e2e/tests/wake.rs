//! Many requests to one sleeping Machine, and a wake from the disk alone.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests fail by panicking")]

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;
use tern_e2e::World;
use tern_e2e::page_cache::cached;
use tern_e2e::process::{output, wait_for};
use tern_e2e::world::PATIENCE;

/// Each of which suspends the Machine first.
const ROUNDS: usize = 20;

#[test]
fn two_hundred_requests_at_once_wake_it_once_and_all_are_answered() -> Result<()> {
    let world = World::new("storm")?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    let suspend = world
        .server
        .command(&["machine", "suspend", &app.machine, "--app", "hello"]);
    let words = std::iter::once(suspend.get_program()).chain(suspend.get_args());
    let between: Vec<String> = words.map(|w| w.to_string_lossy().into_owned()).collect();
    let mut storm = world.program("tern-loadtest");
    storm.args([
        "storm",
        "--simultaneous",
        "200",
        "--rounds",
        &ROUNDS.to_string(),
    ]);
    storm.args(["--command-timeout", "60s", "--timeout", "60s"]);
    storm.arg("--url").arg(format!("https://{}/", app.hostname));
    storm
        .arg("--resolve")
        .arg(format!("{}:443:127.0.0.1", app.hostname));
    storm.arg("--cacert").arg(&world.pebble.issued_root);
    storm.arg("--between").arg(between.join(" "));
    for (name, value) in suspend.get_envs() {
        storm.env(name, value.unwrap_or_default());
    }
    let storm = output(&mut storm)?;
    assert!(
        storm.status.success(),
        "{}{}",
        String::from_utf8_lossy(&storm.stdout),
        String::from_utf8_lossy(&storm.stderr)
    );
    // The last round may be answered before its host tells of the start.
    app.wait_for_state("started")?;
    // Starts that requests caused; twenty rounds stay below the number of events that are kept. Each round
    // began asleep and was answered, so each had one at least: as many as rounds means one each.
    let mut starts: Vec<Value> = app.events("start")?;
    starts.retain(|start| start["source"] == "proxy");
    assert_eq!(starts.len(), ROUNDS, "{starts:#?}");
    for start in &starts {
        assert_eq!(start["request"]["cold"], false, "no resume: {start:#}");
    }
    Ok(())
}

#[test]
fn dropped_from_the_page_cache_its_memory_comes_back_from_the_disk() -> Result<()> {
    let validity = Duration::from_secs(90 * 24 * 3600);
    // On the host's data disk itself, not on the overlay of its root.
    let world = World::with_dir(
        Path::new("/var/lib/tern/dropped"),
        validity,
        &["--autostop-after", "1h", "--snapshot-cache", "drop"],
    )?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    let count = || -> Result<Option<u64>> { Ok(app.get("/counter")?.json()?["count"].as_u64()) };
    let before = count()?.unwrap();
    app.machine("suspend")?;
    let machine = world.server.data.join("machines").join(&app.machine);
    let memory = machine.join("jail/snapshot/memory");
    let on_disk = memory.metadata()?.blocks() * 512;
    assert!(on_disk > 8 << 20, "only {on_disk} bytes to drop");
    // A little at its end may still be on the way to the lists that the kernel drops from.
    wait_for("its memory is dropped", PATIENCE, || {
        Ok((cached(&memory)? < 1 << 20).then_some(()))
    })?;
    assert_eq!(count()?, Some(before + 1), "it forgot");
    // What a request has woken may answer before its host tells of it.
    app.wait_for_state("started")?;
    let starts = app.events("start")?;
    let last = starts.last().unwrap();
    assert_eq!(last["request"]["cold"], false, "no resume: {last:#}");
    Ok(())
}
