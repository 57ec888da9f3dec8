//! Certificates and what getting them needs. All written by `tern-certs`.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{Hostname, OrgSlug, Record};

/// The certificate of one host name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// The host name.
    pub hostname: Hostname,
    /// Where it stands.
    pub state: CertificateState,
    /// The chain, PEM, leaf first; empty until issued.
    #[serde(default)]
    pub chain_pem: String,
    /// Its private key, encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<SealedKey>,
    /// End of its validity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<Timestamp>,
    /// When it is to be renewed, or tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_attempt: Option<Timestamp>,
    /// Failures since the last success.
    #[serde(default)]
    pub failures: u32,
    /// Why there is none yet, or why it is not renewed: the last failure or what is waited for, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// The order under way. Followed to its end, also over a restart: another one would cost another of what the
    /// directory allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<PendingOrder>,
    /// Whose app the name leads to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub organization: Option<OrgSlug>,
    /// Since when no app has the name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unwanted_since: Option<Timestamp>,
}

/// An order that the directory has taken (RFC 8555 section 7.1.3).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingOrder {
    /// Where it is.
    pub url: String,
    /// The directory that took it.
    pub directory: String,
    /// How the name is validated.
    pub kind: ChallengeKind,
    /// The private key that its certificate will be for, encrypted.
    pub key: SealedKey,
    /// When it was made.
    pub created_at: Timestamp,
}

impl Certificate {
    /// A name that none has been got for.
    pub fn wanted(hostname: Hostname) -> Self {
        Self {
            hostname,
            state: CertificateState::Pending,
            chain_pem: String::new(),
            key: None,
            not_after: None,
            next_attempt: None,
            failures: 0,
            last_error: None,
            order: None,
            organization: None,
            unwanted_since: None,
        }
    }
}

/// Where a certificate stands. A valid one that is being renewed stays `Issued`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CertificateState {
    /// Wanted, none yet.
    Pending,
    /// Can be served.
    Issued,
    /// None yet, and the last attempt failed; tried again at `next_attempt`.
    Failed,
}

/// A private key or another secret, encrypted with the deployment's own key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedKey {
    /// The algorithm, for the day it changes.
    pub algorithm: String,
    /// Nonce, base64.
    pub nonce: String,
    /// Ciphertext and tag, base64.
    pub ciphertext: String,
}

impl std::fmt::Debug for SealedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SealedKey")
            .field("algorithm", &self.algorithm)
            .finish_non_exhaustive()
    }
}

/// An account at an ACME directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcmeAccount {
    /// SHA-256 of the directory's URL, hexadecimal: one account each.
    pub id: String,
    /// The directory.
    pub directory: String,
    /// The account's credentials, encrypted.
    pub credentials: SealedKey,
}

/// What has been used of a directory's limits: by its account in all, or for one registered domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcmeUsage {
    /// The account's id; for a registered domain a slash and that behind it.
    pub id: String,
    /// When, and for which name. No more than the limit allows, and no older than it looks back.
    pub used: Vec<(Timestamp, Hostname)>,
    /// No order before: the directory said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_before: Option<Timestamp>,
}

/// A challenge that the ingress must answer now. In the catalog, so that every edge can.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcmeChallenge {
    /// The host name being validated.
    pub hostname: Hostname,
    /// How.
    pub kind: ChallengeKind,
    /// The token (http-01's path).
    pub token: String,
    /// The key authorization (RFC 8555 section 8.1).
    pub key_authorization: String,
}

/// How a host name is validated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChallengeKind {
    /// RFC 8555 section 8.3.
    #[serde(rename = "http-01")]
    Http01,
    /// RFC 8737.
    #[serde(rename = "tls-alpn-01")]
    TlsAlpn01,
}

impl ChallengeKind {
    /// Its name in ACME.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http01 => "http-01",
            Self::TlsAlpn01 => "tls-alpn-01",
        }
    }
}

impl Record for Certificate {
    const PREFIX: &'static str = "certificates/";
    fn id(&self) -> String {
        self.hostname.to_string()
    }
}

impl Record for AcmeAccount {
    const PREFIX: &'static str = "acme/accounts/";
    fn id(&self) -> String {
        self.id.clone()
    }
}

impl Record for AcmeUsage {
    const PREFIX: &'static str = "acme/usage/";
    fn id(&self) -> String {
        self.id.clone()
    }
}

impl Record for AcmeChallenge {
    const PREFIX: &'static str = "acme/challenges/";
    fn id(&self) -> String {
        format!("{}/{}", self.hostname, self.kind.as_str())
    }
}
