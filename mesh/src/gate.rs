//! Which handshake messages are worth their cost.
//!
//! A handshake costs this server several Diffie-Hellman operations, so strangers must not get many
//! of them. In the order in which they are checked:
//!
//! 1. `mac1`: the sender knows this server's public key. One hash.
//! 2. Above [`FREE`] messages a second `mac2`: the sender has seen a cookie we sent to its address,
//!    so the address is not forged. One hash, and a small reply that keeps no state (section 5.3
//!    of the WireGuard paper).
//! 3. Then also [`PER_SOURCE`] for each address. Addresses share a fixed number of buckets.
//! 4. [`TOTAL`]: what handshakes may cost in all, so that established sessions keep the processor.

use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, TunnResult};
use boringtun::x25519;

/// Handshake messages a second that need no cookie. 10,000 laptops that renew their sessions every
/// two minutes stay below it.
const FREE: u64 = 100;
/// From one address under load: 20 a second, 5 at once, as in the Linux kernel.
const PER_SOURCE: Rate = Rate::new(Duration::from_millis(50), 5);
/// In all: 2,000 a second, at 50 to 150 µs each, are less than a third of one core.
const TOTAL: Rate = Rate::new(Duration::from_micros(500), 500);
/// Buckets for addresses. An attacker who does not know the hash cannot aim at somebody else's.
const BUCKETS: usize = 4096;
/// One second, over which messages are counted.
const WINDOW: Duration = Duration::from_secs(1);

/// The gate before handshakes.
pub(crate) struct Gate {
    limiter: RateLimiter,
    window: Instant,
    in_window: u64,
    total: Pace,
    sources: Box<[Pace]>,
    hasher: RandomState,
}

/// Why a message does not pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// It does not know our key, or is none.
    BadMac,
    /// A cookie of this many bytes was written as the answer.
    Cookie(usize),
    /// Too many.
    TooMany,
}

/// So many at once, and one more each interval.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rate {
    interval: Duration,
    tolerance: Duration,
}

/// What has been used of a rate: the time at which it is all there again.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Pace(Option<Instant>);

impl Gate {
    pub(crate) fn new(key: &x25519::PublicKey, now: Instant) -> Self {
        Self {
            limiter: RateLimiter::new(key, FREE),
            window: now,
            in_window: 0,
            total: Pace::default(),
            sources: vec![Pace::default(); BUCKETS].into(),
            hasher: RandomState::new(),
        }
    }

    /// Lets a handshake message pass, or says why not. An answer is written to `reply`.
    pub(crate) fn admit<'a>(
        &mut self,
        now: Instant,
        source: IpAddr,
        message: &'a [u8],
        reply: &mut [u8],
    ) -> Result<Packet<'a>, Stop> {
        if now.duration_since(self.window) >= WINDOW {
            self.limiter.reset_count();
            (self.window, self.in_window) = (now, 0);
        }
        let packet = match self.limiter.verify_packet(Some(source), message, reply) {
            Ok(packet) => packet,
            Err(TunnResult::WriteToNetwork(cookie)) => return Err(Stop::Cookie(cookie.len())),
            Err(TunnResult::Err(WireGuardError::UnderLoad)) => return Err(Stop::TooMany),
            Err(_) => return Err(Stop::BadMac),
        };
        self.in_window += 1;
        let loaded = self.in_window > FREE;
        let bucket = self.hasher.hash_one(site(source)) as usize % BUCKETS;
        if loaded && !self.sources[bucket].take(now, PER_SOURCE) || !self.total.take(now, TOTAL) {
            return Err(Stop::TooMany);
        }
        Ok(packet)
    }
}

impl Rate {
    pub(crate) const fn new(interval: Duration, burst: u32) -> Self {
        // The first of a burst needs no tolerance.
        let tolerance = interval.saturating_mul(burst - 1);
        Self {
            interval,
            tolerance,
        }
    }
}

impl Pace {
    /// Takes one, if there is one (the generic cell rate algorithm).
    pub(crate) fn take(&mut self, now: Instant, rate: Rate) -> bool {
        let due = self.0.map_or(now, |at| at.max(now));
        let allowed = due.duration_since(now) <= rate.tolerance;
        if allowed {
            self.0 = Some(due + rate.interval);
        }
        allowed
    }
}

/// What one site owns: an IPv4 address, or a /64 of IPv6.
fn site(address: IpAddr) -> u128 {
    match address.to_canonical() {
        IpAddr::V4(v4) => u128::from(v4.to_ipv6_mapped()),
        IpAddr::V6(v6) => u128::from(v6) >> 64 << 64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_allows_a_burst_and_then_its_interval() {
        let (start, mut pace) = (Instant::now(), Pace::default());
        let taken = (0..100).filter(|_| pace.take(start, PER_SOURCE)).count();
        assert_eq!(taken, 5);
        let later = start + Duration::from_secs(10);
        let over_a_second = (0..1000)
            .filter(|ms| pace.take(later + Duration::from_millis(*ms), PER_SOURCE))
            .count();
        assert_eq!(over_a_second, 5 + 19);
    }

    #[test]
    fn a_site_is_an_ipv4_address_or_a_64() {
        let site = |text: &str| site(text.parse().unwrap());
        assert_eq!(site("2001:db8::1"), site("2001:db8::ffff:1"));
        assert_ne!(site("2001:db8::1"), site("2001:db8:0:1::1"));
        assert_eq!(site("192.0.2.1"), site("::ffff:192.0.2.1"));
        assert_ne!(site("192.0.2.1"), site("192.0.2.2"));
    }
}
