//! Where the time of a start went: a list of named moments, in microseconds since process start.

use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::ser::{Serialize, SerializeMap, Serializer};

/// The phases of this monitor's start, in the order in which they ended.
///
/// Shared by every thread of the monitor; marking a phase is a clock read and a push. A name marked
/// twice keeps its first moment.
#[derive(Debug)]
pub struct Trace {
    start: Instant,
    /// The wall clock at `start`, by which others put these phases beside their own.
    started_at: SystemTime,
    phases: Mutex<Vec<(&'static str, u64)>>,
}

impl Trace {
    /// Counts from `start`, which `main` takes first of all.
    pub fn new(start: Instant) -> Self {
        Self {
            start,
            started_at: SystemTime::now() - start.elapsed(),
            phases: Mutex::new(Vec::with_capacity(16)),
        }
    }

    /// Notes that the phase `name` has just ended.
    pub fn mark(&self, name: &'static str) {
        let micros = u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX);
        let mut phases = self.phases.lock().unwrap_or_else(PoisonError::into_inner);
        if phases.iter().all(|(known, _)| *known != name) {
            phases.push((name, micros));
        }
    }

    /// When the count began, in microseconds since 1970.
    pub fn started_unix_micros(&self) -> u64 {
        let since = self.started_at.duration_since(UNIX_EPOCH);
        since.map_or(0, |since| {
            u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
        })
    }

    /// The phases so far.
    pub fn phases(&self) -> Vec<(&'static str, u64)> {
        self.phases
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Serialize for Trace {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let phases = self.phases();
        let mut map = serializer.serialize_map(Some(phases.len()))?;
        for (name, micros) in phases {
            map.serialize_entry(&format!("{name}_us"), &micros)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_order_and_first_moments() {
        let trace = Trace::new(Instant::now());
        trace.mark("kvm");
        trace.mark("memory");
        let first = trace.phases();
        trace.mark("kvm");
        assert_eq!(trace.phases(), first);
        let text = serde_json::to_string(&trace).unwrap();
        assert!(text.starts_with("{\"kvm_us\":"), "{text}");
        assert!(text.find("kvm_us") < text.find("memory_us"));
    }
}
