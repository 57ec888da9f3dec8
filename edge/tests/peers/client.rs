//! Clients that send exactly these bytes, and read answers by the letter.

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::app::field;
use crate::world::{HOST, World};

/// Longest that anything here may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// An answer, its body whole and out of its chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub head: String,
    pub body: String,
    /// What came between the last chunk and the end.
    pub trailers: String,
}

impl Answer {
    pub fn status(&self) -> u16 {
        let status = self.head.split(' ').nth(1).unwrap_or_default();
        status.parse().unwrap_or_else(|_| panic!("{self:?}"))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        field(&self.head, name)
    }

    /// 200, for the request with this nonce, and nothing more.
    #[track_caller]
    pub fn is_for(&self, nonce: &str) {
        assert_eq!(self.status(), 200, "{self:?}");
        assert_eq!(self.body, format!("nonce={nonce};"), "{self:?}");
    }
}

/// A connection, of any kind, and what has been read of it too soon.
pub struct Client<S> {
    pub stream: S,
    ahead: Vec<u8>,
}

pub async fn plain(world: &World) -> Client<TcpStream> {
    let stream = TcpStream::connect(world.http).await.unwrap();
    stream.set_nodelay(true).unwrap();
    Client::new(stream)
}

/// Over TLS, and HTTP/1.1.
pub async fn tls(world: &World) -> Client<TlsStream<TcpStream>> {
    Client::new(tls_with(world, b"http/1.1").await)
}

/// Over TLS, with a protocol agreed on.
pub async fn tls_with(world: &World, alpn: &[u8]) -> TlsStream<TcpStream> {
    let stream = TcpStream::connect(world.https).await.unwrap();
    let stream = secure(world, stream, &[alpn]).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(alpn));
    stream
}

/// TLS over a connection, with protocols offered.
pub async fn secure(
    world: &World,
    stream: TcpStream,
    alpn: &[&[u8]],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(world.certificate.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    stream.set_nodelay(true)?;
    let name = ServerName::try_from(HOST).unwrap();
    TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            ahead: Vec::new(),
        }
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    /// A request with a nonce and perhaps more headers, each with its CRLF.
    pub async fn get(&mut self, path: &str, nonce: &str, more: &str) {
        self.send(get(path, nonce, more).as_bytes()).await;
    }

    /// The next answer, with interim ones before it as answers of their own.
    pub async fn answer(&mut self) -> Answer {
        self.answer_or_end().await.expect("an answer")
    }

    /// The next answer, or none where the connection ends.
    pub async fn answer_or_end(&mut self) -> Option<Answer> {
        let Some(head) = self.until(b"\r\n\r\n").await else {
            let rest = String::from_utf8_lossy(&self.ahead);
            assert!(rest.is_empty(), "the end comes within a head: {rest:?}");
            return None;
        };
        let head = String::from_utf8(head).unwrap();
        let mut answer = Answer {
            head,
            body: String::new(),
            trailers: String::new(),
        };
        let status = answer.status();
        if status < 200 || status == 204 || status == 304 {
            return Some(answer);
        }
        let chunked = answer.header("transfer-encoding") == Some("chunked");
        let body = if chunked {
            let (body, trailers) = self.chunks().await;
            answer.trailers = trailers;
            body
        } else if let Some(length) = answer.header("content-length") {
            self.exactly(length.parse().unwrap()).await
        } else {
            self.rest().await
        };
        answer.body = String::from_utf8_lossy(&body).into_owned();
        Some(answer)
    }

    async fn chunks(&mut self) -> (Vec<u8>, String) {
        let mut body = Vec::new();
        loop {
            let line = self.until(b"\r\n").await.expect("a chunk");
            let size = std::str::from_utf8(&line[..line.len() - 2]).unwrap();
            let size = usize::from_str_radix(size, 16).unwrap_or_else(|_| panic!("{size:?}"));
            if size == 0 {
                break;
            }
            body.extend(self.exactly(size).await);
            assert_eq!(self.exactly(2).await, b"\r\n");
        }
        let mut trailers = String::new();
        loop {
            let line = self.until(b"\r\n").await.expect("the last chunk's end");
            if line == b"\r\n" {
                return (body, trailers);
            }
            trailers += std::str::from_utf8(&line).unwrap();
        }
    }

    /// The next head, whatever follows it.
    pub async fn head(&mut self) -> String {
        let head = self.until(b"\r\n\r\n").await.expect("a head");
        String::from_utf8(head).unwrap()
    }

    /// Everything up to the end.
    pub async fn rest(&mut self) -> Vec<u8> {
        while self.more().await {}
        std::mem::take(&mut self.ahead)
    }

    /// Nothing comes any more but the end.
    pub async fn ends(&mut self) {
        let rest = self.rest().await;
        assert!(rest.is_empty(), "{:?}", String::from_utf8_lossy(&rest));
    }

    pub async fn exactly(&mut self, n: usize) -> Vec<u8> {
        while self.ahead.len() < n {
            assert!(
                self.more().await,
                "it ends early: {:?}",
                String::from_utf8_lossy(&self.ahead)
            );
        }
        self.ahead.drain(..n).collect()
    }

    /// Up to and with these bytes; none where the end comes first.
    async fn until(&mut self, what: &[u8]) -> Option<Vec<u8>> {
        loop {
            if let Some(at) = crate::app::find(&self.ahead, what) {
                return Some(self.ahead.drain(..at + what.len()).collect());
            }
            if !self.more().await {
                return None;
            }
        }
    }

    /// A reset counts as an end: what was sent before it may be lost, and is looked for by who needs it.
    async fn more(&mut self) -> bool {
        let read = timeout(PATIENCE, self.stream.read_buf(&mut self.ahead)).await;
        let so_far = String::from_utf8_lossy(&self.ahead);
        read.unwrap_or_else(|_| panic!("nothing comes for a minute, after {so_far:?}"))
            .is_ok_and(|n| n > 0)
    }
}

/// A request's bytes.
pub fn get(path: &str, nonce: &str, more: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {HOST}\r\nX-Nonce: {nonce}\r\n{more}\r\n")
}
