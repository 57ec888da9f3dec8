//! Fields that tell an app who called, and a caller who answered; and those that end at the edge. No I/O.
//!
//! What the edge states as fact (`Fly-Client-IP` and its like) replaces whatever a client sent under that
//! name. `X-Forwarded-For` is appended to, as proxies do (RFC 7239 section 7.4 on its predecessors).

use http::header::HeaderName;
use http::{HeaderValue, Version};
use tern_catalog::ResponseOptions;

use crate::entrance::Entrance;
use crate::h1;
use crate::message::{Fields, Length, ReplyHead, RequestHead};

/// What is known of a request beside what its client sent.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The client's address; an IPv4 client of a dual-stack listener by its IPv4 address.
    pub client: &'a str,
    pub entrance: Entrance,
    pub region: &'a str,
    pub request_id: &'a str,
    pub version: Version,
    /// Where else the site can be had (RFC 7838), for replies over TLS.
    pub alt_svc: Option<&'a str>,
}

/// What a service has done to its replies.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Changes {
    /// The edge adds nothing of its own.
    pristine: bool,
    /// Fields to set, or to leave out.
    fields: Vec<(HeaderName, Option<HeaderValue>)>,
}

impl Changes {
    pub fn new(options: Option<&ResponseOptions>) -> Self {
        let mut changes = Self {
            pristine: options.is_some_and(|o| o.pristine),
            fields: Vec::new(),
        };
        for (name, value) in options.map(|o| o.headers.iter()).into_iter().flatten() {
            let Ok(name) = name.parse::<HeaderName>() else {
                continue;
            };
            // What frames a reply is not its app's owner's to say.
            if matches!(
                kind(name.as_str().as_bytes()),
                Kind::ThisHop | Kind::ContentLength
            ) {
                continue;
            }
            let value = match value {
                serde_json::Value::Bool(false) => None,
                serde_json::Value::String(text) => HeaderValue::from_str(text).ok(),
                serde_json::Value::Array(all) => {
                    let texts: Vec<&str> = all.iter().filter_map(|v| v.as_str()).collect();
                    HeaderValue::from_str(&texts.join(", ")).ok()
                }
                _ => continue,
            };
            changes.fields.push((name, value));
        }
        changes
    }

    fn names(&self, name: &[u8]) -> bool {
        let same = |n: &HeaderName| n.as_str().as_bytes().eq_ignore_ascii_case(name);
        self.fields.iter().any(|(n, _)| same(n))
    }
}

/// What a field is to the edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Passed on.
    Passed,
    /// Ends here, or is written anew by the next hop (RFC 9110 section 7.6.1).
    ThisHop,
    /// What the edge says itself of a request.
    Fact,
    ForwardedFor,
    Via,
    Cookie,
    ContentLength,
    /// What the edge says itself of a reply.
    Server,
    RequestId,
    AltSvc,
}

/// By name, in any case. A `_` counts as a `-`: many apps see no difference (CGI's `HTTP_FLY_CLIENT_IP`).
fn kind(name: &[u8]) -> Kind {
    let mut lower = [0; 20];
    let Some(lower) = lower.get_mut(..name.len()) else {
        return Kind::Passed;
    };
    for (to, from) in lower.iter_mut().zip(name) {
        *to = if *from == b'_' {
            b'-'
        } else {
            from.to_ascii_lowercase()
        };
    }
    match &*lower {
        b"connection" | b"keep-alive" | b"proxy-connection" | b"transfer-encoding" | b"upgrade"
        | b"te" | b"host" | b"http2-settings" => Kind::ThisHop,
        b"content-length" => Kind::ContentLength,
        b"cookie" => Kind::Cookie,
        b"fly-client-ip"
        | b"fly-forwarded-port"
        | b"fly-region"
        | b"x-forwarded-proto"
        | b"x-forwarded-port"
        | b"x-forwarded-ssl" => Kind::Fact,
        b"fly-request-id" => Kind::RequestId,
        b"x-forwarded-for" => Kind::ForwardedFor,
        b"via" => Kind::Via,
        b"server" => Kind::Server,
        b"alt-svc" => Kind::AltSvc,
        _ => Kind::Passed,
    }
}

/// Whether a trailer of this name (in lower case) may be passed on: none that frames, routes or authenticates
/// (RFC 9110 section 6.5.1).
pub fn may_trail(name: &str) -> bool {
    let kind = kind(name.as_bytes());
    kind == Kind::Passed
        && !matches!(
            name,
            "authorization"
                | "set-cookie"
                | "trailer"
                | "content-type"
                | "content-encoding"
                | "content-range"
        )
}

/// What the `Connection` field takes for this hop alone.
struct Named<'a>(Vec<&'a [u8]>);

impl<'a> Named<'a> {
    fn new(fields: &'a Fields) -> Self {
        Self(fields.members("connection").collect())
    }

    fn has(&self, name: &[u8]) -> bool {
        self.0.iter().any(|n| n.eq_ignore_ascii_case(name))
    }
}

/// The fields of a request as its app is given them, without what says how long it is.
pub fn for_app(head: &RequestHead, facts: &Facts<'_>, put: &mut dyn FnMut(&[u8], &[u8])) {
    let named = Named::new(&head.fields);
    let (mut forwarded, mut vias, mut cookies) = (Vec::new(), Vec::new(), Vec::new());
    let join = |list: &mut Vec<u8>, separator: &[u8], value: &[u8]| {
        if !list.is_empty() && !value.is_empty() {
            list.extend_from_slice(separator);
        }
        list.extend_from_slice(value);
    };
    put(b"Host", &head.authority);
    for (name, value) in head.fields.iter() {
        match kind(name) {
            Kind::ThisHop | Kind::Fact | Kind::RequestId | Kind::ContentLength => {}
            // The app is asked to wait for nobody: see `Length` for who may have content to wait for.
            _ if name.eq_ignore_ascii_case(b"expect") && !head.expects_continue => {}
            Kind::ForwardedFor => join(&mut forwarded, b", ", value),
            Kind::Via => join(&mut vias, b", ", value),
            // HTTP/2 clients may send each cookie in a field of its own; apps get one (RFC 9113 section 8.2.3).
            Kind::Cookie => join(&mut cookies, b"; ", value),
            Kind::Passed | Kind::Server | Kind::AltSvc => {
                let kept = named.0.is_empty()
                    || !named.has(name)
                    || name.len() > 13 && name[..13].eq_ignore_ascii_case(b"sec-websocket");
                if kept {
                    put(name, value);
                }
            }
        }
    }
    if !cookies.is_empty() {
        put(b"Cookie", &cookies);
    }
    join(&mut forwarded, b", ", facts.client.as_bytes());
    join(&mut vias, b", ", via(facts.version));
    let mut digits = [0; 20];
    let port = h1::client::number(facts.entrance.port.into(), &mut digits);
    put(b"Fly-Client-IP", facts.client.as_bytes());
    put(b"Fly-Forwarded-Port", port);
    put(b"Fly-Region", facts.region.as_bytes());
    put(b"Fly-Request-Id", facts.request_id.as_bytes());
    put(b"X-Forwarded-For", &forwarded);
    put(b"X-Forwarded-Proto", facts.entrance.scheme().as_bytes());
    put(b"X-Forwarded-Port", port);
    put(
        b"X-Forwarded-SSL",
        if facts.entrance.tls { b"on" } else { b"off" },
    );
    put(b"Via", &vias);
}

/// The fields of a reply as its client is given them, without what frames it.
pub fn for_client(
    head: &ReplyHead,
    changes: &Changes,
    facts: &Facts<'_>,
    put: &mut dyn FnMut(&[u8], &[u8]),
) {
    let named = Named::new(&head.fields);
    let interim = head.status < 200;
    let ours = !changes.pristine && !interim;
    // What a reply without content says of one with it (to HEAD, or 304) is the app's to say.
    let says_length = head.length == Length::None && head.status >= 200 && head.status != 204;
    let mut vias = Vec::new();
    for (name, value) in head.fields.iter() {
        match kind(name) {
            Kind::ThisHop if !name.eq_ignore_ascii_case(b"host") => continue,
            Kind::ContentLength if !says_length => continue,
            Kind::Server | Kind::RequestId if ours => continue,
            Kind::AltSvc if ours && facts.alt_svc.is_some() => continue,
            Kind::Via if ours => {
                if !vias.is_empty() {
                    vias.extend_from_slice(b", ");
                }
                vias.extend_from_slice(value);
                continue;
            }
            _ => {}
        }
        if !(changes.names(name) && !interim || named.has(name)) {
            put(name, value);
        }
    }
    if ours {
        if !vias.is_empty() {
            vias.extend_from_slice(b", ");
        }
        vias.extend_from_slice(via(facts.version));
        let own: [(&[u8], &[u8]); 3] = [
            (b"via", &vias),
            (b"server", b"tern"),
            (b"fly-request-id", facts.request_id.as_bytes()),
        ];
        for (name, value) in own {
            if !changes.names(name) {
                put(name, value);
            }
        }
        if let Some(alt_svc) = facts.alt_svc {
            put(b"alt-svc", alt_svc.as_bytes());
        }
    }
    for (name, value) in changes.fields.iter().filter(|_| !interim) {
        if let Some(value) = value {
            put(name.as_str().as_bytes(), value.as_bytes());
        }
    }
}

fn via(version: Version) -> &'static [u8] {
    match version {
        Version::HTTP_10 => b"1.0 tern",
        Version::HTTP_2 => b"2 tern",
        Version::HTTP_3 => b"3 tern",
        _ => b"1.1 tern",
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::{HeaderMap, Method};

    use super::*;

    fn fields(pairs: &[(&'static str, &str)]) -> Fields {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, value.parse().unwrap());
        }
        Fields::Map(map)
    }

    fn facts(version: Version) -> Facts<'static> {
        Facts {
            client: "192.0.2.7",
            entrance: Entrance {
                port: 443,
                tls: true,
            },
            region: "ams",
            request_id: "id",
            version,
            alt_svc: None,
        }
    }

    fn given(pairs: &[(&'static str, &str)]) -> Vec<(String, String)> {
        let head = RequestHead {
            method: Method::GET,
            target: Bytes::from_static(b"/"),
            authority: Bytes::from_static(b"shop"),
            version: Version::HTTP_2,
            fields: fields(pairs),
            length: Length::None,
            upgrade: None,
            expects_continue: false,
        };
        let mut all = Vec::new();
        for_app(&head, &facts(Version::HTTP_2), &mut |n, v| {
            all.push(pair(n, v))
        });
        all
    }

    fn answered(
        pairs: &[(&'static str, &str)],
        options: Option<&ResponseOptions>,
    ) -> Vec<(String, String)> {
        let head = ReplyHead {
            status: 200,
            reason: Bytes::new(),
            version: Version::HTTP_11,
            fields: fields(pairs),
            length: Length::Exact(1),
        };
        let mut all = Vec::new();
        let changes = Changes::new(options);
        for_client(&head, &changes, &facts(Version::HTTP_11), &mut |n, v| {
            all.push(pair(n, v))
        });
        all
    }

    fn pair(name: &[u8], value: &[u8]) -> (String, String) {
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        (text(name).to_ascii_lowercase(), text(value))
    }

    /// All values of a name.
    fn of<'a>(all: &'a [(String, String)], name: &str) -> Vec<&'a str> {
        let named = all.iter().filter(|(n, _)| n == name);
        named.map(|(_, v)| v.as_str()).collect()
    }

    #[test]
    fn a_client_cannot_say_who_it_is() {
        let set = given(&[
            ("fly-client-ip", "10.0.0.1"),
            ("fly_client_ip", "10.0.0.2"),
            ("x-forwarded-for", "10.0.0.1"),
            ("x_forwarded_proto", "gopher"),
            ("fly-region", "moon"),
        ]);
        for (name, value) in [
            ("fly-client-ip", "192.0.2.7"),
            ("x-forwarded-for", "10.0.0.1, 192.0.2.7"),
            ("fly-region", "ams"),
            ("x-forwarded-proto", "https"),
            ("fly-forwarded-port", "443"),
            ("via", "2 tern"),
        ] {
            assert_eq!(of(&set, name), [value], "{name}");
        }
        assert!(set.iter().all(|(n, _)| !n.contains('_')), "{set:?}");
    }

    #[test]
    fn what_is_for_this_hop_ends_here() {
        let set = given(&[
            ("connection", "X-Mine, upgrade, close"),
            ("connection", "b@d"),
            ("x-mine", "1"),
            ("keep-alive", "1"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("content-length", "1"),
            ("expect", "100-continue"),
            ("x-other", "1"),
        ]);
        for name in [
            "connection",
            "x-mine",
            "keep-alive",
            "te",
            "transfer-encoding",
            "content-length",
            "expect",
        ] {
            assert!(of(&set, name).is_empty(), "{name}: {set:?}");
        }
        assert_eq!(of(&set, "x-other"), ["1"]);
    }

    #[test]
    fn cookies_become_one_line_in_their_order() {
        let set = given(&[("cookie", "a=1"), ("x", "y"), ("cookie", "session=2")]);
        assert_eq!(of(&set, "cookie"), ["a=1; session=2"]);
    }

    #[test]
    fn responses_are_changed_as_asked() {
        let options: ResponseOptions = serde_json::from_str(
            r#"{"headers": {"X-A": "1", "X-B": false, "X-C": ["1", "2"], "Server": "mine",
                "Transfer-Encoding": "chunked", "Content-Length": "9", "Connection": "close", "bad name": "x"}}"#,
        )
        .unwrap();
        let app = [
            ("x-a", "0"),
            ("x-b", "0"),
            ("server", "app"),
            ("via", "1.1 x"),
            ("etag", "\"e\""),
        ];
        let set = answered(&app, Some(&options));
        assert_eq!(
            (of(&set, "x-a"), of(&set, "x-c")),
            (vec!["1"], vec!["1, 2"])
        );
        for none in ["x-b", "transfer-encoding", "content-length", "connection"] {
            assert!(of(&set, none).is_empty(), "{none}");
        }
        assert_eq!(
            (of(&set, "server"), of(&set, "via")),
            (vec!["mine"], vec!["1.1 x, 1.1 tern"])
        );
        assert_eq!(
            (of(&set, "fly-request-id"), of(&set, "etag")),
            (vec!["id"], vec!["\"e\""])
        );
        let pristine = ResponseOptions {
            pristine: true,
            ..Default::default()
        };
        let set = answered(&[("server", "app")], Some(&pristine));
        assert_eq!(set, [("server".to_owned(), "app".to_owned())]);
    }
}
