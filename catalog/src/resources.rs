//! What Machines take of a host while they run: counted the same by placement and by the host's agent.

use serde::{Deserialize, Serialize};

use crate::Guest;

/// As on Fly.io: sixteen shared processors are one.
pub const SIXTEENTHS: u64 = 16;
/// A monitor's own memory, with its page tables for the guest's.
const MONITOR_MIB: u64 = 32;

/// Memory and processors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// MiB of memory.
    pub memory_mib: u64,
    /// Sixteenths of a processor.
    pub cpu_sixteenths: u64,
}

impl Resources {
    /// Counts these too.
    pub fn add(&mut self, more: Self) {
        self.memory_mib += more.memory_mib;
        self.cpu_sixteenths += more.cpu_sixteenths;
    }

    /// Processors, for people.
    pub fn cpus(self) -> f64 {
        self.cpu_sixteenths as f64 / SIXTEENTHS as f64
    }
}

impl Guest {
    /// Whether its processors are its own.
    pub fn is_dedicated(&self) -> bool {
        self.cpu_kind == "performance"
    }

    /// What a Machine of this size takes while it runs, on a host that has `all`. One that wants more processors than
    /// there are has them all, and runs.
    pub fn needs(&self, all: Resources) -> Resources {
        let needs = self.needs_anywhere();
        Resources {
            cpu_sixteenths: needs.cpu_sixteenths.min(all.cpu_sixteenths),
            ..needs
        }
    }

    /// The same where nothing is known of the host.
    pub fn needs_anywhere(&self) -> Resources {
        let each = if self.is_dedicated() { SIXTEENTHS } else { 1 };
        Resources {
            memory_mib: u64::from(self.memory_mb) + MONITOR_MIB,
            cpu_sixteenths: u64::from(self.cpus) * each,
        }
    }
}
