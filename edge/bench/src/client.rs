//! Clients that h2load cannot be: one connection per request, and ten thousand that wait.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::HOST;

/// Connections that are being made at once.
const AT_ONCE: usize = 16;

/// Connections that wait; they end with this value.
pub struct Held {
    _streams: Vec<TlsStream<TcpStream>>,
    _runtime: Runtime,
}

/// Makes `n` connections with a full handshake and one request each; the time it took.
pub fn handshakes(address: SocketAddr, work: &Path, n: usize) -> Result<Duration> {
    let begun = Instant::now();
    made(address, work, n, "close")?;
    Ok(begun.elapsed())
}

/// Makes `n` connections with one request each, and holds them.
pub fn idle(address: SocketAddr, work: &Path, n: usize) -> Result<Held> {
    let (runtime, streams) = made(address, work, n, "keep-alive")?;
    Ok(Held {
        _streams: streams,
        _runtime: runtime,
    })
}

fn made(
    address: SocketAddr,
    work: &Path,
    n: usize,
    connection: &'static str,
) -> Result<(Runtime, Vec<TlsStream<TcpStream>>)> {
    let connector = connector(work)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let left = Arc::new(AtomicUsize::new(n));
    let streams = runtime.block_on(async {
        let mut makers = tokio::task::JoinSet::new();
        for _ in 0..AT_ONCE.min(n) {
            let (connector, left) = (connector.clone(), Arc::clone(&left));
            makers.spawn(async move {
                let mut streams = Vec::new();
                while take(&left) {
                    let stream = once(&connector, address, connection).await?;
                    streams.extend((connection == "keep-alive").then_some(stream));
                }
                anyhow::Ok(streams)
            });
        }
        let mut all = Vec::with_capacity(n);
        while let Some(made) = makers.join_next().await {
            all.extend(made??);
        }
        anyhow::Ok(all)
    })?;
    Ok((runtime, streams))
}

fn take(left: &AtomicUsize) -> bool {
    let less = |left: usize| left.checked_sub(1);
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
        .is_ok()
}

/// A connection with one request, answered in full.
async fn once(
    connector: &TlsConnector,
    address: SocketAddr,
    connection: &str,
) -> Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let mut stream = connector
        .connect(ServerName::try_from(HOST)?, stream)
        .await
        .context("TLS")?;
    let head = format!("GET /1k HTTP/1.1\r\nHost: {HOST}\r\nConnection: {connection}\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut answer = Vec::with_capacity(2048);
    while !answer.ends_with(&[b'k'; 1 << 10]) {
        let n = stream.read_buf(&mut answer).await?;
        let so_far = || String::from_utf8_lossy(&answer).into_owned();
        ensure!(n > 0, "the answer ends early: {}", so_far());
        ensure!(answer.starts_with(b"HTTP/1.1 200 "), "{}", so_far());
    }
    Ok(stream)
}

/// Without resumption: each handshake is a full one.
fn connector(work: &Path) -> Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(work.join("cert.pem"))?)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}
