//! Reads a byte stream as requests by the letter of RFC 9112, and refuses what can be read in two ways. It is the
//! judge of what the edge sends to an app.

/// A request as an app got it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Got {
    pub line: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub trailers: Vec<(String, String)>,
}

impl Got {
    /// The values of a header, in order.
    pub fn all(&self, name: &str) -> Vec<&str> {
        values(&self.headers, name)
    }

    pub fn one(&self, name: &str) -> Option<&str> {
        match self.all(name).as_slice() {
            [] => None,
            [one] => Some(one),
            more => panic!("{name} more than once: {more:?}"),
        }
    }

    pub fn path(&self) -> &str {
        self.line.split(' ').nth(1).unwrap()
    }
}

fn values<'a>(headers: &'a [(String, String)], name: &str) -> Vec<&'a str> {
    let its = headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
    its.map(|(_, value)| value.as_str()).collect()
}

/// Whether the bytes begin with a request: none yet, or it and how long it is.
pub fn request(bytes: &[u8]) -> Result<Option<(Got, usize)>, String> {
    let Some((line, headers, mut at)) = head(bytes)? else {
        return Ok(None);
    };
    let words: Vec<&str> = line.split(' ').collect();
    let well_formed = matches!(words.as_slice(), [method, target, "HTTP/1.1"]
        if is_token(method) && !target.is_empty());
    if !well_formed {
        return Err(format!("a request line: {line:?}"));
    }
    if values(&headers, "host").len() != 1 {
        return Err(format!("not one Host: {headers:?}"));
    }
    let lengths = values(&headers, "content-length");
    let codings = values(&headers, "transfer-encoding");
    let mut got = Got {
        line: line.clone(),
        headers: headers.clone(),
        body: Vec::new(),
        trailers: Vec::new(),
    };
    match (lengths.as_slice(), codings.as_slice()) {
        ([], []) => {}
        ([length], []) if !length.is_empty() && length.bytes().all(|b| b.is_ascii_digit()) => {
            let length: usize = length.parse().map_err(|e| format!("{length}: {e}"))?;
            let Some(body) = bytes.get(at..at + length) else {
                return Ok(None);
            };
            got.body = body.to_vec();
            at += length;
        }
        ([], ["chunked"]) => {
            let Some((body, trailers, end)) = chunked(bytes, at)? else {
                return Ok(None);
            };
            (got.body, got.trailers, at) = (body, trailers, end);
        }
        both => return Err(format!("a length told as {both:?}")),
    }
    Ok(Some((got, at)))
}

type Fields = Vec<(String, String)>;

fn head(bytes: &[u8]) -> Result<Option<(String, Fields, usize)>, String> {
    let Some((first, mut at)) = line(bytes, 0)? else {
        return Ok(None);
    };
    let Some(headers) = fields(bytes, &mut at)? else {
        return Ok(None);
    };
    Ok(Some((first, headers, at)))
}

/// Fields up to and with the empty line.
fn fields(bytes: &[u8], at: &mut usize) -> Result<Option<Fields>, String> {
    let mut headers = Vec::new();
    loop {
        let Some((text, next)) = line(bytes, *at)? else {
            return Ok(None);
        };
        *at = next;
        if text.is_empty() {
            return Ok(Some(headers));
        }
        let Some((name, value)) = text.split_once(':').filter(|(name, _)| is_token(name)) else {
            return Err(format!("a header: {text:?}"));
        };
        headers.push((name.to_owned(), value.trim_matches([' ', '\t']).to_owned()));
    }
}

/// A line that CRLF ends, without control characters in it.
fn line(bytes: &[u8], at: usize) -> Result<Option<(String, usize)>, String> {
    let rest = &bytes[at..];
    let Some(end) = rest.windows(2).position(|two| two == b"\r\n") else {
        return match rest.iter().find(|&&b| b == b'\n') {
            Some(_) => Err(format!("a bare LF: {:?}", String::from_utf8_lossy(rest))),
            None => Ok(None),
        };
    };
    let text = &rest[..end];
    if text.iter().any(|&b| (b < b' ' && b != b'\t') || b == 0x7f) {
        return Err(format!(
            "control characters: {:?}",
            String::from_utf8_lossy(text)
        ));
    }
    Ok(Some((
        String::from_utf8_lossy(text).into_owned(),
        at + end + 2,
    )))
}

#[allow(clippy::type_complexity, reason = "body, trailers, end")]
fn chunked(bytes: &[u8], mut at: usize) -> Result<Option<(Vec<u8>, Fields, usize)>, String> {
    let mut body = Vec::new();
    loop {
        let Some((size, next)) = line(bytes, at)? else {
            return Ok(None);
        };
        if size.is_empty() || !size.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(format!("a chunk's size: {size:?}"));
        }
        let size = usize::from_str_radix(&size, 16).map_err(|e| format!("{size}: {e}"))?;
        at = next;
        if size == 0 {
            let Some(trailers) = fields(bytes, &mut at)? else {
                return Ok(None);
            };
            return Ok(Some((body, trailers, at)));
        }
        let Some(chunk) = bytes.get(at..at + size + 2) else {
            return Ok(None);
        };
        let (data, end) = chunk.split_at(size);
        if end != b"\r\n" {
            return Err(format!("a chunk ends with {end:?}"));
        }
        body.extend_from_slice(data);
        at += size + 2;
    }
}

fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

#[test]
fn the_judge_takes_what_is_right() {
    let bytes = b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\nGET";
    let (got, end) = request(bytes).unwrap().unwrap();
    assert_eq!((got.body.as_slice(), end), (&b"abc"[..], bytes.len() - 3));
    assert_eq!(got.trailers, [("X-T".to_owned(), "1".to_owned())]);
    for end in 0..end {
        assert_eq!(request(&bytes[..end]), Ok(None), "{end}");
    }
}

#[test]
fn the_judge_refuses_what_can_be_read_in_two_ways() {
    for bad in [
        "0\r\n\r\n",
        "GET / HTTP/1.0\r\nHost: h\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\nHost: h\n\n",
        "GET / HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n",
        "GET / HTTP/1.1\r\nHost : h\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: h\r\n X: 1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: h\r\nX: a\rb\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: h\r\nContent-Length: +1\r\n\r\na",
        "GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na",
        "GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1;a=b\r\na\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
    ] {
        assert!(request(bad.as_bytes()).is_err(), "{bad:?}");
    }
}
