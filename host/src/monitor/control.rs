//! The monitor's control API: HTTP/1.1 on a Unix socket, one connection per call.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use thiserror::Error;
use tokio::net::UnixStream;

/// What a monitor says of its virtual machine.
#[derive(Debug, Deserialize)]
pub(crate) struct VmState {
    /// `running` or `paused`.
    pub(crate) state: String,
    /// When its process began to run, in microseconds since 1970.
    #[serde(default)]
    pub(crate) started_unix_us: u64,
    /// How much of its memory the guest has been asked to use at most.
    #[serde(default)]
    pub(crate) memory_limit_mib: Option<u32>,
    /// Where the time of its start went: microseconds since then, by the phase that ended.
    #[serde(default)]
    pub(crate) boot: serde_json::Value,
}

/// Why a call failed.
#[derive(Debug, Error)]
pub(crate) enum ControlError {
    #[error("the monitor cannot be reached: {0}")]
    Connect(std::io::Error),
    #[error("the monitor did not answer {call} within {} ms", .limit.as_millis())]
    Late { call: String, limit: Duration },
    #[error("the monitor's answer to {call} broke off: {why}")]
    Broken { call: String, why: String },
    #[error("the monitor refused {call}: {message}")]
    Refused { call: String, message: String },
}

/// `GET /v1/vm`.
pub(crate) async fn describe(socket: &Path) -> Result<VmState, ControlError> {
    describe_within(socket, QUICK).await
}

/// The same of a monitor that may have other things to do before.
pub(crate) async fn describe_within(
    socket: &Path,
    limit: Duration,
) -> Result<VmState, ControlError> {
    let body = call(socket, Method::GET, "/v1/vm", limit).await?;
    serde_json::from_slice(&body).map_err(|e| ControlError::Broken {
        call: "GET /v1/vm".to_owned(),
        why: e.to_string(),
    })
}

/// Stops the vCPUs.
pub(crate) async fn pause(socket: &Path) -> Result<(), ControlError> {
    call(socket, Method::POST, "/v1/vm/pause", QUICK)
        .await
        .map(drop)
}

/// Lets them run again, as soon as the monitor has done all else that it was asked. The caller watches that it lives.
pub(crate) async fn resume(socket: &Path) -> Result<(), ControlError> {
    call(socket, Method::POST, "/v1/vm/resume", Duration::MAX)
        .await
        .map(drop)
}

/// Asks the guest to use no more than this of its memory.
pub(crate) async fn limit_memory(socket: &Path, mib: u32) -> Result<(), ControlError> {
    let path = format!("/v1/vm/memory?limit_mib={mib}");
    call(socket, Method::POST, &path, QUICK).await.map(drop)
}

/// Writes the snapshot of a paused virtual machine. That takes what its memory and the disk take: no time is too long
/// for all. The caller watches that the monitor lives.
pub(crate) async fn snapshot(socket: &Path) -> Result<(), ControlError> {
    call(socket, Method::POST, "/v1/vm/snapshot", Duration::MAX)
        .await
        .map(drop)
}

/// Powers it off.
pub(crate) async fn stop(socket: &Path) -> Result<(), ControlError> {
    call(socket, Method::POST, "/v1/vm/stop", QUICK)
        .await
        .map(drop)
}

async fn call(
    socket: &Path,
    method: Method,
    path: &str,
    limit: Duration,
) -> Result<Bytes, ControlError> {
    let name = format!("{method} {path}");
    match tokio::time::timeout(limit, exchange(socket, method, path, &name)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(ControlError::Late { call: name, limit }),
    }
}

async fn exchange(
    socket: &Path,
    method: Method,
    path: &str,
    name: &str,
) -> Result<Bytes, ControlError> {
    let broken = |why: String| ControlError::Broken {
        call: name.to_owned(),
        why,
    };
    let stream = UnixStream::connect(socket)
        .await
        .map_err(ControlError::Connect)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| broken(e.to_string()))?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "tern-vmm")
        .body(Empty::<Bytes>::new())
        .map_err(|e| broken(e.to_string()))?;
    let exchange = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await?;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>((status, body.to_bytes()))
    };
    // The connection is driven by this same call, so that nothing is left when it is dropped. Its
    // own end is no news: the exchange then fails, or is complete.
    let driver = async {
        let _ = connection.await;
        std::future::pending::<std::convert::Infallible>().await
    };
    let (status, body) = tokio::select! {
        outcome = exchange => outcome.map_err(|e| broken(e.to_string()))?,
        never = driver => match never {},
    };
    if status.is_success() {
        return Ok(body);
    }
    #[derive(Deserialize)]
    struct Refusal {
        error: String,
    }
    let message = serde_json::from_slice::<Refusal>(&body)
        .map_or_else(|_| status.to_string(), |refusal| refusal.error);
    Err(ControlError::Refused {
        call: name.to_owned(),
        message,
    })
}

/// Answers are some hundred bytes.
const MAX_ANSWER: usize = 256 * 1024;
/// What only flips a switch. The host may be busy, and emulated.
const QUICK: Duration = Duration::from_secs(10);
