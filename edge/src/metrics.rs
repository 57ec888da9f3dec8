//! What the edge counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one edge since it started.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Connections accepted.
    pub connections: Counter,
    /// TLS handshakes that failed.
    pub tls_failures: Counter,
    /// Requests that reached an app.
    pub proxied: Counter,
    /// Connections that are not HTTP, and reached an app.
    pub tcp_relayed: Counter,
    /// Sessions of UDP that reached an app.
    pub udp_sessions: Counter,
    /// Requests sent again because the first was lost with its connection.
    pub replayed: Counter,
    /// Requests refused by the ingress itself: unknown hosts, malformed or oversized heads.
    pub refused: Counter,
    /// Requests that found all Machines at their limit, or none to be had, until their patience ended.
    pub at_capacity: Counter,
    /// Starts asked of the agent.
    pub wakes: Counter,
    /// Starts that failed.
    pub wake_failures: Counter,
    /// Machines put to sleep for want of traffic.
    pub put_to_sleep: Counter,
}

/// A number that only rises.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// How many.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
