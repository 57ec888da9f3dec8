//! When a Machine was last of use to anybody, beside the requests that the gate counts itself.
//!
//! Of use is what somebody outside it asks: a start, a wish of the API, a command that runs in it (from its
//! beginning to its end), and private traffic to its services ([`meter`](crate::network::meter)). Health
//! checks, and what the Machine does on its own account, are not.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

/// When one Machine was last of use.
#[derive(Debug)]
pub(crate) struct Activity {
    state: Mutex<Use>,
}

#[derive(Debug)]
struct Use {
    last: Instant,
    sessions: usize,
}

/// Somebody is in the Machine. It ends when dropped.
#[derive(Debug)]
pub(crate) struct Session(Arc<Activity>);

impl Activity {
    /// Of a Machine that is taken up now: what was before is not known.
    pub(crate) fn new() -> Arc<Self> {
        let last = Instant::now();
        let state = Mutex::new(Use { last, sessions: 0 });
        Arc::new(Self { state })
    }

    /// It is of use now.
    pub(crate) fn touch(&self) {
        self.state.lock().last = Instant::now();
    }

    /// It is of use until what is returned is dropped.
    pub(crate) fn session(self: &Arc<Self>) -> Session {
        self.state.lock().sessions += 1;
        Session(Arc::clone(self))
    }

    /// When it was last of use: now, while somebody is in it.
    pub(crate) fn last(&self) -> Instant {
        let state = self.state.lock();
        if state.sessions > 0 {
            Instant::now()
        } else {
            state.last
        }
    }

    /// Does something unless somebody is in the Machine. Who begins a session meanwhile finds it done.
    pub(crate) fn unless_in_session<T>(&self, act: impl FnOnce() -> T) -> Option<T> {
        let state = self.state.lock();
        (state.sessions == 0).then(act)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.sessions -= 1;
        state.last = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_begins_at_the_end_of_the_last_session() {
        let activity = Activity::new();
        let (one, other) = (activity.session(), activity.session());
        drop(one);
        assert_eq!(activity.unless_in_session(|| ()), None);
        let before = Instant::now();
        assert!(activity.last() >= before, "it is of use at this moment");
        drop(other);
        let end = activity.last();
        assert!(end >= before);
        assert_eq!(activity.last(), end, "and is not any more");
        assert_eq!(activity.unless_in_session(|| ()), Some(()));
        activity.touch();
        assert!(activity.last() >= end);
    }
}
