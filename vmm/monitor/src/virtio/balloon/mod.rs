//! The memory balloon (virtio 1.2, section 5.5): pages that the guest does not use go back to the host.
//!
//! Two ways lead there. The guest *reports* larger runs of free pages by itself, some seconds after they
//! became free (`VIRTIO_BALLOON_F_REPORTING`), and may use them again without asking. And the host may
//! limit the guest's memory while it runs: it writes the balloon's size into the configuration space,
//! and the driver gives that many pages away until the number sinks. A guest in need takes pages out of
//! the balloon before it kills a process (`VIRTIO_BALLOON_F_DEFLATE_ON_OOM`): the limit is a guest's good
//! will, and the monitor's cgroup is what holds one that has none.
//!
//! A page that was given away reads as zeroes when it is used again, or, after a restore, as it was in the
//! last snapshot. Both are the guest's own, and it has been told to expect neither.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::chain::{Buffers, Chain};
use super::metrics::BalloonMetrics;
use super::{Context, Device, DeviceState, Kind, Metrics};
use crate::memory::{GuestRam, PAGE_SIZE, discard};

/// A balloon. How large it is to be and how large it is stands in the configuration space, which is the
/// transport's.
#[derive(Debug, Default)]
pub struct Balloon {
    metrics: Arc<BalloonMetrics>,
}

/// What a snapshot must hold beside the configuration space: nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {}

/// Where `num_pages` is, which the host writes: how large the balloon is to be, in pages of 4 KiB.
pub const TARGET: Range<usize> = 0..4;
/// Where `actual` is, which the driver writes: how large it is.
pub const ACTUAL: Range<usize> = 4..8;

/// What `num_pages` and `actual` count in.
pub const PAGES_PER_MIB: u32 = 256;

/// One of the two numbers in the configuration space, in MiB.
pub fn mib(config: &[u8], part: Range<usize>) -> u32 {
    let number = config.get(part).and_then(<[u8]>::first_chunk);
    number.map_or(0, |bytes| u32::from_le_bytes(*bytes) / PAGES_PER_MIB)
}

/// Feature bits (5.5.3).
const DEFLATE_ON_OOM: u32 = 2;
const REPORTING: u32 = 5;

/// Queues (5.5.2), without those of features that are not offered.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// A page number counts pages of 4 KiB, whatever the guest's are.
const PAGE_SHIFT: u32 = 12;
const NUMBER_BYTES: usize = 4;
/// Linux gives 256 page numbers at a time. What is beyond this in one request stays the guest's.
const MAX_NUMBERS: usize = 4096;
/// Each descriptor costs a system call: so many requests are looked at before the device looks whether it
/// is to stop.
const REQUESTS_PER_ROUND: usize = 16;

impl Device for Balloon {
    fn kind(&self) -> Kind {
        Kind::Balloon
    }

    fn features(&self) -> u64 {
        1 << DEFLATE_ON_OOM | 1 << REPORTING
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64, 64, 64]
    }

    /// `struct virtio_balloon_config`: `num_pages`, `actual`, then what is only there with features not
    /// offered.
    fn config(&self) -> Vec<u8> {
        vec![0; ACTUAL.end]
    }

    fn driver_config(&self) -> Range<usize> {
        ACTUAL
    }

    fn start(&mut self, _cx: &mut Context) -> io::Result<()> {
        Ok(())
    }

    fn on_queue(&mut self, cx: &mut Context, index: usize) {
        let ram = cx.ram.clone();
        let queue = &mut cx.queues[index];
        for _ in 0..REQUESTS_PER_ROUND {
            let Some(descriptors) = queue.pop(&ram) else {
                break;
            };
            let head = descriptors.head_index();
            if let Ok(chain) = Chain::map(&ram, descriptors) {
                let done = match index {
                    INFLATE => inflate(&ram, &chain.readable),
                    // The pages are the guest's again; the host gives them when they are touched.
                    DEFLATE => Ok(()),
                    _ => chain.writable.discard(),
                };
                match done {
                    Ok(()) => self.metrics.given_back.add(u64::from(index != DEFLATE)),
                    Err(error) => {
                        self.metrics.errors.add(1);
                        if super::may_log() {
                            tracing::warn!(%error, "cannot take the guest's pages");
                        }
                    }
                }
            }
            queue.push(&ram, head, 0);
        }
        let more = queue.unmute(&ram);
        cx.interrupt(index);
        if more {
            cx.again(index);
        }
    }

    fn metrics(&self) -> Metrics {
        Metrics::Balloon(self.metrics.clone())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Balloon(BalloonState {})
    }
}

/// Takes the pages whose numbers the guest wrote, as runs where they follow one another, up or down.
fn inflate(ram: &GuestRam, numbers: &Buffers<'_>) -> io::Result<()> {
    let mut bytes = vec![0; numbers.len().min(MAX_NUMBERS * NUMBER_BYTES)];
    numbers.read(0, &mut bytes);
    let mut pages: Vec<u64> = bytes
        .as_chunks::<NUMBER_BYTES>()
        .0
        .iter()
        .map(|number| u64::from(u32::from_le_bytes(*number)))
        .collect();
    pages.sort_unstable();
    for run in pages.chunk_by(|page, next| next - page <= 1) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else {
            continue;
        };
        let len = (last - first + 1) as usize * PAGE_SIZE; // at most MAX_NUMBERS pages
        discard(ram, first << PAGE_SHIFT, len)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
