//! An HTTP/1 message's content within a connection's bytes (RFC 9112 sections 6 and 7). No I/O.

use bytes::{Buf as _, Bytes, BytesMut};
use http::HeaderMap;
use http::header::{HeaderName, HeaderValue};

use super::scan::{LineEnds, Scan};
use crate::message::{Length, Piece};

/// Takes content out of what is received.
#[derive(Debug)]
pub enum Decoder {
    /// This much is left.
    Exact(u64),
    Chunked(Chunked),
    /// Until the connection ends.
    UntilEnd,
    /// All was taken.
    Done,
}

/// Where in a chunked content.
#[derive(Debug)]
pub struct Chunked {
    state: State,
    /// Bytes of extensions so far: nobody acts on them, so they are no way to send for ever.
    extensions: usize,
}

#[derive(Debug)]
enum State {
    /// Before a size line.
    Size,
    /// Within a chunk of which this is left.
    Data(u64),
    /// After a chunk's data.
    DataEnd,
    Trailers(Scan),
}

/// Content that cannot be read, or can be read in two ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadContent;

/// Longest line with a chunk's size.
const MAX_SIZE_LINE: usize = 1024;
/// Bytes of extensions in one message (hyper has the same limit).
const MAX_EXTENSIONS: usize = 16 << 10;
const MAX_TRAILERS: usize = 16 << 10;
const MAX_TRAILER_FIELDS: usize = 64;

impl Decoder {
    pub fn new(length: Length) -> Self {
        match length {
            Length::None | Length::Exact(0) => Self::Done,
            Length::Exact(n) => Self::Exact(n),
            Length::Unknown => Self::Chunked(Chunked {
                state: State::Size,
                extensions: 0,
            }),
            Length::Tunnel => Self::UntilEnd,
        }
    }

    pub fn is_done(&self) -> bool {
        matches!(self, Self::Done)
    }

    /// The next piece of what is in `input`; `None` where more must be received first.
    pub fn next(&mut self, input: &mut BytesMut) -> Result<Option<Piece>, BadContent> {
        match self {
            Self::Done => Ok(Some(Piece::End(None))),
            _ if input.is_empty() => Ok(None),
            Self::UntilEnd => Ok(Some(Piece::Data(input.split().freeze(), false))),
            Self::Exact(left) => {
                let data = take(left, input);
                let last = *left == 0;
                if last {
                    *self = Self::Done;
                }
                Ok(Some(Piece::Data(data, last)))
            }
            Self::Chunked(chunked) => {
                let piece = chunked.next(input)?;
                if matches!(piece, Some(Piece::End(_))) {
                    *self = Self::Done;
                }
                Ok(piece)
            }
        }
    }

    /// The connection's other end sends no more: whether the content is whole by that.
    pub fn ends(&mut self) -> Result<(), BadContent> {
        match self {
            Self::UntilEnd | Self::Done => {
                *self = Self::Done;
                Ok(())
            }
            _ => Err(BadContent),
        }
    }
}

fn take(left: &mut u64, input: &mut BytesMut) -> Bytes {
    let most = usize::try_from(*left).unwrap_or(usize::MAX);
    let length = input.len().min(most);
    *left -= length as u64;
    input.split_to(length).freeze()
}

impl Chunked {
    fn next(&mut self, input: &mut BytesMut) -> Result<Option<Piece>, BadContent> {
        loop {
            match &mut self.state {
                State::Size => {
                    let line = &input[..input.len().min(MAX_SIZE_LINE)];
                    let Some(end) = line.iter().position(|b| *b == b'\n') else {
                        let full = input.len() >= MAX_SIZE_LINE;
                        return if full { Err(BadContent) } else { Ok(None) };
                    };
                    let (size, extensions) = size(&line[..end])?;
                    self.extensions += extensions;
                    if self.extensions > MAX_EXTENSIONS {
                        return Err(BadContent);
                    }
                    input.advance(end + 1);
                    self.state = match size {
                        0 => State::Trailers(Scan::new(LineEnds::Strict)),
                        n => State::Data(n),
                    };
                }
                State::Data(left) => {
                    if input.is_empty() {
                        return Ok(None);
                    }
                    let data = take(left, input);
                    if *left == 0 {
                        self.state = State::DataEnd;
                    }
                    return Ok(Some(Piece::Data(data, false)));
                }
                State::DataEnd => {
                    match &input[..] {
                        [b'\r', b'\n', ..] => {}
                        [] | [b'\r'] => return Ok(None),
                        _ => return Err(BadContent),
                    }
                    input.advance(2);
                    self.state = State::Size;
                }
                State::Trailers(scan) => {
                    let Some(end) = scan.head_end(input).map_err(|_| BadContent)? else {
                        let full = input.len() > MAX_TRAILERS;
                        return if full { Err(BadContent) } else { Ok(None) };
                    };
                    let trailers = input.split_to(end);
                    return Ok(Some(Piece::End(fields(&trailers)?)));
                }
            }
        }
    }
}

/// A chunk's size, and how long its extensions are. The line is without its LF.
fn size(line: &[u8]) -> Result<(u64, usize), BadContent> {
    let line = line.strip_suffix(b"\r").ok_or(BadContent)?;
    let digits = line.iter().take_while(|b| b.is_ascii_hexdigit()).count();
    // Sixteen digits fit 64 bits whatever they are.
    if digits == 0 || digits > 16 {
        return Err(BadContent);
    }
    let (number, rest) = line.split_at(digits);
    let extension = rest.trim_ascii_start();
    // chunk-ext = *( BWS ";" BWS name [ "=" value ] ): text that nobody may take for the end of a line.
    let text = |b: &u8| *b == b'\t' || (*b >= b' ' && *b != 0x7f);
    if !(extension.is_empty() && rest.is_empty() || extension.starts_with(b";"))
        || !rest.iter().all(text)
    {
        return Err(BadContent);
    }
    let size = number.iter().fold(0_u64, |n, b| {
        n << 4 | u64::from((*b as char).to_digit(16).unwrap_or(0))
    });
    Ok((size, rest.len()))
}

/// The trailers, if there are any.
fn fields(bytes: &[u8]) -> Result<Option<HeaderMap>, BadContent> {
    if bytes == b"\r\n" {
        return Ok(None);
    }
    let mut parsed = [httparse::EMPTY_HEADER; MAX_TRAILER_FIELDS];
    let (_, parsed) = match httparse::parse_headers(bytes, &mut parsed) {
        Ok(httparse::Status::Complete(whole)) => whole,
        _ => return Err(BadContent),
    };
    let mut map = HeaderMap::with_capacity(parsed.len());
    for field in parsed {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| BadContent)?;
        let value = HeaderValue::from_bytes(field.value).map_err(|_| BadContent)?;
        map.append(name, value);
    }
    Ok(Some(map))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Content, trailers, and what follows.
    type Decoded = (Vec<u8>, Option<HeaderMap>, Vec<u8>);

    fn decode(length: Length, bytes: &[u8]) -> Result<Decoded, BadContent> {
        let mut decoder = Decoder::new(length);
        let mut input = BytesMut::from(bytes);
        let mut content = Vec::new();
        loop {
            match decoder.next(&mut input)? {
                Some(Piece::Data(data, last)) => {
                    content.extend_from_slice(&data);
                    if last {
                        return Ok((content, None, input.to_vec()));
                    }
                }
                Some(Piece::End(trailers)) => return Ok((content, trailers, input.to_vec())),
                None => return Err(BadContent),
            }
        }
    }

    #[test]
    fn what_follows_the_content_is_left() {
        let exact = decode(Length::Exact(5), b"helloGET /").unwrap();
        assert_eq!((&exact.0[..], &exact.2[..]), (&b"hello"[..], &b"GET /"[..]));
        let chunked = decode(
            Length::Unknown,
            b"5\r\nhello\r\n00;a=\"b\"\r\nX: y\r\n\r\nGET /",
        )
        .unwrap();
        assert_eq!(
            (&chunked.0[..], &chunked.2[..]),
            (&b"hello"[..], &b"GET /"[..])
        );
        assert_eq!(chunked.1.unwrap()["x"], "y");
    }

    #[test]
    fn chunks_that_can_be_read_in_two_ways_are_refused() {
        for bad in [
            &b"5\nhello\r\n0\r\n\r\n"[..],
            b"0x5\r\nhello\r\n0\r\n\r\n",
            b"+5\r\nhello\r\n0\r\n\r\n",
            b"-5\r\nhello\r\n0\r\n\r\n",
            b" 5\r\nhello\r\n0\r\n\r\n",
            b"5 \r\nhello\r\n0\r\n\r\n",
            b"5\rX\nhello\r\n0\r\n\r\n",
            b"5;a\rb\r\nhello\r\n0\r\n\r\n",
            b"5\r\nhelloX\r\n0\r\n\r\n",
            b"5\r\nhello\n0\r\n\r\n",
            b"\r\nhello\r\n0\r\n\r\n",
            b"10000000000000000\r\nhello\r\n0\r\n\r\n",
            b"5\r\nhello\r\n0\r\nX : y\r\n\r\n",
            b"5\r\nhello\r\n0\r\nX: y\n\r\n",
            b"5\r\nhello\r\n0\r\nX: y\r\n z\r\n\r\n",
        ] {
            let text = String::from_utf8_lossy(bad);
            assert_eq!(decode(Length::Unknown, bad), Err(BadContent), "{text:?}");
        }
    }

    #[test]
    fn extensions_are_bounded_over_all_chunks() {
        let extension = "x".repeat(1000);
        let chunk = format!("1;{extension}\r\na\r\n");
        let mut some = chunk.repeat(10);
        some.push_str("0\r\n\r\n");
        assert_eq!(
            decode(Length::Unknown, some.as_bytes()).unwrap().0.len(),
            10
        );
        let many = chunk.repeat(20);
        assert_eq!(decode(Length::Unknown, many.as_bytes()), Err(BadContent));
    }

    #[test]
    fn content_cut_off_is_not_whole() {
        assert_eq!(Decoder::new(Length::Exact(5)).ends(), Err(BadContent));
        assert_eq!(Decoder::new(Length::Unknown).ends(), Err(BadContent));
        assert_eq!(Decoder::new(Length::Tunnel).ends(), Ok(()));
    }

    proptest! {
        /// Whatever comes, in whatever pieces: no panic, and the same content.
        #[test]
        fn pieces_make_no_difference(bytes in "[0-9a-f;\r\nX: ]{0,60}", cut in 0usize..60) {
            let whole = decode(Length::Unknown, bytes.as_bytes()).map(|d| d.0);
            let mut decoder = Decoder::new(Length::Unknown);
            let mut input = BytesMut::new();
            let mut content = Vec::new();
            let cut = cut.min(bytes.len());
            let mut outcome = Err(BadContent);
            'all: for part in [&bytes.as_bytes()[..cut], &bytes.as_bytes()[cut..]] {
                input.extend_from_slice(part);
                loop {
                    match decoder.next(&mut input) {
                        Ok(Some(Piece::Data(data, _))) => content.extend_from_slice(&data),
                        Ok(Some(Piece::End(_))) => { outcome = Ok(content.clone()); break 'all; }
                        Ok(None) => break,
                        Err(bad) => { outcome = Err(bad); break 'all; }
                    }
                }
            }
            prop_assert_eq!(outcome, whole);
        }
    }
}
