//! Requests over HTTP/2 that keep to no rule, by Debian's python3-h2: what reaches the app is one well-formed
//! request, or none.

use std::process::Output;
use std::time::Duration;

use tern_edge::Limits;
use tokio::process::Command;

use crate::app::{App, Temper};
use crate::client::plain;
use crate::h2_client::H2;
use crate::world::{World, piped};

/// What came back.
async fn hostile(world: &World, case: &str) -> String {
    // The system's: no other has Debian's modules.
    let mut command = Command::new("/usr/bin/python3");
    command
        .arg(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/peers/h2_hostile.py"
        ))
        .arg(world.ca())
        .args([&world.https.port().to_string(), case]);
    let Output {
        status,
        stdout,
        stderr,
    } = piped(command, b"").await;
    let errors = String::from_utf8_lossy(&stderr);
    assert!(
        status.success(),
        "{case}: {errors}\nIs python3-h2 there? Run .ci/setup test"
    );
    String::from_utf8(stdout).unwrap()
}

const RESET: &str = "reset 1 PROTOCOL_ERROR";
const GOAWAY: &str = "goaway PROTOCOL_ERROR;closed";
const CALM: &str = "goaway ENHANCE_YOUR_CALM;closed";
const OK: &str = "headers 1 200;data 1 10;end 1";

/// What each is answered. Only those with [`OK`] are requests.
const ANSWERS: &[(&str, &str)] = &[
    ("length-short", RESET),
    ("length-long", RESET),
    ("length-long-later", RESET),
    ("length-of-none", RESET),
    ("length-plus", RESET),
    ("length-list", RESET),
    ("length-twice", RESET),
    ("length-huge", RESET),
    ("connection", RESET),
    ("transfer-encoding", RESET),
    ("upgrade", RESET),
    ("keep-alive", RESET),
    ("proxy-connection", RESET),
    ("te", RESET),
    ("uppercase", GOAWAY),
    ("name-space", GOAWAY),
    ("name-colon", GOAWAY),
    ("name-crlf", GOAWAY),
    ("name-empty", GOAWAY),
    ("value-crlf", GOAWAY),
    ("value-lf", GOAWAY),
    ("value-cr", GOAWAY),
    ("value-nul", GOAWAY),
    ("cookie-crlf", GOAWAY),
    ("path-space", RESET),
    ("path-crlf", RESET),
    ("path-tab", RESET),
    ("path-del", RESET),
    ("path-nul", RESET),
    ("path-empty", RESET),
    ("path-none", RESET),
    ("path-relative", RESET),
    ("path-star", RESET),
    ("path-star-get", OK),
    ("path-absolute", RESET),
    ("path-double", OK),
    ("method-space", GOAWAY),
    ("method-empty", GOAWAY),
    ("method-none", RESET),
    ("scheme-none", RESET),
    ("scheme-bad", RESET),
    ("authority-space", RESET),
    ("authority-crlf", RESET),
    ("authority-user", "headers 1 400;"),
    ("authority-path", RESET),
    ("authority-none", "headers 1 400;"),
    ("host-other", "headers 1 400;"),
    ("host-twice", "headers 1 400;"),
    ("pseudo-late", RESET),
    ("pseudo-twice", RESET),
    ("pseudo-unknown", GOAWAY),
    ("pseudo-status", RESET),
    ("connect", "headers 1 405;"),
    ("protocol-get", RESET),
    ("protocol-crlf", "headers 1 400;"),
    ("protocol-smuggles", "headers 1 400;"),
    ("protocol-h2c", "headers 1 400;"),
    ("long-path", "headers 1 414;"),
    ("trailers-pseudo", OK),
    ("trailers-framing", OK),
    ("trailers-crlf", GOAWAY),
    ("data-after-end", GOAWAY),
    ("data-before-headers", GOAWAY),
    ("even-stream", GOAWAY),
    ("padding-too-long", GOAWAY),
    ("settings-on-stream", GOAWAY),
    ("window-overflow", "reset 1 FLOW_CONTROL_ERROR"),
    ("push", GOAWAY),
    ("bad-hpack", GOAWAY),
    ("hpack-bomb", CALM),
    ("rapid-reset", CALM),
    ("continuation-flood", CALM),
    ("continuation-empty-flood", CALM),
    ("ping-flood", "blocked"),
    ("settings-flood", "blocked"),
    ("empty-data-flood", "closed"),
];

/// Whoever comes next is answered.
async fn next_is_unharmed(world: &World) {
    let mut next = plain(world).await;
    next.get("/", "next", "").await;
    next.answer().await.is_for("next");
    H2::new(world).await.get("/", "next").await.is_for("next");
}

/// A share of the cases, each followed by somebody who keeps to the rules.
async fn every_third(from: usize) {
    let app = App::new(Temper::Strict).await;
    let world = World::new(app.port).await;
    let mut beside = plain(&world).await;
    let mut wrong = Vec::new();
    let mut requests = 0;
    for (case, wanted) in ANSWERS.iter().skip(from).step_by(3) {
        let said = hostile(&world, case).await.trim_end().replace('\n', ";");
        let as_wanted = if wanted.ends_with(';') {
            said.starts_with(wanted)
        } else {
            said == *wanted
        };
        if !as_wanted {
            wrong.push(format!("{case}: {said}"));
        }
        beside.get("/", "beside", "").await;
        beside.answer().await.is_for("beside");
        next_is_unharmed(&world).await;
        let (whole, _) = app.judged();
        let bad: Vec<_> = whole
            .iter()
            .filter(|got| got.one("x-nonce") == Some("bad"))
            .collect();
        requests += usize::from(*wanted == OK);
        if bad.len() != requests {
            wrong.push(format!("{case}: a request reached the app: {bad:?}"));
            requests = bad.len();
        }
        let smuggled = whole.iter().any(|got| {
            let trailing = |name: &str| {
                got.trailers
                    .iter()
                    .any(|(n, _)| n.eq_ignore_ascii_case(name))
            };
            got.path() == "/smuggled"
                || got.one("x-injected").is_some()
                || ["content-length", "host", "x-forwarded-for"]
                    .into_iter()
                    .any(trailing)
        });
        assert!(!smuggled, "{case}: {whole:?}");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn what_keeps_to_no_rule_is_one_request_or_none_1() {
    every_third(0).await;
}

#[tokio::test]
async fn what_keeps_to_no_rule_is_one_request_or_none_2() {
    every_third(1).await;
}

#[tokio::test]
async fn what_keeps_to_no_rule_is_one_request_or_none_3() {
    every_third(2).await;
}

/// It holds a place for no longer than the idle limit, and keeps nobody else from theirs.
#[tokio::test]
async fn a_reader_without_a_window_is_given_up() {
    let limits = Limits {
        idle: Duration::from_secs(1),
        ..Limits::default()
    };
    let app = App::new(Temper::Lenient).await;
    let world = World::limited(app.port, limits).await;
    let (said, ()) = tokio::join!(hostile(&world, "window-zero"), async {
        app.until_it_has("/big").await;
        next_is_unharmed(&world).await;
    });
    assert_eq!(said, "headers 1 200\nreset 1 INTERNAL_ERROR\n");
    app.until_closed(1).await;
}
