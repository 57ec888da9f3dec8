//! Monitor processes: `tern-vmm`, one per Machine, and how to speak to them.

pub(crate) mod config;
pub(crate) mod control;
mod process;

pub(crate) use process::{Monitor, Start};
