//! Rate limits of a device: token buckets for bytes and for operations. No clock of their own, no I/O.
//!
//! A bucket fills at its rate up to its burst, and an operation takes what it needs even if that is more than
//! there is: the debt is paid before the next one begins. So an operation that is larger than the burst
//! still goes, and nothing has to be looked at before it is taken from its queue.

use std::time::{Duration, Instant};

use crate::config::RateLimit;

/// What a device may still do.
#[derive(Debug, Default)]
pub struct Limiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

/// Tokens times a thousand million, so that a nanosecond's worth of any rate is a whole number.
#[derive(Debug)]
struct Bucket {
    per_second: u64,
    burst: i128,
    level: i128,
    at: Option<Instant>,
}

const SCALE: i128 = 1_000_000_000;

impl Limiter {
    /// No limit without `config`. Buckets begin full.
    pub fn new(config: Option<&RateLimit>) -> Self {
        let bucket = |rate: Option<u64>, burst: Option<u64>| {
            rate.map(|rate| Bucket::new(rate, burst.unwrap_or(rate)))
        };
        config.map_or_else(Self::default, |config| Self {
            bytes: bucket(config.bytes_per_second, config.burst_bytes),
            operations: bucket(config.operations_per_second, config.burst_operations),
        })
    }

    /// Counts one operation that moves `bytes`.
    pub fn take(&mut self, bytes: usize, now: Instant) {
        for (bucket, tokens) in [(&mut self.bytes, bytes as u64), (&mut self.operations, 1)] {
            if let Some(bucket) = bucket {
                bucket.take(tokens, now);
            }
        }
    }

    /// When the next operation may begin, if not now.
    pub fn wait(&mut self, now: Instant) -> Option<Instant> {
        let buckets = [&mut self.bytes, &mut self.operations];
        let waits = buckets.into_iter().flatten().filter_map(|b| b.wait(now));
        waits.max()
    }
}

impl Bucket {
    fn new(per_second: u64, burst: u64) -> Self {
        let burst = i128::from(burst.max(1)) * SCALE;
        Self {
            per_second: per_second.max(1),
            burst,
            level: burst,
            at: None,
        }
    }

    fn fill(&mut self, now: Instant) {
        let passed = self
            .at
            .map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let nanos = i128::try_from(passed.as_nanos()).unwrap_or(i128::MAX);
        let more = nanos.saturating_mul(i128::from(self.per_second));
        self.level = self.level.saturating_add(more).min(self.burst);
        self.at = Some(now);
    }

    fn take(&mut self, tokens: u64, now: Instant) {
        self.fill(now);
        self.level -= i128::from(tokens) * SCALE;
    }

    fn wait(&mut self, now: Instant) -> Option<Instant> {
        self.fill(now);
        if self.level > 0 {
            return None;
        }
        // One more nanosecond's worth than the debt: more than nothing must be there.
        let nanos = -self.level / i128::from(self.per_second) + 1;
        let wait = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        // A debt of centuries is not one that anybody waits for.
        Some(now.checked_add(wait).unwrap_or(now + LONGEST))
    }
}

const LONGEST: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limit(bytes: u64, burst: u64) -> Limiter {
        Limiter::new(Some(&RateLimit {
            bytes_per_second: Some(bytes),
            burst_bytes: Some(burst),
            operations_per_second: None,
            burst_operations: None,
        }))
    }

    #[test]
    fn a_burst_is_free_and_debt_is_paid_at_the_rate() {
        let mut limiter = limit(1000, 500);
        let start = Instant::now();
        limiter.take(400, start);
        assert_eq!(limiter.wait(start), None);
        limiter.take(1100, start); // 1000 more than there was
        let until = limiter.wait(start).unwrap();
        let second = Duration::from_secs(1);
        assert_eq!(
            until.duration_since(start),
            second + Duration::from_nanos(1)
        );
        assert_eq!(limiter.wait(until), None);
        // However long it rests, no more than the burst comes together.
        limiter.take(501, start + 60 * second);
        assert!(limiter.wait(start + 60 * second).is_some());
    }

    #[test]
    fn operations_and_bytes_both_count() {
        let mut limiter = Limiter::new(Some(&RateLimit {
            bytes_per_second: Some(1 << 30),
            burst_bytes: None,
            operations_per_second: Some(2),
            burst_operations: None,
        }));
        let now = Instant::now();
        limiter.take(1, now);
        limiter.take(1, now);
        let wait = limiter.wait(now).unwrap() - now;
        assert!(wait <= Duration::from_millis(1), "{wait:?}");
        limiter.take(1, now + wait);
        let wait = limiter.wait(now + wait).unwrap() - now;
        assert!(wait >= Duration::from_millis(500), "{wait:?}");
        assert_eq!(Limiter::new(None).wait(now), None);
    }

    proptest! {
        /// Whatever is asked for and when: over any time no more goes through than rate, burst and one
        /// operation allow, and nobody waits for ever.
        #[test]
        fn the_rate_holds(
            rate in 1..1_000_000_u64, burst in 1..100_000_u64,
            steps in prop::collection::vec((0..50_000_usize, 0..2_000_000_u64), 1..60)
        ) {
            let mut limiter = limit(rate, burst);
            let start = Instant::now();
            let mut now = start;
            let (mut moved, mut last) = (0_u64, 0_u64);
            for (bytes, rest_us) in steps {
                if let Some(until) = limiter.wait(now) {
                    prop_assert!(until > now);
                    now = until;
                    prop_assert_eq!(limiter.wait(now), None);
                }
                limiter.take(bytes, now);
                moved += bytes as u64;
                last = bytes as u64;
                now += Duration::from_micros(rest_us);
            }
            let seconds = now.duration_since(start).as_secs_f64();
            let most = seconds * rate as f64 + (burst + last + 1) as f64;
            prop_assert!(moved as f64 <= most, "{} > {}", moved, most);
        }
    }

    #[test]
    fn no_numbers_overflow() {
        let mut limiter = limit(u64::MAX, u64::MAX);
        let now = Instant::now();
        limiter.take(usize::MAX, now);
        limiter.take(usize::MAX, now);
        assert!(limiter.wait(now).is_some());
        let mut slow = limit(1, 1);
        slow.take(usize::MAX, now);
        assert!(slow.wait(now).is_some());
        assert!(slow.wait(now + Duration::from_secs(1 << 33)).is_some());
    }
}
