//! The agent is killed, at every step that matters; the next one finds its way.

use std::fs;

use nix::sys::signal::{Signal, kill};
use serde_json::json;
use tern_faults::Hold;

use crate::world::{Machine, World, kinds, until};

#[test]
fn machines_outlive_their_agent_and_are_adopted() {
    let mut world = World::new();
    let machines = [world.launch(&[]), world.launch(&[]), world.launch(&[])];
    let before: Vec<_> = machines.iter().map(|m| world.monitor(m)).collect();
    for machine in &machines {
        world.count(machine);
    }
    world.kill();
    world.up();
    assert_eq!(world.metric("adopted"), 3);
    for (machine, pid) in machines.iter().zip(before) {
        assert_eq!(world.monitor(machine), pid);
        assert_eq!(world.count(machine), 2);
        assert_eq!(world.status(machine)["state"], "started");
    }
    // What is adopted is looked after like one's own.
    world.suspend(&machines[0]);
    world.start(&machines[0]);
    assert_eq!(world.count(&machines[0]), 3);
    kill(world.monitor(&machines[1]), Signal::SIGKILL).unwrap();
    until("it is started again", || {
        let status = world.status(&machines[1]);
        let kinds = kinds(&status);
        status["state"] == "started"
            && kinds.contains(&"exit".into())
            && kinds.ends_with(&["start".into()])
    });
    world.stop(&machines[2]);
    assert_eq!(world.metric("cold_starts"), 1);
}

#[test]
fn a_monitor_is_the_first_process_of_a_namespace_of_its_own() {
    let mut world = World::new();
    let machines = [world.launch(&[]), world.launch(&[])];
    world.suspend(&machines[1]);
    world.start(&machines[1]);
    let namespace = |of: &str| fs::read_link(format!("/proc/{of}"));
    let agent = world.agent();
    let mut namespaces = vec![namespace(&format!("{agent}/ns/pid")).unwrap()];
    for machine in &machines {
        let pid = world.monitor(machine);
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let numbers = status.lines().find_map(|l| l.strip_prefix("NSpid:\t"));
        let numbers: Vec<_> = numbers.unwrap().split('\t').collect();
        assert_eq!(numbers, [pid.to_string().as_str(), "1"]);
        let own = namespace(&format!("{pid}/ns/pid")).unwrap();
        assert!(!namespaces.contains(&own), "it shares one");
        namespaces.push(own);
    }
    // Other children of the agent's stay where the agent is.
    for task in fs::read_dir(format!("/proc/{agent}/task")).unwrap() {
        let task = task.unwrap().file_name().into_string().unwrap();
        // One that has just ended has none.
        if let Ok(children) = namespace(&format!("{agent}/task/{task}/ns/pid_for_children")) {
            assert_eq!(children, namespaces[0]);
        }
    }
}

#[test]
fn what_died_while_nobody_looked_is_started_again() {
    let mut world = World::new();
    let machine = world.launch(&[]);
    world.exec(&machine, &["write", "kept"]);
    world.kill();
    let pid = world.monitor(&machine);
    kill(pid, Signal::SIGKILL).unwrap();
    until("it is dead", || world.monitors().is_empty());
    world.up();
    until("it runs again", || {
        let status = world.status(&machine);
        status["state"] == "started" && kinds(&status).contains(&"exit".into())
    });
    assert_eq!(world.exec(&machine, &["read"]), "kept");
    assert!(kinds(&world.status(&machine)).contains(&"exit".into()));
}

/// The agent dies at a step of a suspend; afterwards the Machine can be woken with its memory, or
/// never slept.
fn dies_while_suspending(step: &str) {
    let mut world = World::new();
    let machine = world.launch(&[("FAKE_KILL_AGENT_AT", step)]);
    world.count(&machine);
    world.say("suspend", &machine.id, json!({"source": "proxy"}));
    world.wait_for_crash();
    world.up();
    // What was known to have begun is brought to its end; either way it can be asked for again.
    world.ask("suspend", &machine.id, json!({})).unwrap();
    assert_eq!(world.monitors().len(), 0);
    world.start(&machine);
    assert_eq!(world.count(&machine), 2, "its memory was never lost");
    assert_eq!(world.metric("cold_starts"), 0);
    assert_eq!(world.monitors().len(), 1);
}

#[test]
fn the_agent_dies_before_the_pause() {
    dies_while_suspending("pause");
}

#[test]
fn the_agent_dies_when_the_snapshot_is_written() {
    dies_while_suspending("snapshot");
}

#[test]
fn the_agent_dies_before_the_monitor_is_stopped() {
    dies_while_suspending("stop");
}

/// The agent dies at a step of a wake; afterwards the Machine runs, and the snapshot is not used
/// again.
fn dies_while_waking(step: &str) {
    let mut world = World::new();
    let machine = world.launch(&[("FAKE_KILL_AGENT_AT", step)]);
    world.count(&machine);
    world.suspend(&machine);
    world.say("start", &machine.id, json!({"source": "proxy"}));
    world.wait_for_crash();
    world.up();
    world.start(&machine);
    assert_eq!(world.count(&machine), 2, "the monitor was adopted");
    assert_eq!(world.monitors().len(), 1);
    let dir = world.machine_dir(&machine);
    assert!(!dir.join("suspended.json").exists());
    world.stop(&machine);
    world.wait(&machine, "stopped");
    assert!(
        !dir.join("jail/snapshot").exists(),
        "it is of no use any more"
    );
}

#[test]
fn the_agent_dies_when_the_monitor_restores() {
    dies_while_waking("restore");
}

#[test]
fn the_agent_dies_before_the_guest_was_told_the_time() {
    dies_while_waking("resumed");
}

#[test]
fn the_agent_dies_while_a_machine_boots() {
    let mut world = World::new();
    let mut machine = Machine::new(&[("FAKE_KILL_AGENT_AT", "boot")]);
    // The agent may die before it answers that it has taken the record up.
    world.begin(&mut machine, json!("started"));
    world.wait_for_crash();
    world.up();
    until("it runs", || world.status(&machine)["state"] == "started");
    assert_eq!(world.monitors().len(), 1);
    assert_eq!(world.count(&machine), 1);
}

#[test]
fn a_snapshot_without_its_seal_is_rubbish() {
    let mut world = World::new();
    let machine = world.launch(&[]);
    world.count(&machine);
    world.suspend(&machine);
    world.wait(&machine, "suspended");
    world.kill();
    fs::remove_file(world.machine_dir(&machine).join("suspended.json")).unwrap();
    world.up();
    assert_eq!(world.status(&machine)["state"], "suspended");
    world.start(&machine);
    assert_eq!(world.count(&machine), 1, "a cold start");
    assert!(
        world.status(&machine)["events"]
            .to_string()
            .contains("snapshot")
    );
}

#[test]
fn a_snapshot_outlasts_a_loss_of_power_once_it_is_safe_on_disk() {
    let mut world = World::new();
    let machine = world.launch(&[]);
    world.count(&machine);
    asleep(&mut world, &machine, |seal| seal);
    world.start(&machine);
    assert_eq!(world.count(&machine), 2);

    // Power is lost before: the seal is of another boot of the host.
    asleep(&mut world, &machine, |seal| {
        seal.replace("null", "\"the boot before\"")
    });
    world.start(&machine);
    assert_eq!(world.count(&machine), 1, "half a snapshot is not used");
}

/// A Machine sleeps, and a new agent finds it so: nothing of its suspend is under way any more.
fn asleep(world: &mut World, machine: &Machine, change_seal: impl FnOnce(String) -> String) {
    let seal = world.machine_dir(machine).join("suspended.json");
    world.suspend(machine);
    until("it is safe", || {
        fs::read_to_string(&seal)
            .unwrap()
            .contains("\"boot_id\":null")
    });
    world.kill();
    let text = change_seal(fs::read_to_string(&seal).unwrap());
    fs::write(&seal, text).unwrap();
    world.up();
}

#[test]
fn a_guest_runs_only_when_a_seal_that_outlasts_a_loss_of_power_is_gone_on_disk() {
    let mut world = World::new();
    let machine = world.launch(&[]);
    world.count(&machine);
    asleep(&mut world, &machine, |seal| seal);
    let dir = world.machine_dir(&machine).canonicalize().unwrap();
    let hold = Hold::at(world.agent(), "fsync", dir.clone()).unwrap();
    let start = world.say("start", &machine.id, json!({"source": "proxy"}));
    until("its removal is being synced", || hold.caught());
    // Another Machine comes all the way meanwhile.
    let other = world.launch(&[]);
    assert_eq!(world.monitors(), [world.monitor(&other)]);
    hold.release().unwrap();
    world.answer(start).unwrap();
    assert_eq!(world.count(&machine), 2);

    // One that is void after a loss of power may as well come back.
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    asleep(&mut world, &machine, |seal| {
        seal.replace("null", &format!("\"{}\"", boot.trim()))
    });
    let hold = Hold::at(world.agent(), "fsync", dir).unwrap();
    world.start(&machine);
    assert_eq!(world.count(&machine), 3);
    assert!(!hold.caught());
}

#[test]
fn a_slow_suspend_outlives_its_agent() {
    let pipes = tempfile::tempdir().unwrap();
    let pipe = pipes.path().join("disk");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut world = World::new();
    let mut machine = world.launch(&[("FAKE_SNAPSHOT_WAITS", pipe.to_str().unwrap())]);
    world.count(&machine);
    let monitor = world.monitor(&machine);
    world.begin(&mut machine, json!("suspended"));
    // Its other end is there when the snapshot is being written.
    let end = fs::File::options().write(true).open(&pipe).unwrap();
    world.wait(&machine, "suspending");
    world.kill();
    world.up();
    assert_eq!(world.status(&machine)["state"], "suspending");
    assert_eq!(world.monitors(), [monitor]);
    // A request that comes meanwhile waits, and then has the Machine as it was.
    let start = world.say("start", &machine.id, json!({"source": "proxy"}));
    fs::remove_file(&pipe).unwrap();
    drop(end);
    world.answer(start).unwrap();
    assert_eq!(world.count(&machine), 2, "its memory");

    // And without one, it is suspended after all.
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    world.begin(&mut machine, json!("suspended"));
    let end = fs::File::options().write(true).open(&pipe).unwrap();
    world.wait(&machine, "suspending");
    world.kill();
    world.up();
    fs::remove_file(&pipe).unwrap();
    drop(end);
    world.wait(&machine, "suspended");
    world.start(&machine);
    assert_eq!(world.count(&machine), 3);

    // Only who wants its end by force does not wait for that.
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    world.begin(&mut machine, json!("suspended"));
    let _end = fs::File::options().write(true).open(&pipe).unwrap();
    let killed = json!({"stopped": {"signal": 9, "timeout_ms": 0}});
    world.begin(&mut machine, killed);
    world.wait(&machine, "stopped");
    assert!(world.monitors().is_empty());
}

#[test]
fn a_suspend_that_the_catalog_has_not_heard_of_outlives_its_agent() {
    let pipes = tempfile::tempdir().unwrap();
    let pipe = pipes.path().join("disk");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut world = World::new();
    let machine = world.launch(&[("FAKE_SNAPSHOT_WAITS", pipe.to_str().unwrap())]);
    world.count(&machine);
    let status = world.status(&machine);
    let monitor = world.monitor(&machine);
    world.say("suspend", &machine.id, json!({"source": "proxy"}));
    let end = fs::File::options().write(true).open(&pipe).unwrap();
    world.wait(&machine, "suspending");
    world.kill();
    // As if the agent had died before its word of it was written.
    let catalog = world.machines_dir().parent().unwrap().join("catalog.db");
    say(&catalog, &status);
    world.up();
    assert_eq!(world.monitors(), [monitor]);
    let start = world.say("start", &machine.id, json!({"source": "proxy"}));
    fs::remove_file(&pipe).unwrap();
    drop(end);
    world.answer(start).unwrap();
    assert_eq!(world.count(&machine), 2, "its memory");
}

#[test]
fn a_wish_that_could_not_be_taken_up_is_by_the_next_agent() {
    let mut world = World::new();
    let mut machine = Machine::new(&[]);
    let in_the_way = world.machine_dir(&machine).join("agent.json.tmp");
    fs::create_dir_all(&in_the_way).unwrap();
    world.wish(&mut machine, json!("started"));
    world.wait(&machine, "failed");
    world.kill();
    fs::remove_dir(&in_the_way).unwrap();
    world.up();
    world.wait(&machine, "started");
    assert_eq!(world.count(&machine), 1);
}

#[test]
fn a_machine_that_cannot_be_taken_up_is_tried_again() {
    let mut world = World::new();
    let mut machine = Machine::new(&[]);
    // As on a full disk, what the agent must remember of it cannot be written.
    let in_the_way = world.machine_dir(&machine).join("agent.json.tmp");
    fs::create_dir_all(&in_the_way).unwrap();
    world.wish(&mut machine, json!("started"));
    let status = world.wait(&machine, "failed");
    let reason = status["reason"].as_str().unwrap();
    assert!(reason.contains(&machine.id), "{reason}");
    let refused = world.ask("start", &machine.id, json!({})).unwrap_err();
    assert!(refused.contains("tries again"), "{refused}");
    // Other Machines are looked after meanwhile.
    let other = world.launch(&[]);
    fs::remove_dir(&in_the_way).unwrap();
    world.wait(&machine, "started");
    assert_eq!(world.count(&machine), 1);
    // And each has a place of its own.
    let place = |machine: &Machine| {
        let memo = fs::read(world.machine_dir(machine).join("agent.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&memo).unwrap()["slot"]
            .as_u64()
            .unwrap()
    };
    assert_ne!(place(&other), place(&machine));
}

#[test]
fn what_the_catalog_does_not_know_is_left_as_it_is() {
    let mut world = World::new();
    let known = world.launch(&[]);
    let mut runs = world.launch(&[]);
    world.exec(&runs, &["write", "kept"]);
    world.count(&runs);
    let mut sleeps = world.launch(&[]);
    world.count(&sleeps);
    asleep(&mut world, &sleeps, |seal| seal);
    let before = world.monitor(&runs);
    world.kill();
    // The catalog is an old one.
    let catalog = world.machines_dir().parent().unwrap().join("catalog.db");
    fs::create_dir(world.machines_dir().join("lost+found")).unwrap();
    forget(&catalog, &runs.id);
    forget(&catalog, &sleeps.id);
    let stray = std::process::Command::new("ip")
        .args(["tuntap", "add", "tn77", "mode", "tap"])
        .status();
    assert!(stray.unwrap().success());
    world.up();
    assert_eq!(world.metric("quarantined"), 2);
    assert_eq!(world.metric("leftovers"), 1, "a device of nobody");
    assert_eq!(world.monitors().len(), 2);
    let listed = world.quarantined();
    assert_eq!(listed.len(), 2, "{listed:?}");
    assert!(listed.iter().all(|id| *id == runs.id || *id == sleeps.id));
    // Nobody gets their place, in which they reach nobody.
    let newcomer = world.launch(&[]);
    let place = |world: &World, machine: &Machine| {
        fs::read_to_string(world.machine_dir(machine).join("agent.json")).unwrap()
    };
    let slot = |world: &World, machine: &Machine| -> serde_json::Value {
        serde_json::from_str::<serde_json::Value>(&place(world, machine)).unwrap()["slot"].clone()
    };
    for machine in [&known, &runs, &sleeps] {
        assert_ne!(slot(&world, &newcomer), slot(&world, machine));
    }
    let rules = format!("\"tn{}\"", slot(&world, &runs));
    assert!(!world.traces().iter().any(|t| t.contains(&rules)));

    // With the right catalog both go on where they were.
    world.wish(&mut runs, json!("started"));
    world.wait(&runs, "started");
    assert_eq!(world.monitor(&runs), before);
    assert_eq!(world.count(&runs), 2, "its memory");
    assert_eq!(world.exec(&runs, &["read"]), "kept");
    world.wish(&mut sleeps, json!("started"));
    world.wait(&sleeps, "started");
    assert_eq!(world.count(&sleeps), 2, "its memory");
    assert!(world.quarantined().is_empty());
    assert!(world.machines_dir().join("lost+found").exists());
}

#[test]
fn a_machine_whose_record_vanishes_is_left_as_it_is() {
    let mut world = World::new();
    let mut machine = world.launch(&[]);
    world.count(&machine);
    world.ask("forget", &machine.id, json!({})).unwrap();
    until("it is noticed", || !world.quarantined().is_empty());
    let unknown = world.ask("stop", &machine.id, json!({})).unwrap_err();
    assert!(unknown.contains("not on this host"), "{unknown}");
    assert_eq!(world.monitors(), [world.monitor(&machine)]);
    // Its guest goes on, and is nobody's neighbour.
    let memo = fs::read(world.machine_dir(&machine).join("agent.json")).unwrap();
    let memo: serde_json::Value = serde_json::from_slice(&memo).unwrap();
    let rules = format!("\"tn{}\"", memo["slot"]);
    until("it is cut off", || {
        !world.traces().iter().any(|trace| trace.contains(&rules))
    });
    world.wish(&mut machine, json!("started"));
    world.wait(&machine, "started");
    assert_eq!(world.count(&machine), 2);
    assert!(world.quarantined().is_empty());
}

/// Removes a Machine's records behind the agent's back.
fn forget(catalog: &std::path::Path, id: &str) {
    use tern_catalog::{Machine, MachineStatus};
    in_catalog(catalog, async |catalog| {
        catalog.delete::<Machine>(id).await.unwrap();
        catalog.delete::<MachineStatus>(id).await.unwrap();
    });
}

/// Has the catalog say this of a Machine.
fn say(catalog: &std::path::Path, status: &serde_json::Value) {
    let status: tern_catalog::MachineStatus = serde_json::from_value(status.clone()).unwrap();
    in_catalog(catalog, async |catalog| {
        _ = catalog.put(&status).await.unwrap()
    });
}

fn in_catalog(catalog: &std::path::Path, work: impl AsyncFnOnce(&tern_catalog::Catalog)) {
    use tern_catalog::{Catalog, SqliteStore};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let store = SqliteStore::open(catalog).unwrap();
        work(&Catalog::new(std::sync::Arc::new(store))).await;
    });
    drop(runtime);
    // The store lets go of its files when its own threads have ended.
    let lock = fs::File::options()
        .write(true)
        .open(catalog.with_extension("lock"))
        .unwrap();
    lock.lock().unwrap();
}

#[test]
fn a_second_agent_is_refused() {
    let world = World::new();
    let error = world.second_agent();
    assert!(error.contains("in use by another agent"), "{error}");
}

#[test]
fn a_seal_that_is_put_back_is_made_to_outlast_a_loss_of_power() {
    let mut world = World::new();
    let machine = world.launch(&[]);
    world.count(&machine);
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    // Its snapshot had not been synced when the agent died.
    asleep(&mut world, &machine, |seal| {
        seal.replace("null", &format!("\"{}\"", boot.trim()))
    });
    let log = world.machine_dir(&machine).join("vmm.log");
    fs::remove_file(&log).unwrap();
    fs::create_dir(&log).unwrap();
    let gate = json!({"source": "proxy"});
    let error = world.ask("start", &machine.id, gate).unwrap_err();
    assert!(error.contains("could not be woken yet"), "{error}");
    let seal = world.machine_dir(&machine).join("suspended.json");
    until("it is safe", || {
        fs::read_to_string(&seal).is_ok_and(|seal| seal.contains("\"boot_id\":null"))
    });
    fs::remove_dir(&log).unwrap();
    world.start(&machine);
    assert_eq!(world.count(&machine), 2, "its memory");
}
