//! Machines that could not be taken up, or whose task has failed, and when they are tried again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tern_catalog::{Machine, MachineId, MachineStatus};

/// Machines that were in trouble.
#[derive(Debug, Default)]
pub(crate) struct Troubles(HashMap<MachineId, Trouble>);

#[derive(Debug)]
struct Trouble {
    /// The record, another than which is tried at once.
    wanted: Arc<Machine>,
    reason: String,
    failures: u32,
    last: Instant,
    /// When it is tried again; `None` while it is looked after.
    retry_at: Option<Instant>,
    /// What was told of it before it was told that it cannot be taken up.
    before: Option<Before>,
}

/// What an agent is to go on from, which may be nothing.
pub(crate) type Before = Option<Arc<MachineStatus>>;

impl Troubles {
    /// It cannot be taken up. Returns whether that, with this reason, is news.
    pub(crate) fn refused(
        &mut self,
        machine: &Arc<Machine>,
        before: Before,
        reason: &str,
        now: Instant,
    ) -> bool {
        let known = self.0.get(&machine.id);
        let waits = known.filter(|trouble| trouble.retry_at.is_some());
        let news = waits.is_none_or(|trouble| trouble.reason != reason);
        let before = waits.and_then(|t| t.before.clone()).unwrap_or(before);
        self.fail(machine, Some(before), reason, now);
        news
    }

    /// Its task has failed.
    pub(crate) fn lost(&mut self, machine: &Arc<Machine>, reason: &str, now: Instant) {
        self.fail(machine, None, reason, now);
    }

    fn fail(&mut self, machine: &Arc<Machine>, before: Option<Before>, reason: &str, now: Instant) {
        let recent = self.0.get(&machine.id);
        let recent = recent.filter(|t| now.saturating_duration_since(t.last) < CALM);
        let failures = recent.map_or(0, |t| t.failures) + 1;
        let trouble = Trouble {
            wanted: Arc::clone(machine),
            reason: reason.to_owned(),
            failures,
            last: now,
            retry_at: Some(now + wait(failures)),
            before,
        };
        self.0.insert(machine.id.clone(), trouble);
    }

    /// Whether a Machine that nobody looks after is to be tried.
    pub(crate) fn may_try(&self, machine: &Arc<Machine>, now: Instant) -> bool {
        self.0.get(&machine.id).is_none_or(|trouble| {
            trouble.retry_at.is_none_or(|at| at <= now) || !Arc::ptr_eq(&trouble.wanted, machine)
        })
    }

    /// What to go on from instead of what was told last.
    pub(crate) fn before(&self, id: &MachineId) -> Option<Before> {
        self.0.get(id)?.before.clone()
    }

    /// It is looked after.
    pub(crate) fn over(&mut self, id: &MachineId) {
        if let Some(trouble) = self.0.get_mut(id) {
            trouble.retry_at = None;
            trouble.before = None;
        }
    }

    /// When the next one is to be tried.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.0.values().filter_map(|t| t.retry_at).min()
    }

    /// Why a Machine is not looked after now, if that is so.
    pub(crate) fn reason(&self, id: &MachineId) -> Option<&str> {
        let trouble = self.0.get(id)?;
        trouble.retry_at.map(|_| trouble.reason.as_str())
    }

    /// Forgets all others.
    pub(crate) fn keep(&mut self, known: impl Fn(&MachineId) -> bool) {
        self.0.retain(|id, _| known(id));
    }
}

fn wait(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    (FIRST_WAIT * (1 << doublings)).min(LONGEST_WAIT)
}

/// A full disk may have room again soon, and most that fails does not fail twice.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// What a person has mended need not be told of.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Who was well for so long has a new trouble, and not more of an old one.
const CALM: Duration = Duration::from_secs(600);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::tests::machine;

    #[test]
    fn what_cannot_be_taken_up_is_tried_again_later_and_later() {
        let machine = Arc::new(machine(r#"{"image":"x"}"#));
        let mut troubles = Troubles::default();
        let mut now = Instant::now();
        assert!(troubles.may_try(&machine, now));
        assert_eq!(troubles.next(), None);
        let mut waits = Vec::new();
        for failure in 0..10 {
            let news = troubles.refused(&machine, None, "no space", now);
            assert_eq!(news, failure == 0);
            assert!(!troubles.may_try(&machine, now));
            assert_eq!(troubles.reason(&machine.id), Some("no space"));
            let next = troubles.next().unwrap();
            waits.push(next - now);
            now = next;
            assert!(troubles.may_try(&machine, now));
        }
        assert!(waits[0] == FIRST_WAIT && waits.is_sorted() && waits[9] == LONGEST_WAIT);
        assert!(troubles.refused(&machine, None, "no memory", now), "news");
        // Somebody has changed its record.
        assert!(troubles.may_try(&Arc::new((*machine).clone()), now));

        troubles.over(&machine.id);
        assert_eq!(
            (troubles.next(), troubles.reason(&machine.id)),
            (None, None)
        );
        // A task that fails again soon waits longer than one that was well for long.
        troubles.lost(&machine, "panic", now);
        assert!(troubles.next().unwrap() - now > FIRST_WAIT);
        now += CALM;
        troubles.over(&machine.id);
        troubles.lost(&machine, "panic", now);
        assert_eq!(troubles.next().unwrap() - now, FIRST_WAIT);
        troubles.keep(|_| false);
        assert_eq!(troubles.next(), None);
    }

    #[test]
    fn what_was_told_before_the_trouble_is_gone_on_from() {
        let machine = Arc::new(machine(r#"{"image":"x"}"#));
        let mut troubles = Troubles::default();
        let now = Instant::now();
        assert_eq!(troubles.before(&machine.id), None);
        // Nothing was told of it; since then, that it has failed.
        troubles.refused(&machine, None, "no space", now);
        let status = crate::agent::refusal(&machine, None, "no space".into());
        troubles.refused(&machine, Some(Arc::new(status)), "no space", now);
        assert_eq!(troubles.before(&machine.id), Some(None));
        troubles.over(&machine.id);
        assert_eq!(troubles.before(&machine.id), None);
        troubles.lost(&machine, "panic", now);
        assert_eq!(troubles.before(&machine.id), None, "what was told last");
    }
}
