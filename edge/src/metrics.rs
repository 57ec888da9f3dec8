//! What the edge counts. Counters only ever grow; each is told of with what it counts (`docs/metrics.md`).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tern_catalog::AppName;

/// A number that only rises.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

/// How many there are of something now.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

/// One that is there; counted until it is dropped.
pub struct Counted(Arc<Gauge>);

/// How often something took how long.
#[derive(Debug, Default)]
pub struct Histogram {
    /// By the bounds' order; the last is what is beyond them.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    micros: AtomicU64,
}

/// Upper bounds of a histogram's buckets, in seconds.
pub const BOUNDS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];

/// What is counted of one app's requests.
#[derive(Debug, Default)]
pub struct AppMetrics {
    /// Answered, by the status' first digit from 1 on; the first is of those that got none.
    classes: [Counter; 6],
    /// Bytes of requests' content.
    pub received: Counter,
    /// Bytes of replies' content.
    pub sent: Counter,
    /// From a request's head to the end of its reply.
    pub durations: Histogram,
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])* $name:ident,)*) => {
        /// Counters of one edge since it started.
        #[derive(Debug, Default)]
        pub struct Metrics {
            $($(#[doc = $doc])* pub $name: Counter,)*
            /// Connections that are open.
            pub open_connections: Arc<Gauge>,
            /// From the wish for a start until the app accepts connections, of those that came to it.
            pub wake_durations: Histogram,
            /// Of requests that found no place at once: until they had one, or were refused.
            pub waits: Histogram,
            apps: Mutex<HashMap<AppName, Arc<AppMetrics>>>,
        }

        impl Metrics {
            /// Every counter: its name, what it counts, its value.
            pub fn counters(&self) -> Vec<(&'static str, &'static str, u64)> {
                vec![$((stringify!($name), concat!($($doc),*).trim_ascii(), self.$name.get()),)*]
            }
        }
    };
}

counters! {
    /// Connections accepted.
    connections,
    /// Connections closed as soon as they came: their client had as many as one may.
    connections_refused,
    /// Idle connections ended because there was no room for others.
    connections_shed,
    /// TLS handshakes that failed.
    tls_failures,
    /// Requests that reached an app.
    proxied,
    /// Connections that are not HTTP, and reached an app.
    tcp_relayed,
    /// Sessions of UDP that reached an app.
    udp_sessions,
    /// Requests sent again because the first was lost with its connection.
    replayed,
    /// Requests refused by the ingress itself: unknown hosts, malformed or oversized heads.
    refused,
    /// Requests that found all Machines at their limit, or none to be had, until their patience ended.
    at_capacity,
    /// Machines woken when a client's handshake named their app, before its request.
    early_wakes,
    /// Of them, those for which no request came.
    early_wakes_wasted,
    /// Starts asked of the agent.
    wakes,
    /// Starts that failed.
    wake_failures,
    /// Machines put to sleep for want of traffic.
    put_to_sleep,
    /// Lines of the access log that were lost because the disk was slower than the requests.
    access_log_lost,
}

impl Metrics {
    /// What is counted of an app.
    pub fn app(&self, name: &AppName) -> Arc<AppMetrics> {
        let mut apps = self.apps.lock();
        if let Some(known) = apps.get(name) {
            return Arc::clone(known);
        }
        Arc::clone(apps.entry(name.clone()).or_default())
    }

    /// Of all apps that are kept, in order of name. The others are forgotten.
    pub fn apps(&self, keep: impl Fn(&AppName) -> bool) -> Vec<(AppName, Arc<AppMetrics>)> {
        let mut apps = self.apps.lock();
        apps.retain(|name, _| keep(name));
        let mut all: Vec<_> = apps
            .iter()
            .map(|(name, app)| (name.clone(), Arc::clone(app)))
            .collect();
        all.sort_by(|one, two| one.0.cmp(&two.0));
        all
    }
}

impl AppMetrics {
    /// A request is over: its status, or 0 where it got no reply.
    pub fn ended(&self, status: u16, received: u64, sent: u64, took: Duration) {
        if let Some(class) = self.classes.get(usize::from(status / 100)) {
            class.add();
        }
        self.received.add_all(received);
        self.sent.add_all(sent);
        self.durations.add(took);
    }

    /// How many there were of each class.
    pub fn classes(&self) -> [(&'static str, u64); 6] {
        let names = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];
        let mut counts = self.classes.iter().map(Counter::get);
        names.map(|name| (name, counts.next().unwrap_or_default()))
    }
}

impl Counter {
    /// One more.
    pub fn add(&self) {
        self.add_all(1);
    }

    /// So many more.
    pub fn add_all(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// How many.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Gauge {
    /// One more, until what is returned is dropped.
    pub fn count(self: &Arc<Self>) -> Counted {
        self.0.fetch_add(1, Ordering::Relaxed);
        Counted(Arc::clone(self))
    }

    /// How many.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Histogram {
    /// One that took so long.
    pub fn add(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = BOUNDS.partition_point(|bound| *bound < seconds);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.micros.fetch_add(micros, Ordering::Relaxed);
    }

    /// Those within each bound, all of them, and their time in seconds together.
    pub fn get(&self) -> ([u64; BOUNDS.len()], u64, f64) {
        let mut all = 0;
        let mut within = [0; BOUNDS.len()];
        let buckets = self.buckets.iter().map(|b| b.load(Ordering::Relaxed));
        for (n, bucket) in buckets.enumerate() {
            all += bucket;
            if let Some(within) = within.get_mut(n) {
                *within = all;
            }
        }
        let micros = self.micros.load(Ordering::Relaxed);
        (within, all, micros as f64 / 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts_what_is_within_each_bound() {
        let histogram = Histogram::default();
        for millis in [1, 2, 30, 60_000] {
            histogram.add(Duration::from_millis(millis));
        }
        let (within, all, seconds) = histogram.get();
        assert_eq!(within, [1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3]);
        assert_eq!((all, seconds), (4, 60.033));
    }

    #[test]
    fn apps_are_counted_apart_and_forgotten() {
        let metrics = Metrics::default();
        let (a, b): (AppName, AppName) = ("aa".parse().unwrap(), "bb".parse().unwrap());
        metrics.app(&b).ended(404, 1, 2, Duration::ZERO);
        metrics.app(&a).ended(0, 0, 0, Duration::ZERO);
        let all = metrics.apps(|_| true);
        assert_eq!((&all[0].0, &all[1].0), (&a, &b));
        assert_eq!(all[0].1.classes()[0], ("none", 1));
        assert_eq!(all[1].1.classes()[4], ("4xx", 1));
        assert_eq!(metrics.apps(|name| *name == a).len(), 1);
        assert_eq!(metrics.app(&b).classes()[4], ("4xx", 0));
    }

    #[test]
    fn open_ones_are_counted_until_they_are_dropped() {
        let gauge = Arc::new(Gauge::default());
        let (one, two) = (gauge.count(), gauge.count());
        drop(one);
        assert_eq!(gauge.get(), 1);
        drop(two);
        assert_eq!(gauge.get(), 0);
    }
}
