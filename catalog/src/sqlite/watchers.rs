//! Those who watch: each has a prefix and a bounded queue.

use tokio::sync::mpsc;

use crate::store::{Change, Revision, StoreError, Watch, WatchBatch};

/// The running watches of a store.
#[derive(Default)]
pub(super) struct Watchers(Vec<Watcher>);

struct Watcher {
    prefix: String,
    batches: mpsc::Sender<Result<WatchBatch, StoreError>>,
}

/// Batches that may wait for a watcher that is slow; with more it is told to list anew, for memory is
/// bounded and the history is in the file. One place beside these is kept for telling it so.
const QUEUE: usize = 4096;

impl Watchers {
    /// Adds a watch that is given `past` first.
    pub(super) fn add(&mut self, prefix: String, past: Vec<WatchBatch>) -> Watch {
        let (batches, receiver) = mpsc::channel(QUEUE.max(past.len()) + 1);
        let watcher = Watcher { prefix, batches };
        for batch in past {
            watcher.tell(batch.revision, &batch.changes);
        }
        self.0.push(watcher);
        Watch { batches: receiver }
    }

    /// Tells everyone of a commit; forgets those who have gone or are too slow.
    pub(super) fn tell(&mut self, revision: Revision, changes: &[Change]) {
        self.0.retain(|watcher| watcher.tell(revision, changes));
    }
}

impl Watcher {
    fn tell(&self, revision: Revision, changes: &[Change]) -> bool {
        let ours = |change: &&Change| {
            let (Change::Put(crate::Entry { key, .. }) | Change::Delete { key }) = change;
            key.starts_with(&self.prefix)
        };
        let changes: Vec<Change> = changes.iter().filter(ours).cloned().collect();
        if changes.is_empty() {
            return !self.batches.is_closed();
        }
        if self.batches.capacity() > 1 {
            return self
                .batches
                .try_send(Ok(WatchBatch { revision, changes }))
                .is_ok();
        }
        let behind = StoreError::Compacted {
            wanted: revision.saturating_sub(1),
            oldest: revision,
        };
        let _ = self.batches.try_send(Err(behind));
        false
    }
}
