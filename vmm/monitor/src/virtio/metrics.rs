//! What each device has done since its monitor started, as `GET /v1/vm` tells it.
//!
//! A device raises its own counters while it works; whoever describes the Machine reads them. Each field is
//! one count, with its unit in its name.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Serialize, Serializer};

/// A count that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts `more`.
    pub fn add(&self, more: u64) {
        // A number for people to look at: nothing else hangs on it.
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Serialize for Counter {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.get())
    }
}

/// A disk's counts.
#[derive(Debug, Default, Serialize)]
pub struct BlockMetrics {
    /// Reads that were answered well.
    pub reads: Counter,
    /// What they moved.
    pub read_bytes: Counter,
    /// Writes that were answered well.
    pub writes: Counter,
    /// What they moved.
    pub written_bytes: Counter,
    /// Flushes that were answered well.
    pub flushes: Counter,
    /// Discards and write-zeroes that were answered well.
    pub zeroes: Counter,
    /// Requests that were answered with an error, senseless ones too.
    pub errors: Counter,
    /// How often the rate limit held it up.
    pub limited: Counter,
}

/// A network card's counts, from the guest's point of view.
#[derive(Debug, Default, Serialize)]
pub struct NetMetrics {
    /// Frames that the guest was given.
    pub received_frames: Counter,
    /// Their bytes, without the virtio header.
    pub received_bytes: Counter,
    /// Frames that the guest sent.
    pub sent_frames: Counter,
    /// Their bytes, without the virtio header.
    pub sent_bytes: Counter,
    /// Frames of either direction that were lost: too long for the guest's buffers, or refused by the host's kernel.
    pub dropped_frames: Counter,
    /// How often a rate limit held it up.
    pub limited: Counter,
}

/// What stands for counts where the kernel moves a network card's frames: it counts them at the TAP device
/// (`ip -s link`), from the host's point of view, and tells nobody in a jail.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Vhost {
    vhost: bool,
}

/// Says that there are no counts.
pub const VHOST: Vhost = Vhost { vhost: true };

/// The vsock's counts.
#[derive(Debug, Default, Serialize)]
pub struct VsockMetrics {
    /// Packets that the guest was given.
    pub received_packets: Counter,
    /// Packets that the guest sent.
    pub sent_packets: Counter,
}

/// The source of randomness's counts.
#[derive(Debug, Default, Serialize)]
pub struct RngMetrics {
    /// Random bytes that the guest was given.
    pub bytes: Counter,
}

/// The balloon's counts.
#[derive(Debug, Default, Serialize)]
pub struct BalloonMetrics {
    /// Requests by which the guest gave memory away: inflations, and reports of free pages.
    pub given_back: Counter,
    /// Requests of those that the host could not carry out.
    pub errors: Counter,
}

/// The counts of one device.
#[derive(Debug, Clone)]
pub enum Metrics {
    /// See [`BlockMetrics`].
    Block(Arc<BlockMetrics>),
    /// See [`NetMetrics`].
    Net(Arc<NetMetrics>),
    /// See [`Vhost`].
    Vhost(Vhost),
    /// See [`VsockMetrics`].
    Vsock(Arc<VsockMetrics>),
    /// See [`RngMetrics`].
    Rng(Arc<RngMetrics>),
    /// See [`BalloonMetrics`].
    Balloon(Arc<BalloonMetrics>),
}

impl Serialize for Metrics {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Block(counts) => counts.as_ref().serialize(serializer),
            Self::Net(counts) => counts.as_ref().serialize(serializer),
            Self::Vhost(none) => none.serialize(serializer),
            Self::Vsock(counts) => counts.as_ref().serialize(serializer),
            Self::Rng(counts) => counts.as_ref().serialize(serializer),
            Self::Balloon(counts) => counts.as_ref().serialize(serializer),
        }
    }
}
