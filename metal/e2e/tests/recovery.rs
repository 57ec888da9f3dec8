//! What is killed comes back, and nothing else notices more than it must.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests fail by panicking")]

use std::os::unix::fs::FileExt as _;

use anyhow::Result;
use nix::sys::signal::{Signal, kill};
use tern_e2e::World;
use tern_e2e::process::wait_for;
use tern_e2e::world::{App, PATIENCE};

#[test]
fn machines_outlive_a_killed_serve_and_are_adopted() -> Result<()> {
    let mut world = World::new("adopt")?;
    let (hostname, machine, monitor, before) = {
        let app = world.launch("hello", "personal")?;
        app.wait_for_https()?;
        let count = app.get("/counter")?.json()?["count"].as_u64();
        (
            app.hostname.clone(),
            app.machine.clone(),
            app.monitor()?,
            count.unwrap_or(0),
        )
    };
    let root = world.pebble.issued_root.clone();
    let get = |path: &str| {
        let mut curl = std::process::Command::new("curl");
        curl.args(["--max-time", "30", "--cacert"])
            .arg(&root)
            .arg(format!("https://{hostname}{path}"));
        tern_e2e::Reply::of(&mut curl)
    };
    // Under load: requests go on while it dies and comes back; they may fail then, and only then.
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        let load = scope.spawn(|| {
            let mut answered = 0u32;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                answered += u32::from(get("/").is_ok_and(|r| r.status == 200));
            }
            answered
        });
        let outcome = (|| {
            world.server.kill()?;
            kill(monitor, None)?;
            world.server.up()?;
            wait_for("it answers again", PATIENCE, || {
                Ok((get("/")?.status == 200).then_some(()))
            })
        })();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(load.join().unwrap() > 0);
        outcome
    })?;
    let count = get("/counter")?.json()?["count"].as_u64();
    assert_eq!(
        count,
        Some(before + 1),
        "the Machine was started anew instead of being adopted"
    );
    let pid = std::fs::read_to_string(
        world
            .server
            .data
            .join("machines")
            .join(&machine)
            .join("vmm.pid"),
    )?;
    assert_eq!(pid.trim(), monitor.to_string());
    // In a PID namespace of its own it is number 1.
    let status = std::fs::read_to_string(format!("/proc/{monitor}/status"))?;
    let numbers = format!("\nNSpid:\t{monitor}\t1\n");
    assert!(status.contains(&numbers), "{status}");
    Ok(())
}

#[test]
fn a_killed_monitor_is_told_and_the_next_request_is_answered() -> Result<()> {
    let world = World::new("monitor-killed")?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    let first = app.monitor()?;
    kill(first, Signal::SIGKILL)?;
    let reply = app.get("/")?;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_ne!(app.monitor()?, first);
    // What a request has started may answer before its host tells of it.
    app.wait_for_state("started")?;
    let told = app.status()?["events"].to_string();
    assert!(told.contains("monitor"), "no event tells why: {told}");
    Ok(())
}

#[test]
fn a_damaged_snapshot_is_refused_and_the_machine_starts_cold() -> Result<()> {
    let world = World::new("bad-snapshot")?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    let truncate = |file: &std::fs::File| file.set_len(file.metadata()?.len() / 2);
    let flip = |file: &std::fs::File| {
        let (mut byte, middle) = ([0], file.metadata()?.len() / 2);
        file.read_exact_at(&mut byte, middle)?;
        file.write_all_at(&[byte[0] ^ 0x40], middle)
    };
    let damages: [(&str, Damage<'_>); 3] = [
        ("state", &truncate),
        ("state", &flip),
        ("memory", &truncate),
    ];
    for (name, damage) in damages {
        app.machine("suspend")?;
        let path = world
            .server
            .data
            .join("machines")
            .join(&app.machine)
            .join("jail/snapshot")
            .join(name);
        damage(
            &std::fs::File::options()
                .read(true)
                .write(true)
                .open(&path)?,
        )?;
        let cold_before = told(&app)?;
        assert_eq!(app.get("/")?.status, 200);
        // What a request has started may answer before its host tells of it.
        app.wait_for_state("started")?;
        assert!(
            told(&app)? > cold_before,
            "no event tells of the cold start: {:#}",
            app.status()?
        );
    }
    Ok(())
}

/// Damages a file.
type Damage<'a> = &'a dyn Fn(&std::fs::File) -> std::io::Result<()>;

/// How often events speak of a snapshot that could not be used.
fn told(app: &App<'_>) -> Result<usize> {
    Ok(app.status()?["events"]
        .to_string()
        .matches("snapshot")
        .count())
}
