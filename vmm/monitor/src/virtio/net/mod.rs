//! The network card (virtio 1.2, section 5.1): one pair of queues on a TAP device.
//!
//! A frame for the guest is read into a buffer of the device's own and laid into as many of the guest's
//! buffers as it needs (`VIRTIO_NET_F_MRG_RXBUF`); one that does not fit yet waits, and the TAP is left
//! alone until it does. A frame from the guest goes to the TAP in one `writev`, straight from guest
//! memory. What the frames say is the business of the host's rules at the TAP.
//!
//! That is [`Net`]. With [`vhost`] the host's kernel does all of it for a card that is the same to its guest.

pub mod reply;
pub mod segment;
pub mod tap;
pub mod vhost;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
};

use self::reply::FirstReply;
use self::tap::{Offloads, Tap, VNET_HEADER_BYTES};
use super::chain::Chain;
use super::limit::Limiter;
use super::metrics::NetMetrics;
use super::worker::{FIRST_DEVICE_TOKEN, Ready};
use super::{Context, Device, DeviceState, Kind, Metrics};
use crate::config::{MacAddr, NetConfig};
use crate::wake::SharedWake;

/// A network card on a link to the host.
#[derive(Debug)]
pub struct Net<L = Tap> {
    link: L,
    mac: MacAddr,
    /// The frame read last, its header first; `waiting` bytes of it have not reached the guest.
    frame: Box<[u8]>,
    waiting: usize,
    /// Whether the link is watched: not while the guest has no buffers, or has had all that it may.
    watching: bool,
    receiving: Limiter,
    transmitting: Limiter,
    /// When the limit of each queue ends, while it holds.
    waits: [Option<Instant>; 2],
    metrics: Arc<NetMetrics>,
    first_reply: FirstReply,
}

/// What a snapshot must hold: only what must not have changed. A frame that waited is lost, as frames
/// may be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    mac: MacAddr,
}

impl NetState {
    /// Checks that a card with the address `mac` is the one that the snapshot's guest knew.
    pub fn check(&self, mac: MacAddr) -> io::Result<()> {
        if self.mac == mac {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "the network card had address {} when the snapshot was taken, and now has {}",
            String::from(self.mac),
            String::from(mac)
        )))
    }
}

/// The host's end of the cable. One read or write is one frame, with its header.
pub trait Link: AsFd + Send + std::fmt::Debug {
    /// Says what the guest's driver can do.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;
}

impl Link for Tap {
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        Tap::set_offloads(self, offloads)
    }
}

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZE: u16 = 256;
const FEATURES: u64 = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6;
const LINK: u64 = FIRST_DEVICE_TOKEN;
/// The longest IP packet, its Ethernet header with a VLAN tag, and the virtio header.
const FRAME_BYTES: usize = 65535 + 18 + VNET_HEADER_BYTES;
/// Where `num_buffers` is in the header.
const NUM_BUFFERS: usize = 10;
/// The longest frame spans at most as many buffers as this, with the 1.5 KiB and more of real drivers;
/// with fewer bytes in each it is dropped.
const MAX_BUFFERS: usize = 64;
/// After so many frames in one direction the others have their turn.
const FRAMES_PER_ROUND: usize = 128;

impl<L: Link> Net<L> {
    /// A card with the address `mac` on `link`.
    pub fn new(link: L, mac: MacAddr) -> Self {
        Self {
            link,
            mac,
            frame: vec![0; FRAME_BYTES].into_boxed_slice(),
            waiting: 0,
            watching: false,
            receiving: Limiter::default(),
            transmitting: Limiter::default(),
            waits: [None; 2],
            metrics: Arc::default(),
            first_reply: FirstReply::default(),
        }
    }

    /// The same, within the limits of `config`.
    pub fn limited(self, config: &NetConfig) -> Self {
        Self {
            receiving: Limiter::new(config.receive_limit.as_ref()),
            transmitting: Limiter::new(config.transmit_limit.as_ref()),
            ..self
        }
    }

    /// The same, for a guest that wakes: the first reply is looked for.
    pub fn waking(self, wake: Arc<SharedWake>) -> Self {
        Self {
            first_reply: FirstReply::of(wake),
            ..self
        }
    }

    /// Moves frames from the link to the guest, until one of them has no more.
    fn receive(&mut self, cx: &mut Context) {
        let mut starved = false;
        self.waits[RECEIVE] = None;
        for _ in 0..FRAMES_PER_ROUND {
            if self.waiting == 0 {
                let now = Instant::now();
                self.waits[RECEIVE] = self.receiving.wait(now);
                if self.waits[RECEIVE].is_some() {
                    self.metrics.limited.add(1);
                    break;
                }
                match read(self.link.as_fd(), &mut self.frame) {
                    // Without a whole header it is not a frame.
                    Ok(len) if len > VNET_HEADER_BYTES => {
                        self.waiting = len;
                        self.receiving.take(len - VNET_HEADER_BYTES, now);
                    }
                    Ok(_) => continue,
                    Err(error) => {
                        if error.kind() != io::ErrorKind::WouldBlock && super::may_log() {
                            tracing::warn!(%error, "cannot read from the TAP device");
                        }
                        break;
                    }
                }
            }
            match self.deliver(cx) {
                Delivery::Done => self.waiting = 0,
                Delivery::Starved => {
                    starved = true;
                    break;
                }
            }
        }
        cx.interrupt(RECEIVE);
        self.watch(cx, !starved && self.waits[RECEIVE].is_none());
    }

    /// Lays the waiting frame into the guest's buffers.
    fn deliver(&mut self, cx: &mut Context) -> Delivery {
        let merge = cx.accepted(VIRTIO_NET_F_MRG_RXBUF);
        let limit = if merge { MAX_BUFFERS } else { 1 };
        let ram = cx.ram.clone();
        let queue = &mut cx.queues[RECEIVE];
        let frame = &mut self.frame[..self.waiting];
        let mut taken: Vec<(u16, u32)> = Vec::with_capacity(4);
        let mut first = None;
        let mut done = 0;
        while done < frame.len() && taken.len() < limit {
            let Some(descriptors) = queue.pop(&ram) else {
                // Asked for notifications first, or a buffer offered just now would be missed.
                if queue.unmute(&ram) {
                    continue;
                }
                for _ in &taken {
                    queue.undo_pop();
                }
                return Delivery::Starved;
            };
            let head = descriptors.head_index();
            let Ok(chain) = Chain::map(&ram, descriptors) else {
                taken.push((head, 0));
                break; // costs the guest this frame
            };
            let len = chain.writable.write(0, &frame[done..]);
            done += len;
            taken.push((head, len as u32)); // at most FRAME_BYTES
            first.get_or_insert(chain.writable);
        }
        if done < frame.len() {
            // The guest's buffers are too small for it: dropped, and they come back empty.
            for (head, _) in taken {
                queue.push(&ram, head, 0);
            }
            self.metrics.dropped_frames.add(1);
            return Delivery::Done;
        }
        if let Some(first) = first {
            first.write(NUM_BUFFERS, &(taken.len() as u16).to_le_bytes());
        }
        for (head, len) in taken {
            queue.push(&ram, head, len);
        }
        self.metrics.received_frames.add(1);
        let bytes = self.waiting - VNET_HEADER_BYTES; // `receive` takes no shorter one
        self.metrics.received_bytes.add(bytes as u64);
        self.first_reply.received(&self.frame[..self.waiting]);
        Delivery::Done
    }

    /// Moves frames from the guest to the link.
    fn transmit(&mut self, cx: &mut Context) {
        let ram = cx.ram.clone();
        let queue = &mut cx.queues[TRANSMIT];
        queue.mute(&ram);
        let mut sent = false;
        self.waits[TRANSMIT] = None;
        for _ in 0..FRAMES_PER_ROUND {
            let now = Instant::now();
            self.waits[TRANSMIT] = self.transmitting.wait(now);
            if self.waits[TRANSMIT].is_some() {
                self.metrics.limited.add(1);
                break;
            }
            let Some(descriptors) = queue.pop(&ram) else {
                break;
            };
            sent = true;
            let head = descriptors.head_index();
            if let Ok(chain) = Chain::map(&ram, descriptors) {
                let len = chain.readable.len();
                self.transmitting
                    .take(len.saturating_sub(VNET_HEADER_BYTES), now);
                match send(&chain, self.link.as_fd()) {
                    Ok(()) => {
                        self.metrics.sent_frames.add(1);
                        let bytes = len - VNET_HEADER_BYTES; // as `send` has checked
                        self.metrics.sent_bytes.add(bytes as u64);
                        self.first_reply.sent(&chain.readable);
                    }
                    // A frame the kernel does not take (a header that makes no sense, a device that is
                    // down) is lost, as on any cable.
                    Err(error) => {
                        self.metrics.dropped_frames.add(1);
                        tracing::debug!(%error, len, "a frame of the guest was dropped");
                    }
                }
            }
            queue.push(&ram, head, 0);
        }
        // Until the limit ends, the driver has nothing to tell.
        let more = self.waits[TRANSMIT].is_none() && queue.unmute(&ram);
        if sent {
            cx.spoken("first_frame_out");
        }
        cx.interrupt(TRANSMIT);
        if more {
            cx.again(TRANSMIT);
        }
    }

    fn watch(&mut self, cx: &Context, on: bool) {
        if self.watching == on {
            return;
        }
        if let Err(error) = cx.rewatch(&self.link, LINK, on, false) {
            tracing::warn!(%error, "cannot watch the TAP device");
        }
        self.watching = on;
    }
}

enum Delivery {
    Done,
    /// The frame waits for buffers.
    Starved,
}

impl<L: Link> Device for Net<L> {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    /// `struct virtio_net_config`: the address, then what is only there with features not offered.
    fn config(&self) -> Vec<u8> {
        self.mac.0.to_vec()
    }

    fn start(&mut self, cx: &mut Context) -> io::Result<()> {
        self.link.set_offloads(offloads(cx))?;
        cx.watch(&self.link, LINK, true, false)?;
        self.watching = true;
        Ok(())
    }

    fn on_queue(&mut self, cx: &mut Context, index: usize) {
        match index {
            RECEIVE => self.receive(cx),
            _ => self.transmit(cx),
        }
    }

    fn on_io(&mut self, cx: &mut Context, _token: u64, _ready: Ready) {
        self.receive(cx);
    }

    fn deadline(&self) -> Option<Instant> {
        self.waits.iter().flatten().min().copied()
    }

    fn on_deadline(&mut self, cx: &mut Context, now: Instant) {
        if self.waits[RECEIVE].is_some_and(|until| until <= now) {
            self.receive(cx);
        }
        if self.waits[TRANSMIT].is_some_and(|until| until <= now) {
            self.transmit(cx);
        }
    }

    fn stop(&mut self, cx: &mut Context) {
        self.waits = [None; 2];
        cx.unwatch(&self.link);
    }

    fn reset(&mut self) {
        self.waiting = 0;
    }

    fn metrics(&self) -> Metrics {
        Metrics::Net(self.metrics.clone())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Net(NetState { mac: self.mac })
    }
}

/// What the driver has accepted, for the TAP device.
fn offloads(cx: &Context) -> Offloads {
    Offloads {
        checksum: cx.accepted(VIRTIO_NET_F_GUEST_CSUM),
        tso4: cx.accepted(VIRTIO_NET_F_GUEST_TSO4),
        tso6: cx.accepted(VIRTIO_NET_F_GUEST_TSO6),
    }
}

/// One frame of the guest's, if it is as long as a frame may be.
fn send(chain: &Chain<'_>, link: BorrowedFd<'_>) -> io::Result<()> {
    if !(VNET_HEADER_BYTES + 1..=FRAME_BYTES).contains(&chain.readable.len()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    chain.readable.writev(link).map(drop)
}

fn read(from: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<usize> {
    nix::unistd::read(from, into).map_err(Into::into)
}

#[cfg(test)]
mod tests;
