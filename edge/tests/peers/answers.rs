//! Every client gets its own answer, whatever apps send that nobody asked for.

use futures::future::join_all;

use crate::app::{App, STRAY, Temper};
use crate::client::{Answer, plain, tls};
use crate::h2_client::H2;
use crate::world::World;

/// What each misbehaving path may answer at most.
const MISBEHAVING: [(&str, u16, &str); 5] = [
    ("/extra", 200, "nonce=first;"),
    ("/second", 200, "nonce=first;"),
    ("/long", 200, "hello"),
    ("/extra-after-chunks", 200, "hello"),
    ("/body-of-none", 204, ""),
];

#[tokio::test]
async fn what_an_app_sends_beyond_its_answer_reaches_nobody() {
    let app = App::new(Temper::Lenient).await;
    let world = World::new(app.port).await;
    let mut kept = plain(&world).await;
    for (n, (path, status, body)) in MISBEHAVING.into_iter().enumerate() {
        kept.get(path, "first", "").await;
        let answer = kept.answer().await;
        assert_eq!(
            (answer.status(), answer.body.as_str()),
            (status, body),
            "{path}: {answer:?}"
        );
        // The next request goes to another connection, the one before it is closed.
        let mut other = plain(&world).await;
        other.get("/", "other", "").await;
        other.answer().await.is_for("other");
        kept.get("/", "kept", "").await;
        kept.answer().await.is_for("kept");
        app.until_closed(n as u32 + 1).await;
    }
    assert_eq!(app.connections(), MISBEHAVING.len() + 1);
    assert_eq!(app.requests().len(), 3 * MISBEHAVING.len());
}

#[tokio::test]
async fn an_answer_that_nobody_asked_for_is_not_the_next_requests() {
    let app = App::new(Temper::Lenient).await;
    let world = World::new(app.port).await;
    for n in 0..3 {
        let mut client = plain(&world).await;
        client.get("/late", "late", "").await;
        client.answer().await.is_for("late");
        // The connection is idle by now; a byte on it spoils it.
        app.release();
        app.until_late(n + 1).await;
        let mut next = plain(&world).await;
        next.get("/", "next", "").await;
        next.answer().await.is_for("next");
        client.get("/", "again", "").await;
        client.answer().await.is_for("again");
        app.until_closed(n + 1).await;
    }
}

/// Everything at once, over one thread's pool: any answer that crosses is seen by its nonce.
async fn no_answer_crosses(temper: Temper) {
    let app = App::new(temper).await;
    let world = World::new(app.port).await;
    let (app, world) = (&app, &world);
    let h1 = |c: usize| async move {
        let mut client = plain(world).await;
        for n in 0..20 {
            let nonce = format!("h1-{c}-{n}");
            client.get("/", &nonce, "").await;
            client.answer().await.is_for(&nonce);
            let body = format!("body of {nonce}").repeat(1 + 400 * (n % 3));
            let head = format!("Content-Length: {}\r\n", body.len());
            client.get("/echo", &nonce, &head).await;
            client.send(body.as_bytes()).await;
            let answer = client.answer().await;
            assert_eq!(
                (answer.header("x-echo"), answer.body.as_str()),
                (Some(nonce.as_str()), body.as_str())
            );
        }
    };
    let h2 = |c: usize| async move {
        let client = H2::new(world).await;
        for n in 0..10 {
            let streams = (0..4).map(|s| {
                let client = &client;
                async move {
                    let nonce = format!("h2-{c}-{n}-{s}");
                    client.get("/", &nonce).await.is_for(&nonce);
                    let parts = [b"one ".as_slice(), nonce.as_bytes(), b""];
                    let answer = client.upload("/echo", &nonce, &parts).await;
                    assert_eq!(answer.header("x-echo"), Some(nonce.as_str()));
                    assert!(answer.body.contains(&nonce), "{answer:?}");
                }
            });
            join_all(streams).await;
        }
    };
    let stray = |c: usize| async move {
        let mut client = tls(world).await;
        for n in 0..20 {
            let nonce = format!("stray-{c}-{n}");
            let (path, ..) = MISBEHAVING[n % MISBEHAVING.len()];
            client.get(path, &nonce, "").await;
            let answer = client.answer().await;
            let mine = !answer.body.contains("nonce=") || answer.body == format!("nonce={nonce};");
            assert!(
                mine && !answer.body.contains(STRAY),
                "{path} {nonce}: {answer:?}"
            );
            // One that goes away does not leave its answer to the next.
            let mut leaves = plain(world).await;
            leaves.get("/", "left", "").await;
        }
    };
    tokio::join!(
        join_all((0..4).map(h1)),
        join_all((0..3).map(h2)),
        join_all((0..3).map(stray)),
    );
    let whole: Vec<_> = app.judged().0;
    let uploads = whole.iter().filter(|got| got.path() == "/echo").count();
    assert_eq!(uploads, 4 * 20 + 3 * 10 * 4);
}

#[tokio::test]
async fn no_answer_crosses_with_a_lenient_app() {
    no_answer_crosses(Temper::Lenient).await;
}

#[tokio::test]
async fn no_answer_crosses_with_a_strict_app() {
    no_answer_crosses(Temper::Strict).await;
}

#[tokio::test]
async fn no_answer_crosses_with_a_slow_app() {
    no_answer_crosses(Temper::Slow).await;
}

/// A client can tell that an answer was cut off, whatever it speaks.
#[tokio::test]
async fn an_answer_cut_off_does_not_look_whole() {
    let app = App::new(Temper::Lenient).await;
    let world = World::new(app.port).await;
    for path in ["/cut", "/cut-chunks"] {
        let mut client = plain(&world).await;
        client.get(path, "n", "").await;
        let bytes = String::from_utf8(client.rest().await).unwrap();
        assert!(
            bytes.contains("hello") && !bytes.contains("\r\n0\r\n"),
            "{bytes:?}"
        );
        let answer = H2::new(&world).await.try_get(path, "n").await;
        let error = answer.expect_err("a whole answer");
        assert!(error.is_reset(), "{error:?}");
    }
}

/// A page has no content where a client expects none: what follows would be its next answer.
#[tokio::test]
async fn a_page_that_answers_head_is_a_head_alone() {
    let app = App::new(Temper::Lenient).await;
    let world = World::new(app.port).await;
    let mut client = plain(&world).await;
    client
        .send(b"HEAD / HTTP/1.1\r\nHost: nobody.example\r\n\r\n")
        .await;
    let head = client.head().await;
    assert!(head.starts_with("HTTP/1.1 404"), "{head:?}");
    client.get("/", "next", "").await;
    client.answer().await.is_for("next");
    let text = world
        .curl(
            "/",
            &["--http2", "--head", "-H", "Host: nobody.example"],
            b"",
        )
        .await;
    assert!(text.starts_with("HTTP/2 404"), "{text:?}");
    let answer: Answer = H2::new(&world)
        .await
        .request("HEAD", "nobody.example", "/")
        .await;
    assert_eq!((answer.status(), answer.body.as_str()), (404, ""));
}

#[tokio::test]
async fn an_answer_before_the_uploads_end_is_passed_on() {
    let app = App::new(Temper::Hasty).await;
    let world = World::new(app.port).await;
    let mut client = plain(&world).await;
    client.get("/", "n", "Content-Length: 300000\r\n").await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.body.as_str()), (413, "much"));
    // What follows is not taken for a request.
    client.send(&vec![b'x'; 300_000]).await;
    client.ends().await;
    let answer = H2::new(&world)
        .await
        .upload("/", "n", &[&[b'x'; 100_000]])
        .await;
    assert_eq!((answer.status(), answer.body.as_str()), (413, "much"));
}
