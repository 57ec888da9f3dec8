//! Sleeping and waking.

use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::future::join_all;
use rustls::pki_types::pem::PemObject as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::world::{HOST, WAKE_TIMEOUT, World};

const NEVER: Duration = Duration::from_secs(3600);

/// Does it, unless it takes so long that something else went wrong: the assertion that follows tells what.
async fn in_time(what: impl Future<Output = ()>) {
    let _ = tokio::time::timeout(Duration::from_secs(40), what).await;
}

/// One plain request on a connection of its own.
async fn request(world: &World, path: &str) -> String {
    let mut stream = TcpStream::connect(world.http).await.unwrap();
    let head = format!("GET {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await.unwrap();
    reply
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_requests_at_once_cause_one_start() {
    let world = World::new(r#""concurrency": {"soft_limit": 2000},"#, NEVER).await;
    let replies = join_all((0..1000).map(|_| request(&world, "/many")))
        .await
        .into_iter()
        .collect::<Vec<_>>();
    let good = replies
        .iter()
        .filter(|r| r.starts_with("HTTP/1.1 200"))
        .count();
    assert_eq!(
        good,
        1000,
        "{:?}",
        replies.iter().find(|r| !r.starts_with("HTTP/1.1 200"))
    );
    assert_eq!(world.agent.starts.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_app_that_listens_on_ipv4_alone_is_found() {
    let world = World::new("", NEVER).await;
    world.agent.on_ipv4.store(true, Ordering::SeqCst);
    for path in ["/first", "/second"] {
        let reply = request(&world, path).await;
        assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    }
    assert_eq!(world.agent.starts.load(Ordering::SeqCst), 1);
    // After a crash it may be another.
    world.agent.crash().await;
    world.agent.on_ipv4.store(false, Ordering::SeqCst);
    let reply = request(&world, "/third").await;
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    assert_eq!(world.agent.starts.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn an_app_that_accepts_is_not_kept_waiting_for_its_hosts_word() {
    let world = World::new("", NEVER).await;
    world.agent.early.store(true, Ordering::SeqCst);
    for path in ["/first", "/second"] {
        let reply = request(&world, path).await;
        assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    }
    assert_eq!(world.agent.starts.load(Ordering::SeqCst), 1);
    // One that fails is told of all the same, and the next is waited for.
    world.agent.crash().await;
    world.agent.broken.store(true, Ordering::SeqCst);
    let begun = std::time::Instant::now();
    let reply = request(&world, "/third").await;
    assert!(reply.starts_with("HTTP/1.1 503"), "{reply}");
    let waited = begun.elapsed();
    assert!(waited < WAKE_TIMEOUT / 2, "{waited:?}: not by its own word");
    world.agent.broken.store(false, Ordering::SeqCst);
    let reply = request(&world, "/fourth").await;
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
}

#[tokio::test]
async fn a_hard_limit_makes_requests_wait_their_turn() {
    let world = World::new(
        r#""concurrency": {"soft_limit": 1, "hard_limit": 2},"#,
        NEVER,
    )
    .await;
    let begun = std::time::Instant::now();
    let replies = join_all((0..6).map(|_| request(&world, "/slow/100"))).await;
    assert!(
        replies.iter().all(|r| r.starts_with("HTTP/1.1 200")),
        "{replies:?}"
    );
    // Two at a time: at least three turns of 100 ms.
    assert!(begun.elapsed() >= Duration::from_millis(300));
}

#[tokio::test]
async fn an_idle_machine_sleeps_and_the_next_request_wakes_it() {
    let world = World::new(r#""autostop": "suspend","#, Duration::from_millis(300)).await;
    for round in 1..=3 {
        assert!(request(&world, "/").await.starts_with("HTTP/1.1 200"));
        assert_eq!(world.agent.starts.load(Ordering::SeqCst), round);
        let asleep = async {
            while world.agent.sleeps.load(Ordering::SeqCst) < round {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), asleep)
            .await
            .expect("it falls asleep");
    }
}

#[tokio::test]
async fn a_machine_with_a_request_does_not_sleep() {
    let world = World::new(r#""autostop": "suspend","#, Duration::from_millis(200)).await;
    assert!(
        request(&world, "/slow/1500")
            .await
            .starts_with("HTTP/1.1 200")
    );
    assert_eq!(world.agent.sleeps.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_machine_that_somebody_else_uses_does_not_sleep() {
    let world = World::new(r#""autostop": "suspend","#, Duration::from_millis(300)).await;
    world.agent.in_use.store(true, Ordering::SeqCst);
    assert!(request(&world, "/").await.starts_with("HTTP/1.1 200"));
    let looks = world.agent.looks.load(Ordering::SeqCst);
    until(|| world.agent.looks.load(Ordering::SeqCst) > looks + 5).await;
    assert_eq!(world.agent.sleeps.load(Ordering::SeqCst), 0);
    world.agent.in_use.store(false, Ordering::SeqCst);
    until(|| world.agent.sleeps.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn who_puts_a_machine_to_sleep_loses_no_request() {
    let world = World::new("", NEVER).await;
    assert!(request(&world, "/").await.starts_with("HTTP/1.1 200"));
    let agent = &world.agent;
    agent.hold.armed.store(true, Ordering::SeqCst);
    let asked = agent.asked.load(Ordering::SeqCst);
    let (held, is_held) = tokio::sync::oneshot::channel();
    let suspend = async {
        agent.hold.held.notified().await;
        held.send(()).unwrap();
        agent.suspend_by_hand().await;
    };
    let newcomer = async {
        is_held.await.unwrap();
        // As soon as the gate knows, which nothing else tells.
        while agent.asked.load(Ordering::SeqCst) == asked {
            let reply = tokio::time::timeout(Duration::from_millis(50), request(&world, "/new"));
            match reply.await {
                Ok(reply) => assert!(reply.starts_with("HTTP/1.1 200"), "{reply}"),
                Err(_waits) => {}
            }
        }
        let sleeps = agent.sleeps.load(Ordering::SeqCst);
        assert_eq!(sleeps, 0, "a request is under way");
        agent.hold.released.notify_one();
    };
    let held = request(&world, "/held");
    let all = async { tokio::join!(held, suspend, newcomer) };
    let (held, (), ()) = tokio::time::timeout(Duration::from_secs(40), all)
        .await
        .expect("it is put to sleep");
    assert!(held.starts_with("HTTP/1.1 200"), "{held}");
    assert_eq!(agent.sleeps.load(Ordering::SeqCst), 1);
    let reply = request(&world, "/after").await;
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    assert_eq!(agent.starts.load(Ordering::SeqCst), 2);
}

/// Waits until something is so.
async fn until(mut so: impl FnMut() -> bool) {
    let is_so = async {
        while !so() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(40), is_so)
        .await
        .expect("in vain");
}

#[tokio::test]
async fn the_last_machines_asked_for_keep_running() {
    let service = r#""autostop": "stop", "min_machines_running": 1,"#;
    let world = World::new(service, Duration::from_millis(200)).await;
    request(&world, "/").await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(world.agent.sleeps.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_machine_that_died_unseen_is_started_again() {
    let world = World::new("", NEVER).await;
    assert!(request(&world, "/").await.starts_with("HTTP/1.1 200"));
    world.agent.crash().await;
    // A POST, which must not be sent twice: nothing of it had been sent when the connection failed.
    let reply = world.text("/", &["--data", "x"]).await;
    assert!(reply.contains("POST /"), "{reply}");
    assert_eq!(world.agent.starts.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_request_lost_with_its_machine_is_sent_again_if_that_may_be_done() {
    let world = World::new("", NEVER).await;
    let hold = world.agent.hold.clone();
    hold.armed.store(true, Ordering::SeqCst);
    let crash = async {
        hold.held.notified().await;
        world.agent.crash().await;
    };
    let (reply, ()) = tokio::join!(request(&world, "/again"), in_time(crash));
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    assert_eq!(world.agent.starts.load(Ordering::SeqCst), 2);

    // A POST may have been carried out: its sender has to decide.
    hold.armed.store(true, Ordering::SeqCst);
    let crash = async {
        hold.held.notified().await;
        world.agent.crash().await;
    };
    // Debian 12's curl (7.88) loses an HTTP/2 reply that comes before its request is complete.
    let post = world.text("/once", &["--http1.1", "--data", "x"]);
    let (reply, ()) = tokio::join!(post, in_time(crash));
    assert!(
        reply.contains("closed the connection without an answer"),
        "{reply}"
    );
}

#[tokio::test]
async fn a_start_that_fails_is_told_and_tried_again_by_the_next_request() {
    let world = World::new("", NEVER).await;
    world.agent.broken.store(true, Ordering::SeqCst);
    let reply = request(&world, "/").await;
    assert!(
        reply.starts_with("HTTP/1.1 503") && reply.contains("retry-after"),
        "{reply}"
    );
    assert!(
        !reply.contains("out of order"),
        "the reason is for the owner: {reply}"
    );
    world.agent.broken.store(false, Ordering::SeqCst);
    assert!(request(&world, "/").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_machine_that_may_not_be_started_is_not() {
    let world = World::new(r#""autostart": false,"#, NEVER).await;
    assert!(request(&world, "/").await.starts_with("HTTP/1.1 503"));
    assert_eq!(world.agent.starts.load(Ordering::SeqCst), 0);
}

/// A handshake that names the app, and nothing after it.
async fn handshake(world: &World) -> tokio_rustls::client::TlsStream<TcpStream> {
    let mut roots = rustls::RootCertStore::empty();
    let pem = std::fs::read(world.certificate()).unwrap();
    for certificate in rustls::pki_types::CertificateDer::pem_slice_iter(&pem) {
        roots.add(certificate.unwrap()).unwrap();
    }
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(world.https).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    let name = HOST.try_into().unwrap();
    connector.connect(name, stream).await.unwrap()
}

/// Suspends the Machine, and waits until the edge knows.
async fn falls_asleep(world: &World) {
    world.agent.suspend_by_hand().await;
    let asleep = |s: &tern_catalog::Snapshot| {
        let mut all = s.machine_status.values();
        all.all(|s| s.state == tern_catalog::MachineState::Suspended)
            .then_some(())
    };
    world.view.wait_for(asleep).await;
}

#[tokio::test]
async fn a_handshake_wakes_before_the_request_and_not_twice_for_nothing() {
    let world = World::new("", NEVER).await;
    let metrics = world.edge.metrics();
    let mut stream = handshake(&world).await;
    until(|| world.agent.starts.load(Ordering::SeqCst) == 1).await;
    let head = format!("GET /early HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).await.unwrap();
    assert!(reply.starts_with(b"HTTP/1.1 200"));
    assert_eq!(metrics.early_wakes.get(), 1);
    // Who only knocks is served once more, and then not expected to ask.
    falls_asleep(&world).await;
    let _silent = handshake(&world).await;
    until(|| metrics.early_wakes_wasted.get() == 1).await;
    until(|| world.agent.starts.load(Ordering::SeqCst) == 2).await;
    falls_asleep(&world).await;
    let _silent = handshake(&world).await;
    let reply = request(&world, "/plain").await;
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    assert_eq!(metrics.early_wakes.get(), 2);
}
