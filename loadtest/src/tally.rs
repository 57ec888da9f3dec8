//! Counts outcomes and sums them up.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::exchange::{Answer, Failure, FailureKind};

/// Different error texts that are told apart; the rest is counted together.
const MAX_REASONS: usize = 20;

/// Outcomes of requests.
#[derive(Debug, Default)]
pub struct Tally {
    statuses: BTreeMap<u16, u64>,
    failures: BTreeMap<(FailureKind, String), u64>,
    first_byte: Vec<u32>,
    from_start: Vec<u32>,
    total: Vec<u32>,
}

/// What a [`Tally`] amounts to.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Requests in all.
    pub requests: u64,
    /// Those without the answer that was expected.
    pub failed: u64,
    /// Answers by status.
    pub statuses: BTreeMap<u16, u64>,
    /// Why requests failed.
    pub failures: Vec<Reason>,
    /// From sending the request to the first byte of the answer.
    pub first_byte: Latency,
    /// From when the request was meant to be sent to the first byte of the answer.
    pub from_start: Latency,
    /// From the same moment to the answer's end.
    pub total: Latency,
}

/// How often something went wrong.
#[derive(Debug, Clone, Serialize)]
pub struct Reason {
    /// The class.
    pub kind: FailureKind,
    /// The error.
    pub detail: String,
    /// How often.
    pub count: u64,
}

/// A distribution, in milliseconds. All zero if there was nothing to measure.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Latency {
    /// The shortest.
    pub min: f64,
    /// Half are no longer.
    pub median: f64,
    /// 90 of 100 are no longer.
    pub p90: f64,
    /// 95 of 100 are no longer.
    pub p95: f64,
    /// 99 of 100 are no longer.
    pub p99: f64,
    /// 999 of 1000 are no longer.
    pub p999: f64,
    /// The longest.
    pub max: f64,
}

impl Tally {
    /// Counts an outcome.
    pub fn add(&mut self, outcome: &Result<Answer, Failure>) {
        match outcome {
            Ok(answer) => {
                *self.statuses.entry(answer.status).or_default() += 1;
                self.first_byte.push(micros(answer.first_byte));
                self.from_start.push(micros(answer.from_start));
                self.total.push(micros(answer.total));
            }
            Err(failure) => {
                if let Some(status) = failure.status {
                    *self.statuses.entry(status).or_default() += 1;
                }
                let mut key = (failure.kind, failure.detail.clone());
                if self.failures.len() >= MAX_REASONS && !self.failures.contains_key(&key) {
                    key.1 = "other errors".to_owned();
                }
                *self.failures.entry(key).or_default() += 1;
            }
        }
    }

    /// Counts what another one has counted.
    pub fn merge(&mut self, other: Self) {
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
        for (reason, count) in other.failures {
            *self.failures.entry(reason).or_default() += count;
        }
        self.first_byte.extend(other.first_byte);
        self.from_start.extend(other.from_start);
        self.total.extend(other.total);
    }

    /// Times from request to first byte, in milliseconds, in the order they were counted.
    pub fn samples(&self) -> Vec<f64> {
        self.first_byte
            .iter()
            .map(|&micros| millis(micros))
            .collect()
    }

    /// Sums up.
    pub fn summary(&self) -> Summary {
        let failed = self.failures.values().sum();
        Summary {
            requests: self.first_byte.len() as u64 + failed,
            failed,
            statuses: self.statuses.clone(),
            failures: self
                .failures
                .iter()
                .map(|((kind, detail), &count)| Reason {
                    kind: *kind,
                    detail: detail.clone(),
                    count,
                })
                .collect(),
            first_byte: Latency::of(&self.first_byte),
            from_start: Latency::of(&self.from_start),
            total: Latency::of(&self.total),
        }
    }
}

impl Latency {
    fn of(micros: &[u32]) -> Self {
        let mut sorted = micros.to_vec();
        sorted.sort_unstable();
        let (Some(&first), Some(&last)) = (sorted.first(), sorted.last()) else {
            return Self::default();
        };
        // Nearest rank: the smallest sample that so many are no longer than.
        let rank = |thousandths: usize| {
            let rank = (sorted.len() * thousandths).div_ceil(1000).max(1);
            millis(sorted[rank - 1])
        };
        Self {
            min: millis(first),
            median: rank(500),
            p90: rank(900),
            p95: rank(950),
            p99: rank(990),
            p999: rank(999),
            max: millis(last),
        }
    }
}

/// Microseconds; more than an hour is an hour.
fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(3_600_000_000)
}

fn millis(micros: u32) -> f64 {
    f64::from(micros) / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(millis: u64) -> Result<Answer, Failure> {
        let time = Duration::from_millis(millis);
        Ok(Answer {
            status: 200,
            first_byte: time,
            from_start: 2 * time,
            total: 3 * time,
        })
    }

    #[test]
    fn percentiles_are_samples() {
        let mut tally = Tally::default();
        for millis in (1..=100).rev() {
            tally.add(&answer(millis));
        }
        let summary = tally.summary();
        let Latency {
            min,
            median,
            p90,
            p95,
            p99,
            p999,
            max,
        } = summary.first_byte;
        assert_eq!(
            [min, median, p90, p95, p99, p999, max],
            [1.0, 50.0, 90.0, 95.0, 99.0, 100.0, 100.0]
        );
        assert_eq!(
            (summary.from_start.median, summary.total.max),
            (100.0, 300.0)
        );
        assert_eq!(
            (summary.requests, summary.failed, summary.statuses[&200]),
            (100, 0, 100)
        );
    }

    #[test]
    fn one_sample_is_every_percentile_and_none_is_zero() {
        let mut tally = Tally::default();
        assert_eq!(tally.summary().first_byte, Latency::default());
        tally.add(&answer(7));
        let latency = tally.summary().first_byte;
        assert_eq!((latency.min, latency.median, latency.p999), (7.0, 7.0, 7.0));
    }

    #[test]
    fn failures_are_counted_by_reason_within_bounds() {
        let mut tally = Tally::default();
        for n in 0..100 {
            tally.add(&Err(Failure::plain(FailureKind::Connect, n % 50)));
        }
        let mut other = Tally::default();
        let mut failure = Failure::plain(FailureKind::Status, "status 503");
        failure.status = Some(503);
        other.add(&Err(failure));
        tally.merge(other);
        let summary = tally.summary();
        assert_eq!((summary.requests, summary.failed), (101, 101));
        assert_eq!(
            summary
                .failures
                .iter()
                .map(|reason| reason.count)
                .sum::<u64>(),
            101
        );
        assert!(summary.failures.len() <= MAX_REASONS + 2);
        assert_eq!(summary.statuses[&503], 1);
    }
}
