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

use super::choose::PATIENCE;
use super::{Now, Port};
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
    /// Somebody puts it to sleep, and nothing was heard since.
    pub leaving: bool,
    ports: Vec<PortState>,
    failures: u32,
    failure: Option<Failure>,
}

pub enum Belief {
    Unknown,
    Ready {
        since: Timestamp,
    },
    Asleep {
        since: Timestamp,
    },
    Waking {
        number: u64,
        begun: Instant,
        /// Its host said so then.
        runs_since: Option<Timestamp>,
    },
}

/// What is known of one of its ports.
struct PortState {
    port: Port,
    /// Places that were given for it, and not given back.
    load: u32,
    /// Where the app was found to listen.
    address: Option<SocketAddr>,
    /// The last life in which it took a connection.
    proven_in: Option<u64>,
    /// Connections that failed since the last that did not.
    doubts: u32,
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
            leaving: false,
            ports: Vec::new(),
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
                    self.leaving = false;
                    (self.failures, self.failure) = (0, None);
                }
                Belief::Waking {
                    runs_since: Some(since),
                    ..
                } if at > since && sleeps(state) => {
                    let text = format!("it was {} before it listened", state.as_str());
                    self.failed(StartError { text }, true, now);
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
        self.is_awake() || (!offer.autostart && self.is_started() && !self.leaving)
    }

    /// Whether it is there, and as far as is known not asleep.
    pub fn may_live(&self) -> bool {
        self.facts.is_some() && !self.is_waking() && (self.is_awake() || self.is_started())
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
        self.leaving = false;
        (self.failures, self.failure) = (0, None);
    }

    /// Its start failed, by its own fault or not.
    pub fn failed(&mut self, why: StartError, by_itself: bool, now: Now) {
        self.belief = Belief::Asleep { since: now.wall };
        self.failures = self.failures.saturating_add(u32::from(by_itself));
        let pause = match self.failures {
            0 | 1 => Duration::ZERO,
            more => LONGEST_PAUSE.min(FIRST_PAUSE.saturating_mul(1 << (more - 2).min(16))),
        };
        self.failure = Some(Failure {
            at: now.at,
            retry_at: now.at + pause,
            why,
        });
    }

    fn port(&mut self, port: Port) -> &mut PortState {
        let found = self.ports.iter().position(|p| p.port == port);
        let at = found.unwrap_or_else(|| {
            self.ports.push(PortState {
                port,
                load: 0,
                address: None,
                proven_in: None,
                doubts: 0,
            });
            self.ports.len() - 1
        });
        &mut self.ports[at]
    }

    fn known(&self, port: Port) -> Option<&PortState> {
        self.ports.iter().find(|p| p.port == port)
    }

    /// Places that were given for a port, and not given back.
    pub fn load(&self, port: Port) -> u32 {
        self.known(port).map_or(0, |p| p.load)
    }

    pub fn take(&mut self, port: Port) {
        self.in_flight += 1;
        self.port(port).load += 1;
    }

    pub fn give_back(&mut self, port: Port) {
        self.in_flight = self.in_flight.saturating_sub(1);
        let state = self.port(port);
        state.load = state.load.saturating_sub(1);
    }

    /// A connection was accepted there.
    pub fn prove(&mut self, port: Port, address: SocketAddr) {
        if port.protocol != ServiceProtocol::Tcp {
            return;
        }
        let epoch = self.epoch;
        let state = self.port(port);
        state.address = Some(address);
        state.proven_in = Some(epoch);
        state.doubts = 0;
    }

    /// A connection failed there; it was refused, or nobody answered. Whether the Machine is not believed to run any more.
    pub fn doubt(&mut self, port: Port, refused: bool) -> bool {
        let epoch = self.epoch;
        let state = self.port(port);
        state.doubts += 1;
        if state.proven_in == Some(epoch) && state.doubts < 2 {
            return false;
        }
        (state.proven_in, state.doubts) = (None, 0);
        // Who refuses is a kernel that lives, and what lies on its other ports too.
        !(refused && self.ports.iter().any(|p| p.proven_in == Some(epoch)))
    }

    /// Whether a connection was accepted in this life, and none has failed since.
    pub fn is_proven(&self, port: Port) -> bool {
        let known = self.known(port);
        known.is_some_and(|p| p.proven_in == Some(self.epoch) && p.doubts == 0)
    }

    /// Its private address with a port.
    pub fn private(&self, port: Port) -> Option<SocketAddr> {
        let address = self.facts.as_ref()?.address;
        Some(SocketAddr::new(IpAddr::V6(address), port.number))
    }

    /// Where its app listens, as far as is known.
    pub fn address(&self, port: Port) -> Option<SocketAddr> {
        let found = self.known(port).and_then(|p| p.address);
        found.or_else(|| self.private(port))
    }

    /// Its ports that take connections.
    pub fn tcp_ports(&self) -> impl Iterator<Item = Port> {
        let offers = self.facts.iter().flat_map(|f| &f.offers);
        let tcp = offers.filter(|o| o.port.protocol == ServiceProtocol::Tcp);
        tcp.map(|o| o.port)
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
