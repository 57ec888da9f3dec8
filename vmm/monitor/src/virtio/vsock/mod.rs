//! Sockets between host and guest (virtio 1.2, section 5.10), without the host kernel's vsock: each
//! Machine has its own Unix socket, so context ids need be unique to nobody.
//!
//! - A host program connects to `path`, sends `CONNECT <port>\n`, reads `OK <its port>\n`; from then on
//!   bytes go both ways, and each direction can be closed by itself. If the guest does not listen, the
//!   socket is closed instead.
//! - A guest program that connects to the host's port `n` reaches whoever listens at `<path>_<n>`, or is
//!   refused.
//!
//! `connection` is one such stream, `muxer` all of them, `packet` the header; this file moves
//! packets between the rings and the muxer.

mod connection;
mod muxer;
mod packet;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use self::connection::MAX_PAYLOAD;
use self::muxer::Muxer;
use self::packet::{HEADER_BYTES, Header};
use super::chain::Chain;
use super::metrics::VsockMetrics;
use super::worker::Ready;
use super::{Context, Device, DeviceState, Kind, Metrics};
use crate::config::VsockConfig;

/// The vsock device.
#[derive(Debug)]
pub struct Vsock {
    muxer: Muxer,
    reset: Reset,
    payload: Box<[u8]>,
    metrics: Arc<VsockMetrics>,
}

/// What a snapshot must hold. Connections end with the process that had them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    cid: u64,
}

impl VsockState {
    /// Checks that a snapshot's guest finds the context id it knew.
    pub fn check(&self, config: &VsockConfig) -> io::Result<()> {
        if self.cid == u64::from(config.cid) {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "the guest had context id {} when the snapshot was taken, and now has {}",
            self.cid, config.cid
        )))
    }
}

/// After a restore the guest must forget the connections it had, by an event (5.10.6.7). Only when it
/// has, new ones may begin: its driver would end those too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reset {
    /// Nothing to forget.
    Done,
    /// The event has not been sent.
    Owed,
    /// The event has been sent. The driver gives the event's buffer back when it has handled it; one
    /// that does not is not waited for longer than this.
    Sent(Instant),
}

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;
const QUEUE_SIZE: u16 = 128;
/// `struct virtio_vsock_event` with `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const TRANSPORT_RESET: [u8; 4] = 0_u32.to_le_bytes();
/// Linux handles the event within microseconds of running again; its processor may have to be waited
/// for, on a host that is short of them.
const RESET_PATIENCE: Duration = Duration::from_secs(5);

impl Vsock {
    /// The device of a guest that boots.
    pub fn new(config: &VsockConfig) -> io::Result<Self> {
        Ok(Self {
            muxer: Muxer::bind(config.cid, &config.path)?,
            reset: Reset::Done,
            payload: vec![0; MAX_PAYLOAD].into_boxed_slice(),
            metrics: Arc::default(),
        })
    }

    /// The device of a guest that had connections when it was saved.
    pub fn restore(config: &VsockConfig) -> io::Result<Self> {
        let mut vsock = Self::new(config)?;
        vsock.reset = Reset::Owed;
        Ok(vsock)
    }

    /// Packets from the guest.
    fn transmit(&mut self, cx: &mut Context) {
        let ram = cx.ram.clone();
        cx.queues[TRANSMIT].mute(&ram);
        for _ in 0..cx.queues[TRANSMIT].size() {
            if self.muxer.is_congested() {
                // Looked at again when the guest has taken some of the answers.
                cx.queues[TRANSMIT].unmute(&ram);
                cx.interrupt(TRANSMIT);
                return;
            }
            let Some(descriptors) = cx.queues[TRANSMIT].pop(&ram) else {
                break;
            };
            cx.spoken("first_vsock_out");
            let head = descriptors.head_index();
            self.metrics.sent_packets.add(1);
            if let Ok(chain) = Chain::map(&ram, descriptors) {
                self.take_packet(cx, &chain);
            }
            cx.queues[TRANSMIT].push(&ram, head, 0);
        }
        let more = cx.queues[TRANSMIT].unmute(&ram);
        cx.interrupt(TRANSMIT);
        if more {
            cx.again(TRANSMIT);
        }
    }

    fn take_packet(&mut self, cx: &Context, chain: &Chain<'_>) {
        let mut bytes = [0; HEADER_BYTES];
        if chain.readable.read(0, &mut bytes) < HEADER_BYTES {
            return tracing::debug!("the guest sent part of a vsock header");
        }
        let header = Header::parse(&bytes);
        let len = header.len as usize;
        if len > MAX_PAYLOAD || len > chain.readable.len() - HEADER_BYTES {
            return tracing::debug!(len, "the guest sent a vsock packet that is not all there");
        }
        chain.readable.read(HEADER_BYTES, &mut self.payload[..len]);
        self.muxer.on_packet(cx, &header, &self.payload[..len]);
    }

    /// Packets for the guest.
    fn receive(&mut self, cx: &mut Context) {
        if self.reset != Reset::Done {
            return;
        }
        let ram = cx.ram.clone();
        let was_congested = self.muxer.is_congested();
        for _ in 0..cx.queues[RECEIVE].size() {
            if !self.muxer.has_output() {
                break;
            }
            let Some(descriptors) = cx.queues[RECEIVE].pop(&ram) else {
                if cx.queues[RECEIVE].unmute(&ram) {
                    continue;
                }
                break;
            };
            let head = descriptors.head_index();
            let chain = match Chain::map(&ram, descriptors) {
                Ok(chain) if chain.writable.len() >= HEADER_BYTES => chain,
                _ => {
                    cx.queues[RECEIVE].push(&ram, head, 0);
                    continue;
                }
            };
            let room = chain.writable.len() - HEADER_BYTES;
            let mut written = 0;
            let any = self.muxer.next_packet(cx, room, |header, payload| {
                written =
                    chain.writable.write(0, header) + chain.writable.write(HEADER_BYTES, payload);
            });
            if !any {
                cx.queues[RECEIVE].undo_pop();
                break;
            }
            self.metrics.received_packets.add(1);
            cx.queues[RECEIVE].push(&ram, head, written as u32); // a header and MAX_PAYLOAD at most
        }
        cx.interrupt(RECEIVE);
        if self.muxer.has_output() && cx.queues[RECEIVE].unmute(&ram) {
            cx.again(RECEIVE);
        }
        if was_congested && !self.muxer.is_congested() {
            cx.again(TRANSMIT);
        }
    }

    /// The queue by which the guest is told that its connections are gone.
    fn events(&mut self, cx: &mut Context) {
        match self.reset {
            Reset::Done => {}
            Reset::Owed => self.send_reset(cx),
            Reset::Sent(_) => self.open(cx),
        }
    }

    fn send_reset(&mut self, cx: &mut Context) {
        let ram = cx.ram.clone();
        let Some(descriptors) = cx.queues[EVENT].pop(&ram) else {
            if cx.queues[EVENT].unmute(&ram) {
                cx.again(EVENT);
            }
            return;
        };
        let head = descriptors.head_index();
        let written = Chain::map(&ram, descriptors)
            .map_or(0, |chain| chain.writable.write(0, &TRANSPORT_RESET));
        // Before the driver has the event: it may give the buffer back at once.
        cx.queues[EVENT].notify_of_next(&ram);
        cx.queues[EVENT].push(&ram, head, written as u32);
        self.reset = Reset::Sent(Instant::now() + RESET_PATIENCE);
        cx.interrupt(EVENT);
    }

    fn open(&mut self, cx: &mut Context) {
        self.reset = Reset::Done;
        self.receive(cx);
    }
}

impl Device for Vsock {
    fn kind(&self) -> Kind {
        Kind::Vsock
    }

    fn features(&self) -> u64 {
        0 // streams are always there
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE]
    }

    /// `struct virtio_vsock_config`.
    fn config(&self) -> Vec<u8> {
        self.muxer.guest_cid().to_le_bytes().to_vec()
    }

    fn start(&mut self, cx: &mut Context) -> io::Result<()> {
        if let Reset::Sent(_) = self.reset {
            self.reset = Reset::Done; // paused in between: the guest has had its time
        }
        self.muxer.start(cx)
    }

    fn on_queue(&mut self, cx: &mut Context, index: usize) {
        match index {
            RECEIVE => self.receive(cx),
            TRANSMIT => {
                self.transmit(cx);
                self.receive(cx);
            }
            _ => self.events(cx),
        }
    }

    fn on_io(&mut self, cx: &mut Context, token: u64, ready: Ready) {
        self.muxer.on_io(cx, token, ready);
        self.receive(cx);
    }

    fn deadline(&self) -> Option<Instant> {
        match self.reset {
            Reset::Sent(deadline) => Some(deadline),
            Reset::Owed | Reset::Done => self.muxer.deadline(),
        }
    }

    fn on_deadline(&mut self, cx: &mut Context, now: Instant) {
        if matches!(self.reset, Reset::Sent(deadline) if deadline <= now) {
            tracing::warn!("the guest did not confirm that it forgot its connections");
            self.open(cx);
        }
        self.muxer.on_deadline(cx, now);
        self.receive(cx);
    }

    fn reset(&mut self) {
        self.muxer.clear();
        self.reset = Reset::Done;
    }

    fn metrics(&self) -> Metrics {
        Metrics::Vsock(self.metrics.clone())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(VsockState {
            cid: self.muxer.guest_cid(),
        })
    }
}

#[cfg(test)]
mod tests;
