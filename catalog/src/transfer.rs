//! Moving a catalog from one store to another: all records at one revision, read back and compared.
//!
//! While records are copied the target holds `MOVING`; a target with it is no catalog yet. A source that is
//! left holds `MOVED`, and takes no writes from then on; or, as a file, which one process has alone, the mark of
//! [`crate::SqliteStore::mark_moved`].

use sha2::{Digest as _, Sha256};
use thiserror::Error;

use crate::store::limits::{MAX_COMPARES, MAX_TRANSACTION_BYTES};
use crate::{Compare, Entry, HostAlive, Op, Record as _, Revision, Store, StoreError, Transaction};

/// The key of a target that is being filled.
const MOVING: &str = "transfer/moving";
/// The key of a source that has been left; its value says where to.
pub(crate) const MOVED: &str = "transfer/moved";
/// What a record may take in a request beside its key and value, with its comparison; see the limits.
const OVERHEAD: usize = 512;

/// What was moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// How many records.
    pub records: usize,
    /// The source's revision.
    pub revision: Revision,
    /// SHA-256 over all keys and values, in order.
    pub digest: String,
}

/// Why a catalog was not moved. The source is as it was.
#[derive(Debug, Error)]
pub enum TransferError {
    /// A store's own answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is something in the target.
    #[error(
        "the target has {0} records; a catalog is moved into an empty store only. If they are of a move that did not \
         end, remove them (etcd: `etcdctl del --prefix tern/`; SQLite: the file), and move again"
    )]
    NotEmpty(usize),
    /// The source has nothing to move.
    #[error("the source is empty: is it the right one?")]
    Empty,
    /// The source was written to meanwhile.
    #[error(
        "something writes to the source: stop every `tern serve` of this cloud, empty the target, and move again"
    )]
    Busy,
    /// What was read back is not what was written.
    #[error(
        "the target does not hold what the source does ({found} of {expected} records, or others): do not use it"
    )]
    Differs {
        /// Records in the source.
        expected: usize,
        /// Records in the target.
        found: usize,
    },
}

/// Copies everything from one store to another, which must be empty, and compares. A source that others reach too
/// is left for what `leave_for` says, before the target can be served from: no write is taken by both or lost.
///
/// Who is alive is left out: in a stopped cloud nobody is, and without its lease the record would never go.
pub async fn copy(
    from: &dyn Store,
    to: &dyn Store,
    leave_for: Option<&str>,
) -> Result<Moved, TransferError> {
    let mut source = from.list("").await?;
    source
        .entries
        .retain(|entry| !entry.key.starts_with(HostAlive::PREFIX));
    if source.entries.is_empty() {
        return Err(TransferError::Empty);
    }
    let there = to.list("").await?.entries.len();
    if there > 0 {
        return Err(TransferError::NotEmpty(there));
    }
    to.commit(create(&[entry_of(MOVING, "")])).await?;
    for part in parts(&source.entries) {
        to.commit(create(part)).await?;
    }
    let mut copied = to.list("").await?.entries;
    copied.retain(|entry| entry.key != MOVING);
    let (expected, found) = (digest(&source.entries), digest(&copied));
    if expected != found {
        return Err(TransferError::Differs {
            expected: source.entries.len(),
            found: copied.len(),
        });
    }
    match leave_for {
        Some(there) => leave(from, there, source.revision).await?,
        None if from.list(MOVED).await?.revision != source.revision => {
            return Err(TransferError::Busy);
        }
        None => {}
    }
    let done = Op::Delete {
        key: MOVING.to_owned(),
    };
    to.commit(Transaction::of(vec![done])).await?;
    Ok(Moved {
        records: copied.len(),
        revision: source.revision,
        digest: found,
    })
}

/// Marks a store as left for another, if nothing was written to it since it was read.
///
/// [`refuse_moved`] tells whoever opens it, and etcd refuses writes of those who have it open.
async fn leave(store: &dyn Store, to: &str, read: Revision) -> Result<(), TransferError> {
    let marked = match store.commit(create(&[entry_of(MOVED, to)])).await {
        Err(StoreError::Unknown(text)) => match store.get(MOVED).await? {
            Some(entry) => entry.revision,
            None => return Err(StoreError::Unknown(text).into()),
        },
        other => other?,
    };
    if marked == read + 1 {
        return Ok(());
    }
    let compare = Compare {
        key: MOVED.to_owned(),
        revision: Some(marked),
    };
    let undo = Op::Delete {
        key: MOVED.to_owned(),
    };
    let transaction = Transaction {
        compares: vec![compare],
        ops: vec![undo],
    };
    store.commit(transaction).await?;
    Err(TransferError::Busy)
}

/// What is said of a store that was left.
pub(crate) fn moved(to: &[u8]) -> StoreError {
    let to = String::from_utf8_lossy(to);
    StoreError::Invalid(format!("this catalog was moved to {to}: serve from there"))
}

/// Refuses a store that was left for another, or that is not filled yet.
pub async fn refuse_moved(store: &dyn Store) -> Result<(), StoreError> {
    if let Some(mark) = store.get(MOVED).await? {
        return Err(moved(&mark.value));
    }
    if store.get(MOVING).await?.is_some() {
        return Err(StoreError::Invalid(
            "a catalog is being moved into this store, or that did not end: wait for it, or empty the store and move \
             again (an etcd that says already that it was moved: `etcdctl del tern/transfer/moved` first)"
                .to_owned(),
        ));
    }
    Ok(())
}

/// Puts of keys that must not be there: two moves into one target do not mix.
fn create(entries: &[Entry]) -> Transaction {
    let absent = |entry: &Entry| Compare {
        key: entry.key.clone(),
        revision: None,
    };
    let put = |entry: &Entry| Op::Put {
        key: entry.key.clone(),
        value: entry.value.clone(),
        lease: None,
    };
    Transaction {
        compares: entries.iter().map(absent).collect(),
        ops: entries.iter().map(put).collect(),
    }
}

/// The entries in runs that one transaction holds each.
fn parts(mut entries: &[Entry]) -> impl Iterator<Item = &[Entry]> {
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = |entry: &&Entry| {
            bytes += 3 * entry.key.len() + entry.value.len() + OVERHEAD;
            bytes <= MAX_TRANSACTION_BYTES
        };
        // One always fits: its value has a third less than a transaction.
        let count = entries.iter().take(MAX_COMPARES).take_while(fits).count();
        let (part, rest) = entries.split_at(count);
        entries = rest;
        (count > 0).then_some(part)
    })
}

fn digest(entries: &[Entry]) -> String {
    let mut digest = Sha256::new();
    for entry in entries {
        // Lengths first: no two lists of records have the same bytes.
        digest.update((entry.key.len() as u64).to_be_bytes());
        digest.update(&entry.key);
        digest.update((entry.value.len() as u64).to_be_bytes());
        digest.update(&entry.value);
    }
    digest
        .finalize()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

fn entry_of(key: &str, value: &str) -> Entry {
    Entry {
        key: key.to_owned(),
        value: value.as_bytes().to_vec(),
        revision: 0,
    }
}
