//! Whether, and when, an app that has ended is started again.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tern_catalog::{Restart, RestartPolicy};

/// The restarts of one Machine in the last minutes.
#[derive(Debug, Default)]
pub(crate) struct Restarts {
    recent: VecDeque<Instant>,
}

/// What to do about an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Leave it.
    Leave,
    /// Start it again after this long.
    After(Duration),
    /// It has been started again too often.
    GiveUp {
        /// How often.
        restarts: u32,
    },
}

impl Restarts {
    /// Decides, and counts what it allows. `failed`: the exit code was not 0, or the monitor died.
    pub(crate) fn decide(&mut self, rules: &Restart, failed: bool, now: Instant) -> Verdict {
        let wanted = match rules.policy {
            RestartPolicy::No => false,
            RestartPolicy::Always => true,
            RestartPolicy::OnFailure => failed,
        };
        if !wanted {
            return Verdict::Leave;
        }
        while let Some(&first) = self.recent.front()
            && now.saturating_duration_since(first) >= WINDOW
        {
            self.recent.pop_front();
        }
        let done = u32::try_from(self.recent.len()).unwrap_or(u32::MAX);
        let most = rules.max_retries.unwrap_or(MAX_RETRIES);
        if rules.policy == RestartPolicy::OnFailure && done >= most {
            return Verdict::GiveUp { restarts: done };
        }
        if self.recent.len() == KEPT {
            self.recent.pop_front();
        }
        self.recent.push_back(now);
        let doublings = done.min(16);
        Verdict::After((FIRST_WAIT * (1 << doublings)).min(LONGEST_WAIT))
    }
}

/// Restarts older than this no longer count.
const WINDOW: Duration = Duration::from_secs(300);
/// As on Fly.io.
const MAX_RETRIES: u32 = 10;
/// A bound on memory for the policy `always`, which never gives up.
const KEPT: usize = 64;
const FIRST_WAIT: Duration = Duration::from_millis(250);
/// Ten restarts fit into [`WINDOW`] twice over, so that an app which always fails comes to rest.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(policy: RestartPolicy, max_retries: Option<u32>) -> Restart {
        Restart {
            policy,
            max_retries,
        }
    }

    #[test]
    fn a_failing_app_is_given_up_after_ten_restarts() {
        let mut restarts = Restarts::default();
        let rules = rules(RestartPolicy::OnFailure, None);
        let mut now = Instant::now();
        let mut waits = Vec::new();
        loop {
            match restarts.decide(&rules, true, now) {
                Verdict::After(wait) => {
                    waits.push(wait);
                    now += wait;
                }
                verdict => {
                    assert_eq!(verdict, Verdict::GiveUp { restarts: 10 });
                    break;
                }
            }
        }
        assert_eq!(waits.len(), 10);
        assert_eq!(waits[0], FIRST_WAIT);
        assert!(waits.is_sorted() && waits[9] == LONGEST_WAIT);
    }

    #[test]
    fn old_restarts_are_forgotten() {
        let mut restarts = Restarts::default();
        let rules = rules(RestartPolicy::OnFailure, Some(1));
        let now = Instant::now();
        assert_eq!(
            restarts.decide(&rules, true, now),
            Verdict::After(FIRST_WAIT)
        );
        assert_eq!(
            restarts.decide(&rules, true, now + WINDOW / 2),
            Verdict::GiveUp { restarts: 1 }
        );
        assert_eq!(
            restarts.decide(&rules, true, now + WINDOW),
            Verdict::After(FIRST_WAIT)
        );
    }

    #[test]
    fn the_policy_decides() {
        let now = Instant::now();
        let decide = |policy, failed| Restarts::default().decide(&rules(policy, None), failed, now);
        assert_eq!(decide(RestartPolicy::No, true), Verdict::Leave);
        assert_eq!(decide(RestartPolicy::OnFailure, false), Verdict::Leave);
        assert_eq!(
            decide(RestartPolicy::Always, false),
            Verdict::After(FIRST_WAIT)
        );
    }

    #[test]
    fn always_never_gives_up() {
        let mut restarts = Restarts::default();
        let rules = rules(RestartPolicy::Always, Some(1));
        let now = Instant::now();
        for _ in 0..1000 {
            assert!(matches!(
                restarts.decide(&rules, true, now),
                Verdict::After(_)
            ));
        }
    }
}
