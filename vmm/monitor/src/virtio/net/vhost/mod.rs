//! A network card whose frames the host's kernel moves: vhost-net.
//!
//! ```text
//!  guest ──notification: ioeventfd──► vhost-net ◄──frames──► TAP
//!    ▲                                    │
//!    └────────interrupt: irqfd────────────┘
//! ```
//!
//! No thread of the monitor takes part in that: the card's worker sets the kernel up, sleeps until a pause, a
//! reset or an error, and takes the queues back. To the guest it is the same card as [`Net`](super::Net), and to a
//! snapshot too, which may be taken with one and restored with the other.
//!
//! What the guest writes into its rings the kernel checks against the table of its memory, as it does for
//! every user of vhost; where the rings are has been checked here before. What the kernel cannot use costs a line in
//! the log: it goes on at the next notification, and a chain that made no sense may never come back, which is
//! its driver's loss; the driver may reset the card. The kernel writes through this process's mapping of the guest's
//! memory, so a snapshot finds those pages like all others.
//!
//! Frames are not counted and not limited here: `vm.json` with a limit and vhost for one card is refused.

mod kernel;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vmm_sys_util::eventfd::EventFd;

use self::kernel::{Events, Vhost};
use super::tap::Tap;
use super::{FEATURES, NetState, QUEUE_SIZE, offloads};
use crate::config::MacAddr;
use crate::jail::seccomp::ThreadKind;
use crate::virtio::metrics::VHOST;
use crate::virtio::worker::{FIRST_DEVICE_TOKEN, Ready};
use crate::virtio::{
    Context, Device, DeviceState, EVENT_IDX, INDIRECT_DESC, Kind, Metrics, VERSION_1, may_log,
};

/// A network card on a TAP device, with the kernel in between.
#[derive(Debug)]
pub struct VhostNet {
    kernel: Vhost,
    tap: Tap,
    mac: MacAddr,
    errors: Errors,
    /// The queues that the kernel has.
    lent: [bool; QUEUES],
}

/// The event of a queue that the kernel cannot use.
#[derive(Debug)]
struct Errors(EventFd);

const QUEUES: usize = 2;
const ERRORS: u64 = FIRST_DEVICE_TOKEN;
/// What of the driver's features the kernel must know, and have. Of the others the TAP device is told; that the
/// frames' headers go through it, too, is `VHOST_NET_F_VIRTIO_NET_HDR` left out.
const KERNEL_FEATURES: u64 = VERSION_1 | INDIRECT_DESC | EVENT_IDX | 1 << VIRTIO_NET_F_MRG_RXBUF;

impl VhostNet {
    /// A card with the address `mac` on `tap`.
    pub fn open(tap: Tap, mac: MacAddr) -> io::Result<Self> {
        let kernel = Vhost::open()?;
        let missing = KERNEL_FEATURES & !kernel.features()?;
        if missing != 0 {
            // A card that offered less would not be the one that a snapshot's guest knows.
            return Err(io::Error::other(format!(
                "this kernel's vhost-net lacks virtio features {missing:#x}"
            )));
        }
        Ok(Self {
            kernel,
            tap,
            mac,
            errors: Errors(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?),
            lent: [false; QUEUES],
        })
    }
}

impl Device for VhostNet {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn thread(&self) -> ThreadKind {
        ThreadKind::VhostNet
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn config(&self) -> Vec<u8> {
        self.mac.0.to_vec()
    }

    fn start(&mut self, cx: &mut Context) -> io::Result<()> {
        self.tap.set_offloads(offloads(cx))?;
        self.kernel.claim(&cx.ram)?;
        self.kernel.set_features(cx.features & KERNEL_FEATURES)?;
        let _ = self.errors.0.read(); // of the last driver; EAGAIN if there is none
        cx.watch(&self.errors, ERRORS, true, false)?;
        let line = cx.lend_queues();
        for (index, queue) in (0..).zip(&cx.queues) {
            // One that the driver has left alone never holds anything.
            if !queue.is_ready() {
                continue;
            }
            let events = Events {
                kick: queue.kick(),
                call: line,
                error: self.errors.as_fd(),
            };
            self.kernel.set_up(index, queue, events)?;
            self.lent[index as usize] = true;
        }
        for index in lent(&self.lent) {
            self.kernel
                .set_backend(index as u32, Some(self.tap.as_fd()))?;
        }
        Ok(())
    }

    /// Before anything else happens: the driver may have spoken while nobody listened.
    fn on_queue(&mut self, cx: &mut Context, index: usize) {
        cx.again(index);
    }

    fn on_io(&mut self, cx: &mut Context, _token: u64, _ready: Ready) {
        if may_log() {
            tracing::warn!("the guest broke a virtqueue of its network card; vhost-net says so");
        }
        // Once is enough until the driver sets the card up anew.
        cx.unwatch(&self.errors);
    }

    /// # Panics
    ///
    /// Where the kernel keeps a queue or does not say how far it came, which no kernel does: it would write
    /// to memory that a snapshot is taken of, or what it has done would be done again.
    fn stop(&mut self, cx: &mut Context) {
        for index in lent(&self.lent) {
            if let Err(error) = self.kernel.set_backend(index as u32, None) {
                panic!("vhost-net does not let go of queue {index}: {error}");
            }
        }
        for index in lent(&std::mem::take(&mut self.lent)) {
            match self.kernel.position(index as u32) {
                Ok(position) => cx.queues[index].go_on_at(&cx.ram, position),
                Err(error) => panic!("vhost-net has lost queue {index}: {error}"),
            }
        }
        cx.take_queues_back();
        cx.unwatch(&self.errors);
    }

    fn metrics(&self) -> Metrics {
        Metrics::Vhost(VHOST)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Net(NetState { mac: self.mac })
    }
}

/// The numbers of those that are.
fn lent(queues: &[bool; QUEUES]) -> impl Iterator<Item = usize> + use<> {
    let queues = *queues;
    (0..QUEUES).filter(move |index| queues[*index])
}

impl AsFd for Errors {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests;
