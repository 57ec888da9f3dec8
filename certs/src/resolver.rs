//! Certificates for rustls, by server name.
//!
//! A name that we do not serve, or have no certificate for yet, gets no handshake: a self-signed
//! certificate would only teach people to click on. The alert says `unrecognized_name`-like failure, and
//! `tern certs list` says why.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::RwLock;
use rcgen::{CertificateParams, CustomExtension, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::crypto::ring::sign::any_supported_type;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use sha2::{Digest as _, Sha256};
use tern_catalog::{Certificate, ChallengeKind, Hostname, View};

use crate::seal::Sealer;

/// Gives certificates by server name, and answers tls-alpn-01.
pub struct SniResolver {
    view: View,
    sealer: Arc<Sealer>,
    /// Parsed once for each record; a renewed one is another record.
    parsed: RwLock<HashMap<Hostname, Parsed>>,
}

/// A record, and what it holds: nothing while it has no key, or where it cannot be used.
type Parsed = (Arc<Certificate>, Option<Arc<CertifiedKey>>);

/// The protocol of RFC 8737.
const ACME_TLS: &[u8] = b"acme-tls/1";

impl SniResolver {
    /// Gives what this view holds.
    pub fn new(view: View, sealer: Arc<Sealer>) -> Self {
        Self {
            view,
            sealer,
            parsed: RwLock::default(),
        }
    }

    fn find(&self, hostname: &Hostname) -> Option<Arc<CertifiedKey>> {
        let snapshot = self.view.snapshot();
        // One may be kept for a name that no app has at the moment.
        let record = snapshot.certificates.get(hostname);
        let record = record.filter(|_| snapshot.hostnames.contains_key(hostname));
        let Some(record) = record.cloned() else {
            if self.parsed.read().contains_key(hostname) {
                self.parsed.write().remove(hostname);
            }
            return None;
        };
        if let Some((of, key)) = self.parsed.read().get(hostname)
            && Arc::ptr_eq(of, &record)
        {
            return key.clone();
        }
        let key = self.parse(&record).unwrap_or_else(|error| {
            // Once for each record, not for each handshake.
            tracing::error!(%hostname, error, "the certificate cannot be used");
            None
        });
        let key = key.map(Arc::new);
        self.parsed
            .write()
            .insert(hostname.clone(), (record, key.clone()));
        key
    }

    /// A record's chain and key; none while it has none.
    fn parse(&self, record: &Certificate) -> Result<Option<CertifiedKey>, String> {
        let Some(sealed) = &record.key else {
            return Ok(None);
        };
        let chain: Vec<CertificateDer<'static>> =
            CertificateDer::pem_slice_iter(record.chain_pem.as_bytes())
                .collect::<Result<_, _>>()
                .map_err(|e| e.to_string())?;
        let key = self
            .sealer
            .open(record.hostname.as_str(), sealed)
            .map_err(|e| e.to_string())?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.to_vec()));
        let key = any_supported_type(&key).map_err(|e| e.to_string())?;
        Ok(Some(CertifiedKey::new(chain, key)))
    }

    /// The certificate that proves control of a name (RFC 8737 section 3). Made when it is asked for, and
    /// only while a challenge is pending.
    fn challenge(&self, hostname: &Hostname) -> Option<Arc<CertifiedKey>> {
        let id = format!("{hostname}/{}", ChallengeKind::TlsAlpn01.as_str());
        let challenge = self.view.snapshot().challenges.get(&id)?.clone();
        match prove(hostname, &challenge.key_authorization) {
            Ok(key) => Some(Arc::new(key)),
            Err(error) => {
                tracing::error!(%hostname, error, "the challenge's certificate cannot be made");
                None
            }
        }
    }
}

impl ResolvesServerCert for SniResolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let hostname: Hostname = hello.server_name()?.to_ascii_lowercase().parse().ok()?;
        let mut protocols = hello.alpn().into_iter().flatten();
        if protocols.next() == Some(ACME_TLS) && protocols.next().is_none() {
            return self.challenge(&hostname);
        }
        self.find(&hostname)
    }
}

impl std::fmt::Debug for SniResolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SniResolver").finish_non_exhaustive()
    }
}

fn prove(hostname: &Hostname, key_authorization: &str) -> Result<CertifiedKey, String> {
    let text = |e: rcgen::Error| e.to_string();
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(text)?;
    let mut params = CertificateParams::new(vec![hostname.to_string()]).map_err(text)?;
    let digest = Sha256::digest(key_authorization);
    params
        .custom_extensions
        .push(CustomExtension::new_acme_identifier(&digest));
    let certificate = params.self_signed(&key).map_err(text)?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let key = any_supported_type(&key).map_err(|e| e.to_string())?;
    Ok(CertifiedKey::new(vec![certificate.der().clone()], key))
}
