//! What the agent counts. One documented field per counter; all only ever grow.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// What it has come to.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])* $name:ident,)*) => {
        /// What the agent has counted since it started.
        #[derive(Debug, Default)]
        pub struct Metrics {
            $($(#[doc = $doc])* pub $name: Counter,)*
        }

        impl Metrics {
            /// Every counter: its name, what it counts, its value.
            pub fn all(&self) -> Vec<(&'static str, &'static str, u64)> {
                vec![$((stringify!($name), concat!($($doc),*).trim_ascii(), self.$name.get()),)*]
            }
        }
    };
}

counters! {
    /// Cold starts begun.
    cold_starts,
    /// Cold starts that did not come as far as the app.
    failed_starts,
    /// Wakes begun.
    wakes,
    /// Wakes that ended in a cold start instead, or not at all.
    refused_wakes,
    /// Microseconds that wakes have taken, together.
    wake_micros,
    /// Suspends begun.
    suspends,
    /// Suspends after which the Machine was not suspended.
    failed_suspends,
    /// Stops asked of apps.
    stops,
    /// Monitors ended by force.
    kills,
    /// Machines that ended without being asked to.
    exits,
    /// Machines found running, or asleep, when the agent started.
    adopted,
    /// Machines destroyed.
    destroyed,
    /// Devices removed that belonged to no Machine.
    leftovers,
    /// Machines found on the disk that the catalog does not know, and left as they are.
    quarantined,
    /// Lines of apps' output collected.
    log_lines,
    /// Lines that a guest had forgotten before they were collected.
    log_lines_lost,
    /// Lines that were forgotten before a slow reader of the log came to them.
    log_lines_missed,
    /// Health checks done.
    checks,
    /// Health checks that failed.
    failed_checks,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_listed_with_their_meaning() {
        let metrics = Metrics::default();
        metrics.wakes.add(2);
        assert!(metrics.all().contains(&("wakes", "Wakes begun.", 2)));
    }
}
