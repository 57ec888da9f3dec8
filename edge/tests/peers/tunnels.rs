//! WebSocket, and whatever else leaves HTTP, over HTTP/1.1 and HTTP/2.

use std::future::poll_fn;

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use tern_edge::Limits;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::time::{sleep, timeout};

use crate::app::{App, DRIP, DRIPS, IDLE, Temper};
use crate::client::{Client, PATIENCE, plain, tls};
use crate::h2_client::{self, H2};
use crate::world::World;

/// The sample handshake of RFC 6455 section 1.3.
const UPGRADE: &str = "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n";

async fn upgrade<S: AsyncRead + AsyncWrite + Unpin>(client: &mut Client<S>, path: &str) {
    client.get(path, "tunnel", UPGRADE).await;
    let answer = client.answer().await;
    assert_eq!(answer.status(), 101, "{answer:?}");
    for (name, value) in [
        ("upgrade", "websocket"),
        ("sec-websocket-accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
    ] {
        assert_eq!(answer.header(name), Some(value));
    }
    assert!(
        answer
            .header("connection")
            .is_some_and(|c| c.eq_ignore_ascii_case("upgrade"))
    );
    assert_eq!(
        (
            answer.header("transfer-encoding"),
            answer.header("content-length")
        ),
        (None, None)
    );
}

async fn echoes<S: AsyncRead + AsyncWrite + Unpin>(app: &App, mut client: Client<S>) {
    upgrade(&mut client, "/websocket").await;
    let large = vec![b'l'; 300_000];
    for bytes in [
        b"hello".as_slice(),
        b"0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        &large,
    ] {
        // Both ways at once: each side's buffers are smaller than the last.
        let (mut read, mut write) = tokio::io::split(client.stream);
        let (_, back) = tokio::join!(
            async {
                write.write_all(bytes).await.unwrap();
                write.flush().await.unwrap();
            },
            async {
                use tokio::io::AsyncReadExt as _;
                let mut back = vec![0; bytes.len()];
                timeout(PATIENCE, read.read_exact(&mut back))
                    .await
                    .unwrap()
                    .unwrap();
                back
            }
        );
        assert!(back == bytes);
        client = Client::new(read.unsplit(write));
    }
    let closed = app.closed();
    client.stream.shutdown().await.unwrap();
    app.until_closed(closed + 1).await;
    client.ends().await;
    let got = app.judged_head("/websocket");
    assert_eq!(
        (got.one("upgrade"), got.one("connection")),
        (Some("websocket"), Some("Upgrade"))
    );
    assert_eq!(
        got.one("sec-websocket-key"),
        Some("dGhlIHNhbXBsZSBub25jZQ==")
    );
}

#[tokio::test]
async fn a_websocket_passes_and_ends_over_http_1() {
    let app = App::new(Temper::Lenient).await;
    let world = World::new(app.port).await;
    echoes(&app, plain(&world).await).await;
    echoes(&app, tls(&world).await).await;
    let mut next = plain(&world).await;
    next.get("/", "next", "").await;
    next.answer().await.is_for("next");
    // One that is refused is an answer like others.
    next.get("/", "refused", UPGRADE).await;
    next.answer().await.is_for("refused");
    next.get("/", "after", "").await;
    next.answer().await.is_for("after");
}

async fn exactly(receive: &mut RecvStream, n: usize) -> Vec<u8> {
    let mut got = Vec::new();
    while got.len() < n {
        let data = timeout(PATIENCE, receive.data())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        receive.flow_control().release_capacity(data.len()).unwrap();
        got.extend_from_slice(&data);
    }
    got
}

async fn send_all(send: &mut SendStream<Bytes>, mut bytes: Bytes) {
    while !bytes.is_empty() {
        send.reserve_capacity(bytes.len());
        let room = poll_fn(|cx| send.poll_capacity(cx)).await.unwrap().unwrap();
        send.send_data(bytes.split_to(room.min(bytes.len())), false)
            .unwrap();
    }
}

#[tokio::test]
async fn a_websocket_passes_and_ends_over_http_2() {
    let app = App::new(Temper::Lenient).await;
    let world = World::new(app.port).await;
    let h2 = H2::new(&world).await;
    let (mut receive, mut send) = h2.connect("/websocket").await;
    // Others go on beside it.
    h2.get("/", "beside").await.is_for("beside");
    let large = Bytes::from(vec![b'l'; 300_000]);
    for bytes in [Bytes::from("hello"), "0\r\n\r\n".into(), large] {
        let sent = bytes.clone();
        let ((), back) = tokio::join!(
            send_all(&mut send, sent),
            exactly(&mut receive, bytes.len())
        );
        assert!(back == bytes);
    }
    let closed = app.closed();
    send.send_data(Bytes::new(), true).unwrap();
    app.until_closed(closed + 1).await;
    while let Some(data) = timeout(PATIENCE, receive.data()).await.unwrap() {
        assert_eq!(data.unwrap(), "");
    }
    let got = app.judged_head("/websocket");
    assert!(got.line.starts_with("GET /websocket "), "{}", got.line);
    assert_eq!(
        (got.one("upgrade"), got.one("connection")),
        (Some("websocket"), Some("Upgrade"))
    );
    assert_eq!(got.one("sec-websocket-key").map(str::len), Some(24));
    assert_eq!(got.one("sec-websocket-version"), Some("13"));
    h2.get("/", "after").await.is_for("after");
    // An app that knows no WebSocket did not connect it.
    let request = h2_client::request("CONNECT", "/", "no")
        .extension(h2::ext::Protocol::from_static("websocket"));
    let (reply, _send) = h2.begin(request, false).await;
    assert_eq!(h2_client::whole(reply).await.unwrap().status(), 502);
}

/// A reset of the tunnel's stream ends the app's connection.
#[tokio::test]
async fn a_websocket_that_is_reset_is_closed_at_the_app() {
    let app = App::new(Temper::Lenient).await;
    let world = World::new(app.port).await;
    let h2 = H2::new(&world).await;
    let (mut receive, mut send) = h2.connect("/websocket").await;
    send_all(&mut send, "hello".into()).await;
    exactly(&mut receive, 5).await;
    send.send_reset(h2::Reason::CANCEL);
    app.until_closed(1).await;
    let mut client = plain(&world).await;
    upgrade(&mut client, "/websocket").await;
    client.stream.set_zero_linger().unwrap();
    drop(client);
    app.until_closed(2).await;
}

#[tokio::test]
async fn a_tunnel_in_which_one_side_speaks_outlives_the_idle_limit() {
    let limits = Limits {
        idle: IDLE,
        ..Limits::default()
    };
    let app = App::new(Temper::Lenient).await;
    let world = World::limited(app.port, limits).await;
    // Down: over both versions, until the app ends it.
    let mut down = plain(&world).await;
    upgrade(&mut down, "/ticks").await;
    let h2 = H2::new(&world).await;
    let (mut receive, _send) = h2.connect("/ticks").await;
    // Up: the app keeps silent.
    let mut up = plain(&world).await;
    upgrade(&mut up, "/sink").await;
    let upwards = async {
        for _ in 0..DRIPS {
            sleep(DRIP).await;
            up.send(b"u").await;
        }
    };
    let (down, over_h2, ()) =
        tokio::join!(down.exactly(DRIPS), exactly(&mut receive, DRIPS), upwards);
    assert_eq!((down, over_h2), (vec![b'.'; DRIPS], vec![b'.'; DRIPS]));
    assert_eq!(app.sunk(), 0, "closed too early");
    up.stream.shutdown().await.unwrap();
    app.until_sunk(DRIPS).await;
}

/// And one in which nobody speaks does not.
#[tokio::test]
async fn a_tunnel_in_which_nobody_speaks_is_closed() {
    let limits = Limits {
        idle: std::time::Duration::from_millis(500),
        ..Limits::default()
    };
    let app = App::new(Temper::Lenient).await;
    let world = World::limited(app.port, limits).await;
    let mut client = plain(&world).await;
    upgrade(&mut client, "/websocket").await;
    client.ends().await;
    app.until_closed(1).await;
}
