//! What `tern-metal` and the agent inside the host say to each other over one TCP connection.
//!
//! A connection is one command. The caller sends [`Frame::Request`], then any of `Stdin`, `Signal`
//! and `Resize`; the agent answers `Stdout`, `Stderr` and `StdinCredit`, and ends with `Exit` or
//! `Failed`. On the wire a frame is `kind: u8, length: u32 LE, payload`.
//!
//! Standard input is paced by credit: the caller may have [`STDIN_WINDOW`] bytes under way, so a
//! command that does not read never blocks the signals queued behind its input, and neither side
//! buffers without bound.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Longest payload of a frame: a longer one is a protocol error. Larger than any frame of output
/// (32 KiB), small enough that a stray client cannot make the agent allocate much.
pub const MAX_PAYLOAD: usize = 256 * 1024;
/// Bytes of standard input that may be sent before the agent has passed them on.
pub const STDIN_WINDOW: usize = 256 * 1024;

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Command {
    /// Program and arguments; never empty.
    pub argv: Vec<String>,
    /// Added to the agent's own small environment.
    pub env: BTreeMap<String, String>,
    /// Absolute working directory.
    pub cwd: String,
    /// Allocate a terminal of this size and make it the command's three streams.
    pub tty: Option<WindowSize>,
    /// Let processes that the command leaves behind live on.
    pub keep_background: bool,
}

/// Size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// First frame of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The host's secret of this boot.
    pub token: String,
    /// What is asked for.
    pub command: Command,
}

/// How a command ended: exactly one of the two is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// Exit status.
    Code(i32),
    /// Number of the signal that killed it.
    Signal(i32),
}

/// Why a command did not even start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// In words, naming the program or directory.
    pub message: String,
    /// Exit code a shell would give: 126 not executable, 127 not found, 125 anything else.
    pub code: u8,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Caller: run this.
    Request(Box<Request>),
    /// Caller: bytes for standard input; empty is its end.
    Stdin(Vec<u8>),
    /// Agent: this many bytes of standard input have been taken, send as many more.
    StdinCredit(u32),
    /// Agent: bytes of standard output.
    Stdout(Vec<u8>),
    /// Agent: bytes of standard error.
    Stderr(Vec<u8>),
    /// Caller: send this signal to the command's process group.
    Signal(i32),
    /// Caller: its terminal has a new size.
    Resize(WindowSize),
    /// Agent: the command ended, and all its output has been sent.
    Exit(Exit),
    /// Agent: the command did not start.
    Failed(Failure),
}

mod kind {
    pub const REQUEST: u8 = 0;
    pub const STDIN: u8 = 1;
    pub const STDIN_CREDIT: u8 = 2;
    pub const STDOUT: u8 = 3;
    pub const STDERR: u8 = 4;
    pub const SIGNAL: u8 = 5;
    pub const RESIZE: u8 = 6;
    pub const EXIT: u8 = 7;
    pub const FAILED: u8 = 8;
}

impl Frame {
    /// Writes the frame in one call to `write_all`.
    pub fn write_to(&self, to: &mut impl Write) -> io::Result<()> {
        let (kind, payload) = match self {
            Self::Request(request) => (kind::REQUEST, serde_json::to_vec(request)?),
            Self::Stdin(bytes) => return write_raw(to, kind::STDIN, bytes),
            Self::StdinCredit(bytes) => (kind::STDIN_CREDIT, bytes.to_le_bytes().to_vec()),
            Self::Stdout(bytes) => return write_raw(to, kind::STDOUT, bytes),
            Self::Stderr(bytes) => return write_raw(to, kind::STDERR, bytes),
            Self::Signal(signal) => (kind::SIGNAL, signal.to_le_bytes().to_vec()),
            Self::Resize(size) => (kind::RESIZE, serde_json::to_vec(size)?),
            Self::Exit(exit) => (kind::EXIT, serde_json::to_vec(exit)?),
            Self::Failed(failure) => (kind::FAILED, serde_json::to_vec(failure)?),
        };
        write_raw(to, kind, &payload)
    }

    /// Reads one frame; `None` where the other side closed between frames.
    pub fn read_from(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut header = [0; 5];
        match from.read(&mut header[..1])? {
            0 => return Ok(None),
            _ => from.read_exact(&mut header[1..])?,
        }
        let [kind, length @ ..] = header;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_PAYLOAD {
            return Err(invalid(format!("a frame of {length} bytes")));
        }
        let mut payload = vec![0; length];
        from.read_exact(&mut payload)?;
        Self::decode(kind, payload).map(Some)
    }

    fn decode(kind: u8, payload: Vec<u8>) -> io::Result<Self> {
        Ok(match kind {
            kind::REQUEST => Self::Request(serde_json::from_slice(&payload)?),
            kind::STDIN => Self::Stdin(payload),
            kind::STDIN_CREDIT => Self::StdinCredit(u32::from_le_bytes(word(&payload)?)),
            kind::STDOUT => Self::Stdout(payload),
            kind::STDERR => Self::Stderr(payload),
            kind::SIGNAL => Self::Signal(i32::from_le_bytes(word(&payload)?)),
            kind::RESIZE => Self::Resize(serde_json::from_slice(&payload)?),
            kind::EXIT => Self::Exit(serde_json::from_slice(&payload)?),
            kind::FAILED => Self::Failed(serde_json::from_slice(&payload)?),
            other => return Err(invalid(format!("a frame of unknown kind {other}"))),
        })
    }
}

fn write_raw(to: &mut impl Write, kind: u8, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|&length| length as usize <= MAX_PAYLOAD)
        .ok_or_else(|| invalid(format!("a frame of {} bytes", payload.len())))?;
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.push(kind);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    to.write_all(&frame)
}

fn word(payload: &[u8]) -> io::Result<[u8; 4]> {
    payload
        .try_into()
        .map_err(|_| invalid(format!("a number of {} bytes", payload.len())))
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames() -> Vec<Frame> {
        vec![
            Frame::Request(Box::new(Request {
                token: "t".into(),
                command: Command {
                    argv: vec!["true".into()],
                    env: BTreeMap::from([("A".into(), "b=c".into())]),
                    cwd: "/".into(),
                    tty: Some(WindowSize {
                        rows: 24,
                        columns: 80,
                    }),
                    keep_background: false,
                },
            })),
            Frame::Stdin(vec![1, 2, 3]),
            Frame::Stdin(vec![]),
            Frame::StdinCredit(7),
            Frame::Stdout(vec![0; MAX_PAYLOAD]),
            Frame::Stderr(b"no".to_vec()),
            Frame::Signal(15),
            Frame::Resize(WindowSize {
                rows: 1,
                columns: 2,
            }),
            Frame::Exit(Exit::Code(3)),
            Frame::Exit(Exit::Signal(9)),
            Frame::Failed(Failure {
                message: "gone".into(),
                code: 127,
            }),
        ]
    }

    #[test]
    fn every_frame_survives_the_wire() {
        let mut wire = Vec::new();
        for frame in frames() {
            frame.write_to(&mut wire).unwrap();
        }
        let mut wire = wire.as_slice();
        for frame in frames() {
            assert_eq!(Frame::read_from(&mut wire).unwrap(), Some(frame));
        }
        assert_eq!(Frame::read_from(&mut wire).unwrap(), None);
    }

    #[test]
    fn refuses_what_is_too_long_cut_off_or_unknown() {
        let mut long = vec![kind::STDOUT];
        long.extend_from_slice(&(MAX_PAYLOAD as u32 + 1).to_le_bytes());
        let cut_header = vec![kind::STDOUT, 1];
        let cut_payload = vec![kind::STDOUT, 2, 0, 0, 0, b'x'];
        let unknown = vec![200, 0, 0, 0, 0];
        let short_number = vec![kind::SIGNAL, 1, 0, 0, 0, 9];
        let not_json = vec![kind::EXIT, 1, 0, 0, 0, b'{'];
        for bytes in [
            long,
            cut_header,
            cut_payload,
            unknown,
            short_number,
            not_json,
        ] {
            assert!(
                Frame::read_from(&mut bytes.as_slice()).is_err(),
                "{bytes:?}"
            );
        }
        assert!(
            Frame::Stdout(vec![0; MAX_PAYLOAD + 1])
                .write_to(&mut Vec::new())
                .is_err()
        );
    }
}
