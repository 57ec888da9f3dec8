//! What goes into a ledger and comes out of it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;
use tern_catalog::{MachineId, ServiceProtocol};

use super::super::Refused;
use crate::control::StartError;

/// The time.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// For durations.
    pub at: Instant,
    /// To compare with what hosts say.
    pub wall: Timestamp,
}

/// An app's port, inside its Machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    pub number: u16,
    pub protocol: ServiceProtocol,
}

/// A Machine's place in the ledger, good as long as somebody has a place at the Machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot(pub(super) usize);

/// One that waits, in the order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub(super) u64);

/// A place at a Machine. It is given back by [`Ledger::end`](super::Ledger::end).
#[derive(Debug)]
pub struct Grant {
    pub slot: Slot,
    pub port: Port,
    pub machine: Arc<MachineId>,
    /// Where its app listens, as far as is known.
    pub address: SocketAddr,
    /// The Machine's life: connections are used again only within one.
    pub epoch: u64,
    /// A connection to this address was accepted in this life, and none has failed since.
    pub proven: bool,
}

/// A start to be made.
#[derive(Debug)]
pub struct Start {
    pub slot: Slot,
    /// Tells starts of one Machine apart.
    pub number: u64,
    pub machine: Arc<MachineId>,
    /// Where somebody waits for it to listen.
    pub port: Port,
    pub address: SocketAddr,
    /// The Machine's other ports at which connections may show that it runs.
    pub others: Vec<Port>,
}

/// Why a start failed.
#[derive(Debug)]
pub struct NotStarted {
    pub why: StartError,
    /// It is the Machine's fault, and not what its host or the edge has too little of.
    pub by_itself: bool,
}

/// What is to be done.
#[derive(Debug)]
pub enum Act<W> {
    /// Who waited has a place.
    Grant(W, Grant),
    /// Who waited gets none.
    Refuse(W, Refused),
    /// A Machine is to be started; [`Ledger::started`](super::Ledger::started) is told what came of it, in any case.
    Start(Start),
    /// All requests of the Machine's earlier lives have ended.
    SeenOff,
    /// [`Ledger::tick`](super::Ledger::tick) is to be called then.
    Alarm(Instant),
}

/// What becomes of a request when it comes.
pub enum Arrival {
    Granted(Grant),
    Waits(Ticket),
    Refused(Refused),
}
