//! A small world for end-to-end tests: one host with `tern serve`, a CA (Debian's `pebble`) and
//! laptops with the kernel's WireGuard, in network and mount namespaces of its own.
//!
//! Runs as root where there is true KVM: inside `tern-metal`, or on a host with hardware
//! virtualization. Everything a test drives, it drives from outside as a person would: the `tern`
//! command, `curl`, `wg-quick`, `dig`.

pub mod artefacts;
pub mod http;
pub mod laptop;
pub mod namespace;
pub mod page_cache;
pub mod pebble;
pub mod process;
pub mod server;
pub mod sql;
pub mod world;

pub use artefacts::Artefacts;
pub use http::Reply;
pub use laptop::Laptop;
pub use world::{App, World, fly_toml};
