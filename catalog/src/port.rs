//! A public port of a service: which numbers, and what the edge does with a connection to one.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::ServiceProtocol;

/// A public port, or a range of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Port {
    /// The port, where it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The first of a range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_port: Option<u16>,
    /// The last of a range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_port: Option<u16>,
    /// What the edge does with a connection; none is raw TCP.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub handlers: Vec<Handler>,
    /// Redirect http to https.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force_https: bool,
    /// TLS settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_options: Option<TlsOptions>,
    /// HTTP settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http_options: Option<HttpOptions>,
    /// How the app is told who connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_proto_options: Option<ProxyProtoOptions>,
}

/// What the edge does with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Handler {
    /// End TLS.
    Tls,
    /// Speak HTTP.
    Http,
    /// End TLS as PostgreSQL begins it, after a message of its own.
    PgTls,
    /// Nothing: what there is without a handler, written out.
    Tcp,
    /// Tell the app who connected, in a header before the first byte.
    ProxyProto,
}

/// What a port speaks, all handlers taken together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PortKind {
    /// Bytes as they come: nothing tells one app's connections from another's, so the port is one app's alone.
    Raw,
    /// TLS that ends at the edge, and bytes within.
    Tls,
    /// The same, begun as PostgreSQL does.
    PgTls,
    /// HTTP without TLS.
    Http,
    /// HTTP over TLS.
    Https,
}

/// TLS settings of a public port.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TlsOptions {
    /// Protocols offered by ALPN: `h2` and `http/1.1` by default over HTTP, none otherwise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alpn: Vec<String>,
    /// TLS versions, `TLSv1.2` and `TLSv1.3` by default.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub versions: Vec<String>,
}

/// HTTP settings of a public port.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HttpOptions {
    /// Speak HTTP/2 without TLS to the app.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub h2_backend: bool,
    /// Seconds without a byte after which a connection is closed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<u32>,
    /// Changes to responses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response: Option<ResponseOptions>,
}

/// Changes to responses.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ResponseOptions {
    /// Add no headers of ours.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pristine: bool,
    /// Headers to set, or with `false` to remove.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, serde_json::Value>,
}

/// How the app is told who connected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyProtoOptions {
    /// The header's version, `v1` by default.
    #[serde(default)]
    pub version: ProxyProtocol,
}

/// A version of the PROXY protocol (HAProxy's `proxy-protocol.txt`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProxyProtocol {
    /// A line of text.
    #[default]
    V1,
    /// Binary.
    V2,
}

/// ALPN's names of what the edge speaks of HTTP over TCP.
const HTTP_ALPN: [&str; 2] = ["h2", "http/1.1"];
/// TLS versions that the edge speaks.
const TLS_VERSIONS: [&str; 2] = ["TLSv1.2", "TLSv1.3"];

impl Port {
    /// One port.
    pub fn new(port: u16, handlers: Vec<Handler>) -> Self {
        Self {
            port: Some(port),
            handlers,
            ..Self::default()
        }
    }

    /// Its numbers; `None` unless it has either one or a range of them.
    pub fn numbers(&self) -> Option<RangeInclusive<u16>> {
        let (first, last) = match (self.port, self.start_port, self.end_port) {
            (Some(port), None, None) => (port, port),
            // Written in both ways by some clients.
            (Some(port), Some(first), Some(last)) if first == last && first == port => (port, port),
            (None, Some(first), Some(last)) => (first, last),
            _ => return None,
        };
        (first > 0 && first <= last).then_some(first..=last)
    }

    /// Whether this number is among its own.
    pub fn has(&self, number: u16) -> bool {
        self.numbers().is_some_and(|all| all.contains(&number))
    }

    /// What it speaks; `None` where its handlers do not go together.
    pub fn kind(&self) -> Option<PortKind> {
        let has = |handler| self.handlers.contains(&handler);
        let kind = match (has(Handler::Tls), has(Handler::PgTls), has(Handler::Http)) {
            (false, false, false) => PortKind::Raw,
            (true, false, false) => PortKind::Tls,
            (false, true, false) => PortKind::PgTls,
            (false, false, true) => PortKind::Http,
            (true, false, true) => PortKind::Https,
            (_, true, _) => return None,
        };
        (!kind.is_http() || !has(Handler::ProxyProto)).then_some(kind)
    }

    /// The header by which the app is told who connected.
    pub fn proxy_protocol(&self) -> Option<ProxyProtocol> {
        let asked = self.handlers.contains(&Handler::ProxyProto);
        asked.then(|| self.proxy_proto_options.unwrap_or_default().version)
    }

    /// What of this port the edge does not serve: the key within it, where it is not the port itself, and the text
    /// for people. The one place that says so: what refuses or warns asks here.
    pub fn unserved(&self, protocol: ServiceProtocol) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        let mut say = |key, text: String| found.push((key, text));
        let numbers = self.numbers();
        if numbers.is_none() {
            let text = match (self.port, self.start_port, self.end_port) {
                (None, None, None) => "`port` is missing",
                (Some(_), ..) if self.start_port.or(self.end_port).is_some() => {
                    "there is `port`, or `start_port` and `end_port`, and not both"
                }
                (Some(_), ..) => "0 is no port",
                _ => {
                    "a range has a `start_port` and an `end_port` that is not below it; 0 is no port"
                }
            };
            say("", text.to_owned());
        }
        let shared = numbers.and_then(|all| [80, 443].into_iter().find(|n| all.contains(n)));
        if protocol == ServiceProtocol::Udp {
            if let Some(shared) = shared {
                let text =
                    format!("UDP's port {shared} is the platform's own (HTTP/3); take another");
                say("", text);
            }
            let more = [
                ("handlers", !self.handlers.is_empty()),
                ("force_https", self.force_https),
                ("tls_options", self.tls_options.is_some()),
                ("http_options", self.http_options.is_some()),
                ("proxy_proto_options", self.proxy_proto_options.is_some()),
            ];
            for (key, _) in more.into_iter().filter(|(_, given)| *given) {
                say(key, "datagrams are passed on as they are".to_owned());
            }
            return found;
        }
        let Some(kind) = self.kind() else {
            let text = if self.handlers.contains(&Handler::PgTls) {
                "`pg_tls` ends TLS by itself and leads to no HTTP: leave `tls` and `http` out"
            } else {
                "`proxy_proto` does not go with `http`: requests tell who calls by Fly-Client-IP and X-Forwarded-For"
            };
            say("handlers", text.to_owned());
            return found;
        };
        if let Some(shared) = shared.filter(|_| kind == PortKind::Raw) {
            say(
                "",
                format!(
                    "all apps share port {shared}: a connection without `http` or `tls` does not say for which it is; \
                     take another port"
                ),
            );
        }
        if self.force_https && kind != PortKind::Http {
            say(
                "force_https",
                "only plain HTTP can be redirected".to_owned(),
            );
        }
        if self.http_options.is_some() && !kind.is_http() {
            say("http_options", "there is no `http` handler".to_owned());
        }
        if let Some(options) = &self.tls_options {
            if !kind.is_tls() {
                say("tls_options", "there is no `tls` handler".to_owned());
            }
            let unknown = |given: &[String], known: &[&str]| {
                given.iter().find(|g| !known.contains(&g.as_str())).cloned()
            };
            if let Some(other) = unknown(&options.alpn, &HTTP_ALPN).filter(|_| kind.is_http()) {
                say(
                    "tls_options.alpn",
                    format!("{other:?} is not spoken; there are \"h2\" and \"http/1.1\""),
                );
            }
            if options.alpn.iter().any(|p| p.is_empty() || p.len() > 255) {
                let text = "a protocol's name has 1 to 255 bytes (RFC 7301)";
                say("tls_options.alpn", text.to_owned());
            }
            if let Some(other) = unknown(&options.versions, &TLS_VERSIONS) {
                say(
                    "tls_options.versions",
                    format!("{other:?} is not spoken; there are \"TLSv1.2\" and \"TLSv1.3\""),
                );
            }
        }
        if self.proxy_proto_options.is_some() && !self.handlers.contains(&Handler::ProxyProto) {
            let text = "there is no `proxy_proto` handler";
            say("proxy_proto_options", text.to_owned());
        }
        found
    }
}

impl PortKind {
    /// Whether requests are told apart.
    pub fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::Https)
    }

    /// Whether TLS ends at the edge.
    pub fn is_tls(self) -> bool {
        matches!(self, Self::Tls | Self::PgTls | Self::Https)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(json: &str) -> Port {
        serde_json::from_str(json).unwrap()
    }

    fn keys(json: &str) -> Vec<&'static str> {
        let told = port(json).unserved(ServiceProtocol::Tcp);
        told.into_iter().map(|(key, _)| key).collect()
    }

    #[test]
    fn what_the_edge_does_not_serve_of_a_port_is_told() {
        for served in [
            r#"{"port":80,"handlers":["http"]}"#,
            r#"{"port":443,"handlers":["http","tls"]}"#,
            r#"{"port":443,"handlers":["tls"]}"#,
            r#"{"port":4222,"handlers":["tls","proxy_proto"],"proxy_proto_options":{"version":"v2"}}"#,
            r#"{"port":5432,"handlers":["pg_tls"],"tls_options":{"alpn":["postgresql"],"versions":["TLSv1.3"]}}"#,
            r#"{"port":8443,"handlers":["tls","http"],"tls_options":{"alpn":["http/1.1"]}}"#,
            r#"{"start_port":10000,"end_port":10010}"#,
            r#"{"port":9000}"#,
        ] {
            assert!(
                keys(served).is_empty(),
                "{served}: {:?}",
                port(served).unserved(ServiceProtocol::Tcp)
            );
        }
        for (unserved, key) in [
            (r#"{"port":80}"#, ""),
            (r#"{"port":0,"handlers":["http"]}"#, ""),
            (r#"{"handlers":["http"]}"#, ""),
            (r#"{"start_port":5,"handlers":["http"]}"#, ""),
            (r#"{"start_port":5,"end_port":4,"handlers":["http"]}"#, ""),
            (r#"{"start_port":400,"end_port":500}"#, ""),
            (r#"{"port":1,"start_port":2,"end_port":3}"#, ""),
            (r#"{"port":5432,"handlers":["pg_tls","tls"]}"#, "handlers"),
            (
                r#"{"port":81,"handlers":["http","proxy_proto"]}"#,
                "handlers",
            ),
            (r#"{"port":81,"force_https":true}"#, "force_https"),
            (
                r#"{"port":81,"http_options":{"idle_timeout":3}}"#,
                "http_options",
            ),
            (r#"{"port":81,"tls_options":{"alpn":["x"]}}"#, "tls_options"),
            (
                r#"{"port":443,"handlers":["tls","http"],"tls_options":{"alpn":["smtp"]}}"#,
                "tls_options.alpn",
            ),
            (
                r#"{"port":444,"handlers":["tls"],"tls_options":{"versions":["TLSv1.1"]}}"#,
                "tls_options.versions",
            ),
            (
                r#"{"port":444,"proxy_proto_options":{"version":"v1"}}"#,
                "proxy_proto_options",
            ),
        ] {
            assert_eq!(keys(unserved), [key], "{unserved}");
        }
    }

    #[test]
    fn datagrams_have_no_handlers() {
        let keys = |json| {
            let told = port(json).unserved(ServiceProtocol::Udp);
            told.into_iter().map(|(key, _)| key).collect::<Vec<_>>()
        };
        assert!(keys(r#"{"port":5353}"#).is_empty());
        assert_eq!(keys(r#"{"port":443}"#), [""]);
        assert_eq!(keys(r#"{"port":5353,"handlers":["tls"]}"#), ["handlers"]);
    }

    #[test]
    fn a_port_is_one_or_a_range_and_written_as_it_was_read() {
        assert_eq!(port(r#"{"port":7}"#).numbers(), Some(7..=7));
        assert_eq!(
            port(r#"{"start_port":7,"end_port":9}"#).numbers(),
            Some(7..=9)
        );
        for json in [
            r#"{"port":443,"handlers":["tls","http"],"force_https":true}"#,
            r#"{"start_port":7,"end_port":9,"handlers":["proxy_proto"],"proxy_proto_options":{"version":"v2"}}"#,
        ] {
            assert_eq!(serde_json::to_string(&port(json)).unwrap(), json);
        }
    }
}
