use super::registers::MAGIC;
use super::*;
use crate::virtio::balloon::Balloon;
use crate::virtio::rng::Rng;
use crate::virtio::testing::{self, Driver};
use crate::virtio::{Context, DeviceState};
use proptest::prelude::*;
use virtio_bindings::virtio_mmio as reg;

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
