//! Loops that must not end: one that panics is told of, counted, and begun anew.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

/// Pauses before a loop is begun anew: whatever it died of may be there still.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_MOST: Duration = Duration::from_secs(30);

static RESTARTS: AtomicU64 = AtomicU64::new(0);

/// How often loops of this process had to be begun anew.
pub fn restarts() -> u64 {
    RESTARTS.load(Ordering::Relaxed)
}

/// Runs what `begin` makes until that ends, anew after each panic. Dropped, it ends what runs.
///
/// For loops that can begin from nothing but what `begin` gives them. Others go on meanwhile: a value that one loop dies
/// of must not take the rest of the process along.
pub async fn keep_running<F>(what: &str, mut begin: impl FnMut() -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut pause = PAUSE_FIRST;
    let mut running = JoinSet::new();
    loop {
        let begun = Instant::now();
        running.spawn(begin());
        let Some(Err(error)) = running.join_next().await else {
            return;
        };
        RESTARTS.fetch_add(1, Ordering::Relaxed);
        if begun.elapsed() > PAUSE_MOST {
            pause = PAUSE_FIRST;
        }
        tracing::error!(what, %error, ?pause, "a loop has failed, and is begun anew");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MOST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_panics_is_begun_anew_until_it_ends() {
        let before = restarts();
        let mut runs = 0;
        let begin = || {
            runs += 1;
            let falls = runs < 3;
            async move { assert!(!falls, "on purpose") }
        };
        keep_running("a test", begin).await;
        assert_eq!(runs, 3);
        assert!(restarts() >= before + 2);
    }

    #[tokio::test]
    async fn what_runs_ends_with_it() {
        let (alive, mut gone) = tokio::sync::mpsc::channel::<()>(1);
        let running = tokio::spawn(keep_running("a test", move || {
            let alive = alive.clone();
            async move {
                alive.closed().await;
            }
        }));
        tokio::task::yield_now().await;
        running.abort();
        assert!(running.await.unwrap_err().is_cancelled());
        assert_eq!(gone.recv().await, None);
    }
}
