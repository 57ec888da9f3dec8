//! What the ledger believes of one Machine, and what changes the belief.
//!
//! ```text
//!            view says started          wake wanted
//!   Unknown ◄──────────────── Asleep ◄──────┐ ┌──────────► Waking
//!      │  view says it sleeps    ▲          │ │               │ accepts
//!      └─────────────────────────┘    put to sleep,           ▼
//!                                  or connections failed ── Ready
//! ```
//!
//! Being wrong is cheap on purpose: a Machine wrongly believed asleep is asked to start, which it answers
//! at once; one wrongly believed awake fails to connect, and is asked to start then. A Machine that wakes may
//! accept, and be Ready, before its host calls it started.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tern_catalog::{MachineId, MachineState, ServiceProtocol};

use super::{Now, PATIENCE, Port};
use crate::control::StartError;

/// Pauses between starts that fail: none before the second, then this, twice as long each time.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What the catalog says of a Machine.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Its private address.
    pub address: Ipv6Addr,
    /// Another one for each configuration.
    pub instance: String,
    /// It may be given requests.
    pub eligible: bool,
    /// What its host said last, and when.
    pub seen: Option<(MachineState, Timestamp)>,
    /// Its services.
    pub offers: Vec<Offer>,
}

/// A service, as one Machine has it.
#[derive(Debug, Clone)]
pub struct Offer {
    pub port: Port,
    /// A request may start it.
    pub autostart: bool,
    /// Load from which on others are preferred; at least one, at most `hard`.
    pub soft: u32,
    /// Load at which nothing more is admitted.
    pub hard: u32,
}

pub struct Member {
    pub id: Arc<MachineId>,
    /// Nothing once it is no more.
    pub facts: Option<Facts>,
    pub belief: Belief,
    /// Places that were given, and not given back.
    pub in_flight: u32,
    /// Of them, those of lives before the last departure.
    pub earlier: u32,
    /// Counts lives.
    pub epoch: u64,
    pub last_active: Instant,
    /// It was woken before anybody asked for it, and nobody has since.
    pub early: bool,
    /// Connections that failed since the last that did not.
    pub doubts: u32,
    /// Where the app was found to listen.
    proven: Vec<Proven>,
    failures: u32,
    failure: Option<Failure>,
}

pub enum Belief {
    Unknown,
    Ready { since: Timestamp },
    Asleep { since: Timestamp },
    Waking { number: u64, begun: Instant },
}

struct Proven {
    port: u16,
    address: SocketAddr,
    epoch: u64,
}

/// The last start that failed.
pub struct Failure {
    pub at: Instant,
    pub retry_at: Instant,
    pub why: StartError,
}

impl Member {
    pub fn new(id: &MachineId, facts: Facts, now: Instant) -> Self {
        Self {
            id: Arc::new(id.clone()),
            facts: Some(facts),
            belief: Belief::Unknown,
            in_flight: 0,
            earlier: 0,
            epoch: 0,
            last_active: now,
            early: false,
            doubts: 0,
            proven: Vec::new(),
            failures: 0,
            failure: None,
        }
    }

    /// Takes over what the catalog says now.
    pub fn learn(&mut self, facts: Facts, now: Now) {
        let known = self.facts.as_ref();
        if known.is_some_and(|k| k.instance != facts.instance) {
            // What failed was another configuration.
            (self.failures, self.failure) = (0, None);
        }
        if let Some((state, at)) = facts.seen {
            match self.belief {
                Belief::Ready { since } if at > since && sleeps(state) => {
                    self.belief = Belief::Unknown;
                }
                Belief::Asleep { since } if at > since && state == MachineState::Started => {
                    // Somebody else woke it: its time without requests begins now.
                    self.last_active = now.at;
                    self.belief = Belief::Unknown;
                    (self.failures, self.failure) = (0, None);
                }
                _ => {}
            }
        }
        self.facts = Some(facts);
    }

    /// Its service on a port, if it may be given requests.
    pub fn offer(&self, port: Port) -> Option<&Offer> {
        let facts = self.facts.as_ref().filter(|f| f.eligible)?;
        facts.offers.iter().find(|o| o.port == port)
    }

    pub fn state(&self) -> Option<MachineState> {
        self.facts.as_ref()?.seen.map(|(state, _)| state)
    }

    fn is_started(&self) -> bool {
        self.state() == Some(MachineState::Started)
    }

    /// Whether it runs, by what the gate did itself and what its host says since.
    pub fn is_awake(&self) -> bool {
        match self.belief {
            Belief::Unknown => self.is_started(),
            Belief::Ready { .. } => true,
            Belief::Asleep { .. } | Belief::Waking { .. } => false,
        }
    }

    /// Whether requests are sent to it. One that may not be started is tried as long as its host says that it runs.
    pub fn runs(&self, offer: &Offer) -> bool {
        self.is_awake() || (!offer.autostart && self.is_started())
    }

    /// Whether it is there, and as far as is known not asleep.
    pub fn may_live(&self) -> bool {
        self.facts.is_some() && (self.is_awake() || self.is_started())
    }

    pub fn is_waking(&self) -> bool {
        matches!(self.belief, Belief::Waking { .. })
    }

    pub fn starting_since(&self) -> Option<Instant> {
        match self.belief {
            Belief::Waking { begun, .. } => Some(begun),
            _ => None,
        }
    }

    /// Whether a request could start it.
    pub fn may_start(&self, offer: &Offer) -> bool {
        offer.autostart && !self.is_awake() && !self.is_waking()
    }

    /// Until when it is not started after failures, for somebody who came then; nothing if it failed for them.
    pub fn rests_until(&self, arrived: Instant) -> Option<Instant> {
        match &self.failure {
            Some(failure) if failure.at >= arrived => None,
            Some(failure) => Some(failure.retry_at),
            None => Some(arrived),
        }
    }

    pub fn failure(&self) -> Option<&Failure> {
        self.failure.as_ref()
    }

    /// When there may be something to do for those that wait.
    pub fn due(&self) -> impl Iterator<Item = Instant> {
        let starting = self.starting_since().map(|at| at + PATIENCE);
        let pause = self.failure.as_ref().map(|f| f.retry_at);
        starting.into_iter().chain(pause)
    }

    /// Its start is done.
    pub fn ready(&mut self, since: Timestamp) {
        self.belief = Belief::Ready { since };
        self.epoch += 1;
        self.doubts = 0;
        (self.failures, self.failure) = (0, None);
    }

    /// Its start failed.
    pub fn failed(&mut self, why: StartError, now: Now) {
        self.belief = Belief::Asleep { since: now.wall };
        self.failures = self.failures.saturating_add(1);
        let pause = match self.failures {
            1 => Duration::ZERO,
            more => LONGEST_PAUSE.min(FIRST_PAUSE.saturating_mul(1 << (more - 2).min(16))),
        };
        self.failure = Some(Failure {
            at: now.at,
            retry_at: now.at + pause,
            why,
        });
    }

    /// A connection was accepted there.
    pub fn prove(&mut self, port: Port, address: SocketAddr) {
        if port.protocol != ServiceProtocol::Tcp {
            return;
        }
        let (port, epoch) = (port.number, self.epoch);
        let proven = Proven {
            port,
            address,
            epoch,
        };
        match self.proven.iter_mut().find(|p| p.port == port) {
            Some(known) => *known = proven,
            None => self.proven.push(proven),
        }
    }

    /// Whether a connection was accepted in this life.
    pub fn is_proven(&self, port: Port) -> bool {
        let mut proven = self.proven.iter();
        port.protocol == ServiceProtocol::Tcp
            && proven.any(|p| p.port == port.number && p.epoch == self.epoch)
    }

    /// Its private address with a port.
    pub fn private(&self, port: Port) -> Option<SocketAddr> {
        let address = self.facts.as_ref()?.address;
        Some(SocketAddr::new(IpAddr::V6(address), port.number))
    }

    /// Where its app listens, as far as is known.
    pub fn address(&self, port: Port) -> Option<SocketAddr> {
        let mut proven = self.proven.iter();
        let found = proven.find(|p| p.port == port.number && port.protocol == ServiceProtocol::Tcp);
        found.map(|p| p.address).or_else(|| self.private(port))
    }

    /// Nobody needs to remember it.
    pub fn is_over(&self) -> bool {
        self.facts.is_none() && self.in_flight == 0 && !self.is_waking()
    }
}

fn sleeps(state: MachineState) -> bool {
    use MachineState::{Created, Failed, Stopped, Stopping, Suspended, Suspending};
    matches!(
        state,
        Created | Stopping | Stopped | Suspending | Suspended | Failed
    )
}
