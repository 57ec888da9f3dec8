//! An HTTP message's head and the pieces of its content, whatever version carries it. No I/O.
//!
//! Each version's reader makes these and has checked by then what its own RFC asks for; what follows
//! ([`crate::headers`]) is the same for all.

use bytes::Bytes;
use http::{HeaderMap, Method, Version};

/// A request's head.
#[derive(Debug)]
pub struct RequestHead {
    pub method: Method,
    /// Path and query, or `*`.
    pub target: Bytes,
    /// The authority that it is for: of the target where that has one, else of Host (RFC 9112 section 3.2.2).
    pub authority: Bytes,
    pub version: Version,
    pub fields: Fields,
    pub length: Length,
    /// The protocol that it asks to change to.
    pub upgrade: Option<Upgrade>,
    /// The client waits for `100 Continue` before it sends the content.
    pub expects_continue: bool,
}

/// A wish to leave HTTP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Upgrade {
    /// HTTP/1.1 `Upgrade`, with its value (RFC 9110 section 7.8).
    Header(Bytes),
    /// Extended CONNECT (RFC 8441, RFC 9220), with its `:protocol`.
    Connect(Bytes),
}

/// A reply's head.
#[derive(Debug)]
pub struct ReplyHead {
    pub status: u16,
    /// As the app wrote it; empty where its version has none.
    pub reason: Bytes,
    pub version: Version,
    pub fields: Fields,
    pub length: Length,
}

/// How much content follows a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// None, and the head does not speak of any.
    None,
    /// This many bytes.
    Exact(u64),
    /// Until its sender says so.
    Unknown,
    /// No message content any more, but bytes of another protocol, both ways.
    Tunnel,
}

/// A piece of content.
#[derive(Debug)]
pub enum Piece {
    /// Some bytes, and whether they are the last.
    Data(Bytes, bool),
    /// The end, with what came after the content.
    End(Option<HeaderMap>),
}

/// A head's fields, in their order.
#[derive(Debug)]
pub enum Fields {
    /// Lines of an HTTP/1 head.
    Lines(Lines),
    /// Of HTTP/2 and 3.
    Map(HeaderMap),
}

/// Fields within the bytes they came in.
#[derive(Debug, Default)]
pub struct Lines {
    bytes: Bytes,
    lines: Vec<Line>,
}

#[derive(Debug, Clone, Copy)]
struct Line {
    name: (u32, u32),
    value: (u32, u32),
}

impl Lines {
    /// The fields that `parsed` points to within `bytes`.
    pub fn new(bytes: Bytes, parsed: &[httparse::Header<'_>]) -> Self {
        let base = bytes.as_ptr() as usize;
        let within = |part: &[u8]| {
            // An empty value may point anywhere.
            let at = (part.as_ptr() as usize).wrapping_sub(base);
            if part.is_empty() || at + part.len() > bytes.len() {
                (0, 0)
            } else {
                (at as u32, part.len() as u32)
            }
        };
        let lines = parsed
            .iter()
            .map(|h| Line {
                name: within(h.name.as_bytes()),
                value: within(h.value),
            })
            .collect();
        Self { bytes, lines }
    }

    fn part(&self, (at, length): (u32, u32)) -> &[u8] {
        &self.bytes[at as usize..(at + length) as usize]
    }
}

impl Fields {
    /// Names (of HTTP/1 in the case they came in) and values.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let (lines, map) = match self {
            Self::Lines(lines) => (Some(lines), None),
            Self::Map(map) => (None, Some(map)),
        };
        let lines = lines.into_iter().flat_map(|lines| {
            let all = lines.lines.iter();
            all.map(|line| (lines.part(line.name), lines.part(line.value)))
        });
        let map = map.into_iter().flatten();
        lines.chain(map.map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes())))
    }

    /// All values of a field, whose name is given in lower case.
    pub fn all<'a>(&'a self, name: &'static str) -> impl Iterator<Item = &'a [u8]> {
        self.iter()
            .filter(move |(n, _)| n.eq_ignore_ascii_case(name.as_bytes()))
            .map(|(_, value)| value)
    }

    /// The members of all of a field's comma-separated lists.
    pub fn members<'a>(&'a self, name: &'static str) -> impl Iterator<Item = &'a [u8]> {
        self.all(name)
            .flat_map(|value| value.split(|b| *b == b','))
            .map(<[u8]>::trim_ascii)
            .filter(|member| !member.is_empty())
    }

    /// Bytes of all names and values, and of what HTTP/1 writes around them.
    pub fn size(&self) -> usize {
        self.iter().map(|(n, v)| n.len() + v.len() + 4).sum()
    }
}

impl RequestHead {
    /// Whether it may be sent again without asking, its content set aside (RFC 9110 section 9.2.2).
    pub fn is_repeatable(&self) -> bool {
        self.method.is_idempotent()
            && matches!(self.length, Length::None | Length::Exact(0))
            && self.upgrade.is_none()
    }
}
