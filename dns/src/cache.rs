//! Answers from upstream, kept as long as they say.
//!
//! Two generations: new answers enter the young one; when that is full it becomes the old one, and
//! the old one is forgotten. What is asked for again moves up. So memory is bounded, and what is in
//! use stays, without a list to keep in order.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::wire::{self, Edns};

/// Answers in one generation. Two of them, of some hundred bytes each, are a few megabytes.
const GENERATION: usize = 4096;
/// Larger answers are rare and not kept.
const LARGEST: usize = 2048;
/// Nothing is kept longer, whatever it says: mistakes get corrected.
const LONGEST: Duration = Duration::from_secs(3600);

/// What makes two questions the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// The question's bytes, in lowercase.
    question: Vec<u8>,
    dnssec_ok: bool,
    has_edns: bool,
    checking_disabled: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Cache {
    young: HashMap<Key, Kept>,
    old: HashMap<Key, Kept>,
}

#[derive(Debug)]
struct Kept {
    answer: Vec<u8>,
    since: Instant,
    until: Instant,
}

impl Key {
    pub(crate) fn new(question: &[u8], edns: Option<Edns>, checking_disabled: bool) -> Self {
        Self {
            question: question.to_ascii_lowercase(),
            dnssec_ok: edns.is_some_and(|e| e.dnssec_ok),
            has_edns: edns.is_some(),
            checking_disabled,
        }
    }
}

impl Cache {
    /// The answer, with what is left of its times to live.
    pub(crate) fn get(&mut self, key: &Key, now: Instant) -> Option<Vec<u8>> {
        if let Some(kept) = self.old.remove(key) {
            self.insert(key.clone(), kept);
        }
        let kept = self.young.get(key).filter(|kept| now < kept.until)?;
        let mut answer = kept.answer.clone();
        let seconds = now.saturating_duration_since(kept.since).as_secs();
        wire::age(&mut answer, u32::try_from(seconds).unwrap_or(u32::MAX));
        Some(answer)
    }

    /// Keeps an answer, if it may be kept.
    pub(crate) fn put(&mut self, key: Key, answer: &[u8], now: Instant) {
        let Some(seconds @ 1..) = wire::lifetime(answer) else {
            return;
        };
        if answer.len() > LARGEST {
            return;
        }
        let until = now + Duration::from_secs(seconds.into()).min(LONGEST);
        let answer = answer.to_vec();
        self.insert(
            key,
            Kept {
                answer,
                since: now,
                until,
            },
        );
    }

    fn insert(&mut self, key: Key, kept: Kept) {
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, kept);
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::ResponseCode;

    use super::*;
    use crate::wire::tests::{answered, asked};

    fn key(name: &str) -> Key {
        Key::new(wire::question(&asked(name)).unwrap(), None, false)
    }

    #[test]
    fn an_answer_grows_old_and_ends() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        cache.put(
            key("a.example."),
            &answered("a.example.", &[30], ResponseCode::NoError),
            now,
        );
        let at = |s| now + Duration::from_secs(s);
        let after_ten = cache.get(&key("A.EXAMPLE."), at(10)).unwrap();
        assert_eq!(
            after_ten,
            answered("a.example.", &[20], ResponseCode::NoError)
        );
        assert!(cache.get(&key("a.example."), at(29)).is_some());
        assert!(cache.get(&key("a.example."), at(30)).is_none());
        assert!(cache.get(&key("b.example."), at(10)).is_none());
    }

    #[test]
    fn what_may_not_be_kept_is_not() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        for answer in [
            answered("a.example.", &[0], ResponseCode::NoError),
            answered("a.example.", &[30], ResponseCode::ServFail),
            answered("a.example.", &[30; 200], ResponseCode::NoError),
        ] {
            cache.put(key("a.example."), &answer, now);
            assert!(cache.get(&key("a.example."), now).is_none());
        }
    }

    #[test]
    fn it_is_bounded_and_keeps_what_is_in_use() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let answer = answered("a.example.", &[3000], ResponseCode::NoError);
        cache.put(key("used.example."), &answer, now);
        for n in 0..3 * GENERATION {
            cache.put(key(&format!("n{n}.example.")), &answer, now);
            if n % 100 == 0 {
                assert!(cache.get(&key("used.example."), now).is_some(), "{n}");
            }
        }
        assert!(cache.young.len() + cache.old.len() <= 2 * GENERATION);
    }
}
