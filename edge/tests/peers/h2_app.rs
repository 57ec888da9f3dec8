//! An app that speaks HTTP/2 without TLS, as gRPC servers do, and requests to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use futures::future::join_all;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{HeaderMap, Request, Response};
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::app::until;
use crate::client::plain;
use crate::h2_client::{self, H2};
use crate::world::{HOST, World};

struct H2App {
    port: u16,
    state: Arc<State>,
    _server: JoinSet<()>,
}

#[derive(Default)]
struct State {
    connections: AtomicU32,
    /// Heads, in the order they came in.
    requests: Mutex<Vec<(http::request::Parts, Vec<u8>)>>,
    /// Streams whose client gave them up.
    resets: AtomicU32,
}

impl H2App {
    async fn new() -> Self {
        let listener = TcpListener::bind("[::1]:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(State::default());
        let serving = Arc::clone(&state);
        let mut server = JoinSet::new();
        server.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                serving.connections.fetch_add(1, Ordering::SeqCst);
                connections.spawn(serve(stream, Arc::clone(&serving)));
            }
        });
        Self {
            port,
            state,
            _server: server,
        }
    }

    fn connections(&self) -> u32 {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// The value of a header of the request for a path.
    fn header(&self, path: &str, name: &str) -> Option<String> {
        let requests = self.state.requests.lock();
        let (head, _) = requests
            .iter()
            .find(|(head, _)| head.uri.path() == path)
            .unwrap();
        let mut all = head.headers.get_all(name).iter();
        let first = all.next().map(|v| v.to_str().unwrap().to_owned());
        assert_eq!(all.next(), None, "{name} more than once");
        first
    }
}

async fn serve(stream: TcpStream, state: Arc<State>) {
    let Ok(mut connection) = h2::server::handshake(stream).await else {
        return;
    };
    let mut streams = JoinSet::new();
    while let Some(Ok((request, respond))) = connection.accept().await {
        match request.uri().path() {
            "/goaway" => connection.graceful_shutdown(),
            "/vanish" => return,
            _ => {}
        }
        streams.spawn(answer(request, respond, Arc::clone(&state)));
    }
    while streams.join_next().await.is_some() {}
}

async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>, state: Arc<State>) {
    let (head, mut receive) = request.into_parts();
    let path = head.uri.path().to_owned();
    let nonce = head.headers.get("x-nonce").cloned();
    let nonce = nonce.map_or_else(String::new, |n| n.to_str().unwrap().to_owned());
    if path == "/held" {
        let _ = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
        state.resets.fetch_add(1, Ordering::SeqCst);
        return;
    }
    let mut body = Vec::new();
    while let Some(Ok(data)) = receive.data().await {
        receive.flow_control().release_capacity(data.len()).unwrap();
        body.extend_from_slice(&data);
    }
    let is_head = head.method == http::Method::HEAD;
    state.requests.lock().push((head, body.clone()));
    let reply = |status: u16| Response::builder().status(status).body(()).unwrap();
    let trailers = || {
        let mut map = HeaderMap::new();
        map.insert("grpc-status", "0".parse().unwrap());
        map.insert("grpc-message", nonce.parse().unwrap());
        map
    };
    match path.as_str() {
        "/grpc" => {
            let mut send = respond.send_response(reply(200), false).unwrap();
            if !is_head {
                send.send_data(body.into(), false).unwrap();
            }
            send.send_trailers(trailers()).unwrap();
        }
        "/trailers-only" => {
            let mut reply = reply(200);
            reply.headers_mut().extend(trailers());
            respond.send_response(reply, true).unwrap();
        }
        // An empty DATA frame ends what has no content.
        "/204-data" | "/304-data" | "/200-data" => {
            let status = path[1..4].parse().unwrap();
            let mut send = respond.send_response(reply(status), false).unwrap();
            send.send_data(Bytes::new(), true).unwrap();
        }
        "/204" | "/304" => {
            let status = path[1..4].parse().unwrap();
            respond.send_response(reply(status), true).unwrap();
        }
        "/reset" => respond.send_reset(Reason::REFUSED_STREAM),
        _ if is_head => {
            respond.send_response(reply(200), true).unwrap();
        }
        _ => {
            let body = format!("nonce={nonce};");
            let mut send = respond.send_response(reply(200), false).unwrap();
            send.send_data(body.into(), true).unwrap();
        }
    }
}

#[tokio::test]
async fn a_call_with_trailers_passes_over_http_2() {
    let app = H2App::new().await;
    let world = World::h2(app.port).await;
    let h2 = H2::new(&world).await;
    let calls = (0..100).map(|n| {
        let h2 = &h2;
        async move {
            let nonce = format!("call-{n}");
            let request = h2_client::request("POST", "/grpc", &nonce)
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .header("cookie", "a=1")
                .header("cookie", "b=2");
            let (reply, mut send) = h2.begin(request, false).await;
            send.send_data(Bytes::from(nonce.clone()), false).unwrap();
            send.send_data(Bytes::new(), true).unwrap();
            let answer = h2_client::whole(reply).await.unwrap();
            assert_eq!(
                (answer.status(), answer.body.as_str()),
                (200, nonce.as_str())
            );
            assert_eq!(
                answer.trailers,
                format!("grpc-status: 0\r\ngrpc-message: {nonce}\r\n")
            );
        }
    });
    join_all(calls).await;
    assert_eq!(app.state.requests.lock().len(), 100);
    assert_eq!(app.connections(), 1);
    assert_eq!(app.header("/grpc", "te").as_deref(), Some("trailers"));
    assert_eq!(app.header("/grpc", "cookie").as_deref(), Some("a=1; b=2"));
    {
        let requests = app.state.requests.lock();
        let uri = &requests[0].0.uri;
        assert_eq!(
            (uri.authority().unwrap().as_str(), uri.scheme_str()),
            (HOST, Some("https"))
        );
        assert_eq!(requests[0].0.headers.get("host"), None);
    }
}

/// What follows a head that has no content is the next answer's head.
async fn has_no_content(paths: &[(&str, u16)]) {
    let app = H2App::new().await;
    let world = World::h2(app.port).await;
    let mut client = plain(&world).await;
    for &(path, status) in paths {
        client.get(path, "n", "").await;
        let answer = client.answer().await;
        assert_eq!(answer.status(), status, "{path}: {answer:?}");
        client.get("/", "next", "").await;
        client.answer().await.is_for("next");
        let framing = (
            answer.header("content-length"),
            answer.header("transfer-encoding"),
        );
        assert_eq!(framing, (None, None), "{path}");
        client
            .send(format!("HEAD {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n").as_bytes())
            .await;
        client.head().await;
        client.get("/", "next", "").await;
        client.answer().await.is_for("next");
    }
}

#[tokio::test]
async fn an_answer_without_content_has_none_over_http_1() {
    has_no_content(&[("/204", 204), ("/304", 304)]).await;
}

/// Where an app ends them with an empty frame.
#[tokio::test]
async fn an_answer_with_an_empty_frame_has_no_content_over_http_1() {
    has_no_content(&[("/204-data", 204), ("/304-data", 304)]).await;
}

#[tokio::test]
async fn an_answer_to_head_has_no_content_over_http_1() {
    let app = H2App::new().await;
    let world = World::h2(app.port).await;
    let mut client = plain(&world).await;
    for path in ["/", "/200-data", "/trailers-only", "/grpc"] {
        client
            .send(format!("HEAD {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n").as_bytes())
            .await;
        client.head().await;
        client.get("/", "next", "").await;
        client.answer().await.is_for("next");
    }
}

#[tokio::test]
async fn an_answer_of_trailers_alone_passes() {
    let app = H2App::new().await;
    let world = World::h2(app.port).await;
    let answer = H2::new(&world).await.get("/trailers-only", "n").await;
    let status = (answer.header("grpc-status"), answer.header("grpc-message"));
    assert_eq!((status, answer.body.as_str()), ((Some("0"), Some("n")), ""));
}

#[tokio::test]
async fn streams_end_alone() {
    let app = H2App::new().await;
    let world = World::h2(app.port).await;
    let h2 = H2::new(&world).await;
    // A client that gives up.
    let (reply, mut send) = h2
        .begin(h2_client::request("GET", "/held", "n"), true)
        .await;
    h2.get("/", "beside").await.is_for("beside");
    send.send_reset(Reason::CANCEL);
    drop(reply);
    until("the app is told of a request given up", || {
        app.state.resets.load(Ordering::SeqCst) == 1
    })
    .await;
    // An app that does.
    assert_eq!(h2.get("/reset", "n").await.status(), 502);
    h2.get("/", "after").await.is_for("after");
    assert_eq!(app.connections(), 1);
    // One that says goodbye answers what it has, and is asked no more.
    h2.get("/goaway", "last").await.is_for("last");
    for _ in 0..3 {
        h2.get("/", "new").await.is_for("new");
    }
    assert_eq!(app.connections(), 2);
    // One that is gone without a word.
    assert_eq!(h2.get("/vanish", "n").await.status(), 502);
    h2.get("/", "again").await.is_for("again");
}

#[tokio::test]
async fn clients_of_http_1_share_an_apps_connection() {
    let app = H2App::new().await;
    let world = World::h2(app.port).await;
    let world = &world;
    let mut first = plain(world).await;
    first.get("/", "first", "").await;
    first.answer().await.is_for("first");
    let clients = (0..20).map(|c| async move {
        let mut client = plain(world).await;
        for n in 0..5 {
            let nonce = format!("{c}-{n}");
            let more = "TE: trailers\r\nTransfer-Encoding: chunked\r\n";
            client.get("/grpc", &nonce, more).await;
            client.send(b"5\r\nhello\r\n0\r\n\r\n").await;
            let answer = client.answer().await;
            assert_eq!(answer.body, "hello");
            assert_eq!(
                answer.trailers,
                format!("grpc-status: 0\r\ngrpc-message: {nonce}\r\n")
            );
        }
    });
    join_all(clients).await;
    assert_eq!(app.connections(), 1);
}
