//! The entropy device (virtio 1.2, section 5.4): buffers filled from the host's own generator.

use std::io;
use std::sync::Arc;

use super::chain::Chain;
use super::metrics::RngMetrics;
use super::{Context, Device, DeviceState, Kind, Metrics};

/// A source of randomness; it has no state that its guest knows of.
#[derive(Debug, Default)]
pub struct Rng {
    metrics: Arc<RngMetrics>,
}

/// The driver asks for 64 bytes at a time; more than this in one request would only keep the host's
/// generator busy, and the specification allows to give less.
const MAX_REQUEST: usize = 4096;

impl Device for Rng {
    fn kind(&self) -> Kind {
        Kind::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn start(&mut self, _cx: &mut Context) -> io::Result<()> {
        Ok(())
    }

    fn on_queue(&mut self, cx: &mut Context, index: usize) {
        let ram = cx.ram.clone();
        let queue = &mut cx.queues[index];
        // One round takes what the ring can hold; a driver that offers more is served in the next,
        // after a look at whether the device is to stop.
        for _ in 0..queue.size() {
            let Some(descriptors) = queue.pop(&ram) else {
                break;
            };
            let head = descriptors.head_index();
            let written = Chain::map(&ram, descriptors).map_or(0, |chain| fill(&chain));
            self.metrics.bytes.add(written.into());
            queue.push(&ram, head, written);
        }
        let more = queue.unmute(&ram);
        cx.interrupt(index);
        if more {
            cx.again(index);
        }
    }

    fn metrics(&self) -> Metrics {
        Metrics::Rng(self.metrics.clone())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Rng
    }
}

fn fill(chain: &Chain<'_>) -> u32 {
    let mut bytes = [0; MAX_REQUEST];
    let bytes = &mut bytes[..chain.writable.len().min(MAX_REQUEST)];
    // SAFETY: the pointer and length are those of a buffer of ours.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    let got = usize::try_from(got).unwrap_or(0); // interrupted: the driver asks again
    chain.writable.write(0, &bytes[..got]) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Descriptor, READ, Rings, WRITE};
    use vm_memory::{Bytes, GuestAddress};

    fn device() -> (Rng, Context, Rings) {
        let driver = crate::virtio::testing::Driver::new(16);
        let (rings, queue) = Rings::new(driver.ram.clone(), 0x2_0000, 16);
        (
            Rng::default(),
            Context::for_test(driver.ram, vec![queue], 0),
            rings,
        )
    }

    #[test]
    fn fills_buffers_up_to_its_limit() {
        let (mut rng, mut cx, mut rings) = device();
        rings.offer(&[Descriptor::at(0x8000, 64, WRITE)]);
        rings.offer(&[Descriptor::at(0x10_0000, 1 << 20, WRITE)]);
        rng.on_queue(&mut cx, 0);
        assert_eq!(rings.take_used(), [(0, 64), (1, MAX_REQUEST as u32)]);
        let mut bytes = [0_u8; 64];
        cx.ram.read_slice(&mut bytes, GuestAddress(0x8000)).unwrap();
        assert_ne!(bytes, [0; 64]);
    }

    #[test]
    fn gives_senseless_requests_back_empty() {
        let (mut rng, mut cx, mut rings) = device();
        rings.offer(&[Descriptor::at(0x8000, 64, READ)]);
        rings.offer(&[Descriptor::at(u64::MAX - 8, 64, WRITE)]);
        rng.on_queue(&mut cx, 0);
        assert_eq!(rings.take_used(), [(0, 0), (1, 0)]);
    }
}
