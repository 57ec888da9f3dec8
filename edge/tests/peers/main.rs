//! An edge before apps that speak raw bytes, asked by clients that send raw bytes, and by tools that nobody here
//! wrote (curl, nc, Debian's python3-h2): what reaches an app is well-formed and asked for, what a client
//! gets is its own.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests fail by panicking")]

mod app;
mod client;
mod h2;
mod messages;
mod smuggling;
mod smuggling_h2;
mod strict;
mod tunnels;
mod uploads;
mod world;
