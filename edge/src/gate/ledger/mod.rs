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

mod acts;
mod choose;
mod member;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tern_catalog::{MachineId, MachineState};

use super::Refused;
use crate::control::StartError;
pub use acts::{Act, Arrival, Grant, NotStarted, Now, Port, Slot, Start, Ticket};
use member::{Belief, Member};
pub use member::{Facts, Offer};

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
