//! When each lease ends. No clock of its own: it is told what time it is.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::store::LeaseId;

/// The leases that are alive.
#[derive(Debug, Default)]
pub(super) struct Leases(HashMap<LeaseId, Lease>);

#[derive(Debug)]
struct Lease {
    ttl: Duration,
    ends: Instant,
}

impl Leases {
    /// A lease from now on; also one of an earlier process, which has its whole time again, for nobody
    /// could keep it alive meanwhile.
    pub(super) fn add(&mut self, id: LeaseId, ttl: Duration, now: Instant) {
        let ends = now + ttl;
        self.0.insert(id, Lease { ttl, ends });
    }

    /// Starts its time anew; `false` where there is none.
    pub(super) fn keep_alive(&mut self, id: LeaseId, now: Instant) -> bool {
        let Some(lease) = self.0.get_mut(&id) else {
            return false;
        };
        lease.ends = now + lease.ttl;
        true
    }

    /// Whether it is alive.
    pub(super) fn contains(&self, id: LeaseId) -> bool {
        self.0.contains_key(&id)
    }

    /// Forgets one that has ended.
    pub(super) fn remove(&mut self, id: LeaseId) {
        self.0.remove(&id);
    }

    /// Lets one that could not be ended stay for a while longer.
    pub(super) fn postpone(&mut self, id: LeaseId, until: Instant) {
        if let Some(lease) = self.0.get_mut(&id) {
            lease.ends = until;
        }
    }

    /// When the next one ends. There are tens of leases, not thousands: they are looked through.
    pub(super) fn next_end(&self) -> Option<Instant> {
        self.0.values().map(|l| l.ends).min()
    }

    /// Those whose time is over, in the order in which it ended.
    pub(super) fn over(&self, now: Instant) -> Vec<LeaseId> {
        let over = self.0.iter().filter(|(_, l)| l.ends <= now);
        let mut over: Vec<_> = over.map(|(id, l)| (l.ends, *id)).collect();
        over.sort();
        over.into_iter().map(|(_, id)| id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_ends_when_its_time_is_over_and_not_before() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut leases = Leases::default();
        assert_eq!(leases.next_end(), None);
        leases.add(LeaseId(1), 10 * second, start);
        leases.add(LeaseId(2), 5 * second, start);
        assert_eq!(leases.next_end(), Some(start + 5 * second));
        assert_eq!(leases.over(start + 4 * second), []);
        assert_eq!(leases.over(start + 10 * second), [LeaseId(2), LeaseId(1)]);
    }

    #[test]
    fn keeping_alive_starts_the_time_anew() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut leases = Leases::default();
        leases.add(LeaseId(1), 5 * second, start);
        assert!(leases.keep_alive(LeaseId(1), start + 4 * second));
        assert_eq!(leases.over(start + 8 * second), []);
        assert_eq!(leases.over(start + 9 * second), [LeaseId(1)]);
        leases.remove(LeaseId(1));
        assert!(!leases.keep_alive(LeaseId(1), start));
    }
}
