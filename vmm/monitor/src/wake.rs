//! When a restored guest has woken: what it has touched until then is its working set.
//!
//! ```text
//!                 asked                 answered                 LINGER later
//!  begin ──► Quiet ─────────► Asked ────────────────► Answered ────────────────► over
//!              │                │                                                 ▲
//!              │                └── PATIENCE after the beginning ─────────────────┤
//!              └── QUIET after the beginning ─────────────────────────────────────┘
//!  in any state: end ──► Over
//! ```
//!
//! Network cards see the first request and its reply ([`crate::virtio::net::reply`]); the main thread waits for
//! the end, and takes stock. A guest of which no card can tell (woken by UDP or over vsock, or behind a card whose
//! frames do not pass the monitor) stays `Quiet`.
//!
//! Taking stock reads the page map of all memory, which is tens of milliseconds for a large guest, while the rest
//! of a long reply is still to come. Where there is one processor for both, the reply would wait; hence the
//! pause after its first segment. What is touched in it is a part of the reply too.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::trace::Trace;

/// A guest that nobody has asked anything by now woke for something else, and has done a good part of it.
const QUIET: Duration = Duration::from_secs(1);
/// One that has not answered by now does something longer than waking.
const PATIENCE: Duration = Duration::from_secs(10);
/// Many times what a client on the same host or network takes to fetch the rest of a page, and short
/// beside the time until a guest is suspended again.
const LINGER: Duration = Duration::from_millis(100);

/// A wake, as far as it can be seen. It is told the time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wake {
    begun: Instant,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Quiet,
    Asked,
    Answered(Instant),
    Over,
}

impl Wake {
    /// A wake that begins `now`.
    pub fn new(now: Instant) -> Self {
        Self {
            begun: now,
            state: State::Quiet,
        }
    }

    /// The guest has been asked something; returns whether that was the first time.
    pub fn asked(&mut self) -> bool {
        let first = self.state == State::Quiet;
        if first {
            self.state = State::Asked;
        }
        first
    }

    /// The guest has begun to answer; returns whether that was the first time.
    pub fn answered(&mut self, now: Instant) -> bool {
        let first = matches!(self.state, State::Quiet | State::Asked);
        if first {
            self.state = State::Answered(now);
        }
        first
    }

    /// Stock has been taken; returns whether the guest had answered by then.
    pub fn end(&mut self) -> bool {
        let answered = matches!(self.state, State::Answered(_));
        self.state = State::Over;
        answered
    }

    /// When it will be over if nothing more is seen; `None` once it has ended.
    pub fn ends_at(&self) -> Option<Instant> {
        match self.state {
            State::Quiet => Some(self.begun + QUIET),
            State::Asked => Some(self.begun + PATIENCE),
            State::Answered(at) => Some(at + LINGER),
            State::Over => None,
        }
    }
}

/// The wake of one guest, for its network cards and the main thread.
pub struct SharedWake {
    wake: Mutex<Wake>,
    trace: Arc<Trace>,
    sooner: Box<dyn Fn() + Send + Sync>,
}

impl SharedWake {
    /// A wake that begins now. `sooner` is called when its end has come nearer, so that whoever waits looks again;
    /// an end that moves away is found out by looking when the old one has come.
    pub fn new(trace: Arc<Trace>, sooner: Box<dyn Fn() + Send + Sync>) -> Self {
        Self {
            wake: Mutex::new(Wake::new(Instant::now())),
            trace,
            sooner,
        }
    }

    /// Its guest is about to run.
    pub fn begin(&self) {
        self.with(|wake| *wake = Wake::new(Instant::now()));
    }

    /// A request is with the guest.
    pub fn asked(&self) {
        // Nobody is woken for this: the guest's processor has better to do.
        if self.with(Wake::asked) {
            self.trace.mark("first_request_in");
        }
    }

    /// The first segment of a reply has left the guest.
    pub fn answered(&self) {
        if self.with(|wake| wake.answered(Instant::now())) {
            self.trace.mark("first_reply_out");
            (self.sooner)();
        }
    }

    /// Stock has been taken: nobody needs to look at frames any more. Returns whether the guest had answered by then.
    pub fn end(&self) -> bool {
        self.with(Wake::end)
    }

    /// As [`Wake::ends_at`].
    pub fn ends_at(&self) -> Option<Instant> {
        self.with(|wake| wake.ends_at())
    }

    fn with<T>(&self, act: impl FnOnce(&mut Wake) -> T) -> T {
        act(&mut self.wake.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for SharedWake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedWake")
            .field("wake", &self.wake)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// When a wake ends, in milliseconds after its beginning.
    fn end_after(signs: impl FnOnce(&mut Wake, Instant)) -> Option<u128> {
        let begun = Instant::now();
        let mut wake = Wake::new(begun);
        signs(&mut wake, begun);
        wake.ends_at().map(|end| (end - begun).as_millis())
    }

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn nobody_asks() {
        assert_eq!(end_after(|_, _| ()), Some(1000));
    }

    #[test]
    fn a_request_is_waited_for_until_patience_ends() {
        assert_eq!(end_after(|wake, _| assert!(wake.asked())), Some(10_000));
    }

    #[test]
    fn the_first_reply_counts_and_no_other() {
        for after in [20, 900, 1500, 9999] {
            let end = end_after(|wake, begun| {
                assert!(wake.asked());
                assert!(!wake.asked());
                assert!(wake.answered(begun + ms(after)));
                assert!(!wake.asked());
                assert!(!wake.answered(begun + ms(after + 50)));
            });
            assert_eq!(end, Some(u128::from(after) + 100));
        }
    }

    #[test]
    fn what_is_over_stays_so() {
        let end = end_after(|wake, begun| {
            assert!(wake.asked());
            assert!(!wake.end(), "it has not been answered");
            assert!(!wake.asked());
            assert!(!wake.answered(begun));
        });
        assert_eq!(end, None);
    }

    #[test]
    fn who_waits_is_told_of_a_nearer_end_once_it_is_one() {
        let (trace, calls) = (crate::virtio::testing::trace(), Arc::new(AtomicU32::new(0)));
        let called = calls.clone();
        let count = move || {
            called.fetch_add(1, Ordering::SeqCst);
        };
        let wake = SharedWake::new(trace.clone(), Box::new(count));
        let created = wake.ends_at();
        wake.begin();
        assert!(wake.ends_at() > created, "it is counted from its beginning");
        wake.asked();
        assert_eq!(calls.load(Ordering::SeqCst), 0);
        let far = wake.ends_at();
        wake.answered();
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        assert!(wake.ends_at() < far);
        wake.answered();
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        assert!(wake.end(), "it has been answered");
        assert_eq!(wake.ends_at(), None);
        let names: Vec<_> = trace.phases().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["first_request_in", "first_reply_out"]);
    }
}
