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

/// An end that takes nothing for this long is gone in all but name: what it keeps waiting says nothing of itself, and
/// its app may have ended long ago.
const STALLED: Duration = Duration::from_secs(15 * 60);

/// A client that still speaks when its app has ended has so long to read what the app has said last.
const LAST_WORDS: Duration = Duration::from_secs(30);

/// A client's connection and an app's. Neither holds a buffer while nothing moves. Dropped before both have said all, it
/// has both learn that the connection broke, and did not end.
pub struct Pump<C: Transport> {
    client: C,
    app: TcpStream,
    inward: Way,
    outward: Way,
    /// Longest that one end may keep the connection half open when the other has said all, and nothing moves.
    half_open: Duration,
    /// Runs from then on, and while one takes nothing. A whole connection may be silent for ever: keepalive tells whether
    /// both are there.
    timer: Option<(Timer, Duration)>,
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
    /// Its target hears no more: what still comes is read and dropped, for closing over it would reset the connection,
    /// and take back what its source has not read yet.
    deaf: bool,
}

/// Which end of a direction broke.
enum Broken {
    Source(io::Error),
    Target(io::Error),
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
                deaf: false,
            },
            outward: Way::default(),
            half_open,
            timer: None,
        }
    }

    /// Ready when both have said all and were told so, or the connection broke.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (client, app) = (&mut self.client, &mut self.app);
        let inward = match self.inward.poll(client, app, cx) {
            Ok(moved) => moved,
            // It hears no more, and may have said much before: that is still the client's.
            Err(Broken::Target(_)) => {
                self.inward.waiting = BytesMut::new();
                self.inward.deaf = true;
                cx.waker().wake_by_ref();
                true
            }
            Err(Broken::Source(error)) => return Poll::Ready(Err(error)),
        };
        let outward = match self.outward.poll(app, client, cx) {
            Ok(moved) => moved,
            Err(Broken::Source(error) | Broken::Target(error)) => return Poll::Ready(Err(error)),
        };
        if self.inward.told && self.outward.told {
            return Poll::Ready(Ok(()));
        }
        let limit = if self.inward.deaf && self.outward.told {
            LAST_WORDS
        } else if self.inward.ended || self.outward.ended {
            self.half_open
        } else if self.inward.waiting.is_empty() && self.outward.waiting.is_empty() {
            self.timer = None;
            return Poll::Pending;
        } else {
            STALLED.max(self.half_open)
        };
        match &mut self.timer {
            Some((timer, of)) if inward || outward || *of != limit => {
                timer.set(limit);
                *of = limit;
            }
            Some(_) => {}
            none => *none = Some((Timer::new(limit), limit)),
        }
        if let Some((timer, _)) = &mut self.timer
            && timer.poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Pending
    }
}

impl<C: Transport> Drop for Pump<C> {
    fn drop(&mut self) {
        if !(self.inward.told && self.outward.told) {
            self.client.reset_when_closed();
            self.app.reset_when_closed();
        }
    }
}

impl Way {
    /// Moves what can be moved; tells whether anything was.
    fn poll<R, W>(&mut self, from: &mut R, to: &mut W, cx: &mut Context<'_>) -> Result<bool, Broken>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut moved = false;
        loop {
            while !self.waiting.is_empty() {
                match write(to, cx, &self.waiting)? {
                    Poll::Ready(written) => self.waiting.advance(written),
                    Poll::Pending => return Ok(moved),
                }
                moved = true;
            }
            if self.waiting.capacity() > 0 {
                self.waiting = BytesMut::new();
            }
            if self.ended {
                if self.deaf {
                    self.told = true;
                } else if !self.told {
                    // Closing flushes first.
                    let shut = Pin::new(to).poll_shutdown(cx).map_err(Broken::Target)?;
                    self.told = shut.is_ready();
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
                    outcome => outcome.map_err(Broken::Source)?,
                }
                let mut data = read.filled();
                let length = data.len();
                if self.deaf {
                    return Ok(Some(length));
                }
                while !data.is_empty() {
                    match write(to, cx, data)? {
                        Poll::Ready(written) => data = &data[written..],
                        Poll::Pending => break,
                    }
                }
                self.waiting.extend_from_slice(data);
                Ok(Some(length))
            })?;
            match read {
                Some(0) => self.ended = true,
                // A client that never stops is not waited for.
                Some(_) => moved |= !self.deaf,
                None if self.deaf => return Ok(moved),
                None => {
                    // TLS may keep what was written until it is told that no more comes.
                    let _ = Pin::new(to).poll_flush(cx).map_err(Broken::Target)?;
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

fn write<W: AsyncWrite + Unpin>(
    to: &mut W,
    cx: &mut Context<'_>,
    data: &[u8],
) -> Result<Poll<usize>, Broken> {
    match Pin::new(to).poll_write(cx, data).map_err(Broken::Target)? {
        Poll::Ready(0) => Err(Broken::Target(io::ErrorKind::WriteZero.into())),
        written => Ok(written),
    }
}
