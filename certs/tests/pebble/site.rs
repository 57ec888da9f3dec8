//! The site that the authority checks: as much of an edge as answers challenges and shows certificates.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::ResolvesServerCert;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tern_catalog::View;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const ACME_TLS: &[u8] = b"acme-tls/1";

/// Serves TLS with these certificates.
pub async fn serve_tls(
    port: u16,
    resolver: Arc<dyn ResolvesServerCert>,
) -> tokio::task::JoinHandle<()> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    config.alpn_protocols = vec![b"http/1.1".to_vec(), ACME_TLS.to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                if let Ok(mut stream) = acceptor.accept(stream).await {
                    let _ = stream.shutdown().await;
                }
            });
        }
    })
}

/// Answers http-01 from the view; counts what it is asked.
pub async fn serve_http(
    port: u16,
    view: View,
    asked: Arc<AtomicUsize>,
) -> tokio::task::JoinHandle<()> {
    let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            if stream.read_line(&mut line).await.is_err() {
                continue;
            }
            asked.fetch_add(1, Ordering::Relaxed);
            let path = line.split(' ').nth(1).unwrap_or_default();
            let token = path.strip_prefix("/.well-known/acme-challenge/");
            let snapshot = view.snapshot();
            let found = snapshot
                .challenges
                .values()
                .find(|c| Some(c.token.as_str()) == token);
            let answer = match found {
                Some(challenge) => {
                    let text = &challenge.key_authorization;
                    format!(
                        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}",
                        text.len()
                    )
                }
                None => "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_owned(),
            };
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    })
}

/// The certificate that a client gets who asks for this name and trusts these roots.
pub async fn certificate(
    port: u16,
    name: &str,
    roots: Arc<RootCertStore>,
) -> std::io::Result<CertificateDer<'static>> {
    let stream = connect(port, name, roots, &[b"http/1.1"]).await?;
    let (_, session) = stream.get_ref();
    Ok(session.peer_certificates().unwrap()[0].clone().into_owned())
}

/// Offers `acme-tls/1` only, as an authority does.
pub async fn challenge(port: u16, name: &str, roots: Arc<RootCertStore>) -> std::io::Result<()> {
    connect(port, name, roots, &[ACME_TLS]).await.map(drop)
}

/// The body of a page.
pub async fn get(port: u16, name: &str, roots: Arc<RootCertStore>, path: &str) -> Vec<u8> {
    let mut stream = connect(port, name, roots, &[b"http/1.1"]).await.unwrap();
    let request = format!("GET {path} HTTP/1.0\r\nHost: {name}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    answer.split_off(end + 4)
}

async fn connect(
    port: u16,
    name: &str,
    roots: Arc<RootCertStore>,
    protocols: &[&[u8]],
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|p| p.to_vec()).collect();
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let name = ServerName::try_from(name.to_owned()).unwrap();
    TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
}
