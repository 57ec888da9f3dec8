//! What reaches an app, and what does not.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tern_catalog::{AcmeChallenge, ChallengeKind};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::world::{HOST, World};

const NEVER: Duration = Duration::from_secs(3600);

async fn raw(world: &World, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(world.http).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut reply = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut reply)).await;
    String::from_utf8_lossy(&reply).into_owned()
}

#[tokio::test]
async fn http_1_and_2_reach_the_app_and_come_back() {
    let world = World::new("", NEVER).await;
    for (version, first) in [("--http1.1", "HTTP/1.1 200"), ("--http2", "HTTP/2 200")] {
        let reply = world
            .text(
                "/a?b=c",
                &[
                    version,
                    "-H",
                    "Fly-Client-IP: 10.9.8.7",
                    "-H",
                    "X-Mine: kept",
                ],
            )
            .await;
        assert!(reply.starts_with(first), "{reply}");
        assert!(reply.contains("GET /a?b=c"), "{reply}");
        assert!(reply.contains("got-fly-client-ip: 127.0.0.1"), "{reply}");
        assert!(
            reply.contains("got-x-forwarded-proto: https") && reply.contains("got-fly-region: ams"),
            "{reply}"
        );
        assert!(
            reply.contains("got-x-mine: kept") && reply.contains(&format!("got-host: {HOST}")),
            "{reply}"
        );
        let lower = reply.to_lowercase();
        assert!(
            lower.contains("fly-request-id: ") && lower.contains(" tern"),
            "{reply}"
        );
    }
}

#[tokio::test]
async fn a_body_of_some_megabytes_passes_both_ways() {
    let world = World::new("", NEVER).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let body: Vec<u8> = (0..3 << 20).map(|_| rand::random::<u8>()).collect();
    std::fs::write(file.path(), &body).unwrap();
    let data = format!("@{}", file.path().display());
    for version in ["--http1.1", "--http2"] {
        let reply = world
            .curl("/echo", &[version, "--no-include", "--data-binary", &data])
            .await;
        assert!(reply.status.success(), "{version}: {reply:?}");
        assert!(
            reply.stdout == body,
            "{version}: {} bytes",
            reply.stdout.len()
        );
    }
}

#[tokio::test]
async fn unknown_hosts_get_404_and_wake_nothing() {
    let world = World::new("", NEVER).await;
    for host in [
        "nobody.example",
        "tern.test",
        "127.0.0.1",
        "[::1]",
        "..",
        "",
    ] {
        let reply = raw(
            &world,
            format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").as_bytes(),
        )
        .await;
        assert!(
            reply.starts_with("HTTP/1.1 404") || reply.starts_with("HTTP/1.1 400"),
            "{host}: {reply}"
        );
    }
    assert_eq!(world.agent.starts.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn an_app_that_asks_for_it_is_redirected_to_https() {
    let world = World::new("", NEVER).await;
    let machine = world
        .view
        .snapshot()
        .machines
        .values()
        .next()
        .unwrap()
        .as_ref()
        .clone();
    let mut changed = machine.clone();
    changed.config.services[0].ports[0].force_https = true;
    world.catalog.put(&changed).await.unwrap();
    world
        .view
        .wait_for(|s| (**s.machines.get(&machine.id)? == changed).then_some(()))
        .await;
    let reply = world.curl_to(&world.plain("/a?b=c"), &[]).await;
    let reply = String::from_utf8_lossy(&reply.stdout).to_lowercase();
    assert!(
        reply.starts_with("http/1.1 301")
            && reply.contains(&format!("location: https://{HOST}/a?b=c")),
        "{reply}"
    );
    assert_eq!(world.agent.starts.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn http_01_challenges_are_answered_from_the_catalog() {
    let world = World::new("", NEVER).await;
    let challenge = AcmeChallenge {
        hostname: HOST.parse().unwrap(),
        kind: ChallengeKind::Http01,
        token: "tok".into(),
        key_authorization: "tok.thumb".into(),
    };
    world.catalog.create(&challenge).await.unwrap();
    world
        .view
        .wait_for(|s| (!s.challenges.is_empty()).then_some(()))
        .await;
    let path = world.plain("/.well-known/acme-challenge/tok");
    let reply = String::from_utf8_lossy(&world.curl_to(&path, &[]).await.stdout).into_owned();
    assert!(
        reply.starts_with("HTTP/1.1 200") && reply.ends_with("tok.thumb"),
        "{reply}"
    );
    let other = world.plain("/.well-known/acme-challenge/other");
    assert!(
        String::from_utf8_lossy(&world.curl_to(&other, &[]).await.stdout)
            .starts_with("HTTP/1.1 404")
    );
    assert_eq!(world.agent.starts.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn heads_that_are_too_large_or_ambiguous_are_refused() {
    let world = World::new("", NEVER).await;
    let huge = "a".repeat(100_000);
    let reply = raw(
        &world,
        format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nX: {huge}\r\n\r\n").as_bytes(),
    )
    .await;
    assert!(reply.starts_with("HTTP/1.1 431"), "{reply:.200}");
    for head in [
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Host: other.example\r\n",
    ] {
        let bytes = format!(
            "POST / HTTP/1.1\r\nHost: {HOST}\r\n{head}\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: {HOST}\r\n\r\n"
        );
        let reply = raw(&world, bytes.as_bytes()).await;
        assert!(reply.starts_with("HTTP/1.1 400"), "{head}: {reply}");
        assert!(!reply.contains("smuggled"), "{head}: {reply}");
    }
    // Both at once: the encoding counts, and the app is told of no other length (RFC 9112 section 6.3).
    let both = format!(
        "POST / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n"
    );
    let reply = raw(&world, both.as_bytes()).await;
    assert!(!reply.contains("got-content-length"), "{reply}");
    let h2 = world
        .curl("/", &["--http2", "-H", &format!("X: {huge}")])
        .await;
    assert!(!String::from_utf8_lossy(&h2.stdout).contains("HTTP/2 200"));
    assert!(
        world.text("/", &[]).await.starts_with("HTTP/2 200"),
        "the edge goes on"
    );
}

#[tokio::test]
async fn garbage_is_no_request() {
    let world = World::new("", NEVER).await;
    for garbage in [
        &b"\x16\x03\x01\x02\x00\x01\x00"[..],
        b"\0\0\0\0",
        b"GET\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\r\n\r\n\r\n",
    ] {
        let reply = raw(&world, garbage).await;
        assert!(!reply.contains(" 200 "), "{reply}");
    }
    assert!(world.text("/", &[]).await.starts_with("HTTP/2 200"));
}

#[tokio::test]
async fn requests_under_way_are_finished_when_it_ends() {
    let world = World::new("", NEVER).await;
    assert!(world.text("/", &[]).await.starts_with("HTTP/2 200"));
    let url = world.plain("/slow/800");
    let World {
        edge, http, agent, ..
    } = world;
    let mut stream = TcpStream::connect(http).await.unwrap();
    let path = url.split_once(&http.port().to_string()).unwrap().1;
    let head = format!("GET {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    while edge.metrics().connections.get() < 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let ended = tokio::spawn(edge.drain(Duration::from_secs(20)));
    let mut reply = vec![0; 12];
    stream.read_exact(&mut reply).await.unwrap();
    assert_eq!(&reply, b"HTTP/1.1 200");
    drop(stream);
    ended.await.unwrap();
    assert!(TcpStream::connect(http).await.is_err());
    drop(agent);
}

#[tokio::test]
async fn each_request_is_written_down_and_counted_for_its_app() {
    let world = World::new("", NEVER).await;
    let trace = "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let data = ["--http2", "-A", "me", "-H", trace, "--data-binary", "12345"];
    let reply = world.text("/echo?a=b", &data).await;
    assert!(reply.contains("12345"), "{reply}");
    raw(
        &world,
        b"GET /none HTTP/1.1\r\nHost: nobody.test\r\nConnection: close\r\n\r\n",
    )
    .await;
    let lines = world.access_log(2).await;
    let line = &lines[0];
    for (field, value) in [
        ("app", "shop"),
        ("host", &format!("{HOST}:{}", world.https.port())),
        ("method", "POST"),
        ("path", "/echo?a=b"),
        ("protocol", "HTTP/2"),
        ("client", "127.0.0.1"),
        ("user_agent", "me"),
        ("trace_id", "4bf92f3577b34da6a3ce929d0e0e4736"),
    ] {
        assert_eq!(line[field], value, "{field}: {line}");
    }
    for (field, value) in [("status", 200), ("port", 443), ("received", 5), ("sent", 5)] {
        assert_eq!(line[field], value, "{field}: {line}");
    }
    assert_eq!((&line["tls"], &line["whole"]), (&true.into(), &true.into()));
    assert_eq!(line["request_id"].as_str().unwrap().len(), 26);
    assert_eq!(line["machine"].as_str().unwrap().len(), 14);
    // It waited for the Machine's start, and was answered after that.
    let millis = |field: &str| line[field].as_f64().unwrap();
    assert!(millis("waited_ms") >= 150.0 && millis("duration_ms") >= millis("waited_ms"));
    let last = lines.last().unwrap();
    assert_eq!((&last["status"], last.get("app")), (&404.into(), None));
    // Counted where it went to an app.
    let apps = world.edge.metrics().apps(|_| true);
    let (app, counts) = &apps[0];
    assert_eq!((apps.len(), app.as_str()), (1, "shop"));
    assert_eq!(counts.classes()[2], ("2xx", lines.len() as u64 - 1));
    assert_eq!(counts.received.get(), 5);
    assert_eq!(world.edge.metrics().wake_durations.get().1, 1);
}
