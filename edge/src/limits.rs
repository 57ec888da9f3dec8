//! How long each phase of a connection may take, and how many there may be. One that is over its limit is closed, and
//! nobody else is harmed.

use std::time::Duration;

/// Limits of clients' connections.
#[derive(Debug, Clone)]
pub struct Limits {
    /// A TLS handshake; after it, if HTTP/2 was agreed on, the client's first words of it.
    pub handshake: Duration,
    /// A request's head over HTTP/1, from its first byte to its last: in all, so that a client that sends a byte now
    /// and then (slowloris) does not hold a connection for ever.
    pub head: Duration,
    /// The pause before a request, of a connection that has none under way.
    pub keep_alive: Duration,
    /// Connections over TCP at once, of all clients. When there are so many, the one that was idle the longest ends for
    /// the next.
    pub connections: usize,
    /// The same of one client: an IPv4 address, or a /64 of IPv6.
    pub connections_of_client: usize,
    /// A request in which nothing moves in either direction, where its service sets no `idle_timeout`.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            head: Duration::from_secs(30),
            // nginx's; browsers give up idle connections after one to five minutes.
            keep_alive: Duration::from_secs(75),
            // Some 23 KiB each.
            connections: 32_768,
            // A proxy with many users before us is one client.
            connections_of_client: 4096,
            // Longer than what clients and apps commonly keep silent for, event streams' comments (15 to 60 s) included.
            idle: Duration::from_secs(120),
        }
    }
}
