//! How the guest is doing, out of `/proc`.

use std::fs;
use std::io;

use nix::time::{ClockId, clock_gettime};
use tern_guest::Status;

use crate::journal::Journal;

/// Reads the guest's state.
pub fn read(journal: &Journal) -> io::Result<Status> {
    let (state, pid, exit) = journal.state();
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let up = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    let (seconds, nanos) = (up.tv_sec().unsigned_abs(), up.tv_nsec().unsigned_abs());
    Ok(Status {
        state,
        pid,
        exit,
        uptime_ms: seconds * 1000 + nanos / 1_000_000,
        memory_total_kib: meminfo_kib(&meminfo, "MemTotal"),
        memory_available_kib: meminfo_kib(&meminfo, "MemAvailable"),
        load: load(&fs::read_to_string("/proc/loadavg")?),
        next_seq: journal.next_seq(),
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
