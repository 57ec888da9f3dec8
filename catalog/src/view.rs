//! The catalog in memory, read without locks.
//!
//! A [`View`] lists the store once and then follows its watch. A reader takes a [`Snapshot`], a
//! consistent picture that costs one atomic load; persistent maps make the next one cheap. When the
//! store cannot be followed the view stays as it is, says how stale it is, and tries again.

mod snapshot;

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{CatalogError, Revision, Store, StoreError};
pub use snapshot::Snapshot;

/// The catalog in memory. Clones share it.
#[derive(Clone)]
pub struct View {
    current: Arc<ArcSwap<Snapshot>>,
    revision: watch::Receiver<Revision>,
    stale_since: Arc<Mutex<Option<Instant>>>,
    /// Ends the follower with the last clone.
    _follower: Arc<Follower>,
}

struct Follower(tokio::task::JoinHandle<()>);

/// Waits between two attempts to follow a store that fails.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MOST: Duration = Duration::from_secs(5);

impl View {
    /// Reads everything, and follows what comes from then on.
    pub async fn follow(store: Arc<dyn Store>) -> Result<Self, CatalogError> {
        let first = read(&*store).await?;
        let (announce, revision) = watch::channel(first.revision);
        let current = Arc::new(ArcSwap::from_pointee(first));
        let stale_since = Arc::new(Mutex::new(None));
        let follower = Follow {
            store,
            current: Arc::clone(&current),
            announce,
            stale_since: Arc::clone(&stale_since),
        };
        let task = tokio::spawn(follower.run());
        Ok(Self {
            current,
            revision,
            stale_since,
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

    /// How long the store has not been followed; `None` while it is.
    pub fn stale_for(&self) -> Option<Duration> {
        self.stale_since.lock().map(|since| since.elapsed())
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
    stale_since: Arc<Mutex<Option<Instant>>>,
}

impl Follow {
    async fn run(self) {
        let mut wait = RETRY_FIRST;
        loop {
            let before = self.current.load().revision;
            let ended = self.follow(before).await;
            self.stale_since.lock().get_or_insert_with(Instant::now);
            match ended {
                // Too far behind: what is missing can only be had by reading everything.
                StoreError::Compacted { .. } => match read(&*self.store).await {
                    Ok(whole) => {
                        self.show(whole);
                        continue;
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

    /// Follows until that ends.
    async fn follow(&self, after: Revision) -> StoreError {
        let mut watch = match self.store.watch("", after).await {
            Ok(watch) => watch,
            Err(error) => return error,
        };
        *self.stale_since.lock() = None;
        loop {
            match watch.next().await {
                Some(Ok(batch)) => {
                    let mut next = Snapshot::clone(&self.current.load());
                    next.apply(&batch);
                    self.show(next);
                }
                Some(Err(error)) => return error,
                None => return StoreError::Unavailable("the watch has ended".to_owned()),
            }
        }
    }

    fn show(&self, snapshot: Snapshot) {
        let revision = snapshot.revision;
        self.current.store(Arc::new(snapshot));
        self.announce.send_replace(revision);
    }
}

async fn read(store: &dyn Store) -> Result<Snapshot, StoreError> {
    let listing = store.list("").await?;
    let mut snapshot = Snapshot::default();
    for entry in &listing.entries {
        snapshot.put(entry);
    }
    snapshot.revision = listing.revision;
    Ok(snapshot)
}

#[cfg(test)]
mod tests;
