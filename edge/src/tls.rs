//! The TLS of the public: 1.2 and 1.3, certificates by SNI.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use rustls::crypto::CryptoProvider;
use rustls::server::{ProducesTickets, ResolvesServerCert, StoresServerSessions};
use rustls::{ServerConfig, SupportedProtocolVersion};
use tern_catalog::{PortKind, TlsOptions};

/// HTTP/2 (RFC 9113 section 3.2).
pub const H2: &[u8] = b"h2";
/// HTTP/1.1 (RFC 7301 section 6).
pub const HTTP_11: &[u8] = b"http/1.1";
/// HTTP/3 (RFC 9114 section 3.1).
pub const H3: &[u8] = b"h3";
/// As PostgreSQL's protocol names itself where TLS comes first (its documentation, section 54.2.11).
const POSTGRESQL: &[u8] = b"postgresql";
/// RFC 8737.
pub const ACME: &[u8] = b"acme-tls/1";
/// Sessions kept to be resumed, for TLS 1.2; TLS 1.3 uses tickets.
const SESSIONS: usize = 16_384;
/// Sets of options remembered; apps choose them.
const REMEMBERED: usize = 256;

/// How TLS over TCP is spoken, by what services ask for.
#[derive(Debug)]
pub struct Configs {
    resolver: Arc<dyn ResolvesServerCert>,
    sessions: Arc<dyn StoresServerSessions>,
    /// One for all: which name a ticket was given for is in it.
    ticketer: Arc<dyn ProducesTickets>,
    usual: Arc<ServerConfig>,
    others: Mutex<HashMap<Asked, Arc<ServerConfig>>>,
}

/// ALPN's protocols and the versions that are set, and what is spoken.
type Asked = (Vec<String>, Vec<String>, PortKind);

impl Configs {
    pub fn new(resolver: Arc<dyn ResolvesServerCert>) -> Result<Self, rustls::Error> {
        let sessions = rustls::server::ServerSessionMemoryCache::new(SESSIONS);
        let ticketer = rustls::crypto::ring::Ticketer::new()?;
        let both = rustls::ALL_VERSIONS;
        let mut usual = config(both, Arc::clone(&resolver))?;
        usual.alpn_protocols = [H2, HTTP_11, ACME].map(<[u8]>::to_vec).to_vec();
        usual.session_storage = sessions.clone();
        usual.ticketer = Arc::clone(&ticketer);
        Ok(Self {
            resolver,
            sessions,
            ticketer,
            usual: Arc::new(usual),
            others: Mutex::default(),
        })
    }

    /// Both versions, HTTP/2 and 1.1, and answers to ACME's challenges.
    pub fn usual(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.usual)
    }

    /// As a service asks for it.
    pub fn get(&self, options: Option<&TlsOptions>, kind: PortKind) -> Arc<ServerConfig> {
        let (alpn, versions) = options.map_or((&[][..], &[][..]), |o| (&*o.alpn, &*o.versions));
        if kind.is_http() && alpn.is_empty() && versions.is_empty() {
            return self.usual();
        }
        let key = (alpn.to_vec(), versions.to_vec(), kind);
        let mut others = self.others.lock();
        if let Some(known) = others.get(&key) {
            return Arc::clone(known);
        }
        let config = self.make(alpn, versions, kind).unwrap_or_else(|error| {
            tracing::error!(%error, ?alpn, ?versions, "TLS options cannot be had");
            self.usual()
        });
        if others.len() >= REMEMBERED {
            others.clear();
        }
        others.insert(key, Arc::clone(&config));
        config
    }

    fn make(
        &self,
        alpn: &[String],
        versions: &[String],
        kind: PortKind,
    ) -> Result<Arc<ServerConfig>, rustls::Error> {
        // What is not spoken was refused or warned of when the service was written.
        let asked = |name: &str| versions.is_empty() || versions.iter().any(|v| v == name);
        let known: [(&str, &'static SupportedProtocolVersion); 2] = [
            ("TLSv1.2", &rustls::version::TLS12),
            ("TLSv1.3", &rustls::version::TLS13),
        ];
        let known = known.into_iter().filter(|(name, _)| asked(name));
        let chosen: Vec<_> = known.map(|(_, version)| version).collect();
        let mut config = config(&chosen, Arc::clone(&self.resolver))?;
        let named = alpn.iter().map(|name| name.clone().into_bytes());
        config.alpn_protocols = if kind.is_http() {
            let spoken = [H2, HTTP_11].map(<[u8]>::to_vec).into_iter();
            let named: Vec<_> = named.collect();
            let kept = spoken.filter(|p| named.is_empty() || named.contains(p));
            kept.chain([ACME.to_vec()]).collect()
        } else if kind == PortKind::PgTls && alpn.is_empty() {
            // Without it libpq ends a connection that begins with TLS at once.
            vec![POSTGRESQL.to_vec()]
        } else {
            named.collect()
        };
        config.session_storage = Arc::clone(&self.sessions);
        config.ticketer = Arc::clone(&self.ticketer);
        Ok(Arc::new(config))
    }
}

/// For connections over QUIC, which knows TLS 1.3 alone (RFC 9001 section 4.2). Early data stays off.
pub fn quic(resolver: Arc<dyn ResolvesServerCert>) -> Result<ServerConfig, rustls::Error> {
    let mut config = config(&[&rustls::version::TLS13], resolver)?;
    config.alpn_protocols = vec![H3.to_vec()];
    config.ticketer = rustls::crypto::ring::Ticketer::new()?;
    Ok(config)
}

fn config(
    versions: &[&'static SupportedProtocolVersion],
    resolver: Arc<dyn ResolvesServerCert>,
) -> Result<ServerConfig, rustls::Error> {
    let builder = ServerConfig::builder_with_provider(provider());
    let builder = builder.with_protocol_versions(versions)?;
    Ok(builder.with_no_client_auth().with_cert_resolver(resolver))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
