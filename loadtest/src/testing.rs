//! A server to test against: friendly, slow, or broken, as the path says.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use clap::Parser;
use futures::stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use crate::args::Arguments;

/// Runs a command line.
pub async fn run(arguments: &[&str]) -> Result<bool> {
    let arguments = Arguments::try_parse_from([&["tern-loadtest"], arguments].concat())?;
    crate::run(&arguments).await
}

/// The server.
pub struct Server {
    address: SocketAddr,
    state: Arc<State>,
    root: Option<(tempfile::TempDir, String)>,
}

struct State {
    requests: AtomicU64,
    connections: AtomicU64,
    /// A file with the milliseconds that the next request is to take; it is removed then.
    sleep: Mutex<Option<PathBuf>>,
    /// Until when sleepers sleep: all requests wait for one and the same awakening.
    awake: Mutex<Option<tokio::time::Instant>>,
    /// How many requests have met.
    met: watch::Sender<u64>,
}

type Body = BoxBody<Bytes, std::io::Error>;

impl Server {
    /// Speaks HTTP/1.1 and, by prior knowledge, HTTP/2.
    pub async fn start() -> Self {
        Self::serve(None, None).await
    }

    /// Speaks TLS with a certificate for `name`, issued by [`Server::root`].
    pub async fn start_tls(name: &str) -> Self {
        let issuer_key = rcgen::KeyPair::generate().unwrap();
        let mut issuer = rcgen::CertificateParams::new(Vec::new()).unwrap();
        issuer.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root = issuer.self_signed(&issuer_key).unwrap();
        let issuer = rcgen::Issuer::new(issuer, issuer_key);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec![name.to_owned()])
            .unwrap()
            .signed_by(&key, &issuer)
            .unwrap();

        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.pem");
        std::fs::write(&path, root.pem()).unwrap();
        let path = path.to_str().unwrap().to_owned();
        Self::serve(Some(TlsAcceptor::from(Arc::new(config))), Some((dir, path))).await
    }

    async fn serve(tls: Option<TlsAcceptor>, root: Option<(tempfile::TempDir, String)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            requests: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            sleep: Mutex::new(None),
            awake: Mutex::new(None),
            met: watch::Sender::new(0),
        });
        let shared = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                shared.connections.fetch_add(1, Ordering::SeqCst);
                let (state, tls) = (Arc::clone(&shared), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        None => state.connection(stream).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                state.connection(stream).await;
                            }
                        }
                    }
                });
            }
        });
        Self {
            address,
            state,
            root,
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// A PEM file with the certificate authority.
    pub fn root(&self) -> &str {
        &self.root.as_ref().expect("only with TLS").1
    }

    /// Requests seen.
    pub fn requests(&self) -> u64 {
        self.state.requests.load(Ordering::SeqCst)
    }

    /// Connections seen.
    pub fn connections(&self) -> u64 {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// From now on, when `path` exists, the server sleeps: it takes as many milliseconds to wake as
    /// the file says.
    pub fn sleeps_by(&self, path: &Path) {
        *self.state.sleep.lock().unwrap() = Some(path.to_owned());
    }
}

impl State {
    async fn connection(
        self: Arc<Self>,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) {
        let service = service_fn(move |request| {
            let state = Arc::clone(&self);
            async move { state.answer(request).await }
        });
        // Connections that break are what some tests are about.
        let _ = auto::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(stream), service)
            .await;
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, std::io::Error> {
        let number = self.requests.fetch_add(1, Ordering::SeqCst);
        self.wake().await;
        let path = request.uri().path().to_owned();
        let mut response = Response::new(whole("hello"));
        match path.split('/').collect::<Vec<_>>()[..] {
            ["", "status", status] => *response.status_mut() = status.parse().unwrap(),
            ["", "every-tenth-fails"] if number % 10 == 9 => {
                *response.status_mut() = hyper::StatusCode::BAD_GATEWAY;
            }
            ["", "meet", count] => {
                let count: u64 = count.parse().unwrap();
                self.met.send_modify(|met| *met += 1);
                self.met
                    .subscribe()
                    .wait_for(|met| *met >= count)
                    .await
                    .unwrap();
            }
            ["", "never"] => std::future::pending::<()>().await,
            ["", "close"] => return Err(std::io::Error::other("on purpose")),
            ["", "cut"] => {
                let cut = [
                    Ok(Frame::data(Bytes::from_static(b"hel"))),
                    Err(std::io::Error::other("on purpose")),
                ];
                *response.body_mut() = BodyExt::boxed(StreamBody::new(stream::iter(cut)));
            }
            ["", "and-close"] => {
                response
                    .headers_mut()
                    .insert("connection", "close".parse().unwrap());
            }
            _ => {}
        }
        Ok(response)
    }

    async fn wake(&self) {
        let awake = {
            let mut awake = self.awake.lock().unwrap();
            if let Some(path) = &*self.sleep.lock().unwrap()
                && let Ok(text) = std::fs::read_to_string(path)
            {
                std::fs::remove_file(path).unwrap();
                let needed = Duration::from_millis(text.trim().parse().unwrap());
                *awake = Some(tokio::time::Instant::now() + needed);
            }
            *awake
        };
        if let Some(awake) = awake {
            tokio::time::sleep_until(awake).await;
        }
    }
}

fn whole(text: &'static str) -> Body {
    Full::new(Bytes::from_static(text.as_bytes()))
        .map_err(|never: Infallible| match never {})
        .boxed()
}
