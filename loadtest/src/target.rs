//! Where requests go, and the connections they take.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http::{HeaderValue, Request, Response, Uri, header};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use url::{Host, Url};

use crate::args::{Common, Header, HttpVersion};
use crate::exchange::{Failure, FailureKind};

/// A server, and how to ask it.
pub struct Target {
    url: Url,
    host: String,
    port: u16,
    addresses: HashMap<(String, u16), SocketAddr>,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    version: HttpVersion,
    headers: Vec<Header>,
}

/// One connection to a [`Target`].
pub struct Connection {
    sender: Sender,
    /// Drives the connection; ends with it.
    _driver: AbortOnDrop,
}

enum Sender {
    Http1(http1::SendRequest<Empty<Bytes>>),
    Http2(http2::SendRequest<Empty<Bytes>>),
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Target {
    /// The target that the command line describes.
    pub fn new(common: &Common) -> Result<Self> {
        let url = &common.url;
        let Some(host) = url.host() else {
            bail!("{url} names no host")
        };
        let port = url
            .port_or_known_default()
            .with_context(|| format!("{url} has no port"))?;
        let tls = match url.scheme() {
            "http" => None,
            "https" => {
                let name = match host {
                    Host::Domain(name) => ServerName::try_from(name.to_owned())?,
                    Host::Ipv4(ip) => ServerName::IpAddress(ip.into()),
                    Host::Ipv6(ip) => ServerName::IpAddress(ip.into()),
                };
                Some((connector(common.cacert.as_deref(), common.http)?, name))
            }
            scheme => bail!("{scheme} is not http or https"),
        };
        let addresses = common
            .resolve
            .iter()
            .map(|resolve| ((resolve.host.clone(), resolve.port), resolve.address))
            .collect();
        Ok(Self {
            url: url.clone(),
            host: match host {
                Host::Domain(name) => name.to_owned(),
                Host::Ipv4(ip) => ip.to_string(),
                Host::Ipv6(ip) => ip.to_string(),
            },
            port,
            addresses,
            tls,
            version: common.http,
            headers: common.header.clone(),
        })
    }

    /// The URL that is asked for.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// Makes a new connection, ready for a request.
    pub async fn connect(&self) -> Result<Connection, Failure> {
        let stream = self.dial().await?;
        match &self.tls {
            None => self.handshake(stream).await,
            Some((connector, name)) => {
                let stream = connector
                    .connect(name.clone(), stream)
                    .await
                    .map_err(|error| Failure::new(FailureKind::Tls, &error))?;
                let alpn = stream.get_ref().1.alpn_protocol();
                if self.version == HttpVersion::Http2 && alpn != Some(b"h2") {
                    let refused = io::Error::other("the server does not speak HTTP/2");
                    return Err(Failure::new(FailureKind::Tls, &refused));
                }
                self.handshake(stream).await
            }
        }
    }

    async fn dial(&self) -> Result<TcpStream, Failure> {
        let failure = |error: io::Error| Failure::new(FailureKind::Connect, &error);
        let stream = match self.addresses.get(&(self.host.clone(), self.port)) {
            Some(address) => TcpStream::connect(address).await,
            None => TcpStream::connect((self.host.as_str(), self.port)).await,
        }
        .map_err(failure)?;
        stream.set_nodelay(true).map_err(failure)?;
        Ok(stream)
    }

    async fn handshake<S>(&self, stream: S) -> Result<Connection, Failure>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let failure = |error: hyper::Error| Failure::new(FailureKind::Connect, &error);
        let io = TokioIo::new(stream);
        // How a connection ends is seen by the requests on it.
        let (sender, driver) = match self.version {
            HttpVersion::Http1 => {
                let (sender, connection) = http1::handshake(io).await.map_err(failure)?;
                (
                    Sender::Http1(sender),
                    tokio::spawn(async { drop(connection.await) }),
                )
            }
            HttpVersion::Http2 => {
                let (sender, connection) = http2::handshake(TokioExecutor::new(), io)
                    .await
                    .map_err(failure)?;
                (
                    Sender::Http2(sender),
                    tokio::spawn(async { drop(connection.await) }),
                )
            }
        };
        Ok(Connection {
            sender,
            _driver: AbortOnDrop(driver),
        })
    }

    /// The request that is always sent.
    pub fn request(&self) -> Result<Request<Empty<Bytes>>> {
        let mut request = Request::new(Empty::new());
        let path = &self.url[url::Position::BeforePath..url::Position::AfterQuery];
        let authority = &self.url[url::Position::BeforeHost..url::Position::AfterPort];
        *request.uri_mut() = match self.version {
            HttpVersion::Http1 => path.parse()?,
            HttpVersion::Http2 => Uri::builder()
                .scheme(self.url.scheme())
                .authority(authority)
                .path_and_query(path)
                .build()?,
        };
        let headers = request.headers_mut();
        if self.version == HttpVersion::Http1 {
            headers.insert(header::HOST, authority.parse()?);
        }
        headers.insert(
            header::USER_AGENT,
            HeaderValue::from_static("tern-loadtest"),
        );
        for Header(name, value) in &self.headers {
            headers.insert(name, value.clone());
        }
        Ok(request)
    }
}

impl Connection {
    /// Sends a request; done when the answer's head is there.
    pub async fn send(
        &mut self,
        request: Request<Empty<Bytes>>,
    ) -> Result<Response<Incoming>, hyper::Error> {
        match &mut self.sender {
            Sender::Http1(sender) => sender.send_request(request).await,
            Sender::Http2(sender) => sender.send_request(request).await,
        }
    }

    /// Waits until another request can be sent; `false` if none ever can.
    pub async fn ready(&mut self) -> bool {
        match &mut self.sender {
            Sender::Http1(sender) => sender.ready().await.is_ok(),
            Sender::Http2(sender) => sender.ready().await.is_ok(),
        }
    }
}

fn connector(cacert: Option<&Path>, version: HttpVersion) -> Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    match cacert {
        Some(path) => {
            let unreadable = || format!("cannot read certificates from {}", path.display());
            for certificate in CertificateDer::pem_file_iter(path).with_context(unreadable)? {
                roots
                    .add(certificate.with_context(unreadable)?)
                    .with_context(unreadable)?;
            }
            ensure!(
                !roots.is_empty(),
                "there is no certificate in {}",
                path.display()
            );
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            ensure!(
                !roots.is_empty(),
                "this system trusts no CA: give one with --cacert"
            );
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = match version {
        HttpVersion::Http1 => vec![b"http/1.1".to_vec()],
        HttpVersion::Http2 => vec![b"h2".to_vec()],
    };
    // Connections stand for different clients, who have not been here before.
    config.resumption = Resumption::disabled();
    Ok(TlsConnector::from(Arc::new(config)))
}
