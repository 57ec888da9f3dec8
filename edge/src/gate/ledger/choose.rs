//! Who takes the next request, whom to wake for those that wait, and who waits in vain.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tern_catalog::MachineState;

use super::acts::{Act, Grant, Port, Slot, Start};
use super::member::Belief;
use super::{Ledger, Refused};
use crate::control::StartError;

/// A start older than this is not waited for while a Machine that runs may take more.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// A pause after failed starts of up to this is waited for; a longer one is told at once.
const SHORT_PAUSE: Duration = Duration::from_secs(2);

/// A service's Machines, summed up.
#[derive(Default)]
pub(super) struct Survey {
    /// The least loaded of those that run and are under their soft limit.
    pub(super) under_soft: Option<(u32, usize)>,
    /// Requests above soft limits.
    pub(super) excess: u32,
    /// Places under soft limits, of those that run and those that will soon.
    pub(super) room: u32,
    /// Requests at those that run or will soon, and how many these are.
    pub(super) load: u32,
    pub(super) number: u32,
    /// A start is under way, and not for long.
    pub(super) starting: bool,
    /// One has lasted too long.
    pub(super) late: bool,
    /// Somebody runs, or is being started.
    pub(super) hope: bool,
}

impl<W> Ledger<W> {
    pub(super) fn survey(&self, port: Port, now: Instant) -> Survey {
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
    pub(super) fn choose(&self, port: Port, waiting: u32, now: Instant) -> Option<usize> {
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
    pub(super) fn wake(
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

    pub(super) fn start(&mut self, slot: usize, port: Port, now: Instant) -> Option<Start> {
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

    pub(super) fn grant(&mut self, slot: usize, port: Port, now: Instant) -> Option<Grant> {
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
    pub(super) fn hope(&self, port: Port, arrived: Instant, now: Instant) -> bool {
        self.survey(port, now).hope
            || self.offers(port).any(|(_, member, offer)| {
                let rests = member.rests_until(arrived);
                member.may_start(offer) && rests.is_some_and(|at| at <= now + SHORT_PAUSE)
            })
    }

    /// Why nobody could have a place.
    pub(super) fn why(&self, port: Port, now: Instant) -> Refused {
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
}
