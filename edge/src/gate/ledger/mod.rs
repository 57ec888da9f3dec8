//! One app's ledger: which of its Machines run, what each has to do, who waits for a place, and whom to wake.
//!
//! Pure: no clock, no lock, no I/O. Each call is given the time, and says what is to be done as [`Act`]s. Whoever waits
//! does so in a queue per service, first in, first out, and not for one Machine: the first that has room takes the
//! first that waits, so that a start that hangs or fails holds up nobody whom another Machine could serve.
//!
//! ```text
//! arrive ─► granted                a running Machine has room
//!        ├► waits ─► granted       a place came free, a start is done, a Machine was added
//!        │        ├► refused       nobody is left that could have it
//!        │        └► expired, cancelled
//!        └► refused
//! ```
//!
//! Machines under their soft limit are preferred, the least loaded of them. Where all are above it another one is woken,
//! as many as there are too many requests for; meanwhile those that run take up to twice their soft limit, or their
//! even share of a storm, and all that they may once the start has lasted too long.

mod member;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tern_catalog::{MachineId, MachineState, ServiceProtocol};

use super::Refused;
use crate::control::StartError;
use member::{Belief, Member};
pub use member::{Facts, Offer};

/// A start older than this is not waited for while a Machine that runs may take more.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// A pause after failed starts of up to this is waited for; a longer one is told at once.
const SHORT_PAUSE: Duration = Duration::from_secs(2);

/// The time.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// For durations.
    pub at: Instant,
    /// To compare with what hosts say.
    pub wall: Timestamp,
}

/// An app's port, inside its Machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    pub number: u16,
    pub protocol: ServiceProtocol,
}

/// A Machine's place in the ledger, good as long as somebody has a place at the Machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot(usize);

/// One that waits, in the order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

/// A place at a Machine. It is given back by [`Ledger::end`].
#[derive(Debug)]
pub struct Grant {
    pub slot: Slot,
    pub port: Port,
    pub machine: Arc<MachineId>,
    /// Where its app listens, as far as is known.
    pub address: SocketAddr,
    /// The Machine's life: connections are used again only within one.
    pub epoch: u64,
    /// A connection to this address was accepted in this life, and none has failed since.
    pub proven: bool,
}

/// A start to be made.
#[derive(Debug)]
pub struct Start {
    pub slot: Slot,
    /// Tells starts of one Machine apart.
    pub number: u64,
    pub machine: Arc<MachineId>,
    /// Where somebody waits for it to listen.
    pub port: Port,
    pub address: SocketAddr,
    /// The Machine's other ports at which connections may show that it runs.
    pub others: Vec<Port>,
}

/// Why a start failed.
#[derive(Debug)]
pub struct NotStarted {
    pub why: StartError,
    /// It is the Machine's fault, and not what its host or the edge has too little of.
    pub by_itself: bool,
}

/// What is to be done.
#[derive(Debug)]
pub enum Act<W> {
    /// Who waited has a place.
    Grant(W, Grant),
    /// Who waited gets none.
    Refuse(W, Refused),
    /// A Machine is to be started; [`Ledger::started`] is told what came of it, in any case.
    Start(Start),
    /// All requests of the Machine's earlier lives have ended.
    SeenOff,
    /// [`Ledger::tick`] is to be called then.
    Alarm(Instant),
}

/// What becomes of a request when it comes.
pub enum Arrival {
    Granted(Grant),
    Waits(Ticket),
    Refused(Refused),
}

/// The ledger. `W` is how those that wait are told.
pub struct Ledger<W> {
    members: Vec<Option<Member>>,
    queues: Vec<(Port, BTreeMap<Ticket, Waiter<W>>)>,
    alarm: Option<Instant>,
    tickets: u64,
    starts: u64,
}

struct Waiter<W> {
    arrived: Instant,
    tell: W,
}

/// A service's Machines, summed up.
#[derive(Default)]
struct Survey {
    /// The least loaded of those that run and are under their soft limit.
    under_soft: Option<(u32, usize)>,
    /// Requests above soft limits.
    excess: u32,
    /// Places under soft limits, of those that run and those that will soon.
    room: u32,
    /// Requests at those that run or will soon, and how many these are.
    load: u32,
    number: u32,
    /// A start is under way, and not for long.
    starting: bool,
    /// One has lasted too long.
    late: bool,
    /// Somebody runs, or is being started.
    hope: bool,
}

impl<W> Ledger<W> {
    pub fn new() -> Self {
        Self {
            members: Vec::new(),
            queues: Vec::new(),
            alarm: None,
            tickets: 0,
            starts: 0,
        }
    }

    /// A request comes. It is asked how it is to be told only if it waits, which it may not without `may_wait`.
    pub fn arrive(
        &mut self,
        port: Port,
        now: Now,
        may_wait: bool,
        tell: impl FnOnce() -> W,
        acts: &mut Vec<Act<W>>,
    ) -> Arrival {
        let queue = self.queue(port);
        if self.queues[queue].1.is_empty() {
            let survey = self.survey(port, now.at);
            let mut chosen = survey.under_soft.map(|(_, slot)| slot);
            if chosen.is_none() {
                self.wake(port, 1, now.at, now.at, acts);
                chosen = self.choose(port, 1, now.at);
            }
            if let Some(slot) = chosen
                && let Some(grant) = self.grant(slot, port, now.at)
            {
                return Arrival::Granted(grant);
            }
        }
        if !self.hope(port, now.at, now.at) {
            return Arrival::Refused(self.why(port, now.at));
        }
        if !may_wait {
            return Arrival::Refused(Refused::AtCapacity);
        }
        // It is what an early wake was for.
        for member in self.members.iter_mut().flatten() {
            if member.is_waking() && member.offer(port).is_some() {
                member.early = false;
            }
        }
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        let waiter = Waiter {
            arrived: now.at,
            tell: tell(),
        };
        self.queues[queue].1.insert(ticket, waiter);
        self.settle(queue, now.at, acts);
        self.set_alarm(now.at, acts);
        Arrival::Waits(ticket)
    }

    /// A request may come soon: where it would have to wait for a Machine that lies in memory, that one is woken now. One
    /// that must boot is not. Whose start it is, for [`Ledger::is_wasted`].
    pub fn early(
        &mut self,
        port: Port,
        now: Now,
        acts: &mut Vec<Act<W>>,
    ) -> Option<Arc<MachineId>> {
        if self.survey(port, now.at).hope {
            return None;
        }
        let found = self.offers(port).find(|(_, member, offer)| {
            let rests = member.rests_until(now.at);
            member.may_start(offer)
                && member.state() == Some(MachineState::Suspended)
                && rests.is_some_and(|at| at <= now.at)
        });
        let slot = found.map(|(slot, ..)| slot)?;
        let start = self.start(slot, port, now.at)?;
        let machine = Arc::clone(&start.machine);
        if let Some(member) = self.member(start.slot) {
            member.early = true;
        }
        acts.push(Act::Start(start));
        Some(machine)
    }

    /// Whether a Machine was woken early, and nobody has asked for it since.
    pub fn is_wasted(&self, id: &MachineId) -> bool {
        let slot = self.position(id);
        let member = slot.and_then(|s| self.members[s.0].as_ref());
        member.is_some_and(|m| m.early)
    }

    /// Who waits goes away. Whether it still waited.
    pub fn cancel(&mut self, port: Port, ticket: Ticket) -> bool {
        let queue = self.queue(port);
        self.queues[queue].1.remove(&ticket).is_some()
    }

    /// Who waits has no time left: why it gets no place, if it still waits.
    pub fn expire(&mut self, port: Port, ticket: Ticket) -> Option<Refused> {
        if !self.cancel(port, ticket) {
            return None;
        }
        let starts = self.offers(port).any(|(_, m, _)| m.is_waking());
        Some(if starts {
            let text = "it takes too long".to_owned();
            Refused::NotStarted(StartError { text })
        } else {
            Refused::AtCapacity
        })
    }

    /// A place is given back.
    pub fn end(&mut self, slot: Slot, epoch: u64, port: Port, now: Now, acts: &mut Vec<Act<W>>) {
        let Some(member) = self.member(slot) else {
            return;
        };
        member.give_back(port);
        member.last_active = now.at;
        if epoch < member.epoch && member.earlier > 0 {
            member.earlier -= 1;
            if member.earlier == 0 {
                acts.push(Act::SeenOff);
            }
        }
        self.sweep(slot);
        self.settle_all(now.at, acts);
    }

    /// Whether a Machine still lives the life in which a place was given.
    pub fn is_current(&self, slot: Slot, epoch: u64) -> bool {
        let member = self.members.get(slot.0).and_then(Option::as_ref);
        member.is_some_and(|m| m.epoch == epoch && m.may_live())
    }

    /// A connection to a Machine was accepted.
    pub fn reached(&mut self, slot: Slot, epoch: u64, port: Port, address: SocketAddr) {
        if let Some(member) = self.member(slot)
            && member.epoch == epoch
        {
            member.prove(port, address);
        }
    }

    /// A connection to a Machine failed: it was `refused`, or nobody answered. It is not believed to run any more when this
    /// port never took one in this life, or the next one fails too; but not where it refuses, and another port takes them.
    pub fn doubt(
        &mut self,
        slot: Slot,
        epoch: u64,
        port: Port,
        refused: bool,
        now: Now,
        acts: &mut Vec<Act<W>>,
    ) {
        let Some(member) = self.member(slot) else {
            return;
        };
        // What an earlier life did says nothing of this one.
        if member.epoch != epoch || member.is_waking() {
            return;
        }
        if member.doubt(port, refused) {
            member.belief = Belief::Asleep { since: now.wall };
            self.settle_all(now.at, acts);
        }
    }

    /// The Machine's host says that it runs; its app may not listen yet. Should it end before, the catalog tells.
    pub fn runs(&mut self, start: &Start, now: Now) {
        if let Some(member) = self.member(start.slot)
            && let Belief::Waking {
                number, runs_since, ..
            } = &mut member.belief
            && *number == start.number
        {
            *runs_since = Some(now.wall);
        }
    }

    /// What came of a start: at which port the app accepts connections, and where.
    pub fn started(
        &mut self,
        start: &Start,
        outcome: Result<(Port, SocketAddr), NotStarted>,
        now: Now,
        acts: &mut Vec<Act<W>>,
    ) {
        let slot = start.slot;
        let Some(member) = self.member(slot) else {
            return;
        };
        if !matches!(member.belief, Belief::Waking { number, .. } if number == start.number) {
            return;
        }
        member.last_active = now.at;
        match outcome {
            Ok((port, address)) => {
                member.ready(now.wall);
                member.prove(port, address);
            }
            Err(NotStarted { why, by_itself }) => member.failed(why, by_itself, now),
        }
        self.sweep(slot);
        self.settle_all(now.at, acts);
    }

    /// What the catalog says of a Machine, whenever that has changed. [`Ledger::tick`] is due after all changes.
    pub fn sync(&mut self, id: &MachineId, facts: Facts, now: Now) {
        if let Some(member) = self.find(id) {
            member.learn(facts, now);
            return;
        }
        let member = Some(Member::new(id, facts, now.at));
        match self.members.iter().position(Option::is_none) {
            Some(free) => self.members[free] = member,
            None => self.members.push(member),
        }
    }

    /// A Machine is no more.
    pub fn forget(&mut self, id: &MachineId) {
        let Some(slot) = self.position(id) else {
            return;
        };
        if let Some(member) = self.member(slot) {
            member.facts = None;
        }
        self.sweep(slot);
    }

    /// Looks again at everybody who waits.
    pub fn tick(&mut self, now: Now, acts: &mut Vec<Act<W>>) {
        if self.alarm.is_some_and(|at| at <= now.at) {
            self.alarm = None;
        }
        self.settle_all(now.at, acts);
    }

    /// Whether the Machine is believed to run, and how many requests it has.
    pub fn load(&self, id: &MachineId) -> (bool, u32) {
        let slot = self.position(id);
        let member = slot.and_then(|s| self.members[s.0].as_ref());
        member.map_or((false, 0), |m| (m.may_live(), m.in_flight))
    }

    /// Whether the Machine has been of no use to anybody for `idle`: it is believed asleep from now on, and the next
    /// request waits for its start. `last_use` is by whom the ledger does not see.
    pub fn lay_down(
        &mut self,
        id: &MachineId,
        idle: Duration,
        last_use: Option<Instant>,
        now: Now,
    ) -> bool {
        let Some(member) = self.find(id) else {
            return false;
        };
        let last = last_use.map_or(member.last_active, |at| at.max(member.last_active));
        let quiet = member.in_flight == 0
            && now.at.saturating_duration_since(last) >= idle
            && member.may_live();
        if quiet {
            member.belief = Belief::Asleep { since: now.wall };
            member.leaving = true;
        }
        quiet
    }

    /// Putting it to sleep ended: it sleeps from now on, or is not known to.
    pub fn laid_down(&mut self, id: &MachineId, sleeps: bool, now: Now, acts: &mut Vec<Act<W>>) {
        if let Some(member) = self.find(id)
            && matches!(member.belief, Belief::Asleep { .. })
        {
            member.last_active = now.at;
            member.leaving = sleeps;
            member.belief = if sleeps {
                Belief::Asleep { since: now.wall }
            } else {
                Belief::Unknown
            };
            self.settle_all(now.at, acts);
        }
    }

    /// Somebody is about to put the Machine to sleep: who comes now waits for its next start. [`Act::SeenOff`] follows
    /// when it has requests that have to end first, which this tells.
    pub fn depart(&mut self, id: &MachineId, now: Now, acts: &mut Vec<Act<W>>) -> bool {
        let Some(member) = self.find(id) else {
            return false;
        };
        // Its requests wait for a start, and that may wait for this.
        if member.is_waking() {
            return false;
        }
        member.belief = Belief::Asleep { since: now.wall };
        member.leaving = true;
        member.epoch += 1;
        member.earlier = member.in_flight;
        let busy = member.earlier > 0;
        self.settle_all(now.at, acts);
        busy
    }

    /// Whether it has requests of earlier lives.
    pub fn has_earlier(&self, id: &MachineId) -> bool {
        let slot = self.position(id);
        let member = slot.and_then(|s| self.members[s.0].as_ref());
        member.is_some_and(|m| m.earlier > 0)
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.queues.iter().map(|(_, queue)| queue.len()).sum()
    }

    /// Nobody is known, and nobody waits.
    pub fn is_empty(&self) -> bool {
        self.members.iter().all(Option::is_none) && self.waiting() == 0
    }

    fn member(&mut self, slot: Slot) -> Option<&mut Member> {
        self.members.get_mut(slot.0)?.as_mut()
    }

    fn position(&self, id: &MachineId) -> Option<Slot> {
        let mut members = self.members.iter();
        members
            .position(|m| m.as_ref().is_some_and(|m| *m.id == *id))
            .map(Slot)
    }

    fn find(&mut self, id: &MachineId) -> Option<&mut Member> {
        let slot = self.position(id)?;
        self.member(slot)
    }

    /// Frees the slot of one that is no more, once nobody refers to it.
    fn sweep(&mut self, slot: Slot) {
        if let Some(place) = self.members.get_mut(slot.0)
            && place.as_ref().is_some_and(Member::is_over)
        {
            *place = None;
        }
    }

    fn queue(&mut self, port: Port) -> usize {
        if let Some(found) = self.queues.iter().position(|(p, _)| *p == port) {
            return found;
        }
        self.queues.push((port, BTreeMap::new()));
        self.queues.len() - 1
    }

    /// Those that may serve a port.
    fn offers(&self, port: Port) -> impl Iterator<Item = (usize, &Member, &Offer)> {
        let members = self.members.iter().enumerate();
        members.filter_map(move |(slot, m)| {
            let member = m.as_ref()?;
            Some((slot, member, member.offer(port)?))
        })
    }

    fn survey(&self, port: Port, now: Instant) -> Survey {
        let mut survey = Survey::default();
        for (slot, member, offer) in self.offers(port) {
            let runs = member.runs(offer);
            let begun = member.starting_since();
            let starting = begun.is_some_and(|at| at + PATIENCE > now);
            let load = member.load(port);
            survey.hope |= runs || begun.is_some();
            survey.late |= begun.is_some() && !starting;
            if runs || begun.is_some() {
                let room = offer.soft.saturating_sub(load);
                survey.room = survey.room.saturating_add(room);
            }
            if !runs && !starting {
                continue;
            }
            survey.starting |= starting;
            survey.number += 1;
            survey.load += load;
            if runs {
                survey.excess += load.saturating_sub(offer.soft);
                let rank = (load, slot);
                if load < offer.soft && survey.under_soft.is_none_or(|b| rank < b) {
                    survey.under_soft = Some(rank);
                }
            }
        }
        survey
    }

    /// The Machine that takes the next of those that wait, if one may.
    fn choose(&self, port: Port, waiting: u32, now: Instant) -> Option<usize> {
        let survey = self.survey(port, now);
        if let Some((_, slot)) = survey.under_soft {
            return Some(slot);
        }
        let share = (survey.load + waiting).div_ceil(survey.number.max(1));
        let able = self.offers(port).filter(|(_, member, offer)| {
            let most = if survey.starting {
                share.max(offer.soft.saturating_mul(2))
            } else {
                u32::MAX
            };
            member.runs(offer) && member.load(port) < most.min(offer.hard)
        });
        able.map(|(slot, member, _)| (member.load(port), slot))
            .min()
            .map(|(_, slot)| slot)
    }

    /// Starts as many as there are too many requests for, and where starts have lasted too long one more at a time. Those
    /// that failed since the last request came are not tried for it again.
    fn wake(
        &mut self,
        port: Port,
        waiting: u32,
        newest: Instant,
        now: Instant,
        acts: &mut Vec<Act<W>>,
    ) {
        let survey = self.survey(port, now);
        let need = waiting.saturating_add(survey.excess);
        let mut room = survey.room;
        let mut one_more = survey.late && !survey.starting && survey.under_soft.is_none();
        while need > room || one_more {
            let able = self.offers(port).filter(|(_, member, offer)| {
                member.may_start(offer) && member.rests_until(newest).is_some_and(|at| at <= now)
            });
            // What lies in memory runs sooner than what must boot.
            let first = able.min_by_key(|(slot, member, _)| {
                (member.state() != Some(MachineState::Suspended), *slot)
            });
            let Some((slot, _, offer)) = first else {
                return;
            };
            room = room.saturating_add(offer.soft);
            one_more = false;
            let Some(start) = self.start(slot, port, now) else {
                return;
            };
            acts.push(Act::Start(start));
        }
    }

    fn start(&mut self, slot: usize, port: Port, now: Instant) -> Option<Start> {
        let member = self.members.get_mut(slot)?.as_mut()?;
        let address = member.private(port)?;
        self.starts += 1;
        let number = self.starts;
        member.belief = Belief::Waking {
            number,
            begun: now,
            runs_since: None,
        };
        member.early = false;
        let others = member.tcp_ports().filter(|other| *other != port);
        let others = others.collect();
        Some(Start {
            slot: Slot(slot),
            number,
            machine: Arc::clone(&member.id),
            port,
            address,
            others,
        })
    }

    fn grant(&mut self, slot: usize, port: Port, now: Instant) -> Option<Grant> {
        let member = self.members.get_mut(slot)?.as_mut()?;
        let address = member.address(port)?;
        member.take(port);
        member.last_active = now;
        member.early = false;
        Some(Grant {
            slot: Slot(slot),
            port,
            machine: Arc::clone(&member.id),
            address,
            epoch: member.epoch,
            proven: member.is_proven(port),
        })
    }

    /// Whether one that came then may still have a place.
    fn hope(&self, port: Port, arrived: Instant, now: Instant) -> bool {
        self.survey(port, now).hope
            || self.offers(port).any(|(_, member, offer)| {
                let rests = member.rests_until(arrived);
                member.may_start(offer) && rests.is_some_and(|at| at <= now + SHORT_PAUSE)
            })
    }

    /// Why nobody could have a place.
    fn why(&self, port: Port, now: Instant) -> Refused {
        let failed = self
            .offers(port)
            .filter_map(|(_, member, _)| member.failure());
        // The last one's reason.
        let Some(failure) = failed.max_by_key(|f| f.at) else {
            return Refused::Nobody;
        };
        let pause = failure.retry_at.saturating_duration_since(now);
        let mut text = failure.why.text.clone();
        if !pause.is_zero() {
            text = format!("{text}; it is tried again in {} s", pause.as_secs() + 1);
        }
        Refused::NotStarted(StartError { text })
    }

    fn settle_all(&mut self, now: Instant, acts: &mut Vec<Act<W>>) {
        if self.queues.iter().all(|(_, queue)| queue.is_empty()) {
            return;
        }
        for queue in 0..self.queues.len() {
            self.settle(queue, now, acts);
        }
        self.set_alarm(now, acts);
    }

    /// Gives places to those that wait, wakes whom they need, and refuses those whom nobody can serve.
    fn settle(&mut self, queue: usize, now: Instant, acts: &mut Vec<Act<W>>) {
        let port = self.queues[queue].0;
        loop {
            let waiters = &self.queues[queue].1;
            let Some((_, newest)) = waiters.last_key_value() else {
                return;
            };
            let (waiting, newest) = (waiters.len() as u32, newest.arrived);
            self.wake(port, waiting, newest, now, acts);
            let Some(slot) = self.choose(port, waiting, now) else {
                break;
            };
            let Some(grant) = self.grant(slot, port, now) else {
                break;
            };
            if let Some((_, waiter)) = self.queues[queue].1.pop_first() {
                acts.push(Act::Grant(waiter.tell, grant));
            }
        }
        while let Some((_, first)) = self.queues[queue].1.first_key_value()
            && !self.hope(port, first.arrived, now)
        {
            let why = self.why(port, now);
            if let Some((_, waiter)) = self.queues[queue].1.pop_first() {
                acts.push(Act::Refuse(waiter.tell, why));
            }
        }
    }

    /// Asks to be called when a start has lasted too long, or a pause is over.
    fn set_alarm(&mut self, now: Instant, acts: &mut Vec<Act<W>>) {
        let waited = self.queues.iter().filter(|(_, queue)| !queue.is_empty());
        let due = waited
            .flat_map(|(port, _)| self.offers(*port))
            .flat_map(|(_, member, _)| member.due())
            .filter(|at| *at > now)
            .min();
        if let Some(due) = due
            && self.alarm.is_none_or(|at| due < at)
        {
            self.alarm = Some(due);
            acts.push(Act::Alarm(due));
        }
    }
}
