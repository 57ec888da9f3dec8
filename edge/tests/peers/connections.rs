//! How connections of clients go on and end.

use std::time::Duration;

use tern_edge::Limits;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpSocket;
use tokio::time::timeout;

use crate::app::{App, Temper};
use crate::client::{Client, PATIENCE, get, plain, tls, tls_with};
use crate::h2_client::H2;
use crate::world::{HOST, Options, World};

#[tokio::test]
async fn pipelined_requests_are_answered_in_their_order() {
    let app = App::new(Temper::Lenient).await;
    let world = World::new(app.port).await;
    let mut client = plain(&world).await;
    // In one segment, the second with content, the third the last.
    let post = get("/echo", "b", "Content-Length: 5\r\n");
    let three = [
        get("/", "a", "").as_str(),
        &post,
        "hello",
        &get("/", "c", "Connection: close\r\n"),
        &get("/", "never", ""),
    ]
    .concat();
    client.send(three.as_bytes()).await;
    client.answer().await.is_for("a");
    assert_eq!(client.answer().await.body, "hello");
    let last = client.answer().await;
    last.is_for("c");
    assert_eq!(last.header("connection"), Some("close"));
    client.ends().await;
    assert_eq!((app.requests().len(), app.connections()), (3, 1));
}

#[tokio::test]
async fn a_request_that_comes_while_another_is_answered_waits() {
    let app = App::new(Temper::Lenient).await;
    let world = World::new(app.port).await;
    let mut client = plain(&world).await;
    client.get("/held", "a", "").await;
    app.until_held(1).await;
    client.get("/", "b", "").await;
    client.get("/chunked", "c", "").await;
    app.release();
    client.answer().await.is_for("a");
    client.answer().await.is_for("b");
    assert_eq!(client.answer().await.body, "hello world");
    assert_eq!(app.requests().len(), 3);
}

async fn half_close<S: AsyncRead + AsyncWrite + Unpin>(app: &App, mut client: Client<S>) {
    let before = app.requests().len() as u32;
    client.get("/held", "n", "").await;
    client.stream.shutdown().await.unwrap();
    app.until_held(before + 1).await;
    app.release();
    client.answer().await.is_for("n");
    client.ends().await;
}

#[tokio::test]
async fn a_client_that_has_ended_its_side_gets_the_whole_answer() {
    let app = App::new(Temper::Lenient).await;
    let world = World::new(app.port).await;
    half_close(&app, plain(&world).await).await;
    half_close(&app, tls(&world).await).await;
    // Two requests, both answered.
    let mut client = plain(&world).await;
    let two = [get("/", "a", ""), get("/chunked", "b", "")].concat();
    client.send(two.as_bytes()).await;
    client.stream.shutdown().await.unwrap();
    client.answer().await.is_for("a");
    assert_eq!(client.answer().await.body, "hello world");
    client.ends().await;
}

/// So do those that wait for a Machine to wake.
#[tokio::test]
async fn a_client_that_has_ended_its_side_wakes_an_app() {
    let app = App::new(Temper::Lenient).await;
    let asleep = || Options {
        asleep: true,
        ..Options::default()
    };
    let world = World::with(app.port, asleep()).await;
    let (mut first, mut second) = (plain(&world).await, tls(&world).await);
    first.get("/", "a", "").await;
    first.stream.shutdown().await.unwrap();
    second.get("/", "b", "").await;
    second.stream.shutdown().await.unwrap();
    world.until_starting().await;
    world.wake();
    first.answer().await.is_for("a");
    first.ends().await;
    second.answer().await.is_for("b");
    second.ends().await;
}

/// An app whose client is gone is not left at its work.
#[tokio::test]
async fn a_client_that_resets_takes_its_request_back() {
    let app = App::new(Temper::Lenient).await;
    let world = World::new(app.port).await;
    let mut client = plain(&world).await;
    client.get("/held", "a", "").await;
    app.until_held(1).await;
    client.stream.set_zero_linger().unwrap();
    drop(client);
    app.until_given_up(1).await;
    let mut next = plain(&world).await;
    next.get("/", "next", "").await;
    next.answer().await.is_for("next");
    // Over HTTP/2 it is the stream that is reset.
    let h2 = H2::new(&world).await;
    let (reply, mut send) = h2
        .begin(crate::h2_client::request("GET", "/held", "b"), true)
        .await;
    app.until_held(2).await;
    send.send_reset(h2::Reason::CANCEL);
    drop(reply);
    app.until_given_up(2).await;
    h2.get("/", "on").await.is_for("on");
}

/// What one client does is no reason to give up connections that others will use.
#[tokio::test]
async fn a_client_that_resets_costs_one_connection_to_the_app() {
    let app = App::new(Temper::Lenient).await;
    let world = World::new(app.port).await;
    let (mut first, mut second) = (plain(&world).await, plain(&world).await);
    first.get("/held", "first", "").await;
    app.until_held(1).await;
    second.get("/", "second", "").await;
    second.answer().await.is_for("second");
    app.release();
    first.answer().await.is_for("first");
    // Two idle ones, of which this takes one.
    first.get("/held", "resets", "").await;
    app.until_held(2).await;
    first.stream.set_zero_linger().unwrap();
    drop(first);
    app.until_given_up(1).await;
    second.get("/", "third", "").await;
    second.answer().await.is_for("third");
    assert_eq!(app.connections(), 2);
}

#[tokio::test]
async fn who_says_nothing_is_closed_and_nobody_else() {
    let limits = Limits {
        handshake: Duration::from_millis(400),
        head: Duration::from_millis(700),
        keep_alive: Duration::from_millis(400),
        idle: PATIENCE,
        ..Limits::default()
    };
    let app = App::new(Temper::Lenient).await;
    let world = World::limited(app.port, limits).await;
    let mut under_way = plain(&world).await;
    under_way.get("/held", "under way", "").await;
    let h2 = H2::new(&world).await;
    let (reply, _) = h2
        .begin(crate::h2_client::request("GET", "/held", "stream"), true)
        .await;
    app.until_held(2).await;
    // TLS that never begins; HTTP/2 agreed on, and not a word of it; HTTP/1 likewise; a head without an end.
    let mut raw = Client::new(tokio::net::TcpStream::connect(world.https).await.unwrap());
    let mut silent = Client::new(tls_with(&world, b"h2").await);
    let (mut idle, mut slow) = (tls(&world).await, plain(&world).await);
    let slowloris = async {
        let bytes = get("/", "slow", &format!("X: {}\r\n", "x".repeat(10_000)));
        for byte in bytes.as_bytes() {
            if slow.stream.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let all = async { tokio::join!(raw.ends(), silent.rest(), idle.ends(), slowloris) };
    timeout(PATIENCE, all).await.unwrap();
    // HTTP/2 that has begun and asks for nothing is told so, and closed.
    let mut begun = Client::new(tls_with(&world, b"h2").await);
    begun
        .send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .await;
    begun.rest().await;
    app.release();
    app.release();
    let (h1, h2) = tokio::join!(under_way.answer(), crate::h2_client::whole(reply));
    h1.is_for("under way");
    h2.unwrap().is_for("stream");
    assert_eq!(app.requests().len(), 2);
}

#[tokio::test]
async fn http_1_0_is_answered_as_it_was_then() {
    let app = App::new(Temper::Lenient).await;
    let world = World::new(app.port).await;
    for (path, body) in [
        ("/", "nonce=n;"),
        ("/chunked", "hello world"),
        ("/without-length", "hello world"),
        ("/hints", "nonce=n;"),
        ("/trailers", "hello"),
    ] {
        for more in ["", "Connection: keep-alive\r\n"] {
            let mut client = plain(&world).await;
            let request =
                format!("GET {path} HTTP/1.0\r\nHost: {HOST}\r\nX-Nonce: n\r\n{more}\r\n");
            client.send(request.as_bytes()).await;
            let answer = client.answer().await;
            assert_eq!(
                (answer.status(), answer.body.as_str()),
                (200, body),
                "{path}: {answer:?}"
            );
            assert_eq!(answer.header("transfer-encoding"), None, "{answer:?}");
            let goes_on = !more.is_empty() && matches!(path, "/" | "/hints");
            let says = answer.header("connection");
            assert_eq!(
                says,
                Some(if goes_on { "keep-alive" } else { "close" }),
                "{path} {more:?}"
            );
            if goes_on {
                client
                    .send(
                        format!("GET / HTTP/1.0\r\nHost: {HOST}\r\nX-Nonce: m\r\n\r\n").as_bytes(),
                    )
                    .await;
                client.answer().await.is_for("m");
            }
            client.ends().await;
        }
    }
    // As the app was asked: in HTTP/1.1.
    app.requests();
}

/// Without a length an end says "whole": it may not where the answer is not.
#[tokio::test]
async fn an_answer_cut_off_resets_a_client_of_http_1_0() {
    let app = App::new(Temper::Lenient).await;
    let world = World::new(app.port).await;
    let mut client = plain(&world).await;
    let request = format!("GET /cut-chunks HTTP/1.0\r\nHost: {HOST}\r\n\r\n");
    client.send(request.as_bytes()).await;
    let mut bytes = Vec::new();
    use tokio::io::AsyncReadExt as _;
    let read = timeout(PATIENCE, client.stream.read_to_end(&mut bytes))
        .await
        .unwrap();
    let error = read.expect_err("an end that looks good");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// RFC 9113 section 3.4, no settings, and a PING.
const PREFACE_AND_PING: &[u8] =
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x08\x06\0\0\0\0\0are you?";

#[tokio::test]
async fn a_full_edge_ends_who_is_idle_and_no_one_else() {
    let app = App::new(Temper::Strict).await;
    let limits = Limits {
        connections: 3,
        ..Limits::default()
    };
    let world = World::limited(app.port, limits).await;
    // Over TLS and HTTP/2, with nothing asked for: what once held its place for good.
    let mut silent = tls_with(&world, b"h2").await;
    silent.write_all(PREFACE_AND_PING).await.unwrap();
    let mut heard = Vec::new();
    while !heard.windows(8).any(|w| w == b"are you?") {
        let read = timeout(PATIENCE, silent.read_buf(&mut heard)).await;
        assert!(read.expect("in time").unwrap() > 0);
    }
    let mut idle = plain(&world).await;
    idle.get("/", "one", "").await;
    idle.answer().await.is_for("one");
    let mut busy = plain(&world).await;
    busy.get("/held", "two", "").await;
    app.until_held(1).await;
    // Each finds room, and the longest idle goes first.
    let mut third = plain(&world).await;
    third.get("/", "three", "").await;
    third.answer().await.is_for("three");
    let mut rest = Vec::new();
    let ended = timeout(PATIENCE, silent.read_to_end(&mut rest)).await;
    assert!(ended.is_ok(), "the silent one is still there");
    let mut fourth = plain(&world).await;
    fourth.get("/", "four", "").await;
    fourth.answer().await.is_for("four");
    assert!(idle.answer_or_end().await.is_none());
    app.release();
    busy.answer().await.is_for("two");
}

#[tokio::test]
async fn a_client_has_so_many_connections_and_no_more() {
    let app = App::new(Temper::Strict).await;
    let limits = Limits {
        connections_of_client: 2,
        ..Limits::default()
    };
    let world = World::limited(app.port, limits).await;
    let mut one = plain(&world).await;
    let two = plain(&world).await;
    one.get("/", "one", "").await;
    one.answer().await.is_for("one");
    // Closed without a word, as soon as it came.
    let mut third = plain(&world).await;
    let _ = third.stream.write_all(b"GET / HTTP/1.1\r\n").await;
    let mut rest = Vec::new();
    let end = timeout(PATIENCE, third.stream.read_to_end(&mut rest)).await;
    assert!(end.is_ok() && rest.is_empty(), "{rest:?}");
    // Another address has its own.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let mut other = Client::new(socket.connect(world.http).await.unwrap());
    other.get("/", "other", "").await;
    other.answer().await.is_for("other");
    drop(two);
    let again = async {
        loop {
            let mut again = plain(&world).await;
            let request = get("/", "again", "Connection: close\r\n");
            let _ = again.stream.write_all(request.as_bytes()).await;
            let mut reply = Vec::new();
            let _ = again.stream.read_to_end(&mut reply).await;
            if reply.starts_with(b"HTTP/1.1 200") {
                return;
            }
        }
    };
    timeout(PATIENCE, again).await.expect("its place is free");
}
