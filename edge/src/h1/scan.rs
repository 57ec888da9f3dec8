//! Where an HTTP/1 head ends, looked for as its bytes arrive: each byte is looked at once, however small
//! the pieces it comes in. No I/O.

/// How line ends are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineEnds {
    /// CRLF alone. Whoever takes a bare LF for the end of a line reads another message than one who does not.
    Strict,
    /// LF too, as RFC 9112 section 2.2 lets a recipient. For replies: what follows one that was misread is
    /// nobody else's, because its connection is then not used again.
    Lenient,
}

/// The state of one search.
#[derive(Debug, Clone, Copy)]
pub struct Scan {
    ends: LineEnds,
    /// Bytes looked at.
    seen: usize,
    /// Where the current line begins.
    line: usize,
    lines: usize,
}

/// A line feed without a carriage return before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BareLineFeed;

impl Scan {
    pub fn new(ends: LineEnds) -> Self {
        Self {
            ends,
            seen: 0,
            line: 0,
            lines: 0,
        }
    }

    /// The length of the head, its empty line included, once that is there. `bytes` begins with what earlier
    /// calls were given.
    pub fn head_end(&mut self, bytes: &[u8]) -> Result<Option<usize>, BareLineFeed> {
        while let Some(found) = bytes[self.seen..].iter().position(|b| *b == b'\n') {
            let at = self.seen + found;
            let has_return = at > self.line && bytes[at - 1] == b'\r';
            if !has_return && self.ends == LineEnds::Strict {
                return Err(BareLineFeed);
            }
            let length = at - self.line - usize::from(has_return);
            self.seen = at + 1;
            self.line = at + 1;
            if length == 0 {
                return Ok(Some(at + 1));
            }
            self.lines += 1;
        }
        self.seen = bytes.len();
        Ok(None)
    }

    /// Whether the first line is still being received.
    pub fn in_first_line(&self) -> bool {
        self.lines == 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_head_ends_with_its_empty_line() {
        let end = |bytes: &[u8], ends| Scan::new(ends).head_end(bytes);
        assert_eq!(
            end(b"GET / HTTP/1.1\r\nA: b\r\n\r\nrest", LineEnds::Strict),
            Ok(Some(24))
        );
        assert_eq!(
            end(b"GET / HTTP/1.1\r\nA: b\r\n\r", LineEnds::Strict),
            Ok(None)
        );
        assert_eq!(
            end(b"GET / HTTP/1.1\nA: b\r\n\r\n", LineEnds::Strict),
            Err(BareLineFeed)
        );
        assert_eq!(
            end(b"HTTP/1.0 200\nA: b\n\nrest", LineEnds::Lenient),
            Ok(Some(19))
        );
    }

    proptest! {
        /// Pieces make no difference.
        #[test]
        fn pieces_make_no_difference(bytes in "[a\r\n]{0,40}", cuts in prop::collection::vec(0usize..40, 0..6), strict: bool) {
            let ends = if strict { LineEnds::Strict } else { LineEnds::Lenient };
            let whole = Scan::new(ends).head_end(bytes.as_bytes());
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(bytes.len())).chain([bytes.len()]).collect();
            cuts.sort_unstable();
            let mut scan = Scan::new(ends);
            let mut pieces = Ok(None);
            for cut in cuts {
                pieces = scan.head_end(&bytes.as_bytes()[..cut]);
                if pieces != Ok(None) { break; }
            }
            prop_assert_eq!(pieces, whole);
        }
    }
}
