//! By which of the edge's public ports a request came in.

use tern_catalog::{Port, PortKind};

/// A public port as apps name it, wherever the listener is bound, and whether TLS ended there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Entrance {
    pub port: u16,
    pub tls: bool,
}

/// Where plain HTTP is served for all.
pub const HTTP: u16 = 80;
/// Where HTTPS is served for all.
pub const HTTPS: u16 = 443;

impl Entrance {
    /// `http` or `https`.
    pub fn scheme(self) -> &'static str {
        if self.tls { "https" } else { "http" }
    }

    /// Whether requests to this port of a service come in here.
    pub fn serves(self, port: &Port) -> bool {
        let kind = if self.tls {
            PortKind::Https
        } else {
            PortKind::Http
        };
        port.kind() == Some(kind) && port.has(self.port)
    }
}
