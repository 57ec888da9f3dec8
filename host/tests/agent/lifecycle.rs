//! A Machine's life, as the gate and the API see it.

use std::io::Write as _;

use nix::sys::signal::{Signal, kill};
use serde_json::json;

use crate::world::{Machine, World, kinds, until};

#[test]
fn a_machine_is_launched_suspended_woken_stopped_and_destroyed() {
    let mut world = World::new();
    let mut machine = world.launch(&[]);
    let status = world.status(&machine);
    assert_eq!(status["generation"], 1);
    assert_eq!(status["image_digest"], json!(crate::registry::digest()));
    assert_eq!(world.count(&machine), 1);

    world.suspend(&machine);
    assert_eq!(
        world.wait(&machine, "suspended")["events"][2]["source"],
        "proxy"
    );
    assert!(world.monitors().is_empty(), "its memory is free");
    assert!(
        world
            .machine_dir(&machine)
            .join("jail/snapshot/state")
            .exists()
    );
    world.start(&machine);
    assert_eq!(world.count(&machine), 2, "its memory is what it was");
    let dir = world.machine_dir(&machine);
    assert!(!dir.join("suspended.json").exists());
    assert!(
        dir.join("jail/snapshot").exists(),
        "the next one updates it"
    );

    world.stop(&machine);
    let status = world.wait(&machine, "stopped");
    assert!(
        !dir.join("jail/snapshot").exists(),
        "it is of no use any more"
    );
    assert_eq!(
        kinds(&status),
        ["launch", "start", "suspend", "start", "stop"]
    );
    assert_eq!(status["events"][4]["request"]["exit_event"]["exit_code"], 0);
    world.start(&machine);
    assert_eq!(world.count(&machine), 1, "a stop forgets");

    world.wish(&mut machine, json!({"destroyed": {"force": false}}));
    world.wait(&machine, "destroyed");
    until("nothing is left", || world.traces().is_empty());
    let records = world.ask("records", "", json!({})).unwrap();
    assert_eq!(records, json!([]));
    let unknown = world.ask("start", &machine.id, json!({})).unwrap_err();
    assert!(
        unknown.contains("not on this host") || unknown.contains("destroyed"),
        "{unknown}"
    );
}

#[test]
fn two_hundred_starts_at_once_are_one_wake() {
    let mut world = World::new();
    let machine = world.launch(&[]);
    for round in 1..=5 {
        world.suspend(&machine);
        let asked: Vec<_> = (0..200)
            .map(|_| world.say("start", &machine.id, json!({"source": "proxy"})))
            .collect();
        for n in asked {
            world.answer(n).unwrap();
        }
        assert_eq!(world.metric("wakes"), round);
    }
    assert_eq!(world.metric("cold_starts"), 1);
    assert_eq!(world.metric("refused_wakes"), 0);
}

#[test]
fn a_waking_machine_is_reachable_before_its_guest_has_answered() {
    let pipes = tempfile::tempdir().unwrap();
    let pipe = pipes.path().join("resumed");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut world = World::new();
    let machine = world.launch(&[("FAKE_RESUMED_WAITS", pipe.to_str().unwrap())]);
    world.suspend(&machine);
    let reachable = world.say("reachable", &machine.id, json!({}));
    let start = world.say("start", &machine.id, json!({"source": "proxy"}));
    world.answer(reachable).unwrap();
    until("it starts", || {
        world.status(&machine)["state"] == "starting"
    });
    let seal = world.machine_dir(&machine).join("suspended.json");
    assert!(!seal.exists(), "the seal is broken before anybody calls");
    // A stop waits for the guest's answer, and is asked of its app then.
    let stop = world.say("stop", &machine.id, json!({}));
    std::fs::write(&pipe, "").unwrap();
    world.answer(stop).unwrap();
    world.answer(start).unwrap();
    let lines = world.logs(&machine);
    assert!(
        lines.iter().any(|line| line.starts_with("asked to stop")),
        "{lines:?}"
    );
    // One that starts cold is reachable only when it has.
    let reachable = world.say("reachable", &machine.id, json!({}));
    world.start(&machine);
    world.suspend(&machine);
    let start = world.say("start", &machine.id, json!({"source": "proxy"}));
    world.answer(reachable).unwrap();
    std::fs::write(&pipe, "").unwrap();
    world.answer(start).unwrap();
}

#[test]
fn a_machine_that_somebody_is_in_is_not_idle() {
    let pipes = tempfile::tempdir().unwrap();
    let pipe = pipes.path().join("command");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut world = World::new();
    let machine = world.launch(&[]);
    let wait = json!({"cmd": ["wait", pipe]});
    let command = world.say("exec", &machine.id, wait);
    // Its other end is there when the command has begun.
    let mut end = std::fs::File::options().write(true).open(&pipe).unwrap();
    let gate = json!({"source": "proxy"});
    for how in ["suspend", "stop"] {
        let refused = world.ask(how, &machine.id, gate.clone()).unwrap_err();
        assert!(refused.contains("somebody is in"), "{refused}");
    }
    assert_eq!(world.status(&machine)["state"], "started");
    end.write_all(b"done").unwrap();
    drop(end);
    assert_eq!(world.answer(command).unwrap()["stdout"], "done");
    // Nothing else tells that it has left; and then its idle time begins.
    until("it is let go", || {
        world.ask("suspend", &machine.id, gate.clone()).is_ok()
    });
}

#[test]
fn a_start_is_of_use() {
    let mut world = World::new();
    let mut machine = world.launch(&[]);
    let idle = |world: &mut World, machine: &Machine| -> u64 {
        let idle = world.ask("idle", &machine.id, json!({})).unwrap();
        idle.as_u64().unwrap()
    };
    let grown = |world: &mut World, machine: &Machine| {
        until("time passes", || idle(world, machine) >= 200);
    };
    grown(&mut world, &machine);
    world.suspend(&machine);
    let began = std::time::Instant::now();
    world.start(&machine);
    let so_far = || u64::try_from(began.elapsed().as_millis()).unwrap();
    assert!(idle(&mut world, &machine) <= so_far(), "it was woken");
    grown(&mut world, &machine);
    let began = std::time::Instant::now();
    let so_far = || u64::try_from(began.elapsed().as_millis()).unwrap();
    world.wish(&mut machine, json!("started"));
    assert!(idle(&mut world, &machine) <= so_far(), "it runs already");
    grown(&mut world, &machine);
    let began = std::time::Instant::now();
    let so_far = || u64::try_from(began.elapsed().as_millis()).unwrap();
    assert_eq!(world.count(&machine), 1);
    assert!(
        idle(&mut world, &machine) <= so_far(),
        "a command ran in it"
    );
}

#[test]
fn nobody_is_put_to_sleep_before_the_gate_knows() {
    let mut world = World::new();
    let mut machine = world.launch(&[]);
    world.ask("follow", "", json!({})).unwrap();
    world.begin(&mut machine, json!("suspended"));
    let leaving = world.ask("departure", "", json!({})).unwrap();
    assert_eq!(leaving, json!(machine.id));
    let suspended = world.ask("let_go", "", json!({})).unwrap();
    assert_eq!(suspended, json!(true));
    world.wait(&machine, "suspended");
    world.start(&machine);
    // A request that takes long does not keep it for ever, and wakes it again.
    world.begin(&mut machine, json!("suspended"));
    world.ask("departure", "", json!({})).unwrap();
    world.wait(&machine, "suspended");
    assert_eq!(world.ask("let_go", "", json!({})).unwrap(), json!(true));
    world.start(&machine);
    // A stop is told too, and is not a sleep to be woken from.
    let stopped = json!({"stopped": {"signal": null, "timeout_ms": null}});
    world.begin(&mut machine, stopped);
    world.ask("departure", "", json!({})).unwrap();
    assert_eq!(world.ask("let_go", "", json!({})).unwrap(), json!(false));
    world.wait(&machine, "stopped");
}

#[test]
fn the_guest_is_told_the_time_and_its_output_is_kept() {
    let mut world = World::new();
    let machine = world.launch(&[]);
    world.suspend(&machine);
    world.start(&machine);
    until("its lines arrive", || world.logs(&machine).len() == 2);
    assert_eq!(
        world.logs(&machine),
        ["booted", "resumed 0 s late with 64 bytes"]
    );
    world.down();
    world.up();
    // The next agent tells it the time again, and collects only what is new.
    until("one more line arrives", || world.logs(&machine).len() == 3);
    assert_eq!(world.metric("log_lines_lost"), 0);
}

#[test]
fn an_update_whose_first_start_fails_does_not_run_on_the_old_disk() {
    let mut world = World::new();
    let mut machine = world.launch(&[]);
    world.exec(&machine, &["write", "old"]);
    let images = world.machines_dir().with_file_name("images");
    let away = images.with_file_name("away");
    world.registry.goes_down();
    std::fs::rename(&images, &away).unwrap();
    std::fs::create_dir(&images).unwrap();
    machine.update(|config| config["env"]["NEW"] = json!("1"));
    world.begin(&mut machine, json!("started"));
    let status = world.wait(&machine, "failed");
    let why = status["reason"].as_str().unwrap();
    assert!(why.contains("image"), "{why}");
    std::fs::remove_dir_all(&images).unwrap();
    std::fs::rename(&away, &images).unwrap();
    world.wait(&machine, "started");
    assert_eq!(world.exec(&machine, &["read"]), "");
}

#[test]
fn a_disk_is_kept_by_a_suspend_and_emptied_by_a_stop() {
    let mut world = World::new();
    let machine = world.launch(&[]);
    world.exec(&machine, &["write", "kept"]);
    // What it was told at its start, the app's secrets among it, is not on the host's disk any more.
    assert!(!world.machine_dir(&machine).join("run.cpio").exists());
    world.suspend(&machine);
    world.down();
    world.up();
    assert_eq!(world.status(&machine)["state"], "suspended");
    world.start(&machine);
    assert_eq!(world.exec(&machine, &["read"]), "kept");
    world.stop(&machine);
    world.start(&machine);
    assert_eq!(world.exec(&machine, &["read"]), "");
}

#[test]
fn an_update_replaces_the_machine_and_its_disk() {
    let mut world = World::new();
    let mut machine = world.launch(&[]);
    world.exec(&machine, &["write", "old"]);
    let before = world.monitor(&machine);
    machine.update(|config| config["env"]["NEW"] = json!("1"));
    world.wish(&mut machine, json!("started"));
    until("it is the new one", || {
        let status = world.status(&machine);
        status["state"] == "started" && status["instance_id"] == "01Ax"
    });
    assert_ne!(world.monitor(&machine), before);
    assert_eq!(world.exec(&machine, &["read"]), "");
    assert_eq!(
        kinds(&world.status(&machine)),
        ["launch", "start", "stop", "update", "start"]
    );
}

#[test]
fn a_failing_app_is_told_with_its_last_words_and_restarted() {
    let mut world = World::new();
    let mut machine = Machine::new(&[("FAKE_EXIT", "3")]);
    machine.update(|config| config["restart"] = json!({"policy": "on-failure", "max_retries": 1}));
    world.wish(&mut machine, json!("started"));
    let status = world.wait(&machine, "failed");
    let reason = status["reason"].as_str().unwrap();
    assert!(
        reason.contains("code 3") && reason.contains("given up after 1"),
        "{reason}"
    );
    assert!(
        kinds(&status).iter().filter(|k| *k == "exit").count() == 2,
        "{status:#}"
    );
    assert!(world.logs(&machine).contains(&"leaving with 3".to_owned()));
    assert!(world.monitors().is_empty());
}

#[test]
fn an_app_that_never_starts_fails_in_time() {
    let mut world = World::with(&["--boot-timeout", "1"]);
    let mut machine = Machine::new(&[("FAKE_NEVER_START", "1")]);
    machine.update(|config| config["restart"] = json!({"policy": "no"}));
    world.wish(&mut machine, json!("started"));
    let status = world.wait(&machine, "failed");
    assert!(
        status["reason"].as_str().unwrap().contains("did not start"),
        "{status:#}"
    );
    assert!(world.monitors().is_empty(), "nothing is left running");
    assert!(!world.machine_dir(&machine).join("run.cpio").exists());
    let refused = world
        .ask("exec", &machine.id, json!({"cmd": ["count"]}))
        .unwrap_err();
    assert!(refused.contains("failed"), "{refused}");
}

#[test]
fn a_stop_that_is_not_heeded_ends_all_the_same() {
    let mut world = World::new();
    let machine = world.launch(&[("FAKE_IGNORE_STOP", "1")]);
    // No time for the app, and none for init after it.
    world
        .ask("stop", &machine.id, json!({"timeout_ms": 0}))
        .unwrap();
    assert!(world.monitors().is_empty());
    assert!(
        world
            .logs(&machine)
            .iter()
            .any(|l| l.contains("asked to stop"))
    );
}

#[test]
fn a_killed_monitor_is_told_and_the_next_start_works() {
    let mut world = World::new();
    let mut machine = Machine::new(&[]);
    machine.update(|config| config["restart"] = json!({"policy": "no"}));
    world.wish(&mut machine, json!("started"));
    world.wait(&machine, "started");
    world.exec(&machine, &["write", "kept"]);
    kill(world.monitor(&machine), Signal::SIGKILL).unwrap();
    let status = world.wait(&machine, "failed");
    assert!(
        status["reason"]
            .as_str()
            .unwrap()
            .contains("monitor was killed by SIGKILL"),
        "{status:#}"
    );
    world.start(&machine);
    assert_eq!(
        world.exec(&machine, &["read"]),
        "kept",
        "a crash empties no disk"
    );
}

#[test]
fn a_killed_monitor_is_started_again_by_policy() {
    let mut world = World::new();
    let machine = world.launch(&[]);
    let before = world.monitor(&machine);
    kill(before, Signal::SIGKILL).unwrap();
    until("it runs again", || {
        let status = world.status(&machine);
        kinds(&status).ends_with(&["exit".into(), "restart".into(), "start".into()])
    });
    assert_ne!(world.monitor(&machine), before);
}

#[test]
fn a_damaged_snapshot_becomes_a_cold_start() {
    let mut world = World::new();
    let machine = world.launch(&[]);
    world.exec(&machine, &["write", "kept"]);
    world.suspend(&machine);
    let state = world.machine_dir(&machine).join("jail/snapshot/state");
    std::fs::write(&state, b"{\"counter\":").unwrap();
    world.start(&machine);
    assert_eq!(world.count(&machine), 1);
    assert_eq!(world.exec(&machine, &["read"]), "kept");
    let status = world.status(&machine);
    let told = status["events"].to_string();
    assert!(
        told.contains("the snapshot could not be used"),
        "{status:#}"
    );
}

#[test]
fn a_wake_that_fails_before_its_monitor_runs_loses_no_memory() {
    let mut world = World::new();
    let machine = world.launch(&[]);
    world.count(&machine);
    world.suspend(&machine);
    let gate = json!({"source": "proxy"});
    // Before the seal is broken, and after: a directory is in the way of a socket, and of a log.
    for name in ["vmm.sock", "vmm.log"] {
        let in_the_way = world.machine_dir(&machine).join(name);
        std::fs::remove_file(&in_the_way).unwrap();
        std::fs::create_dir(&in_the_way).unwrap();
        let error = world.ask("start", &machine.id, gate.clone()).unwrap_err();
        assert!(error.contains("could not be woken yet"), "{error}");
        world.wait(&machine, "suspended");
        std::fs::remove_dir(&in_the_way).unwrap();
    }
    world.start(&machine);
    assert_eq!(world.count(&machine), 2, "its memory");
    assert_eq!(world.metric("cold_starts"), 1);
}

#[test]
fn a_machine_that_cannot_be_suspended_runs_on() {
    let mut world = World::new();
    let machine = world.launch(&[("FAKE_NO_SNAPSHOT", "1")]);
    let error = world.ask("suspend", &machine.id, json!({})).unwrap_err();
    assert!(error.contains("the disk is full"), "{error}");
    assert_eq!(world.count(&machine), 1);
}

#[test]
fn a_wish_is_taken_up_once_and_the_gate_is_free_in_between() {
    let mut world = World::new();
    let machine = world.launch(&[]);
    world.suspend(&machine);
    world.down();
    world.up();
    assert_eq!(
        world.status(&machine)["state"],
        "suspended",
        "not started by the old wish"
    );
    let stopped = world.ask("suspend", &machine.id, json!({}));
    assert_eq!(stopped, Ok(json!(null)), "it is that already");
}

#[test]
fn what_does_not_fit_is_not_started_and_loses_nothing() {
    // A host that has room for two.
    let all = World::new().ask("room", "", json!({})).unwrap();
    let all = all["all"]["memory_mib"].as_f64().unwrap();
    let factor = (700.0 / all).to_string();
    let mut world = World::with(&["--memory-overcommit", &factor]);
    let [one, two] = [world.launch(&[]), world.launch(&[])];
    world.count(&one);
    let mut three = Machine::new(&[]);
    world.wish(&mut three, json!("started"));
    let status = world.wait(&three, "failed");
    let reason = status["reason"].as_str().unwrap();
    assert!(reason.contains("needs 288 MiB of memory"), "{reason}");
    assert!(reason.contains("--memory-overcommit"), "{reason}");
    // One that sleeps takes nothing, also after its agent.
    world.suspend(&one);
    world.wait(&one, "suspended");
    world.kill();
    world.up();
    world.start(&three);
    let room = world.ask("room", "", json!({})).unwrap();
    assert_eq!(room["taken"]["memory_mib"], 576);
    let gate = json!({"source": "proxy"});
    let error = world.ask("start", &one.id, gate).unwrap_err();
    assert!(error.contains("no room"), "{error}");
    world.wait(&one, "suspended");
    world.stop(&two);
    world.start(&one);
    assert_eq!(world.count(&one), 2, "its memory");
}
