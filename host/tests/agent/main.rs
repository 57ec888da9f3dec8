//! The agent with real processes, files, devices and rules, and a monitor that only looks like one.

mod crashes;
mod lifecycle;
mod world;
