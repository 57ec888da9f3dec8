//! One deadline that moves often and seldom passes.

use std::future::Future as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};

/// A timer whose deadline may be moved at the price of reading the clock: the runtime is told only of one
/// that comes earlier.
#[derive(Debug)]
pub struct Timer {
    sleep: Pin<Box<Sleep>>,
    at: Instant,
}

impl Timer {
    pub fn new(after: Duration) -> Self {
        let sleep = Box::pin(sleep(after));
        let at = sleep.deadline();
        Self { sleep, at }
    }

    /// Moves the deadline to so long after now.
    pub fn set(&mut self, after: Duration) {
        self.at = Instant::now() + after;
        if self.at < self.sleep.deadline() {
            self.sleep.as_mut().reset(self.at);
        }
    }

    /// Ready when the deadline has passed.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.sleep.as_mut().poll(cx));
            if self.at <= self.sleep.deadline() {
                return Poll::Ready(());
            }
            self.sleep.as_mut().reset(self.at);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    #[tokio::test]
    async fn a_deadline_moves_both_ways() {
        let begun = Instant::now();
        let mut timer = Timer::new(Duration::from_millis(1));
        timer.set(Duration::from_millis(60));
        poll_fn(|cx| timer.poll(cx)).await;
        assert!(begun.elapsed() >= Duration::from_millis(60));
        // Not to be waited for, were it not moved.
        timer.set(Duration::from_secs(3600));
        timer.set(Duration::from_millis(1));
        poll_fn(|cx| timer.poll(cx)).await;
    }
}
