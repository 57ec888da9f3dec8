//! An edge in this process, before apps that are servers on loopback; real clients (curl).
#![allow(missing_docs, clippy::unwrap_used, reason = "tests fail by panicking")]

mod http3;
mod requests;
mod wake;
mod world;
