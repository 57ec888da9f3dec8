//! A catalog, an issuer, and listeners that answer as an ingress does.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tern_catalog::{
    Catalog, Certificate, CertificateState, ChallengeKind, Hostname, HostnameRoute, Snapshot,
    SqliteStore, Store, View,
};
use tern_certs::{CertsConfig, Issuer, SniResolver};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::ca::{Pebble, trusting};
use crate::moody::Moody;

/// What a test looks at.
pub struct World {
    pub catalog: Catalog,
    pub view: View,
    pub pebble: Pebble,
    pub config: CertsConfig,
    issuer: Issuer,
    tls: std::net::TcpListener,
    http: std::net::TcpListener,
    listeners: JoinSet<()>,
    /// Ports that refuse connections, and that nobody else gets.
    _refusing: [TcpSocket; 2],
    files: tempfile::TempDir,
}

/// Longest that anything may take: the CA's waits, on a machine that has other things to do.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// As issued by a public CA: what has nothing to do with renewal is not to meet it.
pub const LONG: Duration = Duration::from_secs(90 * 24 * 3600);
pub const ACME_TLS: &[u8] = b"acme-tls/1";

impl World {
    /// The CA reaches us by these kinds of challenges; connections for the others are refused.
    pub async fn new(reachable: &[ChallengeKind], validity: Duration) -> Self {
        let files = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> =
            Arc::new(SqliteStore::open(&files.path().join("catalog.db")).unwrap());
        let view = View::follow(Arc::clone(&store)).await.unwrap();
        let catalog = Catalog::new(store);
        let listen = || {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        };
        let (tls, http) = (listen(), listen());
        let refusing = [refusing(), refusing()];
        let port = |kind, open: &std::net::TcpListener, closed: &TcpSocket| {
            if reachable.contains(&kind) {
                open.local_addr().unwrap().port()
            } else {
                closed.local_addr().unwrap().port()
            }
        };
        let pebble = Pebble::start(
            files.path(),
            port(ChallengeKind::Http01, &http, &refusing[0]),
            port(ChallengeKind::TlsAlpn01, &tls, &refusing[1]),
            validity,
        )
        .await;
        let config = CertsConfig {
            directory: pebble.directory.clone(),
            root_ca: Some(pebble.directory_ca.clone()),
            contact: Some("ops@tern.test".to_owned()),
            seal_key: files.path().join("keys/seal.key"),
        };
        let issuer = Issuer::start(config.clone(), catalog.clone(), view.clone()).unwrap();
        let mut world = Self {
            catalog,
            view,
            pebble,
            config,
            issuer,
            tls,
            http,
            listeners: JoinSet::new(),
            _refusing: refusing,
            files,
        };
        world.listen();
        world
    }

    /// A directory with moods in front of the CA.
    pub async fn moody(&self) -> Moody {
        let trusted = trusting(&std::fs::read(&self.pebble.directory_ca).unwrap());
        Moody::start(self.files.path(), &self.pebble.directory, trusted).await
    }

    /// Ends the issuer and starts another on the same catalog, with this configuration.
    pub async fn restart(mut self, change: impl FnOnce(&mut CertsConfig)) -> Self {
        change(&mut self.config);
        self.issuer.shutdown().await;
        let (catalog, view) = (self.catalog.clone(), self.view.clone());
        self.issuer = Issuer::start(self.config.clone(), catalog, view).unwrap();
        self.listeners.shutdown().await;
        self.listen();
        self
    }

    fn listen(&mut self) {
        let open = |l: &std::net::TcpListener| TcpListener::from_std(l.try_clone().unwrap());
        let resolver = self.issuer.resolver();
        self.listeners
            .spawn(serve_tls(open(&self.tls).unwrap(), resolver));
        self.listeners
            .spawn(serve_http(open(&self.http).unwrap(), self.view.clone()));
    }

    /// Asks for a host name.
    pub async fn want(&self, hostname: &Hostname) {
        let route = HostnameRoute {
            hostname: hostname.clone(),
            app: "shop".parse().unwrap(),
            created_at: Timestamp::now(),
        };
        self.catalog.create(&route).await.unwrap();
    }

    /// Waits until the catalog shows it.
    pub async fn wait_for<T>(&self, what: &str, look: impl FnMut(&Snapshot) -> Option<T>) -> T {
        match tokio::time::timeout(PATIENCE, self.view.wait_for(look)).await {
            Ok(found) => found,
            Err(_) => {
                let certificates = self.view.snapshot().certificates.clone();
                panic!(
                    "{what}: not within {PATIENCE:?}; {certificates:?}\n{}",
                    self.pebble.log()
                )
            }
        }
    }

    /// Waits until there is a certificate.
    pub async fn issued(&self, hostname: &Hostname) -> Arc<Certificate> {
        self.wait_for("a certificate is issued", |s| {
            let certificate = s.certificates.get(hostname)?;
            (certificate.state == CertificateState::Issued).then(|| Arc::clone(certificate))
        })
        .await
    }

    /// The certificate that a browser gets for this name; it believes in our CA's root alone.
    pub async fn browse(&self, hostname: &str) -> std::io::Result<CertificateDer<'static>> {
        self.handshake(hostname, &[b"http/1.1"]).await
    }

    /// A browser's handshake with these protocols.
    pub async fn handshake(
        &self,
        hostname: &str,
        alpn: &[&[u8]],
    ) -> std::io::Result<CertificateDer<'static>> {
        let stream = TcpStream::connect(self.tls_address()).await?;
        let name = ServerName::try_from(hostname.to_owned()).unwrap();
        let connector = TlsConnector::from(client_config(&self.pebble.issued, alpn));
        let stream = connector.connect(name, stream).await?;
        let chain = stream.get_ref().1.peer_certificates().unwrap();
        Ok(chain[0].clone().into_owned())
    }

    fn tls_address(&self) -> SocketAddr {
        self.tls.local_addr().unwrap()
    }

    /// The files that a backup of the catalog would hold.
    pub fn catalog_files(&self) -> Vec<PathBuf> {
        std::fs::read_dir(self.files.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| {
                let name = path.file_name().unwrap().to_string_lossy();
                name.starts_with("catalog.db")
            })
            .collect()
    }
}

pub fn client_config(roots: &Arc<RootCertStore>, alpn: &[&[u8]]) -> Arc<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(Arc::clone(roots))
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    Arc::new(config)
}

/// The alert that ended a handshake.
pub fn alert(error: &std::io::Error) -> Option<rustls::AlertDescription> {
    match error.get_ref()?.downcast_ref()? {
        rustls::Error::AlertReceived(alert) => Some(*alert),
        _ => None,
    }
}

/// A port that is taken, but where nobody listens.
fn refusing() -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    socket
}

/// Ends TLS by the resolver, and then the connection.
async fn serve_tls(listener: TcpListener, resolver: Arc<SniResolver>) {
    let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    config.alpn_protocols = vec![b"http/1.1".to_vec(), ACME_TLS.to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let acceptor = acceptor.clone();
        connections.spawn(async move {
            if let Ok(mut stream) = acceptor.accept(stream).await {
                let _ = stream.shutdown().await;
            }
        });
    }
}

/// Answers http-01 from the catalog (RFC 8555 section 8.3), and nothing else.
async fn serve_http(listener: TcpListener, view: View) {
    let mut connections = JoinSet::new();
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let view = view.clone();
        connections.spawn(async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                match stream.read_u8().await {
                    Ok(byte) if head.len() < 8192 => head.push(byte),
                    _ => return,
                }
            }
            let head = String::from_utf8(head).unwrap();
            let reply = match answer(&head, &view.snapshot()) {
                Some(text) => format!(
                    "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{text}",
                    text.len()
                ),
                None => "HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\n".to_owned(),
            };
            let _ = stream.write_all(reply.as_bytes()).await;
        });
    }
}

fn answer(head: &str, snapshot: &Snapshot) -> Option<String> {
    let path = head.split(' ').nth(1)?;
    let token = path.strip_prefix("/.well-known/acme-challenge/")?;
    let (_, host) = head.split_once("\r\nHost: ")?;
    let host = host.split([':', '\r']).next()?;
    let id = format!("{host}/{}", ChallengeKind::Http01.as_str());
    let challenge = snapshot.challenges.get(&id)?;
    (challenge.token == token).then(|| challenge.key_authorization.clone())
}
