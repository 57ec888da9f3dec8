//! Where the guest's port and memory-mapped accesses go.
//!
//! Three things answer: the serial port, the registers by which a guest ends itself (keyboard
//! controller and ACPI sleep control), and the windows of the virtio devices. Everything else reads as
//! all ones, as on a PC where nothing is there, and swallows writes.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::boot::acpi::SLEEP_TYPE_OFF;
use crate::boot::layout;
use crate::serial::SerialPort;
use crate::virtio::transport::Transport;

/// How a guest ended itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// By ACPI.
    Off,
    /// By the keyboard controller's reset line.
    Reset,
    /// By a fault while handling a fault while handling a fault: a crash, or an old way to reset.
    TripleFault,
}

/// The machine's ports and windows, shared by its vCPU threads.
#[derive(Debug)]
pub struct Bus {
    serial: Mutex<SerialPort>,
    windows: Vec<Mutex<Transport>>,
}

const KEYBOARD_DATA: u16 = 0x60;
const KEYBOARD_COMMAND: u16 = 0x64;
/// "Pulse output line 0", which is the processor's reset line.
const KEYBOARD_RESET: u8 = 0xfe;
/// ACPI 6.5, 4.8.3.7: sleep type in bits 2 to 4, enable in bit 5.
const SLEEP_OFF: u8 = SLEEP_TYPE_OFF << 2 | 1 << 5;

impl Bus {
    /// The bus of a machine with these devices; window `n` is the `n`th transport's.
    pub fn new(serial: SerialPort, windows: Vec<Transport>) -> Self {
        Self {
            serial: Mutex::new(serial),
            windows: windows.into_iter().map(Mutex::new).collect(),
        }
    }

    /// The serial port.
    pub fn serial(&self) -> MutexGuard<'_, SerialPort> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The virtio devices, in order.
    pub fn transports(&self) -> impl Iterator<Item = MutexGuard<'_, Transport>> {
        self.windows
            .iter()
            .map(|window| window.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Answers a read of `port`.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match port {
            _ if is_serial(port) => {
                let mut serial = self.serial();
                for byte in data {
                    *byte = serial.read(port - layout::SERIAL_PORT);
                }
            }
            // An idle controller: output and input buffers empty, nothing to say.
            KEYBOARD_DATA | KEYBOARD_COMMAND | layout::SLEEP_STATUS_PORT => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    /// Carries out a write to `port`, which may be the guest's last.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<Power> {
        match (port, data) {
            _ if is_serial(port) => {
                let mut serial = self.serial();
                for byte in data {
                    serial.write(port - layout::SERIAL_PORT, *byte);
                }
                None
            }
            (KEYBOARD_COMMAND, [KEYBOARD_RESET]) => Some(Power::Reset),
            (layout::SLEEP_CONTROL_PORT, [SLEEP_OFF]) => Some(Power::Off),
            _ => None,
        }
    }

    /// Answers a read of memory nobody backs.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.window(address) {
            Some((mut transport, offset)) => transport.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Carries out a write to memory nobody backs.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((mut transport, offset)) = self.window(address) {
            transport.write(offset, data);
        }
    }

    fn window(&self, address: u64) -> Option<(MutexGuard<'_, Transport>, u64)> {
        let offset = address.checked_sub(layout::MMIO_GAP_START)?;
        let index = usize::try_from(offset / layout::MMIO_WINDOW).ok()?;
        let window = self.windows.get(index)?;
        Some((
            window.lock().unwrap_or_else(PoisonError::into_inner),
            offset % layout::MMIO_WINDOW,
        ))
    }
}

fn is_serial(port: u16) -> bool {
    (layout::SERIAL_PORT..layout::SERIAL_PORT + 8).contains(&port)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bus() -> Bus {
        let dir = tempfile::tempdir().unwrap();
        let serial = SerialPort::new(&dir.path().join("serial.log")).unwrap();
        Bus::new(serial, Vec::new())
    }

    #[test]
    fn a_guest_ends_itself_by_two_registers_only() {
        let bus = bus();
        assert_eq!(bus.port_write(0x64, &[0xfe]), Some(Power::Reset));
        assert_eq!(bus.port_write(0x600, &[0x34]), Some(Power::Off));
        for (port, data) in [
            (0x64, &[0xd1_u8][..]),
            (0x64, &[0xfe, 0]),
            (0x60, &[0xfe]),
            (0x600, &[0x30]),
        ] {
            assert_eq!(bus.port_write(port, data), None, "{port:#x} {data:x?}");
        }
    }

    #[test]
    fn what_is_not_there_reads_as_ones() {
        let bus = bus();
        let mut data = [0; 4];
        bus.port_read(0xcf8, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.mmio_read(layout::MMIO_GAP_START, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.mmio_read(u64::MAX, &mut data);
        bus.mmio_write(u64::MAX, &data);
        bus.port_read(0x64, &mut data[..1]);
        assert_eq!(data[0], 0);
    }
}
