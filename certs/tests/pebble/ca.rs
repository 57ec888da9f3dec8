//! A running pebble with its own directory certificate.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio_rustls::TlsConnector;

use crate::dns::Dns;
use crate::world::client_config;

/// A CA; it ends with the test.
pub struct Pebble {
    /// The directory's URL.
    pub directory: String,
    /// What an ACME client must trust to speak to it.
    pub directory_ca: PathBuf,
    /// What a browser must trust to believe what it issues.
    pub issued: Arc<RootCertStore>,
    log: PathBuf,
    _process: Child,
    _dns: Dns,
}

/// Ports are chosen before pebble takes them: somebody else may be faster.
const TRIES: usize = 5;
const PATIENCE: Duration = Duration::from_secs(30);

impl Pebble {
    /// Starts one that validates on these ports of 127.0.0.1 and issues for so long.
    pub async fn start(dir: &Path, http: u16, tls: u16, validity: Duration) -> Self {
        let CertifiedKey { cert, signing_key } =
            generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let (directory_ca, key) = (dir.join("directory.pem"), dir.join("directory.key"));
        std::fs::write(&directory_ca, cert.pem()).unwrap();
        std::fs::write(&key, signing_key.serialize_pem()).unwrap();
        let dns = Dns::start().await;
        let (config, log) = (dir.join("pebble.json"), dir.join("pebble.log"));
        for _ in 0..TRIES {
            let (acme, management) = (free_port().await, free_port().await);
            let text = serde_json::json!({"pebble": {
                "listenAddress": acme.to_string(),
                "managementListenAddress": management.to_string(),
                "certificate": directory_ca,
                "privateKey": key,
                "httpPort": http,
                "tlsPort": tls,
                "certificateValidityPeriod": validity.as_secs(),
            }});
            std::fs::write(&config, text.to_string()).unwrap();
            let output = std::fs::File::create(&log).unwrap();
            let mut process = Command::new("pebble")
                .arg("-config")
                .arg(&config)
                .args(["-strict", "-dnsserver", &dns.address.to_string()])
                .stdin(Stdio::null())
                .stdout(output.try_clone().unwrap())
                .stderr(output)
                .kill_on_drop(true)
                .spawn()
                .expect("pebble is needed: apt-get install pebble");
            let Some(root) = root(&mut process, &directory_ca, management).await else {
                continue;
            };
            wait_until_listening(&mut process, acme).await;
            return Self {
                directory: format!("https://localhost:{}/dir", acme.port()),
                directory_ca,
                issued: Arc::new(trusting(&root)),
                log,
                _process: process,
                _dns: dns,
            };
        }
        panic!(
            "pebble did not start: {}",
            std::fs::read_to_string(&log).unwrap()
        );
    }

    /// What it has printed.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// How many accounts were made at it.
    pub fn accounts(&self) -> usize {
        self.log().matches("accounts in memory").count()
    }
}

/// The root of what this pebble issues; none when it has ended.
async fn root(process: &mut Child, ca: &Path, management: SocketAddr) -> Option<Vec<u8>> {
    let trusted = Arc::new(trusting(&std::fs::read(ca).unwrap()));
    let asking = async {
        loop {
            if process.try_wait().unwrap().is_some() {
                return None;
            }
            if let Ok(root) = get(management, "/roots/0", &trusted).await {
                return Some(root);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asking)
        .await
        .expect("pebble's management interface answers")
}

/// The directory is served by another listener than the roots.
async fn wait_until_listening(process: &mut Child, acme: SocketAddr) {
    let connecting = async {
        while TcpStream::connect(acme).await.is_err() {
            assert!(process.try_wait().unwrap().is_none(), "pebble has ended");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, connecting)
        .await
        .expect("pebble's directory is served");
}

/// `GET` over TLS. HTTP/1.0, so that the body ends with the connection.
async fn get(
    address: SocketAddr,
    path: &str,
    roots: &Arc<RootCertStore>,
) -> std::io::Result<Vec<u8>> {
    let stream = TcpStream::connect(address).await?;
    let name = "localhost".try_into().unwrap();
    let mut stream = TlsConnector::from(client_config(roots, &[]))
        .connect(name, stream)
        .await?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).await?;
    let body = reply
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .filter(|_| reply.starts_with(b"HTTP/1.0 200"))
        .ok_or_else(|| std::io::Error::other(String::from_utf8_lossy(&reply)))?;
    Ok(reply.split_off(body + 4))
}

/// A store with this one root (PEM).
pub fn trusting(pem: &[u8]) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(pem).unwrap())
        .unwrap();
    roots
}

async fn free_port() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}
