//! The registers of one virtio device: virtio over MMIO, version 2 (virtio 1.2, section 4.2).
//!
//! ```text
//!  status 0 ──ACKNOWLEDGE, DRIVER──► features ──FEATURES_OK──► queues ──DRIVER_OK──► running
//!     ▲                                                                                 │
//!     └──────────────── write 0 (reset) ────────────────────────────────────────────────┘
//! ```
//!
//! Registers are read and written by vCPU threads. Once the driver is ready, its notifications no
//! longer come here: KVM turns them into events that wake the device's worker.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_queue::QueueT;

use super::queue::{VirtQueue, VirtQueueState};
use super::worker::{Interrupt, Parked, Worker};
use super::{Device, DeviceState, EVENT_IDX, INDIRECT_DESC, Kind, Metrics, VERSION_1};
use crate::boot::layout;
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

/// The registers' values, all under the driver's control.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Registers {
    offered_select: u32,
    accepted_select: u32,
    accepted: u64,
    queue_select: u32,
    status: u32,
}

impl Registers {
    /// Whether the driver is ready, and the device too.
    fn runs(&self) -> bool {
        self.status & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET)
            == VIRTIO_CONFIG_S_DRIVER_OK
    }
}

/// What a driver reads of a device beside its registers, and for some devices writes.
#[derive(Debug)]
struct ConfigSpace {
    bytes: Vec<u8>,
    /// What the driver may write.
    writable: Range<usize>,
    /// Changes with every change of the host's, so that a driver knows when to read again.
    generation: u32,
}

/// A device in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// What kind it was.
    pub kind: Kind,
    /// Its own part.
    pub device: DeviceState,
    registers: Registers,
    interrupt_status: u32,
    queues: Vec<VirtQueueState>,
    /// The configuration space, if it can change.
    config: Option<Vec<u8>>,
}

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
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
    /// A device in its reset state.
    pub fn new(device: Box<dyn Device>, ram: Arc<GuestRam>, trace: Arc<Trace>) -> io::Result<Self> {
        let queues = device
            .queue_sizes()
            .iter()
            .map(|max| VirtQueue::new(*max))
            .collect::<Result<_, _>>()?;
        Self::build(device, queues, ram, trace)
    }

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
            config: ConfigSpace {
                bytes: device.config(),
                writable: device.driver_config(),
                generation: 0,
            },
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
            let notify = window + u64::from(reg::VIRTIO_MMIO_QUEUE_NOTIFY);
            for (number, queue) in parked.queues.iter().enumerate() {
                let address = IoEventAddress::Mmio(notify);
                vm.register_ioevent(queue.kick(), &address, number as u32)
                    .map_err(io_error)?;
            }
        }
        vm.register_irqfd(self.interrupt.line(), gsi)
            .map_err(io_error)
    }

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

    /// Hands the device to a worker.
    fn start(&mut self) {
        match std::mem::replace(&mut self.slot, Slot::Lost) {
            Slot::AtRest(parked) => {
                let spawned = Worker::spawn(
                    *parked,
                    self.ram.clone(),
                    self.registers.accepted,
                    self.interrupt.clone(),
                    self.trace.clone(),
                );
                match spawned {
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

    /// Stops the device's worker, at a point where no request is half done.
    pub fn pause(&mut self) {
        self.slot = match std::mem::replace(&mut self.slot, Slot::Lost) {
            Slot::Running(worker) => match worker.stop() {
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

impl ConfigSpace {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.bytes.get(offset..));
        for (target, source) in data.iter_mut().zip(bytes.unwrap_or_default()) {
            *target = *source;
        }
    }

    /// A driver's write: all of it, or nothing.
    fn write(&mut self, offset: u64, data: &[u8]) {
        let end = offset.saturating_add(data.len() as u64);
        let (start, limit) = (self.writable.start as u64, self.writable.end as u64);
        if offset >= start && end <= limit {
            self.bytes[offset as usize..end as usize].copy_from_slice(data);
        }
    }

    /// What the former driver wrote is not the next one's: a balloon without a driver holds nothing.
    fn forget_driver(&mut self) {
        self.bytes[self.writable.clone()].fill(0);
    }

    /// The host's write.
    fn set(&mut self, at: usize, bytes: &[u8]) {
        if let Some(part) = self.bytes.get_mut(at..at.saturating_add(bytes.len())) {
            part.copy_from_slice(bytes);
            self.generation = self.generation.wrapping_add(1);
        }
    }

    fn save(&self) -> Option<Vec<u8>> {
        (!self.writable.is_empty()).then(|| self.bytes.clone())
    }

    fn restore(&mut self, saved: Option<&[u8]>) -> io::Result<()> {
        let expected = self.save();
        if saved.map(<[u8]>::len) != expected.as_deref().map(<[u8]>::len) {
            return Err(io::Error::other(
                "its configuration space has another length",
            ));
        }
        if let Some(saved) = saved {
            self.bytes.copy_from_slice(saved);
        }
        Ok(())
    }
}

impl Drop for Transport {
    /// Ends the worker's thread, if there is one.
    fn drop(&mut self) {
        self.pause();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::Context;
    use crate::virtio::balloon::Balloon;
    use crate::virtio::rng::Rng;
    use crate::virtio::testing::{self, Driver};
    use proptest::prelude::*;

    fn transport(driver: &Driver) -> Transport {
        Transport::new(
            Box::new(Rng::default()),
            driver.ram.clone(),
            testing::trace(),
        )
        .unwrap()
    }

    fn get(transport: &mut Transport, offset: u32) -> u32 {
        let mut data = [0; 4];
        transport.read(u64::from(offset), &mut data);
        u32::from_le_bytes(data)
    }

    fn set(transport: &mut Transport, offset: u32, value: u32) {
        transport.write(u64::from(offset), &value.to_le_bytes());
    }

    const STATUS: u32 = reg::VIRTIO_MMIO_STATUS;
    const ALL: u32 = 1 | 2 | 8 | 4;

    /// What Linux's virtio_mmio does before its driver is ready.
    fn set_up(transport: &mut Transport, driver: &Driver) {
        for status in [0, 1, 3] {
            set(transport, STATUS, status);
        }
        set(transport, reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        set(
            transport,
            reg::VIRTIO_MMIO_DRIVER_FEATURES,
            (VERSION_1 >> 32) as u32,
        );
        set(transport, STATUS, 11);
        set(transport, reg::VIRTIO_MMIO_QUEUE_SEL, 0);
        set(transport, reg::VIRTIO_MMIO_QUEUE_NUM, 16);
        let rings = driver.queue.save_addresses();
        set(transport, reg::VIRTIO_MMIO_QUEUE_DESC_LOW, rings.0 as u32);
        set(transport, reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, rings.1 as u32);
        set(transport, reg::VIRTIO_MMIO_QUEUE_USED_LOW, rings.2 as u32);
        set(transport, reg::VIRTIO_MMIO_QUEUE_READY, 1);
        set(transport, STATUS, ALL);
    }

    #[test]
    fn a_driver_brings_a_device_up_and_gets_an_answer() {
        let mut driver = Driver::new(16);
        let mut transport = transport(&driver);
        assert_eq!(get(&mut transport, 0), MAGIC);
        assert_eq!(get(&mut transport, 8), 4);
        driver.offer(&[testing::Descriptor::at(0x8000, 64, testing::WRITE)]);
        set_up(&mut transport, &driver);
        assert_eq!(get(&mut transport, STATUS), ALL);
        assert_eq!(driver.wait_used(1), [(0, 64)]);
        assert!(matches!(transport.slot, Slot::Running(_)));
        set(&mut transport, STATUS, 0);
        assert_eq!(get(&mut transport, STATUS), 0);
        assert!(matches!(transport.slot, Slot::AtRest(_)));
    }

    #[test]
    fn a_paused_device_is_saved_restored_and_goes_on() {
        let mut driver = Driver::new(16);
        let mut first = transport(&driver);
        set_up(&mut first, &driver);
        driver.offer(&[testing::Descriptor::at(0x8000, 8, testing::WRITE)]);
        let Slot::Running(_) = first.slot else {
            panic!()
        };
        // No notification: the worker may or may not have seen the request when it stops.
        first.pause();
        let state = first.save().unwrap();
        drop(first);
        let mut second = Transport::restore(
            Box::new(Rng::default()),
            &state,
            driver.ram.clone(),
            testing::trace(),
        )
        .unwrap();
        assert_eq!(second.save().unwrap(), state);
        second.resume();
        assert_eq!(driver.wait_used(1), [(0, 8)]);
        second.pause();
    }

    #[test]
    fn queues_outside_memory_need_a_reset() {
        let driver = Driver::new(16);
        let mut transport = transport(&driver);
        set_up(&mut transport, &driver);
        set(&mut transport, STATUS, 0);
        for status in [1, 3] {
            set(&mut transport, STATUS, status);
        }
        set(&mut transport, reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        set(
            &mut transport,
            reg::VIRTIO_MMIO_DRIVER_FEATURES,
            (VERSION_1 >> 32) as u32,
        );
        set(&mut transport, STATUS, 11);
        set(&mut transport, reg::VIRTIO_MMIO_QUEUE_DESC_HIGH, u32::MAX);
        set(&mut transport, reg::VIRTIO_MMIO_QUEUE_READY, 1);
        set(&mut transport, STATUS, ALL);
        assert_eq!(
            get(&mut transport, STATUS),
            ALL | VIRTIO_CONFIG_S_NEEDS_RESET
        );
        assert_eq!(get(&mut transport, reg::VIRTIO_MMIO_INTERRUPT_STATUS), 2);
        set(&mut transport, STATUS, 0);
        set_up(&mut transport, &driver);
        assert_eq!(get(&mut transport, STATUS), ALL);
        transport.pause();
    }

    /// A device whose queues the kernel has while it runs.
    #[derive(Debug, Default)]
    struct Lender(Rng);

    impl Device for Lender {
        fn kind(&self) -> Kind {
            self.0.kind()
        }

        fn features(&self) -> u64 {
            self.0.features()
        }

        fn queue_sizes(&self) -> &'static [u16] {
            self.0.queue_sizes()
        }

        fn config(&self) -> Vec<u8> {
            self.0.config()
        }

        fn start(&mut self, cx: &mut Context) -> io::Result<()> {
            cx.lend_queues();
            Ok(())
        }

        fn on_queue(&mut self, cx: &mut Context, index: usize) {
            // Whoever asks for the registers knows now that it has started.
            self.0.on_queue(cx, index);
        }

        fn stop(&mut self, cx: &mut Context) {
            cx.take_queues_back();
        }

        fn metrics(&self) -> Metrics {
            self.0.metrics()
        }

        fn save(&self) -> DeviceState {
            self.0.save()
        }
    }

    #[test]
    fn with_its_queues_at_the_kernel_an_interrupt_always_has_a_reason() {
        let mut driver = Driver::new(16);
        let make = || Box::new(Lender::default());
        let (ram, trace) = (driver.ram.clone(), testing::trace());
        let mut first = Transport::new(make(), ram.clone(), trace.clone()).unwrap();
        driver.offer(&[testing::Descriptor::at(0x8000, 8, testing::WRITE)]);
        set_up(&mut first, &driver);
        assert_eq!(driver.wait_used(1), [(0, 8)]);
        let status = reg::VIRTIO_MMIO_INTERRUPT_STATUS;
        let acknowledge = reg::VIRTIO_MMIO_INTERRUPT_ACK;
        for _ in 0..2 {
            assert_eq!(get(&mut first, status), 1);
            set(&mut first, acknowledge, 1);
        }
        // Others are as ever.
        first.interrupt.raise_config();
        assert_eq!(get(&mut first, status), 3);
        set(&mut first, acknowledge, 3);
        assert_eq!(get(&mut first, status), 1);
        // At rest it is one like all others, that nobody has acknowledged.
        first.pause();
        let state = first.save().unwrap();
        let _ = first.interrupt.line().read();
        first.resume();
        assert!(first.interrupt.line().read().is_ok(), "told once more");
        set(&mut first, STATUS, 0);
        assert_eq!(get(&mut first, status), 0, "after a reset");
        let plain = Box::new(Rng::default());
        let mut second = Transport::restore(plain, &state, ram, trace).unwrap();
        assert_eq!(get(&mut second, status), 1);
        set(&mut second, acknowledge, 1);
        assert_eq!(get(&mut second, status), 0);
    }

    #[test]
    fn features_not_offered_are_refused() {
        let driver = Driver::new(16);
        let mut transport = transport(&driver);
        for status in [1, 3] {
            set(&mut transport, STATUS, status);
        }
        set(&mut transport, reg::VIRTIO_MMIO_DRIVER_FEATURES, 1 << 5);
        set(&mut transport, STATUS, 11);
        assert_eq!(get(&mut transport, STATUS), 3);
    }

    #[test]
    fn a_snapshot_of_another_device_is_refused() {
        let driver = Driver::new(16);
        let mut state = transport(&driver).save().unwrap();
        let restore = |state: &TransportState| {
            Transport::restore(
                Box::new(Rng::default()),
                state,
                driver.ram.clone(),
                testing::trace(),
            )
            .map(|_| ())
            .map_err(|error| error.to_string())
        };
        state.registers.accepted = 1 << 60;
        restore(&state).unwrap(); // the driver has not been told yet that it may
        state.registers.status = 11;
        assert!(restore(&state).unwrap_err().contains("features"));
        (state.registers.accepted, state.registers.status) = (0, 3);
        state.queues[0].ready = true;
        state.queues[0].used_ring = 0xffff_fff0;
        restore(&state).unwrap(); // the driver has not said yet that it is ready
        state.registers.status = ALL;
        assert!(restore(&state).unwrap_err().contains("outside"));
        state.queues[0].size = 3;
        restore(&state).unwrap_err();
        state.kind = Kind::Net;
        assert!(restore(&state).unwrap_err().contains("net"));
    }

    #[test]
    fn a_driver_writes_its_part_of_the_configuration_and_no_other() {
        let driver = Driver::new(16);
        let make = || Box::new(Balloon::default());
        let (ram, trace) = (driver.ram, testing::trace());
        let mut transport = Transport::new(make(), ram.clone(), trace.clone()).unwrap();
        let generation = get(&mut transport, reg::VIRTIO_MMIO_CONFIG_GENERATION);
        transport.set_config(0, &7_u32.to_le_bytes());
        assert_ne!(
            get(&mut transport, reg::VIRTIO_MMIO_CONFIG_GENERATION),
            generation
        );
        set(&mut transport, 0x104, 5);
        for (offset, data) in [
            (0x100, &[9; 4][..]),
            (0x103, &[9; 2]),
            (0x107, &[9; 2]),
            (0x108, &[9; 1]),
            (u64::MAX, &[9; 4]),
        ] {
            transport.write(offset, data);
        }
        assert_eq!(transport.config(), [7, 0, 0, 0, 5, 0, 0, 0]);

        let state = transport.save().unwrap();
        let restored = Transport::restore(make(), &state, ram.clone(), trace.clone()).unwrap();
        assert_eq!(restored.config(), transport.config());
        set(&mut transport, STATUS, 0);
        assert_eq!(
            transport.config(),
            [7, 0, 0, 0, 0, 0, 0, 0],
            "after a reset"
        );
        for config in [None, Some(vec![0; 7]), Some(vec![0; 9])] {
            let state = TransportState {
                config,
                ..state.clone()
            };
            assert!(Transport::restore(make(), &state, ram.clone(), trace.clone()).is_err());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Any sequence of register accesses leaves a device that can still be reset and used.
        #[test]
        fn any_register_accesses_are_survived(
            accesses in prop::collection::vec(
                (0..0x140_u64, any::<u32>(), 0..9_usize, any::<bool>(), any::<bool>()), 0..200)
        ) {
            let mut driver = Driver::new(16);
            let mut transport = transport(&driver);
            for (offset, value, width, small, write) in accesses {
                let value = u64::from(if small { value & 15 } else { value });
                let offset = if small { offset & !3 } else { offset };
                if write {
                    transport.write(offset, &value.to_le_bytes()[..if small { 4 } else { width }]);
                } else {
                    transport.read(offset, &mut [0; 8][..width]);
                }
            }
            driver.offer(&[testing::Descriptor::at(0x8000, 8, testing::WRITE)]);
            set_up(&mut transport, &driver);
            prop_assert_eq!(driver.wait_used(1), [(0, 8)]);
            transport.pause();
        }
    }
}
