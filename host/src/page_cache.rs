//! Whether the memory of a suspended Machine stays in the host's memory too, as page cache of its file.
//!
//! Kept, a wake reads nothing from the disk. Dropped, what a Machine used is free again as soon as its memory is
//! on disk, and the cache of images and databases is not pushed out by the memory of those who sleep.

use std::fs;
use std::str::FromStr;

/// What becomes of the page cache of a suspended Machine's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SnapshotCache {
    /// It stays, until the kernel needs the room.
    Keep,
    /// It is dropped once the memory is on disk.
    Drop,
    /// It is dropped where the host is short of memory at that time.
    #[default]
    Auto,
}

impl SnapshotCache {
    /// What may be asked for.
    pub const NAMES: [&str; 3] = ["keep", "drop", "auto"];

    /// Whether to drop it now.
    pub(crate) fn drops_now(self) -> bool {
        match self {
            Self::Keep => false,
            Self::Drop => true,
            // A host that does not tell has what it needs.
            Self::Auto => fs::read_to_string("/proc/meminfo").is_ok_and(|m| is_short(&m)),
        }
    }
}

impl FromStr for SnapshotCache {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "keep" => Ok(Self::Keep),
            "drop" => Ok(Self::Drop),
            "auto" => Ok(Self::Auto),
            _ => Err(format!("{name} is none of {}", Self::NAMES.join(", "))),
        }
    }
}

/// Whether a host is short of memory, by its `/proc/meminfo`.
fn is_short(meminfo: &str) -> bool {
    let kib = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    match (kib("MemAvailable:"), kib("MemTotal:")) {
        (Some(available), Some(total)) => available < total / SHORT,
        _ => false,
    }
}

/// Less than one in so many bytes available is short: the kernel soon looks for pages to take back, and finds
/// running guests' beside cached ones.
const SHORT: u64 = 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_short_below_a_tenth() {
        let host = |available| {
            is_short(&format!(
                "MemTotal:       16000000 kB\nMemFree:          100000 kB\nMemAvailable:   {available} kB\n"
            ))
        };
        assert!(!host(8_000_000));
        assert!(!host(1_600_000));
        assert!(host(1_599_999));
        assert!(!is_short("MemTotal: 16000000 kB\n"), "before Linux 3.14");
        assert!(!is_short("MemTotal: much\nMemAvailable: 0 kB\n"));
        assert!(!is_short(""));
    }

    #[test]
    fn a_policy_has_a_name() {
        for name in SnapshotCache::NAMES {
            assert!(name.parse::<SnapshotCache>().is_ok(), "{name}");
        }
        assert!("never".parse::<SnapshotCache>().is_err());
        assert_eq!("auto".parse(), Ok(SnapshotCache::default()));
        assert!(SnapshotCache::Drop.drops_now() && !SnapshotCache::Keep.drops_now());
    }
}
