//! The catalog in memory, read without locks.
//!
//! A [`View`] lists the store once and then follows its watch. A reader takes a [`Snapshot`], a
//! consistent picture that costs one atomic load; persistent maps make the next one cheap. When the
//! store cannot be followed the view stays as it is, says how stale it is, and tries again. A watch that
//! runs is no proof of being current: only what the store said last is, so that is what staleness is
//! counted from.
//!
//! A value that cannot be read is kept out, and what could be read of its key last stays
//! ([`Snapshot::unreadable`]). A follower that panics is begun anew: without it the whole process would
//! live in the past.

mod snapshot;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::store::PROGRESS_EVERY;
use crate::{CatalogError, Change, Revision, Store, StoreError, WatchEvent, keep_running};
pub use snapshot::{Snapshot, Unreadable};

/// The catalog in memory. Clones share it.
#[derive(Clone)]
pub struct View {
    current: Arc<ArcSwap<Snapshot>>,
    revision: watch::Receiver<Revision>,
    /// When the store was asked for what the picture is known to hold.
    heard: Arc<Mutex<Instant>>,
    /// Ends the follower with the last clone.
    _follower: Arc<Follower>,
}

struct Follower(tokio::task::JoinHandle<()>);

/// Waits between two attempts to follow a store that fails.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MOST: Duration = Duration::from_secs(5);
/// Silence of the store that is called stale: several of its promises to speak, not one late one.
const STALE_AFTER: Duration = PROGRESS_EVERY.saturating_mul(5);

impl View {
    /// Reads everything, and follows what comes from then on.
    pub async fn follow(store: Arc<dyn Store>) -> Result<Self, CatalogError> {
        let asked = Instant::now();
        let mut keys = HashSet::new();
        let first = read(&*store, &Snapshot::default(), &mut keys).await?;
        let (announce, revision) = watch::channel(first.revision);
        let current = Arc::new(ArcSwap::from_pointee(first));
        let heard = Arc::new(Mutex::new(asked));
        let follower = Follow {
            store,
            current: Arc::clone(&current),
            announce,
            heard: Arc::clone(&heard),
            keys: tokio::sync::Mutex::new(keys),
        };
        let follower = Arc::new(follower);
        let follow = move || {
            let follower = Arc::clone(&follower);
            async move { follower.run().await }
        };
        let task = tokio::spawn(keep_running("the follower of the catalog", follow));
        Ok(Self {
            current,
            revision,
            heard,
            _follower: Arc::new(Follower(task)),
        })
    }

    /// The picture now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Changes when the picture does; holds its revision.
    pub fn changes(&self) -> watch::Receiver<Revision> {
        self.revision.clone()
    }

    /// How long ago the store last said that the picture is current: all older facts are in it.
    pub fn age(&self) -> Duration {
        self.heard.lock().elapsed()
    }

    /// The [`View::age`] where it is more than a store that is followed would let it become.
    pub fn stale_for(&self) -> Option<Duration> {
        Some(self.age()).filter(|age| *age > STALE_AFTER)
    }

    /// Waits until the picture holds what is looked for.
    pub async fn wait_for<T>(&self, mut look: impl FnMut(&Snapshot) -> Option<T>) -> T {
        let mut changes = self.changes();
        loop {
            changes.mark_unchanged();
            if let Some(found) = look(&self.snapshot()) {
                return found;
            }
            if changes.changed().await.is_err() {
                // The follower ends only with the last view, and this is one.
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Follow {
    store: Arc<dyn Store>,
    current: Arc<ArcSwap<Snapshot>>,
    announce: watch::Sender<Revision>,
    heard: Arc<Mutex<Instant>>,
    /// All keys that there are: a listing does not say what is gone. Of the one task that follows.
    keys: tokio::sync::Mutex<HashSet<String>>,
}

impl Follow {
    async fn run(&self) {
        let mut keys = self.keys.lock().await;
        let mut wait = RETRY_FIRST;
        loop {
            let before = self.current.load().revision;
            let ended = self.follow(before, &mut keys).await;
            let asked = Instant::now();
            match ended {
                // Too far behind: what is missing can only be had by reading everything.
                StoreError::Compacted { .. } => match self.read_all(&mut keys).await {
                    Ok(()) => {
                        self.hear(asked);
                    }
                    Err(error) => tracing::warn!(%error, "the catalog cannot be read"),
                },
                error => tracing::warn!(%error, "the catalog cannot be followed"),
            }
            if self.current.load().revision > before {
                wait = RETRY_FIRST;
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(RETRY_MOST);
        }
    }

    async fn read_all(&self, keys: &mut HashSet<String>) -> Result<(), StoreError> {
        let whole = read(&*self.store, &self.current.load_full(), keys).await?;
        self.show(whole);
        Ok(())
    }

    /// Follows until that ends.
    async fn follow(&self, after: Revision, keys: &mut HashSet<String>) -> StoreError {
        let mut watch = match self.store.watch("", after).await {
            Ok(watch) => watch,
            Err(error) => return error,
        };
        loop {
            match watch.event().await {
                Some(Ok(WatchEvent::Batch(batch))) => {
                    let mut next = Snapshot::clone(&self.current.load());
                    next.apply(&batch);
                    for change in batch.changes {
                        match change {
                            Change::Put(entry) => drop(keys.insert(entry.key)),
                            Change::Delete { key } => drop(keys.remove(&key)),
                        }
                    }
                    self.show(next);
                }
                Some(Ok(WatchEvent::Progress { revision, asked })) => {
                    // Others' commits count too: who waits for a revision learns that it has passed, and
                    // a later watch need not ask for what was compacted since.
                    let current = self.current.load();
                    if revision > current.revision {
                        let mut next = Snapshot::clone(&current);
                        next.revision = revision;
                        self.show(next);
                    }
                    self.hear(asked);
                }
                Some(Err(error)) => return error,
                None => return StoreError::Unavailable("the watch has ended".to_owned()),
            }
        }
    }

    fn hear(&self, asked: Instant) {
        let mut heard = self.heard.lock();
        *heard = asked.max(*heard);
    }

    fn show(&self, snapshot: Snapshot) {
        let revision = snapshot.revision;
        self.current.store(Arc::new(snapshot));
        self.announce.send_replace(revision);
    }
}

/// Reads everything, over what was there `before`: what cannot be read stays as it was, what is no more is gone. `keys`
/// are those of before, and then those that there are.
async fn read(
    store: &dyn Store,
    before: &Snapshot,
    keys: &mut HashSet<String>,
) -> Result<Snapshot, StoreError> {
    let listing = store.list("").await?;
    let there: HashSet<String> = listing.entries.iter().map(|e| e.key.clone()).collect();
    let mut snapshot = before.clone();
    // First, for what they had (an address) may be somebody else's now.
    for gone in keys.difference(&there) {
        snapshot.delete(gone);
    }
    for entry in &listing.entries {
        snapshot.put(entry);
    }
    *keys = there;
    snapshot.revision = listing.revision;
    Ok(snapshot)
}

#[cfg(test)]
mod tests;
