//! The configuration space: what a device says of itself beside its registers (virtio 1.2, section 2.5).
//!
//! The host changes it, and a driver sees by the generation that it has; a driver may write the part that
//! [`Device::driver_config`] names, and nothing else.

use std::io;
use std::ops::Range;

use crate::virtio::Device;

/// What a driver reads of a device beside its registers, and for some devices writes.
#[derive(Debug)]
pub(super) struct ConfigSpace {
    pub(super) bytes: Vec<u8>,
    /// What the driver may write.
    writable: Range<usize>,
    /// Changes with every change of the host's, so that a driver knows when to read again.
    pub(super) generation: u32,
}

impl ConfigSpace {
    /// As nobody has written to it yet.
    pub(super) fn new(device: &dyn Device) -> Self {
        Self {
            bytes: device.config(),
            writable: device.driver_config(),
            generation: 0,
        }
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.bytes.get(offset..));
        for (target, source) in data.iter_mut().zip(bytes.unwrap_or_default()) {
            *target = *source;
        }
    }

    /// A driver's write: all of it, or nothing.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let end = offset.saturating_add(data.len() as u64);
        let (start, limit) = (self.writable.start as u64, self.writable.end as u64);
        if offset >= start && end <= limit {
            self.bytes[offset as usize..end as usize].copy_from_slice(data);
        }
    }

    /// What the former driver wrote is not the next one's: a balloon without a driver holds nothing.
    pub(super) fn forget_driver(&mut self) {
        self.bytes[self.writable.clone()].fill(0);
    }

    /// The host's write.
    pub(super) fn set(&mut self, at: usize, bytes: &[u8]) {
        if let Some(part) = self.bytes.get_mut(at..at.saturating_add(bytes.len())) {
            part.copy_from_slice(bytes);
            self.generation = self.generation.wrapping_add(1);
        }
    }

    pub(super) fn save(&self) -> Option<Vec<u8>> {
        (!self.writable.is_empty()).then(|| self.bytes.clone())
    }

    pub(super) fn restore(&mut self, saved: Option<&[u8]>) -> io::Result<()> {
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
