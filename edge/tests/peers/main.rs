//! An edge before apps that speak raw bytes, asked by clients that send raw bytes, and by tools that nobody here
//! wrote (curl, Debian's python3-h2): what reaches an app is well-formed and asked for, what a client gets is
//! its own.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests fail by panicking")]

mod answers;
mod app;
mod client;
mod connections;
mod h2_app;
mod h2_client;
mod h2_hostile;
mod messages;
mod services;
mod smuggling;
mod strict;
mod tunnels;
mod uploads;
mod world;
