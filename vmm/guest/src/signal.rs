//! Signals by name, as `fly.toml` and OCI images write them.

/// The number of a signal given as `SIGTERM`, `term` or `15`.
///
/// Numbers are those of Linux on x86-64. Real-time signals have numbers only.
pub fn parse_signal(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return is_signal(number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    SIGNALS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|&(_, number)| number)
}

/// The usual name of a signal, such as `SIGTERM`, or its number.
pub fn signal_name(number: i32) -> String {
    match SIGNALS.iter().find(|&&(_, known)| known == number) {
        Some((name, _)) => format!("SIG{name}"),
        None => format!("signal {number}"),
    }
}

/// Whether Linux has a signal of this number.
pub fn is_signal(number: i32) -> bool {
    (1..=64).contains(&number)
}

/// `SIGINT`, the stop signal where nobody asks for another.
pub const SIGINT: i32 = 2;
/// `SIGKILL`.
pub const SIGKILL: i32 = 9;

const SIGNALS: &[(&str, i32)] = &[
    ("HUP", 1),
    ("INT", SIGINT),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", SIGKILL),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_mean_the_same() {
        for text in ["SIGTERM", "sigterm", "TERM", "15"] {
            assert_eq!(parse_signal(text), Some(15), "{text}");
        }
        assert_eq!(signal_name(15), "SIGTERM");
        assert_eq!(signal_name(34), "signal 34");
    }

    #[test]
    fn what_is_no_signal_is_refused() {
        for text in ["", "SIG", "0", "-1", "65", "SIGNAL", "99999999999"] {
            assert_eq!(parse_signal(text), None, "{text}");
        }
    }
}
