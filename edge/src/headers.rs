//! Headers that tell an app who called, and a caller who answered. No I/O.
//!
//! What the edge states as fact (`Fly-Client-IP` and its like) replaces whatever a client sent under that
//! name. `X-Forwarded-For` is appended to, as proxies do (RFC 7239 section 7.4 on its predecessors).

use std::net::IpAddr;

use http::header::HeaderName;
use http::{HeaderMap, HeaderValue, Version};
use tern_catalog::ResponseOptions;

use crate::route::Entrance;

/// Largest head of a request, names and values together; nginx allows 32 KiB, hyper some 400.
pub const MAX_HEAD_BYTES: usize = 64 << 10;

const CLIENT_IP: HeaderName = HeaderName::from_static("fly-client-ip");
const FORWARDED_PORT: HeaderName = HeaderName::from_static("fly-forwarded-port");
const REGION: HeaderName = HeaderName::from_static("fly-region");
/// Tells a request in logs and replies.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("fly-request-id");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const X_FORWARDED_SSL: HeaderName = HeaderName::from_static("x-forwarded-ssl");
const VIA: HeaderName = http::header::VIA;

/// What is wrong with a request's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadHead {
    /// Larger than [`MAX_HEAD_BYTES`].
    TooLarge,
    /// Its length is told in two ways, or its host: whoever reads it differently can be fooled
    /// (request smuggling, RFC 9112 section 11.2).
    Ambiguous,
}

/// Refuses heads that are too large or can be read in two ways.
pub fn check(uri_bytes: usize, headers: &HeaderMap) -> Result<(), BadHead> {
    let total = headers
        .iter()
        .map(|(n, v)| n.as_str().len() + v.len() + 4)
        .sum::<usize>()
        + uri_bytes;
    if total > MAX_HEAD_BYTES {
        return Err(BadHead::TooLarge);
    }
    let count = |name: HeaderName| headers.get_all(name).iter().count();
    let (length, encoding) = (
        count(http::header::CONTENT_LENGTH),
        count(http::header::TRANSFER_ENCODING),
    );
    if (length > 0 && encoding > 0) || length > 1 || encoding > 1 || count(http::header::HOST) > 1 {
        return Err(BadHead::Ambiguous);
    }
    Ok(())
}

/// The headers that a client's `Connection` header takes for this hop alone (RFC 9110 section 7.6.1). What
/// asks for an upgrade goes on to the app; what ends here does not.
pub fn of_this_hop(given: &HeaderMap) -> Vec<HeaderName> {
    let all = given
        .get_all(http::header::CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok());
    let named = all
        .flat_map(|v| v.split(','))
        .filter_map(|n| n.trim().parse::<HeaderName>().ok());
    let kept = [
        http::header::UPGRADE,
        http::header::CONNECTION,
        http::header::HOST,
    ];
    named
        .filter(|n| !kept.contains(n) && !n.as_str().starts_with("sec-websocket"))
        .collect()
}

/// The headers to set on a request for an app; each replaces all of its name.
pub fn for_app(
    given: &HeaderMap,
    client: Option<IpAddr>,
    entrance: Entrance,
    region: &str,
    version: Version,
    request_id: &str,
) -> Vec<(HeaderName, HeaderValue)> {
    // An IPv4 client of a dual-stack listener is known by its IPv4 address.
    let client = client
        .map(|ip| ip.to_canonical().to_string())
        .unwrap_or_default();
    let list = |name: &HeaderName, last: &str| {
        let before = given.get_all(name).iter().filter_map(|v| v.to_str().ok());
        let all: Vec<&str> = before.chain([last]).filter(|v| !v.is_empty()).collect();
        all.join(", ")
    };
    let port = entrance.port().to_string();
    let ssl = if entrance == Entrance::Https {
        "on"
    } else {
        "off"
    };
    let set = [
        (CLIENT_IP, client.clone()),
        (FORWARDED_PORT, port.clone()),
        (REGION, region.to_owned()),
        (REQUEST_ID, request_id.to_owned()),
        (X_FORWARDED_FOR, list(&X_FORWARDED_FOR, &client)),
        (X_FORWARDED_PROTO, entrance.scheme().to_owned()),
        (X_FORWARDED_PORT, port),
        (X_FORWARDED_SSL, ssl.to_owned()),
        (VIA, list(&VIA, &via(version))),
    ];
    set.into_iter()
        .filter_map(|(name, value)| Some((name, HeaderValue::from_str(&value).ok()?)))
        .collect()
}

/// What to do to a response: a value to set, or none to remove the header.
pub fn for_client(
    given: &HeaderMap,
    options: Option<&ResponseOptions>,
    version: Version,
    request_id: &str,
) -> Vec<(HeaderName, Option<HeaderValue>)> {
    let mut changes = Vec::new();
    if !options.is_some_and(|o| o.pristine) {
        let before = given.get_all(VIA).iter().filter_map(|v| v.to_str().ok());
        let vias: Vec<String> = before.map(str::to_owned).chain([via(version)]).collect();
        changes.push((VIA, HeaderValue::from_str(&vias.join(", ")).ok()));
        changes.push((http::header::SERVER, Some(HeaderValue::from_static("tern"))));
        changes.push((REQUEST_ID, HeaderValue::from_str(request_id).ok()));
    }
    for (name, value) in options.map(|o| o.headers.iter()).into_iter().flatten() {
        let Ok(name) = name.parse::<HeaderName>() else {
            continue;
        };
        let value = match value {
            serde_json::Value::Bool(false) => None,
            serde_json::Value::String(text) => HeaderValue::from_str(text).ok(),
            serde_json::Value::Array(all) => {
                let texts: Vec<&str> = all.iter().filter_map(|v| v.as_str()).collect();
                HeaderValue::from_str(&texts.join(", ")).ok()
            }
            _ => continue,
        };
        changes.push((name, value));
    }
    changes
}

fn via(version: Version) -> String {
    let number = match version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        Version::HTTP_3 => "3",
        _ => "1.1",
    };
    format!("{number} tern")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, value.parse().unwrap());
        }
        map
    }

    #[test]
    fn a_client_cannot_say_who_it_is() {
        let given = map(&[
            ("fly-client-ip", "10.0.0.1"),
            ("x-forwarded-for", "10.0.0.1"),
            ("fly-region", "moon"),
        ]);
        let client = "::ffff:192.0.2.7".parse().ok();
        let set = for_app(
            &given,
            client,
            Entrance::Https,
            "ams",
            Version::HTTP_2,
            "id",
        );
        let value = |name: &str| {
            set.iter()
                .find(|(n, _)| n == name)
                .unwrap()
                .1
                .to_str()
                .unwrap()
                .to_owned()
        };
        assert_eq!(value("fly-client-ip"), "192.0.2.7");
        assert_eq!(value("x-forwarded-for"), "10.0.0.1, 192.0.2.7");
        assert_eq!(
            (value("fly-region"), value("x-forwarded-proto")),
            ("ams".into(), "https".into())
        );
        assert_eq!(
            (value("fly-forwarded-port"), value("via")),
            ("443".into(), "2 tern".into())
        );
    }

    #[test]
    fn what_is_for_this_hop_ends_here() {
        let given = map(&[
            ("connection", "X-Mine, upgrade, close"),
            ("connection", "fly-client-ip, b@d"),
        ]);
        let named = of_this_hop(&given);
        let names: Vec<&str> = named.iter().map(HeaderName::as_str).collect();
        assert_eq!(names, ["x-mine", "close", "fly-client-ip"]);
    }

    #[test]
    fn ambiguous_and_oversized_heads_are_refused() {
        assert_eq!(
            check(1, &map(&[("host", "a"), ("content-length", "1")])),
            Ok(())
        );
        for bad in [
            &[("content-length", "1"), ("transfer-encoding", "chunked")][..],
            &[("content-length", "1"), ("content-length", "2")],
            &[("host", "a"), ("host", "b")],
        ] {
            assert_eq!(check(1, &map(bad)), Err(BadHead::Ambiguous));
        }
        let huge = "a".repeat(MAX_HEAD_BYTES);
        assert_eq!(check(1, &map(&[("x", &huge)])), Err(BadHead::TooLarge));
        assert_eq!(
            check(MAX_HEAD_BYTES + 1, &HeaderMap::new()),
            Err(BadHead::TooLarge)
        );
    }

    #[test]
    fn responses_are_changed_as_asked() {
        let options: ResponseOptions = serde_json::from_str(
            r#"{"headers": {"X-A": "1", "X-B": false, "X-C": ["1", "2"], "bad name": "x"}}"#,
        )
        .unwrap();
        let changes = for_client(&HeaderMap::new(), Some(&options), Version::HTTP_11, "id");
        let find = |name: &str| {
            changes
                .iter()
                .find(|(n, _)| n == name)
                .map(|(_, v)| v.clone())
        };
        assert_eq!(find("x-a"), Some(Some("1".parse().unwrap())));
        assert_eq!(
            (find("x-b"), find("x-c")),
            (Some(None), Some(Some("1, 2".parse().unwrap())))
        );
        assert!(find("fly-request-id").is_some());
        let pristine = ResponseOptions {
            pristine: true,
            ..Default::default()
        };
        assert!(for_client(&HeaderMap::new(), Some(&pristine), Version::HTTP_11, "id").is_empty());
    }
}
