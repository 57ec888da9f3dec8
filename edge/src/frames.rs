//! What `h3` 0.0.8 does not bound of a client's streams: it gathers a frame other than DATA whole before it looks at
//! its size, and panics at a stream that ends within DATA. So frames' heads (RFC 9114 section 7.1) are read here
//! first, as they arrive, and a stream that goes too far ends.

use std::task::{Context, Poll, ready};

use ::h3::error::Code;
use ::h3::quic::{
    BidiStream, Connection, ConnectionErrorIncoming, OpenStreams, RecvStream, SendStream,
    StreamErrorIncoming, StreamId, WriteBuf,
};
use bytes::{Buf, Bytes};

/// Largest frame of a request other than DATA: `h3`'s own limit of a head's decoded size, which is never smaller.
pub const MAX_FRAME: u64 = 256 << 10;
/// Largest frame of a control stream: settings, and ids.
const MAX_CONTROL_FRAME: u64 = 16 << 10;
/// All of another stream: QPACK's, which have nothing to say without a dynamic table, and what is not known.
const MAX_OTHER: u64 = 64 << 10;
const DATA: u64 = 0;
/// The type of a control stream (RFC 9114 section 6.2.1).
const CONTROL: u64 = 0;

/// A stream's frames, as far as they have come. No I/O.
#[derive(Debug)]
struct Frames {
    state: State,
    largest: u64,
    number: Number,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// A unidirectional stream's type is to come.
    StreamType,
    Type,
    Length {
        kind: u64,
    },
    Payload(u64),
    /// Not frames; this much of it is let through.
    Other(u64),
}

/// A variable-length integer (RFC 9000 section 16), as far as it has come.
#[derive(Debug, Default)]
struct Number {
    value: u64,
    missing: u8,
    begun: bool,
}

impl Number {
    fn push(&mut self, byte: u8) -> Option<u64> {
        if self.begun {
            self.value = self.value << 8 | u64::from(byte);
            self.missing -= 1;
        } else {
            *self = Self {
                value: u64::from(byte & 0x3f),
                missing: (1 << (byte >> 6)) - 1,
                begun: true,
            };
        }
        (self.missing == 0).then(|| std::mem::take(self).value)
    }
}

impl Frames {
    fn of_request() -> Self {
        Self {
            state: State::Type,
            largest: MAX_FRAME,
            number: Number::default(),
        }
    }

    fn of_unidirectional() -> Self {
        Self {
            state: State::StreamType,
            largest: MAX_CONTROL_FRAME,
            number: Number::default(),
        }
    }

    /// Looks at what has come; the error is what the client is to be told.
    fn see(&mut self, mut bytes: &[u8]) -> Result<(), Code> {
        while let Some((&first, rest)) = bytes.split_first() {
            match self.state {
                State::Payload(left) | State::Other(left) => {
                    let seen = left.min(bytes.len() as u64);
                    bytes = &bytes[seen as usize..];
                    self.state = match self.state {
                        State::Other(_) if seen == 0 => return Err(Code::H3_EXCESSIVE_LOAD),
                        State::Other(_) => State::Other(left - seen),
                        _ if left == seen => State::Type,
                        _ => State::Payload(left - seen),
                    };
                    continue;
                }
                _ => bytes = rest,
            }
            let Some(number) = self.number.push(first) else {
                continue;
            };
            self.state = match self.state {
                State::StreamType if number == CONTROL => State::Type,
                State::StreamType => State::Other(MAX_OTHER),
                State::Type => State::Length { kind: number },
                State::Length { kind } if kind != DATA && number > self.largest => {
                    return Err(Code::H3_EXCESSIVE_LOAD);
                }
                State::Length { .. } if number == 0 => State::Type,
                _ => State::Payload(number),
            };
        }
        Ok(())
    }

    /// Whether the stream may end here.
    fn ends(&self) -> Result<(), Code> {
        match self.state {
            State::Payload(_) | State::Length { .. } => Err(Code::H3_REQUEST_INCOMPLETE),
            _ => Ok(()),
        }
    }
}

/// A connection, or a stream of it, whose frames are looked at.
pub struct Guarded<T> {
    inner: T,
    frames: Frames,
}

impl<T> Guarded<T> {
    /// A connection's streams are looked at from their beginning.
    pub fn new(connection: T) -> Self {
        Self {
            inner: connection,
            frames: Frames::of_request(),
        }
    }
}

impl<T: RecvStream<Buf = Bytes>> RecvStream for Guarded<T> {
    type Buf = Bytes;

    fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, StreamErrorIncoming>> {
        let data = ready!(self.inner.poll_data(cx))?;
        let seen = match &data {
            Some(data) => self.frames.see(data),
            None => self.frames.ends(),
        };
        Poll::Ready(match seen {
            Ok(()) => Ok(data),
            Err(code) => {
                // No read is pending, which `h3-quinn` would panic for.
                self.inner.stop_sending(code.value());
                let error_code = code.value();
                Err(StreamErrorIncoming::StreamTerminated { error_code })
            }
        })
    }

    fn stop_sending(&mut self, error_code: u64) {
        self.inner.stop_sending(error_code);
    }

    fn recv_id(&self) -> StreamId {
        self.inner.recv_id()
    }
}

impl<B: Buf, T: SendStream<B>> SendStream<B> for Guarded<T> {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.inner.poll_ready(cx)
    }

    fn send_data<D: Into<WriteBuf<B>>>(&mut self, data: D) -> Result<(), StreamErrorIncoming> {
        self.inner.send_data(data)
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.inner.poll_finish(cx)
    }

    fn reset(&mut self, reset_code: u64) {
        self.inner.reset(reset_code);
    }

    fn send_id(&self) -> StreamId {
        self.inner.send_id()
    }
}

impl<B: Buf, T> BidiStream<B> for Guarded<T>
where
    T: BidiStream<B> + RecvStream<Buf = Bytes>,
    T::RecvStream: RecvStream<Buf = Bytes>,
{
    type SendStream = T::SendStream;
    type RecvStream = Guarded<T::RecvStream>;

    fn split(self) -> (Self::SendStream, Self::RecvStream) {
        let (send, receive) = self.inner.split();
        let frames = self.frames;
        let receive = Guarded {
            inner: receive,
            frames,
        };
        (send, receive)
    }
}

impl<B: Buf, T> OpenStreams<B> for Guarded<T>
where
    T: OpenStreams<B>,
    T::BidiStream: RecvStream<Buf = Bytes>,
{
    type BidiStream = Guarded<T::BidiStream>;
    type SendStream = T::SendStream;

    fn poll_open_bidi(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Self::BidiStream, StreamErrorIncoming>> {
        self.inner.poll_open_bidi(cx).map_ok(Guarded::new)
    }

    fn poll_open_send(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Self::SendStream, StreamErrorIncoming>> {
        self.inner.poll_open_send(cx)
    }

    fn close(&mut self, code: Code, reason: &[u8]) {
        self.inner.close(code, reason);
    }
}

impl<B: Buf, T> Connection<B> for Guarded<T>
where
    T: Connection<B>,
    T::BidiStream: RecvStream<Buf = Bytes>,
    T::RecvStream: RecvStream<Buf = Bytes>,
{
    type RecvStream = Guarded<T::RecvStream>;
    type OpenStreams = Guarded<T::OpenStreams>;

    fn poll_accept_recv(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Self::RecvStream, ConnectionErrorIncoming>> {
        self.inner.poll_accept_recv(cx).map_ok(|inner| Guarded {
            inner,
            frames: Frames::of_unidirectional(),
        })
    }

    fn poll_accept_bidi(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Self::BidiStream, ConnectionErrorIncoming>> {
        self.inner.poll_accept_bidi(cx).map_ok(Guarded::new)
    }

    fn opener(&self) -> Self::OpenStreams {
        Guarded::new(self.inner.opener())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In one piece, and byte by byte.
    fn see(new: fn() -> Frames, bytes: &[u8]) -> Result<Result<(), Code>, Code> {
        let mut whole = new();
        let mut parts = new();
        let one = whole.see(bytes).map(|()| whole.ends());
        let many = bytes.iter().try_for_each(|b| parts.see(&[*b]));
        assert_eq!(one, many.map(|()| parts.ends()));
        one
    }

    #[test]
    fn frames_of_a_usual_size_pass() {
        // HEADERS of 3 bytes, DATA of 1 GiB of which 2 bytes are there.
        let bytes = [
            &[1, 3, b'a', b'b', b'c'][..],
            &[0, 0x80 | 0x40, 0, 0, 0, b'x', b'y'],
        ]
        .concat();
        assert_eq!(
            see(Frames::of_request, &bytes),
            Ok(Err(Code::H3_REQUEST_INCOMPLETE))
        );
        assert_eq!(
            see(Frames::of_request, &[1, 1, b'a', 0, 2, b'x', b'y', 0, 0]),
            Ok(Ok(()))
        );
        assert_eq!(
            see(Frames::of_unidirectional, &[0, 4, 2, 1, 1, 7, 1, 0]),
            Ok(Ok(()))
        );
    }

    #[test]
    fn what_would_be_gathered_without_end_is_refused() {
        let huge = [1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        let load = Err(Code::H3_EXCESSIVE_LOAD);
        assert_eq!(see(Frames::of_request, &huge), load);
        let unknown = [0x21, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(see(Frames::of_request, &unknown), load);
        let settings = [0, 4, 0x80, 1, 0, 0];
        assert_eq!(see(Frames::of_unidirectional, &settings), load);
        let mut qpack = vec![2];
        qpack.resize(2 + MAX_OTHER as usize, 0);
        assert_eq!(see(Frames::of_unidirectional, &qpack), load);
        qpack.pop();
        assert_eq!(see(Frames::of_unidirectional, &qpack), Ok(Ok(())));
    }
}
