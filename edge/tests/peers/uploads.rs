//! Requests with content, and how long it may take.

use std::time::Duration;

use tern_edge::Limits;
use tokio::time::sleep;

use crate::app::{App, BIG, DRIP, DRIPS, IDLE, Temper};
use crate::client::{get, plain};
use crate::h2_client::H2;
use crate::world::World;

fn idle(idle: Duration) -> Limits {
    Limits {
        idle,
        ..Limits::default()
    }
}

/// curl ends such an upload with an empty DATA frame, which is no second terminator.
#[tokio::test]
async fn an_upload_of_unknown_length_has_one_end() {
    for temper in [Temper::Strict, Temper::Lenient] {
        let app = App::new(temper).await;
        let world = World::new(app.port).await;
        let content = b"some content\n".repeat(20_000);
        for (version, content) in [
            ("--http2", content.as_slice()),
            ("--http1.1", &content),
            ("--http2", b""),
            ("--http1.1", b""),
        ] {
            let (before, nonce) = (app.requests().len(), "X-Nonce: upload");
            let more = [
                version, "-T", "-", "-X", "POST", "-H", nonce, "-H", "Expect:",
            ];
            let text = world.curl("/echo", &more, content).await;
            assert!(
                text.ends_with(std::str::from_utf8(content).unwrap()),
                "{version}: {text:?}"
            );
            let requests = app.requests();
            assert_eq!(requests.len(), before + 1, "{version}");
            let got = &requests[before];
            assert_eq!(got.body, content, "{version}");
            assert_eq!(got.one("transfer-encoding"), Some("chunked"), "{version}");
        }
        // All on one connection, which nothing too much has spoilt.
        assert_eq!(app.connections(), 1, "{temper:?}");
    }
}

#[tokio::test]
async fn every_way_to_frame_content_over_http_2_has_one_end() {
    let app = App::new(Temper::Strict).await;
    let world = World::new(app.port).await;
    let client = H2::new(&world).await;
    for parts in [
        &[b"".as_slice()] as &[&[u8]],
        &[b"", b""],
        &[b"a"],
        &[b"a", b""],
        &[b"", b"a", b"", b"b", b""],
        &[&[b'x'; 9000], b"y"],
        &[&[b'x'; 100_000], b""],
    ] {
        let answer = client.upload("/echo", "n", parts).await;
        assert_eq!(answer.body.as_bytes(), parts.concat());
    }
    assert_eq!((app.requests().len(), app.connections()), (7, 1));
}

#[tokio::test]
async fn an_upload_that_trickles_stays() {
    let app = App::new(Temper::Lenient).await;
    let world = World::limited(app.port, idle(IDLE)).await;
    let mut client = plain(&world).await;
    client
        .get("/echo", "n", &format!("Content-Length: {DRIPS}\r\n"))
        .await;
    let h2 = H2::new(&world).await;
    let (reply, mut send) = h2
        .begin(crate::h2_client::request("POST", "/echo", "m"), false)
        .await;
    for n in 0..DRIPS {
        sleep(DRIP).await;
        client.send(b".").await;
        send.send_data(".".into(), n + 1 == DRIPS).unwrap();
    }
    assert_eq!(client.answer().await.body, ".".repeat(DRIPS));
    let answer = crate::h2_client::whole(reply).await.unwrap();
    assert_eq!(answer.body, ".".repeat(DRIPS));
}

#[tokio::test]
async fn an_answer_that_trickles_stays() {
    let app = App::new(Temper::Lenient).await;
    let world = World::limited(app.port, idle(IDLE)).await;
    let mut client = plain(&world).await;
    client.get("/drip", "n", "").await;
    let h2 = H2::new(&world).await;
    let (h1, h2) = tokio::join!(client.answer(), h2.get("/drip", "m"));
    assert_eq!((h1.body, h2.body), (".".repeat(DRIPS), ".".repeat(DRIPS)));
}

#[tokio::test]
async fn an_upload_that_stops_gets_408() {
    let app = App::new(Temper::Lenient).await;
    let world = World::limited(app.port, idle(Duration::from_millis(500))).await;
    let mut client = plain(&world).await;
    client.get("/", "slow", "Content-Length: 10\r\n").await;
    client.send(b"12345").await;
    let answer = client.answer().await;
    assert_eq!(
        (answer.status(), answer.header("connection")),
        (408, Some("close")),
        "{answer:?}"
    );
    client.ends().await;
    // Half a request is not left on a connection that another will use.
    app.until_closed(1).await;
    let h2 = H2::new(&world).await;
    let (reply, mut send) = h2
        .begin(crate::h2_client::request("POST", "/", "m"), false)
        .await;
    send.send_data("12345".into(), false).unwrap();
    let answer = crate::h2_client::whole(reply).await.unwrap();
    assert_eq!(answer.status(), 408, "{answer:?}");
    app.until_closed(2).await;
    h2.get("/", "next").await.is_for("next");
    assert_eq!(app.judged().0.len(), 1);
}

#[tokio::test]
async fn an_app_that_does_not_answer_gets_its_client_504() {
    let app = App::new(Temper::Lenient).await;
    let world = World::limited(app.port, idle(Duration::from_millis(500))).await;
    let mut client = plain(&world).await;
    client.get("/held", "n", "").await;
    let answer = client.answer().await;
    assert_eq!(answer.status(), 504, "{answer:?}");
    // The client did nothing wrong: its connection is still good.
    client.get("/", "next", "").await;
    client.answer().await.is_for("next");
    assert_eq!(
        H2::new(&world)
            .await
            .try_get("/held", "m")
            .await
            .unwrap()
            .status(),
        504
    );
}

/// It is the app that stands still, not the client: more than all buffers hold was ready.
#[tokio::test]
async fn an_app_that_stops_reading_gets_its_client_504() {
    let app = App::new(Temper::Deaf).await;
    let world = World::limited(app.port, idle(Duration::from_secs(1))).await;
    let client = plain(&world).await;
    let (mut read, mut write) = client.stream.into_split();
    let sending = tokio::spawn(async move {
        use tokio::io::AsyncWriteExt as _;
        let _ = write
            .write_all(get("/", "n", &format!("Content-Length: {BIG}\r\n")).as_bytes())
            .await;
        let _ = write.write_all(&vec![b'x'; BIG]).await;
        write
    });
    let mut head = [0; 12];
    use tokio::io::AsyncReadExt as _;
    let read = tokio::time::timeout(crate::client::PATIENCE, read.read_exact(&mut head));
    read.await.unwrap().unwrap();
    assert_eq!(String::from_utf8_lossy(&head), "HTTP/1.1 504");
    sending.abort();
}

/// Its client takes some all the time, much less than the kernel holds ready for it.
#[tokio::test]
async fn a_download_that_is_read_slowly_comes_to_its_end() {
    let app = App::new(Temper::Lenient).await;
    let world = World::limited(app.port, idle(IDLE)).await;
    let mut client = plain(&world).await;
    client.get("/big", "n", "").await;
    client.head().await;
    for _ in 0..80 {
        client.exactly(8 << 10).await;
        sleep(DRIP).await;
    }
    let left = BIG - (80 * (8 << 10));
    assert!(client.exactly(left).await.iter().all(|b| *b == b'b'));
}
