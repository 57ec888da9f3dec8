//! Which host a new Machine or volume goes to.
//!
//! [`choose`] is a pure function of what is wanted and of what the catalog says of hosts. A host can take it when it is
//! alive, not cordoned, of the region, the volume's if there is one, and large enough; for a Machine that is to run at
//! once its memory and processors must be free as well, counted as the host's agent counts them. Of those that can,
//! the one with the fewest of the same app is taken, then the one whose memory is given to the fewest, then
//! the lowest number. Where none can, each says what it lacks.

use std::collections::BTreeSet;
use std::fmt;

use jiff::Timestamp;
use tern_catalog::{
    AppName, Compare, DesiredState, Guest, Host, HostId, Machine, MachineStatus, Record as _,
    Resources, Snapshot, VolumeId,
};

use super::shape;
use crate::error::ApiError;
use crate::server::Shared;

/// What is to be placed.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    /// Its app: what of it is where counts.
    pub app: &'a AppName,
    /// Where. Where there is but one region, that stands for any: files that were written for another cloud name that
    /// one's.
    pub region: &'a str,
    /// Its size, if it is a Machine.
    pub guest: Option<&'a Guest>,
    /// Whether it runs at once.
    pub starts: bool,
    /// The volume that ties it to a host.
    pub volume: Option<(&'a VolumeId, HostId)>,
    /// The only host whose registry has its image.
    pub image_on: Option<HostId>,
}

/// A host as placement sees it.
#[derive(Debug, Clone)]
pub struct Candidate<'a> {
    /// The host.
    pub host: &'a Host,
    /// `Err` where it is not there: since when, if that is known.
    pub alive: Result<(), Option<Timestamp>>,
    /// It gets nothing new.
    pub cordoned: bool,
    /// What it has for Machines that run; nothing where it has not said.
    pub all: Resources,
    /// What Machines have that run there, or are about to.
    pub taken: Resources,
    /// Memory of all Machines there, also of those that sleep.
    pub given_mib: u64,
    /// How many Machines and volumes of the app are there.
    pub of_app: usize,
}

/// What a host lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lack {
    /// It is in another region.
    Region,
    /// It is not there.
    Unreachable(Option<Timestamp>),
    /// It gets nothing new.
    Cordoned,
    /// The image was pushed to another host's registry.
    Image(HostId),
    /// It has less memory than that, whatever runs.
    Size {
        /// MiB.
        needed: u64,
        /// MiB.
        all: u64,
    },
    /// Memory, now.
    Memory {
        /// MiB.
        needed: u64,
        /// MiB.
        free: u64,
        /// MiB.
        all: u64,
    },
    /// Processors, now; in sixteenths.
    Processors {
        /// Sixteenths.
        needed: u64,
        /// Sixteenths.
        free: u64,
    },
}

/// The host to place it on, or what each that was asked lacks.
pub fn choose(
    wanted: &Wanted<'_>,
    candidates: &[Candidate<'_>],
) -> Result<HostId, Vec<(HostId, Lack)>> {
    let regions: BTreeSet<&str> = candidates.iter().map(|c| c.host.region.as_str()).collect();
    let mut lacks = Vec::new();
    let mut best: Option<((usize, u128, HostId), HostId)> = None;
    for candidate in candidates {
        let id = candidate.host.id;
        let tied = wanted.volume.map(|(_, host)| host);
        if tied.is_some_and(|host| host != id) {
            continue;
        }
        let here = tied.is_some() || regions.len() == 1 || candidate.host.region == wanted.region;
        let lack = match here {
            true => candidate.lack(wanted),
            false => Some(Lack::Region),
        };
        if let Some(lack) = lack {
            lacks.push((id, lack));
            continue;
        }
        let rank = (candidate.of_app, candidate.fill(wanted), id);
        if best.as_ref().is_none_or(|(other, _)| rank < *other) {
            best = Some((rank, id));
        }
    }
    best.map(|(_, id)| id).ok_or(lacks)
}

impl Candidate<'_> {
    fn lack(&self, wanted: &Wanted<'_>) -> Option<Lack> {
        if let Err(since) = self.alive {
            return Some(Lack::Unreachable(since));
        }
        if self.cordoned {
            return Some(Lack::Cordoned);
        }
        if let Some(other) = wanted.image_on.filter(|has| *has != self.host.id) {
            return Some(Lack::Image(other));
        }
        let needed = wanted.guest?.needs(self.all);
        let (all, taken) = (self.all, self.taken);
        if needed.memory_mib > all.memory_mib {
            return Some(Lack::Size {
                needed: needed.memory_mib,
                all: all.memory_mib,
            });
        }
        let free = all.memory_mib.saturating_sub(taken.memory_mib);
        if wanted.starts && needed.memory_mib > free {
            return Some(Lack::Memory {
                needed: needed.memory_mib,
                free,
                all: all.memory_mib,
            });
        }
        let free = all.cpu_sixteenths.saturating_sub(taken.cpu_sixteenths);
        (wanted.starts && needed.cpu_sixteenths > free).then_some(Lack::Processors {
            needed: needed.cpu_sixteenths,
            free,
        })
    }

    /// How much of its memory would be given to Machines, in millionths.
    fn fill(&self, wanted: &Wanted<'_>) -> u128 {
        let more = wanted.guest.map_or(0, |g| u64::from(g.memory_mb));
        u128::from(self.given_mib + more) * 1_000_000 / u128::from(self.all.memory_mib.max(1))
    }
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cpus = |sixteenths: &u64| *sixteenths as f64 / tern_catalog::SIXTEENTHS as f64;
        match self {
            Self::Region => f.write_str("is in another region"),
            Self::Unreachable(Some(since)) => write!(f, "is unreachable since {since:.0}"),
            Self::Unreachable(None) => f.write_str("is unreachable"),
            Self::Cordoned => f.write_str("is cordoned"),
            Self::Image(other) => write!(
                f,
                "has not the image, which was pushed to the registry of host {other}"
            ),
            Self::Size { needed, all } => {
                write!(
                    f,
                    "has {all} MiB of memory for Machines, and it needs {needed}"
                )
            }
            Self::Memory { needed, free, all } => write!(
                f,
                "has {free} of {all} MiB of memory free, and it needs {needed}"
            ),
            Self::Processors { needed, free } => write!(
                f,
                "has {} processors free, and it needs {}",
                cpus(free),
                cpus(needed)
            ),
        }
    }
}

/// All hosts as placement sees them, in order of number.
pub fn candidates<'a>(snapshot: &'a Snapshot, app: &AppName) -> Vec<Candidate<'a>> {
    let candidate = |host: &'a std::sync::Arc<Host>| {
        let status = snapshot.host_status.get(&host.id);
        let alive = match (snapshot.host_alive.contains_key(&host.id), status) {
            // It has not said what it has: one that is just starting.
            (true, Some(_)) => Ok(()),
            (_, status) => Err(status.map(|s| s.seen_at)),
        };
        let all = status.map(|s| s.all).unwrap_or_default();
        let mut seen = Candidate {
            host,
            alive,
            cordoned: snapshot.host_cordons.contains_key(&host.id),
            all,
            taken: Resources::default(),
            given_mib: 0,
            of_app: 0,
        };
        for machine in snapshot.machines.values().filter(|m| m.host == host.id) {
            let status = snapshot.machine_status.get(&machine.id).map(|s| &**s);
            if runs(machine, status) {
                seen.taken.add(machine.config.guest.needs(all));
            }
            seen.given_mib += u64::from(machine.config.guest.memory_mb);
            seen.of_app += usize::from(machine.app == *app);
        }
        let volumes = snapshot.volumes_of(app).filter(|v| v.host == host.id);
        seen.of_app += volumes.count();
        seen
    };
    snapshot.hosts.values().map(candidate).collect()
}

/// Whether a Machine has its share of its host, or is about to take it.
fn runs(machine: &Machine, status: Option<&MachineStatus>) -> bool {
    let going = !matches!(machine.desired.state, DesiredState::Destroyed { .. });
    shape::is_running(shape::state(machine, status))
        && (going || status.is_some_and(|s| shape::is_running(s.state)))
}

/// The host to place it on, or an answer that says what was missing where.
pub fn on<'a>(snapshot: &'a Snapshot, wanted: &Wanted<'_>) -> Result<&'a Host, ApiError> {
    let candidates = candidates(snapshot, wanted.app);
    let lacks = match choose(wanted, &candidates) {
        Ok(id) => {
            let host = candidates.iter().find(|c| c.host.id == id);
            return host
                .map(|c| c.host)
                .ok_or_else(|| ApiError::no_capacity("the host has gone"));
        }
        Err(lacks) => lacks,
    };
    if lacks.iter().all(|(_, lack)| *lack == Lack::Region) && wanted.volume.is_none() {
        let regions: BTreeSet<&str> = candidates.iter().map(|c| c.host.region.as_str()).collect();
        let regions: Vec<&str> = regions.into_iter().collect();
        return Err(ApiError::no_capacity(format!(
            "no host is in region \"{}\"; there is {}",
            wanted.region,
            regions.join(", ")
        )));
    }
    let said = lacks.iter().filter(|(_, lack)| *lack != Lack::Region);
    let said: Vec<String> = said
        .filter_map(|(id, lack)| {
            let host = snapshot.hosts.get(id)?;
            Some(format!("host {id} ({}) {lack}", host.name))
        })
        .collect();
    let place = match wanted.volume {
        Some((volume, host)) => format!("volume {volume} is on host {host}, which cannot take it"),
        None => format!("no host of region \"{}\" can take it", wanted.region),
    };
    Err(ApiError::no_capacity(format!(
        "{place}: {}. Free some of it, uncordon a host, or add one (`tern hosts list`)",
        said.join("; ")
    )))
}

/// What must hold at the moment when something is placed on a host: it is there, and not cordoned. Whoever removes a
/// host cordons it first and looks then, so that one of the two is refused.
pub async fn still_open(shared: &Shared, host: HostId) -> Result<[Compare; 2], ApiError> {
    let found = shared.catalog.get::<Host>(&host.to_string()).await?;
    let (host, revision) =
        found.ok_or_else(|| ApiError::conflict(format!("host {host} was removed; try again")))?;
    let cordon = tern_catalog::HostCordon::key_of(&host.id.to_string());
    Ok([
        Compare {
            key: host.key(),
            revision: Some(revision),
        },
        Compare {
            key: cordon,
            revision: None,
        },
    ])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 32;

    fn host(id: u32, region: &str) -> Host {
        Host {
            id: HostId(id),
            name: format!("h{id}"),
            region: region.into(),
            public_key: String::new(),
            endpoint: "192.0.2.1:1".parse().unwrap(),
            started_at: Timestamp::UNIX_EPOCH,
        }
    }

    fn guest(cpus: u8, memory_mb: u32, kind: &str) -> Guest {
        Guest {
            cpu_kind: kind.into(),
            cpus,
            memory_mb,
        }
    }

    /// What a candidate is made of beside its host.
    #[derive(Debug, Clone)]
    struct Facts {
        region: &'static str,
        alive: bool,
        cordoned: bool,
        all: Resources,
        taken: Resources,
        of_app: usize,
    }

    fn facts() -> impl Strategy<Value = Facts> {
        let resources = || (0..4096u64, 0..64u64);
        let region = prop_oneof![Just("ams"), Just("fra")];
        let flags = (any::<bool>(), prop::bool::weighted(0.3));
        (region, flags, resources(), resources(), 0..3usize).prop_map(
            |(region, (alive, cordoned), all, taken, of_app)| {
                let of = |(memory_mib, cpu_sixteenths)| Resources {
                    memory_mib,
                    cpu_sixteenths,
                };
                Facts {
                    region,
                    alive,
                    cordoned,
                    all: of(all),
                    taken: of(taken),
                    of_app,
                }
            },
        )
    }

    fn with<T>(facts: &[Facts], look: impl FnOnce(&[Candidate<'_>]) -> T) -> T {
        let hosts: Vec<Host> = (1..).zip(facts).map(|(n, f)| host(n, f.region)).collect();
        let candidates: Vec<Candidate<'_>> = hosts
            .iter()
            .zip(facts)
            .map(|(host, f)| Candidate {
                host,
                alive: f.alive.then_some(()).ok_or(None),
                cordoned: f.cordoned,
                all: f.all,
                taken: f.taken,
                given_mib: f.taken.memory_mib,
                of_app: f.of_app,
            })
            .collect();
        look(&candidates)
    }

    /// The rules once more, as plainly as they can be said.
    fn can_take(c: &Candidate<'_>, wanted: &Wanted<'_>, regions: usize) -> bool {
        let there = match wanted.volume {
            Some((_, host)) => c.host.id == host,
            None => regions == 1 || c.host.region == wanted.region,
        };
        let Some(guest) = wanted.guest else {
            return there && c.alive.is_ok() && !c.cordoned;
        };
        let memory = u64::from(guest.memory_mb) + MIB;
        let each = if guest.cpu_kind == "performance" {
            16
        } else {
            1
        };
        let cpus = (u64::from(guest.cpus) * each).min(c.all.cpu_sixteenths);
        let has_image = wanted.image_on.is_none_or(|has| has == c.host.id);
        let fits = has_image && memory <= c.all.memory_mib;
        let free = memory + c.taken.memory_mib <= c.all.memory_mib
            && (cpus == 0 || cpus + c.taken.cpu_sixteenths <= c.all.cpu_sixteenths);
        there && c.alive.is_ok() && !c.cordoned && fits && (!wanted.starts || free)
    }

    proptest! {
        #[test]
        fn who_is_chosen_can_take_it_and_nobody_is_overlooked(
            facts in prop::collection::vec(facts(), 0..6),
            memory in 1..2048u32,
            cpus in 1..8u8,
            own in any::<bool>(),
            starts in any::<bool>(),
            tied in prop::option::weighted(0.2, 1..7u32),
            image_on in prop::option::weighted(0.2, 1..7u32),
        ) {
            let guest = guest(cpus, memory, if own { "performance" } else { "shared" });
            let app: AppName = "shop".parse().unwrap();
            let volume = VolumeId::random();
            let wanted = Wanted {
                app: &app,
                region: "ams",
                guest: Some(&guest),
                starts,
                volume: tied.map(|id| (&volume, HostId(id))),
                image_on: image_on.map(HostId),
            };
            with(&facts, |candidates| {
                let regions: BTreeSet<&str> =
                    candidates.iter().map(|c| c.host.region.as_str()).collect();
                let able: Vec<_> = candidates
                    .iter()
                    .filter(|c| can_take(c, &wanted, regions.len()))
                    .collect();
                let mut turned = candidates.to_vec();
                turned.reverse();
                let chosen = choose(&wanted, candidates);
                prop_assert_eq!(chosen.clone().ok(), choose(&wanted, &turned).ok());
                match chosen {
                    Ok(id) => {
                        let chosen = able.iter().find(|c| c.host.id == id);
                        prop_assert!(chosen.is_some(), "host {} cannot take it", id);
                        let fewest = able.iter().map(|c| c.of_app).min();
                        prop_assert_eq!(chosen.map(|c| c.of_app), fewest);
                    }
                    Err(lacks) => {
                        prop_assert!(able.is_empty(), "{:?} could take it", able);
                        let asked = candidates
                            .iter()
                            .filter(|c| tied.is_none_or(|t| c.host.id == HostId(t)));
                        prop_assert_eq!(lacks.len(), asked.count());
                    }
                }
                Ok(())
            })?;
        }

        #[test]
        fn machines_of_an_app_spread_evenly_over_equal_hosts(hosts in 1..5usize, count in 1..20usize) {
            let room = Resources { memory_mib: 1 << 20, cpu_sixteenths: 1 << 10 };
            let mut facts = vec![
                Facts {
                    region: "ams",
                    alive: true,
                    cordoned: false,
                    all: room,
                    taken: Resources::default(),
                    of_app: 0,
                };
                hosts
            ];
            let (guest, app) = (guest(1, 256, "shared"), "shop".parse().unwrap());
            for _ in 0..count {
                let wanted = Wanted {
                    app: &app,
                    region: "ams",
                    guest: Some(&guest),
                    starts: true,
                    volume: None,
                    image_on: None,
                };
                let id = with(&facts, |candidates| choose(&wanted, candidates)).unwrap();
                let taken = &mut facts[id.0 as usize - 1];
                taken.of_app += 1;
                taken.taken.add(guest.needs(room));
            }
            let most = facts.iter().map(|f| f.of_app).max().unwrap();
            let least = facts.iter().map(|f| f.of_app).min().unwrap();
            prop_assert!(most - least <= 1, "{} and {}", most, least);
        }
    }

    #[test]
    fn what_is_missing_is_said() {
        let said = [
            (Lack::Cordoned, "is cordoned"),
            (Lack::Unreachable(None), "is unreachable"),
            (
                Lack::Memory {
                    needed: 288,
                    free: 192,
                    all: 768,
                },
                "has 192 of 768 MiB of memory free, and it needs 288",
            ),
            (
                Lack::Processors { needed: 4, free: 0 },
                "has 0 processors free, and it needs 0.25",
            ),
        ];
        for (lack, text) in said {
            assert_eq!(lack.to_string(), text);
        }
    }
}
