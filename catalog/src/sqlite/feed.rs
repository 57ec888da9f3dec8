//! Feeding a watch: the log is read from where the watcher stands, as fast as it takes it.
//!
//! Past and present come the same way, so there is no seam between them. A watcher that is slow holds
//! one page in memory; when the history it has yet to read is forgotten, it is told so and ends.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, watch};

use super::reader::Reader;
use crate::store::{PROGRESS_EVERY, Revision, StoreError, Watch, WatchEvent};

/// Feeds one watch.
pub(super) struct Feed {
    reader: Reader,
    committed: watch::Receiver<Revision>,
    prefix: Arc<str>,
    /// All up to here has been told.
    told: Revision,
    events: mpsc::Sender<Result<WatchEvent, StoreError>>,
}

/// Batches that wait in the channel beside the page they are from; a few, to spare switching tasks.
const AHEAD: usize = 32;

impl Feed {
    /// Starts feeding a new watch, from the commit after `after`.
    pub(super) fn start(
        reader: Reader,
        committed: watch::Receiver<Revision>,
        prefix: &str,
        after: Revision,
    ) -> Watch {
        let (events, receiver) = mpsc::channel(AHEAD);
        let feed = Self {
            reader,
            committed,
            prefix: prefix.into(),
            told: after,
            events,
        };
        tokio::spawn(feed.run());
        Watch::new(receiver)
    }

    async fn run(mut self) {
        loop {
            let asked = Instant::now();
            let up_to = *self.committed.borrow_and_update();
            while self.told < up_to {
                if let Err(error) = self.page(up_to).await {
                    // Whoever has gone needs no reason.
                    let _ = self.events.send(Err(error)).await;
                    return;
                }
                if self.events.is_closed() {
                    return;
                }
            }
            if self
                .events
                .send(Ok(WatchEvent::Progress {
                    revision: self.told,
                    asked,
                }))
                .await
                .is_err()
            {
                return;
            }
            tokio::select! {
                // The store has closed, and with us the watch ends.
                changed = self.committed.changed() => if changed.is_err() { return },
                () = self.events.closed() => return,
                () = tokio::time::sleep(PROGRESS_EVERY) => {}
            }
        }
    }

    async fn page(&mut self, up_to: Revision) -> Result<(), StoreError> {
        let prefix = Arc::clone(&self.prefix);
        let page = self.reader.page(prefix, self.told, up_to).await?;
        for batch in page.batches {
            if self
                .events
                .send(Ok(WatchEvent::Batch(batch)))
                .await
                .is_err()
            {
                break;
            }
        }
        self.told = page.through;
        Ok(())
    }
}
