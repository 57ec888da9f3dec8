//! The contract of a store: small facts under text keys, with revisions.
//!
//! Every commit that changes anything has a revision, higher than the one before; whoever shares the
//! store with others (etcd) does not see every number. A key remembers the revision that last wrote it;
//! comparing that is the only concurrency control there is (optimistic, as in etcd).
//!
//! What goes in is bounded, by the narrowest of the stores, so that a cloud can move between them: see
//! [`limits`].

pub mod limits;

use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::mpsc;

/// A point in the store's history. 0 is before every commit.
pub type Revision = u64;

/// A lease, see [`Store::grant`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LeaseId(pub i64);

/// A key with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Vec<u8>,
    /// The revision that last wrote it.
    pub revision: Revision,
}

/// All entries under a prefix at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The entries, in key order.
    pub entries: Vec<Entry>,
    /// The store's revision they were read at; a watch from here misses nothing.
    pub revision: Revision,
}

/// Comparisons, and what to do when all of them hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transaction {
    /// All must hold.
    pub compares: Vec<Compare>,
    /// Done together, or not at all. At least one; each key at most once.
    pub ops: Vec<Op>,
}

/// Holds when `key` was last written at `revision`; `None`: when it does not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    /// The key.
    pub key: String,
    /// The revision expected.
    pub revision: Option<Revision>,
}

/// One write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Sets a value.
    Put {
        /// The key.
        key: String,
        /// The value.
        value: Vec<u8>,
        /// Deletes the key when this lease ends.
        lease: Option<LeaseId>,
    },
    /// Removes a key; no error where there is none.
    Delete {
        /// The key.
        key: String,
    },
}

/// A change as a watch tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A key has this value now.
    Put(Entry),
    /// A key is gone.
    Delete {
        /// The key.
        key: String,
    },
}

/// The changes of one commit, as far as they are under the watched prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchBatch {
    /// The commit.
    pub revision: Revision,
    /// Its changes, in the order of its ops.
    pub changes: Vec<Change>,
}

/// What a watch tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchEvent {
    /// A commit.
    Batch(WatchBatch),
    /// All that the store held when it was asked has been told. Comes every [`PROGRESS_EVERY`] or so also
    /// while nobody writes: a watch that is silent for longer does not know what it misses.
    Progress {
        /// All up to here has been told.
        revision: Revision,
        /// When the store was asked; what was written since may be missing.
        asked: Instant,
    },
}

/// How often a watch proves that it is current.
pub const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// A running watch. Batches arrive in order and without gaps, until an error ends it.
#[derive(Debug)]
pub struct Watch {
    events: mpsc::Receiver<Result<WatchEvent, StoreError>>,
}

/// What a store can answer instead of doing it.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
pub enum StoreError {
    /// A comparison did not hold: read again and decide anew.
    #[error("{key} was changed by somebody else")]
    Conflict {
        /// The first key that differed.
        key: String,
    },
    /// The history after that revision is gone: list again and watch from there.
    #[error("revision {wanted} is no longer kept, the oldest is {oldest}")]
    Compacted {
        /// What was asked for.
        wanted: Revision,
        /// The oldest revision a watch can start after.
        oldest: Revision,
    },
    /// The lease has ended.
    #[error("lease {} has ended", .0.0)]
    LeaseGone(LeaseId),
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// More than one transaction may hold, see [`limits`]: split it, or store less.
    #[error("{what}: {found}, where {limit} is the most")]
    TooLarge {
        /// What is too large, with its unit.
        what: String,
        /// How large it is.
        found: usize,
        /// How large it may be.
        limit: usize,
    },
    /// The store cannot answer now. What was asked for has not happened.
    #[error("the catalog's store does not answer: {0}")]
    Unavailable(String),
    /// A write was sent and its answer has not come: it has happened, or may yet, or not at all. Read
    /// again before doing anything about it.
    #[error("whether the catalog's store has done it is unknown; look before doing it again: {0}")]
    Unknown(String),
}

/// A place where the catalog is kept.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The entry at `key`.
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError>;

    /// The entries whose keys start with `prefix`, at one revision. The empty prefix is all.
    async fn list(&self, prefix: &str) -> Result<Listing, StoreError>;

    /// Does a transaction and answers its revision; one that changes nothing answers the last.
    ///
    /// Once answered, it survives a crash. [`StoreError::Unknown`] says that it may or may not have
    /// happened; every other error, that it has not.
    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError>;

    /// The changes under `prefix` after revision `after`, those already past first. A watcher that
    /// is so slow that what it has not read is forgotten is told [`StoreError::Compacted`].
    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError>;

    /// Makes a lease that ends after `ttl` without a [`Store::keep_alive`], or a little later (etcd
    /// counts in seconds, and extends leases when its leader changes); its keys are deleted then, by a
    /// commit that watches see.
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError>;

    /// Starts the lease's time anew.
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError>;

    /// Ends a lease now.
    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError>;
}

impl Transaction {
    /// A transaction without comparisons.
    pub fn of(ops: Vec<Op>) -> Self {
        Self {
            compares: Vec::new(),
            ops,
        }
    }
}

impl Watch {
    /// A watch that is fed through this channel; for those who make stores.
    pub fn new(events: mpsc::Receiver<Result<WatchEvent, StoreError>>) -> Self {
        Self { events }
    }

    /// What comes next, progress too; `None` when the store has closed.
    pub async fn event(&mut self) -> Option<Result<WatchEvent, StoreError>> {
        self.events.recv().await
    }

    /// The next batch; `None` when the store has closed.
    pub async fn next(&mut self) -> Option<Result<WatchBatch, StoreError>> {
        loop {
            return match self.event().await? {
                Ok(WatchEvent::Batch(batch)) => Some(Ok(batch)),
                Ok(WatchEvent::Progress { .. }) => continue,
                Err(error) => Some(Err(error)),
            };
        }
    }
}
