//! One virtio device as its driver sees it: virtio over MMIO, version 2 (virtio 1.2, section 4.2).
//!
//! ```text
//!  status 0 ──ACKNOWLEDGE, DRIVER──► features ──FEATURES_OK──► queues ──DRIVER_OK──► running
//!     ▲                                                                                 │
//!     └──────────────── write 0 (reset) ────────────────────────────────────────────────┘
//! ```
//!
//! Registers are read and written by vCPU threads. Once the driver is ready, its notifications no
//! longer come here: KVM turns them into events that wake the device's worker.
//!
//! Here a device is started, paused and reset. What a driver reads and writes is in `registers` and
//! `config_space`, what a snapshot holds of both in `state`.

mod config_space;
mod registers;
mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;

use self::config_space::ConfigSpace;
use self::registers::Registers;
pub use self::state::TransportState;
use super::queue::VirtQueue;
use super::worker::{Interrupt, Parked, Worker};
use super::{Device, EVENT_IDX, INDIRECT_DESC, Kind, Metrics, VERSION_1};
use crate::boot::layout;
use crate::jail::threads::Hand;
use crate::memory::GuestRam;
use crate::trace::Trace;

/// A device behind its registers.
#[derive(Debug)]
pub struct Transport {
    kind: Kind,
    metrics: Metrics,
    /// What [`Device::features`] said.
    offered: u64,
    config: ConfigSpace,
    slot: Slot,
    /// Its thread.
    hand: Hand<Parked>,
    ram: Arc<GuestRam>,
    trace: Arc<Trace>,
    interrupt: Arc<Interrupt>,
    registers: Registers,
}

/// Where the device is.
#[derive(Debug)]
enum Slot {
    AtRest(Box<Parked>),
    Running(Worker),
    /// Its worker panicked. Reset does not bring it back.
    Lost,
}

impl Transport {
    /// A device in its reset state.
    pub fn new(device: Box<dyn Device>, ram: Arc<GuestRam>, trace: Arc<Trace>) -> io::Result<Self> {
        let queues = device
            .queue_sizes()
            .iter()
            .map(|max| VirtQueue::new(*max))
            .collect::<Result<_, _>>()?;
        Self::build(device, queues, ram, trace)
    }

    fn build(
        device: Box<dyn Device>,
        queues: Vec<VirtQueue>,
        ram: Arc<GuestRam>,
        trace: Arc<Trace>,
    ) -> io::Result<Self> {
        Ok(Self {
            kind: device.kind(),
            metrics: device.metrics(),
            offered: device.features() | VERSION_1 | INDIRECT_DESC | EVENT_IDX,
            config: ConfigSpace::new(&*device),
            hand: Hand::new(device.thread().name(), device.thread()),
            slot: Slot::AtRest(Box::new(Parked { device, queues })),
            ram,
            trace,
            interrupt: Arc::new(Interrupt::new()?),
            registers: Registers::default(),
        })
    }

    /// Connects window `index` to KVM: notifications come as events, interrupts go as events.
    pub fn connect(&self, vm: &VmFd, index: usize) -> io::Result<()> {
        let window = layout::MMIO_GAP_START + index as u64 * layout::MMIO_WINDOW;
        let gsi = layout::FIRST_DEVICE_GSI + index as u32;
        if gsi > layout::LAST_DEVICE_GSI {
            return Err(io::Error::other("more devices than interrupt lines"));
        }
        let io_error = |error: kvm_ioctls::Error| io::Error::from_raw_os_error(error.errno());
        if let Slot::AtRest(parked) = &self.slot {
            let notify = window + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY);
            for (number, queue) in parked.queues.iter().enumerate() {
                let address = IoEventAddress::Mmio(notify);
                vm.register_ioevent(queue.kick(), &address, number as u32)
                    .map_err(io_error)?;
            }
        }
        vm.register_irqfd(self.interrupt.line(), gsi)
            .map_err(io_error)
    }

    fn activate(&mut self) {
        let ram = self.ram.clone();
        if let Slot::AtRest(parked) = &self.slot
            && parked.queues.iter().all(|queue| queue.is_usable(&ram))
        {
            self.start();
            self.trace.mark(match self.kind {
                Kind::Block => "guest_block_ready",
                Kind::Net => "guest_net_ready",
                Kind::Rng => "guest_rng_ready",
                Kind::Vsock => "guest_vsock_ready",
                Kind::Balloon => "guest_balloon_ready",
            });
        } else {
            if super::may_log() {
                tracing::warn!(
                    device = self.kind.name(),
                    "the guest\'s queues lie outside its memory"
                );
            }
            self.needs_reset();
        }
    }

    fn needs_reset(&mut self) {
        self.registers.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        self.interrupt.raise_config();
    }

    /// Makes the threads that the device will need: before the process is confined, after which nobody may.
    pub fn hire(&mut self) -> io::Result<()> {
        self.hand.hire()?;
        match &mut self.slot {
            Slot::AtRest(parked) => parked.device.hire(),
            Slot::Running(_) | Slot::Lost => Ok(()),
        }
    }

    /// Hands the device to its thread.
    fn start(&mut self) {
        match std::mem::replace(&mut self.slot, Slot::Lost) {
            Slot::AtRest(parked) => {
                let started = Worker::start(
                    &mut self.hand,
                    *parked,
                    self.ram.clone(),
                    self.registers.accepted,
                    self.interrupt.clone(),
                    self.trace.clone(),
                );
                match started {
                    Ok(worker) => self.slot = Slot::Running(worker),
                    Err((error, parked)) => {
                        tracing::error!(device = self.kind.name(), %error, "no worker");
                        self.slot = Slot::AtRest(parked);
                        self.needs_reset();
                    }
                }
            }
            other => self.slot = other,
        }
    }

    /// Has the device stop, at a point where no request is half done.
    pub fn pause(&mut self) {
        self.slot = match std::mem::replace(&mut self.slot, Slot::Lost) {
            Slot::Running(worker) => match worker.stop(&self.hand) {
                Some(parked) => Slot::AtRest(Box::new(parked)),
                None => Slot::Lost,
            },
            other => other,
        };
    }

    /// What kind of device it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What the device has done.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The configuration space as it is now.
    pub fn config(&self) -> &[u8] {
        &self.config.bytes
    }

    /// Changes the configuration space at `at`, and tells the driver.
    pub fn set_config(&mut self, at: usize, bytes: &[u8]) {
        self.config.set(at, bytes);
        if self.registers.runs() {
            self.interrupt.raise_config();
        }
    }

    /// Goes on after [`Transport::pause`] or [`Transport::restore`].
    pub fn resume(&mut self) {
        if self.registers.runs() {
            self.start();
        }
        self.interrupt.raise_pending();
    }

    fn reset(&mut self) {
        self.pause();
        if let Slot::AtRest(parked) = &mut self.slot {
            parked.device.reset();
            for queue in &mut parked.queues {
                queue.reset();
            }
        }
        self.registers = Registers::default();
        self.config.forget_driver();
        self.interrupt.set_status(0);
    }
}

impl Drop for Transport {
    /// So that its thread, which is dropped next, is at rest.
    fn drop(&mut self) {
        self.pause();
    }
}
