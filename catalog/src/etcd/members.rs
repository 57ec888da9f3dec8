//! The cluster's members as one: which of them is spoken to, when another is tried, and what a failure
//! means.
//!
//! One connection serves all calls. It is left, and the next member tried, when it fails, does not answer in
//! time (a stopped process still accepts connections), or says that it has no leader. A question is
//! asked again elsewhere; a write only where it is certain that it was not done.
//!
//! A connection that is left serves until another stands, for a new one needs a login, which is a write: where
//! writes are what is slow, reads and watches go on.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use parking_lot::Mutex;
use prost::Message;
use tokio::time::Instant;

use super::PREFIX;
use super::connection::{CallError, Connection, Limit, connector};
use super::messages::{RangeRequest, RangeResponse};
use crate::store::StoreError;

/// Where etcd is, and how to be let in. Files are read at each connection, so that renewed ones count.
#[derive(Debug, Clone, Default)]
pub struct EtcdConfig {
    /// The members, as `https://host:port`; `http://` on this machine alone. Tried in this order.
    pub endpoints: Vec<String>,
    /// The authority that signed the members' certificates (PEM).
    pub ca: Option<PathBuf>,
    /// This client's certificate chain (PEM).
    pub certificate: Option<PathBuf>,
    /// Its private key (PEM).
    pub key: Option<PathBuf>,
    /// The user to log in as.
    pub user: Option<String>,
    /// The file with the user's password.
    pub password_file: Option<PathBuf>,
}

/// Longest to connect to a member, TLS and login included.
const CONNECT: Duration = Duration::from_secs(3);
/// Longest that one member may take to answer. etcd's own limit on a write is about seven seconds with its
/// defaults; one that takes this long is of no use to who waits.
pub(super) const ANSWER: Duration = Duration::from_secs(4);
/// Longest that an answer may take that keeps coming: the longest page of a listing, over a slow line.
const LONG_ANSWER: Duration = Duration::from_secs(60);
/// Longest that a member whose write was not answered may take to answer a read.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// Longest that a call may take with all its attempts, but for an answer that keeps coming.
const CALL: Duration = Duration::from_secs(10);
/// How long a call looks for a member that serves: a new leader is elected in less.
const LOOK: Duration = Duration::from_secs(4);
/// Until a member is asked again after a refusal that passes by itself.
const PAUSE: Duration = Duration::from_millis(100);
/// Waits after a round over all members that let nobody in, with jitter: each attempt costs them a login.
const ROUND_FIRST: Duration = Duration::from_millis(100);
const ROUND_MOST: Duration = Duration::from_secs(2);

/// The members.
pub(super) struct Members {
    config: EtcdConfig,
    endpoints: Vec<Uri>,
    now: Mutex<Now>,
    /// Held by who connects; all others wait for the same attempt.
    connecting: tokio::sync::Mutex<()>,
}

/// Who is spoken to.
struct Now {
    connection: Option<Arc<Connection>>,
    /// Whether another is to take its place.
    left: bool,
    /// The endpoint that it is to, or that is tried next.
    at: usize,
    /// When members are tried again after a round that failed.
    next_round: Option<Instant>,
    /// How long the wait after the next such round is.
    wait: Duration,
}

/// Where to go from a connection that is left.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// To another member.
    Other,
    /// To the same, with a new login.
    Same,
}

/// What may be done after a failure.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Asked again.
    Read,
    /// Asked again only where it was not done.
    Write,
}

/// Why a call failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// A gRPC status that is an answer.
    Refused(u32, String),
    /// There is no answer.
    Store(StoreError),
}

/// What a status means.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// It was not done, and may be elsewhere or later.
    NotDone,
    /// It may have been done.
    Unsure,
    /// It is the answer.
    Answer,
}

impl Members {
    pub(super) fn new(config: EtcdConfig) -> Result<Self, StoreError> {
        let invalid = |text: String| StoreError::Invalid(text);
        let endpoints = config.endpoints.iter().map(|text| {
            if text.contains('@') {
                // Not repeated, for it has a password.
                return Err(invalid("an address of etcd has no user in it; say that with --etcd-user and \
                                    --etcd-password-file".to_owned()));
            }
            let uri: Uri = text.parse().map_err(|e| invalid(format!("{text} is no address of etcd: {e}")))?;
            let host = uri.host().unwrap_or_default();
            let local = matches!(host, "localhost" | "127.0.0.1" | "[::1]");
            match uri.scheme_str() {
                Some("https") if config.ca.is_some() => Ok(uri),
                Some("https") => Err(invalid(format!("{text} needs the certificate of its authority (ca)"))),
                Some("http") if local => Ok(uri),
                Some("http") => Err(invalid(format!(
                    "{text} would be spoken to in the clear: use https, http is for this machine alone"
                ))),
                _ => Err(invalid(format!("{text} is no address of etcd; write it as https://host:2379"))),
            }
        });
        let endpoints = endpoints.collect::<Result<Vec<_>, _>>()?;
        if endpoints.is_empty() {
            return Err(invalid("etcd has at least one address".to_owned()));
        }
        if config.certificate.is_some() != config.key.is_some() {
            return Err(invalid(
                "a certificate and its key are given together".to_owned(),
            ));
        }
        if config.user.is_some() != config.password_file.is_some() {
            return Err(invalid(
                "a user and its password's file are given together".to_owned(),
            ));
        }
        let now = Now {
            connection: None,
            left: false,
            // In the order given: who wants the load spread gives each host its nearest member first.
            at: 0,
            next_round: None,
            wait: ROUND_FIRST,
        };
        Ok(Self {
            config,
            endpoints,
            now: Mutex::new(now),
            connecting: tokio::sync::Mutex::new(()),
        })
    }

    /// A connection to some member. Whoever waits for one waits for the same attempt.
    pub(super) async fn connection(&self) -> Result<Arc<Connection>, StoreError> {
        if let Some(connection) = self.standing() {
            return Ok(connection);
        }
        let _turn = self.connecting.lock().await;
        if let Some(connection) = self.standing() {
            return Ok(connection);
        }
        let (first, next_round) = {
            let now = self.now.lock();
            (now.at, now.next_round)
        };
        if let Some(at) = next_round {
            tokio::time::sleep_until(at).await;
        }
        let mut failures = Vec::new();
        for n in 0..self.endpoints.len() {
            let at = (first + n) % self.endpoints.len();
            let endpoint = &self.endpoints[at];
            match self.connect(endpoint).await {
                Ok(connection) => return Ok(self.take(Arc::new(connection), at)),
                Err(error) => {
                    failures.push(format!("{endpoint}: {error}"));
                    // At once: who waits for us may give up before the round ends.
                    self.now.lock().at = (at + 1) % self.endpoints.len();
                }
            }
        }
        let mut now = self.now.lock();
        let jittered = now.wait.mul_f64(rand::random_range(0.5..1.5));
        now.next_round = Some(Instant::now() + jittered);
        now.wait = (now.wait * 2).min(ROUND_MOST);
        // What was left may serve still.
        let old = now.connection.as_ref().filter(|c| !c.is_closed());
        old.map(Arc::clone)
            .ok_or_else(|| StoreError::Unavailable(failures.join("; ")))
    }

    /// The connection that calls go over, unless another is to be looked for now.
    fn standing(&self) -> Option<Arc<Connection>> {
        let now = self.now.lock();
        let resting = now.next_round.is_some_and(|at| Instant::now() < at);
        let connection = now.connection.as_ref().filter(|c| !c.is_closed())?;
        (!now.left || resting).then(|| Arc::clone(connection))
    }

    /// Has all calls go over this new connection.
    fn take(&self, connection: Arc<Connection>, at: usize) -> Arc<Connection> {
        let mut now = self.now.lock();
        (now.left, now.at) = (false, at);
        (now.next_round, now.wait) = (None, ROUND_FIRST);
        if let Some(old) = now.connection.replace(Arc::clone(&connection)) {
            old.replace();
        }
        connection
    }

    /// Has another connection looked for, unless somebody has already seen to it.
    pub(super) fn leave(&self, connection: &Arc<Connection>, why: &str, next: Next) {
        let mut now = self.now.lock();
        let is_current = |c: &Arc<Connection>| Arc::ptr_eq(c, connection);
        if now.left || !now.connection.as_ref().is_some_and(is_current) {
            return;
        }
        tracing::warn!(
            member = connection.member,
            why,
            "leaving a connection to etcd"
        );
        now.left = true;
        if next == Next::Other {
            now.at = (now.at + 1) % self.endpoints.len();
        }
    }

    /// Leaves a member that did not answer a write, unless it answers a read: writes wait for a majority's disks,
    /// whoever they are sent to.
    async fn look_again(&self, connection: &Arc<Connection>, why: &str) {
        let limit = Limit::whole(LOOK_AGAIN);
        let question = probe();
        let answer = connection.unary::<RangeResponse>("KV/Range", &question, limit);
        let serves = match answer.await {
            Ok(_) => true,
            Err(CallError::Status(code, text)) => verdict(code, &text) == Verdict::Answer,
            Err(CallError::Lost(_) | CallError::NotSent(_)) => false,
        };
        if !serves {
            self.leave(connection, why, Next::Other);
        }
    }

    async fn connect(&self, endpoint: &Uri) -> Result<Connection, String> {
        let open = async {
            let tls = match endpoint.scheme_str() {
                Some("https") => Some(self.tls().await?),
                _ => None,
            };
            let login = match (&self.config.user, &self.config.password_file) {
                (Some(user), Some(file)) => {
                    let password = String::from_utf8(read(file).await?)
                        .map_err(|_| format!("{} is not text", file.display()))?;
                    Some((
                        user.clone(),
                        password.trim_end_matches(['\r', '\n']).to_owned(),
                    ))
                }
                _ => None,
            };
            Connection::open(endpoint, tls, login, CONNECT).await
        };
        match tokio::time::timeout(CONNECT, open).await {
            Ok(outcome) => outcome,
            Err(_) => Err(format!("not connected within {CONNECT:?}")),
        }
    }

    async fn tls(&self) -> Result<tokio_rustls::TlsConnector, String> {
        let ca = match &self.config.ca {
            Some(path) => read(path).await?,
            None => return Err("it needs the certificate of its authority".to_owned()),
        };
        let identity = match (&self.config.certificate, &self.config.key) {
            (Some(chain), Some(key)) => Some((read(chain).await?, read(key).await?)),
            _ => None,
        };
        connector(
            &ca,
            identity.as_ref().map(|(chain, key)| (&chain[..], &key[..])),
        )
    }

    /// A call, with another member where one fails.
    pub(super) async fn call<A: Message + Default>(
        &self,
        method: &str,
        question: &impl Message,
        kind: Kind,
    ) -> Result<A, Failure> {
        let began = Instant::now();
        let (limit, most) = match kind {
            Kind::Read => (
                Limit {
                    silence: ANSWER,
                    whole: LONG_ANSWER,
                },
                ANSWER,
            ),
            Kind::Write => (Limit::whole(ANSWER), ANSWER + LOOK_AGAIN),
        };
        // No attempt is begun that has less time than it may take: it would only make the outcome unknown.
        let last = began + (CALL - most);
        let mut failed = None;
        loop {
            let connection = match tokio::time::timeout_at(last, self.connection()).await {
                Ok(Ok(connection)) => connection,
                Ok(Err(_)) if began.elapsed() < LOOK && Instant::now() + PAUSE < last => {
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
                Ok(Err(error)) => return Err(Failure::Store(error)),
                Err(_) => {
                    let reached = || "no member was reached in time".to_owned();
                    return Err(unavailable(failed.unwrap_or_else(reached)));
                }
            };
            let error = match connection.unary(method, question, limit).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let text = format!("{}: {error}", connection.member);
            let verdict = match &error {
                CallError::Lost(_) => Verdict::Unsure,
                CallError::NotSent(_) => Verdict::NotDone,
                CallError::Status(code, text) => verdict(*code, text),
            };
            match (verdict, error) {
                (Verdict::Answer, CallError::Status(code, text)) => {
                    return Err(Failure::Refused(code, text));
                }
                (Verdict::Unsure, _) if kind == Kind::Write => {
                    self.look_again(&connection, &text).await;
                    return Err(Failure::Store(StoreError::Unknown(text)));
                }
                (_, error) => {
                    self.leave(&connection, &text, next(&connection, &error));
                    if Instant::now() + PAUSE >= last {
                        return Err(unavailable(text));
                    }
                    failed = Some(text);
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

/// The shortest question: nothing is kept at the prefix itself.
pub(super) fn probe() -> RangeRequest {
    RangeRequest {
        key: PREFIX.as_bytes().to_vec(),
        keys_only: true,
        ..RangeRequest::default()
    }
}

/// Where to go after this failure. A login that has ended is made again where it was; one that the same member
/// refuses at once is better made elsewhere.
pub(super) fn next(connection: &Connection, error: &CallError) -> Next {
    match error {
        CallError::Status(_, text) if is_old_login(text) && connection.has_served() => Next::Same,
        _ => Next::Other,
    }
}

/// Whether the login has ended: by time, by a restart of the member, or because users were changed.
fn is_old_login(text: &str) -> bool {
    text.contains("etcdserver: invalid auth token")
        || text.contains("etcdserver: revision of auth store is old")
}

/// What etcd's statuses say of whether a request was done. Codes alone do not tell: "no leader" and
/// "request timed out" have the same.
fn verdict(code: u32, text: &str) -> Verdict {
    const NOT_DONE: [&str; 3] = [
        // Refused on arrival, since calls require one.
        "etcdserver: no leader",
        "etcdserver: too many requests",
        "etcdserver: not capable",
    ];
    if is_old_login(text) || NOT_DONE.iter().any(|known| text.contains(known)) {
        return Verdict::NotDone;
    }
    match code {
        // Invalid argument, not found, permission denied, resource exhausted, failed precondition,
        // out of range, unimplemented, unauthenticated.
        3 | 5 | 7 | 8 | 9 | 11 | 12 | 16 => Verdict::Answer,
        _ => Verdict::Unsure,
    }
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Store(error) => error,
            // etcd applies a write that was under way when its space ended, and then says this of it (its
            // `quotaApplierV3`): it may be done.
            Failure::Refused(_, text) if text.contains("database space exceeded") => Self::Unknown(
                format!("{text}; compact and defragment etcd, then disarm its alarm"),
            ),
            Failure::Refused(3, text) => Self::Invalid(text),
            Failure::Refused(_, text) => Self::Unavailable(text),
        }
    }
}

fn unavailable(text: String) -> Failure {
    Failure::Store(StoreError::Unavailable(text))
}

async fn read(path: &std::path::Path) -> Result<Vec<u8>, String> {
    let content = tokio::fs::read(path).await;
    content.map_err(|e| format!("{} cannot be read: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_without_an_answer_is_never_called_failed() {
        for (code, text) in [
            (14, "etcdserver: request timed out"),
            (14, "etcdserver: leader changed"),
            (
                14,
                "etcdserver: request timed out, possibly due to connection lost",
            ),
            (4, "context deadline exceeded"),
            (13, "transport"),
            (2, "?"),
        ] {
            assert_eq!(verdict(code, text), Verdict::Unsure, "{text}");
        }
        assert_eq!(verdict(14, "etcdserver: no leader"), Verdict::NotDone);
        assert_eq!(
            verdict(16, "etcdserver: invalid auth token"),
            Verdict::NotDone
        );
        assert_eq!(verdict(7, "etcdserver: permission denied"), Verdict::Answer);
        assert_eq!(
            verdict(8, "etcdserver: mvcc: database space exceeded"),
            Verdict::Answer
        );
    }

    #[test]
    fn a_write_that_etcd_had_no_space_for_may_be_done() {
        let text = "etcdserver: mvcc: database space exceeded".to_owned();
        let error = StoreError::from(Failure::Refused(8, text));
        assert!(matches!(error, StoreError::Unknown(_)), "{error}");
        assert!(error.to_string().contains("defragment"), "{error}");
    }

    #[test]
    fn addresses_in_the_clear_are_for_this_machine() {
        let config = |endpoint: &str| EtcdConfig {
            endpoints: vec![endpoint.to_owned()],
            ..EtcdConfig::default()
        };
        for good in [
            "http://127.0.0.1:2379",
            "http://[::1]:2379",
            "http://localhost:2379",
        ] {
            assert!(Members::new(config(good)).is_ok(), "{good}");
        }
        for (bad, why) in [
            ("http://10.0.0.1:2379", "in the clear"),
            ("https://10.0.0.1:2379", "authority"),
            ("10.0.0.1:2379", "https://host:2379"),
            ("", "no address"),
            ("http://root:secret@127.0.0.1:2379", "--etcd-user"),
        ] {
            let error = Members::new(config(bad)).err().unwrap().to_string();
            assert!(error.contains(why), "{bad}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
        assert!(Members::new(EtcdConfig::default()).is_err());
    }
}
