//! The agent with real processes, files, devices and rules, and a monitor that only looks like one.

// A test that cannot go on may panic.
#![allow(clippy::unwrap_used)]

mod crashes;
mod images;
mod lifecycle;
mod registry;
mod walk;
mod world;
