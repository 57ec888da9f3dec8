//! Ports of the outer machine's loopback that lead into the host.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Error, Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// One forwarded port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Port on 127.0.0.1 outside; 0 asks for any free one.
    pub outer: u16,
    /// Port inside.
    pub inner: u16,
}

/// Transport of a forwarded port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "127.0.0.1:{} -> {}/{}",
            self.outer, self.inner, self.protocol
        )
    }
}

impl FromStr for Forward {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (ports, protocol) = match text.split_once('/') {
            None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some((_, other)) => bail!("{other} is no protocol: tcp or udp"),
        };
        let (outer, inner) = ports
            .split_once(':')
            .context("expected LOOPBACKPORT:GUESTPORT[/udp]")?;
        let port = |text: &str| {
            text.parse::<u16>()
                .with_context(|| format!("{text:?} is no port (0 to 65535)"))
        };
        let forward = Self {
            protocol,
            outer: port(outer)?,
            inner: port(inner)?,
        };
        ensure!(forward.inner != 0, "the port inside must not be 0");
        Ok(forward)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_users_write() {
        let forward = |protocol, outer, inner| Forward {
            protocol,
            outer,
            inner,
        };
        for (text, expected) in [
            ("8443:443", forward(Protocol::Tcp, 8443, 443)),
            ("0:80/tcp", forward(Protocol::Tcp, 0, 80)),
            ("5353:53/udp", forward(Protocol::Udp, 5353, 53)),
        ] {
            assert_eq!(text.parse::<Forward>().unwrap(), expected, "{text}");
        }
        for text in [
            "", "80", "a:1", "1:0", "1:70000", "-1:2", "1:2/sctp", "1:2:3",
        ] {
            assert!(text.parse::<Forward>().is_err(), "{text}");
        }
    }
}
