//! The two ends of a relay, as the pump sees them.

use std::io;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use thiserror::Error;

use super::pool::H2App;
use crate::h1;
use crate::headers::{Changes, Facts};
use crate::message::{Length, Piece, ReplyHead, RequestHead};

/// One request's client, whatever version it speaks.
///
/// The pump polls [`Client::poll_content`] until the request's end, and gives the reply: any number of interim
/// heads, one final head, and its content. It gives only after [`Client::poll_room`] was ready.
pub trait Client {
    /// The next piece of the request's content.
    fn poll_content(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, Gone>>;

    /// Ready when more may be given.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>>;

    /// Whether it understands interim replies other than 101 (RFC 9110 section 15.2).
    fn takes_interim(&self) -> bool;

    /// A head. After 101, or 200 to an extended CONNECT, content is the tunnel's bytes in both directions.
    fn begin(&mut self, reply: &Reply<'_>) -> Result<(), Gone>;

    /// A piece of content, and whether it is the last.
    fn give(&mut self, data: Bytes, last: bool) -> Result<(), Gone>;

    /// The end of content that did not end with its last piece.
    fn finish(&mut self, trailers: Option<HeaderMap>) -> Result<(), Gone>;

    /// Ready when all that was given is with the transport.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>>;

    /// Ready when the client has given its request up.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Gone>;
}

/// Why there is no client to answer any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// It went away.
    Closed,
    /// What it sent cannot be read; it can still be told.
    Malformed,
}

/// Why there is no reply, or no whole one.
#[derive(Debug, Error)]
pub enum Lost {
    /// The connection.
    #[error("the connection to the app was lost: {0}")]
    Connection(#[from] io::Error),
    /// This request alone was given up, by an app that may have begun with it.
    #[error("the app gave the request up")]
    Reset,
    /// This request alone was given up, by an app that has not begun with it.
    #[error("the app refused the request")]
    Refused,
    /// What came is no reply.
    #[error("the app's reply cannot be passed on: {0}")]
    Reply(&'static str),
}

/// A reply's head as a client is given it.
pub struct Reply<'a> {
    pub status: u16,
    pub reason: &'a [u8],
    pub fields: ReplyFields<'a>,
    pub length: Length,
}

/// Where a reply's fields come from.
pub enum ReplyFields<'a> {
    /// An app, with the edge's changes.
    App {
        head: &'a ReplyHead,
        changes: &'a Changes,
        facts: &'a Facts<'a>,
    },
    /// The edge itself.
    Page(&'a [(&'static str, &'a str)]),
}

impl Reply<'_> {
    /// Each field, without what frames the content on this hop.
    pub fn each(&self, put: &mut dyn FnMut(&[u8], &[u8])) {
        match &self.fields {
            ReplyFields::App {
                head,
                changes,
                facts,
            } => crate::headers::for_client(head, changes, facts, put),
            ReplyFields::Page(fields) => {
                for (name, value) in *fields {
                    put(name.as_bytes(), value.as_bytes());
                }
            }
        }
    }

    /// Whether nothing follows the head.
    pub fn ends_here(&self) -> bool {
        matches!(self.length, Length::None | Length::Exact(0))
    }

    /// Whether it comes before the final one.
    pub fn is_interim(&self) -> bool {
        self.status < 200 && self.status != 101
    }
}

/// One request's app, on a connection of its own or a stream of a shared one.
pub enum App {
    H1(Box<h1::app::Connection>),
    H2(Box<H2App>),
}

impl App {
    /// Writes the request's head; content follows if it says so.
    pub fn begin(&mut self, head: &RequestHead, facts: &Facts<'_>) -> Result<(), Lost> {
        match self {
            Self::H1(app) => {
                app.begin(head, facts);
                Ok(())
            }
            Self::H2(app) => app.begin(head, facts),
        }
    }

    pub fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Lost>> {
        match self {
            Self::H1(app) => app.poll_room(cx),
            Self::H2(app) => app.poll_room(cx),
        }
    }

    pub fn give(&mut self, data: Bytes, last: bool) -> Result<(), Lost> {
        match self {
            Self::H1(app) => {
                app.give(data, last);
                Ok(())
            }
            Self::H2(app) => app.give(data, last),
        }
    }

    pub fn finish(&mut self, trailers: Option<HeaderMap>) -> Result<(), Lost> {
        match self {
            Self::H1(app) => {
                app.finish(trailers);
                Ok(())
            }
            Self::H2(app) => app.finish(trailers),
        }
    }

    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Lost>> {
        match self {
            Self::H1(app) => app.poll_flush(cx),
            Self::H2(app) => app.poll_room(cx),
        }
    }

    /// The next head of its reply, interim ones included.
    pub fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ReplyHead, Lost>> {
        match self {
            Self::H1(app) => app.poll_head(cx),
            Self::H2(app) => app.poll_head(cx),
        }
    }

    pub fn poll_content(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, Lost>> {
        match self {
            Self::H1(app) => app.poll_content(cx),
            Self::H2(app) => app.poll_content(cx),
        }
    }

    /// The reply's head was a 101: what follows, both ways, is another protocol's.
    pub fn tunnel(&mut self) {
        if let Self::H1(app) = self {
            app.tunnel();
        }
    }

    /// Whether nothing was heard of a reply.
    pub fn is_silent(&self) -> bool {
        match self {
            Self::H1(app) => app.is_silent(),
            Self::H2(app) => app.is_silent(),
        }
    }
}

/// Writes trailers as HTTP/1 lines; those that would frame the message are left out (RFC 9110 section 6.5.1).
pub fn write_trailers(out: &mut BytesMut, trailers: Option<&HeaderMap>) {
    for (name, value) in trailers.into_iter().flatten() {
        if crate::headers::may_trail(name.as_str()) {
            out.extend_from_slice(name.as_str().as_bytes());
            out.extend_from_slice(b": ");
            out.extend_from_slice(value.as_bytes());
            out.extend_from_slice(b"\r\n");
        }
    }
}
