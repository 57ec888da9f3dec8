//! Keeps every wanted host name's certificate current.
//!
//! Wanted is what [`HostnameRoute`](tern_catalog::HostnameRoute) records name. One task looks at them whenever the catalog changes or
//! something falls due; each order runs in a task of its own, a few at a time. All it knows is in the
//! catalog, so a restart goes on where it was, back-off included.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use instant_acme::{Account, AccountCredentials, NewAccount};
use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use tern_catalog::{
    AcmeAccount, AcmeChallenge, Catalog, CatalogError, Certificate, CertificateState, Hostname,
    View, keep_running,
};
use thiserror::Error;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::order::{self, OrderError};
use crate::plan;
use crate::resolver::SniResolver;
use crate::seal::{SealError, Sealer};

/// How certificates are got.
#[derive(Debug, Clone)]
pub struct CertsConfig {
    /// The ACME directory.
    pub directory: String,
    /// A root (PEM) to trust for the directory instead of the system's.
    pub root_ca: Option<PathBuf>,
    /// Mail address for the account.
    pub contact: Option<String>,
    /// The key that seals private keys; made at the first start.
    pub seal_key: PathBuf,
}

/// Why there is no issuer.
#[derive(Debug, Error)]
pub enum CertsError {
    /// The sealing key cannot be used.
    #[error("the key that seals private keys cannot be used: {0}")]
    Seal(#[from] SealError),
}

/// A running issuer.
pub struct Issuer {
    resolver: Arc<SniResolver>,
    end: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

/// Orders at once: enough for a deployment's first start, gentle to the directory.
const AT_ONCE: usize = 4;
/// Longest sleep: clocks are set, and records change by hand.
const LOOK_AGAIN: Duration = Duration::from_secs(600);

/// Longest one order may take: a directory that does not answer must not block a name for good.
const ORDER: Duration = Duration::from_secs(300);
/// Pause after a result that the catalog did not take.
const UNNOTED: Duration = Duration::from_secs(10);
/// RFC 8555 section 6.7: the directory has lost the account.
const UNKNOWN_ACCOUNT: &str = "accountDoesNotExist";

impl Issuer {
    /// Begins to get certificates.
    pub fn start(config: CertsConfig, catalog: Catalog, view: View) -> Result<Self, CertsError> {
        let sealer = Arc::new(Sealer::load_or_create(&config.seal_key)?);
        let resolver = Arc::new(SniResolver::new(view.clone(), Arc::clone(&sealer)));
        let end = CancellationToken::new();
        let worker = Worker {
            config,
            catalog,
            view,
            sealer,
            account: Mutex::default(),
        };
        let (worker, ending) = (Arc::new(worker), end.clone());
        let run = move || Arc::clone(&worker).run(ending.clone());
        let task =
            tokio::spawn(async move { keep_running("the issuer of certificates", run).await });
        Ok(Self {
            resolver,
            end,
            task,
        })
    }

    /// Gives certificates to rustls.
    pub fn resolver(&self) -> Arc<SniResolver> {
        Arc::clone(&self.resolver)
    }

    /// Ends it. Orders under way are given up; they are begun anew at the next start.
    pub async fn shutdown(self) {
        self.end.cancel();
        let _ = self.task.await;
    }
}

struct Worker {
    config: CertsConfig,
    catalog: Catalog,
    view: View,
    sealer: Arc<Sealer>,
    /// Locked while it is found or made: two orders at the first start must not make two accounts.
    account: Mutex<Option<Account>>,
}

impl Worker {
    async fn run(self: Arc<Self>, end: CancellationToken) {
        // Challenges that a stop left behind would be answered for ever.
        for stale in self.view.snapshot().challenges.keys() {
            self.keep(self.catalog.delete::<AcmeChallenge>(stale).await);
        }
        let mut changes = self.view.changes();
        let mut orders: JoinSet<Hostname> = JoinSet::new();
        let mut under_way: HashSet<Hostname> = HashSet::new();
        loop {
            changes.mark_unchanged();
            let now = Timestamp::now();
            let (mut next, snapshot) = (None::<Timestamp>, self.view.snapshot());
            for hostname in snapshot.hostnames.keys() {
                if under_way.contains(hostname) {
                    continue;
                }
                let due = plan::due(snapshot.certificates.get(hostname).map(|c| &**c), now);
                if due > now {
                    next = Some(next.map_or(due, |n| n.min(due)));
                } else if orders.len() < AT_ONCE {
                    under_way.insert(hostname.clone());
                    let (worker, hostname) = (Arc::clone(&self), hostname.clone());
                    orders.spawn(async move {
                        worker.get(&hostname).await;
                        hostname
                    });
                }
            }
            for unwanted in snapshot
                .certificates
                .keys()
                .filter(|h| !snapshot.hostnames.contains_key(*h))
            {
                if !under_way.contains(unwanted) {
                    self.keep(self.catalog.delete::<Certificate>(unwanted.as_str()).await);
                }
            }
            let until = next.map_or(LOOK_AGAIN, |n| {
                Duration::try_from(n.duration_since(now)).unwrap_or_default()
            });
            tokio::select! {
                () = end.cancelled() => return,
                _ = changes.changed() => {}
                Some(done) = orders.join_next() => match done {
                    Ok(hostname) => drop(under_way.remove(&hostname)),
                    Err(error) => {
                        tracing::error!(%error, "an order's task failed");
                        under_way.clear();
                    }
                },
                () = tokio::time::sleep(until.min(LOOK_AGAIN)) => {}
            }
        }
    }

    /// Gets one certificate and writes what came of it.
    async fn get(&self, hostname: &Hostname) {
        let before = self.view.snapshot().certificates.get(hostname).cloned();
        let kind = plan::challenge(before.as_ref().map_or(0, |c| c.failures));
        tracing::info!(%hostname, challenge = kind.as_str(), "ordering a certificate");
        let outcome = async {
            let account = self.account().await?;
            let order = order::run(&account, &self.catalog, &self.view, hostname, kind);
            let issued = tokio::time::timeout(ORDER, order)
                .await
                .map_err(|_| Failure::TookTooLong)??;
            let key = self.sealer.seal(hostname.as_str(), &issued.key)?;
            Ok::<_, Failure>(Certificate {
                hostname: hostname.clone(),
                state: CertificateState::Issued,
                chain_pem: issued.chain_pem,
                key: Some(key),
                not_after: Some(issued.not_after),
                next_attempt: Some(plan::renewal(issued.not_before, issued.not_after)),
                failures: 0,
                last_error: None,
            })
        };
        let record = match outcome.await {
            Ok(record) => {
                tracing::info!(%hostname, renewal = ?record.next_attempt, "certificate issued");
                record
            }
            Err(error) => {
                if error.to_string().contains(UNKNOWN_ACCOUNT) {
                    self.forget_account().await;
                }
                let record = plan::failed(
                    hostname,
                    before.as_deref(),
                    told(&error),
                    Timestamp::now(),
                    rand::random(),
                );
                tracing::warn!(%hostname, %error, next = ?record.next_attempt, "no certificate");
                record
            }
        };
        // The next look must see it, or it would order again.
        let revision = self.catalog.put(&record).await;
        if let Ok(revision) = revision {
            self.view
                .wait_for(|s| (s.revision >= revision).then_some(()))
                .await;
        }
        if revision.is_err() {
            // The failure could not be noted: without a pause it would be tried again at once.
            tokio::time::sleep(UNNOTED).await;
        }
        self.keep(revision);
    }

    /// The account at the directory: kept, or made.
    async fn account(&self) -> Result<Account, Failure> {
        let mut kept = self.account.lock().await;
        if let Some(account) = &*kept {
            return Ok(account.clone());
        }
        let account = self.find_account().await?;
        *kept = Some(account.clone());
        Ok(account)
    }

    /// Forgets an account that its directory no longer knows; the next order makes another.
    async fn forget_account(&self) {
        *self.account.lock().await = None;
        self.keep(self.catalog.delete::<AcmeAccount>(&self.account_id()).await);
    }

    fn account_id(&self) -> String {
        hex::encode(Sha256::digest(&self.config.directory))
    }

    async fn find_account(&self) -> Result<Account, Failure> {
        let id = self.account_id();
        let what = format!("acme-account/{id}");
        let builder = || match &self.config.root_ca {
            Some(root) => Account::builder_with_root(root),
            None => Account::builder(),
        };
        if let Some((kept, _)) = self.catalog.get::<AcmeAccount>(&id).await? {
            let credentials = self.sealer.open(&what, &kept.credentials)?;
            let credentials: AccountCredentials = serde_json::from_slice(&credentials)?;
            return Ok(builder()?.from_credentials(credentials).await?);
        }
        let contact = self
            .config
            .contact
            .as_ref()
            .map(|mail| format!("mailto:{mail}"));
        let contact: Vec<&str> = contact.iter().map(String::as_str).collect();
        let new = NewAccount {
            contact: &contact,
            terms_of_service_agreed: true,
            only_return_existing: false,
        };
        let (account, credentials) = builder()?
            .create(&new, self.config.directory.clone(), None)
            .await?;
        let credentials = self
            .sealer
            .seal(&what, &serde_json::to_vec(&credentials)?)?;
        let record = AcmeAccount {
            id,
            directory: self.config.directory.clone(),
            credentials,
        };
        self.catalog.put(&record).await?;
        tracing::info!(directory = self.config.directory, "made an ACME account");
        Ok(account)
    }

    fn keep<T>(&self, outcome: Result<T, CatalogError>) {
        if let Err(error) = outcome {
            tracing::warn!(%error, "the catalog did not take what came of an order");
        }
    }
}

/// An error with its causes: a directory's certificate that is not trusted is only named in the last.
fn told(error: &Failure) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        let more = next.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = next.source();
    }
    text
}

/// Anything that keeps a certificate from being got.
#[derive(Debug, Error)]
enum Failure {
    #[error(transparent)]
    Order(#[from] OrderError),
    #[error("the directory: {0}")]
    Acme(#[from] instant_acme::Error),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Seal(#[from] SealError),
    #[error("the directory did not finish the order within {} s", ORDER.as_secs())]
    TookTooLong,
    #[error("the account's credentials: {0}")]
    Json(#[from] serde_json::Error),
}
