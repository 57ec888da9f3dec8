//! Which Machine takes a request. A pure function of what is known.

use tern_catalog::MachineId;

/// A Machine that could take a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The Machine.
    pub id: MachineId,
    /// It runs, as far as is known.
    pub awake: bool,
    /// A request may start it.
    pub autostart: bool,
    /// Requests it has, those that wait for its start included.
    pub in_flight: u32,
    /// Load above which others are preferred.
    pub soft: u32,
    /// Load above which nothing is admitted.
    pub hard: Option<u32>,
}

/// What to do with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// Send it to this Machine.
    Admit(MachineId),
    /// Start this Machine first.
    Wake(MachineId),
    /// All are at their hard limit: wait until one is not.
    Wait,
    /// There is none.
    Nobody,
}

/// Chooses: the least loaded Machine that runs and is under its soft limit; else one that sleeps and may be started, as
/// long as it is under its own, one that others already wait for first; else the least loaded under its hard limit,
/// whether it runs or wakes.
pub fn choose(candidates: &[Candidate]) -> Choice {
    let open =
        |c: &&Candidate| (c.awake || c.autostart) && c.hard.is_none_or(|hard| c.in_flight < hard);
    let all = || candidates.iter().filter(open);
    let chosen = |c: &Candidate| {
        if c.awake {
            Choice::Admit(c.id.clone())
        } else {
            Choice::Wake(c.id.clone())
        }
    };
    let with_room = || all().filter(|c| c.in_flight < c.soft);
    let running = with_room().filter(|c| c.awake);
    if let Some(best) = running.min_by_key(|c| (c.in_flight, c.id.clone())) {
        return chosen(best);
    }
    // The fullest that still has room: a burst starts as few Machines as it needs.
    let asleep = with_room().filter(|c| !c.awake);
    if let Some(best) = asleep.max_by_key(|c| (c.in_flight, std::cmp::Reverse(c.id.clone()))) {
        return chosen(best);
    }
    // A storm is spread over all of them.
    if let Some(best) = all().min_by_key(|c| (c.in_flight, !c.awake, c.id.clone())) {
        return chosen(best);
    }
    if candidates.iter().any(|c| c.awake || c.autostart) {
        Choice::Wait
    } else {
        Choice::Nobody
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn machine(n: u8, awake: bool, in_flight: u32) -> Candidate {
        let id = format!("{n:014x}").parse().unwrap();
        Candidate {
            id,
            awake,
            autostart: true,
            in_flight,
            soft: 2,
            hard: Some(4),
        }
    }

    fn id(n: u8) -> MachineId {
        format!("{n:014x}").parse().unwrap()
    }

    #[test]
    fn the_least_loaded_that_runs_is_preferred() {
        let all = [
            machine(1, true, 1),
            machine(2, true, 0),
            machine(3, false, 0),
        ];
        assert_eq!(choose(&all), Choice::Admit(id(2)));
    }

    #[test]
    fn another_is_started_when_all_are_over_their_soft_limit() {
        let all = [machine(1, true, 2), machine(2, false, 0)];
        assert_eq!(choose(&all), Choice::Wake(id(2)));
    }

    #[test]
    fn a_burst_fills_one_sleeping_machine_before_the_next() {
        let all = [machine(1, false, 0), machine(2, false, 1)];
        assert_eq!(choose(&all), Choice::Wake(id(2)));
        let all = [machine(1, false, 0), machine(2, false, 2)];
        assert_eq!(choose(&all), Choice::Wake(id(1)));
    }

    #[test]
    fn between_soft_and_hard_limit_it_is_still_admitted() {
        let mut asleep = machine(2, false, 0);
        asleep.autostart = false;
        assert_eq!(
            choose(&[machine(1, true, 3), asleep.clone()]),
            Choice::Admit(id(1))
        );
        assert_eq!(choose(&[machine(1, true, 4), asleep.clone()]), Choice::Wait);
        assert_eq!(choose(&[asleep]), Choice::Nobody);
        assert_eq!(choose(&[]), Choice::Nobody);
    }

    #[test]
    fn a_storm_on_sleeping_machines_wakes_what_soft_limits_call_for_and_is_spread_evenly() {
        let mut all: Vec<Candidate> = (1..=5).map(|n| machine(n, false, 0)).collect();
        for candidate in &mut all {
            (candidate.soft, candidate.hard) = (20, None);
        }
        for request in 0..10_000 {
            let Choice::Wake(id) = choose(&all) else {
                panic!("all may be started");
            };
            let one = all.iter_mut().find(|c| c.id == id).unwrap();
            one.in_flight += 1;
            let woken = all.iter().filter(|c| c.in_flight > 0).count();
            assert_eq!(woken, (request / 20 + 1).min(5));
        }
        assert!(all.iter().all(|c| c.in_flight == 2000), "{all:?}");
    }

    #[test]
    fn a_running_machine_with_room_is_not_passed_over_for_one_that_others_wait_for() {
        let all = [machine(1, true, 3), machine(2, false, 3)];
        assert_eq!(choose(&all), Choice::Admit(id(1)));
        let all = [machine(1, true, 3), machine(2, false, 2)];
        assert_eq!(choose(&all), Choice::Wake(id(2)));
    }

    proptest! {
        /// Never above a hard limit, never starts what may not be started, never waits in vain.
        #[test]
        fn keeps_its_promises(all in prop::collection::vec((any::<bool>(), any::<bool>(), 0u32..6, 0u32..4, prop::option::of(1u32..6)), 0..6)) {
            let all: Vec<Candidate> = all.into_iter().enumerate().map(|(n, (awake, autostart, in_flight, soft, hard))| {
                Candidate { id: id(n as u8), awake, autostart, in_flight, soft, hard }
            }).collect();
            let find = |id: &MachineId| all.iter().find(|c| c.id == *id).unwrap();
            let open = |c: &Candidate| c.hard.is_none_or(|h| c.in_flight < h);
            match choose(&all) {
                Choice::Admit(id) => prop_assert!(find(&id).awake && open(find(&id))),
                Choice::Wake(id) => prop_assert!(!find(&id).awake && find(&id).autostart && open(find(&id))),
                Choice::Wait => prop_assert!(all.iter().all(|c| !open(c) || (!c.awake && !c.autostart))),
                Choice::Nobody => prop_assert!(all.iter().all(|c| !c.awake && !c.autostart)),
            }
        }
    }
}
