//! A lease that is kept alive, and whose loss is told in time.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::{LeaseId, Store, StoreError};

/// Shortest wait after a renewal that failed.
const RETRY: Duration = Duration::from_millis(200);

/// A lease that is kept alive as long as this lives; revoked when it is dropped.
///
/// It is lost when the store says so, and when it could not be renewed for its whole time: from then on somebody else
/// may hold what it held. Time counts from before a renewal is sent, so that the loss is known here no later
/// than anywhere else.
#[derive(Debug)]
pub struct HeldLease {
    id: LeaseId,
    lost: watch::Receiver<bool>,
    /// Ends with the task's half, which then revokes.
    _hold: tokio::sync::oneshot::Sender<()>,
    _task: JoinHandle<()>,
}

impl HeldLease {
    /// Grants a lease of this time and keeps it alive.
    pub async fn grant(store: Arc<dyn Store>, ttl: Duration) -> Result<Self, StoreError> {
        let since = Instant::now();
        let id = store.grant(ttl).await?;
        let (tell, lost) = watch::channel(false);
        let (hold, dropped) = tokio::sync::oneshot::channel();
        let task = tokio::spawn(async move {
            tokio::select! {
                () = keep(&*store, id, ttl, since) => {
                    tracing::warn!(lease = id.0, "a lease is lost");
                    tell.send_replace(true);
                }
                _ = dropped => {
                    // It would end by itself; this only spares others the wait.
                    if let Err(error) = store.revoke(id).await {
                        tracing::debug!(lease = id.0, %error, "a lease is left to end by itself");
                    }
                }
            }
        });
        Ok(Self {
            id,
            lost,
            _hold: hold,
            _task: task,
        })
    }

    /// The lease, for [`crate::Op::Put`].
    pub fn id(&self) -> LeaseId {
        self.id
    }

    /// Whether it is lost.
    pub fn is_lost(&self) -> bool {
        *self.lost.borrow()
    }

    /// Returns when it is lost.
    pub async fn lost(&self) {
        // The task tells before it ends; that it has ended without is a loss too.
        let _ = self.lost.clone().wait_for(|lost| *lost).await;
    }
}

/// Renews a lease until it is lost.
async fn keep(store: &dyn Store, id: LeaseId, ttl: Duration, mut since: Instant) {
    let mut wait = renewal(ttl);
    loop {
        let end = since + ttl;
        if tokio::time::timeout_at(end, tokio::time::sleep(wait))
            .await
            .is_err()
        {
            return;
        }
        let asked = Instant::now();
        wait = match tokio::time::timeout_at(end, store.keep_alive(id)).await {
            Ok(Ok(())) => {
                since = asked;
                renewal(ttl)
            }
            Ok(Err(StoreError::LeaseGone(_))) | Err(_) => return,
            Ok(Err(error)) => {
                tracing::warn!(lease = id.0, %error, "a lease was not renewed");
                RETRY.min(ttl / 10)
            }
        };
    }
}

/// Until the next renewal: about a third of the time, so that two may fail, and not in step with all the others.
fn renewal(ttl: Duration) -> Duration {
    ttl.mul_f64(rand::random_range(0.22..0.36))
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;

    use super::*;
    use crate::{Entry, Listing, Op, Revision, SqliteStore, Transaction, Watch};

    const LIMIT: Duration = Duration::from_secs(30);

    /// A store that answers no renewal.
    struct Deaf(SqliteStore);

    #[async_trait]
    impl Store for Deaf {
        async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
            self.0.get(key).await
        }
        async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
            self.0.list(prefix).await
        }
        async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
            self.0.commit(transaction).await
        }
        async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
            self.0.watch(prefix, after).await
        }
        async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
            self.0.grant(ttl).await
        }
        async fn keep_alive(&self, _: LeaseId) -> Result<(), StoreError> {
            std::future::pending().await
        }
        async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
            self.0.revoke(lease).await
        }
    }

    fn store(dir: &tempfile::TempDir) -> SqliteStore {
        SqliteStore::open(&dir.path().join("catalog.db")).unwrap()
    }

    #[tokio::test]
    async fn a_lease_that_is_revoked_elsewhere_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(store(&dir));
        let held = HeldLease::grant(Arc::clone(&store), Duration::from_secs(2))
            .await
            .unwrap();
        store.revoke(held.id()).await.unwrap();
        tokio::time::timeout(LIMIT, held.lost()).await.unwrap();
        assert!(held.is_lost());
    }

    #[tokio::test]
    async fn a_lease_that_nobody_renews_is_lost_in_its_time() {
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(Deaf(store(&dir)));
        let held = HeldLease::grant(store, Duration::from_millis(500))
            .await
            .unwrap();
        tokio::time::timeout(LIMIT, held.lost()).await.unwrap();
    }

    #[tokio::test]
    async fn a_lease_that_is_dropped_gives_up_its_keys() {
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(store(&dir));
        let held = HeldLease::grant(Arc::clone(&store), Duration::from_secs(3600))
            .await
            .unwrap();
        let put = Op::Put {
            key: "k".to_owned(),
            value: Vec::new(),
            lease: Some(held.id()),
        };
        let at = store.commit(Transaction::of(vec![put])).await.unwrap();
        let mut watch = store.watch("", at).await.unwrap();
        assert!(!held.is_lost());
        drop(held);
        let batch = tokio::time::timeout(LIMIT, watch.next()).await.unwrap();
        assert_eq!(batch.unwrap().unwrap().changes.len(), 1);
    }

    #[test]
    fn renewals_leave_room_for_two_that_fail_and_are_not_in_step() {
        let ttl = Duration::from_secs(9);
        let all: Vec<Duration> = (0..100).map(|_| renewal(ttl)).collect();
        assert!(all.iter().all(|wait| *wait > ttl / 5 && *wait * 2 < ttl));
        assert!(all.iter().any(|wait| *wait != all[0]));
    }
}
