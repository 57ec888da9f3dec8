//! What is due for a host name, and when. No I/O; the time is given.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tern_catalog::{Certificate, CertificateState, ChallengeKind, Hostname};

/// Wait after the first failure; each further one multiplies it by [`GROWTH`]. With Let's Encrypt's limit of
/// five failed validations of a name an hour, the fifth comes after more than an hour.
const FIRST_WAIT: Duration = Duration::from_secs(20);
const GROWTH: u32 = 4;
const LONGEST_WAIT: Duration = Duration::from_secs(6 * 3600);

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

/// The record after a failure. A certificate that is still valid stays issued. `jitter` is 0 to 1.
pub fn failed(
    hostname: &Hostname,
    before: Option<&Certificate>,
    error: String,
    now: Timestamp,
    jitter: f64,
) -> Certificate {
    let mut record = before.cloned().unwrap_or_else(|| Certificate {
        hostname: hostname.clone(),
        state: CertificateState::Failed,
        chain_pem: String::new(),
        key: None,
        not_after: None,
        next_attempt: None,
        failures: 0,
        last_error: None,
    });
    let wait = FIRST_WAIT
        .saturating_mul(GROWTH.saturating_pow(record.failures))
        .min(LONGEST_WAIT);
    let wait = wait.mul_f64(1.0 + jitter.clamp(0.0, 1.0) / 4.0);
    let usable = record.key.is_some() && record.not_after.is_some_and(|end| end > now);
    record.state = if usable {
        CertificateState::Issued
    } else {
        CertificateState::Failed
    };
    record.failures = record.failures.saturating_add(1);
    record.last_error = Some(error);
    let wait = SignedDuration::try_from(wait).unwrap_or(SignedDuration::from_hours(6));
    record.next_attempt = Some(now.saturating_add(wait).unwrap_or(now));
    record
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

    #[test]
    fn failures_wait_longer_and_longer_and_end_with_a_success() {
        let name: Hostname = "a.example".parse().unwrap();
        let mut record = failed(&name, None, "no".into(), at(0), 0.0);
        assert_eq!(
            (record.state, due(Some(&record), at(0))),
            (CertificateState::Failed, at(20))
        );
        let mut waits = Vec::new();
        for _ in 0..8 {
            record = failed(&name, Some(&record), "no".into(), at(0), 0.0);
            waits.push(record.next_attempt.unwrap().as_second());
        }
        assert_eq!(waits, [80, 320, 1280, 5120, 20480, 21600, 21600, 21600]);
        assert_ne!(challenge(0), challenge(1));
    }

    #[test]
    fn a_failed_renewal_does_not_take_the_certificate_away() {
        let name: Hostname = "a.example".parse().unwrap();
        let mut record = failed(&name, None, String::new(), at(0), 0.0);
        record.key = Some(tern_catalog::SealedKey {
            algorithm: String::new(),
            nonce: String::new(),
            ciphertext: String::new(),
        });
        record.not_after = Some(at(1000));
        assert_eq!(
            failed(&name, Some(&record), "no".into(), at(10), 1.0).state,
            CertificateState::Issued
        );
        assert_eq!(
            failed(&name, Some(&record), "no".into(), at(2000), 1.0).state,
            CertificateState::Failed
        );
    }
}
