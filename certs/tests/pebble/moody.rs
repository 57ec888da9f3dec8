//! A directory with moods: pebble behind a proxy that refuses orders, and keeps them waiting, as public directories
//! do and pebble does not.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{RootCertStore, ServerConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::world::client_config;

/// What the directory does, beside what pebble does.
#[derive(Default)]
pub struct Mood {
    /// Answers for the next new orders: a status, and `Retry-After`.
    pub refusals: VecDeque<(StatusCode, &'static str)>,
    /// As long as it is set, what is valid is said to be `processing`, with this `Retry-After`.
    pub processing: Option<&'static str>,
    /// New orders that were asked for, refused ones too.
    pub orders: usize,
    /// Times an order was looked at and said to be `processing`.
    pub looks: usize,
}

/// Ends with the test.
pub struct Moody {
    pub directory: String,
    /// What an ACME client must trust to speak to it.
    pub ca: PathBuf,
    pub mood: Arc<Mutex<Mood>>,
    _proxy: JoinSet<()>,
}

impl Moody {
    /// In front of the pebble of this directory.
    pub async fn start(dir: &Path, directory: &str, trusted: RootCertStore) -> Self {
        let pebble: http::Uri = directory.parse().unwrap();
        let pebble = SocketAddr::from(([127, 0, 0, 1], pebble.port_u16().unwrap()));
        let CertifiedKey { cert, signing_key } =
            generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let ca = dir.join("moody.pem");
        std::fs::write(&ca, cert.pem()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mood = Arc::new(Mutex::new(Mood::default()));
        let (trusted, shared) = (Arc::new(trusted), Arc::clone(&mood));
        let mut proxy = JoinSet::new();
        proxy.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, trusted) = (acceptor.clone(), Arc::clone(&trusted));
                let mood = Arc::clone(&shared);
                connections.spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else {
                        return;
                    };
                    let serve = hyper::service::service_fn(move |request| {
                        answer(request, pebble, Arc::clone(&trusted), Arc::clone(&mood))
                    });
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), serve)
                        .await;
                });
            }
        });
        Self {
            directory: format!("https://localhost:{port}/dir"),
            ca,
            mood,
            _proxy: proxy,
        }
    }
}

/// Pebble's paths.
const NEW_ORDER: &str = "/order-plz";
const ORDER: &str = "/my-order/";

async fn answer(
    request: Request<Incoming>,
    pebble: SocketAddr,
    trusted: Arc<RootCertStore>,
    mood: Arc<Mutex<Mood>>,
) -> std::io::Result<Response<Full<Bytes>>> {
    let path = request.uri().path().to_owned();
    if path == NEW_ORDER {
        let mut mood = mood.lock();
        mood.orders += 1;
        if let Some((status, retry_after)) = mood.refusals.pop_front() {
            return Ok(refusal(status, retry_after));
        }
    }
    // The Host header is passed on: pebble makes its addresses of it, and checks what was signed against it.
    let (mut head, body) = pass(request, pebble, trusted).await?.into_parts();
    let mut body = body
        .collect()
        .await
        .map_err(std::io::Error::other)?
        .to_bytes();
    let processing = mood.lock().processing;
    if path.starts_with(ORDER)
        && let Some(retry_after) = processing
        && let Ok(mut order) = serde_json::from_slice::<serde_json::Value>(&body)
        && order["status"] == "valid"
    {
        order["status"] = "processing".into();
        order.as_object_mut().unwrap().remove("certificate");
        body = order.to_string().into();
        head.headers
            .insert(RETRY_AFTER, retry_after.parse().unwrap());
        head.headers.remove(CONTENT_LENGTH);
        mood.lock().looks += 1;
    }
    Ok(Response::from_parts(head, Full::new(body)))
}

async fn pass(
    request: Request<Incoming>,
    pebble: SocketAddr,
    trusted: Arc<RootCertStore>,
) -> std::io::Result<Response<Incoming>> {
    let stream = TcpStream::connect(pebble).await?;
    let stream = TlsConnector::from(client_config(&trusted, &[]))
        .connect("localhost".try_into().unwrap(), stream)
        .await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(std::io::Error::other)?;
    tokio::spawn(connection);
    let answered = sender.send_request(request).await;
    answered.map_err(std::io::Error::other)
}

/// RFC 8555 section 6.7.
fn refusal(status: StatusCode, retry_after: &str) -> Response<Full<Bytes>> {
    let problem = serde_json::json!({
        "type": "urn:ietf:params:acme:error:rateLimited",
        "detail": "too many new orders",
        "status": status.as_u16(),
    });
    Response::builder()
        .status(status)
        .header(RETRY_AFTER, retry_after)
        .header(CONTENT_TYPE, "application/problem+json")
        .body(Full::new(problem.to_string().into()))
        .unwrap()
}
