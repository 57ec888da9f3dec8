//! How the guest is doing, out of `/proc`.

use std::fs;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::time::{ClockId, clock_gettime};
use tern_guest::Status;
use tern_guest::message::GuestPhase;

use crate::journal::Journal;

/// Reads the guest's state.
pub fn read(journal: &Journal) -> io::Result<Status> {
    let (state, pid, exit) = journal.state();
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    Ok(Status {
        state,
        pid,
        exit,
        uptime_ms: uptime_us() / 1000,
        memory_total_kib: meminfo_kib(&meminfo, "MemTotal"),
        memory_available_kib: meminfo_kib(&meminfo, "MemAvailable"),
        load: load(&fs::read_to_string("/proc/loadavg")?),
        next_seq: journal.next_seq(),
        phases: phases().clone(),
    })
}

/// Notes that a phase of the boot has just ended.
pub fn mark(name: &str) {
    phases().push(GuestPhase {
        name: name.to_owned(),
        uptime_us: uptime_us(),
    });
}

fn phases() -> MutexGuard<'static, Vec<GuestPhase>> {
    static PHASES: Mutex<Vec<GuestPhase>> = Mutex::new(Vec::new());
    PHASES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Microseconds since the kernel started; time asleep does not count.
fn uptime_us() -> u64 {
    // This clock is always there.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |up| {
        up.tv_sec().unsigned_abs() * 1_000_000 + up.tv_nsec().unsigned_abs() / 1000
    })
}

fn meminfo_kib(text: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
        .find_map(|value| value.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

fn load(text: &str) -> [f64; 3] {
    let mut words = text
        .split_whitespace()
        .map(|word| word.parse().unwrap_or(0.0));
    [(); 3].map(|()| words.next().unwrap_or(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_texts_are_understood() {
        let text = "MemTotal:         119340 kB\nMemFree: 5 kB\nMemAvailable:   71892 kB\n";
        assert_eq!(meminfo_kib(text, "MemTotal"), 119_340);
        assert_eq!(meminfo_kib(text, "MemAvailable"), 71_892);
        assert_eq!(meminfo_kib(text, "Mem"), 0);
        assert_eq!(load("0.20 0.18 1.12 1/80 11206\n"), [0.20, 0.18, 1.12]);
        assert_eq!(load("0.5 x"), [0.5, 0.0, 0.0]);
    }

    #[test]
    fn this_machine_has_a_status() {
        let status = read(&Journal::default()).unwrap();
        assert!(status.memory_total_kib >= status.memory_available_kib);
        assert!(status.memory_available_kib > 0 && status.uptime_ms > 0);
    }
}
