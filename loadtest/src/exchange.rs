//! One request and its answer, timed; and the ways in which it can fail.

use std::error::Error;
use std::fmt;
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::Serialize;

use crate::args::Common;
use crate::target::{Connection, Target};

/// Bytes of a body that are looked at for the expected text.
const LOOKED_AT: usize = 64 << 10;
/// Longest error text kept.
const MAX_DETAIL: usize = 200;

/// An answer as it was hoped for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// From sending the request to the answer's first bytes.
    pub first_byte: Duration,
    /// From the moment the request was meant to be sent to the answer's first bytes.
    pub from_start: Duration,
    /// From the same moment to the answer's end.
    pub total: Duration,
}

/// What went wrong, coarsely.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The host could not be resolved or connected to.
    Connect,
    /// The TLS handshake failed.
    Tls,
    /// It took too long.
    Timeout,
    /// The connection ended, or was no HTTP, before the answer began.
    NoAnswer,
    /// The answer began, but did not end as announced.
    BrokenAnswer,
    /// Another status than expected.
    Status,
    /// Another body than expected.
    Body,
    /// It was not sent: too many were under way.
    NotSent,
}

/// Why there is no [`Answer`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The class.
    pub kind: FailureKind,
    /// The error, with its causes.
    pub detail: String,
    /// The status, if there was one.
    pub status: Option<u16>,
}

impl Failure {
    /// A failure for an error.
    pub fn new(kind: FailureKind, error: &dyn Error) -> Self {
        let mut detail = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let cause_text = cause.to_string();
            if !detail.contains(&cause_text) {
                detail = format!("{detail}: {cause_text}");
            }
            source = cause.source();
        }
        Self {
            kind,
            detail: detail.chars().take(MAX_DETAIL).collect(),
            status: None,
        }
    }

    /// A failure that needs no more words.
    pub fn plain(kind: FailureKind, detail: impl fmt::Display) -> Self {
        Self {
            kind,
            detail: detail.to_string(),
            status: None,
        }
    }
}

/// What counts as an answer, and how long one may take.
#[derive(Debug, Clone)]
pub struct Expectation {
    status: Option<u16>,
    body: Option<String>,
    /// From the intended start to the answer's end.
    pub timeout: Duration,
}

impl Expectation {
    /// What the command line expects.
    pub fn new(common: &Common) -> Self {
        Self {
            status: common.expect_status,
            body: common.expect_body.clone(),
            timeout: common.timeout,
        }
    }

    fn accepts(&self, status: u16) -> bool {
        match self.status {
            Some(expected) => status == expected,
            None => (200..400).contains(&status),
        }
    }
}

/// Connects within the time allowed.
pub async fn connect(target: &Target, timeout: Duration) -> Result<Connection, Failure> {
    tokio::time::timeout(timeout, target.connect())
        .await
        .unwrap_or_else(|_| {
            Err(Failure::plain(
                FailureKind::Timeout,
                "connecting took too long",
            ))
        })
}

/// Sends the target's request on `connection` and reads the whole answer. `intended` is when it was
/// meant to be sent.
pub async fn exchange(
    target: &Target,
    connection: &mut Connection,
    expected: &Expectation,
    intended: Instant,
) -> Result<Answer, Failure> {
    let deadline = tokio::time::Instant::from_std(intended + expected.timeout);
    tokio::time::timeout_at(deadline, ask(target, connection, expected, intended))
        .await
        .unwrap_or_else(|_| {
            Err(Failure::plain(
                FailureKind::Timeout,
                "no whole answer in time",
            ))
        })
}

async fn ask(
    target: &Target,
    connection: &mut Connection,
    expected: &Expectation,
    intended: Instant,
) -> Result<Answer, Failure> {
    let request = target
        .request()
        .map_err(|error| Failure::plain(FailureKind::NotSent, format_args!("{error:#}")))?;
    let sent = Instant::now();
    let response = connection
        .send(request)
        .await
        .map_err(|error| Failure::new(FailureKind::NoAnswer, &error))?;
    let first = Instant::now();
    let status = response.status().as_u16();
    let body = read(response.into_body()).await;
    let failed = |mut failure: Failure| {
        failure.status = Some(status);
        failure
    };
    let body = body.map_err(|e| failed(Failure::new(FailureKind::BrokenAnswer, &e)))?;
    if !expected.accepts(status) {
        let detail = format!("status {status}");
        return Err(failed(Failure::plain(FailureKind::Status, detail)));
    }
    if let Some(text) = &expected.body
        && !String::from_utf8_lossy(&body).contains(text)
    {
        return Err(failed(Failure::plain(
            FailureKind::Body,
            "the expected text is not in it",
        )));
    }
    Ok(Answer {
        status,
        first_byte: first - sent,
        from_start: first.saturating_duration_since(intended),
        total: intended.elapsed(),
    })
}

/// Reads a body to its end and keeps its beginning.
async fn read(mut body: Incoming) -> Result<Vec<u8>, hyper::Error> {
    let mut kept = Vec::new();
    while let Some(frame) = body.frame().await {
        if let Some(data) = frame?.data_ref() {
            let room = LOOKED_AT - kept.len();
            kept.extend_from_slice(&data[..data.len().min(room)]);
        }
    }
    Ok(kept)
}
