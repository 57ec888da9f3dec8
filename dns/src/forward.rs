//! Everything that is not ours goes to the host's own resolvers.
//!
//! A question goes the way it came, UDP or TCP: an answer too large for UDP says so, and the client
//! comes back over TCP. What comes back is passed on as it is. A bounded number of questions is on
//! its way, fewer for one network; when upstream is silent the client knows within
//! [`ATTEMPTS`] × [`PATIENCE`].
//!
//! A resolver is never put aside because questions to it fail: whoever asks for names of slow servers
//! on purpose would take it away from everybody else. The one that answered last is asked first.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::cache::{Cache, Key};
use crate::quota::{Quota, Share};
use crate::reply::{Question, Transport};
use crate::upstream;
use crate::wire::{self, MAX_UDP_WITHOUT_EDNS, flag, rcode};

/// Questions on their way to upstream, in all and for one network.
const IN_FLIGHT: (usize, usize) = (1024, 128);
/// Time for one attempt: both fit into the 5 s after which clients themselves give up.
const PATIENCE: Duration = Duration::from_millis(1500);
const ATTEMPTS: usize = 2;

/// Where the resolvers are found.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// They are given.
    Fixed(Vec<SocketAddr>),
    /// In a file like `/etc/resolv.conf`.
    File(PathBuf),
}

#[derive(Debug)]
pub(crate) struct Forwarder {
    source: Source,
    upstreams: ArcSwap<Vec<SocketAddr>>,
    /// Counts changes of mind about whom to ask first.
    first: AtomicUsize,
    cache: Mutex<Cache>,
    quota: Arc<Quota>,
}

/// What becomes of a question at once.
#[derive(Debug)]
pub(crate) enum Start {
    /// It is answered.
    Answer(Vec<u8>),
    /// It takes time.
    Ask(Pending),
}

/// A question that may be asked.
#[derive(Debug)]
pub(crate) struct Pending {
    question: Question,
    key: Key,
    _share: Share,
}

impl Forwarder {
    pub(crate) fn new(source: Source) -> Self {
        let forwarder = Self {
            source,
            upstreams: ArcSwap::default(),
            first: AtomicUsize::new(0),
            cache: Mutex::default(),
            quota: Quota::new(IN_FLIGHT.0, IN_FLIGHT.1),
        };
        forwarder.reload();
        forwarder
    }

    /// Looks again where the resolvers are; they change as a host moves between networks.
    pub(crate) fn reload(&self) {
        let wanted = match &self.source {
            Source::Fixed(addresses) => addresses.clone(),
            Source::File(path) => match upstream::read(path) {
                Ok(addresses) => addresses,
                Err(error) => {
                    tracing::warn!(%error, path = %path.display(), "the host's resolvers are not known");
                    return;
                }
            },
        };
        if **self.upstreams.load() != wanted {
            tracing::info!(?wanted, "names outside .internal are asked for upstream");
            self.upstreams.store(Arc::new(wanted));
        }
    }

    /// Answers from the cache, or takes the question on, or says that there are too many.
    pub(crate) fn start(&self, question: Question) -> Start {
        let checking_disabled = question.header.flags & flag::CHECKING_DISABLED != 0;
        let key = Key::new(&question.bytes, question.edns, checking_disabled);
        if let Some(answer) = self.cache.lock().get(&key, Instant::now()) {
            return Start::Answer(question.take(answer));
        }
        match self.quota.take(question.network) {
            Some(share) => Start::Ask(Pending {
                question,
                key,
                _share: share,
            }),
            None => Start::Answer(question.failed()),
        }
    }

    /// Asks upstream.
    pub(crate) async fn finish(&self, pending: Pending) -> Vec<u8> {
        let Pending {
            question,
            key,
            _share,
        } = pending;
        match self.ask(&question).await {
            Some(answer) => {
                self.cache.lock().put(key, &answer, Instant::now());
                question.take(answer)
            }
            None => question.failed(),
        }
    }

    async fn ask(&self, question: &Question) -> Option<Vec<u8>> {
        let upstreams = self.upstreams.load_full();
        let first = self.first.load(Relaxed);
        // The next one where there are several, the same one once more where there is one.
        for upstream in upstreams
            .iter()
            .cycle()
            .skip(first % upstreams.len().max(1))
            .take(ATTEMPTS)
        {
            let id = rand::random();
            let kept = question.header.flags & flag::CHECKING_DISABLED;
            let flags = flag::RECURSION_DESIRED | kept;
            let query = wire::query(id, flags, &question.bytes, question.edns);
            let asking = upstream::ask(*upstream, question.transport, id, &query, &question.bytes);
            match tokio::time::timeout(PATIENCE, asking).await {
                Ok(Ok(answer)) => return Some(answer),
                Ok(Err(error)) => tracing::debug!(%error, %upstream, "a resolver does not answer"),
                Err(_) => tracing::debug!(%upstream, "a resolver is silent"),
            }
            // Unless somebody else has come to that conclusion meanwhile.
            let _ = self
                .first
                .compare_exchange(first, first.wrapping_add(1), Relaxed, Relaxed);
        }
        None
    }
}

impl Question {
    /// Somebody's answer to this very question becomes the answer to who asked it here.
    fn take(&self, mut answer: Vec<u8>) -> Vec<u8> {
        wire::readdress(&mut answer, self.header.id, &self.bytes);
        let most = self.edns.map_or(MAX_UDP_WITHOUT_EDNS, |edns| edns.size);
        if self.transport == Transport::Udp && answer.len() > usize::from(most) {
            // Kept from an answer over TCP, or to a client that takes more.
            return wire::truncated(&answer, &self.bytes, self.edns)
                .unwrap_or_else(|| self.failed());
        }
        answer
    }

    fn failed(&self) -> Vec<u8> {
        wire::error(self.header, &self.bytes, self.edns, rcode::SERVER_FAILURE)
    }
}
