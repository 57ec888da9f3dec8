//! How much of something is in use at once, in all and by one network: nobody takes everything.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tern_catalog::NetworkId;

/// So many in all, so many for one network.
#[derive(Debug)]
pub(crate) struct Quota {
    total: usize,
    each: usize,
    used: Mutex<Used>,
}

#[derive(Debug, Default)]
struct Used {
    total: usize,
    by_network: HashMap<NetworkId, usize>,
}

/// One of them; given back when dropped.
#[derive(Debug)]
pub(crate) struct Share {
    quota: Arc<Quota>,
    network: NetworkId,
}

impl Quota {
    pub(crate) fn new(total: usize, each: usize) -> Arc<Self> {
        let used = Mutex::default();
        Arc::new(Self { total, each, used })
    }

    /// Takes one, if there is one left for this network.
    pub(crate) fn take(self: &Arc<Self>, network: NetworkId) -> Option<Share> {
        let mut used = self.used.lock();
        if used.total >= self.total {
            return None;
        }
        let own = used.by_network.entry(network).or_default();
        if *own >= self.each {
            return None;
        }
        *own += 1;
        used.total += 1;
        let quota = Arc::clone(self);
        Some(Share { quota, network })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut used = self.quota.used.lock();
        used.total -= 1;
        if let Some(own) = used.by_network.get_mut(&self.network) {
            *own -= 1;
            if *own == 0 {
                used.by_network.remove(&self.network);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_network_cannot_take_everything() {
        let quota = Quota::new(5, 3);
        let (a, b, c) = (NetworkId(1), NetworkId(2), NetworkId(3));
        let mut of_a: Vec<_> = std::iter::from_fn(|| quota.take(a)).collect();
        assert_eq!(of_a.len(), 3);
        let of_b: Vec<_> = std::iter::from_fn(|| quota.take(b)).collect();
        assert_eq!(of_b.len(), 2);
        assert!(quota.take(c).is_none());
        of_a.pop();
        let of_c = quota.take(c);
        assert!(of_c.is_some() && quota.take(a).is_none());
        drop((of_a, of_b, of_c));
        assert!(quota.used.lock().by_network.is_empty());
    }
}
