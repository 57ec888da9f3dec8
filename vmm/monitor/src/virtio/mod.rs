//! The virtio devices (virtio 1.2, <https://docs.oasis-open.org/virtio/virtio/v1.2/virtio-v1.2.html>).
//!
//! Every device folder has the same shape: `mod.rs` with what the guest can see of it (features,
//! configuration space) and what it does with its queues, and what it leaves in a snapshot. What it counts is
//! in [`metrics`].
//!
//! - [`transport`]: the registers by which a driver sets a device up, one window per device;
//! - [`worker`]: the thread that runs a device once its driver is ready;
//! - [`queue`] and [`chain`]: the only code that reads rings and descriptors. Everything a guest writes
//!   there is checked in these two, and devices see bounded lists of valid host memory.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod held;
pub mod limit;
pub mod metrics;
pub mod net;
pub mod queue;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
pub mod transport;
pub mod vsock;
pub mod worker;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

pub use metrics::Metrics;
pub use worker::Context;

use crate::jail::seccomp::ThreadKind;

/// Whether one more line may be logged about something the guest brought about.
///
/// A guest can make mistakes a million times a second; the first hundred say what there is to say, and
/// a hostile one does not get to fill the host's disk.
pub(crate) fn may_log() -> bool {
    const LINES: u32 = 100;
    static USED: AtomicU32 = AtomicU32::new(0);
    USED.load(Ordering::Relaxed) < LINES && USED.fetch_add(1, Ordering::Relaxed) < LINES
}

/// Offered by every device: the driver speaks virtio 1.0 or later.
pub const VERSION_1: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
/// Offered by every device: one ring entry may point to a table of descriptors.
pub const INDIRECT_DESC: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
/// Offered by every device: both sides say when they want to be told.
pub const EVENT_IDX: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// The kinds of devices, with their virtio numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A network card.
    Net,
    /// A disk.
    Block,
    /// A source of randomness.
    Rng,
    /// Sockets between host and guest.
    Vsock,
    /// Memory that the guest gives back.
    Balloon,
}

impl Kind {
    /// The device id of virtio 1.2, section 5.
    pub fn id(self) -> u32 {
        match self {
            Self::Net => 1,
            Self::Block => 2,
            Self::Rng => 4,
            Self::Balloon => 5,
            Self::Vsock => 19,
        }
    }

    /// Names threads and log lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Block => "block",
            Self::Rng => "rng",
            Self::Vsock => "vsock",
            Self::Balloon => "balloon",
        }
    }
}

/// A virtio device, apart from its registers.
///
/// The transport asks for what a driver can see. Once the driver is ready, the device moves into its
/// worker's thread, which calls [`Device::start`] once, then the `on_` methods one at a time, then
/// [`Device::stop`] once; after that the device is the transport's again, at rest, to be saved,
/// started again or dropped. All state is thus owned by one thread at a time, without locks.
///
/// Nothing a guest does may make a method panic, block for long, or touch memory outside its
/// descriptors; a request that makes no sense is answered as the specification says, or dropped.
pub trait Device: Send + std::fmt::Debug {
    /// What it is.
    fn kind(&self) -> Kind;

    /// Whose filter its worker's thread is under.
    fn thread(&self) -> ThreadKind {
        ThreadKind::Device(self.kind())
    }

    /// Makes what threads it needs beside its worker's: no other moment allows it.
    fn hire(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// The features of its kind that it offers; those all devices offer are added.
    fn features(&self) -> u64;

    /// The largest size of each of its queues, powers of two.
    fn queue_sizes(&self) -> &'static [u16];

    /// Its configuration space, as it is before anybody writes to it.
    fn config(&self) -> Vec<u8>;

    /// The part of the configuration space that its driver may write.
    fn driver_config(&self) -> Range<usize> {
        0..0
    }

    /// The driver is ready (or the Machine goes on after a pause). Registers descriptors in `cx`.
    /// [`Device::on_queue`] follows for every queue, so nothing that came before is missed.
    fn start(&mut self, cx: &mut Context) -> io::Result<()>;

    /// The driver has put something into queue `index`, or taken something out.
    fn on_queue(&mut self, cx: &mut Context, index: usize);

    /// A registered descriptor is ready.
    fn on_io(&mut self, _cx: &mut Context, _token: u64, _ready: worker::Ready) {}

    /// When [`Device::on_deadline`] is to be called, if nothing else happens before.
    fn deadline(&self) -> Option<std::time::Instant> {
        None
    }

    /// The time of [`Device::deadline`] has come.
    fn on_deadline(&mut self, _cx: &mut Context, _now: std::time::Instant) {}

    /// The Machine pauses or the driver resets the device; requests taken from a queue are finished.
    fn stop(&mut self, _cx: &mut Context) {}

    /// The driver has reset the device: forget whatever belonged to it.
    fn reset(&mut self) {}

    /// Its counters, which it goes on raising.
    fn metrics(&self) -> Metrics;

    /// What a snapshot must hold of it.
    fn save(&self) -> DeviceState;
}

/// A device's own part of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// See [`block`].
    Block(block::BlockState),
    /// See [`net`].
    Net(net::NetState),
    /// See [`rng`]: nothing.
    Rng,
    /// See [`vsock`].
    Vsock(vsock::VsockState),
    /// See [`balloon`].
    Balloon(balloon::BalloonState),
}
