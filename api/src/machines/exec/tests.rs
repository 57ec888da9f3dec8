use std::task::{Context, Poll};

use axum::body::Body;
use futures::stream;
use http::{Method, Request, StatusCode};
use tern_guest::ExecInput;
use tern_guest::message::TerminalSize;

use super::*;
use crate::gateway::GatewayError;
use crate::testing::{ADMIN, Answer, World};

/// A test that waits longer than this hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a guest is given, and what it says.
struct Guest {
    given: mpsc::UnboundedReceiver<ExecFeed>,
    says: mpsc::Sender<ExecOutput>,
}

impl Guest {
    /// The next command of this world is this guest's.
    fn of(world: &World) -> Self {
        let (give, given) = mpsc::unbounded_channel();
        let (says, mut said) = mpsc::channel(1);
        let inputs = futures::sink::unfold(give, async |give, fed| {
            let taken = give.send(fed);
            let taken = taken.map_err(|_| GatewayError::Failed("it has ended".into()));
            taken.map(|()| give)
        });
        let said = stream::poll_fn(move |cx| said.poll_recv(cx)).map(Ok);
        world.gateway.sessions.lock().push_back(ExecSession {
            inputs: Box::pin(inputs),
            outputs: said.boxed(),
        });
        Self { given, says }
    }

    async fn exits(&self, code: i32, signal: Option<i32>) {
        let status = ExitStatus {
            code,
            signal,
            oom_killed: false,
        };
        self.says.send(ExecOutput::Exit(status)).await.unwrap();
    }

    /// Waits until the command is ended from outside: nobody gives it anything, and nobody hears it.
    async fn until_it_ends(mut self) {
        let ended = async {
            self.says.closed().await;
            while self.given.recv().await.is_some() {}
        };
        tokio::time::timeout(PATIENCE, ended).await.unwrap();
    }
}

async fn world() -> (World, String) {
    let world = World::new().await;
    world.app("shop").await;
    let id = world.machine("shop").await;
    let path = format!("/v1/apps/shop/machines/{id}/exec");
    (world, path)
}

fn request(path: &str, body: Body) -> Request<Body> {
    Request::post(format!("{path}/stream"))
        .header("authorization", format!("Bearer {ADMIN}"))
        .body(body)
        .unwrap()
}

fn start(start: &ExecStart) -> Vec<u8> {
    let mut wire = Encoder::new();
    wire.json(start).unwrap();
    wire.take()
}

fn command(words: &[&str]) -> ExecStart {
    ExecStart {
        command: words.iter().map(|w| (*w).to_owned()).collect(),
        ..ExecStart::default()
    }
}

/// A body that is fed by a test.
fn fed() -> (mpsc::UnboundedSender<Result<Bytes, std::io::Error>>, Body) {
    let (feed, mut told) = mpsc::unbounded_channel();
    let body = stream::poll_fn(move |cx: &mut Context<'_>| -> Poll<_> { told.poll_recv(cx) });
    (feed, Body::from_stream(body))
}

/// All frames of an answer.
async fn frames(answer: Answer) -> Vec<Frame> {
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    let mut decoder = Decoder::new();
    decoder.feed(&answer.body);
    let frames = std::iter::from_fn(|| decoder.next_frame().unwrap()).collect();
    assert!(decoder.is_between_frames());
    frames
}

fn end(frames: &[Frame]) -> ExecEnd {
    frames.last().unwrap().parse().unwrap()
}

#[tokio::test]
async fn output_comes_byte_for_byte_and_then_how_it_ended() {
    let (world, path) = world().await;
    let guest = Guest::of(&world);
    let every: Vec<u8> = (0..=255).collect();
    let say = async {
        for byte in &every {
            let byte = Bytes::copy_from_slice(&[*byte]);
            guest.says.send(ExecOutput::Stdout(byte)).await.unwrap();
        }
        let all = every.clone().into();
        guest.says.send(ExecOutput::Stderr(all)).await.unwrap();
        guest.exits(139, Some(11)).await;
    };
    let call = world.send(request(&path, start(&command(&["x"])).into()));
    let (answer, ()) = tokio::join!(call, say);
    assert_eq!(answer.headers["content-type"], EXEC_MEDIA_TYPE);
    let frames = frames(answer).await;
    let of = |kind| {
        let of_kind = frames.iter().filter(move |f| f.kind == kind);
        of_kind.flat_map(|f| f.payload.clone()).collect::<Vec<_>>()
    };
    assert_eq!(of(FrameKind::Stdout), every);
    assert_eq!(of(FrameKind::Stderr), every);
    let exited = ExecEnd::Exited {
        exit_code: 139,
        exit_signal: Some(11),
        oom_killed: false,
    };
    assert_eq!(end(&frames), exited);
    guest.until_it_ends().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_the_command_up_and_one_that_goes_ends_it() {
    let (world, path) = world().await;
    let guest = Guest::of(&world);
    let answer = world
        .open(request(&path, start(&command(&["x"])).into()))
        .await;
    // Far more than is kept on the way; it is taken as far as there is room.
    let mut taken = 0;
    let chunk = ExecOutput::Stdout(Bytes::from_static(&[7; 1024]));
    while guest.says.try_send(chunk.clone()).is_ok() || taken < CHUNKS {
        taken += 1;
        assert!(taken < 64, "nothing holds it up");
        tokio::task::yield_now().await;
    }
    // Whoever reads on gets all of it.
    let mut body = answer.into_body().into_data_stream();
    for _ in 0..CHUNKS {
        body.next().await.unwrap().unwrap();
    }
    drop(body);
    guest.until_it_ends().await;
}

#[tokio::test]
async fn input_and_signals_arrive_until_the_client_breaks_off() {
    let (world, path) = world().await;
    let mut guest = Guest::of(&world);
    let (feed, body) = fed();
    let begin = ExecStart {
        stdin: true,
        ..command(&["x"])
    };
    feed.send(Ok(start(&begin).into())).unwrap();
    let answer = world.open(request(&path, body)).await;
    let size = ExecInput::Resize(TerminalSize { rows: 2, cols: 3 });
    let mut wire = Encoder::new();
    wire.raw(FrameKind::Stdin, &[0, 255]);
    wire.json(&size).unwrap();
    wire.raw(FrameKind::Stdin, &[]);
    // However it is cut on its way.
    for part in wire.wire().chunks(3) {
        feed.send(Ok(Bytes::copy_from_slice(part))).unwrap();
    }
    let expected = [
        ExecFeed::Stdin(Bytes::from_static(&[0, 255])),
        ExecFeed::Control(size),
        ExecFeed::Stdin(Bytes::new()),
    ];
    for expected in expected {
        assert_eq!(guest.given.recv().await, Some(expected));
    }
    feed.send(Err(std::io::Error::other("gone"))).unwrap();
    guest.until_it_ends().await;
    drop(answer);
}

#[tokio::test]
async fn the_end_of_the_request_is_the_end_of_the_input_and_not_of_the_command() {
    let (world, path) = world().await;
    let mut guest = Guest::of(&world);
    let answer = world
        .open(request(&path, start(&command(&["x"])).into()))
        .await;
    let given = guest.given.recv().await;
    assert_eq!(given, Some(ExecFeed::Stdin(Bytes::new())));
    guest.exits(0, None).await;
    let body = answer.into_body().into_data_stream();
    assert_eq!(body.count().await, 1);
}

#[tokio::test]
async fn a_command_that_takes_too_long_is_ended_whether_or_not_its_client_reads() {
    let (world, path) = world().await;
    let guest = Guest::of(&world);
    let begin = ExecStart {
        timeout: Some(1),
        ..command(&["x"])
    };
    let answer = world.open(request(&path, start(&begin).into())).await;
    guest.until_it_ends().await;
    let body = axum::body::to_bytes(answer.into_body(), usize::MAX).await;
    let mut decoder = Decoder::new();
    decoder.feed(&body.unwrap());
    let all: Vec<Frame> = std::iter::from_fn(|| decoder.next_frame().unwrap()).collect();
    let ExecEnd::Failed { error } = end(&all) else {
        panic!("{all:?}");
    };
    assert!(error.contains("within 1 s"), "{error}");
}

#[tokio::test]
async fn a_machine_that_goes_away_is_no_end() {
    let (world, path) = world().await;
    let guest = Guest::of(&world);
    drop(guest);
    let answer = world
        .send(request(&path, start(&command(&["x"])).into()))
        .await;
    let frames = frames(answer).await;
    assert!(matches!(end(&frames), ExecEnd::Failed { .. }), "{frames:?}");
    // And in one piece it is an error.
    drop(Guest::of(&world));
    let whole = world.post(&path, json!({"command": ["x"]})).await;
    assert_eq!(whole.status, StatusCode::BAD_GATEWAY, "{whole:?}");
}

#[tokio::test]
async fn what_is_no_request_is_refused_and_runs_nothing() {
    let (world, path) = world().await;
    let mut split = Encoder::new();
    split.raw(FrameKind::Stdin, b"x");
    let bodies: [&[u8]; 5] = [
        b"",
        b"{}",
        b"\x01\x02",
        split.wire(),
        &start(&ExecStart::default()),
    ];
    for body in bodies {
        let refused = world.send(request(&path, body.to_vec().into())).await;
        assert_eq!(refused.status, StatusCode::BAD_REQUEST, "{refused:?}");
    }
    let absent = start(&command(&["absent"]));
    let refused = world.send(request(&path, absent.into())).await;
    assert_eq!(refused.status, StatusCode::PRECONDITION_FAILED);
}

#[tokio::test]
async fn an_answer_in_one_piece_holds_all_or_is_an_error() {
    let (world, path) = world().await;
    for (length, status) in [
        (MAX_OUTPUT, StatusCode::OK),
        (MAX_OUTPUT + 1, StatusCode::UNPROCESSABLE_ENTITY),
    ] {
        let guest = Guest::of(&world);
        let say = async {
            let all = Bytes::from(vec![b'x'; length]);
            guest.says.send(ExecOutput::Stdout(all)).await.unwrap();
            // Which is too late for one that was ended.
            let _ = guest
                .says
                .send(ExecOutput::Exit(ExitStatus::default()))
                .await;
        };
        let call = world.post(&path, json!({"command": ["x"]}));
        let (answer, ()) = tokio::join!(call, say);
        assert_eq!(answer.status, status);
        if status == StatusCode::OK {
            assert_eq!(answer.json()["stdout"].as_str().unwrap().len(), length);
        } else {
            let error = answer.json()["error"].to_string();
            assert!(error.contains("exec/stream"), "{error}");
        }
        guest.until_it_ends().await;
    }
}

#[tokio::test]
async fn bytes_that_are_no_text_are_told_as_they_are_too() {
    let (world, path) = world().await;
    let guest = Guest::of(&world);
    let say = async {
        let bytes = Bytes::from_static(&[b'a', 0xff, 0]);
        guest.says.send(ExecOutput::Stdout(bytes)).await.unwrap();
        guest.exits(0, None).await;
    };
    let call = world.post(&path, json!({"command": ["x"]}));
    let (answer, ()) = tokio::join!(call, say);
    let answer = answer.json();
    assert_eq!(answer["stdout"], "a\u{fffd}\0");
    assert_eq!(answer["stdout_base64"], STANDARD.encode([b'a', 0xff, 0]));
    assert_eq!(answer["stderr_base64"], Value::Null);
}

#[tokio::test]
async fn other_methods_are_nothing_here() {
    let (world, path) = world().await;
    let answer = world
        .call(ADMIN, Method::GET, &format!("{path}/stream"), Body::empty())
        .await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
}
