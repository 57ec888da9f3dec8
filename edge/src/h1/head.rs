//! HTTP/1 heads (RFC 9112), read strictly from clients and as generously from apps as is safe. No I/O.

use std::mem::MaybeUninit;

use bytes::{Bytes, BytesMut};
use http::{Method, Version};

use super::scan::{LineEnds, Scan};
use crate::message::{Fields, Length, Lines, ReplyHead, RequestHead, Upgrade};

/// Largest head, of requests and replies; nginx allows 32 KiB, hyper some 400.
pub const MAX_HEAD_BYTES: usize = 64 << 10;
/// Most fields of a head; HAProxy allows 101, nginx 1000 since 1.29.
pub const MAX_FIELDS: usize = 256;

/// What is wrong with a request's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadHead {
    /// Its target alone is larger than [`MAX_HEAD_BYTES`].
    TargetTooLong,
    /// Larger than [`MAX_HEAD_BYTES`], or too many fields.
    TooLarge,
    /// Its length is told in two ways, or its host: whoever reads it differently can be fooled
    /// (request smuggling, RFC 9112 section 11.2).
    Ambiguous,
    /// A transfer coding that is not `chunked` alone (RFC 9112 section 6.1).
    UnknownCoding,
    /// Not what HTTP/1.1 calls a request.
    Malformed,
    /// It names no host.
    NoHost,
    /// CONNECT: the edge is nobody's forward proxy.
    Connect,
}

/// What is wrong with a reply's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadReply(pub &'static str);

/// Takes the next request's head out of `input`, once it is there. An empty line before it is skipped (RFC 9112
/// section 2.2).
pub fn request(input: &mut BytesMut, scan: &mut Scan) -> Result<Option<RequestHead>, BadHead> {
    // What cannot begin a method, TLS to the wrong port for one, is not waited for.
    if input.first().is_some_and(|b| !is_token(*b) && *b != b'\r') {
        return Err(BadHead::Malformed);
    }
    let found = scan.head_end(input).map_err(|_| BadHead::Malformed)?;
    let Some(end) = found else {
        if input.len() <= MAX_HEAD_BYTES {
            return Ok(None);
        }
        let first = scan.in_first_line();
        return Err(if first {
            BadHead::TargetTooLong
        } else {
            BadHead::TooLarge
        });
    };
    *scan = Scan::new(LineEnds::Strict);
    let bytes = input.split_to(end).freeze();
    if bytes.len() == b"\r\n".len() {
        let another = input.first() == Some(&b'\r');
        return if another {
            Err(BadHead::Malformed)
        } else {
            request(input, scan)
        };
    }
    let line = bytes.iter().position(|b| *b == b'\r').unwrap_or(0);
    if bytes.len() > MAX_HEAD_BYTES {
        let long = line > MAX_HEAD_BYTES;
        return Err(if long {
            BadHead::TargetTooLong
        } else {
            BadHead::TooLarge
        });
    }
    let mut space = [const { MaybeUninit::uninit() }; MAX_FIELDS];
    let mut parsed = httparse::Request::new(&mut []);
    match parsed.parse_with_uninit_headers(&bytes, &mut space) {
        Ok(httparse::Status::Complete(_)) => {}
        Err(httparse::Error::TooManyHeaders) => return Err(BadHead::TooLarge),
        _ => return Err(BadHead::Malformed),
    }
    let method = parsed.method.ok_or(BadHead::Malformed)?;
    let method = Method::from_bytes(method.as_bytes()).map_err(|_| BadHead::Malformed)?;
    let target = bytes.slice_ref(parsed.path.ok_or(BadHead::Malformed)?.as_bytes());
    let version = match parsed.version {
        Some(0) => Version::HTTP_10,
        _ => Version::HTTP_11,
    };
    let fields = Fields::Lines(Lines::new(bytes.clone(), parsed.headers));
    if method == Method::CONNECT {
        return Err(BadHead::Connect);
    }
    let (target, authority) = split(target)?;
    let authority = match (authority, host(&fields, &bytes)?) {
        (Some(authority), _) => authority,
        (None, Some(host)) => host,
        (None, None) => return Err(BadHead::NoHost),
    };
    let length = request_length(&fields, version)?;
    let upgrade = upgrade(&fields, &bytes).filter(|_| version == Version::HTTP_11);
    let expects_continue = version == Version::HTTP_11
        && fields
            .all("expect")
            .any(|v| v.eq_ignore_ascii_case(b"100-continue"));
    Ok(Some(RequestHead {
        method,
        target,
        authority,
        version,
        fields,
        length,
        upgrade,
        expects_continue,
    }))
}

/// `tchar` of RFC 9110 section 5.6.2.
pub fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Path and query, and the authority where the target is in absolute form (RFC 9112 section 3.2).
fn split(target: Bytes) -> Result<(Bytes, Option<Bytes>), BadHead> {
    // A fragment is not sent, and a control character is what fools the next reader's line.
    if target
        .iter()
        .any(|b| *b <= b' ' || *b == 0x7f || *b == b'#')
    {
        return Err(BadHead::Malformed);
    }
    if target.starts_with(b"/") || &target[..] == b"*" {
        return Ok((target, None));
    }
    let scheme = target.windows(3).position(|w| w == b"://");
    let scheme = scheme.ok_or(BadHead::Malformed)?;
    if !matches!(
        &target[..scheme].to_ascii_lowercase()[..],
        b"http" | b"https"
    ) {
        return Err(BadHead::Malformed);
    }
    let rest = target.slice(scheme + 3..);
    let end = rest.iter().position(|b| matches!(b, b'/' | b'?'));
    let (authority, path) = match end {
        Some(end) if rest[end] == b'/' => (rest.slice(..end), rest.slice(end..)),
        Some(end) => {
            let with_slash = [b"/", &rest[end..]].concat();
            (rest.slice(..end), Bytes::from(with_slash))
        }
        None => (rest, Bytes::from_static(b"/")),
    };
    // User information is for clients alone (RFC 9110 section 4.2.4).
    if authority.is_empty() || authority.contains(&b'@') {
        return Err(BadHead::Malformed);
    }
    Ok((path, Some(authority)))
}

fn host(fields: &Fields, bytes: &Bytes) -> Result<Option<Bytes>, BadHead> {
    let mut all = fields.all("host");
    let first = all.next();
    if all.next().is_some() {
        return Err(BadHead::Ambiguous);
    }
    Ok(first.map(|host| part(bytes, host)))
}

fn request_length(fields: &Fields, version: Version) -> Result<Length, BadHead> {
    let mut lengths = fields.all("content-length");
    let mut codings = fields.all("transfer-encoding");
    match (lengths.next(), codings.next()) {
        (None, None) => Ok(Length::None),
        (Some(_), Some(_)) => Err(BadHead::Ambiguous),
        (Some(length), None) => {
            let length = number(length).ok_or(BadHead::Ambiguous)?;
            let only = lengths.next().is_none();
            only.then_some(Length::Exact(length))
                .ok_or(BadHead::Ambiguous)
        }
        (None, Some(coding)) => {
            // Before HTTP/1.1 nobody agreed on what it means.
            if version == Version::HTTP_10 || codings.next().is_some() {
                return Err(BadHead::Ambiguous);
            }
            let chunked = coding.eq_ignore_ascii_case(b"chunked");
            chunked
                .then_some(Length::Unknown)
                .ok_or(BadHead::UnknownCoding)
        }
    }
}

fn upgrade(fields: &Fields, bytes: &Bytes) -> Option<Upgrade> {
    let asked = fields
        .members("connection")
        .any(|m| m.eq_ignore_ascii_case(b"upgrade"));
    let to = fields.all("upgrade").next().filter(|_| asked)?;
    // HTTP/2 without TLS is asked for by prior knowledge alone (RFC 9113 section 3.1).
    let ours = to.eq_ignore_ascii_case(b"h2c");
    (!ours).then(|| Upgrade::Header(part(bytes, to)))
}

/// A part of `bytes` that shares them; copied where it is none (an empty value).
fn part(bytes: &Bytes, of: &[u8]) -> Bytes {
    if of.is_empty() {
        Bytes::new()
    } else {
        bytes.slice_ref(of)
    }
}

/// `1*DIGIT` that a file could have: no sign, no list.
fn number(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 18 || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(text.iter().fold(0, |n, b| n * 10 + u64::from(b - b'0')))
}

/// Takes a reply's head out of `input`, once it is there. `method` is that of its request.
pub fn reply(
    input: &mut BytesMut,
    scan: &mut Scan,
    method: &Method,
) -> Result<Option<ReplyHead>, BadReply> {
    let found = scan.head_end(input);
    let Some(end) = found.map_err(|_| BadReply("its head has a bare line feed"))? else {
        let large = input.len() > MAX_HEAD_BYTES;
        return if large {
            Err(BadReply("its head is larger than 64 KiB"))
        } else {
            Ok(None)
        };
    };
    *scan = Scan::new(LineEnds::Lenient);
    let bytes = input.split_to(end).freeze();
    let mut space = [const { MaybeUninit::uninit() }; MAX_FIELDS];
    let mut parsed = httparse::Response::new(&mut []);
    let mut config = httparse::ParserConfig::default();
    // A proxy removes the space (RFC 9112 section 5.1).
    config.allow_spaces_after_header_name_in_responses(true);
    match config.parse_response_with_uninit_headers(&mut parsed, &bytes, &mut space) {
        Ok(httparse::Status::Complete(_)) => {}
        Err(httparse::Error::TooManyHeaders) => return Err(BadReply("it has too many fields")),
        _ => return Err(BadReply("its head is not HTTP/1")),
    }
    let status = parsed.code.ok_or(BadReply("it has no status"))?;
    if !(100..=999).contains(&status) {
        return Err(BadReply("its status is not a number of three digits"));
    }
    let reason = part(&bytes, parsed.reason.unwrap_or_default().as_bytes());
    let version = match parsed.version {
        Some(0) => Version::HTTP_10,
        _ => Version::HTTP_11,
    };
    let fields = Fields::Lines(Lines::new(bytes.clone(), parsed.headers));
    let length = reply_length(&fields, status, method)?;
    Ok(Some(ReplyHead {
        status,
        reason,
        version,
        fields,
        length,
    }))
}

/// RFC 9112 section 6.3. [`Length::Unknown`] is chunked; [`Length::Tunnel`] lasts until the connection ends.
fn reply_length(fields: &Fields, status: u16, method: &Method) -> Result<Length, BadReply> {
    if status == 101 {
        return Ok(Length::Tunnel);
    }
    let mut codings = fields.members("transfer-encoding");
    let coding = codings.next();
    let several = codings.next().is_some();
    if let Some(coding) = coding
        && (several || !coding.eq_ignore_ascii_case(b"chunked"))
    {
        return Err(BadReply("its transfer coding is not `chunked`"));
    }
    if *method == Method::HEAD || status < 200 || status == 204 || status == 304 {
        return Ok(Length::None);
    }
    if coding.is_some() {
        return Ok(Length::Unknown);
    }
    let mut length = None;
    // One that is told twice alike is one (RFC 9110 section 8.6).
    for told in fields.members("content-length") {
        let told = number(told).ok_or(BadReply("its length is no number"))?;
        if length.is_some_and(|length| length != told) {
            return Err(BadReply("it has two lengths"));
        }
        length = Some(told);
    }
    Ok(length.map_or(Length::Tunnel, Length::Exact))
}

/// Whether the connection that a message came on goes on after it (RFC 9112 section 9.3).
pub fn persists(fields: &Fields, version: Version) -> bool {
    let says = |what: &[u8]| {
        fields
            .members("connection")
            .any(|m| m.eq_ignore_ascii_case(what))
    };
    !says(b"close") && (version == Version::HTTP_11 || says(b"keep-alive"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<RequestHead, BadHead> {
        let mut input = BytesMut::from(text.as_bytes());
        let head = request(&mut input, &mut Scan::new(LineEnds::Strict))?;
        Ok(head.expect("a whole head"))
    }

    fn answer(text: &str, method: Method) -> Result<ReplyHead, BadReply> {
        let mut input = BytesMut::from(text.as_bytes());
        let head = reply(&mut input, &mut Scan::new(LineEnds::Lenient), &method)?;
        Ok(head.expect("a whole head"))
    }

    #[test]
    fn a_request_is_read() {
        let head =
            read("\r\nPOST /a?b HTTP/1.1\r\nHost: x.y:80\r\nContent-Length: 5\r\nE: \r\n\r\n")
                .unwrap();
        assert_eq!(
            (&head.method, &head.target[..]),
            (&Method::POST, &b"/a?b"[..])
        );
        assert_eq!(
            (&head.authority[..], head.length),
            (&b"x.y:80"[..], Length::Exact(5))
        );
        assert_eq!(head.fields.all("e").next(), Some(&b""[..]));
    }

    #[test]
    fn the_targets_authority_counts_before_host() {
        let head = read("GET HTTP://a.b?q HTTP/1.1\r\nHost: x.y\r\n\r\n").unwrap();
        assert_eq!(
            (&head.authority[..], &head.target[..]),
            (&b"a.b"[..], &b"/?q"[..])
        );
    }

    #[test]
    fn heads_that_can_be_read_in_two_ways_are_refused() {
        use BadHead::{Ambiguous, Connect, Malformed, NoHost, UnknownCoding};
        for (lines, bad) in [
            ("Host: a\r\nHost: a", Ambiguous),
            ("X: y", NoHost),
            (
                "Host: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked",
                Ambiguous,
            ),
            (
                "Host: a\r\nContent-Length: 1\r\nContent-Length: 1",
                Ambiguous,
            ),
            ("Host: a\r\nContent-Length: +1", Ambiguous),
            ("Host: a\r\nContent-Length: 1, 1", Ambiguous),
            ("Host: a\r\nContent-Length: 0x1", Ambiguous),
            ("Host: a\r\nContent-Length:", Ambiguous),
            ("Host: a\r\nContent-Length: 99999999999999999999", Ambiguous),
            ("Host: a\r\nTransfer-Encoding: xchunked", UnknownCoding),
            ("Host: a\r\nTransfer-Encoding: gzip, chunked", UnknownCoding),
            (
                "Host: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x",
                Ambiguous,
            ),
            ("Host: a\r\nTransfer-Encoding:\r\n chunked", Malformed),
            ("Host: a\r\nTransfer-Encoding : chunked", Malformed),
            ("Host: a\r\nX: a\0b", Malformed),
            ("Host: a\r\nX: a\rb", Malformed),
            ("Host: a\nX: b", Malformed),
            (" Host: a", Malformed),
            ("Host: a\r\n b: c", Malformed),
        ] {
            let text = format!("POST / HTTP/1.1\r\n{lines}\r\n\r\n");
            assert_eq!(read(&text).unwrap_err(), bad, "{lines:?}");
        }
        for (line, bad) in [
            ("CONNECT a:80 HTTP/1.1", Connect),
            ("GET a HTTP/1.1", Malformed),
            ("GET ftp://a/ HTTP/1.1", Malformed),
            ("GET http://u@a/ HTTP/1.1", Malformed),
            ("GET /a#b HTTP/1.1", Malformed),
            ("GET /a b HTTP/1.1", Malformed),
            ("GET / HTTP/1.2", Malformed),
            ("GET / HTTP/2.0", Malformed),
            ("GET /", Malformed),
            ("G\u{e4}T / HTTP/1.1", Malformed),
        ] {
            assert_eq!(
                read(&format!("{line}\r\nHost: a\r\n\r\n")).unwrap_err(),
                bad,
                "{line:?}"
            );
        }
        assert_eq!(read("\x16\x03\x01").unwrap_err(), Malformed);
        assert_eq!(read("\r\n\r\n").unwrap_err(), Malformed);
        let text = "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        assert_eq!(read(text).unwrap_err(), Ambiguous);
    }

    #[test]
    fn heads_that_are_too_large_say_what_is() {
        let long = "a".repeat(100_000);
        for (text, bad) in [
            (format!("GET /{long}"), BadHead::TargetTooLong),
            (
                format!("GET /{long} HTTP/1.1\r\nHost: a\r\n\r\n"),
                BadHead::TargetTooLong,
            ),
            (format!("GET / HTTP/1.1\r\nX: {long}"), BadHead::TooLarge),
            (
                format!("GET / HTTP/1.1\r\nHost: a\r\nX: {long}\r\n\r\n"),
                BadHead::TooLarge,
            ),
            (
                format!(
                    "GET / HTTP/1.1\r\nHost: a\r\n{}\r\n",
                    "X: y\r\n".repeat(300)
                ),
                BadHead::TooLarge,
            ),
        ] {
            assert_eq!(read(&text).unwrap_err(), bad);
        }
    }

    #[test]
    fn a_reply_has_one_length() {
        let ok = |fields: &str| {
            answer(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n"), Method::GET).map(|r| r.length)
        };
        assert_eq!(ok("Content-Length: 3\r\n"), Ok(Length::Exact(3)));
        assert_eq!(ok("Content-Length: 3, 3\r\n"), Ok(Length::Exact(3)));
        assert_eq!(
            ok("Transfer-Encoding: Chunked\r\nContent-Length: 3\r\n"),
            Ok(Length::Unknown)
        );
        assert_eq!(ok(""), Ok(Length::Tunnel));
        assert!(ok("Content-Length: 3\r\nContent-Length: 4\r\n").is_err());
        assert!(ok("Content-Length: -3\r\n").is_err());
        assert!(ok("Transfer-Encoding: gzip, chunked\r\n").is_err());
        let head = answer("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", Method::HEAD).unwrap();
        assert_eq!(head.length, Length::None);
        let none = answer("HTTP/1.0 304\nContent-Length: 3\n\n", Method::GET).unwrap();
        assert_eq!(
            (none.length, none.version),
            (Length::None, Version::HTTP_10)
        );
    }

    #[test]
    fn connections_go_on_as_their_version_says() {
        let goes_on = |text: &str| {
            let head = read(text).unwrap();
            persists(&head.fields, head.version)
        };
        assert!(goes_on("GET / HTTP/1.1\r\nHost: a\r\n\r\n"));
        assert!(!goes_on(
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: x, Close\r\n\r\n"
        ));
        assert!(!goes_on("GET / HTTP/1.0\r\nHost: a\r\n\r\n"));
        assert!(goes_on(
            "GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n"
        ));
    }
}
