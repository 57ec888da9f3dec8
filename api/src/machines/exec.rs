//! Commands in a running Machine: with an answer when all is over, or told as it comes.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use http::header::CONTENT_TYPE;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tern_guest::{Decoder, Encoder, ExitStatus, Frame, FrameKind};
use tokio::sync::mpsc;

use super::{At, find};
use crate::auth::Caller;
use crate::error::ApiError;
use crate::exec::{EXEC_MEDIA_TYPE, ExecEnd, ExecStart};
use crate::extract::{Json, Path};
use crate::gateway::{ExecFeed, ExecInputs, ExecOutput, ExecOutputs, ExecRequest, ExecSession};
use crate::server::Shared;

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_TIMEOUT: Duration = Duration::from_secs(3600);
/// Longest that a command may run whose output is told as it comes.
const MAX_STREAM: Duration = Duration::from_secs(24 * 3600);
/// Most bytes of either output that an answer in one piece holds.
const MAX_OUTPUT: usize = 4 << 20;
/// Longest wait for the first frame of a stream.
const START_TIME: Duration = Duration::from_secs(30);
/// Longest silence towards a client: shorter than proxies on the way have patience.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Frames that wait for a client: so that reading and sending go on beside each other.
const CHUNKS: usize = 4;

/// Both spellings of the command are in use: text, split into words as a shell would, and a list.
#[derive(Debug, Deserialize)]
pub struct Exec {
    cmd: Option<String>,
    command: Option<Vec<String>>,
    #[serde(default)]
    stdin: String,
    /// Seconds.
    timeout: Option<u64>,
}

/// `POST …/exec`: answered when the command has ended, with what it wrote as text.
///
/// An answer holds all of it or is an error. Bytes that are no UTF-8 are replaced in the text, and then the exact ones
/// are beside it as base64.
pub async fn exec(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    Json(exec): Json<Exec>,
) -> Result<Json<Value>, ApiError> {
    find(&shared.view.snapshot(), &caller, &at)?;
    let request = ExecRequest {
        command: words(exec.command.unwrap_or_default(), exec.cmd)?,
        stdin: !exec.stdin.is_empty(),
        tty: None,
    };
    let limit = exec
        .timeout
        .map_or(DEFAULT_TIMEOUT, Duration::from_secs)
        .min(MAX_TIMEOUT);
    let whole = async {
        let session = shared.gateway.exec(&at.id, request).await?;
        collect(session, exec.stdin.into()).await
    };
    // Dropped before its end, it ends the command.
    let (status, stdout, stderr) = tokio::time::timeout(limit, whole)
        .await
        .map_err(|_| ApiError::timeout(late(limit)))??;
    let mut answer = json!({"exit_code": status.code, "exit_signal": status.signal});
    for (name, bytes) in [("stdout", stdout), ("stderr", stderr)] {
        match String::from_utf8(bytes) {
            Ok(text) => answer[name] = text.into(),
            Err(error) => {
                answer[name] = String::from_utf8_lossy(error.as_bytes()).into();
                answer[format!("{name}_base64")] = STANDARD.encode(error.as_bytes()).into();
            }
        }
    }
    Ok(Json(answer))
}

/// `POST …/exec/stream`: as [`crate::exec`] says.
pub async fn exec_stream(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    body: Body,
) -> Result<Response, ApiError> {
    find(&shared.view.snapshot(), &caller, &at)?;
    let mut frames = Frames::of(body);
    let first = tokio::time::timeout(START_TIME, frames.next())
        .await
        .map_err(|_| ApiError::timeout("the first frame did not come"))?
        .map_err(ApiError::bad_request)?
        .ok_or_else(|| {
            ApiError::bad_request("there is no first frame, which says what is to be run")
        })?;
    let start: ExecStart = first
        .parse()
        .map_err(|e| ApiError::bad_request(format!("the first frame: {e}")))?;
    let limit = start
        .timeout
        .map_or(MAX_STREAM, Duration::from_secs)
        .min(MAX_STREAM);
    let request = ExecRequest {
        command: words(start.command, start.cmd)?,
        stdin: start.stdin,
        tty: start.tty,
    };
    let session = shared.gateway.exec(&at.id, request).await?;
    let (answer, told) = mpsc::channel(CHUNKS);
    tokio::spawn(pump(session, frames, answer, limit));
    let told = futures::stream::unfold(told, async |mut told| {
        let bytes = told.recv().await?;
        Some((Ok::<Bytes, Infallible>(bytes), told))
    });
    Ok(([(CONTENT_TYPE, EXEC_MEDIA_TYPE)], Body::from_stream(told)).into_response())
}

/// The command in either spelling.
fn words(list: Vec<String>, text: Option<String>) -> Result<Vec<String>, ApiError> {
    let command = match text {
        Some(text) if list.is_empty() => shlex::split(&text).ok_or_else(|| {
            ApiError::invalid(
                "`cmd` ends within a quote; close it, or give `command`, a list of words",
            )
        })?,
        _ => list,
    };
    if command.is_empty() {
        return Err(ApiError::bad_request(
            "give the command to run as `command`, a list of words",
        ));
    }
    Ok(command)
}

/// Gives a command its input, and returns how it ended and all that it wrote.
async fn collect(
    session: ExecSession,
    stdin: Bytes,
) -> Result<(ExitStatus, Vec<u8>, Vec<u8>), ApiError> {
    let ExecSession {
        mut inputs,
        mut outputs,
    } = session;
    let feed = async {
        if !stdin.is_empty() && inputs.send(ExecFeed::Stdin(stdin)).await.is_ok() {
            // A command may end without having read its input: only the output tells.
            let _ = inputs.send(ExecFeed::Stdin(Bytes::new())).await;
        }
        std::future::pending::<Infallible>().await
    };
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let listen = async {
        while let Some(output) = outputs.next().await {
            let (all, name, bytes) = match output? {
                ExecOutput::Exit(status) => return Ok(status),
                ExecOutput::Stdout(bytes) => (&mut stdout, "stdout", bytes),
                ExecOutput::Stderr(bytes) => (&mut stderr, "stderr", bytes),
            };
            if all.len() + bytes.len() > MAX_OUTPUT {
                return Err(ApiError::invalid(format!(
                    "the command wrote more than the {MAX_OUTPUT} bytes of {name} that one answer holds, and was ended; \
                     `tern machine exec` (POST …/exec/stream) has no such limit"
                )));
            }
            all.extend_from_slice(&bytes);
        }
        Err(ApiError::of_status(http::StatusCode::BAD_GATEWAY, GONE))
    };
    let status = tokio::select! {
        never = feed => match never {},
        status = listen => status?,
    };
    Ok((status, stdout, stderr))
}

/// Carries a command's input and output between its client and its Machine, until either has gone or it has ended.
///
/// The time limit is kept here and not by the answer's body: that is not asked for anything by a client that does not
/// read.
async fn pump(session: ExecSession, frames: Frames, answer: mpsc::Sender<Bytes>, limit: Duration) {
    let ExecSession { inputs, outputs } = session;
    let end = {
        let relay = relay(outputs, &answer);
        let feed = feed(frames, inputs);
        tokio::select! {
            end = relay => end,
            error = feed => ExecEnd::Failed { error },
            () = tokio::time::sleep(limit) => ExecEnd::Failed { error: late(limit) },
            () = answer.closed() => return,
        }
        // Both halves of the session are dropped here, which ends a command that has not ended.
    };
    // Where nobody listens any more there is nobody to tell.
    let _ = answer.send(message(&end)).await;
}

/// Passes on what the command says, as fast as it is taken.
async fn relay(mut outputs: ExecOutputs, answer: &mpsc::Sender<Bytes>) -> ExecEnd {
    let failed = |error: String| ExecEnd::Failed { error };
    loop {
        let (kind, bytes) = match tokio::time::timeout(HEARTBEAT, outputs.next()).await {
            Err(_) => (FrameKind::Stdout, Bytes::new()),
            Ok(Some(Ok(ExecOutput::Stdout(bytes)))) => (FrameKind::Stdout, bytes),
            Ok(Some(Ok(ExecOutput::Stderr(bytes)))) => (FrameKind::Stderr, bytes),
            Ok(Some(Ok(ExecOutput::Exit(status)))) => {
                return ExecEnd::Exited {
                    exit_code: status.code,
                    exit_signal: status.signal,
                    oom_killed: status.oom_killed,
                };
            }
            Ok(Some(Err(error))) => return failed(error.to_string()),
            Ok(None) => return failed(GONE.to_owned()),
        };
        let mut wire = Encoder::new();
        wire.raw(kind, &bytes);
        if answer.send(wire.take().into()).await.is_err() {
            return failed("the client went away".to_owned());
        }
    }
}

/// Gives the command what its client sends. Returns only where the client does not keep to the rules, or is gone: what
/// a command does not take goes nowhere.
async fn feed(mut frames: Frames, inputs: ExecInputs) -> String {
    let mut inputs = Some(inputs);
    loop {
        let input = match frames.next().await {
            Ok(Some(frame)) => match frame.kind {
                FrameKind::Stdin => ExecFeed::Stdin(frame.payload.into()),
                FrameKind::Json => match frame.parse() {
                    Ok(control) => ExecFeed::Control(control),
                    Err(error) => return error.to_string(),
                },
                FrameKind::Stdout | FrameKind::Stderr => {
                    return "a client has input, and no output".to_owned();
                }
            },
            Ok(None) => {
                if let Some(inputs) = &mut inputs {
                    // As above, only the output tells.
                    let _ = inputs.send(ExecFeed::Stdin(Bytes::new())).await;
                }
                // The input side is kept: its closing is the wish to end the command.
                return std::future::pending().await;
            }
            Err(error) => return error,
        };
        if let Some(open) = &mut inputs
            && open.send(input).await.is_err()
        {
            inputs = None;
        }
    }
}

/// The frames of a request.
struct Frames {
    body: BodyDataStream,
    decoder: Decoder,
}

impl Frames {
    fn of(body: Body) -> Self {
        Self {
            body: body.into_data_stream(),
            decoder: Decoder::new(),
        }
    }

    /// The next one; `None` at the end. May be dropped.
    async fn next(&mut self) -> Result<Option<Frame>, String> {
        loop {
            if let Some(frame) = self.decoder.next_frame().map_err(|e| e.to_string())? {
                return Ok(Some(frame));
            }
            match self.body.next().await {
                Some(Ok(bytes)) => self.decoder.feed(&bytes),
                Some(Err(error)) => return Err(format!("the request broke off: {error}")),
                None if self.decoder.is_between_frames() => return Ok(None),
                None => return Err("the request ends within a frame".to_owned()),
            }
        }
    }
}

/// A message as a frame.
fn message(message: &impl Serialize) -> Bytes {
    let mut wire = Encoder::new();
    if let Err(error) = wire.json(message) {
        // Only an error text could be too long for a frame; without an end the client takes it as broken off.
        tracing::warn!(%error, "the end of a command cannot be told");
    }
    wire.take().into()
}

fn late(limit: Duration) -> String {
    format!("the command did not end within {} s", limit.as_secs())
}

const GONE: &str = "the Machine went away before the command ended";

#[cfg(test)]
mod tests;
