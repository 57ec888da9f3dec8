//! The end of what a guest or a monitor has written, for a reason that a person can act on.

/// The last of these lines as one: cut to what fits into an event, and without what would drive a terminal.
pub(crate) fn last_words<'a>(lines: impl IntoIterator<Item = &'a str>) -> String {
    let lines: Vec<String> = lines
        .into_iter()
        .map(|line| line.replace(char::is_control, " ").trim().to_owned())
        .filter(|line: &String| !line.is_empty())
        .collect();
    let text = lines[lines.len().saturating_sub(LINES)..].join(" | ");
    let cut = text.ceil_char_boundary(text.len().saturating_sub(MOST));
    text[cut..].to_owned()
}

/// As much as fits into an event without filling it.
const MOST: usize = 2048;
const LINES: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_are_short_and_printable() {
        let long = "\u{e9}".repeat(10_000);
        let lines = [long.as_str(), "\x1b[31mpanic\r", "", "\x07", "  no root\0"];
        let words = last_words(lines);
        assert!(words.ends_with("\u{e9} | [31mpanic | no root"), "{words}");
        assert!(
            words.len() <= MOST && words.len() > MOST - 4,
            "{}",
            words.len()
        );
        assert_eq!(
            last_words("1 2 3 4 5 6 7 8 9".split(' ')),
            "2 | 3 | 4 | 5 | 6 | 7 | 8 | 9"
        );
        assert_eq!(last_words([]), "");
    }
}
