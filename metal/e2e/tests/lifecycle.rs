//! A Machine's life as its owner sees it: cold start, sleep, wake, memory and disk.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests fail by panicking")]

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tern_e2e::{App, World};

#[test]
fn a_cold_start_ends_in_an_https_reply() -> Result<()> {
    let world = World::new("cold-start")?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    assert_eq!(app.state()?, "started");
    app.machine("stop")?;
    assert_eq!(app.state()?, "stopped");
    let reply = app.get("/")?;
    assert_eq!(reply.status, 200);
    assert!(reply.body.contains(&app.machine), "{reply:?}");
    assert_eq!(reply.version, "2");
    assert!(reply.headers.contains_key("fly-request-id"), "{reply:?}");
    assert_eq!(app.curl("/", &["--http1.1"])?.version, "1.1");
    // What a request has started may answer before its host tells of it.
    app.wait_for_state("started")?;

    // Where the time went is told phase by phase, for a cold start and for a wake.
    let traced = || -> Result<(Value, Vec<String>)> {
        let machine = ["machine", "boot-trace", &app.machine, "--app", "hello"];
        let table = world.server.tern(&machine)?;
        assert!(table.contains("STEP MS"), "{table}");
        let trace = world.server.tern_json(&machine)?;
        let phases = trace["phases"].as_array().context("no phases")?;
        let times: Vec<_> = phases.iter().map(|p| p["at_us"].as_u64()).collect();
        assert!(times.is_sorted(), "{trace:#}");
        let name = |p: &Value| format!("{} {}", p["side"], p["name"]).replace('"', "");
        let names = phases.iter().map(name).collect();
        Ok((trace, names))
    };
    let (trace, names) = traced()?;
    assert_eq!(trace["cold"], true);

    // Its memory can be limited while it runs.
    let path = format!("/v1/apps/hello/machines/{}/memory", app.machine);
    let all = world.server.api("GET", &path, None)?["limit_mb"].clone();
    let less = all.as_u64().context("no limit")? - 16;
    let limited = world
        .server
        .api("PUT", &path, Some(&json!({"limit_mb": less})))?;
    assert_eq!(limited["limit_mb"], less, "{limited}");
    assert!(
        limited["available_mb"].as_u64().is_some_and(|mb| mb > 0),
        "{limited}"
    );
    world
        .server
        .api("PUT", &path, Some(&json!({"limit_mb": all})))?;
    in_order(
        &names,
        &[
            "agent spawned",
            "monitor first_vcpu_run",
            "guest kernel",
            "guest app",
        ],
    );
    app.machine("suspend")?;
    assert_eq!(app.get("/")?.status, 200);
    app.wait_for_state("started")?;
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    assert!(mounts.contains("favordynmods"), "for short wakes: {mounts}");
    let (trace, names) = traced()?;
    assert_eq!(trace["cold"], false);
    in_order(
        &names,
        &[
            "agent reachable",
            "monitor first_request_in",
            "monitor first_reply_out",
        ],
    );
    in_order(&names, &["agent reachable", "agent resumed"]);
    assert!(!names.iter().any(|n| n.starts_with("guest")), "{names:?}");
    Ok(())
}

/// Each of `order` is a phase, one after the other.
fn in_order(names: &[String], order: &[&str]) {
    let at = |name: &&str| names.iter().position(|n| n == name);
    let positions: Vec<_> = order.iter().map(at).collect();
    assert!(
        positions.iter().all(Option::is_some) && positions.is_sorted(),
        "{names:?}"
    );
}

#[test]
fn memory_survives_suspend() -> Result<()> {
    let world = World::new("memory")?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    let count =
        || -> Result<u64> { Ok(app.get("/counter")?.json()?["count"].as_u64().unwrap_or(0)) };
    let first = count()?;
    for round in 1..=5 {
        app.machine("suspend")?;
        assert_eq!(app.state()?, "suspended");
        // Only RAM holds the counter: a restart of any kind would begin again.
        assert_eq!(count()?, first + round);
    }
    assert_eq!(
        app.events("launch")?.len() + app.events("restart")?.len(),
        1
    );
    Ok(())
}

#[test]
fn the_clock_is_right_and_randomness_new_after_a_wake() -> Result<()> {
    let world = World::new("clock")?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    let before = app.body("/random")?;
    app.machine("suspend")?;
    let asleep = Instant::now();
    // Long enough for a clock that stood still to be told from one that is only late.
    while asleep.elapsed().as_secs() < 5 {
        std::thread::park_timeout(Duration::from_secs(5));
    }
    app.body("/")?;
    let guest: i128 = app.body("/time")?.trim().parse()?;
    let host = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)?
        .as_nanos() as i128;
    // The request itself takes time in an emulated host; a clock that stood still is off by 5 s.
    assert!(
        (host - guest).abs() < 2_000_000_000,
        "the guest's clock is {} ms off",
        (host - guest) / 1_000_000
    );
    assert_ne!(app.body("/random")?, before);
    Ok(())
}

#[test]
fn disk_writes_survive_suspend_and_a_restart_of_serve() -> Result<()> {
    let mut world = World::new("disk")?;
    {
        let app = world.launch("hello", "personal")?;
        app.wait_for_https()?;
        app.body("/write?k=kept")?;
        app.machine("suspend")?;
    }
    world.server.stop()?;
    world.server.up()?;
    let machines = world
        .server
        .tern_json(&["machine", "list", "--app", "hello"])?;
    assert_eq!(machines[0]["state"], "suspended");
    let root = world.pebble.issued_root.clone();
    let reply = tern_e2e::Reply::of(
        std::process::Command::new("curl")
            .arg("--cacert")
            .arg(root)
            .arg("https://hello.tern.test/read?k=kept"),
    )?;
    assert_eq!(reply.status, 200, "{reply:?}");
    Ok(())
}

#[test]
fn an_idle_machine_is_suspended_and_wakes() -> Result<()> {
    let month = Duration::from_secs(30 * 24 * 3600);
    let world = World::with("idle", month, &["--autostop-after", "3s"])?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    app.wait_for_state("suspended")?;
    assert_eq!(app.events("suspend")?.last().unwrap()["source"], "proxy");
    assert_eq!(app.get("/")?.status, 200);
    Ok(())
}

#[test]
fn exec_and_logs_reach_the_app() -> Result<()> {
    let world = World::new("exec")?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    let logs = world.server.tern(&["logs", "--app", "hello"])?;
    assert!(logs.contains("8080"), "{logs}");
    // The image holds one program: what it does not have is told as such.
    let none = world.server.tern_output(&[
        "machine",
        "exec",
        &app.machine,
        "--app",
        "hello",
        "--",
        "/nothing",
    ])?;
    assert_ne!(none.status.code(), Some(0));
    let version = world.server.tern(&[
        "machine",
        "exec",
        &app.machine,
        "--app",
        "hello",
        "--",
        "/hello",
        "--version",
    ])?;
    assert!(version.contains("hello"), "{version}");
    a_deploy_that_goes_wrong_leaves_what_was(&world, &app)
}

/// Each says why, and the Machine serves what it served.
fn a_deploy_that_goes_wrong_leaves_what_was(world: &World, app: &App<'_>) -> Result<()> {
    let dir = world.dir().join("apps/hello");
    let (file, image) = (dir.join("fly.toml"), world.image("hello")?);
    let good = std::fs::read_to_string(&file)?;
    let updates = app.events("update")?.len();
    // One that cannot be had stops nothing; one whose app ends is gone back from; a release command goes first.
    let exits = "[experimental]\nexec = [\"/hello\", \"--version\"]\n";
    let release = "[deploy]\nrelease_command = \"/hello probe 127.0.0.1:1\"\n";
    for (image, more, said) in [
        ("127.0.0.1:1/absent:1", "", "cannot be had"),
        (&image, release, "the release command failed"),
        (&image, exits, "the app exited with code 0"),
    ] {
        std::fs::write(&file, format!("{good}\n{more}"))?;
        let args = ["deploy", dir.to_str().unwrap(), "--image", image];
        let output = world.server.tern_output(&args)?;
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.contains(said), "{told}");
        assert_eq!(app.events("update")?.len(), updates, "{told}");
        assert_eq!(app.state()?, "started", "{told}");
        app.body("/healthz")?;
    }
    std::fs::write(&file, good)?;
    a_deploy_loses_no_request(world, app, &dir, &image)
}

/// Of an app with one Machine, which another takes the place of, with a secret.
fn a_deploy_loses_no_request(world: &World, app: &App<'_>, dir: &Path, image: &str) -> Result<()> {
    let dir = dir.to_str().unwrap();
    let over = AtomicBool::new(false);
    let answered = std::thread::scope(|scope| {
        let asking = scope.spawn(|| -> Result<u32> {
            let mut answered = 0;
            while !over.load(Ordering::Relaxed) {
                app.body("/healthz")?;
                answered += 1;
            }
            Ok(answered)
        });
        let set = ["secrets", "set", "KEY=hunter2", "--stage", "--app", "hello"];
        let deployed = world.server.tern(&set);
        let deploy = || world.server.tern(&["deploy", dir, "--image", image]);
        let deployed = deployed.and_then(|_| deploy()).and_then(|_| deploy());
        over.store(true, Ordering::Relaxed);
        deployed?;
        asking.join().expect("it does not panic")
    })?;
    assert!(answered > 0);
    let env: Value = serde_json::from_str(&app.body("/env")?)?;
    assert!(env.to_string().contains("hunter2"), "{env}");
    let releases = world.server.tern(&["releases", "--app", "hello"])?;
    assert_eq!(releases.matches("succeeded").count(), 3, "{releases}");
    let machines = world
        .server
        .tern(&["machine", "list", "--app", "hello", "--json"])?;
    let machines: Value = serde_json::from_str(&machines)?;
    let machines = machines.as_array().context("no list")?;
    assert_eq!(machines.len(), 1, "{machines:?}");
    assert_ne!(machines[0]["id"], app.machine.as_str());
    assert!(!machines[0].to_string().contains("hunter2"));
    Ok(())
}

#[test]
fn destroy_leaves_nothing_behind() -> Result<()> {
    let world = World::new("destroy")?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    let dir = world.server.data.join("machines").join(&app.machine);
    let monitor = app.monitor()?;
    assert!(dir.exists());
    world.server.tern(&[
        "machine",
        "destroy",
        &app.machine,
        "--app",
        "hello",
        "--force",
    ])?;
    tern_e2e::process::wait_for("everything is gone", tern_e2e::world::PATIENCE, || {
        let taps = tern_e2e::process::run("ip", ["-o", "link", "show", "type", "tun"])?;
        let rules = tern_e2e::process::run("nft", ["list", "table", "inet", "tern"])?;
        let gone = !dir.exists()
            && nix::sys::signal::kill(monitor, None).is_err()
            && !taps.contains(": tn0")
            && !rules.contains("\"tn0\"");
        Ok(gone.then_some(()))
    })
}

#[test]
fn a_host_with_limits_gives_its_machines_no_more() -> Result<()> {
    let limits = [
        "--machine-net-bandwidth",
        "1MiB",
        "--machine-disk-bandwidth",
        "64MiB",
        "--machine-disk-iops",
        "5000",
    ];
    let validity = Duration::from_secs(90 * 24 * 3600);
    // On the host's data disk itself: a control group limits disks, not the overlay of the root.
    let world = World::with_dir(Path::new("/var/lib/tern/limits"), validity, &limits)?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    let before = Instant::now();
    let reply = app.get(&format!("/bytes?n={}", 3 << 20))?;
    assert_eq!((reply.status, reply.body.len()), (200, 3 << 20));
    // What may go at once after a rest is a second's worth, and the rest takes its time.
    assert!(before.elapsed() >= Duration::from_secs(2));
    // A limit is no obstacle to sleep and wake.
    app.machine("suspend")?;
    assert_eq!(app.get("/")?.status, 200);
    let group = Path::new("/sys/fs/cgroup/tern").join(&app.machine);
    let most = std::fs::read_to_string(group.join("io.max"))?;
    assert!(
        most.contains("rbps=67108864 wbps=67108864 riops=5000 wiops=5000"),
        "{most}"
    );
    Ok(())
}

#[test]
fn a_host_with_vhost_net_serves_and_wakes_its_machines() -> Result<()> {
    let validity = Duration::from_secs(90 * 24 * 3600);
    let world = World::with_dir(
        Path::new("/var/lib/tern/vhost"),
        validity,
        &["--machine-vhost-net"],
    )?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    // The monitor's worker for the card is one that only waits.
    let by_kernel = || -> Result<bool> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", app.monitor()?))?;
        let mut names =
            tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        Ok(names.any(|name| name.trim() == "vhost-net"))
    };
    assert!(by_kernel()?);
    let reply = app.get(&format!("/bytes?n={}", 3 << 20))?;
    assert_eq!((reply.status, reply.body.len()), (200, 3 << 20));
    for _ in 0..2 {
        app.machine("suspend")?;
        assert_eq!(app.get("/")?.status, 200);
        assert!(by_kernel()?);
        // What a request has woken may answer before its host tells of it.
        app.wait_for_state("started")?;
    }
    let starts = app.events("start")?;
    let last = starts.last().context("no start")?;
    assert_eq!(last["request"]["cold"], false, "no resume: {last:#}");
    Ok(())
}
