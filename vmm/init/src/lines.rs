//! Cuts a stream of bytes into lines, without ever holding more than one.

use tern_guest::message::MAX_LINE;

/// Collects bytes until they make a line.
#[derive(Debug, Default)]
pub struct LineSplitter {
    partial: Vec<u8>,
}

impl LineSplitter {
    /// Takes in bytes and hands out the lines they complete. A line longer than [`MAX_LINE`] comes
    /// in pieces; a carriage return before the line feed is dropped, as terminals send it.
    pub fn feed(&mut self, mut bytes: &[u8], mut line: impl FnMut(String)) {
        while !bytes.is_empty() {
            let room = MAX_LINE - self.partial.len();
            let window = &bytes[..room.min(bytes.len())];
            match window.iter().position(|&b| b == b'\n') {
                Some(end) => {
                    self.partial.extend_from_slice(&window[..end]);
                    self.flush(true, &mut line);
                    bytes = &bytes[end + 1..];
                }
                None => {
                    self.partial.extend_from_slice(window);
                    bytes = &bytes[window.len()..];
                    if self.partial.len() == MAX_LINE && bytes.first() != Some(&b'\n') {
                        self.split(&mut line);
                    } else if self.partial.len() == MAX_LINE {
                        self.flush(true, &mut line);
                        bytes = &bytes[1..];
                    }
                }
            }
        }
    }

    /// Hands out what is left when the stream ends.
    pub fn finish(&mut self, mut line: impl FnMut(String)) {
        if !self.partial.is_empty() {
            self.flush(false, &mut line);
        }
    }

    fn flush(&mut self, ended: bool, line: &mut impl FnMut(String)) {
        if ended && self.partial.last() == Some(&b'\r') {
            self.partial.pop();
        }
        line(String::from_utf8_lossy(&self.partial).into_owned());
        self.partial.clear();
    }

    /// Hands out a full buffer, but keeps the beginning of a character for the next piece.
    fn split(&mut self, line: &mut impl FnMut(String)) {
        let keep = incomplete_tail(&self.partial);
        let tail = self.partial.split_off(self.partial.len() - keep);
        self.flush(false, line);
        self.partial = tail;
    }
}

/// How many bytes at the end may be the start of a character that is not there yet: 0 to 3.
fn incomplete_tail(bytes: &[u8]) -> usize {
    for back in 1..=3.min(bytes.len()) {
        let byte = bytes[bytes.len() - back];
        let length = match byte {
            0xC0..=0xDF => 2,
            0xE0..=0xEF => 3,
            0xF0..=0xF7 => 4,
            0x80..=0xBF => continue,
            _ => return 0,
        };
        return if length > back { back } else { 0 };
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines_of(chunks: &[&[u8]]) -> Vec<String> {
        let (mut splitter, mut lines) = (LineSplitter::default(), Vec::new());
        for chunk in chunks {
            splitter.feed(chunk, |line| lines.push(line));
        }
        splitter.finish(|line| lines.push(line));
        lines
    }

    #[test]
    fn lines_may_arrive_in_pieces() {
        assert_eq!(
            lines_of(&[b"a", b"b\nc\n", b"\n", b"d"]),
            ["ab", "c", "", "d"]
        );
        assert_eq!(
            lines_of(&[b"a\r\n", b"b\r", b"\nc\rd\n"]),
            ["a", "b", "c\rd"]
        );
    }

    #[test]
    fn a_line_of_the_longest_length_is_one_line() {
        let long = "x".repeat(MAX_LINE);
        assert_eq!(
            lines_of(&[long.as_bytes(), b"\ny"]).len(),
            3,
            "its end came too late to know"
        );
        let with_end = format!("{long}\ny");
        assert_eq!(lines_of(&[with_end.as_bytes()]), [long.as_str(), "y"]);
    }

    #[test]
    fn a_long_line_is_not_cut_inside_a_character() {
        for shift in 0..4 {
            let long = "x".repeat(shift) + &"🦀".repeat(MAX_LINE / 2);
            let pieces = lines_of(&[long.as_bytes()]);
            assert!(pieces.len() > 1 && pieces.iter().all(|p| p.len() <= MAX_LINE));
            assert_eq!(pieces.concat(), long);
        }
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_nothing_is_longer(
            chunks in prop::collection::vec("[a-z\n]{0,40}", 0..20),
            repeat in 1usize..200,
        ) {
            let text = chunks.concat().repeat(repeat);
            let mut splitter = LineSplitter::default();
            let mut out = String::new();
            for chunk in text.as_bytes().chunks(700) {
                splitter.feed(chunk, |line| {
                    assert!(line.len() <= MAX_LINE && !line.contains('\n'));
                    out.push_str(&line);
                });
            }
            splitter.finish(|line| out.push_str(&line));
            prop_assert_eq!(out, text.replace('\n', ""));
        }

        #[test]
        fn any_bytes_will_do(bytes in prop::collection::vec(any::<u8>(), 0..3 * MAX_LINE)) {
            let mut splitter = LineSplitter::default();
            splitter.feed(&bytes, |_| ());
            prop_assert!(splitter.partial.len() < MAX_LINE);
        }
    }
}
