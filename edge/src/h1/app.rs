//! An app's HTTP/1.1 connection: one request at a time, and used again only if nothing is left of it.

use std::io;
use std::os::fd::AsRawFd as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use base64::Engine as _;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, Version};
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::AsyncWrite as _;
use tokio::net::TcpStream;

use super::body::{BadContent, Decoder};
use super::buffer::{self, LARGE, SMALL};
use super::client::{field, number};
use super::head;
use super::out::{Framing, Out};
use super::scan::{LineEnds, Scan};
use crate::headers::{self, Facts};
use crate::message::{Length, Piece, ReplyHead, RequestHead, Upgrade};
use crate::relay::{self, Lost};

/// The connection, and where it is in its current request and reply.
pub struct Connection {
    io: TcpStream,
    input: BytesMut,
    scan: Scan,
    out: Out,
    method: Method,
    /// All of the request was written.
    sent: bool,
    /// What is left of the length that the app was told.
    unsent: Option<u64>,
    content: Decoder,
    /// A byte of the reply was received.
    heard: bool,
    /// The final head was received.
    answered: bool,
    /// The app lets the connection go on.
    keep: bool,
    tunnel: bool,
    shut: bool,
}

impl Connection {
    pub fn new(io: TcpStream) -> Self {
        Self {
            io,
            input: BytesMut::new(),
            scan: Scan::new(LineEnds::Lenient),
            out: Out::default(),
            method: Method::GET,
            sent: true,
            unsent: None,
            content: Decoder::Done,
            heard: false,
            answered: true,
            keep: true,
            tunnel: false,
            shut: false,
        }
    }

    /// Whether the last request and its reply have ended such that another may follow, with nothing left over.
    pub fn may_go_on(&self) -> bool {
        let whole = self.sent && self.answered && self.content.is_done() && self.out.is_empty();
        whole && self.keep && !self.tunnel && self.input.is_empty()
    }

    /// Whether nothing has come on the connection while it was idle. What nobody asked for would be taken for
    /// the next request's reply; an end means that it is of no use.
    pub fn is_quiet(&self) -> bool {
        let mut byte = [0];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        recv(self.io.as_raw_fd(), &mut byte, flags) == Err(nix::errno::Errno::EAGAIN)
    }

    /// Writes a request's head into the buffer.
    pub fn begin(&mut self, head: &RequestHead, facts: &Facts<'_>) {
        let framing = match head.length {
            Length::Unknown => Framing::Chunked,
            _ => Framing::Plain,
        };
        let ends = matches!(head.length, Length::None | Length::Exact(0));
        self.method.clone_from(&head.method);
        (self.sent, self.heard, self.answered) = (ends, false, false);
        self.unsent = match head.length {
            Length::Exact(length) => Some(length),
            _ => None,
        };
        let out = self.out.head(framing);
        out.reserve(1024);
        let connect = matches!(&head.upgrade, Some(Upgrade::Connect(_)));
        let method = if connect { "GET" } else { head.method.as_str() };
        out.extend_from_slice(method.as_bytes());
        out.extend_from_slice(b" ");
        out.extend_from_slice(&head.target);
        out.extend_from_slice(b" HTTP/1.1\r\n");
        headers::for_app(head, facts, &mut |name, value| field(out, name, value));
        let usual = matches!(head.method, Method::POST | Method::PUT | Method::PATCH);
        match head.length {
            // A method that usually has content says that there is none (RFC 9110 section 8.6).
            Length::None if usual && head.upgrade.is_none() => field(out, b"Content-Length", b"0"),
            Length::Exact(length) => field(out, b"Content-Length", number(length, &mut [0; 20])),
            Length::Unknown => field(out, b"Transfer-Encoding", b"chunked"),
            _ => {}
        }
        if let Some(Upgrade::Header(to) | Upgrade::Connect(to)) = &head.upgrade {
            field(out, b"Connection", b"Upgrade");
            field(out, b"Upgrade", to);
        }
        if connect {
            // RFC 8441 section 5.1: the key is of HTTP/1.1's handshake alone.
            let key = base64::prelude::BASE64_STANDARD.encode(rand::random::<[u8; 16]>());
            field(out, b"Sec-WebSocket-Key", key.as_bytes());
        }
        out.extend_from_slice(b"\r\n");
    }

    pub fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Lost>> {
        if self.out.has_room() {
            Poll::Ready(Ok(()))
        } else {
            self.poll_flush(cx)
        }
    }

    pub fn give(&mut self, mut data: Bytes, last: bool) {
        // Each version's reader holds a client to its word; the app would take one byte more for its next request.
        if let Some(unsent) = &mut self.unsent {
            data.truncate(usize::try_from(*unsent).unwrap_or(usize::MAX));
            *unsent -= data.len() as u64;
        }
        self.out.give(data);
        if last {
            self.finish(None);
        }
    }

    pub fn finish(&mut self, trailers: Option<HeaderMap>) {
        self.out
            .finish(|out| relay::write_trailers(out, trailers.as_ref()));
        self.sent = self.unsent.is_none_or(|left| left == 0);
        self.shut = self.tunnel;
    }

    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Lost>> {
        if !self.out.is_empty() {
            ready!(self.out.poll_flush(&mut self.io, cx))?;
        }
        if self.shut {
            ready!(Pin::new(&mut self.io).poll_shutdown(cx))?;
        }
        Poll::Ready(Ok(()))
    }

    pub fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ReplyHead, Lost>> {
        loop {
            if !self.input.is_empty() {
                self.heard = true;
                let head = head::reply(&mut self.input, &mut self.scan, &self.method);
                if let Some(head) = head.map_err(|bad| Lost::Reply(bad.0))? {
                    self.received(&head);
                    return Poll::Ready(Ok(head));
                }
            }
            if ready!(buffer::poll_fill(&mut self.io, cx, &mut self.input, SMALL))? == 0 {
                return Poll::Ready(Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()));
            }
        }
    }

    fn received(&mut self, head: &ReplyHead) {
        if head.status < 200 && head.status != 101 {
            return;
        }
        self.answered = true;
        // An app of HTTP/1.0 may not know what it agrees to.
        self.keep = head.version == Version::HTTP_11
            && head.length != Length::Tunnel
            && head::persists(&head.fields, head.version);
        self.content = Decoder::new(head.length);
    }

    pub fn poll_content(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, Lost>> {
        loop {
            match self.content.next(&mut self.input) {
                Ok(Some(piece)) => return Poll::Ready(Ok(piece)),
                Ok(None) => {}
                Err(BadContent) => {
                    return Poll::Ready(Err(Lost::Reply("its chunks are not right")));
                }
            }
            if ready!(buffer::poll_fill(&mut self.io, cx, &mut self.input, LARGE))? == 0 {
                let whole = self.content.ends();
                let broken = || Lost::from(io::Error::from(io::ErrorKind::UnexpectedEof));
                return Poll::Ready(whole.map(|()| Piece::End(None)).map_err(|_| broken()));
            }
        }
    }

    pub fn tunnel(&mut self) {
        self.tunnel = true;
        self.unsent = None;
        self.out.frame(Framing::Plain);
        self.content = Decoder::UntilEnd;
    }

    pub fn is_silent(&self) -> bool {
        !self.heard
    }
}
