//! The issuer and the resolver against Debian's `pebble`, a CA made to be difficult: it refuses one nonce
//! in twenty, waits up to 15 s before it validates, and forgets half of what it has validated.
//!
//! Every test has a CA, a catalog and listeners of its own; nothing leaves loopback.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests fail by panicking")]

mod ca;
mod dns;
mod failure;
mod issue;
mod moody;
mod patience;
mod renew;
mod world;
