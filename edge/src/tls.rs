//! The TLS of the public: 1.2 and 1.3, certificates by SNI.

use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::server::ResolvesServerCert;

/// HTTP/2 (RFC 9113 section 3.2).
pub const H2: &[u8] = b"h2";
/// HTTP/1.1 (RFC 7301 section 6).
pub const HTTP_11: &[u8] = b"http/1.1";
/// HTTP/3 (RFC 9114 section 3.1).
pub const H3: &[u8] = b"h3";
/// RFC 8737.
pub const ACME: &[u8] = b"acme-tls/1";
/// Sessions kept to be resumed, for TLS 1.2; TLS 1.3 uses tickets.
const SESSIONS: usize = 16_384;

/// For connections over TCP.
pub fn config(resolver: Arc<dyn ResolvesServerCert>) -> Result<ServerConfig, rustls::Error> {
    let builder = ServerConfig::builder_with_provider(provider());
    let mut config = builder
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    config.alpn_protocols = [H2, HTTP_11, ACME].map(<[u8]>::to_vec).to_vec();
    config.session_storage = rustls::server::ServerSessionMemoryCache::new(SESSIONS);
    config.ticketer = rustls::crypto::ring::Ticketer::new()?;
    Ok(config)
}

/// For connections over QUIC, which knows TLS 1.3 alone (RFC 9001 section 4.2). Early data stays off.
pub fn quic(resolver: Arc<dyn ResolvesServerCert>) -> Result<ServerConfig, rustls::Error> {
    let builder = ServerConfig::builder_with_provider(provider());
    let mut config = builder
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    config.alpn_protocols = vec![H3.to_vec()];
    config.ticketer = rustls::crypto::ring::Ticketer::new()?;
    Ok(config)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
