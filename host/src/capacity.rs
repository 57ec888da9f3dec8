//! What this host has for Machines that run, and what of it is taken.
//!
//! Machines that sleep or have stopped take no memory and no processors, so what counts is what runs: each start and
//! each wake takes its Machine's share before it touches anything, and is refused where that is not there. What
//! runs when an agent starts has its share in any case.
//!
//! | | memory | processors |
//! |---|---|---|
//! | this host has | all but what it keeps for itself, times [`Overcommit::memory`] | its own, times [`Overcommit::cpus`] |
//! | a Machine takes | its guest's, and some of its monitor's | one for each of kind `performance`, a sixteenth for each that is shared |

use std::sync::Arc;

use parking_lot::Mutex;
use serde::Serialize;
use tern_catalog::{Guest, Resources, SIXTEENTHS};
use thiserror::Error;

/// How much more is given to Machines that run than this host has.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Overcommit {
    /// Of memory. More than 1 counts on guests that do not use theirs: where they all do, the kernel kills monitors.
    pub memory: f64,
    /// Of processors. More than 1 makes them slower where all are busy.
    pub cpus: f64,
}

impl Default for Overcommit {
    /// Memory that is not there ends Machines; processors that are busy make them slower, by their weights.
    fn default() -> Self {
        Self {
            memory: 1.0,
            cpus: 4.0,
        }
    }
}

/// What there is for Machines that run, and what of it is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Room {
    /// All.
    pub all: Resources,
    /// What Machines that run have.
    pub taken: Resources,
}

/// What a Machine lacks for it to run here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum Lack {
    #[error(
        "this host has no room for it: it needs {needed} MiB of memory, and {free} of {all} are free. Suspend or stop \
         other Machines here, or serve with a higher --memory-overcommit"
    )]
    Memory { needed: u64, free: u64, all: u64 },
    #[error(
        "this host has no room for it: it needs {} processors, and {} of {} are free. Suspend or stop other Machines \
         here, or serve with a higher --cpu-overcommit",
        processors(*.needed), processors(*.free), processors(*.all)
    )]
    Processors { needed: u64, free: u64, all: u64 },
}

/// What is taken of a host.
#[derive(Debug)]
pub(crate) struct Capacity {
    all: Resources,
    taken: Mutex<Resources>,
}

/// What one Machine has taken, until this is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    capacity: Arc<Capacity>,
    of: Resources,
}

impl Capacity {
    /// All that a host with so much memory and so many processors has for Machines.
    pub(crate) fn new(memory_mib: u64, cpus: u64, overcommit: Overcommit) -> Arc<Self> {
        let kept = (memory_mib / KEPT_SHARE).max(KEPT_MIB);
        let times = |count: u64, factor: f64| (count as f64 * factor) as u64;
        let all = Resources {
            memory_mib: times(memory_mib.saturating_sub(kept), overcommit.memory),
            cpu_sixteenths: times(cpus * SIXTEENTHS, overcommit.cpus),
        };
        Arc::new(Self {
            all,
            taken: Mutex::default(),
        })
    }

    /// The same for this host.
    pub(crate) fn of_this_host(overcommit: Overcommit) -> std::io::Result<Arc<Self>> {
        let memory = std::fs::read_to_string("/proc/meminfo")?;
        let memory = total_mib(&memory).ok_or_else(|| {
            std::io::Error::other("/proc/meminfo does not say how much memory there is")
        })?;
        let cpus = std::thread::available_parallelism()?.get();
        Ok(Self::new(memory, cpus as u64, overcommit))
    }

    /// Takes what a Machine needs to run, if that is there.
    pub(crate) fn take(self: &Arc<Self>, guest: &Guest) -> Result<Share, Lack> {
        let of = guest.needs(self.all);
        let mut taken = self.taken.lock();
        let free = |all: u64, taken: u64| all.saturating_sub(taken);
        let free_memory = free(self.all.memory_mib, taken.memory_mib);
        if of.memory_mib > free_memory {
            return Err(Lack::Memory {
                needed: of.memory_mib,
                free: free_memory,
                all: self.all.memory_mib,
            });
        }
        let free_cpus = free(self.all.cpu_sixteenths, taken.cpu_sixteenths);
        if of.cpu_sixteenths > free_cpus {
            return Err(Lack::Processors {
                needed: of.cpu_sixteenths,
                free: free_cpus,
                all: self.all.cpu_sixteenths,
            });
        }
        taken.add(of);
        drop(taken);
        Ok(self.share(of))
    }

    /// Takes it for a Machine that runs already, whether it is there or not.
    pub(crate) fn hold(self: &Arc<Self>, guest: &Guest) -> Share {
        let of = guest.needs_anywhere();
        self.taken.lock().add(of);
        self.share(of)
    }

    pub(crate) fn room(&self) -> Room {
        Room {
            all: self.all,
            taken: *self.taken.lock(),
        }
    }

    fn share(self: &Arc<Self>, of: Resources) -> Share {
        Share {
            capacity: Arc::clone(self),
            of,
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut taken = self.capacity.taken.lock();
        taken.memory_mib -= self.of.memory_mib;
        taken.cpu_sixteenths -= self.of.cpu_sixteenths;
    }
}

/// `MemTotal` of `/proc/meminfo` (proc_meminfo(5)).
fn total_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib >> 10)
}

fn processors(sixteenths: u64) -> f64 {
    sixteenths as f64 / SIXTEENTHS as f64
}

/// The host keeps one in so many parts of its memory for its kernel and for `tern serve`,
const KEPT_SHARE: u64 = 20;
/// and at least this.
const KEPT_MIB: u64 = 256;

#[cfg(test)]
mod tests {
    use super::*;

    const EXACT: Overcommit = Overcommit {
        memory: 1.0,
        cpus: 1.0,
    };

    fn guest(kind: &str, cpus: u8, memory_mb: u32) -> Guest {
        Guest {
            cpu_kind: kind.to_owned(),
            cpus,
            memory_mb,
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_it_lacks() {
        let capacity = Capacity::new(1024, 2, EXACT);
        assert_eq!(capacity.room().all.memory_mib, 768);
        let one = capacity.take(&guest("shared", 1, 256)).unwrap();
        let two = capacity.take(&guest("shared", 8, 256)).unwrap();
        let lack = capacity.take(&guest("shared", 1, 256)).unwrap_err();
        let told = lack.to_string();
        assert!(told.contains("needs 288 MiB"), "{told}");
        assert!(told.contains("192 of 768 are free"), "{told}");
        // One that sleeps takes nothing.
        drop(one);
        let three = capacity.take(&guest("shared", 1, 256)).unwrap();
        drop((two, three));
        assert_eq!(capacity.room().taken, Resources::default());
    }

    #[test]
    fn processors_that_are_shared_are_sixteen_to_one() {
        let capacity = Capacity::new(1 << 20, 2, EXACT);
        let own = capacity.take(&guest("performance", 1, 256)).unwrap();
        let shared: Vec<_> = (0..16)
            .map(|_| capacity.take(&guest("shared", 1, 256)).unwrap())
            .collect();
        let lack = capacity.take(&guest("shared", 4, 256)).unwrap_err();
        let told = lack.to_string();
        assert!(
            told.contains("0.25 processors, and 0 of 2 are free"),
            "{told}"
        );
        // What runs already is not asked.
        let held = capacity.hold(&guest("performance", 8, 256));
        assert_eq!(capacity.room().taken.cpu_sixteenths, 16 + 16 + 128);
        drop((own, shared, held));
        let more = Overcommit {
            memory: 1.5,
            cpus: 4.0,
        };
        let capacity = Capacity::new(2048, 2, more);
        assert_eq!(capacity.room().all.memory_mib, 2688);
        capacity.take(&guest("performance", 8, 256)).unwrap();
    }

    #[test]
    fn one_that_wants_more_processors_than_there_are_runs_on_those() {
        let capacity = Capacity::new(1 << 20, 2, EXACT);
        let large = capacity.take(&guest("performance", 8, 256)).unwrap();
        assert!(capacity.take(&guest("shared", 1, 256)).is_err());
        drop(large);
        assert_eq!(capacity.room().taken, Resources::default());
    }

    #[test]
    fn the_hosts_memory_is_read_from_the_kernels_own_words() {
        let text = "MemTotal:       24682984 kB\nMemFree:         4718572 kB\n";
        assert_eq!(total_mib(text), Some(24104));
        assert_eq!(total_mib("MemFree: 1 kB"), None);
    }
}
