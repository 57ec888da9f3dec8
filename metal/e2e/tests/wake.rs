//! Many requests to one sleeping Machine.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests fail by panicking")]

use anyhow::Result;
use serde_json::Value;
use tern_e2e::World;
use tern_e2e::process::output;

const ROUNDS: usize = 20;

#[test]
fn two_hundred_requests_at_once_wake_it_once_and_all_are_answered() -> Result<()> {
    let world = World::new("storm")?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    for round in 1..=ROUNDS {
        app.machine("suspend")?;
        let storm = output(
            world
                .program("tern-loadtest")
                .args(["storm", "--simultaneous", "200", "--rounds", "1", "--url"])
                .arg(format!("https://{}/", app.hostname))
                .arg("--resolve")
                .arg(format!("{}:443:127.0.0.1", app.hostname))
                .arg("--cacert")
                .arg(&world.pebble.issued_root),
        )?;
        assert!(
            storm.status.success(),
            "round {round}: {}{}",
            String::from_utf8_lossy(&storm.stdout),
            String::from_utf8_lossy(&storm.stderr)
        );
        // Starts that requests caused. Twenty rounds stay below the number of events that are kept.
        let mut starts: Vec<Value> = app.events("start")?;
        starts.retain(|start| start["source"] == "proxy");
        assert_eq!(starts.len(), round, "round {round}: {starts:#?}");
        let cold = &starts[starts.len() - 1]["request"]["cold"];
        assert_ne!(*cold, true, "round {round} was no resume: {starts:#?}");
    }
    Ok(())
}
