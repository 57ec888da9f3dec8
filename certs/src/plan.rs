//! What is due for a host name, and when. No I/O; the time is given.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tern_catalog::{Certificate, CertificateState, ChallengeKind, OrgSlug};

/// Wait after the first failure; each further one multiplies it by [`GROWTH`]. With Let's Encrypt's limit of
/// five failed validations of a name an hour, the fifth comes after more than an hour.
const FIRST_WAIT: Duration = Duration::from_secs(20);
const GROWTH: u32 = 4;
const LONGEST_WAIT: Duration = Duration::from_secs(6 * 3600);
/// A directory that says "at once" again and again is not asked in a circle.
const SHORTEST_WAIT: SignedDuration = SignedDuration::from_secs(5);
/// No limit that we know of looks back further.
pub const LONGEST_HOLD: SignedDuration = SignedDuration::from_hours(8 * 24);
/// Whom one moment lets go come within this of it.
const WIDEST_SPREAD: SignedDuration = SignedDuration::from_mins(5);
/// As long as a directory's window for duplicates, and as long again.
const KEPT_UNWANTED: SignedDuration = SignedDuration::from_hours(14 * 24);

/// When this host name's certificate is to be got (again).
pub fn due(certificate: Option<&Certificate>, now: Timestamp) -> Timestamp {
    certificate.and_then(|c| c.next_attempt).unwrap_or(now)
}

/// When a certificate of this validity is to be renewed: after two thirds, as Let's Encrypt advises.
pub fn renewal(not_before: Timestamp, not_after: Timestamp) -> Timestamp {
    let life = not_after.duration_since(not_before);
    not_before.checked_add(life / 3 * 2).unwrap_or(not_after)
}

/// How the attempt after so many failures is validated: what failed once may succeed the other way.
pub fn challenge(failures: u32) -> ChallengeKind {
    if failures.is_multiple_of(2) {
        ChallengeKind::TlsAlpn01
    } else {
        ChallengeKind::Http01
    }
}

/// After a failure the certificate is tried again later, each time more so. One that is still valid stays issued.
/// `jitter` is 0 to 1.
pub fn failed(record: &mut Certificate, error: String, now: Timestamp, jitter: f64) {
    let wait = FIRST_WAIT
        .saturating_mul(GROWTH.saturating_pow(record.failures))
        .min(LONGEST_WAIT);
    let wait = SignedDuration::try_from(wait.mul_f64(1.0 + jitter.clamp(0.0, 1.0) / 4.0));
    let wait = wait.unwrap_or(SignedDuration::from_hours(6));
    record.state = state(record, now).unwrap_or(CertificateState::Failed);
    record.failures = record.failures.saturating_add(1);
    record.last_error = Some(error);
    record.next_attempt = Some(now.saturating_add(wait).unwrap_or(now));
}

/// Nothing has failed, but nothing can be done before `until`: the order is being worked on, or none may be made.
/// As many as wait for the same moment do not all come at it.
pub fn waits(
    record: &mut Certificate,
    reason: String,
    until: Timestamp,
    now: Timestamp,
    jitter: f64,
) {
    let wait = until.duration_since(now).clamp(SHORTEST_WAIT, LONGEST_HOLD);
    let spread = (wait / 10).min(WIDEST_SPREAD);
    let spread = spread.as_secs_f64() * jitter.clamp(0.0, 1.0);
    let wait = wait.saturating_add(SignedDuration::from_millis((spread * 1000.0) as i64));
    record.state = state(record, now).unwrap_or(CertificateState::Pending);
    record.last_error = Some(reason);
    record.next_attempt = Some(now.saturating_add(wait).unwrap_or(now));
}

/// Issued, as long as it can be served.
fn state(record: &Certificate, now: Timestamp) -> Option<CertificateState> {
    let usable = record.key.is_some() && record.not_after.is_some_and(|end| end > now);
    usable.then_some(CertificateState::Issued)
}

/// What becomes of a record when its name is looked at.
#[derive(Debug, PartialEq, Eq)]
pub enum Tend {
    /// Nothing.
    Keep,
    /// It is written like this.
    Put(Box<Certificate>),
    /// It is removed, and its key with it.
    Remove,
}

/// Keeps a certificate for a while when no app has its name any longer: an app that is deleted and made again
/// costs no order. For its own organization only: another's begins with a key of its own. `wanted` is whether an
/// app has the name, and whose.
pub fn tend(record: &Certificate, wanted: Option<Option<&OrgSlug>>, now: Timestamp) -> Tend {
    match (wanted, record.unwanted_since) {
        (Some(owner), since) => {
            let known = record.organization.as_ref();
            if owner.is_some_and(|owner| known.is_some_and(|known| known != owner)) {
                return Tend::Remove;
            }
            if since.is_none() && (owner.is_none() || known.is_some()) {
                return Tend::Keep;
            }
            Tend::Put(Box::new(Certificate {
                organization: owner.or(known).cloned(),
                unwanted_since: None,
                ..record.clone()
            }))
        }
        (None, None) if record.key.is_some() => Tend::Put(Box::new(Certificate {
            unwanted_since: Some(now),
            order: None,
            ..record.clone()
        })),
        (None, None) => Tend::Remove,
        (None, Some(since)) => {
            let over = since
                .saturating_add(KEPT_UNWANTED)
                .is_ok_and(|end| end <= now);
            match over || record.not_after.is_none_or(|end| end <= now) {
                true => Tend::Remove,
                false => Tend::Keep,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn renewal_is_due_after_two_thirds() {
        assert_eq!(renewal(at(0), at(90)), at(60));
        assert_eq!(due(None, at(7)), at(7));
    }

    fn wanted() -> Certificate {
        Certificate::wanted("a.example".parse().unwrap())
    }

    /// One that ends then.
    fn issued(end: Timestamp) -> Certificate {
        Certificate {
            state: CertificateState::Issued,
            key: Some(tern_catalog::SealedKey {
                algorithm: String::new(),
                nonce: String::new(),
                ciphertext: String::new(),
            }),
            not_after: Some(end),
            organization: Some("personal".parse().unwrap()),
            ..wanted()
        }
    }

    #[test]
    fn failures_wait_longer_and_longer() {
        let mut record = wanted();
        failed(&mut record, "no".into(), at(0), 0.0);
        assert_eq!(
            (record.state, due(Some(&record), at(0))),
            (CertificateState::Failed, at(20))
        );
        let mut waits = Vec::new();
        for _ in 0..8 {
            failed(&mut record, "no".into(), at(0), 0.0);
            waits.push(record.next_attempt.unwrap().as_second());
        }
        assert_eq!(waits, [80, 320, 1280, 5120, 20480, 21600, 21600, 21600]);
        assert_ne!(challenge(0), challenge(1));
    }

    #[test]
    fn a_failed_renewal_does_not_take_the_certificate_away() {
        let mut record = issued(at(1000));
        failed(&mut record, "no".into(), at(10), 1.0);
        assert_eq!(record.state, CertificateState::Issued);
        waits(&mut record, "held".into(), at(60), at(11), 1.0);
        assert_eq!(record.state, CertificateState::Issued);
        failed(&mut record, "no".into(), at(2000), 1.0);
        assert_eq!(record.state, CertificateState::Failed);
    }

    #[test]
    fn what_waits_is_no_failure_and_comes_never_before_its_time() {
        for (until, jitter, earliest, latest) in [
            (3600, 0.0, 3600, 3600),
            (3600, 1.0, 3600, 3900),
            (100, 1.0, 100, 110),
            // "At once", and "never".
            (0, 0.0, 5, 5),
            (i64::from(i32::MAX), 0.0, 8 * 24 * 3600, 8 * 24 * 3600),
        ] {
            let mut record = wanted();
            waits(&mut record, "held".into(), at(until), at(0), jitter);
            let next = record.next_attempt.unwrap();
            assert!(
                at(earliest) <= next && next <= at(latest),
                "{until}: {next}"
            );
            assert_eq!(
                (record.state, record.failures),
                (CertificateState::Pending, 0)
            );
            assert_eq!(record.last_error.as_deref(), Some("held"));
        }
    }

    #[test]
    fn an_app_that_is_made_again_finds_its_certificate_and_another_organization_does_not() {
        let day = |n: i64| at(n * 24 * 3600);
        let (own, rival): (OrgSlug, OrgSlug) =
            ("personal".parse().unwrap(), "rivals".parse().unwrap());
        let record = issued(day(90));
        assert_eq!(tend(&record, Some(Some(&own)), day(0)), Tend::Keep);
        let Tend::Put(left) = tend(&record, None, day(1)) else {
            panic!("its time without an app begins");
        };
        assert_eq!(left.unwanted_since, Some(day(1)));
        assert_eq!(tend(&left, None, day(14)), Tend::Keep);
        assert_eq!(tend(&left, None, day(15)), Tend::Remove);
        assert_eq!(
            tend(&left, Some(Some(&own)), day(9)),
            Tend::Put(Box::new(record.clone()))
        );
        // Also when the name goes from one to the other between two looks.
        for of_rival in [&left, &record] {
            let seen = tend(of_rival, Some(Some(&rival)), day(9));
            assert_eq!(seen, Tend::Remove);
        }

        // Nothing is kept that cannot be served: without a key, or over.
        assert_eq!(tend(&wanted(), None, day(1)), Tend::Remove);
        let mut short = issued(day(3));
        short.unwanted_since = Some(day(1));
        assert_eq!(tend(&short, None, day(2)), Tend::Keep);
        assert_eq!(tend(&short, None, day(3)), Tend::Remove);

        // One from before owners were noted takes the first that it is seen with.
        let mut old = issued(day(90));
        old.organization = None;
        let adopted = tend(&old, Some(Some(&own)), day(1));
        assert_eq!(adopted, Tend::Put(Box::new(record)));
        assert_eq!(tend(&old, Some(None), day(1)), Tend::Keep);
    }
}
