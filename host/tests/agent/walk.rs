//! The agent, or a monitor, is killed at every step of what it does to the world; afterwards the Machine
//! can be used, and once it is destroyed nothing of it is left.
//!
//! A step is a system call that changes something outside of the process (`tern-faults`). Each test walks
//! one operation from its first step on, until it is done before the shot would fall.

use serde_json::{Value, json};
use tern_faults::Shot;

use crate::world::{Machine, World, until};

/// Who is shot at.
#[derive(Clone, Copy, PartialEq)]
enum Victim {
    Agent,
    /// The Machine's monitor, which runs.
    Monitor,
    /// The monitor that the operation starts.
    NewMonitor,
}

/// One operation, walked.
struct Walk {
    victim: Victim,
    /// What a Machine is before.
    before: fn(&mut World) -> Machine,
    /// Asks for it, and does not wait.
    ask: fn(&mut World, &mut Machine) -> u64,
    /// Asks for it again where it failed, and looks at what came of it. The agent runs.
    after: fn(&mut World, &mut Machine),
}

impl Walk {
    fn run(&self) {
        let mut world = World::new();
        // What the first Machine leaves, all others use: an empty file system.
        let mut first = world.launch(&[]);
        destroy(&mut world, &mut first);
        let files = world.files();
        for nth in 1.. {
            let mut machine = (self.before)(&mut world);
            let shot = self.aim(&world, &machine, nth);
            let asked = (self.ask)(&mut world, &mut machine);
            // A monitor's death may end in an error as well as in another try that succeeds.
            let answer = world.answer_unless_it_dies(asked);
            let fired = shot.fired().map(str::to_owned);
            let step = fired.as_deref().unwrap_or("none");
            let answered = match &answer {
                None => "none".to_owned(),
                Some(Ok(_)) => "ok".to_owned(),
                Some(Err(error)) => error.clone(),
            };
            eprintln!("step {nth}: killed before {step}; answer: {answered}");
            match (self.victim, &answer) {
                (Victim::Agent, None) => {
                    assert!(fired.is_some(), "the agent died by itself");
                    world.wait_for_crash();
                }
                (_, Some(answer)) => {
                    if fired.is_none() {
                        assert!(answer.is_ok(), "it fails by itself: {answered}");
                    }
                    // Also after the last step of all; and a tracer goes with its agent.
                    world.kill();
                }
                (_, None) => panic!("the agent dies of its monitor's death"),
            }
            world.up();
            (self.after)(&mut world, &mut machine);
            destroy(&mut world, &mut machine);
            assert_eq!(world.files(), files, "files of nobody");
            if fired.is_none() {
                assert!(nth > 1, "no step was seen");
                return;
            }
        }
    }

    fn aim(&self, world: &World, machine: &Machine, nth: u64) -> Shot {
        match self.victim {
            Victim::Agent => Shot::at(world.agent(), nth),
            Victim::Monitor => Shot::at(world.monitor(machine), nth),
            Victim::NewMonitor => Shot::at_child(world.agent(), "fake-vmm", nth),
        }
        .expect("ptrace(2) must be allowed")
    }
}

/// Has a Machine destroyed, or what is left of it.
fn destroy(world: &mut World, machine: &mut Machine) {
    world.ask("destroy", &machine.id, json!({})).unwrap();
    world.wait(machine, "destroyed");
    until("nothing is left", || {
        world.traces().is_empty() && world.ask("records", "", json!({})).unwrap() == json!([])
    });
}

fn a_new_one(_: &mut World) -> Machine {
    Machine::new(&[])
}

fn a_running_one(world: &mut World) -> Machine {
    let machine = world.launch(&[]);
    world.count(&machine);
    machine
}

fn a_sleeping_one(world: &mut World) -> Machine {
    let machine = a_running_one(world);
    world.suspend(&machine);
    world.wait(&machine, "suspended");
    machine
}

fn launch(world: &mut World, machine: &mut Machine) -> u64 {
    world.begin(machine, json!("started"));
    world.say("wait", &machine.id, json!({"state": "started"}))
}

fn start(world: &mut World, machine: &mut Machine) -> u64 {
    world.say("start", &machine.id, json!({"source": "proxy"}))
}

fn suspend(world: &mut World, machine: &mut Machine) -> u64 {
    world.say("suspend", &machine.id, json!({"source": "proxy"}))
}

fn stop(world: &mut World, machine: &mut Machine) -> u64 {
    world.say("stop", &machine.id, json!({}))
}

fn update(world: &mut World, machine: &mut Machine) -> u64 {
    machine.update(|config| config["env"]["NEW"] = json!("1"));
    launch(world, machine)
}

fn forget(world: &mut World, machine: &mut Machine) -> u64 {
    world.say("destroy", &machine.id, json!({}));
    world.say("wait", &machine.id, json!({"state": "destroyed"}))
}

/// It runs, once, and does its work.
fn runs(world: &mut World, machine: &Machine) -> u64 {
    world.start(machine);
    world.wait(machine, "started");
    assert_eq!(world.monitors(), [world.monitor(machine)]);
    world.count(machine)
}

fn launched(world: &mut World, machine: &mut Machine) {
    // Whoever asked has no answer, and asks again.
    world.wish(machine, json!("started"));
    world.wait(machine, "started");
    assert_eq!(runs(world, machine), 1);
}

/// Nobody loses what the app had in memory by a suspend, whenever the agent dies.
fn slept(world: &mut World, machine: &mut Machine) {
    world.suspend(machine);
    assert!(world.monitors().is_empty());
    assert_eq!(runs(world, machine), 2);
    assert_eq!(world.metric("cold_starts"), 0);
}

/// Its memory is what it was; or it starts cold, and says why.
fn woke(world: &mut World, machine: &mut Machine) {
    if runs(world, machine) == 1 {
        let status = world.status(machine);
        assert!(told_why(&status), "a cold start without a word: {status:#}");
    }
}

fn told_why(status: &Value) -> bool {
    let events = status["events"].as_array().unwrap();
    events.iter().any(|event| {
        let said = event["request"].to_string();
        event["type"] == "exit" || said.contains("snapshot") || said.contains("cold")
    })
}

fn stopped(world: &mut World, machine: &mut Machine) {
    world.stop(machine);
    world.wait(machine, "stopped");
    assert!(world.monitors().is_empty());
    assert_eq!(runs(world, machine), 1, "a stop forgets");
}

fn gone(world: &mut World, machine: &mut Machine) {
    // `destroy` asks again, and looks.
    let _ = (world, machine);
}

#[test]
fn the_agent_dies_at_any_step_of_a_launch() {
    Walk {
        victim: Victim::Agent,
        before: a_new_one,
        ask: launch,
        after: launched,
    }
    .run();
}

#[test]
fn the_agent_dies_at_any_step_of_a_suspend() {
    Walk {
        victim: Victim::Agent,
        before: a_running_one,
        ask: suspend,
        after: slept,
    }
    .run();
}

#[test]
fn the_agent_dies_at_any_step_of_a_wake() {
    Walk {
        victim: Victim::Agent,
        before: a_sleeping_one,
        ask: start,
        after: woke,
    }
    .run();
}

#[test]
fn the_agent_dies_at_any_step_of_a_stop() {
    Walk {
        victim: Victim::Agent,
        before: a_running_one,
        ask: stop,
        after: stopped,
    }
    .run();
}

#[test]
fn the_agent_dies_at_any_step_of_an_update() {
    Walk {
        victim: Victim::Agent,
        before: a_sleeping_one,
        ask: update,
        after: launched,
    }
    .run();
}

#[test]
fn the_agent_dies_at_any_step_of_a_destroy() {
    Walk {
        victim: Victim::Agent,
        before: a_running_one,
        ask: forget,
        after: gone,
    }
    .run();
}

#[test]
fn a_monitor_dies_at_any_step_of_a_launch() {
    Walk {
        victim: Victim::NewMonitor,
        before: a_new_one,
        ask: launch,
        after: launched,
    }
    .run();
}

#[test]
fn a_monitor_dies_at_any_step_of_a_suspend() {
    Walk {
        victim: Victim::Monitor,
        before: a_running_one,
        ask: suspend,
        after: woke,
    }
    .run();
}

#[test]
fn a_monitor_dies_at_any_step_of_a_wake() {
    Walk {
        victim: Victim::NewMonitor,
        before: a_sleeping_one,
        ask: start,
        after: woke,
    }
    .run();
}
