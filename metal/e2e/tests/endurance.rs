//! Over and over, and many at once: what a Machine promises holds the five hundredth time as the first,
//! and nothing is left of a Machine that is gone. `TERN_DEEP=1` (`make check-deep`) takes the long way.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use nix::unistd::Pid;
use tern_e2e::process::{checked, wait_for};
use tern_e2e::world::PATIENCE;
use tern_e2e::{App, World};

/// The short way in `make test`, the long one where it was asked for.
fn either(short: usize, long: usize) -> usize {
    match std::env::var_os("TERN_DEEP") {
        Some(_) => long,
        None => short,
    }
}

#[test]
fn a_machine_wakes_time_and_again() -> Result<()> {
    /// The bound that is promised for a guest's clock.
    const CLOCK_ERROR_NS: i128 = 10_000_000;
    let rounds = either(10, 500);
    let world = World::new("endurance")?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    let count =
        || -> Result<u64> { Ok(app.get("/counter")?.json()?["count"].as_u64().unwrap_or(0)) };
    let first_count = count()?;
    // From the third wake on everything has been in use once.
    let mut first = None;
    let mut worst = (0, 0);
    for round in 1..=rounds {
        app.machine("suspend")?;
        let before = unix_nanos();
        let guest: i128 = app.body("/time")?.trim().parse()?;
        let after = unix_nanos();
        // The guest looked at its clock in between.
        worst.0 = worst.0.max(before - guest);
        worst.1 = worst.1.max(guest - after);
        assert!(
            guest > before - CLOCK_ERROR_NS && guest < after + CLOCK_ERROR_NS,
            "round {round}: the guest's clock shows {} ms after the request left and {} ms before \
             its answer came",
            (guest - before) / 1_000_000,
            (after - guest) / 1_000_000
        );
        assert_eq!(count()?, first_count + round as u64, "round {round}");
        if round == 3 {
            // Before that its host may not hold all yet that it holds for a Machine that runs.
            app.wait_for_state("started")?;
            first = Some((
                own_memory_kib(app.monitor()?)?,
                descriptors(world.server.pid()?)?,
            ));
        }
    }
    let (memory, open) = first.context("three rounds are the least")?;
    let last = (
        own_memory_kib(app.monitor()?)?,
        descriptors(world.server.pid()?)?,
    );
    println!(
        "{rounds} wakes: monitor {memory} -> {} KiB, descriptors of serve {open} -> {}, the clock was \
         late by {} ms and early by {} ms at most (0: never outside of the request)",
        last.0,
        last.1,
        worst.0.max(0) / 1_000_000,
        worst.1.max(0) / 1_000_000
    );
    // The host hands out memory in larger pieces than it is used in.
    assert!(
        last.0 <= memory + 2048,
        "monitor: {memory} -> {} KiB",
        last.0
    );
    // The edge keeps a connection of each wake for its next request, for half a minute.
    wait_for("the wakes' connections are closed", PATIENCE, || {
        let now = open_files(world.server.pid()?)?;
        ensure!(
            now.len() as u64 <= open,
            "{open} -> {}: {now:#?}",
            now.len()
        );
        Ok(Some(()))
    })?;
    // Only RAM holds the counter, and nothing else than wakes was needed to keep it.
    assert_eq!(app.events("restart")?.len(), 0);
    Ok(())
}

#[test]
fn nothing_is_left_of_many_machines() -> Result<()> {
    let (asleep, awake) = (either(3, 50), either(2, 20));
    let world = World::new("many")?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    let before = Held::now(&world)?;
    let mut config = app.status()?["config"].clone();
    // These are not for the public: none is started or stopped but by us.
    config["services"] = serde_json::json!([]);
    let mut machines = Vec::new();
    for number in 0..asleep + awake {
        let made = world.server.api(
            "POST",
            "/v1/apps/hello/machines",
            Some(&serde_json::json!({"name": format!("many-{number}"), "config": config})),
        )?;
        let id = made["id"].as_str().context("no id")?.to_owned();
        let machine = App::of(&world, "hello", &id);
        machine.wait_for_state("started")?;
        if number < asleep {
            machine.machine("suspend")?;
            machine.wait_for_state("suspended")?;
        }
        machines.push(machine);
    }
    for (number, machine) in machines.iter().enumerate() {
        let state = if number < asleep {
            "suspended"
        } else {
            "started"
        };
        assert_eq!(machine.state()?, state, "{}", machine.machine);
    }
    let held = Held::now(&world)?;
    println!("with {asleep} asleep and {awake} awake: {held:?}");
    assert_eq!(held.0["monitors"], before.0["monitors"] + awake as u64);
    // One that slept among so many wakes as if it were alone.
    if let Some(one) = machines.first() {
        one.machine("start")?;
        one.wait_for_state("started")?;
    }
    for machine in &machines {
        world.server.tern(&[
            "machine",
            "destroy",
            &machine.machine,
            "--app",
            "hello",
            "--force",
        ])?;
    }
    // The API answers as soon as it is decided; the host's part follows.
    wait_for("nothing is left", PATIENCE, || {
        let after = Held::now(&world)?;
        ensure!(after.no_more_than(&before), "{before:?} -> {after:?}");
        Ok(Some(()))
    })?;
    assert_eq!(app.body("/healthz")?, "ok\n");
    Ok(())
}

/// What the host holds for its Machines, by kind.
#[derive(Debug)]
struct Held(BTreeMap<&'static str, u64>);

impl Held {
    fn now(world: &World) -> Result<Self> {
        let lines = |program: &str, args: &[&str]| -> Result<u64> {
            let text = checked(Command::new(program).args(args))?;
            Ok(text.lines().filter(|line| !line.trim().is_empty()).count() as u64)
        };
        let data = &world.server.data;
        Ok(Self(BTreeMap::from([
            ("descriptors", descriptors(world.server.pid()?)?),
            ("interfaces", lines("ip", &["-o", "link"])?),
            (
                "IPv4 routes",
                lines("ip", &["route", "show", "table", "all"])?,
            ),
            (
                "IPv6 routes",
                lines("ip", &["-6", "route", "show", "table", "all"])?,
            ),
            (
                "rules and set elements",
                lines("nft", &["-s", "list", "ruleset"])?,
            ),
            ("directories", entries(&data.join("machines"))?),
            ("files", files(data)?),
            ("groups", groups()?),
            ("monitors", monitors()?),
        ])))
    }

    /// A connection or a log file more or less is not a leak; seventy would be.
    fn no_more_than(&self, before: &Self) -> bool {
        self.0.iter().all(|(kind, count)| {
            let slack = match *kind {
                "descriptors" | "files" => 4,
                _ => 0,
            };
            *count <= before.0[kind] + slack
        })
    }
}

fn unix_nanos() -> i128 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as i128)
}

/// Resident memory of a monitor that is not the guest's, whose mappings are the large ones.
fn own_memory_kib(pid: Pid) -> Result<u64> {
    const GUESTS_KIB: u64 = 32 << 10;
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut own, mut size) = (0, 0);
    for line in smaps.lines() {
        let kib = || {
            line.split_whitespace()
                .nth(1)
                .and_then(|n| n.parse::<u64>().ok())
        };
        if line.starts_with("Size:") {
            size = kib().context("a size")?;
        } else if line.starts_with("Rss:") && size < GUESTS_KIB {
            own += kib().context("a resident size")?;
        }
    }
    ensure!(own > 0, "process {pid} has no memory:\n{smaps}");
    Ok(own)
}

fn descriptors(pid: Pid) -> Result<u64> {
    entries(Path::new(&format!("/proc/{pid}/fd")))
}

/// What a process has open, to be told where it is too much.
fn open_files(pid: Pid) -> Result<Vec<String>> {
    let mut open: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))?
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|target| target.display().to_string())
        .collect();
    open.sort();
    Ok(open)
}

fn entries(dir: &Path) -> Result<u64> {
    Ok(fs::read_dir(dir)
        .with_context(|| dir.display().to_string())?
        .count() as u64)
}

/// Files below, those of the image cache left out: images are kept on purpose.
fn files(dir: &Path) -> Result<u64> {
    let mut count = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            if entry.file_name() != "images" {
                count += files(&entry.path())?;
            }
        } else {
            count += 1;
        }
    }
    Ok(count)
}

fn groups() -> Result<u64> {
    let dir = fs::read_dir("/sys/fs/cgroup/tern").context("the agent has made no group")?;
    Ok(dir.flatten().filter(|e| e.path().is_dir()).count() as u64)
}

fn monitors() -> Result<u64> {
    let mut count = 0;
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        count += u64::from(name.trim() == "tern-vmm");
    }
    Ok(count)
}
