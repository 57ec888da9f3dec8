//! What is in a message beside its content, and where it has too much of it.

use crate::app::{App, Temper};
use crate::client::{plain, tls};
use crate::h2_client::{self, H2};
use crate::world::{HOST, World};

#[tokio::test]
async fn cookies_of_http_2_become_one_line() {
    let app = App::new(Temper::Strict).await;
    let world = World::new(app.port).await;
    let request = h2_client::request("GET", "/", "n")
        .header("cookie", "a=1")
        .header("cookie", "b=2; c=3")
        .header("cookie", "d=4");
    let h2 = H2::new(&world).await;
    let (reply, _) = h2.begin(request, true).await;
    h2_client::whole(reply).await.unwrap().is_for("n");
    assert_eq!(app.request("n").one("cookie"), Some("a=1; b=2; c=3; d=4"));
    // By a client that splits them itself.
    let more = [
        "--http2",
        "-H",
        "X-Nonce: m",
        "-H",
        "Cookie: a=1; b=2",
        "-H",
        "Cookie: c=3",
    ];
    world.curl("/", &more, b"").await;
    assert_eq!(app.request("m").one("cookie"), Some("a=1; b=2; c=3"));
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    let app = App::new(Temper::Strict).await;
    let world = World::new(app.port).await;
    let mut client = plain(&world).await;
    let head = "Transfer-Encoding: chunked\r\nTrailer: X-Sum\r\nTE: trailers\r\n";
    client.get("/trailers", "n", head).await;
    client
        .send(b"5\r\nhello\r\n0\r\nX-Sum: 1\r\nContent-Length: 3\r\nAuthorization: me\r\n\r\n")
        .await;
    let answer = client.answer().await;
    assert_eq!(
        (answer.body.as_str(), answer.trailers.as_str()),
        ("hello", "x-checksum: abc\r\n")
    );
    assert_eq!(answer.header("trailer"), Some("X-Checksum"));
    let got = app.request("n");
    let trailers = |got: &crate::strict::Got| {
        let all = got.trailers.iter();
        all.map(|(n, v)| format!("{n}: {v}").to_lowercase())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        (got.body.as_slice(), trailers(&got)),
        (b"hello".as_slice(), vec!["x-sum: 1".to_owned()])
    );

    let h2 = H2::new(&world).await;
    let (reply, mut send) = h2
        .begin(h2_client::request("POST", "/trailers", "m"), false)
        .await;
    send.send_data("hello".into(), false).unwrap();
    let mut map = http::HeaderMap::new();
    map.insert("x-sum", "2".parse().unwrap());
    send.send_trailers(map).unwrap();
    let answer = h2_client::whole(reply).await.unwrap();
    assert_eq!(
        (answer.body.as_str(), answer.trailers.as_str()),
        ("hello", "x-checksum: abc\r\n")
    );
    let got = app.request("m");
    assert_eq!(
        (got.body.as_slice(), trailers(&got)),
        (b"hello".as_slice(), vec!["x-sum: 2".to_owned()])
    );
}

#[tokio::test]
async fn early_hints_come_before_the_answer() {
    let app = App::new(Temper::Lenient).await;
    let world = World::new(app.port).await;
    let mut client = plain(&world).await;
    client.get("/hints", "n", "").await;
    let hints = client.answer().await;
    assert_eq!(
        (hints.status(), hints.header("link")),
        (103, Some("</style.css>; rel=preload"))
    );
    assert_eq!(hints.header("connection"), None);
    client.answer().await.is_for("n");
    client.get("/", "next", "").await;
    client.answer().await.is_for("next");

    let h2 = H2::new(&world).await;
    let (mut reply, _) = h2
        .begin(h2_client::request("GET", "/hints", "m"), true)
        .await;
    let hints = std::future::poll_fn(|cx| reply.poll_informational(cx))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (hints.status().as_u16(), &hints.headers()["link"]),
        (103, &"</style.css>; rel=preload".parse().unwrap())
    );
    h2_client::whole(reply).await.unwrap().is_for("m");
}

/// The client goes on when it has waited long enough.
#[tokio::test]
async fn an_app_may_ignore_that_its_client_waits_to_continue() {
    let app = App::new(Temper::Strict).await;
    let world = World::new(app.port).await;
    for version in ["--http1.1", "--http2"] {
        let more = [
            version,
            "-H",
            "Expect: 100-continue",
            "-H",
            "X-Nonce: n",
            "--data-binary",
            "@-",
        ];
        let text = world.curl("/echo", &more, b"hello").await;
        assert!(text.ends_with("hello"), "{version}: {text:?}");
    }
    assert_eq!(app.requests().len(), 2);
}

#[tokio::test]
async fn a_url_too_long_and_a_head_too_large_get_a_page() {
    let app = App::new(Temper::Strict).await;
    let world = World::new(app.port).await;
    let long = format!("/{}", "a".repeat(100 << 10));
    let many: String = (0..300).map(|n| format!("X-{n}: {n}\r\n")).collect();
    let large: String = (0..9)
        .map(|n| format!("X-{n}: {}\r\n", "x".repeat(8 << 10)))
        .collect();
    for (path, more, status, says) in [
        (long.as_str(), "", 414, "longer than 64 KiB"),
        ("/", many.as_str(), 431, "more than 256 fields"),
        ("/", &large, 431, "larger than 64 KiB"),
    ] {
        let mut client = plain(&world).await;
        client.get(path, "n", more).await;
        let answer = client.answer().await;
        assert_eq!(
            (answer.status(), answer.header("server")),
            (status, Some("tern")),
            "{}",
            answer.head
        );
        assert_eq!(answer.header("connection"), Some("close"));
        assert!(answer.body.contains(says), "{}", answer.body);
        client.ends().await;
        let mut client = tls(&world).await;
        client.get(path, "n", more).await;
        assert_eq!(client.answer().await.status(), status);
        client.ends().await;

        if path == long {
            // No client that keeps to the rules sends it: see `long-path` of `h2_hostile`.
            continue;
        }
        let h2 = H2::new(&world).await;
        let mut request = h2_client::request("GET", path, "n");
        for line in more.lines() {
            let (name, value) = line.split_once(": ").unwrap();
            request = request.header(name, value);
        }
        let (reply, _) = h2.begin(request, true).await;
        let answer = h2_client::whole(reply).await.unwrap();
        assert_eq!(
            (answer.status(), answer.header("server")),
            (status, Some("tern")),
            "{}",
            answer.head
        );
        assert!(answer.body.contains(says), "{}", answer.body);
        // The connection goes on.
        h2.get("/", "next").await.is_for("next");
    }
    assert_eq!(app.requests().len(), 2);
    // What fits passes.
    let mut client = plain(&world).await;
    client
        .get(&format!("/{}", "a".repeat(60 << 10)), "fits", "")
        .await;
    client.answer().await.is_for("fits");
    let some: String = (0..240).map(|n| format!("X-{n}: {n}\r\n")).collect();
    client.get("/", "some", &some).await;
    client.answer().await.is_for("some");
    assert_eq!(app.request("some").one("x-239"), Some("239"));
}

#[tokio::test]
async fn what_a_client_claims_does_not_reach_the_app() {
    let app = App::new(Temper::Strict).await;
    let world = World::new(app.port).await;
    let mut client = plain(&world).await;
    let claims = "Fly-Client-IP: 1.2.3.4\r\nFly_Client_IP: 1.2.3.4\r\nX-Forwarded-Proto: gopher\r\n\
        Content_Length: 5\r\nTransfer_Encoding: chunked\r\nKeep-Alive: 5\r\nTE: trailers\r\nUpgrade: h2c\r\n\
        HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\nConnection: Upgrade, HTTP2-Settings, X-Mine, Host, Cookie, X-Forwarded-For\r\n\
        X-Mine: 1\r\nCookie: a=1\r\n";
    client.get("/", "n", claims).await;
    client.answer().await.is_for("n");
    let got = app.request("n");
    for (name, value) in [
        ("fly-client-ip", Some("127.0.0.1")),
        ("fly_client_ip", None),
        ("x-forwarded-proto", Some("http")),
        ("x-forwarded-for", Some("127.0.0.1")),
        ("content_length", None),
        ("transfer_encoding", None),
        ("content-length", None),
        ("transfer-encoding", None),
        ("keep-alive", None),
        ("te", None),
        ("upgrade", None),
        ("http2-settings", None),
        ("connection", None),
        ("x-mine", None),
        ("host", Some(HOST)),
        ("cookie", Some("a=1")),
    ] {
        assert_eq!(got.one(name), value, "{name}");
    }
    // Nor in company (RFC 9110 section 7.8 lets a client offer several).
    client
        .get(
            "/",
            "m",
            "Connection: upgrade\r\nUpgrade: h2c, websocket\r\n",
        )
        .await;
    client.answer().await.is_for("m");
    let upgrade = app
        .request("m")
        .one("upgrade")
        .unwrap_or_default()
        .to_owned();
    assert!(!upgrade.contains("h2c"), "{upgrade}");
}
