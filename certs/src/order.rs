//! One order, from its making to a chain (RFC 8555 section 7.4). It may be followed in several sittings: whatever
//! the directory takes its time for, the same order is asked for again.

use std::time::{Duration, Instant};

use instant_acme::{
    Account, AuthorizationStatus, ChallengeStatus, ChallengeType, Identifier, NewOrder, Order,
    OrderStatus, RetryPolicy,
};
use jiff::{SignedDuration, Timestamp};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PublicKeyData as _};
use tern_catalog::{
    AcmeChallenge, Catalog, CatalogError, ChallengeKind, Hostname, Record as _, View,
};
use thiserror::Error;
use x509_parser::pem::Pem;

use crate::client::Refusal;

/// What was got.
pub struct Issued {
    /// PEM, leaf first.
    pub chain_pem: String,
    pub not_before: Timestamp,
    pub not_after: Timestamp,
}

/// Why an order came to nothing, or has not come to its end yet.
#[derive(Debug, Error)]
pub enum OrderError {
    #[error(transparent)]
    Acme(#[from] instant_acme::Error),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error("the directory is still working on the order ({what})")]
    Unfinished {
        what: &'static str,
        again: Timestamp,
    },
    #[error("the directory offers no {} for this name", .0.as_str())]
    NotOffered(ChallengeKind),
    #[error("the name was not validated by {}: {detail}", kind.as_str())]
    NotValidated { kind: ChallengeKind, detail: String },
    #[error("a key or certificate could not be made: {0}")]
    Crypto(#[from] rcgen::Error),
    #[error("the certificate that was issued cannot be read: {0}")]
    Unreadable(String),
    #[error("the certificate that was made of this order is for another key; another is ordered")]
    OtherKey,
}

impl OrderError {
    /// Whether the order is no more, so that another must be made.
    pub fn is_its_end(&self) -> bool {
        match self {
            Self::Unfinished { .. } | Self::Catalog(_) => false,
            Self::NotOffered(_)
            | Self::NotValidated { .. }
            | Self::Crypto(_)
            | Self::OtherKey
            | Self::Unreadable(_) => true,
            Self::Acme(error @ instant_acme::Error::Api(_)) => !is_problem(error, "badNonce"),
            // Overload, or a limit; what is gone or forbidden stays so.
            Self::Acme(error) => Refusal::of(error).is_some_and(|refusal| {
                refusal.status.is_client_error() && refusal.retry_after.is_none()
            }),
        }
    }
}

/// How long one sitting lasts: directories validate at their leisure (pebble waits up to 15 s before it begins), and
/// other names want their turn.
const SITTING: RetryPolicy = RetryPolicy::new()
    .initial_delay(Duration::from_millis(250))
    .backoff(1.5)
    .timeout(Duration::from_secs(120));
/// Until the next sitting, where the directory does not say.
const AGAIN: SignedDuration = SignedDuration::from_secs(60);

/// Makes an order for one host name.
pub async fn make(account: &Account, hostname: &Hostname) -> Result<Order, OrderError> {
    let identifiers = [Identifier::Dns(hostname.to_string())];
    Ok(account.new_order(&NewOrder::new(&identifiers)).await?)
}

/// Who follows an order, and how.
pub struct Follower<'a> {
    pub catalog: &'a Catalog,
    pub view: &'a View,
    pub hostname: &'a Hostname,
    pub kind: ChallengeKind,
    /// What the certificate is to be for.
    pub key: &'a KeyPair,
}

impl Follower<'_> {
    /// Follows an order as far as it goes in one sitting, from wherever it stands.
    pub async fn follow(&self, mut order: Order) -> Result<Issued, OrderError> {
        if order.state().status == OrderStatus::Pending {
            let validated = self.validate(&mut order).await;
            // Whatever came of it, the challenge is no longer to be answered: but while it is looked at.
            if !matches!(validated, Err(OrderError::Unfinished { .. })) {
                let id = format!("{}/{}", self.hostname, self.kind.as_str());
                self.catalog.delete::<AcmeChallenge>(&id).await?;
            }
            validated?;
        }
        if order.state().status == OrderStatus::Invalid {
            return Err(self.invalid(&mut order).await);
        }
        if order.state().status == OrderStatus::Ready {
            self.finalize(&mut order).await?;
        }
        let chain_pem = match order.poll_certificate(&SITTING).await {
            Ok(chain) => chain,
            Err(_) if order.state().status == OrderStatus::Invalid => {
                return Err(self.invalid(&mut order).await);
            }
            Err(error) => return Err(unfinished(error, "it makes the certificate")),
        };
        // Somebody else who follows the same order (another host of this cloud) may have asked for it with a key of its own.
        if !is_for(&chain_pem, self.key)? {
            return Err(OrderError::OtherKey);
        }
        let (not_before, not_after) = validity(&chain_pem)?;
        Ok(Issued {
            chain_pem,
            not_before,
            not_after,
        })
    }

    async fn validate(&self, order: &mut Order) -> Result<(), OrderError> {
        let wanted = match self.kind {
            ChallengeKind::Http01 => ChallengeType::Http01,
            ChallengeKind::TlsAlpn01 => ChallengeType::TlsAlpn01,
        };
        let mut authorizations = order.authorizations();
        while let Some(authorization) = authorizations.next().await {
            let mut authorization = authorization?;
            if authorization.status != AuthorizationStatus::Pending {
                continue;
            }
            let mut challenge = authorization
                .challenge(wanted.clone())
                .ok_or(OrderError::NotOffered(self.kind))?;
            let record = AcmeChallenge {
                hostname: self.hostname.clone(),
                kind: self.kind,
                token: challenge.token.clone(),
                key_authorization: challenge.key_authorization().as_str().to_owned(),
            };
            self.catalog.put(&record).await?;
            // The directory may ask at once: our own ingress must be able to answer first.
            self.view
                .wait_for(|s| {
                    s.challenges
                        .get(&record.id())
                        .filter(|c| ***c == record)
                        .map(drop)
                })
                .await;
            // An earlier sitting may have asked for it.
            if challenge.status == ChallengeStatus::Pending {
                challenge.set_ready().await?;
            }
        }
        match order.poll_ready(&SITTING).await {
            Ok(OrderStatus::Invalid) => Err(self.invalid(order).await),
            Ok(_) => Ok(()),
            Err(_) if order.state().status == OrderStatus::Invalid => {
                Err(self.invalid(order).await)
            }
            Err(error) => Err(unfinished(error, "it validates the name")),
        }
    }

    async fn finalize(&self, order: &mut Order) -> Result<(), OrderError> {
        let mut params = CertificateParams::new(vec![self.hostname.to_string()])?;
        params.distinguished_name = DistinguishedName::new();
        let request = params.serialize_request(self.key)?;
        match order.finalize_csr(request.der()).await {
            // An earlier sitting's request was taken, though its answer did not arrive.
            Err(error) if is_problem(&error, "orderNotReady") => Ok(()),
            other => Ok(other?),
        }
    }

    /// What the directory says of an order that it has given up.
    async fn invalid(&self, order: &mut Order) -> OrderError {
        let mut texts: Vec<String> = order.state().error.iter().map(|e| e.to_string()).collect();
        let mut authorizations = order.authorizations();
        while let Some(Ok(mut authorization)) = authorizations.next().await {
            if let Ok(state) = authorization.refresh().await {
                let errors = state.challenges.iter().filter_map(|c| c.error.as_ref());
                texts.extend(errors.map(ToString::to_string));
            }
        }
        OrderError::NotValidated {
            kind: self.kind,
            detail: match texts.is_empty() {
                true => "the directory gave no reason".to_owned(),
                false => texts.join("; "),
            },
        }
    }
}

/// A sitting's end is not the order's.
fn unfinished(error: instant_acme::Error, what: &'static str) -> OrderError {
    let instant_acme::Error::Timeout(told) = error else {
        return error.into();
    };
    let wait = told.map(|again| again.saturating_duration_since(Instant::now()));
    let wait = wait.and_then(|wait| SignedDuration::try_from(wait).ok());
    let now = Timestamp::now();
    OrderError::Unfinished {
        what,
        again: now.saturating_add(wait.unwrap_or(AGAIN)).unwrap_or(now),
    }
}

/// Whether an error is this one of ACME's (RFC 8555 section 6.7), whatever its status.
pub fn is_problem(error: &instant_acme::Error, name: &str) -> bool {
    let problem = match error {
        instant_acme::Error::Api(problem) => Some(problem),
        other => Refusal::of(other).and_then(|refusal| refusal.problem.as_ref()),
    };
    let kind = problem.and_then(|problem| problem.r#type.as_deref());
    kind.and_then(|kind| kind.strip_prefix("urn:ietf:params:acme:error:")) == Some(name)
}

fn unreadable(error: &dyn std::fmt::Display) -> OrderError {
    OrderError::Unreadable(error.to_string())
}

/// A chain's first certificate.
fn leaf(chain_pem: &str) -> Result<Pem, OrderError> {
    let mut all = Pem::iter_from_buffer(chain_pem.as_bytes());
    let leaf = all.next().ok_or_else(|| unreadable(&"it is empty"))?;
    leaf.map_err(|e| unreadable(&e))
}

/// Whether a chain's leaf is for this key.
fn is_for(chain_pem: &str, key: &KeyPair) -> Result<bool, OrderError> {
    let leaf = leaf(chain_pem)?;
    let leaf = leaf.parse_x509().map_err(|e| unreadable(&e))?;
    Ok(leaf.public_key().raw == key.subject_public_key_info())
}

/// The validity of a chain's leaf.
fn validity(chain_pem: &str) -> Result<(Timestamp, Timestamp), OrderError> {
    let leaf = leaf(chain_pem)?;
    let leaf = leaf.parse_x509().map_err(|e| unreadable(&e))?;
    let time = |t: x509_parser::time::ASN1Time| {
        Timestamp::from_second(t.timestamp()).map_err(|e| unreadable(&e))
    };
    Ok((
        time(leaf.validity().not_before)?,
        time(leaf.validity().not_after)?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_for_one_key_alone() {
        let [ours, theirs] = [(), ()].map(|()| KeyPair::generate().unwrap());
        let made = CertificateParams::new(vec!["shop.example".to_owned()]).unwrap();
        let chain = made.self_signed(&ours).unwrap().pem();
        assert!(is_for(&chain, &ours).unwrap());
        assert!(!is_for(&chain, &theirs).unwrap());
        assert!(OrderError::OtherKey.is_its_end());
        assert!(is_for("no certificate", &ours).is_err());
    }
}
