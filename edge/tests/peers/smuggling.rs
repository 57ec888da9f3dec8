//! Requests over HTTP/1 that two readers may read in two ways: what reaches the app is one well-formed request,
//! or none.

use crate::app::{App, Temper};
use crate::client::plain;
use crate::world::{HOST, World};

/// `$` stands for the line of Host. Heads that are refused, with what.
const REFUSED: &[(&str, u16)] = &[
    // A length told twice, or in a way that is read in two.
    (
        "POST / HTTP/1.1\r\n$Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "POST / HTTP/1.1\r\n$Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "POST / HTTP/1.1\r\n$Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        501,
    ),
    (
        "POST / HTTP/1.1\r\n$Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        501,
    ),
    (
        "POST / HTTP/1.1\r\n$Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        501,
    ),
    (
        "POST / HTTP/1.1\r\n$Transfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n",
        501,
    ),
    (
        "POST / HTTP/1.1\r\n$Transfer-Encoding:\r\n\r\n0\r\n\r\n",
        501,
    ),
    (
        "POST / HTTP/1.1\r\n$Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "POST / HTTP/1.1\r\n$Transfer-Encoding\r\n : chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "POST / HTTP/1.1\r\n$Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "POST / HTTP/1.1\r\n$Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "POST / HTTP/1.1\r\n$Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "POST / HTTP/1.1\r\n$Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "POST / HTTP/1.0\r\n$Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "POST / HTTP/1.1\r\n$Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        400,
    ),
    (
        "POST / HTTP/1.1\r\n$Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        400,
    ),
    ("POST / HTTP/1.1\r\n$Content-Length: 5, 5\r\n\r\nhello", 400),
    ("POST / HTTP/1.1\r\n$Content-Length: +5\r\n\r\nhello", 400),
    ("POST / HTTP/1.1\r\n$Content-Length: -5\r\n\r\nhello", 400),
    ("POST / HTTP/1.1\r\n$Content-Length: 0x5\r\n\r\nhello", 400),
    ("POST / HTTP/1.1\r\n$Content-Length: 5 5\r\n\r\nhello", 400),
    ("POST / HTTP/1.1\r\n$Content-Length: 5.0\r\n\r\nhello", 400),
    ("POST / HTTP/1.1\r\n$Content-Length:\r\n\r\nhello", 400),
    (
        "POST / HTTP/1.1\r\n$Content-Length: 18446744073709551621\r\n\r\nhello",
        400,
    ),
    ("POST / HTTP/1.1\r\n$Content-Length : 5\r\n\r\nhello", 400),
    (
        "POST / HTTP/1.1\r\n$Content-Length:\r\n 5\r\n\r\nhello",
        400,
    ),
    // Lines that end where others see none, and fields that are none.
    ("GET / HTTP/1.1\r\n$X: a\rb\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\n$X: a\r\r\n\r\n", 400),
    (
        "GET / HTTP/1.1\r\n$X: a\nTransfer-Encoding: chunked\r\n\r\n",
        400,
    ),
    ("GET / HTTP/1.1\n$\n", 400),
    ("GET / HTTP/1.1\r\n$X: a\r\n b\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\n X: folded\r\n$\r\n", 400),
    ("GET / HTTP/1.1\r\n$X: a\0b\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\n$X\0: a\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\n$X Y: a\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\n$X\t: a\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\n$: a\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\n$no colon\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\n$Ünicode: a\r\n\r\n", 400),
    // Hosts.
    ("GET / HTTP/1.1\r\n$$\r\n", 400),
    ("GET / HTTP/1.1\r\n$Host: other.example\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\nX: y\r\n\r\n", 400),
    ("GET / HTTP/1.1\r\nHost:\r\n\r\n", 404),
    ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 404),
    ("GET http://other.example/ HTTP/1.1\r\n$\r\n", 404),
    (
        "GET http://shop.tern.test@other.example/ HTTP/1.1\r\n$\r\n",
        400,
    ),
    ("GET http:// HTTP/1.1\r\n$\r\n", 400),
    ("CONNECT shop.tern.test:80 HTTP/1.1\r\n$\r\n", 405),
    // Request lines.
    ("GET  / HTTP/1.1\r\n$\r\n", 400),
    ("GET / HTTP/1.1 \r\n$\r\n", 400),
    ("GET /\tHTTP/1.1\r\n$\r\n", 400),
    ("GET /a b HTTP/1.1\r\n$\r\n", 400),
    ("GET /\x7f HTTP/1.1\r\n$\r\n", 400),
    ("GET /#a HTTP/1.1\r\n$\r\n", 400),
    ("GET a HTTP/1.1\r\n$\r\n", 400),
    ("GET / HTTP/2.0\r\n$\r\n", 400),
    ("GET / HTTP/1.2\r\n$\r\n", 400),
    ("GET / http/1.1\r\n$\r\n", 400),
    ("GET /\r\n$\r\n", 400),
    ("G(T / HTTP/1.1\r\n$\r\n", 400),
    (" GET / HTTP/1.1\r\n$\r\n", 400),
    ("\r\n\r\nGET / HTTP/1.1\r\n$\r\n", 400),
    ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ("\x16\x03\x01\x02\0\x01\0", 400),
];

/// What a head and its content are to the app: path and content of each request.
type Passed = (&'static str, &'static [(&'static str, &'static str)]);

/// Requests that pass, each of them whole.
const PASSED: &[Passed] = &[
    (
        "GET /a HTTP/1.1\r\n$Content-Length: 5\r\n\r\nhello",
        &[("/a", "hello")],
    ),
    (
        "GET /a HTTP/1.1\r\n$Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        &[("/a", "hello")],
    ),
    (
        "POST /a HTTP/1.1\r\n$transfer-encoding:\tCHUNKED\t\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        &[("/a", "hello")],
    ),
    (
        "POST /a HTTP/1.1\r\n$Transfer-Encoding: chunked\r\n\r\n5;a=b;c=\"d\"\r\nhello\r\n0;e\r\n\r\n",
        &[("/a", "hello")],
    ),
    (
        "POST /a HTTP/1.1\r\n$Transfer-Encoding: chunked\r\n\r\n0005\r\nhello\r\n00\r\n\r\n",
        &[("/a", "hello")],
    ),
    (
        "POST /a HTTP/1.1\r\n$Transfer-Encoding: chunked\r\n\r\nA\r\nhello world\r\n0\r\n\r\n",
        &[],
    ),
    (
        "POST /a HTTP/1.1\r\n$Transfer-Encoding: chunked\r\n\r\nb\r\nhello world\r\n0\r\nContent-Length: 3\r\nX-Nonce: evil\r\n\r\n",
        &[("/a", "hello world")],
    ),
    (
        "POST /a HTTP/1.1\r\n$Content-Length: 0005\r\n\r\nhello",
        &[("/a", "hello")],
    ),
    (
        "POST /a HTTP/1.1\r\n$Content-Length: 5\r\nConnection: content-length, close\r\n\r\nhello",
        &[("/a", "hello")],
    ),
    (
        "POST /a HTTP/1.1\r\n$Transfer-Encoding: chunked\r\nConnection: transfer-encoding\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        &[("/a", "hello")],
    ),
    ("POST /a HTTP/1.1\r\n$\r\n", &[("/a", "")]),
    // A request within content, or in an empty line's place.
    (
        "POST /a HTTP/1.1\r\n$Content-Length: 28\r\n\r\nGET /b HTTP/1.1\r\nHost: c\r\n\r\nGET /d HTTP/1.1\r\n$\r\n",
        &[("/a", "GET /b HTTP/1.1\r\nHost: c\r\n\r\n"), ("/d", "")],
    ),
    (
        "\r\nGET /a HTTP/1.1\r\n$\r\n\r\nGET /b HTTP/1.1\r\n$\r\n",
        &[("/a", ""), ("/b", "")],
    ),
    (
        "GET http://shop.tern.test:80/a?b HTTP/1.1\r\nHost: other.example\r\n\r\n",
        &[("/a?b", "")],
    ),
    (
        "GET http://SHOP.tern.test?b HTTP/1.1\r\nHost: other.example\r\n\r\n",
        &[("/?b", "")],
    ),
    ("OPTIONS * HTTP/1.1\r\n$\r\n", &[("*", "")]),
    (
        "GET /a HTTP/1.0\r\n$Connection: keep-alive\r\nContent-Length: 5\r\n\r\nhello",
        &[("/a", "hello")],
    ),
    ("PURGE /a HTTP/1.1\r\n$\r\n", &[("/a", "")]),
    ("GET /{\"a\"}|^` HTTP/1.1\r\n$\r\n", &[("/{\"a\"}|^`", "")]),
];

/// Chunks that are refused when they come, whatever was passed on by then.
const BAD_CHUNKS: &[&str] = &[
    "0x5\r\nhello\r\n0\r\n\r\n",
    "5 \r\nhello\r\n0\r\n\r\n",
    " 5\r\nhello\r\n0\r\n\r\n",
    "+5\r\nhello\r\n0\r\n\r\n",
    "-5\r\nhello\r\n0\r\n\r\n",
    "\r\nhello\r\n0\r\n\r\n",
    "g\r\nhello\r\n0\r\n\r\n",
    "10000000000000005\r\nhello\r\n0\r\n\r\n",
    "00000000000000000005\r\nhello\r\n0\r\n\r\n",
    "5\nhello\r\n0\r\n\r\n",
    "5\rhello\r\n0\r\n\r\n",
    "5;a\nb\r\nhello\r\n0\r\n\r\n",
    "5;a\rb\r\nhello\r\n0\r\n\r\n",
    "5,a\r\nhello\r\n0\r\n\r\n",
    "5\r\nhello0\r\n\r\n",
    "5\r\nhello\n0\r\n\r\n",
    "5\r\nhello!\r\n0\r\n\r\n",
    "5\r\nhello\r\n0\n\n",
    "5\r\nhello\r\n0\r\nX : y\r\n\r\n",
    "5\r\nhello\r\n0\r\nX: y\n\r\n",
    "5\r\nhello\r\n0\r\nX: y\r\n z\r\n\r\n",
    "5\r\nhello\r\n0\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
];

fn with_host(text: &str) -> String {
    text.replace('$', &format!("Host: {HOST}\r\n"))
}

/// Whoever comes next is answered, and by an app that has nothing left over.
async fn next_is_unharmed(world: &World) {
    let mut next = plain(world).await;
    next.get("/", "next", "").await;
    next.answer().await.is_for("next");
}

#[tokio::test]
async fn a_head_that_can_be_read_in_two_ways_reaches_nobody() {
    for temper in [Temper::Lenient, Temper::Strict] {
        let app = App::new(temper).await;
        let world = World::new(app.port).await;
        for (text, status) in REFUSED {
            // What may be taken for a request of its own follows.
            let bytes = with_host(text);
            let mut client = plain(&world).await;
            client.send(bytes.as_bytes()).await;
            client
                .send(with_host("GET /smuggled HTTP/1.1\r\n$\r\n").as_bytes())
                .await;
            let answer = client.answer().await;
            assert_eq!(answer.status(), *status, "{text:?}: {answer:?}");
            if *status != 404 {
                assert_eq!(answer.header("connection"), Some("close"), "{text:?}");
                client.ends().await;
            }
            next_is_unharmed(&world).await;
            let strangers = app
                .requests()
                .into_iter()
                .filter(|got| got.path() != "/" && got.path() != "/smuggled");
            assert_eq!(strangers.count(), 0, "{text:?}");
        }
        let requests = app.requests();
        let smuggled = requests
            .iter()
            .filter(|got| got.path() == "/smuggled")
            .count();
        let not_found = REFUSED.iter().filter(|(_, status)| *status == 404).count();
        // An honest request after a 404 is one.
        assert_eq!(
            (smuggled, requests.len()),
            (not_found, not_found + REFUSED.len())
        );
    }
}

#[tokio::test]
async fn what_passes_is_well_formed() {
    for (text, expected) in PASSED {
        let app = App::new(Temper::Strict).await;
        let world = World::new(app.port).await;
        let mut client = plain(&world).await;
        client.send(with_host(text).as_bytes()).await;
        for _ in *expected {
            let answer = client.answer().await;
            assert_eq!(answer.status(), 200, "{text:?}: {answer:?}");
        }
        if expected.is_empty() {
            assert_eq!(client.answer().await.status(), 400, "{text:?}");
        }
        let whole = app.judged().0;
        let got: Vec<_> = whole
            .iter()
            .map(|got| (got.path(), std::str::from_utf8(&got.body).unwrap()))
            .collect();
        assert_eq!(got, *expected, "{text:?}");
        for got in &whole {
            let host = got.one("host").unwrap().to_lowercase();
            assert!(
                host == HOST || host == format!("{HOST}:80"),
                "{text:?}: {host}"
            );
        }
        next_is_unharmed(&world).await;
    }
}

#[tokio::test]
async fn chunks_that_can_be_read_in_two_ways_are_no_request() {
    for temper in [Temper::Lenient, Temper::Strict] {
        let app = App::new(temper).await;
        let world = World::new(app.port).await;
        for (n, text) in BAD_CHUNKS.iter().enumerate() {
            let mut client = plain(&world).await;
            client
                .get("/", "bad", "Transfer-Encoding: chunked\r\n")
                .await;
            client.send(text.as_bytes()).await;
            client
                .send(with_host("GET /smuggled HTTP/1.1\r\n$\r\n").as_bytes())
                .await;
            let answer = client.answer().await;
            assert_eq!(
                (answer.status(), answer.header("connection")),
                (400, Some("close")),
                "{text:?}: {answer:?}"
            );
            client.ends().await;
            next_is_unharmed(&world).await;
            let (whole, begun) = app.judged();
            assert_eq!(whole.len(), n + 1, "{text:?}: {whole:?}");
            assert!(
                begun.len() <= n + 1 && whole.iter().all(|got| got.one("x-nonce") == Some("next"))
            );
        }
    }
}

/// Content that stops, and its connection with it, is no request either.
#[tokio::test]
async fn content_cut_off_is_no_request() {
    let app = App::new(Temper::Lenient).await;
    let world = World::new(app.port).await;
    for (n, (more, content)) in [
        (
            "Content-Length: 50\r\n",
            "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
        ),
        ("Transfer-Encoding: chunked\r\n", "5\r\nhello\r\n"),
        ("Transfer-Encoding: chunked\r\n", "5\r\nhello\r\n0\r\n"),
        (
            "Transfer-Encoding: chunked\r\n",
            "ffffffffffffffff\r\nhello\r\n0\r\n\r\n",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let mut client = plain(&world).await;
        client.get("/", "cut", more).await;
        client.send(content.as_bytes()).await;
        app.until_it_has("X-Nonce: cut").await;
        tokio::io::AsyncWriteExt::shutdown(&mut client.stream)
            .await
            .unwrap();
        client.ends().await;
        app.until_closed(n as u32 + 1).await;
        next_is_unharmed(&world).await;
        let whole = app.judged().0;
        assert!(
            whole.len() == n + 1 && whole.iter().all(|got| got.path() == "/"),
            "{more}: {whole:?}"
        );
    }
}
