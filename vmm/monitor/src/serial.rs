//! The serial console: a 16550 whose output ends in a bounded log file.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};
use vmm_sys_util::eventfd::EventFd;

/// The one serial port.
#[derive(Debug)]
pub struct SerialPort {
    uart: Serial<Line, NoEvents, ConsoleLog>,
}

/// The port's registers in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialPortState {
    registers: [u8; 9],
    in_buffer: Vec<u8>,
}

/// A guest that prints without end must not fill the host's disk; a whole boot with all messages is
/// some 60 KiB.
const LOG_LIMIT: u64 = 4 << 20;
/// Interrupts of a 16550, by their bits in its enable and its identification register. The UART keeps
/// the latter as flags.
const RECEIVED: (u8, u8) = (1, 4);
const TRANSMITTER_EMPTY: (u8, u8) = (2, 2);
/// Lines are written whole where they are not longer than this.
const LINE_BUFFER: usize = 256;

impl SerialPort {
    /// A port in its reset state that appends to `log`.
    pub fn new(log: &Path) -> io::Result<Self> {
        Ok(Self {
            uart: Serial::new(Line::new()?, ConsoleLog::open(log, LOG_LIMIT)?),
        })
    }

    /// A port as it was when `state` was saved.
    pub fn restore(log: &Path, state: &SerialPortState) -> io::Result<Self> {
        let uart = Serial::from_state(
            &state.into(),
            Line::new()?,
            NoEvents,
            ConsoleLog::open(log, LOG_LIMIT)?,
        )
        .map_err(|error| io::Error::other(format!("serial port: {error:?}")))?;
        Ok(Self { uart })
    }

    /// The port's interrupt line.
    pub fn interrupt(&self) -> &EventFd {
        &self.uart.interrupt_evt().0
    }

    /// Raises once more what the guest has not looked at. Restored, the port raised it before the
    /// interrupt controllers had their state, which then took its place. One too many is harmless.
    pub fn raise_pending(&self) {
        let state = self.uart.state();
        let pending = [RECEIVED, TRANSMITTER_EMPTY]
            .iter()
            .any(|(enable, identification)| {
                state.interrupt_enable & enable != 0
                    && state.interrupt_identification & identification != 0
            });
        if pending {
            // Fails only when 2^64 - 2 interrupts wait.
            let _ = self.interrupt().write(1);
        }
    }

    /// Reads a register.
    pub fn read(&mut self, offset: u16) -> u8 {
        self.uart.read(offset as u8) // 0 to 7
    }

    /// Writes a register. An output that cannot be kept is lost, which is no fault of the guest's.
    pub fn write(&mut self, offset: u16, value: u8) {
        let _ = self.uart.write(offset as u8, value);
    }

    /// Writes what is left of an unfinished line.
    pub fn flush_line(&mut self) {
        self.uart.writer_mut().flush_line();
    }

    /// The registers, for a snapshot.
    pub fn save(&self) -> SerialPortState {
        let state = self.uart.state();
        SerialPortState {
            registers: [
                state.baud_divisor_low,
                state.baud_divisor_high,
                state.interrupt_enable,
                state.interrupt_identification,
                state.line_control,
                state.line_status,
                state.modem_control,
                state.modem_status,
                state.scratch,
            ],
            in_buffer: state.in_buffer,
        }
    }
}

impl From<&SerialPortState> for SerialState {
    fn from(saved: &SerialPortState) -> Self {
        let [
            low,
            high,
            enable,
            identification,
            line,
            status,
            modem,
            modem_status,
            scratch,
        ] = saved.registers;
        Self {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: line,
            line_status: status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: saved.in_buffer.clone(),
        }
    }
}

#[derive(Debug)]
struct Line(EventFd);

impl Line {
    fn new() -> io::Result<Self> {
        Ok(Self(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?))
    }
}

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Collects bytes into lines, and stops at the limit.
#[derive(Debug)]
struct ConsoleLog {
    file: File,
    line: Vec<u8>,
    room: u64,
}

impl ConsoleLog {
    /// Appends to what former runs left, or starts anew where that is half the limit already.
    fn open(path: &Path, limit: u64) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let mut used = file.metadata()?.len();
        if used > limit / 2 {
            file.set_len(0)?;
            used = 0;
        }
        Ok(Self {
            file,
            line: Vec::with_capacity(LINE_BUFFER),
            room: limit - used,
        })
    }

    fn flush_line(&mut self) {
        if self.line.is_empty() || self.room == 0 {
            self.line.clear();
            return;
        }
        let written = self.file.write_all(&self.line);
        self.room = self.room.saturating_sub(self.line.len() as u64);
        self.line.clear();
        if written.is_err() {
            self.room = 0; // a full disk: no more tries at every line
        } else if self.room == 0 {
            let _ = self
                .file
                .write_all(b"\n[the console log is full; the rest is dropped]\n");
        }
    }
}

impl Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.line.push(*byte);
            if *byte == b'\n' || self.line.len() >= LINE_BUFFER {
                self.flush_line();
            }
        }
        Ok(bytes.len())
    }

    /// The UART flushes behind every byte; lines are what is worth a system call.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn writes_whole_lines_and_the_rest_on_demand() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial.log");
        let mut port = SerialPort::new(&path).unwrap();
        for byte in b"one\ntwo" {
            port.write(0, *byte);
        }
        assert_eq!(fs::read(&path).unwrap(), b"one\n");
        port.flush_line();
        assert_eq!(fs::read(&path).unwrap(), b"one\ntwo");
    }

    #[test]
    fn the_log_is_bounded_and_starts_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial.log");
        let mut log = ConsoleLog::open(&path, 1000).unwrap();
        for _ in 0..100 {
            log.write_all(b"a line of twenty byt\n").unwrap();
        }
        let len = fs::metadata(&path).unwrap().len();
        assert!((1000..1100).contains(&len), "{len}");
        ConsoleLog::open(&path, 1000).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    }

    #[test]
    fn an_interrupt_on_its_way_survives_a_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial.log");
        let mut port = SerialPort::new(&path).unwrap();
        let restored = |port: &SerialPort| {
            let again = SerialPort::restore(&path, &port.save()).unwrap();
            // What is raised before the interrupt controllers are restored is lost.
            let _ = again.interrupt().read();
            again.raise_pending();
            again
        };
        let none = restored(&port);
        assert!(none.interrupt().read().is_err());
        port.write(1, 2);
        let mut again = restored(&port);
        assert_eq!(again.interrupt().read().unwrap(), 1);
        // It is over once the guest has asked what it was.
        assert_eq!(again.read(2) & 0xf, 2);
        again.raise_pending();
        assert!(again.interrupt().read().is_err());
        // In loopback, what is sent is received.
        port.read(2);
        port.write(1, 1);
        port.write(4, 0x10);
        port.write(0, b'x');
        assert_eq!(restored(&port).interrupt().read().unwrap(), 1);
    }

    #[test]
    fn registers_survive_a_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial.log");
        let mut port = SerialPort::new(&path).unwrap();
        port.write(3, 0x1b);
        port.write(7, 0x5a);
        let mut again = SerialPort::restore(&path, &port.save()).unwrap();
        assert_eq!((again.read(3), again.read(7)), (0x1b, 0x5a));
        assert_eq!(again.save(), port.save());
    }
}
