//! Listeners: accept, end TLS, hand the stream to pingora.
//!
//! pingora's own listeners cannot offer `h2`, `http/1.1` and `acme-tls/1` together, nor set tickets.

use std::cell::Cell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pingora_core::apps::ServerApp;
use pingora_core::listeners::tls::Acceptor;
use pingora_core::protocols::l4::stream::Stream as L4Stream;
use pingora_core::protocols::{ALPN, GetSocketDigest as _, SocketDigest, Ssl as _, Stream};
use pingora_proxy::HttpProxy;
use rustls::ServerConfig;
use rustls::server::ResolvesServerCert;
use std::os::fd::AsRawFd as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use crate::ingress::Ingress;
use crate::metrics::Metrics;

/// A listener's proxy, and TLS where it ends it.
#[derive(Clone)]
pub struct Entry {
    pub proxy: Arc<HttpProxy<Ingress>>,
    pub tls: Option<Arc<Acceptor>>,
    pub metrics: Arc<Metrics>,
    pub connections: TaskTracker,
    /// Becomes true when the edge is to end.
    pub ending: watch::Receiver<bool>,
}

/// RFC 8737.
const ACME: &[u8] = b"acme-tls/1";
/// Connections of one listener at once.
const MAX_CONNECTIONS: usize = 16_384;
/// Longest a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Longest a connection may take to send a request's head, the pause before it included. A total, so that
/// a client that sends a byte now and then (slowloris) does not hold a connection for ever.
const HEAD: Duration = Duration::from_secs(75);
/// Sessions kept to be resumed, for TLS 1.2; TLS 1.3 uses tickets.
const SESSIONS: usize = 16_384;
/// Pause after a failed accept: what it lacks (descriptors) comes back when connections end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

tokio::task_local! {
    /// Since when an HTTP/1 connection has been waiting for a head; none while it has a request.
    static WAITING: Cell<Option<Instant>>;
}

/// The TLS of the public.
pub fn tls(resolver: Arc<dyn ResolvesServerCert>) -> Result<Acceptor, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec(), ACME.to_vec()];
    config.session_storage = rustls::server::ServerSessionMemoryCache::new(SESSIONS);
    config.ticketer = rustls::crypto::ring::Ticketer::new()?;
    Ok(Acceptor::from_server_config(Arc::new(config)))
}

/// Accepts until the edge is to end.
pub async fn run(listener: TcpListener, entry: Entry) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut ending = entry.ending.clone();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = ending.wait_for(|end| *end) => return,
        };
        match accepted {
            Ok((stream, client)) => {
                let serving = entry.clone();
                entry.connections.spawn(async move {
                    serving.metrics.connections.add();
                    serving.serve(stream, client).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

impl Entry {
    async fn serve(self, stream: TcpStream, client: SocketAddr) {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection has ended before it began");
            return;
        }
        let digest = SocketDigest::from_raw_fd(stream.as_raw_fd());
        // Set now: asking the socket later fails when the client has gone.
        let _ = digest.peer_addr.set(Some(client.into()));
        let mut stream = L4Stream::from(stream);
        stream.set_socket_digest(digest);
        let stream: Stream = match &self.tls {
            None => Box::new(stream),
            Some(acceptor) => match timeout(HANDSHAKE, acceptor.tls_handshake(stream)).await {
                Ok(Ok(stream)) => {
                    if matches!(stream.selected_alpn_proto(), Some(ALPN::Custom(_))) {
                        // The certificate was the answer to an ACME challenge.
                        return;
                    }
                    Box::new(stream)
                }
                Ok(Err(error)) => {
                    self.metrics.tls_failures.add();
                    tracing::debug!(%error, %client, "TLS handshake failed");
                    return;
                }
                Err(_) => return self.metrics.tls_failures.add(),
            },
        };
        let is_h2 = matches!(stream.selected_alpn_proto(), Some(ALPN::H2));
        let processing = self.proxy.process_new(stream, &self.ending);
        if is_h2 {
            // Its own timers end an idle HTTP/2 connection.
            processing.await;
        } else {
            WAITING
                .scope(
                    Cell::new(Some(Instant::now())),
                    within_head_time(processing),
                )
                .await;
        }
    }
}

/// Runs a connection until it ends, or has waited too long for a head.
async fn within_head_time<T>(processing: impl Future<Output = T>) {
    tokio::pin!(processing);
    loop {
        let waited = WAITING.with(Cell::get).map(|since| since.elapsed());
        let next = HEAD.saturating_sub(waited.unwrap_or_default());
        if next.is_zero() {
            return;
        }
        tokio::select! {
            _ = &mut processing => return,
            () = tokio::time::sleep(next) => {}
        }
    }
}

/// A request's head has been read: the connection may take its time now.
pub fn head_is_read() {
    let _ = WAITING.try_with(|waiting| waiting.set(None));
}

/// A request is done: the connection waits for the next head.
pub fn request_is_done() {
    let _ = WAITING.try_with(|waiting| waiting.set(Some(Instant::now())));
}
