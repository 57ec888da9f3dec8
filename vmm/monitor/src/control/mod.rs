//! The control API: HTTP/1.1 on a Unix socket.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/vm` | 200, [`crate::machine::Description`] |
//! | `POST /v1/vm/memory?limit_mib=N` | 204 when the guest has been asked |
//! | `POST /v1/vm/pause`, `/resume`, `/snapshot`, `/stop` | 204 when it is done |
//!
//! Errors are `{"error": "…"}` with 400, 404, 405, 409 or 500. The API has a thread and a small runtime of its
//! own, which the start of a guest does not wait for; what it is asked goes to the main thread, one
//! request after the other, and is answered when the main thread has done it.

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, StatusCode, Uri, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde_json::json;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use crate::jail::seccomp::{self, ThreadKind};
use crate::machine::Description;
use crate::run::Event;

/// What a client can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// What the Machine is and does.
    Describe,
    /// Stop moving.
    Pause,
    /// Go on.
    Resume,
    /// Write a snapshot.
    Snapshot,
    /// Have the guest use no more memory than this many MiB.
    LimitMemory(u32),
    /// Power off now.
    Stop,
}

/// A command and where its answer goes.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub command: Command,
    /// Where to say how it went.
    pub reply: Reply,
    /// Disconnected when the client has its answer, or is gone.
    pub answered: Receiver<Infallible>,
}

/// Where an answer goes. It is used once.
#[derive(Debug)]
pub struct Reply(oneshot::Sender<Result<Answer, ControlError>>);

/// How a command went.
#[derive(Debug)]
pub enum Answer {
    /// Well.
    Done,
    /// This is the Machine.
    Description(Description),
}

/// How a command went wrong.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// It makes no sense at all.
    #[error("{0}")]
    Invalid(String),
    /// It makes no sense in the state the Machine is in.
    #[error("{0}")]
    Conflict(String),
    /// It was tried.
    #[error("{0}")]
    Failed(String),
}

/// Why there is no API.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve the control API at {path}: {source}")]
pub struct SpawnError {
    path: PathBuf,
    source: io::Error,
}

/// Between the first and the last byte of a request's head; a local client needs microseconds.
const HEAD_PATIENCE: Duration = Duration::from_secs(10);
/// Requests have no bodies and few headers.
const MAX_HEAD_BYTES: usize = 16 << 10;

/// Blocks SIGTERM and SIGINT in this thread and those it starts, so that they wait for [`spawn`].
pub fn block_signals() -> io::Result<()> {
    Ok(signals().thread_block()?)
}

fn signals() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT].into_iter().collect()
}

/// The API's socket, which nobody answers at yet: whoever connects waits.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

/// Listens at `path`, in place of what was there.
pub fn bind(path: &Path) -> Result<Socket, SpawnError> {
    let listener = listen(path).map_err(|source| SpawnError {
        path: path.to_owned(),
        source,
    })?;
    Ok(Socket {
        listener,
        path: path.to_owned(),
    })
}

/// Serves the API from a thread of its own.
pub fn spawn(socket: Socket, events: Sender<Event>) -> Result<(), SpawnError> {
    let Socket { listener, path } = socket;
    let failed = |source| SpawnError { path, source };
    thread::Builder::new()
        .name("control".into())
        .stack_size(crate::THREAD_STACK_BYTES)
        .spawn(move || {
            let failure = events.clone();
            if let Err(error) = serve(listener, events) {
                let message = format!("the control API failed: {error}");
                let _ = failure.send(Event::ControlFailed(message));
            }
        })
        .map_err(failed)?;
    Ok(())
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    // Whoever may write to it owns the guest.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn serve(listener: UnixListener, events: Sender<Event>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let signals =
            SignalFd::with_flags(&signals(), SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        // SAFETY: the value owns its descriptor, returns the same one always, and closes it on drop.
        let signals = unsafe { AsyncFd::register(signals) }.map_err(io::Error::other)?;
        seccomp::confine(ThreadKind::Control);
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        tokio::spawn(serve_client(stream, events.clone()));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a control connection");
                        // Out of descriptors: some time for others to give theirs back.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                ready = signals.readable() => {
                    let mut ready = ready?;
                    if let Ok(Some(_)) = ready.get_inner().read_signal() {
                        let _ = events.send(Event::Terminated);
                    }
                    ready.clear_ready();
                }
            }
        }
    })
}

/// Serves one client to its end.
#[doc(hidden)] // public for the fuzzer
pub async fn serve_client(stream: tokio::net::UnixStream, events: Sender<Event>) {
    // Lives as long as the connection, whose end is the only sign that an answer has been written.
    let open = Arc::new(Mutex::new(Vec::new()));
    let service = service_fn(|request| {
        let (events, open) = (events.clone(), open.clone());
        async move { Ok::<_, Infallible>(handle(&request, &events, &open).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a control connection ended badly");
    }
}

type Response = hyper::Response<Full<Bytes>>;

async fn handle(
    request: &hyper::Request<Incoming>,
    events: &Sender<Event>,
    open: &Mutex<Vec<Sender<Infallible>>>,
) -> Response {
    let command = match route(request.method(), request.uri()) {
        Ok(command) => command,
        Err((status, message)) => return error(status, message),
    };
    let (reply, answer) = oneshot::channel();
    let (until_answered, answered) = channel();
    let request = Request {
        command,
        reply: Reply(reply),
        answered,
    };
    let sent = events.send(Event::Request(request));
    let gone = || error(StatusCode::SERVICE_UNAVAILABLE, "the monitor is ending");
    if sent.is_err() {
        return gone();
    }
    let mut response = match answer.await {
        Err(_) => gone(),
        Ok(Ok(Answer::Done)) => response(StatusCode::NO_CONTENT, Bytes::new()),
        Ok(Ok(Answer::Description(description))) => match serde_json::to_vec(&description) {
            Ok(body) => response(StatusCode::OK, body.into()),
            Err(cause) => error(StatusCode::INTERNAL_SERVER_ERROR, &cause.to_string()),
        },
        Ok(Err(ControlError::Invalid(message))) => error(StatusCode::BAD_REQUEST, &message),
        Ok(Err(ControlError::Conflict(message))) => error(StatusCode::CONFLICT, &message),
        Ok(Err(ControlError::Failed(message))) => {
            error(StatusCode::INTERNAL_SERVER_ERROR, &message)
        }
    };
    if command == Command::Stop {
        // The process ends when this answer has been written, which the connection's end tells.
        let close = header::HeaderValue::from_static("close");
        response.headers_mut().insert(header::CONNECTION, close);
        open.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(until_answered);
    }
    response
}

fn route(method: &Method, uri: &Uri) -> Result<Command, (StatusCode, &'static str)> {
    let (allowed, command) = match uri.path() {
        "/v1/vm/memory" if *method == Method::POST => {
            let limit = uri
                .query()
                .and_then(|query| query.strip_prefix("limit_mib="));
            let limit = limit.and_then(|mib| mib.parse().ok()).ok_or((
                StatusCode::BAD_REQUEST,
                "the query must be limit_mib= and a number of MiB",
            ))?;
            (Method::POST, Command::LimitMemory(limit))
        }
        "/v1/vm/memory" => (Method::POST, Command::LimitMemory(0)), // refused below, by its method
        "/v1/vm" => (Method::GET, Command::Describe),
        "/v1/vm/pause" => (Method::POST, Command::Pause),
        "/v1/vm/resume" => (Method::POST, Command::Resume),
        "/v1/vm/snapshot" => (Method::POST, Command::Snapshot),
        "/v1/vm/stop" => (Method::POST, Command::Stop),
        _ => return Err((StatusCode::NOT_FOUND, "no such path")),
    };
    if *method == allowed {
        Ok(command)
    } else {
        Err((
            StatusCode::METHOD_NOT_ALLOWED,
            "this path does not take this method",
        ))
    }
}

fn error(status: StatusCode, message: &str) -> Response {
    response(status, json!({ "error": message }).to_string().into())
}

fn response(status: StatusCode, body: Bytes) -> Response {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    if status != StatusCode::NO_CONTENT {
        let json = header::HeaderValue::from_static("application/json");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
    }
    response
}

impl Reply {
    /// Sends the answer; a client that has gone away does not get it.
    pub fn send(self, answer: Result<Answer, ControlError>) {
        let _ = self.0.send(answer);
    }
}
