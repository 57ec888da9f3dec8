//! The public side: ingress and gate.
//!
//! - **Ingress** ends TLS (certificate by SNI), speaks HTTP/1.1 and HTTP/2, finds the app by host name in
//!   the [`View`], and proxies with pingora. It answers ACME http-01, redirects to https where an app
//!   asks for it, and refuses what no app should see.
//! - **Gate** holds the one true count of requests of each Machine of this host. It admits, makes wait,
//!   refuses, or wakes: a thousand requests to a sleeping Machine cause one start. A Machine that has been of
//!   no use to anybody for a while it puts to sleep, as its `fly.toml` says.
//!
//! HTTP/3 (`ingress/quic.rs`) and raw TCP handlers (`ingress/tcp.rs`) will stand beside `listen.rs` and
//! meet the same router and gate.
//!
//! [`View`]: tern_catalog::View

mod config;
mod control;
mod gate;
mod headers;
mod ingress;
mod listen;
mod metrics;
mod pages;
mod route;
mod sleep;

pub use config::{Edge, EdgeConfig};
pub use control::{Leaving, MachineControl, StartError};
pub use metrics::Metrics;
