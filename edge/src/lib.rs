//! The public side: ingress and gate.
//!
//! - **Ingress** ends TLS (certificate by SNI), speaks HTTP/1.1, 2 and 3, finds the app by host name in
//!   the [`View`], and relays. It answers ACME http-01, redirects to https where an app asks for it, and
//!   refuses what no app should see.
//! - **Gate** holds the one true count of requests of each Machine of this host. It admits, makes wait,
//!   refuses, or wakes: a thousand requests to a sleeping Machine cause one start. A Machine that has been of
//!   no use to anybody for a while it puts to sleep, as its `fly.toml` says.
//!
//! - Connections that are not HTTP (raw TCP, TLS alone, PostgreSQL's TLS) go the same way, each with a place of its
//!   own at a Machine, to whatever public port services name.
//!
//! The way of a request, downwards: `worker` (a thread's sockets, TLS) → `h1::client`, `h2` or `h3` (its head) →
//! `relay` (which site, which Machine, which connection, both ways) → `h1::app` or an HTTP/2 stream.
//!
//! [`View`]: tern_catalog::View

mod access;
mod config;
mod control;
mod door;
mod entrance;
mod frames;
mod gate;
mod h1;
mod h2;
mod h3;
mod headers;
mod limits;
mod message;
mod metrics;
mod pages;
mod quic;
mod relay;
mod site;
mod sleep;
mod socket;
mod tcp;
mod timer;
mod tls;
mod udp;
mod worker;

pub use access::AccessLogConfig;
pub use config::{Edge, EdgeConfig};
pub use control::{Leaving, MachineControl, StartError};
pub use limits::Limits;
pub use metrics::{AppMetrics, BOUNDS, Counter, Gauge, Histogram, Metrics};
