//! One that waits for a place.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::oneshot;

use super::ledger::{Port, Ticket};
use super::{AppGate, Outcome, Refused};

/// A request that waits. Dropped, it waits no more, and gives back what it was given meanwhile.
pub struct Waiting {
    // The first field is dropped first: nothing is sent to one that is gone.
    queued: Queued,
    outcome: oneshot::Receiver<Outcome>,
}

struct Queued {
    app: Arc<AppGate>,
    port: Port,
    ticket: Ticket,
}

impl Waiting {
    /// It was counted as one that waits.
    pub fn new(
        app: &Arc<AppGate>,
        port: Port,
        ticket: Ticket,
        outcome: oneshot::Receiver<Outcome>,
    ) -> Self {
        let app = Arc::clone(app);
        Self {
            queued: Queued { app, port, ticket },
            outcome,
        }
    }

    /// What comes of it, within the wake timeout.
    pub async fn outcome(self) -> Outcome {
        let Self { queued, outcome } = self;
        let mut outcome = pin!(outcome);
        let limit = queued.app.shared.wake_timeout;
        let told = match tokio::time::timeout(limit, outcome.as_mut()).await {
            Ok(told) => told,
            Err(_) => {
                let (port, ticket) = (queued.port, queued.ticket);
                let expired = queued.app.core.lock().ledger.expire(port, ticket);
                match expired {
                    Some(refused) => return Err(refused),
                    // It has just been told.
                    None => outcome.await,
                }
            }
        };
        // Those that wait are told in any case.
        told.unwrap_or(Err(Refused::Nobody))
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.app.core.lock().ledger.cancel(self.port, self.ticket);
        self.app.waiting.fetch_sub(1, Ordering::SeqCst);
        self.app.shared.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}
