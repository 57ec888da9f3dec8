//! What must be done also where a command is interrupted: it is begun when its guard is dropped, and waited for, not for
//! long, before the program ends.

use std::sync::LazyLock;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

/// For all that is to be done, at the end.
const TIME: Duration = Duration::from_secs(3);

static UNDER_WAY: LazyLock<TaskTracker> = LazyLock::new(TaskTracker::new);

/// Waits, not for long, for what was begun.
pub async fn done() {
    UNDER_WAY.close();
    let _ = tokio::time::timeout(TIME, UNDER_WAY.wait()).await;
}

/// Does its work when it is dropped.
pub struct Cleanup {
    held: oneshot::Sender<()>,
    work: JoinHandle<()>,
}

impl Cleanup {
    /// This work.
    pub fn new(work: impl Future<Output = ()> + Send + 'static) -> Self {
        let (held, dropped) = oneshot::channel::<()>();
        let work = UNDER_WAY.spawn(async move {
            if dropped.await.is_err() {
                work.await;
            }
        });
        Self { held, work }
    }

    /// Does it now, and waits for it, not for long.
    pub async fn now(self) {
        drop(self.held);
        let _ = tokio::time::timeout(TIME, self.work).await;
    }

    /// There is no need for it any more.
    pub fn forget(self) {
        let _ = self.held.send(());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn it_is_done_unless_it_is_forgotten() {
        let count = Arc::new(AtomicU32::new(0));
        let cleanup = || {
            let count = Arc::clone(&count);
            Cleanup::new(async move {
                count.fetch_add(1, Ordering::Relaxed);
            })
        };
        cleanup().now().await;
        cleanup().forget();
        drop(cleanup());
        done().await;
        assert_eq!(count.load(Ordering::Relaxed), 2);
    }
}
