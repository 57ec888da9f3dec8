//! Keeps every wanted host name's certificate current.
//!
//! Wanted is what [`HostnameRoute`](tern_catalog::HostnameRoute) records name. One task looks at them whenever the catalog changes or
//! something falls due; each order runs in a task of its own, a few at a time. All it knows is in the
//! catalog, so a restart goes on where it was, back-off included.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use instant_acme::{Account, AccountCredentials, NewAccount, Order};
use jiff::{SignedDuration, Timestamp};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::pki_types::PrivatePkcs8KeyDer;
use sha2::{Digest as _, Sha256};
use tern_catalog::{
    AcmeAccount, AcmeChallenge, AcmeUsage, Catalog, CatalogError, Certificate, CertificateState,
    ChallengeKind, Hostname, OrgSlug, PendingOrder, Snapshot, View, keep_running,
};
use thiserror::Error;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::budget::{Budget, Held, Limits};
use crate::client::{self, Refusal};
use crate::order::{self, Follower, OrderError};
use crate::plan::{self, Tend};
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

/// Longest that one attempt may take: a directory that does not answer must not block a name for good.
const ATTEMPT: Duration = Duration::from_secs(300);
/// As long as Let's Encrypt keeps an order. One that has not come to its end by then is given up.
const ORDER_LIFE: SignedDuration = SignedDuration::from_hours(7 * 24);
/// Pause after a result that the catalog did not take.
const UNNOTED: Duration = Duration::from_secs(10);

impl Issuer {
    /// Begins to get certificates.
    pub fn start(config: CertsConfig, catalog: Catalog, view: View) -> Result<Self, CertsError> {
        let sealer = Arc::new(Sealer::load_or_create(&config.seal_key)?);
        let resolver = Arc::new(SniResolver::new(view.clone(), Arc::clone(&sealer)));
        let end = CancellationToken::new();
        let account = account_id(&config.directory);
        let limits = Limits::of(&config.directory);
        let budget = Budget::load(&account, limits, Vec::new());
        let worker = Worker {
            config,
            catalog,
            view,
            sealer,
            account: Mutex::default(),
            budget: parking_lot::Mutex::new(budget),
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
    budget: parking_lot::Mutex<Budget>,
}

impl Worker {
    async fn run(self: Arc<Self>, end: CancellationToken) {
        tokio::select! {
            () = end.cancelled() => return,
            () = self.remember() => {}
        }
        // Challenges that a stop left behind would be answered for ever, but an order that goes on needs its own.
        let snapshot = self.view.snapshot();
        for (id, challenge) in &snapshot.challenges {
            let certificate = snapshot.certificates.get(&challenge.hostname);
            let order = certificate.and_then(|c| c.order.as_ref());
            if order.is_none_or(|order| order.kind != challenge.kind) {
                self.keep(self.catalog.delete::<AcmeChallenge>(id).await);
            }
        }
        let mut changes = self.view.changes();
        let mut orders: JoinSet<()> = JoinSet::new();
        let mut under_way: HashSet<Hostname> = HashSet::new();
        let mut tasks: HashMap<tokio::task::Id, Hostname> = HashMap::new();
        loop {
            changes.mark_unchanged();
            self.tend(&under_way).await;
            let now = Timestamp::now();
            let snapshot = self.view.snapshot();
            let mut waiting: Vec<(Timestamp, &Hostname)> = snapshot
                .hostnames
                .keys()
                .filter(|hostname| !under_way.contains(*hostname))
                .map(|hostname| {
                    let certificate = snapshot.certificates.get(hostname);
                    (plan::due(certificate.map(|c| &**c), now), hostname)
                })
                .collect();
            // Who has waited longest is first.
            waiting.sort();
            let mut next = None;
            for (due, hostname) in waiting {
                if due > now {
                    next = Some(due);
                    break;
                }
                if orders.len() >= AT_ONCE {
                    break;
                }
                under_way.insert(hostname.clone());
                let (worker, own) = (Arc::clone(&self), hostname.clone());
                let task = orders.spawn(async move { worker.get(&own).await });
                tasks.insert(task.id(), hostname.clone());
            }
            let until = next.map_or(LOOK_AGAIN, |n| {
                Duration::try_from(n.duration_since(now)).unwrap_or_default()
            });
            tokio::select! {
                () = end.cancelled() => return,
                _ = changes.changed() => {}
                Some(done) = orders.join_next_with_id() => {
                    let id = match done {
                        Ok((id, ())) => id,
                        Err(error) => {
                            tracing::error!(%error, "an order's task failed");
                            // Nothing was noted of it: it is due at once, and is not to be begun again and again.
                            tokio::time::sleep(UNNOTED).await;
                            error.id()
                        }
                    };
                    if let Some(hostname) = tasks.remove(&id) {
                        under_way.remove(&hostname);
                    }
                }
                () = tokio::time::sleep(until.min(LOOK_AGAIN)) => {}
            }
        }
    }

    /// Learns what has been used of the directory's limits: nothing is ordered before.
    async fn remember(&self) {
        loop {
            match self.catalog.list::<AcmeUsage>().await {
                Ok(records) => {
                    let limits = Limits::of(&self.config.directory);
                    *self.budget.lock() = Budget::load(&self.account_id(), limits, records);
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, "what was ordered before is not known yet");
                    tokio::time::sleep(UNNOTED).await;
                }
            }
        }
    }

    /// Keeps or removes what is there, as names come and go.
    async fn tend(&self, under_way: &HashSet<Hostname>) {
        let (snapshot, now) = (self.view.snapshot(), Timestamp::now());
        for (hostname, certificate) in &snapshot.certificates {
            if under_way.contains(hostname) {
                continue;
            }
            let route = snapshot.hostnames.get(hostname);
            let wanted = route.map(|_| owner(&snapshot, hostname));
            let changed = match plan::tend(certificate, wanted, now) {
                Tend::Keep => continue,
                Tend::Put(record) => self.catalog.put(&*record).await,
                Tend::Remove => self.catalog.delete::<Certificate>(hostname.as_str()).await,
            };
            self.seen(changed).await;
            for kind in [ChallengeKind::Http01, ChallengeKind::TlsAlpn01] {
                let id = format!("{hostname}/{}", kind.as_str());
                if snapshot.challenges.contains_key(&id) {
                    self.keep(self.catalog.delete::<AcmeChallenge>(&id).await);
                }
            }
        }
    }

    /// Goes one step for one name, as far as it can be gone now, and writes what came of it.
    async fn get(&self, hostname: &Hostname) {
        let snapshot = self.view.snapshot();
        let mut record = match snapshot.certificates.get(hostname) {
            Some(before) => (**before).clone(),
            None => Certificate::wanted(hostname.clone()),
        };
        record.organization = owner(&snapshot, hostname).cloned();
        let attempt = tokio::time::timeout(ATTEMPT, self.attempt(&mut record)).await;
        match attempt.unwrap_or(Err(Failure::TookTooLong)) {
            Ok(()) => {
                tracing::info!(%hostname, renewal = ?record.next_attempt, "certificate issued");
            }
            Err(failure) => {
                self.note(&mut record, &failure).await;
                tracing::warn!(%hostname, error = %failure, next = ?record.next_attempt, "no certificate");
            }
        }
        // The next look must see it, or it would order again.
        let written = self.catalog.put(&record).await;
        if written.is_err() {
            // It could not be noted: without a pause it would be tried again at once.
            tokio::time::sleep(UNNOTED).await;
        }
        self.seen(written).await;
    }

    /// Follows the order that there is, or makes one.
    async fn attempt(&self, record: &mut Certificate) -> Result<(), Failure> {
        let account = self.account().await?;
        let order = match &record.order {
            Some(kept) if kept.directory == self.config.directory => {
                let order = account.order(kept.url.clone()).await;
                order.map_err(OrderError::from)?
            }
            _ => self.begin(&account, record).await?,
        };
        let Some(kept) = record.order.clone() else {
            return Err(Failure::NoOrder);
        };
        let key = self.sealer.open(record.hostname.as_str(), &kept.key)?;
        let key = PrivatePkcs8KeyDer::from(key.to_vec());
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&key, &PKCS_ECDSA_P256_SHA256);
        let follower = Follower {
            catalog: &self.catalog,
            view: &self.view,
            hostname: &record.hostname,
            kind: kept.kind,
            key: &key.map_err(OrderError::from)?,
        };
        let issued = follower.follow(order).await?;
        record.state = CertificateState::Issued;
        record.chain_pem = issued.chain_pem;
        record.key = Some(kept.key);
        record.not_after = Some(issued.not_after);
        record.next_attempt = Some(plan::renewal(issued.not_before, issued.not_after));
        (record.failures, record.last_error, record.order) = (0, None, None);
        Ok(())
    }

    /// Makes an order, if the directory's limits have room for it. It is in the catalog before it is followed.
    async fn begin(&self, account: &Account, record: &mut Certificate) -> Result<Order, Failure> {
        let kind = plan::challenge(record.failures);
        let now = Timestamp::now();
        let used = {
            let mut budget = self.budget.lock();
            let renews = record.key.is_some();
            budget
                .ask(&record.hostname, renews, now)
                .map_err(Failure::Held)?;
            budget.ordered(&record.hostname, now)
        };
        self.note_usage(used).await;
        tracing::info!(hostname = %record.hostname, challenge = kind.as_str(), "ordering a certificate");
        let made = order::make(account, &record.hostname).await;
        let made = match made {
            Ok(order) => order,
            Err(error) => {
                let lost = self.budget.lock().lost(&record.hostname, now);
                self.note_usage(lost).await;
                return Err(error.into());
            }
        };
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(OrderError::from)?;
        let key = zeroize::Zeroizing::new(key.serialize_der());
        record.order = Some(PendingOrder {
            url: made.url().to_owned(),
            directory: self.config.directory.clone(),
            kind,
            key: self.sealer.seal(record.hostname.as_str(), &key)?,
            created_at: now,
        });
        self.catalog.put(record).await?;
        Ok(made)
    }

    /// What a failure means for the name, its order, and the directory's other names.
    async fn note(&self, record: &mut Certificate, failure: &Failure) {
        let (now, jitter) = (Timestamp::now(), rand::random());
        let made = record.order.as_ref().map(|order| order.created_at);
        let unknown = failure.is_unknown_account();
        if unknown {
            self.forget_account().await;
        }
        let too_old = made.is_some_and(|made| now.duration_since(made) > ORDER_LIFE);
        if let Some(made) = made
            && (unknown || too_old || failure.ends_the_order())
        {
            record.order = None;
            let lost = self.budget.lock().lost(&record.hostname, made);
            self.note_usage(lost).await;
        }
        match failure {
            Failure::Held(held) => {
                plan::waits(record, held.reason.clone(), held.until, now, jitter);
            }
            Failure::Order(OrderError::Unfinished { again, .. }) if !too_old => {
                plan::waits(record, told(failure), *again, now, jitter);
            }
            other => match other
                .refusal()
                .and_then(|r| Some((r.status, r.retry_after?)))
            {
                Some((status, until)) => {
                    let whole = status.is_server_error();
                    let held = self
                        .budget
                        .lock()
                        .refused(&record.hostname, until, whole, now);
                    self.note_usage(held).await;
                    plan::waits(record, told(failure), until, now, jitter);
                }
                None => plan::failed(record, told(failure), now, jitter),
            },
        }
    }

    async fn note_usage(&self, records: Vec<AcmeUsage>) {
        for record in records {
            self.keep(self.catalog.put(&record).await);
        }
    }

    /// Waits until our own view has what was written.
    async fn seen(&self, written: Result<tern_catalog::Revision, CatalogError>) {
        if let Ok(revision) = written {
            self.view
                .wait_for(|s| (s.revision >= revision).then_some(()))
                .await;
        }
        self.keep(written);
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
        account_id(&self.config.directory)
    }

    async fn find_account(&self) -> Result<Account, Failure> {
        let id = self.account_id();
        let what = format!("acme-account/{id}");
        let http = client::client(self.config.root_ca.as_deref())?;
        let builder = Account::builder_with_http(http);
        if let Some((kept, _)) = self.catalog.get::<AcmeAccount>(&id).await? {
            let credentials = self.sealer.open(&what, &kept.credentials)?;
            let credentials: AccountCredentials = serde_json::from_slice(&credentials)?;
            return Ok(builder.from_credentials(credentials).await?);
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
        let (account, credentials) = builder
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

fn account_id(directory: &str) -> String {
    hex::encode(Sha256::digest(directory))
}

/// Whose app has this name.
fn owner<'a>(snapshot: &'a Snapshot, hostname: &Hostname) -> Option<&'a OrgSlug> {
    let route = snapshot.hostnames.get(hostname)?;
    Some(&snapshot.apps.get(&route.app)?.organization)
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
    #[error("{}", .0.reason)]
    Held(Held),
    #[error("the directory did not finish the order within {} s", ATTEMPT.as_secs())]
    TookTooLong,
    #[error("the order was not kept")]
    NoOrder,
    #[error("the account's credentials: {0}")]
    Json(#[from] serde_json::Error),
}

impl Failure {
    fn acme(&self) -> Option<&instant_acme::Error> {
        match self {
            Self::Acme(error) | Self::Order(OrderError::Acme(error)) => Some(error),
            _ => None,
        }
    }

    fn refusal(&self) -> Option<&Refusal> {
        Refusal::of(self.acme()?)
    }

    /// RFC 8555 section 6.7: the directory has lost the account.
    fn is_unknown_account(&self) -> bool {
        self.acme()
            .is_some_and(|error| order::is_problem(error, "accountDoesNotExist"))
    }

    /// Whether another order must be made.
    fn ends_the_order(&self) -> bool {
        match self {
            Self::Order(error) => error.is_its_end(),
            // Its key cannot be used any more.
            Self::Seal(_) => true,
            _ => false,
        }
    }
}
