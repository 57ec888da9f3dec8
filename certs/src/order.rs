//! One order, from nothing to a chain (RFC 8555 section 7.4).

use std::time::Duration;

use instant_acme::{
    Account, AuthorizationStatus, ChallengeType, Identifier, NewOrder, OrderStatus, RetryPolicy,
};
use jiff::Timestamp;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256};
use tern_catalog::{
    AcmeChallenge, Catalog, CatalogError, ChallengeKind, Hostname, Record as _, View,
};
use thiserror::Error;
use x509_parser::pem::Pem;
use zeroize::Zeroizing;

/// What was got.
pub struct Issued {
    /// PEM, leaf first.
    pub chain_pem: String,
    /// PKCS #8, DER.
    pub key: Zeroizing<Vec<u8>>,
    pub not_before: Timestamp,
    pub not_after: Timestamp,
}

/// Why an order came to nothing.
#[derive(Debug, Error)]
pub enum OrderError {
    #[error(transparent)]
    Acme(#[from] instant_acme::Error),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error("the directory offers no {} for this name", .0.as_str())]
    NotOffered(ChallengeKind),
    #[error("the name was not validated by {}: {detail}", kind.as_str())]
    NotValidated { kind: ChallengeKind, detail: String },
    #[error("a key or certificate could not be made: {0}")]
    Crypto(#[from] rcgen::Error),
    #[error("the certificate that was issued cannot be read: {0}")]
    Unreadable(String),
}

/// Directories validate at their leisure: pebble waits up to 15 s before it begins.
const VALIDATION: RetryPolicy = RetryPolicy::new()
    .initial_delay(Duration::from_millis(250))
    .backoff(1.5)
    .timeout(Duration::from_secs(120));
const FINALIZING: RetryPolicy = RetryPolicy::new()
    .initial_delay(Duration::from_millis(250))
    .backoff(1.5)
    .timeout(Duration::from_secs(60));

/// Gets a certificate for one host name, validated this way.
pub async fn run(
    account: &Account,
    catalog: &Catalog,
    view: &View,
    hostname: &Hostname,
    kind: ChallengeKind,
) -> Result<Issued, OrderError> {
    let validated = validate(account, catalog, view, hostname, kind).await;
    // Whatever came of it, the challenge is no longer to be answered.
    let id = format!("{hostname}/{}", kind.as_str());
    catalog.delete::<AcmeChallenge>(&id).await?;
    let mut order = validated?;

    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::new(vec![hostname.to_string()])?;
    params.distinguished_name = DistinguishedName::new();
    let request = params.serialize_request(&key)?;
    order.finalize_csr(request.der()).await?;
    let chain_pem = order.poll_certificate(&FINALIZING).await?;
    let (not_before, not_after) = validity(&chain_pem)?;
    Ok(Issued {
        chain_pem,
        key: Zeroizing::new(key.serialize_der()),
        not_before,
        not_after,
    })
}

async fn validate(
    account: &Account,
    catalog: &Catalog,
    view: &View,
    hostname: &Hostname,
    kind: ChallengeKind,
) -> Result<instant_acme::Order, OrderError> {
    let wanted = match kind {
        ChallengeKind::Http01 => ChallengeType::Http01,
        ChallengeKind::TlsAlpn01 => ChallengeType::TlsAlpn01,
    };
    let identifiers = [Identifier::Dns(hostname.to_string())];
    let mut order = account.new_order(&NewOrder::new(&identifiers)).await?;
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        if authorization.status == AuthorizationStatus::Valid {
            continue;
        }
        let mut challenge = authorization
            .challenge(wanted.clone())
            .ok_or(OrderError::NotOffered(kind))?;
        let record = AcmeChallenge {
            hostname: hostname.clone(),
            kind,
            token: challenge.token.clone(),
            key_authorization: challenge.key_authorization().as_str().to_owned(),
        };
        catalog.put(&record).await?;
        // The directory may ask at once: our own ingress must be able to answer first.
        view.wait_for(|s| {
            s.challenges
                .get(&record.id())
                .filter(|c| ***c == record)
                .map(drop)
        })
        .await;
        challenge.set_ready().await?;
    }
    match order.poll_ready(&VALIDATION).await? {
        OrderStatus::Ready | OrderStatus::Valid => Ok(order),
        _ => Err(OrderError::NotValidated {
            kind,
            detail: detail(&mut order).await,
        }),
    }
}

/// What the directory says of a validation that failed.
async fn detail(order: &mut instant_acme::Order) -> String {
    let mut texts = Vec::new();
    let mut authorizations = order.authorizations();
    while let Some(Ok(mut authorization)) = authorizations.next().await {
        if let Ok(state) = authorization.refresh().await {
            let errors = state.challenges.iter().filter_map(|c| c.error.as_ref());
            texts.extend(errors.map(ToString::to_string));
        }
    }
    if texts.is_empty() {
        "the directory gave no reason".to_owned()
    } else {
        texts.join("; ")
    }
}

/// The validity of a chain's leaf.
fn validity(chain_pem: &str) -> Result<(Timestamp, Timestamp), OrderError> {
    let unreadable = |e: &dyn std::fmt::Display| OrderError::Unreadable(e.to_string());
    let leaf = Pem::iter_from_buffer(chain_pem.as_bytes())
        .next()
        .ok_or_else(|| unreadable(&"it is empty"))?
        .map_err(|e| unreadable(&e))?;
    let leaf = leaf.parse_x509().map_err(|e| unreadable(&e))?;
    let time = |t: x509_parser::time::ASN1Time| {
        Timestamp::from_second(t.timestamp()).map_err(|e| unreadable(&e))
    };
    Ok((
        time(leaf.validity().not_before)?,
        time(leaf.validity().not_after)?,
    ))
}
