//! How a new server is let into a cloud: an invite, made on a host, that is good once and for a while.
//!
//! `tern hosts invite` makes a random secret and keeps its hash in the catalog. The command line that it prints has
//! where to go, the SHA-256 of this host's joining certificate, and the secret:
//!
//! ```text
//! tern serve --join 192.0.2.1:4281/<certificate>/<secret>
//! ```
//!
//! The new server connects by TLS 1.3 and goes on only if the certificate is that very one: nobody between learns the
//! secret, and nobody else can hand it a cloud. Then it says the secret. This host marks the invite as used, by
//! compare-and-swap, and after that answers with what makes a host: etcd and how to be let in there, the sealing key,
//! the region. A number the new server gets from the catalog like any other (`identity`). One line each way:
//!
//! ```text
//! new server                            host
//!     {"secret": …, "public_key": …}  →    valid? unexpired? mark it used
//!                                     ←    {"bundle": {…}}  or  {"refused": "…"}
//! ```
//!
//! The port is open only while there is an invite that may be used.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _};
use rustls::{DigitallySignedStruct, SignatureScheme};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tern_api::{Invitation, Inviter};
use tern_catalog::{Catalog, HostId, Record};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Semaphore, watch};
use tokio::time::Instant;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::args::Etcd;
use crate::settings::write_secret;

/// Certificate and key of this host's joining port.
const CERTIFICATE: &str = "keys/join.pem";
/// What a server that has joined remembers of how.
const JOINED: &str = "joined.json";
/// Longest line of a new server, and of a host.
const MAX_ASK_BYTES: u64 = 4096;
const MAX_ANSWER_BYTES: u64 = 1 << 20;
/// Longest that one conversation may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Conversations at once: strangers reach this port too.
const MAX_CONVERSATIONS: usize = 16;

/// An invite, by the hash of its secret. Kept after it was used, to say when and by whom.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Invite {
    hash: String,
    /// The host that answers to it.
    host: HostId,
    region: String,
    created_at: Timestamp,
    expires_at: Timestamp,
    used: Option<Use>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Use {
    at: Timestamp,
    /// The WireGuard key of who used it.
    public_key: String,
}

impl Record for Invite {
    const PREFIX: &'static str = "invites/";
    fn id(&self) -> String {
        self.hash.clone()
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ask {
    secret: String,
    public_key: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Bundle(Box<Bundle>),
    Refused(String),
}

/// What makes a server a host of a cloud.
#[derive(Serialize, Deserialize)]
struct Bundle {
    region: String,
    /// Base64.
    seal_key: String,
    members: Vec<String>,
    user: Option<String>,
    /// The files' texts.
    ca: Option<String>,
    cert: Option<String>,
    key: Option<String>,
    password: Option<String>,
}

/// Lets servers in.
pub struct Door {
    catalog: Catalog,
    host: HostId,
    data_dir: PathBuf,
    etcd: Etcd,
    region: String,
    listen: SocketAddr,
    /// Where new servers are told to go.
    announced: IpAddr,
    certificate: Certificate,
    open: Mutex<Option<Open>>,
}

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Door({})", self.announced)
    }
}

/// The port, while it is open.
struct Open {
    until: watch::Sender<Instant>,
    port: u16,
}

struct Certificate {
    acceptor: TlsAcceptor,
    fingerprint: String,
}

/// What a door needs.
pub struct DoorConfig {
    pub host: HostId,
    pub data_dir: PathBuf,
    pub etcd: Etcd,
    pub region: String,
    pub listen: SocketAddr,
    pub announced: IpAddr,
}

impl Door {
    /// Opens the port again if there are invites of this host's from before.
    pub async fn new(catalog: Catalog, config: DoorConfig) -> Result<Arc<Self>> {
        let certificate = Certificate::load_or_create(&config.data_dir.join(CERTIFICATE))?;
        let door = Arc::new(Self {
            catalog,
            host: config.host,
            data_dir: config.data_dir,
            etcd: config.etcd,
            region: config.region,
            listen: config.listen,
            announced: config.announced,
            certificate,
            open: Mutex::new(None),
        });
        let now = Timestamp::now();
        let invites = door.catalog.list::<Invite>().await?;
        let good = invites
            .iter()
            .filter(|i| i.host == door.host && i.used.is_none() && i.expires_at > now);
        if let Some(last) = good.map(|i| i.expires_at).max() {
            let left = last.duration_since(now).try_into().unwrap_or_default();
            if let Err(error) = door.open_for(left).await {
                tracing::warn!(%error, "invites that are still good cannot be used");
            }
        }
        Ok(door)
    }

    /// Opens the port, or keeps it open, for this long, and tells which it is.
    async fn open_for(self: &Arc<Self>, time: Duration) -> Result<u16> {
        let until = Instant::now() + time;
        let mut open = self.open.lock().await;
        if let Some(running) = open.as_ref().filter(|o| !o.until.is_closed()) {
            running.until.send_if_modified(|end| {
                let later = until > *end;
                *end = until.max(*end);
                later
            });
            return Ok(running.port);
        }
        let listener = TcpListener::bind(self.listen)
            .await
            .with_context(|| format!("--join-listen {}: give it another address", self.listen))?;
        let port = listener.local_addr()?.port();
        let (until, end) = watch::channel(until);
        *open = Some(Open { until, port });
        tokio::spawn(Arc::clone(self).listen(listener, end));
        Ok(port)
    }

    async fn listen(self: Arc<Self>, listener: TcpListener, mut end: watch::Receiver<Instant>) {
        let places = Arc::new(Semaphore::new(MAX_CONVERSATIONS));
        loop {
            let until = *end.borrow_and_update();
            let next = async {
                let place = Arc::clone(&places).acquire_owned().await;
                (place, listener.accept().await)
            };
            let (place, accepted) = tokio::select! {
                next = next => next,
                () = tokio::time::sleep_until(until) => return,
                changed = end.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                },
            };
            let Ok((stream, from)) = accepted else {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let door = Arc::clone(&self);
            tokio::spawn(async move {
                let _place = place;
                match tokio::time::timeout(PATIENCE, door.converse(stream)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::info!(%from, %error, "a server was not let in"),
                    Err(_) => tracing::info!(%from, "a server that would join said nothing"),
                }
            });
        }
    }

    async fn converse(&self, stream: TcpStream) -> Result<()> {
        let stream = self.certificate.acceptor.accept(stream).await?;
        let mut stream = BufReader::new(stream);
        let ask: Ask = read_line(&mut stream, MAX_ASK_BYTES).await?;
        let answer = match self.let_in(&ask).await {
            Ok(bundle) => Answer::Bundle(Box::new(bundle)),
            Err(error) => Answer::Refused(error.to_string()),
        };
        let mut text = serde_json::to_vec(&answer)?;
        text.push(b'\n');
        let stream = stream.get_mut();
        stream.write_all(&text).await?;
        stream.shutdown().await?;
        match answer {
            Answer::Bundle(_) => tracing::info!(public_key = ask.public_key, "a server was let in"),
            Answer::Refused(text) => bail!("{text}"),
        }
        Ok(())
    }

    /// Marks the invite as used, and then gives the bundle: never the other way round.
    async fn let_in(&self, ask: &Ask) -> Result<Bundle> {
        // Before the invite is used up: a file that cannot be read would waste it.
        let bundle = self.bundle()?;
        let hash = hash_of(&ask.secret);
        let now = Timestamp::now();
        let used = self
            .catalog
            .update(&hash, |invite: &mut Invite| {
                if let Some(used) = &invite.used {
                    return Err(format!(
                        "this invite was used at {:.0}, by the server with WireGuard key {}. Make a new one: `tern hosts \
                         invite`. If that server is not yours, somebody has what this cloud's hosts have: see docs/hosts.md",
                        used.at, used.public_key
                    ));
                }
                if invite.expires_at <= now {
                    return Err(format!(
                        "this invite expired at {:.0}. Make a new one: `tern hosts invite`",
                        invite.expires_at
                    ));
                }
                invite.used = Some(Use {
                    at: now,
                    public_key: ask.public_key.chars().take(64).collect(),
                });
                Ok(())
            })
            .await?;
        let invite = match used {
            Ok(Some(invite)) => invite,
            Ok(None) => bail!("there is no such invite. Make one: `tern hosts invite`"),
            Err(refused) => bail!("{refused}"),
        };
        Ok(Bundle {
            region: invite.region,
            ..bundle
        })
    }

    fn bundle(&self) -> Result<Bundle> {
        let text = |path: &Option<PathBuf>| match path {
            Some(path) => std::fs::read_to_string(path)
                .map(Some)
                .with_context(|| format!("{} cannot be read on the host", path.display())),
            None => Ok(None),
        };
        let seal = std::fs::read(self.data_dir.join("keys/seal.key"))
            .context("the sealing key cannot be read on the host")?;
        Ok(Bundle {
            region: String::new(),
            seal_key: STANDARD.encode(seal),
            members: self.etcd.members.clone(),
            user: self.etcd.user.clone(),
            ca: text(&self.etcd.ca)?,
            cert: text(&self.etcd.cert)?,
            key: text(&self.etcd.key)?,
            password: text(&self.etcd.password_file)?,
        })
    }

    async fn make(self: &Arc<Self>, region: Option<String>, time: Duration) -> Result<Invitation> {
        ensure!(
            !self.etcd.members.is_empty(),
            "this cloud's catalog is a file on this server, which no other can share: move it to etcd first (`tern catalog \
             move`, docs/etcd.md)"
        );
        if self.etcd.members.iter().all(|m| is_loopback(m)) {
            bail!(
                "etcd is named by addresses of this server alone ({}): a new server is given the same, so serve with \
                 --etcd https://… that all servers reach",
                self.etcd.members.join(",")
            );
        }
        let port = self.open_for(time).await?;
        let secret = hex::encode(rand::random::<[u8; 32]>());
        let now = Timestamp::now();
        let expires_at = now + time;
        let invite = Invite {
            hash: hash_of(&secret),
            host: self.host,
            region: region.unwrap_or_else(|| self.region.clone()),
            created_at: now,
            expires_at,
            used: None,
        };
        self.catalog.create(&invite).await?;
        let fingerprint = &self.certificate.fingerprint;
        Ok(Invitation {
            join: format!(
                "{}/{fingerprint}/{secret}",
                SocketAddr::new(self.announced, port)
            ),
            region: invite.region,
            expires_at,
        })
    }
}

/// The door as the API knows it.
#[derive(Debug)]
pub struct Invites(pub Arc<Door>);

#[async_trait]
impl Inviter for Invites {
    async fn invite(&self, region: Option<String>, time: Duration) -> Result<Invitation, String> {
        self.0
            .make(region, time)
            .await
            .map_err(|error| format!("{error:#}"))
    }
}

impl Certificate {
    fn load_or_create(path: &Path) -> Result<Self> {
        if !path.exists() {
            let made = rcgen::generate_simple_self_signed(["tern".to_owned()])?;
            let pem = made.signing_key.serialize_pem() + &made.cert.pem();
            write_secret(path, pem.as_bytes())
                .with_context(|| format!("{} cannot be written", path.display()))?;
        }
        let bad = || {
            format!(
                "{} cannot be used: remove it, and a new one is made; invites that were not used are void then",
                path.display()
            )
        };
        let certificate = CertificateDer::from_pem_file(path).with_context(bad)?;
        let key = PrivateKeyDer::from_pem_file(path).with_context(bad)?;
        let fingerprint = hex::encode(Sha256::digest(&certificate));
        let config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .with_context(bad)?;
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            fingerprint,
        })
    }
}

/// What `--join` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    address: SocketAddr,
    fingerprint: [u8; 32],
    secret: String,
}

impl std::str::FromStr for Ticket {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.trim().split('/').collect();
        let ticket = || {
            let [address, fingerprint, secret] = parts[..] else {
                return None;
            };
            let fingerprint = hex::decode(fingerprint).ok()?.try_into().ok()?;
            let secret = Some(secret).filter(|s| s.len() == 64)?;
            Some(Self {
                address: address.parse().ok()?,
                fingerprint,
                secret: secret.to_owned(),
            })
        };
        ticket().ok_or_else(|| {
            "write it as `tern hosts invite` prints it: ADDRESS:PORT/FINGERPRINT/SECRET".to_owned()
        })
    }
}

/// What a server that has joined remembers.
#[derive(Debug, Serialize, Deserialize)]
struct Joined {
    region: String,
    members: Vec<String>,
    user: Option<String>,
    ca: bool,
    cert: bool,
    password: bool,
}

/// Where etcd is and what the region is, as a data directory that has joined remembers.
pub fn remembered(data_dir: &Path) -> Result<Option<(Etcd, String)>> {
    let path = data_dir.join(JOINED);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("{} cannot be read", path.display())),
    };
    let joined: Joined = serde_json::from_slice(&text)
        .with_context(|| format!("{} is damaged: restore it, or give --etcd", path.display()))?;
    let file = |is: bool, name: &str| is.then(|| data_dir.join("keys").join(name));
    let etcd = Etcd {
        members: joined.members,
        ca: file(joined.ca, "etcd-ca.pem"),
        cert: file(joined.cert, "etcd-client.pem"),
        key: file(joined.cert, "etcd-client.key"),
        password_file: file(joined.password, "etcd-password"),
        user: joined.user,
    };
    Ok(Some((etcd, joined.region)))
}

/// Uses an invite for a data directory that has no cloud yet. What was learnt is then [`remembered`].
pub async fn join(data_dir: &Path, ticket: &Ticket, public_key: &str) -> Result<()> {
    for name in ["catalog.db", "host.json", "keys/seal.key"] {
        let path = data_dir.join(name);
        ensure!(
            !path.exists(),
            "{} is there: this data directory has a cloud already. Join with an empty one (--data-dir), or leave --join \
             out; the invite was not used",
            path.display()
        );
    }
    let bundle = match tokio::time::timeout(PATIENCE, ask(ticket, public_key)).await {
        Ok(bundle) => bundle?,
        Err(_) => bail!(
            "{} does not answer: is its port open to this server, and `tern serve` running?",
            ticket.address
        ),
    };
    let keys = data_dir.join("keys");
    let write = |name: &str, text: &[u8]| {
        write_secret(&keys.join(name), text)
            .with_context(|| format!("{} cannot be written", keys.join(name).display()))
    };
    std::fs::create_dir_all(&keys).with_context(|| format!("{}", keys.display()))?;
    for (name, text) in [
        ("etcd-ca.pem", &bundle.ca),
        ("etcd-client.pem", &bundle.cert),
        ("etcd-client.key", &bundle.key),
        ("etcd-password", &bundle.password),
    ] {
        if let Some(text) = text {
            write(name, text.as_bytes())?;
        }
    }
    let seal = STANDARD
        .decode(&bundle.seal_key)
        .context("the sealing key")?;
    write("seal.key", &seal)?;
    let joined = Joined {
        region: bundle.region,
        members: bundle.members,
        user: bundle.user,
        ca: bundle.ca.is_some(),
        cert: bundle.cert.is_some(),
        password: bundle.password.is_some(),
    };
    write_secret(&data_dir.join(JOINED), &serde_json::to_vec_pretty(&joined)?)?;
    tracing::info!(host = %ticket.address, region = joined.region, "this server has joined");
    Ok(())
}

async fn ask(ticket: &Ticket, public_key: &str) -> Result<Bundle> {
    let provider = provider();
    let pinned = Pinned {
        fingerprint: ticket.fingerprint,
        provider: Arc::clone(&provider),
    };
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(pinned))
        .with_no_client_auth();
    let address = ticket.address;
    let stream = TcpStream::connect(address).await.with_context(|| {
        format!("{address} cannot be reached: is its port open to this server, and the invite still good?")
    })?;
    let name = ServerName::IpAddress(address.ip().into());
    let stream = TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
        .with_context(|| format!("{address} was not asked, and the invite not used"))?;
    let mut stream = BufReader::new(stream);
    let mut text = serde_json::to_vec(&Ask {
        secret: ticket.secret.clone(),
        public_key: public_key.to_owned(),
    })?;
    text.push(b'\n');
    stream.get_mut().write_all(&text).await?;
    stream.get_mut().flush().await?;
    match read_line(&mut stream, MAX_ANSWER_BYTES).await? {
        Answer::Bundle(bundle) => Ok(*bundle),
        Answer::Refused(text) => bail!("{address} refuses: {text}"),
    }
}

async fn read_line<T: serde::de::DeserializeOwned>(
    from: &mut (impl tokio::io::AsyncBufRead + Unpin),
    most: u64,
) -> Result<T> {
    let mut line = Vec::new();
    from.take(most).read_until(b'\n', &mut line).await?;
    ensure!(
        line.ends_with(b"\n"),
        "the other side broke off, or is no Tern"
    );
    serde_json::from_slice(&line).context("the other side is no Tern, or of another version")
}

/// Takes one certificate and no other; who signed it and for which name does not matter.
#[derive(Debug)]
struct Pinned {
    fingerprint: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if Sha256::digest(certificate)[..] == self.fingerprint {
            return Ok(ServerCertVerified::assertion());
        }
        Err(rustls::Error::General(
            "its certificate is not the one that the invite names: something answers in its place"
                .to_owned(),
        ))
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // The certificate is public: that the other side has its key is what counts.
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn hash_of(secret: &str) -> String {
    hex::encode(Sha256::digest(secret))
}

/// Whether an etcd member is named by an address that every server has.
fn is_loopback(member: &str) -> bool {
    let uri: Option<http::Uri> = member.parse().ok();
    let host = uri.as_ref().and_then(|u| u.host()).unwrap_or_default();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let address: Option<IpAddr> = bare.parse().ok();
    host == "localhost" || address.is_some_and(|ip| ip.is_loopback() || ip.is_unspecified())
}

#[cfg(test)]
mod tests;
