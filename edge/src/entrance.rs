//! By which of the edge's public ports a request came in.

use tern_catalog::{Handler, Port};

/// Whether a listener ends TLS; its public port follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Entrance {
    /// Plain HTTP, known to apps as port 80.
    Http,
    /// HTTPS, known to apps as port 443.
    Https,
}

impl Entrance {
    /// The port as apps name it, wherever the listener is bound.
    pub fn port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }

    /// The same as text.
    pub fn port_text(self) -> &'static str {
        match self {
            Self::Http => "80",
            Self::Https => "443",
        }
    }

    /// `http` or `https`.
    pub fn scheme(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    pub fn is_tls(self) -> bool {
        self == Self::Https
    }

    /// Whether this port of a service is served here.
    pub fn serves(self, port: &Port) -> bool {
        let tls = port.handlers.contains(&Handler::Tls);
        let http = port.handlers.contains(&Handler::Http);
        port.port == self.port() && http && tls == self.is_tls()
    }
}
