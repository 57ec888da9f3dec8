//! The window of registers (4.2.2): how a driver finds a device, chooses features, sets queues up and says
//! that it is ready.
//!
//! A driver may read and write anything at any time. What comes out of turn changes nothing, so that the
//! other code sees features and queues only as 3.1.1 allows them.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_queue::QueueT;

use super::{Slot, Transport};
use crate::virtio::queue::VirtQueue;
use crate::virtio::{EVENT_IDX, VERSION_1};

/// The registers' values, all under the driver's control.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Registers {
    pub(super) offered_select: u32,
    pub(super) accepted_select: u32,
    pub(super) accepted: u64,
    pub(super) queue_select: u32,
    pub(super) status: u32,
}

impl Registers {
    /// Whether the driver is ready, and the device too.
    pub(super) fn runs(&self) -> bool {
        self.status & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET)
            == VIRTIO_CONFIG_S_DRIVER_OK
    }
}

pub(super) const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"TERN");
const CONFIG: u64 = reg::VIRTIO_MMIO_CONFIG as u64;
/// How a driver brings a device up (3.1.1).
const STEPS: [u32; 4] = [
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_DRIVER_OK,
];
/// "No such region" for every shared memory register (4.2.2: length and base all ones).
const SHARED_MEMORY: std::ops::RangeInclusive<u32> = 0xb0..=0xbc;

impl Transport {
    /// Answers the driver's read of a register.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG {
            return self.config.read(offset - CONFIG, data);
        }
        match <&mut [u8; 4]>::try_from(data) {
            Ok(word) => *word = self.register(offset as u32).to_le_bytes(),
            Err(_) => tracing::debug!(offset, "the guest read part of a register"),
        }
    }

    fn register(&mut self, offset: u32) -> u32 {
        let half = |value: u64, select: u32| match select {
            0 => value as u32,
            1 => (value >> 32) as u32,
            _ => 0,
        };
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.kind.id(),
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered, self.registers.offered_select),
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => self
                .selected()
                .map_or(0, |queue| queue.registers().max_size().into()),
            reg::VIRTIO_MMIO_QUEUE_READY => self
                .selected()
                .map_or(0, |queue| queue.registers().ready().into()),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            reg::VIRTIO_MMIO_STATUS => self.registers.status,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => self.config.generation,
            offset if SHARED_MEMORY.contains(&offset) => u32::MAX,
            _ => 0,
        }
    }

    /// Carries out the driver's write to a register.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            return self.config.write(offset - CONFIG, data);
        }
        let (Ok(offset), Ok(word)) = (u32::try_from(offset), data.try_into()) else {
            return;
        };
        let value = u32::from_le_bytes(word);
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.registers.offered_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.registers.accepted_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.registers.queue_select = value,
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            reg::VIRTIO_MMIO_STATUS => self.set_status(value),
            _ => self.configure_queue(offset, value),
        }
    }

    fn accept_features(&mut self, value: u32) {
        if self.has(VIRTIO_CONFIG_S_FEATURES_OK) || !self.has(VIRTIO_CONFIG_S_DRIVER) {
            return;
        }
        let shift = match self.registers.accepted_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        let mask = u64::from(u32::MAX) << shift;
        self.registers.accepted = self.registers.accepted & !mask | u64::from(value) << shift;
    }

    /// Queues are set up between the choice of features and the driver's "ready".
    fn configure_queue(&mut self, offset: u32, value: u32) {
        if !self.has(VIRTIO_CONFIG_S_FEATURES_OK) || self.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            return;
        }
        let event_idx = self.registers.accepted & EVENT_IDX != 0;
        let Some(queue) = self.selected() else { return };
        let queue = queue.registers();
        let (low, high) = (Some(value), None);
        match offset {
            reg::VIRTIO_MMIO_QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            reg::VIRTIO_MMIO_QUEUE_READY => {
                queue.set_event_idx(event_idx);
                queue.set_ready(value == 1);
            }
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(low, high),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(high, low),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(low, high),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(high, low),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(low, high),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(high, low),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        if value & VIRTIO_CONFIG_S_FAILED != 0 {
            self.registers.status |= VIRTIO_CONFIG_S_FAILED;
        }
        // A driver only ever adds bits, and a step counts only after those before it.
        for step in STEPS {
            if self.has(step) {
                continue;
            }
            // A driver whose features are not acceptable reads the status back, and gives up.
            let refused = step == VIRTIO_CONFIG_S_FEATURES_OK && !self.features_are_acceptable();
            if value & step == 0 || refused {
                return;
            }
            self.registers.status |= step;
            if step == VIRTIO_CONFIG_S_DRIVER_OK {
                self.activate();
            }
        }
    }

    fn features_are_acceptable(&self) -> bool {
        let accepted = self.registers.accepted;
        accepted & !self.offered == 0 && accepted & VERSION_1 != 0
    }

    fn has(&self, bit: u32) -> bool {
        self.registers.status & bit != 0
    }

    /// The selected queue, while the device is at rest.
    fn selected(&mut self) -> Option<&mut VirtQueue> {
        let index = usize::try_from(self.registers.queue_select).ok()?;
        match &mut self.slot {
            Slot::AtRest(parked) => parked.queues.get_mut(index),
            Slot::Running(_) | Slot::Lost => None,
        }
    }
}
