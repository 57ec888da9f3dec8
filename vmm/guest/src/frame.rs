//! Frames: how messages and raw bytes share one vsock connection.
//!
//! A frame is `kind: u8`, `length: u32` little-endian, then `length` bytes of payload. The length is
//! checked before anything is reserved for it, so a peer can make us hold at most
//! [`MAX_PAYLOAD`] bytes and one read's worth more.
//!
//! ```
//! use tern_guest::{Decoder, Encoder, FrameKind, Request};
//!
//! let mut wire = Encoder::new();
//! wire.json(&Request::Attach { from: 0 })?;
//! wire.raw(FrameKind::Stdin, b"hello");
//!
//! let mut decoder = Decoder::new();
//! decoder.feed(&wire.take());
//! let request: Request = decoder.next_frame()?.expect("the first frame is whole").parse()?;
//! assert_eq!(request, Request::Attach { from: 0 });
//! assert_eq!(decoder.next_frame()?.expect("and so is the second").payload, b"hello");
//! assert!(decoder.next_frame()?.is_none());
//! # Ok::<(), tern_guest::FrameError>(())
//! ```

use serde::Serialize;
use serde::de::DeserializeOwned;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameKind {
    /// A message as JSON: a request, an event, a reply.
    Json = 1,
    /// Bytes for the standard input of an `exec`; an empty frame closes it.
    Stdin = 2,
    /// Bytes from its standard output (from its terminal, if it has one).
    Stdout = 3,
    /// Bytes from its standard error.
    Stderr = 4,
}

impl FrameKind {
    fn from_byte(byte: u8) -> Result<Self, FrameError> {
        match byte {
            1 => Ok(Self::Json),
            2 => Ok(Self::Stdin),
            3 => Ok(Self::Stdout),
            4 => Ok(Self::Stderr),
            _ => Err(FrameError::UnknownKind(byte)),
        }
    }
}

/// One frame, taken off the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What the payload is.
    pub kind: FrameKind,
    /// The payload, at most [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
}

impl Frame {
    /// Reads the payload of a [`FrameKind::Json`] frame as a message.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, FrameError> {
        if self.kind != FrameKind::Json {
            return Err(FrameError::NotJson(self.kind));
        }
        serde_json::from_slice(&self.payload).map_err(FrameError::BadJson)
    }
}

/// Collects frames to be written.
#[derive(Debug, Default)]
pub struct Encoder {
    wire: Vec<u8>,
}

impl Encoder {
    /// An encoder that holds nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a message. Fails, and appends nothing, if it does not fit into one frame.
    pub fn json<T: Serialize>(&mut self, message: &T) -> Result<(), FrameError> {
        let payload = serde_json::to_vec(message).map_err(FrameError::BadJson)?;
        if payload.len() > MAX_PAYLOAD {
            return Err(FrameError::TooLong(payload.len() as u64));
        }
        self.push(FrameKind::Json, &payload);
        Ok(())
    }

    /// Appends raw bytes, in as many frames as they need. Empty bytes make one empty frame.
    pub fn raw(&mut self, kind: FrameKind, bytes: &[u8]) {
        if bytes.is_empty() {
            return self.push(kind, bytes);
        }
        for chunk in bytes.chunks(MAX_PAYLOAD) {
            self.push(kind, chunk);
        }
    }

    /// The bytes to be written.
    pub fn wire(&self) -> &[u8] {
        &self.wire
    }

    /// Forgets the first `n` bytes: they have been written.
    pub fn consume(&mut self, n: usize) {
        self.wire.drain(..n.min(self.wire.len()));
    }

    /// Takes all the bytes to be written and leaves none.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.wire)
    }

    fn push(&mut self, kind: FrameKind, payload: &[u8]) {
        debug_assert!(payload.len() <= MAX_PAYLOAD);
        self.wire.reserve(HEADER + payload.len());
        self.wire.push(kind as u8);
        self.wire
            .extend_from_slice(&(payload.len() as u32).to_le_bytes());
        self.wire.extend_from_slice(payload);
    }
}

/// Finds frames in what was read.
///
/// Feed it whatever a read returned, then take frames until there is none. After an error the
/// connection is worth nothing any more: every later call returns an error too.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// A decoder at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in the next bytes of the stream.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, if it has arrived.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let pending = &self.buffer[self.start..];
        let Some((header, rest)) = pending.split_first_chunk::<HEADER>() else {
            return match pending.first() {
                // A stranger's first byte is enough to refuse it.
                Some(&byte) => FrameKind::from_byte(byte).map(|_| None),
                None => Ok(None),
            };
        };
        let [kind, length @ ..] = *header;
        let kind = FrameKind::from_byte(kind)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_PAYLOAD {
            return Err(FrameError::TooLong(length as u64));
        }
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.start += HEADER + length;
        Ok(Some(Frame { kind, payload }))
    }

    /// Whether the stream may end here: no frame has been begun and not finished.
    pub fn is_between_frames(&self) -> bool {
        self.start == self.buffer.len()
    }
}

/// Why bytes are not a frame, or a frame not a message.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// A kind that nobody speaks.
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    /// A payload longer than [`MAX_PAYLOAD`].
    #[error("a frame of {0} bytes is longer than the {MAX_PAYLOAD} allowed")]
    TooLong(u64),
    /// Raw bytes where a message belongs.
    #[error("expected a message, got {0:?} bytes")]
    NotJson(FrameKind),
    /// A message that cannot be understood.
    #[error("malformed message: {0}")]
    BadJson(#[source] serde_json::Error),
}

/// The longest payload: large enough for a screenful of anything, small enough that a hundred
/// connections of a hostile peer do not matter to a 128 MiB guest.
pub const MAX_PAYLOAD: usize = 64 * 1024;

const HEADER: usize = 5;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kind() -> impl Strategy<Value = FrameKind> {
        prop_oneof![
            Just(FrameKind::Json),
            Just(FrameKind::Stdin),
            Just(FrameKind::Stdout),
            Just(FrameKind::Stderr)
        ]
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting(
            frames in prop::collection::vec((kind(), prop::collection::vec(any::<u8>(), 0..300)), 0..20),
            cuts in prop::collection::vec(1usize..400, 1..50),
        ) {
            let mut encoder = Encoder::new();
            for (kind, payload) in &frames {
                encoder.raw(*kind, payload);
            }
            let wire = encoder.take();
            let (mut decoder, mut got, mut rest) = (Decoder::new(), Vec::new(), &wire[..]);
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                decoder.feed(now);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    got.push((frame.kind, frame.payload));
                }
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert!(decoder.is_between_frames());
            prop_assert_eq!(got, frames);
        }

        #[test]
        fn garbage_ends_in_an_error_or_in_waiting_and_stays_bounded(
            bytes in prop::collection::vec(any::<u8>(), 0..2000),
        ) {
            let mut decoder = Decoder::new();
            let mut taken = 0;
            for chunk in bytes.chunks(64) {
                decoder.feed(chunk);
                loop {
                    match decoder.next_frame() {
                        Ok(Some(frame)) => {
                            taken += frame.payload.len() + HEADER;
                            let _ = frame.parse::<crate::Request>();
                            let _ = frame.parse::<crate::Event>();
                            let _ = frame.parse::<crate::Reply>();
                        }
                        Ok(None) => break,
                        Err(_) => {
                            prop_assert!(decoder.next_frame().is_err(), "an error is final");
                            return Ok(());
                        }
                    }
                }
            }
            prop_assert!(taken <= bytes.len());
        }
    }

    #[test]
    fn a_long_payload_is_refused_by_its_header_alone() {
        let mut decoder = Decoder::new();
        decoder.feed(&[1, 1, 0, 1, 0]); // 65537
        assert!(matches!(
            decoder.next_frame(),
            Err(FrameError::TooLong(65537))
        ));
    }

    #[test]
    fn an_unknown_kind_is_refused_by_its_first_byte() {
        let mut decoder = Decoder::new();
        decoder.feed(b"G");
        assert!(matches!(
            decoder.next_frame(),
            Err(FrameError::UnknownKind(b'G'))
        ));
    }

    #[test]
    fn long_output_is_cut_into_frames() {
        let mut encoder = Encoder::new();
        let bytes = vec![7; MAX_PAYLOAD + 1];
        encoder.raw(FrameKind::Stdout, &bytes);
        let mut decoder = Decoder::new();
        decoder.feed(encoder.wire());
        assert_eq!(
            decoder.next_frame().unwrap().unwrap().payload.len(),
            MAX_PAYLOAD
        );
        assert_eq!(decoder.next_frame().unwrap().unwrap().payload, [7]);
    }

    #[test]
    fn a_message_that_does_not_fit_is_refused_whole() {
        let mut encoder = Encoder::new();
        assert!(encoder.json(&"x".repeat(MAX_PAYLOAD)).is_err());
        assert!(encoder.wire().is_empty());
    }
}
