//! Hostile bytes for every parser that faces a guest, a registry, a client or a network.
//!
//! A [`Target`] takes any bytes, makes of them what an attacker could do (descriptors in rings, packets,
//! files, requests), gives that to the project's own code, and panics where a promise is broken: a panic
//! of that code, a write outside the buffers a guest offered, something refused that was carried out, a
//! device that cannot be used after a reset.
//!
//! `make check-deep` runs them under libFuzzer, guided by coverage. What it finds is put into
//! `cases/<target>/` and replayed by `make test` for good (`tests/replay.rs`), without the engine.

// A target's own scaffolding panics like what it examines: either is a finding to look at.
#![allow(clippy::unwrap_used)]

mod guest;
mod input;
mod targets;

/// One way into the project's code.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Names it on the command line, and its directories.
    pub name: &'static str,
    /// What bytes it stands for.
    pub about: &'static str,
    /// The longest input worth trying, in bytes.
    pub max_len: usize,
    /// Gives the bytes to the code.
    pub run: fn(&[u8]),
    /// Valid inputs, from which an engine starts.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

pub use targets::TARGETS;

/// The target of this name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
