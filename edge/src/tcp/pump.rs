//! Bytes, both ways, until both ends have said all.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::h1::client::Transport;
use crate::timer::Timer;

/// What is read at once. One for all connections of a thread: what cannot be written on at once is copied out.
const SCRATCH: usize = 64 << 10;

thread_local! {
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH].into());
}

/// A client's connection and an app's. Neither holds a buffer while nothing moves.
pub struct Pump<C> {
    client: C,
    app: TcpStream,
    inward: Way,
    outward: Way,
    /// Longest that one end may keep the connection half open when the other has said all, and nothing moves.
    half_open: Duration,
    /// Runs from then on. A whole connection may be silent for ever: keepalive tells whether both are there.
    timer: Option<Timer>,
}

/// One direction.
#[derive(Default)]
struct Way {
    /// Read, and not yet written.
    waiting: BytesMut,
    /// Its source has said all.
    ended: bool,
    /// Its target was told so.
    told: bool,
}

impl<C: Transport> Pump<C> {
    /// `first` is what the app is told before anything else, and `ended` that the client says nothing more.
    pub fn new(
        client: C,
        app: TcpStream,
        first: BytesMut,
        ended: bool,
        half_open: Duration,
    ) -> Self {
        Self {
            client,
            app,
            inward: Way {
                waiting: first,
                ended,
                told: false,
            },
            outward: Way::default(),
            half_open,
            timer: None,
        }
    }

    /// Ready when both have said all and were told so, or the connection broke.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (client, app) = (&mut self.client, &mut self.app);
        let inward = self.inward.poll(client, app, cx)?;
        let outward = self.outward.poll(app, client, cx)?;
        if self.inward.told && self.outward.told {
            return Poll::Ready(Ok(()));
        }
        if self.inward.told || self.outward.told {
            let timer = self.timer.get_or_insert_with(|| Timer::new(self.half_open));
            if inward || outward {
                timer.set(self.half_open);
            }
            if timer.poll(cx).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        Poll::Pending
    }

    /// Has both ends learn that the connection broke, and did not end.
    pub fn reset(&self) {
        self.client.reset_when_closed();
        self.app.reset_when_closed();
    }
}

impl Way {
    /// Moves what can be moved; tells whether anything was.
    fn poll<R, W>(&mut self, from: &mut R, to: &mut W, cx: &mut Context<'_>) -> io::Result<bool>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut moved = false;
        loop {
            while !self.waiting.is_empty() {
                match Pin::new(&mut *to).poll_write(cx, &self.waiting)? {
                    Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Poll::Ready(written) => self.waiting.advance(written),
                    Poll::Pending => return Ok(moved),
                }
                moved = true;
            }
            if self.waiting.capacity() > 0 {
                self.waiting = BytesMut::new();
            }
            if self.ended {
                if !self.told {
                    // Closing flushes first.
                    self.told = Pin::new(to).poll_shutdown(cx)?.is_ready();
                    moved |= self.told;
                }
                return Ok(moved);
            }
            let read = BUFFER.with_borrow_mut(|buffer| {
                let mut read = ReadBuf::new(buffer);
                let outcome = Pin::new(&mut *from).poll_read(cx, &mut read);
                let Poll::Ready(outcome) = outcome else {
                    return Ok(None);
                };
                // Many a TLS client ends without a word of goodbye.
                match outcome {
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        return Ok(Some(0));
                    }
                    outcome => outcome?,
                }
                let mut data = read.filled();
                let length = data.len();
                while !data.is_empty() {
                    match Pin::new(&mut *to).poll_write(cx, data)? {
                        Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                        Poll::Ready(written) => data = &data[written..],
                        Poll::Pending => break,
                    }
                }
                self.waiting.extend_from_slice(data);
                Ok::<_, io::Error>(Some(length))
            })?;
            match read {
                Some(0) => self.ended = true,
                Some(_) => moved = true,
                None => {
                    // TLS may keep what was written until it is told that no more comes.
                    let _ = Pin::new(to).poll_flush(cx)?;
                    return Ok(moved);
                }
            }
            if !self.waiting.is_empty() {
                // The write that was pending is what wakes us.
                return Ok(moved);
            }
        }
    }
}
