//! A device and its registers in a snapshot.
//!
//! What is read back may have been written by anyone: nothing of it is used before it has been checked
//! against the device that this Machine has and the memory of its guest.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_FEATURES_OK;

use super::registers::Registers;
use super::{Slot, Transport};
use crate::memory::GuestRam;
use crate::trace::Trace;
use crate::virtio::queue::{VirtQueue, VirtQueueState};
use crate::virtio::{Device, DeviceState, Kind};

/// A device in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// What kind it was.
    pub kind: Kind,
    /// Its own part.
    pub device: DeviceState,
    pub(super) registers: Registers,
    pub(super) interrupt_status: u32,
    pub(super) queues: Vec<VirtQueueState>,
    /// The configuration space, if it can change.
    pub(super) config: Option<Vec<u8>>,
}

impl Transport {
    /// A device as it was when `state` was saved; at rest until [`Transport::resume`]. `device` has
    /// already been made from its own part of the state.
    pub fn restore(
        device: Box<dyn Device>,
        state: &TransportState,
        ram: Arc<GuestRam>,
        trace: Arc<Trace>,
    ) -> io::Result<Self> {
        let sizes = device.queue_sizes();
        if state.kind != device.kind() || state.queues.len() != sizes.len() {
            return Err(io::Error::other(format!(
                "the snapshot has a {} device here, this Machine a {} device",
                state.kind.name(),
                device.kind().name()
            )));
        }
        let queues = sizes
            .iter()
            .zip(&state.queues)
            .map(|(max, queue)| VirtQueue::restore(*max, queue))
            .collect::<Result<Vec<_>, _>>()?;
        // Before it is ready, and when it was told that it cannot be, a driver may have written anything.
        if state.registers.runs() && !queues.iter().all(|queue| queue.is_usable(&ram)) {
            return Err(io::Error::other("a queue lies outside guest memory"));
        }
        let mut transport = Self::build(device, queues, ram, trace)?;
        // Until it has been told that they are fine, the driver's wishes are only that.
        let settled = state.registers.status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        if settled && state.registers.accepted & !transport.offered != 0 {
            return Err(io::Error::other(
                "the driver uses features this device no longer has",
            ));
        }
        transport.config.restore(state.config.as_deref())?;
        transport.registers = state.registers.clone();
        transport.interrupt.set_status(state.interrupt_status);
        Ok(transport)
    }

    /// What a snapshot must hold; the device must be paused.
    pub fn save(&self) -> io::Result<TransportState> {
        let Slot::AtRest(parked) = &self.slot else {
            return Err(io::Error::other(format!(
                "the {} device is not paused",
                self.kind.name()
            )));
        };
        Ok(TransportState {
            kind: self.kind,
            device: parked.device.save(),
            registers: self.registers.clone(),
            interrupt_status: self.interrupt.status(),
            queues: parked.queues.iter().map(VirtQueue::save).collect(),
            config: self.config.save(),
        })
    }
}
