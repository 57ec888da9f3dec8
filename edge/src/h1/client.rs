//! A client's HTTP/1 connection: its requests one after the other, as they come in.

use std::future::{Future as _, poll_fn};
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, Version};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use super::body::{BadContent, Decoder};
use super::buffer::{self, LARGE, SMALL};
use super::head::{self, BadHead};
use super::out::{Framing, Out};
use super::scan::{LineEnds, Scan};
use crate::connections::Open;
use crate::message::{Length, Piece, RequestHead};
use crate::pages::Page;
use crate::relay::{self, Client, Ended, Gone, Reply, ReplyFields};
use crate::timer::Timer;
use crate::worker::Worker;

/// Longest a page, or the rest of a reply, may take to be written.
const LAST_WRITE: Duration = Duration::from_secs(30);
/// Content that nobody wants is read for so long, and so much of it, before the connection is closed: closing
/// while some is on its way would reset it, and the client might lose the reply (RFC 9112 section 9.6).
const LINGER: Duration = Duration::from_secs(5);
const LINGER_BYTES: usize = 1 << 20;

/// What a connection runs over.
pub trait Transport: AsyncRead + AsyncWrite + Unpin {
    /// Closing it will reset the connection.
    fn reset_when_closed(&self);
}

impl Transport for TcpStream {
    fn reset_when_closed(&self) {
        // One that is closed already needs none.
        let _ = socket2::SockRef::from(self).set_linger(Some(Duration::ZERO));
    }
}

impl Transport for TlsStream<TcpStream> {
    fn reset_when_closed(&self) {
        self.get_ref().0.reset_when_closed();
    }
}

/// Serves a connection until it ends.
pub async fn serve<S>(
    io: S,
    client: IpAddr,
    entrance: crate::entrance::Entrance,
    open: Open,
    worker: Rc<Worker>,
) where
    S: Transport,
{
    let connection = relay::Connection::new(client, entrance);
    let mut timer = Timer::new(worker.limits.keep_alive);
    let mut h1 = Http1::new(io, open.ending().clone());
    loop {
        let head = h1.next_head(&mut timer, worker.limits.head, &open).await;
        let ended = match head {
            Ok(Some(head)) => {
                h1.expect(&head);
                relay::exchange(&worker, &connection, &mut h1, &mut timer, &head).await
            }
            Ok(None) => return,
            Err(bad) => {
                h1.keep = false;
                worker.metrics.refused.add();
                timer.set(LAST_WRITE);
                Page::from(bad).send(&mut h1, &mut timer, None).await
            }
        };
        timer.set(LAST_WRITE);
        match ended {
            Ended::Whole if h1.may_go_on() => {}
            Ended::Whole => return h1.close(&mut timer).await,
            // Closing without a last chunk, or short of the length, says that the reply is not whole.
            Ended::Broken => {
                if h1.ends_with_connection {
                    h1.io.reset_when_closed();
                }
                return;
            }
        }
        timer.set(worker.limits.keep_alive);
    }
}

/// The connection, and where it is in its current request and reply.
struct Http1<S> {
    io: S,
    input: BytesMut,
    scan: Scan,
    out: Out,
    /// The client sends no more. It may still read: a half-close is no hang-up.
    ended: bool,
    version: Version,
    /// The reply has a head only.
    is_head: bool,
    /// The reply's end is the connection's: only a reset can say that it is not whole.
    ends_with_connection: bool,
    /// Another request may follow.
    keep: bool,
    content: Decoder,
    tunnel: bool,
    /// The tunnel's direction to the client is to be closed once flushed.
    shut: bool,
    /// No request is taken after the one under way.
    ending: CancellationToken,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Http1<S> {
    fn new(io: S, ending: CancellationToken) -> Self {
        Self {
            io,
            input: BytesMut::new(),
            scan: Scan::new(LineEnds::Strict),
            out: Out::default(),
            ended: false,
            version: Version::HTTP_11,
            is_head: false,
            ends_with_connection: false,
            keep: true,
            content: Decoder::Done,
            tunnel: false,
            shut: false,
            ending,
        }
    }

    /// The next request's head; `None` when the connection ends before one, or takes too long with it, or the edge
    /// ends before it has begun.
    async fn next_head(
        &mut self,
        timer: &mut Timer,
        longest: Duration,
        open: &Open,
    ) -> Result<Option<RequestHead>, BadHead> {
        let mut begun = false;
        open.is_idle();
        let ending = self.ending.clone();
        let ending = ending.cancelled();
        tokio::pin!(ending);
        poll_fn(|cx| {
            loop {
                if !self.input.is_empty()
                    && let Some(head) = head::request(&mut self.input, &mut self.scan)?
                {
                    return Poll::Ready(Ok(Some(head)));
                }
                if !begun && !self.input.is_empty() {
                    begun = true;
                    open.is_busy();
                    timer.set(longest);
                }
                if self.ended {
                    return Poll::Ready(Ok(None));
                }
                match buffer::poll_fill(&mut self.io, cx, &mut self.input, SMALL) {
                    Poll::Ready(Ok(0)) => self.ended = true,
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(_)) => return Poll::Ready(Ok(None)),
                    // What is there already is read before anything ends.
                    Poll::Pending => {
                        let idle_at_the_end = !begun && ending.as_mut().poll(cx).is_ready();
                        if idle_at_the_end || timer.poll(cx).is_ready() {
                            return Poll::Ready(Ok(None));
                        }
                        return Poll::Pending;
                    }
                }
            }
        })
        .await
    }

    /// Makes ready for a request's content and its reply.
    fn expect(&mut self, head: &RequestHead) {
        self.version = head.version;
        self.is_head = head.method == Method::HEAD;
        self.keep = head::persists(&head.fields, head.version);
        self.content = Decoder::new(head.length);
    }

    fn may_go_on(&self) -> bool {
        self.keep && self.content.is_done() && !self.tunnel
    }

    /// Closes once the client has had a chance to read what it was sent.
    async fn close(mut self, timer: &mut Timer) {
        timer.set(LINGER);
        let mut left = LINGER_BYTES;
        poll_fn(|cx| {
            if !self.shut {
                match Pin::new(&mut self.io).poll_shutdown(cx) {
                    Poll::Ready(Ok(())) => self.shut = true,
                    Poll::Ready(Err(_)) => return Poll::Ready(()),
                    Poll::Pending => return timer.poll(cx),
                }
            }
            while !self.ended && left > 0 {
                self.input.clear();
                match buffer::poll_fill(&mut self.io, cx, &mut self.input, SMALL) {
                    Poll::Ready(Ok(0) | Err(_)) => self.ended = true,
                    Poll::Ready(Ok(n)) => left = left.saturating_sub(n),
                    Poll::Pending => return timer.poll(cx),
                }
            }
            Poll::Ready(())
        })
        .await;
    }

    fn gone(_: io::Error) -> Gone {
        Gone::Closed
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client for Http1<S> {
    fn poll_content(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, Gone>> {
        loop {
            match self.content.next(&mut self.input) {
                Ok(Some(piece)) => return Poll::Ready(Ok(piece)),
                Ok(None) => {}
                Err(BadContent) => {
                    self.keep = false;
                    return Poll::Ready(Err(Gone::Malformed));
                }
            }
            if self.ended {
                return Poll::Ready(match self.content.ends() {
                    Ok(()) => Ok(Piece::End(None)),
                    Err(BadContent) => Err(Gone::Closed),
                });
            }
            let read = ready!(buffer::poll_fill(&mut self.io, cx, &mut self.input, LARGE));
            self.ended = read.map_err(Self::gone)? == 0;
        }
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        if self.out.has_room() {
            Poll::Ready(Ok(()))
        } else {
            self.poll_flush(cx)
        }
    }

    fn takes_interim(&self) -> bool {
        self.version == Version::HTTP_11
    }

    fn begin(&mut self, reply: &Reply<'_>) -> Result<(), Gone> {
        let tunnel = reply.status == 101;
        let plain = self.version == Version::HTTP_10 || self.is_head || reply.ends_here() || tunnel;
        let unframed = matches!(reply.length, Length::Unknown | Length::Tunnel);
        if unframed && self.version == Version::HTTP_10 && !tunnel {
            self.keep = false;
            self.ends_with_connection = true;
        }
        // Nobody will read the rest of the content of a request that the edge answers itself.
        let refused = matches!(reply.fields, ReplyFields::Page(_)) || reply.status >= 400;
        if refused && !reply.is_interim() && !self.content.is_done() || self.ending.is_cancelled() {
            self.keep = false;
        }
        let framing = if unframed && !plain {
            Framing::Chunked
        } else {
            Framing::Plain
        };
        let out = self.out.head(framing);
        out.reserve(1024);
        out.extend_from_slice(b"HTTP/1.1 ");
        let digits = [
            reply.status / 100,
            reply.status / 10 % 10,
            reply.status % 10,
        ];
        out.extend(digits.map(|d| b'0' + d as u8));
        out.extend_from_slice(b" ");
        out.extend_from_slice(reason(reply));
        out.extend_from_slice(b"\r\n");
        reply.each(&mut |name, value| field(out, name, value));
        if !reply.is_interim() {
            match reply.length {
                Length::Exact(length) => {
                    field(out, b"content-length", number(length, &mut [0; 20]))
                }
                _ if framing == Framing::Chunked => field(out, b"transfer-encoding", b"chunked"),
                _ => {}
            }
            if tunnel {
                field(out, b"connection", b"upgrade");
                if let ReplyFields::App { head, .. } = &reply.fields
                    && let Some(to) = head.fields.all("upgrade").next()
                {
                    field(out, b"upgrade", to);
                }
                self.tunnel = true;
                self.content = Decoder::UntilEnd;
            } else if !self.keep {
                field(out, b"connection", b"close");
            } else if self.version == Version::HTTP_10 {
                field(out, b"connection", b"keep-alive");
            }
        }
        out.extend_from_slice(b"\r\n");
        Ok(())
    }

    fn give(&mut self, data: Bytes, last: bool) -> Result<(), Gone> {
        self.out.give(data);
        if last { self.finish(None) } else { Ok(()) }
    }

    fn finish(&mut self, trailers: Option<HeaderMap>) -> Result<(), Gone> {
        self.out
            .finish(|out| relay::write_trailers(out, trailers.as_ref()));
        self.shut = self.tunnel;
        Ok(())
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        if !self.out.is_empty() {
            ready!(self.out.poll_flush(&mut self.io, cx)).map_err(Self::gone)?;
        }
        if self.shut {
            ready!(Pin::new(&mut self.io).poll_shutdown(cx)).map_err(Self::gone)?;
        }
        Poll::Ready(Ok(()))
    }

    /// Only a reset says that nobody will read the reply: a client that closed its sending side may wait for it.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Gone> {
        // What it sends meanwhile is its next request, or content whose turn has not come.
        while !self.ended && self.input.is_empty() {
            match ready!(buffer::poll_fill(&mut self.io, cx, &mut self.input, SMALL)) {
                Ok(read) => self.ended = read == 0,
                Err(_) => return Poll::Ready(Gone::Closed),
            }
        }
        Poll::Pending
    }
}

/// As the app wrote it, or as it is usually written.
fn reason<'a>(reply: &Reply<'a>) -> &'a [u8] {
    if !reply.reason.is_empty() {
        return reply.reason;
    }
    let status = http::StatusCode::from_u16(reply.status).ok();
    status
        .and_then(|s| s.canonical_reason())
        .unwrap_or_default()
        .as_bytes()
}

/// Writes a field's line.
pub fn field(out: &mut BytesMut, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// A number's digits.
pub fn number(mut number: u64, digits: &mut [u8; 20]) -> &[u8] {
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &digits[at..];
        }
    }
}
