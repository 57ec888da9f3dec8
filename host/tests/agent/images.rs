//! Images are kept once on a host, and are for those who were given them.

use serde_json::json;

use crate::registry;
use crate::world::{Machine, World};

/// Waits for a start to fail, and returns why.
fn why(world: &mut World, mut machine: Machine) -> String {
    world.begin(&mut machine, json!("started"));
    let status = world.wait(&machine, "failed");
    status["reason"].as_str().unwrap().to_owned()
}

#[test]
fn a_digest_alone_runs_nobody_s_image() {
    let mut world = World::new();
    let own = world.launch(&[]);
    // Its bytes are here, and the registry has them; but not under this name.
    let mut other = Machine::new(&[]);
    let digest = registry::digest();
    other.update(|config| config["image"] = json!(format!("registry.internal/other@{digest}")));
    let told = why(&mut world, other);
    assert!(told.contains("was not found"), "{told}");
    // Nor is what an update names made ready.
    let image = format!("registry.internal/other@{digest}");
    let told = world.ask("prepare", &own.id, json!({"image": image}));
    assert!(told.unwrap_err().contains("was not found"));
}

#[test]
fn a_registry_that_is_down_stops_nobody_who_was_given_the_image() {
    let mut world = World::new();
    let mut machine = world.launch(&[]);
    let asleep = world.launch(&[]);
    world.suspend(&asleep);
    world.registry.goes_down();
    world.down();
    world.up();
    // From its memory, from its disk, and with another config.
    world.start(&asleep);
    world.stop(&machine);
    world.start(&machine);
    machine.update(|config| config["env"]["NEW"] = json!("1"));
    world.wish(&mut machine, json!("started"));
    world.wait(&machine, "started");
    world.launch(&[]);
    // Another organization has not been given it, and there is nobody to ask.
    let told = why(&mut world, Machine::new(&[]).in_network(8));
    assert!(told.contains("cannot be reached"), "{told}");
}
