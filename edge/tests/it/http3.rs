//! HTTP/3, as clients see it that no one here wrote: aioquic and Chromium.

use std::process::Output;
use std::time::Duration;

use serde_json::{Value, json};

use crate::world::{HOST, World};

const NEVER: Duration = Duration::from_secs(3600);
/// Where `.ci/setup test` installs it.
const PYTHON: &str = "/var/lib/tern-setup/aioquic/bin/python";
const NEEDED: &str = "is needed: .ci/setup test";

/// All requests at once on one connection.
async fn ask(world: &World, requests: &[Value]) -> Vec<Value> {
    let output = client(world, requests).await;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text.lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect()
}

async fn client(world: &World, requests: &[Value]) -> Output {
    tokio::process::Command::new(PYTHON)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/http3.py"))
        .arg(world.certificate())
        .args([HOST, &world.https.port().to_string()])
        .args(requests.iter().map(Value::to_string))
        .output()
        .await
        .unwrap_or_else(|_| panic!("aioquic {NEEDED}"))
}

#[tokio::test]
async fn many_requests_share_one_connection_and_wake_one_machine() {
    let world = World::new("", NEVER).await;
    let requests: Vec<Value> = (0..20)
        .map(|n| json!({"path": format!("/n{n}?x=y"), "headers": {"cookie": "a=1", "x-mine": "kept"}}))
        .collect();
    let replies = ask(&world, &requests).await;
    assert_eq!(replies.len(), 20);
    for (n, reply) in replies.iter().enumerate() {
        assert_eq!(reply["status"], 200, "{reply}");
        let body = reply["body"].as_str().unwrap();
        for line in [
            &format!("GET /n{n}?x=y\n"),
            "got-x-mine: kept",
            "got-via: 3 tern",
            "got-x-forwarded-proto: https",
            "got-fly-client-ip: 127.0.0.1",
        ] {
            assert!(body.contains(line), "{line}: {body}");
        }
        assert!(!body.contains("transfer-encoding"), "{body}");
        assert!(
            reply["headers"]["via"]
                .as_str()
                .unwrap()
                .ends_with("3 tern"),
            "{reply}"
        );
    }
    assert_eq!(
        world.agent.starts.load(std::sync::atomic::Ordering::SeqCst),
        1
    );
}

#[tokio::test]
async fn content_passes_both_ways_whole() {
    let world = World::new("", NEVER).await;
    let size = 3 << 20;
    let sent: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
    let post = json!({"method": "POST", "path": "/echo", "size": size});
    let empty = json!({"method": "POST", "path": "/echo", "size": 0});
    let replies = ask(&world, &[post.clone(), empty, post]).await;
    for reply in [&replies[0], &replies[2]] {
        assert_eq!(
            (&reply["status"], &reply["length"]),
            (&json!(200), &json!(size)),
            "{reply}"
        );
        use sha2::Digest as _;
        assert_eq!(reply["sha256"], hex::encode(sha2::Sha256::digest(&sent)));
    }
    assert_eq!(
        (&replies[1]["status"], &replies[1]["length"]),
        (&json!(200), &json!(0))
    );
}

/// Some clients give a reply up when they are told to stop sending with a code of 0 (hyperium/h3#321).
#[tokio::test]
async fn a_reply_that_comes_before_the_contents_end_is_whole() {
    let world = World::new("", NEVER).await;
    let early = json!({"method": "POST", "path": "/early", "size": 1000, "pause": true});
    let reply = &ask(&world, &[early]).await[0];
    assert_eq!(
        (&reply["status"], &reply["body"]),
        (&json!(200), &json!("early")),
        "{reply}"
    );
    assert_eq!(
        (&reply["reset"], &reply["stopped"]),
        (&Value::Null, &Value::Null),
        "{reply}"
    );
}

/// `h3` does not count: an app would take what is too much for its next request, and what is too little from it.
#[tokio::test]
async fn content_is_as_long_as_its_head_says() {
    let world = World::new("", NEVER).await;
    let post = |told: &str, size: usize| json!({"method": "POST", "path": "/echo", "headers": {"content-length": told}, "size": size});
    for (told, size, status) in [
        ("5", 5, 200),
        ("5", 1000, 400),
        ("1000", 5, 400),
        ("5", 0, 400),
    ] {
        let reply = &ask(&world, &[post(told, size)]).await[0];
        assert_eq!(reply["status"], status, "{told} told, {size} sent: {reply}");
        // What the next client is answered is its own.
        let next = &ask(&world, &[json!({"path": "/next"})]).await[0];
        assert!(
            next["body"].as_str().unwrap().starts_with("GET /next\n"),
            "{next}"
        );
    }
}

#[tokio::test]
async fn what_no_app_should_see_is_answered_by_the_edge() {
    let world = World::new("", NEVER).await;
    let many: serde_json::Map<String, Value> =
        (0..300).map(|n| (format!("x-{n}"), json!("y"))).collect();
    let replies = ask(
        &world,
        &[
            json!({"headers": many}),
            json!({"headers": {"host": "other.example"}}),
            json!({"path": "/ok"}),
        ],
    )
    .await;
    let statuses: Vec<u64> = replies
        .iter()
        .map(|r| r["status"].as_u64().unwrap())
        .collect();
    // One that contradicts itself is reset by `h3` (H3_MESSAGE_ERROR).
    assert_eq!(statuses, [431, 0, 200]);
    assert_eq!(replies[1]["reset"], 0x10e, "{}", replies[1]);
}

#[tokio::test]
async fn replies_over_tls_say_where_http_3_is() {
    let world = World::new("", NEVER).await;
    let told = format!("alt-svc: h3=\":{}\"; ma=86400", world.https.port());
    for version in ["--http1.1", "--http2"] {
        let reply = world.text("/", &[version]).await.to_lowercase();
        assert!(reply.contains(&told), "{reply}");
    }
    let plain = world.curl_to(&world.plain("/"), &[]).await;
    assert!(!String::from_utf8_lossy(&plain.stdout).contains("alt-svc"));
    let http3 = &ask(&world, &[json!({})]).await[0];
    assert_eq!(http3["headers"].get("alt-svc"), None, "{http3}");
}

#[tokio::test]
async fn chromium_loads_a_page_by_http_3() {
    let world = World::new("", NEVER).await;
    let home = tempfile::tempdir().unwrap();
    let port = world.https.port();
    let output = tokio::process::Command::new("chromium")
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-sync",
        ])
        .args([
            "--disable-background-networking",
            "--disable-component-update",
            "--virtual-time-budget=30000",
        ])
        .arg(format!("--user-data-dir={}", home.path().display()))
        .arg(format!("--host-resolver-rules=MAP {HOST} 127.0.0.1"))
        .arg(format!("--origin-to-force-quic-on={HOST}:{port}"))
        .arg(format!(
            "--ignore-certificate-errors-spki-list={}",
            world.spki()
        ))
        .args([
            "--dump-dom",
            &format!("https://{HOST}:{port}/from-a-browser"),
        ])
        .output()
        .await
        .unwrap_or_else(|_| panic!("chromium {NEEDED}"));
    let page = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        page.contains("GET /from-a-browser") && page.contains("got-via: 3 tern"),
        "{page}\n{errors}"
    );
}
