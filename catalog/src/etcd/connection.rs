//! One HTTP/2 connection to one member, and gRPC over it: a call is a POST whose body is messages, each
//! behind five bytes of flag and length, and whose outcome is in the trailers.

use std::convert::Infallible;
use std::error::Error as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, Request, Response, Uri};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;

use super::messages::{AuthenticateRequest, AuthenticateResponse, Empty, StatusResponse};

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Longest message that is taken: a page of [`super::PAGE_KEYS`] entries of the longest values.
const MAX_MESSAGE: usize = 160 << 20;
/// Commands that wait to be sent on a stream; a watch sends one a second.
const COMMANDS: usize = 4;

/// A connection that has been found to serve.
pub(super) struct Connection {
    send: SendRequest<Body>,
    /// `scheme://authority`, without a trailing slash.
    pub(super) member: String,
    token: Option<String>,
    /// Whether this version of etcd tells progress only of what it has sent.
    pub(super) progress_is_proof: bool,
    /// When it was begun.
    pub(super) opened: Instant,
    /// Whether a call over it has been answered since it stands.
    served: AtomicBool,
    /// True once another has its place.
    replaced: watch::Sender<bool>,
    driver: AbortHandle,
}

/// How long a call may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limit {
    /// Until the answer begins, and from each part of it to the next.
    pub(super) silence: Duration,
    /// In all.
    pub(super) whole: Duration,
}

/// Why a call has no answer.
#[derive(Debug, Clone)]
pub(super) enum CallError {
    /// The member's own word: a gRPC status code and its text.
    Status(u32, String),
    /// The connection failed or the time was up after it was sent.
    Lost(String),
    /// The member has certainly not begun with it.
    NotSent(String),
}

/// A call whose answers come one by one.
pub(super) struct Stream {
    commands: mpsc::Sender<Bytes>,
    body: Incoming,
    read: BytesMut,
}

impl Connection {
    /// Connects, logs in, and sees that the member is part of a cluster that works.
    pub(super) async fn open(
        member: &Uri,
        tls: Option<TlsConnector>,
        login: Option<(String, String)>,
        limit: Duration,
    ) -> Result<Self, String> {
        let opened = Instant::now();
        let host = member.host().ok_or("it has no host")?;
        let plain_host = host.trim_start_matches('[').trim_end_matches(']');
        let port = member.port_u16().unwrap_or(2379);
        let tcp = TcpStream::connect((plain_host, port))
            .await
            .map_err(|e| e.to_string())?;
        tcp.set_nodelay(true).map_err(|e| e.to_string())?;
        let member = format!("{}://{host}:{port}", member.scheme_str().unwrap_or("https"));
        let (send, driver) = match tls {
            None => start(tcp).await?,
            Some(tls) => {
                let name = rustls::pki_types::ServerName::try_from(plain_host.to_owned())
                    .map_err(|e| e.to_string())?;
                start(tls.connect(name, tcp).await.map_err(|e| e.to_string())?).await?
            }
        };
        let mut connection = Self {
            send,
            member,
            token: None,
            progress_is_proof: false,
            opened,
            served: AtomicBool::new(false),
            replaced: watch::Sender::new(false),
            driver,
        };
        let told = |e: CallError| e.to_string();
        let limit = Limit::whole(limit);
        if let Some((name, password)) = login {
            let request = AuthenticateRequest { name, password };
            let answer: AuthenticateResponse = connection
                .unary("Auth/Authenticate", &request, limit)
                .await
                .map_err(told)?;
            connection.token = Some(answer.token);
        }
        let status: StatusResponse = connection
            .unary("Maintenance/Status", &Empty {}, limit)
            .await
            .map_err(told)?;
        connection.progress_is_proof = progress_is_proof(&status.version);
        connection.served.store(false, Ordering::Relaxed);
        Ok(connection)
    }

    /// Whether nothing can be sent on it any more.
    pub(super) fn is_closed(&self) -> bool {
        self.send.is_closed()
    }

    /// Whether it has served since it was opened.
    pub(super) fn has_served(&self) -> bool {
        self.served.load(Ordering::Relaxed)
    }

    /// Tells those who live on it that another has its place.
    pub(super) fn replace(&self) {
        self.replaced.send_replace(true);
    }

    /// Returns when another has its place.
    pub(super) async fn replaced(&self) {
        // The sender is as old as we are.
        let _ = self
            .replaced
            .subscribe()
            .wait_for(|replaced| *replaced)
            .await;
    }

    /// A call with one question and one answer.
    pub(super) async fn unary<A: Message + Default>(
        &self,
        method: &str,
        question: &impl Message,
        limit: Limit,
    ) -> Result<A, CallError> {
        let call = async {
            let body = Full::new(framed(question)).boxed_unsync();
            let request = self.request(method, body, Some(limit.whole))?;
            let mut send = self.send.clone();
            let sent = limit.part(send.send_request(request)).await?;
            let response = sent.map_err(unsent)?;
            let mut body = ok(response)?.into_body();
            let mut read = BytesMut::new();
            // As long as it comes, the member is well and the way to it is slow.
            while let Some(frame) = limit.part(body.frame()).await? {
                match frame.map_err(lost)?.into_data() {
                    Ok(data) if read.len() + data.len() > MAX_MESSAGE => {
                        return Err(CallError::Lost("an answer is too long".to_owned()));
                    }
                    Ok(data) => read.extend_from_slice(&data),
                    Err(frame) => {
                        if let Some(trailers) = frame.trailers_ref() {
                            status(trailers)?;
                        }
                    }
                }
            }
            next_message(&mut read)?
                .ok_or_else(|| CallError::Lost("an answer was cut off".to_owned()))
        };
        let answer = match tokio::time::timeout(limit.whole, call).await {
            Ok(outcome) => outcome?,
            Err(_) => return Err(late(limit.whole)),
        };
        self.served.store(true, Ordering::Relaxed);
        Ok(answer)
    }

    /// A call that goes on: the first question is sent, more can be.
    pub(super) async fn stream(
        &self,
        method: &str,
        first: &impl Message,
        limit: Duration,
    ) -> Result<Stream, CallError> {
        let (commands, queue) = mpsc::channel(COMMANDS);
        commands
            .try_send(framed(first))
            .map_err(|e| CallError::Lost(e.to_string()))?;
        let frames = futures::stream::unfold(queue, |mut queue: mpsc::Receiver<Bytes>| async {
            let frame = queue.recv().await?;
            Some((Ok(Frame::data(frame)), queue))
        });
        let request = self.request(method, StreamBody::new(frames).boxed_unsync(), None)?;
        let sent = self.send.clone();
        let sent = async move { sent.clone().send_request(request).await };
        let response = match tokio::time::timeout(limit, sent).await {
            Ok(response) => ok(response.map_err(unsent)?)?,
            Err(_) => return Err(late(limit)),
        };
        Ok(Stream {
            commands,
            body: response.into_body(),
            read: BytesMut::new(),
        })
    }

    fn request(
        &self,
        method: &str,
        body: Body,
        limit: Option<Duration>,
    ) -> Result<Request<Body>, CallError> {
        let mut request = Request::post(format!("{}/etcdserverpb.{method}", self.member))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        if !method.starts_with("Maintenance/") {
            // A member without a leader refuses at once, and ends a watch, rather than showing its own past.
            request = request.header("hasleader", "true");
        }
        if let Some(limit) = limit {
            request = request.header("grpc-timeout", format!("{}m", limit.as_millis()));
        }
        if let Some(token) = &self.token {
            request = request.header("token", token);
        }
        request
            .body(body)
            .map_err(|e| CallError::Lost(e.to_string()))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Stream {
    /// Sends another question; false where the stream has ended or does not take it.
    pub(super) fn send(&self, question: &impl Message) -> bool {
        self.commands.try_send(framed(question)).is_ok()
    }

    /// The next answer. Cancelling it loses nothing.
    pub(super) async fn next<A: Message + Default>(&mut self) -> Result<A, CallError> {
        loop {
            if let Some(message) = next_message(&mut self.read)? {
                return Ok(message);
            }
            let frame = match self.body.frame().await {
                Some(frame) => frame.map_err(lost)?,
                None => return Err(CallError::Lost("the stream has ended".to_owned())),
            };
            match frame.into_data() {
                Ok(data) => self.read.extend_from_slice(&data),
                Err(frame) => {
                    if let Some(trailers) = frame.trailers_ref() {
                        status(trailers)?;
                    }
                }
            }
        }
    }
}

impl Limit {
    /// One for answers that come in one piece.
    pub(super) fn whole(whole: Duration) -> Self {
        Self {
            silence: whole,
            whole,
        }
    }

    /// Waits for a part of the answer.
    async fn part<T>(&self, part: impl Future<Output = T>) -> Result<T, CallError> {
        let part = tokio::time::timeout(self.silence, part).await;
        part.map_err(|_| late(self.silence))
    }
}

impl std::fmt::Display for CallError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Status(code, text) => write!(f, "{text} (gRPC {code})"),
            Self::Lost(text) | Self::NotSent(text) => f.write_str(text),
        }
    }
}

async fn start<T>(transport: T) -> Result<(SendRequest<Body>, AbortHandle), String>
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (send, connection) = http2::Builder::new(TokioExecutor::new())
        .handshake(TokioIo::new(transport))
        .await
        .map_err(|e| e.to_string())?;
    let driver = tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to etcd ended");
        }
    });
    Ok((send, driver.abort_handle()))
}

/// A client of etcd, by rustls with ring, for servers that this authority has vouched for.
pub(super) fn connector(
    authority: &[u8],
    identity: Option<(&[u8], &[u8])>,
) -> Result<TlsConnector, String> {
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};

    let certificates = |pem: &[u8]| {
        let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
        all.map_err(|e| format!("a certificate cannot be read: {e}"))
    };
    let mut roots = rustls::RootCertStore::empty();
    for root in certificates(authority)? {
        roots.add(root).map_err(|e| e.to_string())?;
    }
    if roots.is_empty() {
        return Err("the authority's file has no certificate".to_owned());
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots);
    let mut config = match identity {
        None => config.with_no_client_auth(),
        Some((chain, key)) => {
            let key = PrivateKeyDer::from_pem_slice(key)
                .map_err(|e| format!("the private key cannot be read: {e}"))?;
            config
                .with_client_auth_cert(certificates(chain)?, key)
                .map_err(|e| e.to_string())?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

fn late(limit: Duration) -> CallError {
    CallError::Lost(format!("no answer within {limit:?}"))
}

fn lost(error: hyper::Error) -> CallError {
    CallError::Lost(error.to_string())
}

/// Of a request that has no answer: hyper gives back what it had not sent yet, and a member that ends refuses
/// what it has not begun with (RFC 9113, section 8.7).
fn unsent(error: hyper::Error) -> CallError {
    let cause = error.source().and_then(|e| e.downcast_ref::<h2::Error>());
    let refused = cause.is_some_and(|e| e.reason() == Some(h2::Reason::REFUSED_STREAM));
    match refused || error.is_canceled() {
        true => CallError::NotSent(error.to_string()),
        false => lost(error),
    }
}

/// A response that may have a body; one that failed before any says so in its head.
fn ok(response: Response<Incoming>) -> Result<Response<Incoming>, CallError> {
    if !response.status().is_success() {
        return Err(CallError::Lost(format!(
            "HTTP status {}",
            response.status()
        )));
    }
    status(response.headers())?;
    Ok(response)
}

fn status(headers: &HeaderMap) -> Result<(), CallError> {
    let text = |name| headers.get(name).and_then(|v| v.to_str().ok());
    match text("grpc-status").map(str::parse::<u32>) {
        None | Some(Ok(0)) => Ok(()),
        Some(code) => Err(CallError::Status(
            code.unwrap_or(2),
            text("grpc-message").unwrap_or("no reason given").to_owned(),
        )),
    }
}

pub(super) fn framed(message: &impl Message) -> Bytes {
    let mut frame = BytesMut::with_capacity(5 + message.encoded_len());
    frame.put_u8(0);
    // Requests are bounded far below (`crate::limits`).
    frame.put_u32(message.encoded_len() as u32);
    frame.extend_from_slice(&message.encode_to_vec());
    frame.freeze()
}

/// Takes a message off the front, where there is a whole one.
pub(super) fn next_message<A: Message + Default>(
    read: &mut BytesMut,
) -> Result<Option<A>, CallError> {
    let Some((head, rest)) = read.split_first_chunk::<5>() else {
        return Ok(None);
    };
    let [flag, length @ ..] = *head;
    let length = u32::from_be_bytes(length) as usize;
    if flag != 0 || length > MAX_MESSAGE {
        return Err(CallError::Lost(format!(
            "a message of {length} bytes (flag {flag}) is not taken"
        )));
    }
    if rest.len() < length {
        return Ok(None);
    }
    read.advance(5);
    let message = A::decode(read.split_to(length));
    message
        .map(Some)
        .map_err(|e| CallError::Lost(e.to_string()))
}

/// Earlier ones answer a progress request though events before it are still to be sent (etcd issues 15220
/// and 17507, mended in 3.4.31 and 3.5.13).
fn progress_is_proof(version: &str) -> bool {
    let mut numbers = version
        .split(['.', '-'])
        .map_while(|part| part.parse::<u32>().ok());
    let (major, minor, patch) = (numbers.next(), numbers.next(), numbers.next());
    match (major, minor, patch) {
        (Some(3), Some(4), Some(patch)) => patch >= 31,
        (Some(3), Some(5), Some(patch)) => patch >= 13,
        (Some(3), Some(minor), Some(_)) => minor > 5,
        (Some(major), ..) => major > 3,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_whose_progress_is_proof() {
        for good in ["3.4.31", "3.4.40", "3.5.13", "3.6.0", "3.6.0-rc.1", "4.0.0"] {
            assert!(progress_is_proof(good), "{good}");
        }
        for bad in ["3.4.23", "3.4.30", "3.5.0", "3.5.12", "2.3.8", "", "next"] {
            assert!(!progress_is_proof(bad), "{bad}");
        }
    }

    #[test]
    fn messages_are_found_however_they_are_cut() {
        let sent = StatusResponse {
            version: "3.4.23".to_owned(),
        };
        let frame = framed(&sent);
        let twice = [&frame[..], &frame[..]].concat();
        let mut read = BytesMut::new();
        let mut found = Vec::new();
        for byte in twice {
            read.put_u8(byte);
            found.extend(next_message::<StatusResponse>(&mut read).unwrap());
        }
        assert_eq!(found, [sent.clone(), sent]);
        let mut compressed = BytesMut::from(&[1, 0, 0, 0, 0][..]);
        assert!(next_message::<StatusResponse>(&mut compressed).is_err());
        let mut endless = BytesMut::from(&[0, 255, 255, 255, 255][..]);
        assert!(next_message::<StatusResponse>(&mut endless).is_err());
    }
}
