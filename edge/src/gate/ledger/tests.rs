//! What the ledger does, case by case.

use std::net::Ipv6Addr;

use jiff::Timestamp;
use tern_catalog::ServiceProtocol;

use super::choose::PATIENCE;
use super::*;

/// The service of all tests.
const PORT: Port = Port {
    number: 8080,
    protocol: ServiceProtocol::Tcp,
};

/// A ledger, its clock, and what it has asked for.
struct Desk {
    ledger: Ledger<u32>,
    begun: Instant,
    now: Now,
    starts: Vec<Start>,
    granted: Vec<(u32, Grant)>,
    refused: Vec<(u32, Refused)>,
    alarms: Vec<Instant>,
    came: u32,
}

fn id(n: usize) -> MachineId {
    format!("{n:014x}").parse().unwrap()
}

/// As the catalog would have it: soft limit 2, hard limit 4, to be started by requests.
fn facts(state: MachineState) -> Facts {
    Facts {
        address: Ipv6Addr::LOCALHOST,
        instance: "1".into(),
        eligible: true,
        seen: Some((state, Timestamp::UNIX_EPOCH)),
        offers: vec![Offer {
            port: PORT,
            autostart: true,
            soft: 2,
            hard: 4,
        }],
    }
}

fn error(text: &str) -> StartError {
    StartError { text: text.into() }
}

impl Desk {
    fn new(machines: &[Facts]) -> Self {
        let begun = Instant::now();
        let mut desk = Self {
            ledger: Ledger::new(),
            begun,
            now: Now {
                at: begun,
                wall: "2026-01-01T00:00:00Z".parse().unwrap(),
            },
            starts: Vec::new(),
            granted: Vec::new(),
            refused: Vec::new(),
            alarms: Vec::new(),
            came: 0,
        };
        for (n, facts) in machines.iter().enumerate() {
            desk.ledger.sync(&id(n), facts.clone(), desk.now);
        }
        desk
    }

    fn running(count: usize) -> Self {
        Self::new(&vec![facts(MachineState::Started); count])
    }

    fn asleep(count: usize) -> Self {
        Self::new(&vec![facts(MachineState::Suspended); count])
    }

    fn pass(&mut self, time: Duration) {
        self.now.at += time;
        self.now.wall += time;
    }

    fn done(&mut self, acts: Vec<Act<u32>>) {
        for act in acts {
            match act {
                Act::Grant(who, grant) => self.granted.push((who, grant)),
                Act::Refuse(who, why) => self.refused.push((who, why)),
                Act::Start(start) => self.starts.push(start),
                Act::Alarm(at) => self.alarms.push(at),
                Act::SeenOff => {}
            }
        }
    }

    /// A request comes, a nanosecond after whatever was before it.
    fn arrive(&mut self) -> Option<Ticket> {
        self.pass(Duration::from_nanos(1));
        self.came += 1;
        let (who, mut acts) = (self.came, Vec::new());
        let arrival = self.ledger.arrive(PORT, self.now, true, || who, &mut acts);
        self.done(acts);
        match arrival {
            Arrival::Granted(grant) => self.granted.push((who, grant)),
            Arrival::Refused(why) => self.refused.push((who, why)),
            Arrival::Waits(ticket) => return Some(ticket),
        }
        None
    }

    fn end(&mut self) {
        let (_, grant) = self.granted.remove(0);
        self.give_back(&grant);
    }

    fn give_back(&mut self, grant: &Grant) {
        let mut acts = Vec::new();
        self.ledger
            .end(grant.slot, grant.epoch, grant.port, self.now, &mut acts);
        self.done(acts);
    }

    fn doubt(&mut self, grant: &Grant) {
        let mut acts = Vec::new();
        let (slot, epoch) = (grant.slot, grant.epoch);
        self.ledger
            .doubt(slot, epoch, grant.port, true, self.now, &mut acts);
        self.done(acts);
    }

    /// The first start that was asked for ends.
    fn started(&mut self, outcome: Result<(), StartError>) {
        let start = self.starts.remove(0);
        let mut acts = Vec::new();
        let outcome = outcome.map(|()| (start.port, start.address));
        let outcome = outcome.map_err(|why| NotStarted {
            why,
            by_itself: true,
        });
        self.ledger.started(&start, outcome, self.now, &mut acts);
        self.done(acts);
    }

    fn tick(&mut self) {
        let mut acts = Vec::new();
        self.ledger.tick(self.now, &mut acts);
        self.done(acts);
    }

    /// The Machine of each place given, by its number.
    fn places(&self) -> Vec<usize> {
        self.granted.iter().map(|(_, g)| g.slot.0).collect()
    }

    fn who(&self) -> Vec<u32> {
        self.granted.iter().map(|(who, _)| *who).collect()
    }

    fn woken(&self) -> Vec<usize> {
        self.starts.iter().map(|s| s.slot.0).collect()
    }

    fn load(&self) -> Vec<u32> {
        let members = self.ledger.members.iter().flatten();
        members.map(|m| m.in_flight).collect()
    }
}

#[test]
fn the_least_loaded_that_runs_is_preferred() {
    let mut desk = Desk::running(3);
    for _ in 0..6 {
        desk.arrive();
    }
    assert_eq!(desk.places(), [0, 1, 2, 0, 1, 2]);
}

#[test]
fn a_thousand_requests_cause_one_start_where_one_is_enough() {
    let mut sleeper = facts(MachineState::Suspended);
    (sleeper.offers[0].soft, sleeper.offers[0].hard) = (1000, 1000);
    let mut desk = Desk::new(&[sleeper.clone(), sleeper]);
    for _ in 0..1000 {
        assert!(desk.arrive().is_some());
    }
    assert_eq!(desk.woken(), [0]);
    desk.started(Ok(()));
    assert_eq!(desk.granted.len(), 1000);
    assert!(desk.who().is_sorted(), "first in, first out");
}

#[test]
fn above_soft_limits_another_is_woken_and_nobody_waits_for_it_who_need_not() {
    let mut desk = Desk::new(&[
        facts(MachineState::Started),
        facts(MachineState::Suspended),
        facts(MachineState::Suspended),
    ]);
    for _ in 0..2 {
        desk.arrive();
    }
    assert!(desk.woken().is_empty());
    // The third and fourth go to the one that runs, up to twice its soft limit, while another is woken.
    for _ in 0..2 {
        assert_eq!(desk.arrive(), None);
    }
    assert_eq!((desk.places(), desk.woken()), (vec![0; 4], vec![1]));
    // It is full: the next waits, and for it a third is woken.
    assert!(desk.arrive().is_some());
    assert_eq!(desk.woken(), [1, 2]);
    desk.started(Ok(()));
    assert_eq!(desk.places(), [0, 0, 0, 0, 1]);
}

#[test]
fn what_lies_in_memory_is_woken_before_what_must_boot() {
    let mut desk = Desk::new(&[facts(MachineState::Stopped), facts(MachineState::Suspended)]);
    desk.arrive();
    assert_eq!(desk.woken(), [1]);
}

#[test]
fn a_storm_wakes_what_it_needs_and_is_spread_evenly_whoever_is_ready_first() {
    let mut sleeper = facts(MachineState::Suspended);
    (sleeper.offers[0].soft, sleeper.offers[0].hard) = (20, u32::MAX);
    let mut desk = Desk::new(&vec![sleeper; 5]);
    for request in 0..10_000 {
        assert!(desk.arrive().is_some());
        assert_eq!(desk.starts.len(), (request / 20 + 1).min(5));
    }
    for _ in 0..5 {
        desk.pass(Duration::from_millis(300));
        desk.started(Ok(()));
    }
    assert_eq!(desk.load(), [2000; 5]);
    assert!(desk.who().is_sorted());
}

#[test]
fn a_start_that_hangs_is_not_waited_for_while_one_runs() {
    let mut sleeper = facts(MachineState::Suspended);
    (sleeper.offers[0].soft, sleeper.offers[0].hard) = (20, u32::MAX);
    let mut desk = Desk::new(&[sleeper.clone(), sleeper]);
    for _ in 0..100 {
        desk.arrive();
    }
    desk.started(Ok(()));
    assert_eq!(desk.load(), [50, 0]);
    desk.pass(PATIENCE);
    assert!(desk.alarms.iter().any(|at| *at <= desk.now.at));
    desk.tick();
    assert_eq!(desk.load(), [100, 0]);
}

#[test]
fn who_may_ask_soon_wakes_what_lies_in_memory_once_and_nothing_else() {
    let early = |desk: &mut Desk| {
        let mut acts = Vec::new();
        let woken = desk.ledger.early(PORT, desk.now, &mut acts).is_some();
        desk.done(acts);
        woken
    };
    let mut desk = Desk::new(&[facts(MachineState::Stopped), facts(MachineState::Suspended)]);
    assert!(early(&mut desk));
    assert!(!early(&mut desk), "it is on its way");
    assert_eq!(desk.woken(), [1]);
    assert!(desk.ledger.is_wasted(&id(1)));
    // The request finds it waking, and wakes nobody else.
    desk.arrive();
    desk.started(Ok(()));
    assert_eq!((desk.places(), desk.starts.len()), (vec![1], 0));
    assert!(!desk.ledger.is_wasted(&id(1)));
    assert!(!early(&mut desk), "one runs");
    assert!(!early(&mut Desk::running(1)));
    assert!(!early(&mut Desk::new(&[facts(MachineState::Stopped)])));
}

#[test]
fn hard_limits_are_exact_and_turns_are_taken_in_order() {
    let mut desk = Desk::running(1);
    for _ in 0..9 {
        desk.arrive();
    }
    assert_eq!(desk.who(), [1, 2, 3, 4]);
    for next in 5..=9 {
        desk.end();
        assert_eq!(desk.who().last(), Some(&next));
        assert_eq!(desk.load(), [4]);
    }
}

#[test]
fn who_goes_away_frees_its_turn() {
    let mut desk = Desk::running(1);
    let tickets: Vec<_> = (0..7).map(|_| desk.arrive()).collect();
    assert!(desk.ledger.cancel(PORT, tickets[4].unwrap()));
    assert!(!desk.ledger.cancel(PORT, tickets[4].unwrap()));
    desk.end();
    assert_eq!(desk.who(), [2, 3, 4, 6]);
    let refused = desk.ledger.expire(PORT, tickets[6].unwrap());
    assert!(matches!(refused, Some(Refused::AtCapacity)));
    assert_eq!(desk.ledger.waiting(), 0);
}

#[test]
fn a_broken_sleeper_costs_no_refusal_while_another_can_serve() {
    let mut desk = Desk::asleep(2);
    desk.arrive();
    desk.started(Err(error("broken")));
    assert_eq!(desk.woken(), [1], "the other is tried");
    desk.started(Ok(()));
    assert_eq!(desk.places(), [1]);
    // The broken one has its next try only when it is needed.
    desk.arrive();
    assert!(desk.starts.is_empty() && desk.refused.is_empty());
}

#[test]
fn a_start_that_fails_is_told_to_those_that_waited_and_tried_again_for_the_next() {
    let mut desk = Desk::asleep(1);
    desk.arrive();
    desk.arrive();
    desk.started(Err(error("no disk")));
    assert_eq!(desk.refused.len(), 2);
    assert!(matches!(&desk.refused[0].1, Refused::NotStarted(e) if e.text == "no disk"));
    desk.arrive();
    desk.started(Ok(()));
    assert_eq!(desk.who(), [3]);
}

#[test]
fn one_that_fails_again_and_again_is_tried_less_and_less() {
    let mut desk = Desk::asleep(1);
    desk.arrive();
    desk.started(Err(error("no disk")));
    desk.arrive();
    desk.started(Err(error("no disk")));
    // A second's pause is waited for, and no start is made in it.
    assert!(desk.arrive().is_some());
    assert!(desk.starts.is_empty());
    assert_eq!(
        desk.alarms.last(),
        Some(&(desk.now.at - Duration::from_nanos(1) + FIRST))
    );
    desk.pass(FIRST);
    desk.tick();
    desk.started(Err(error("no disk")));
    assert_eq!(desk.refused.len(), 3);
    // The next pauses are 2 s, 4 s …: what is too long to be waited for is told at once, and when it ends.
    desk.pass(Duration::from_secs(2));
    desk.arrive();
    desk.started(Err(error("no disk")));
    assert!(desk.arrive().is_none());
    let (_, why) = desk.refused.last().unwrap();
    assert_eq!(
        why.to_string(),
        "no Machine of the app could be started: no disk; it is tried again in 4 s"
    );
    // Another configuration has nothing to do with it.
    let mut mended = facts(MachineState::Stopped);
    mended.instance = "2".into();
    desk.ledger.sync(&id(0), mended, desk.now);
    desk.arrive();
    assert_eq!(desk.woken(), [0]);
}

const FIRST: Duration = Duration::from_secs(1);

#[test]
fn one_failed_connection_does_not_demote_a_machine_that_answers_others() {
    let mut desk = Desk::running(1);
    desk.arrive();
    let (_, grant) = desk.granted.remove(0);
    let (slot, epoch) = (grant.slot, grant.epoch);
    desk.ledger.reached(slot, epoch, PORT, grant.address);
    desk.doubt(&grant);
    desk.give_back(&grant);
    desk.arrive();
    assert_eq!(desk.places(), [0]);
    assert!(!desk.granted[0].1.proven, "it is looked at again");
    desk.ledger.reached(slot, epoch, PORT, grant.address);
    // Two in a row do, and it is asked to start: if it runs after all, that is told at once.
    let (_, grant) = desk.granted.remove(0);
    desk.doubt(&grant);
    desk.doubt(&grant);
    desk.give_back(&grant);
    assert!(desk.arrive().is_some());
    assert_eq!(desk.woken(), [0]);
}

#[test]
fn one_dead_port_does_not_take_down_the_others() {
    let other = Port {
        number: 5432,
        protocol: ServiceProtocol::Tcp,
    };
    let mut both = facts(MachineState::Started);
    both.offers.push(Offer {
        port: other,
        ..both.offers[0].clone()
    });
    let mut desk = Desk::new(&[both]);
    desk.arrive();
    let (_, grant) = desk.granted.remove(0);
    desk.ledger
        .reached(grant.slot, grant.epoch, PORT, grant.address);
    let mut acts = Vec::new();
    let arrival = desk.ledger.arrive(other, desk.now, true, || 9, &mut acts);
    let Arrival::Granted(dead) = arrival else {
        panic!("it runs");
    };
    for _ in 0..5 {
        desk.doubt(&dead);
    }
    desk.arrive();
    assert_eq!(desk.places(), [0]);
    // Nobody at all answers: that is no port's fault.
    let (slot, epoch) = (dead.slot, dead.epoch);
    desk.ledger
        .doubt(slot, epoch, other, false, desk.now, &mut acts);
    assert!(desk.arrive().is_some());
}

#[test]
fn each_service_has_its_own_limits() {
    let other = Port {
        number: 5432,
        protocol: ServiceProtocol::Tcp,
    };
    let mut both = facts(MachineState::Started);
    both.offers.push(Offer {
        port: other,
        ..both.offers[0].clone()
    });
    let mut desk = Desk::new(&[both]);
    for _ in 0..5 {
        desk.arrive();
    }
    assert_eq!((desk.granted.len(), desk.ledger.waiting()), (4, 1));
    let mut acts = Vec::new();
    let arrival = desk.ledger.arrive(other, desk.now, true, || 9, &mut acts);
    assert!(matches!(arrival, Arrival::Granted(_)));
    assert_eq!(desk.load(), [5]);
}

#[test]
fn one_that_ends_before_it_listens_is_not_waited_for() {
    let mut desk = Desk::asleep(1);
    desk.arrive();
    desk.ledger.runs(&desk.starts[0], desk.now);
    desk.pass(FIRST);
    let mut ended = facts(MachineState::Stopped);
    ended.seen = Some((MachineState::Stopped, desk.now.wall));
    desk.ledger.sync(&id(0), ended, desk.now);
    desk.tick();
    assert!(matches!(&desk.refused[0].1, Refused::NotStarted(e) if e.text.contains("stopped")));
}

#[test]
fn late_starts_are_helped_by_one_more_at_a_time() {
    let mut desk = Desk::asleep(10);
    desk.arrive();
    for more in 1..5 {
        assert_eq!(desk.starts.len(), more);
        desk.pass(PATIENCE);
        desk.tick();
    }
}

#[test]
fn who_leaves_gets_nothing_new_though_it_may_not_be_started() {
    let mut running = facts(MachineState::Started);
    running.offers[0].autostart = false;
    let mut desk = Desk::new(&[running.clone(), running]);
    let mut acts = Vec::new();
    desk.ledger.depart(&id(0), desk.now, &mut acts);
    for _ in 0..3 {
        desk.arrive();
    }
    assert_eq!(desk.places(), [1, 1, 1]);
}

#[test]
fn what_an_earlier_life_did_says_nothing_of_this_one() {
    let mut desk = Desk::running(1);
    desk.arrive();
    let (_, old) = desk.granted.remove(0);
    let mut acts = Vec::new();
    assert!(desk.ledger.depart(&id(0), desk.now, &mut acts));
    assert!(desk.ledger.has_earlier(&id(0)));
    desk.arrive();
    desk.started(Ok(()));
    desk.doubt(&old);
    desk.doubt(&old);
    desk.arrive();
    assert_eq!(desk.places(), [0, 0], "it still counts as running");
    desk.give_back(&old);
    assert!(!desk.ledger.has_earlier(&id(0)));
}

#[test]
fn one_that_may_not_be_started_is_not() {
    let mut asleep = facts(MachineState::Stopped);
    asleep.offers[0].autostart = false;
    let mut desk = Desk::new(&[asleep.clone()]);
    desk.arrive();
    assert!(matches!(desk.refused[..], [(1, Refused::Nobody)]));
    asleep.seen = Some((MachineState::Started, desk.now.wall));
    desk.ledger.sync(&id(0), asleep, desk.now);
    desk.arrive();
    assert_eq!(desk.places(), [0]);
}

#[test]
fn who_waits_hears_of_what_the_catalog_says() {
    let mut desk = Desk::running(1);
    for _ in 0..5 {
        desk.arrive();
    }
    desk.ledger
        .sync(&id(1), facts(MachineState::Started), desk.now);
    desk.tick();
    assert_eq!(desk.places(), [0, 0, 0, 0, 1]);
    desk.arrive();
    // Both are cordoned, and nobody else is there: the seventh is refused; those who have a place keep it.
    for n in 0..2 {
        let mut cordoned = facts(MachineState::Started);
        cordoned.eligible = false;
        desk.ledger.sync(&id(n), cordoned, desk.now);
    }
    desk.tick();
    desk.arrive();
    assert!(matches!(desk.refused[..], [(7, Refused::Nobody)]));
    desk.ledger.forget(&id(0));
    while !desk.granted.is_empty() {
        desk.end();
    }
    desk.ledger.forget(&id(1));
    assert!(desk.ledger.is_empty());
}

#[test]
fn only_the_idle_are_laid_down() {
    let mut desk = Desk::running(1);
    desk.arrive();
    let idle = Duration::from_secs(10);
    desk.pass(idle);
    assert!(
        !desk.ledger.lay_down(&id(0), idle, None, desk.now),
        "it has a request"
    );
    desk.end();
    assert!(!desk.ledger.lay_down(&id(0), idle, None, desk.now));
    desk.pass(idle);
    let lately = Some(desk.now.at - FIRST);
    assert!(!desk.ledger.lay_down(&id(0), idle, lately, desk.now));
    assert!(
        desk.ledger
            .lay_down(&id(0), idle, Some(desk.begun), desk.now)
    );
    assert!(desk.arrive().is_some());
    assert_eq!(desk.woken(), [0]);
}
