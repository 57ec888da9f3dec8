//! Durations as the Machines API and `fly.toml` write them.

use std::fmt;
use std::time::Duration;

use serde::de::{Error as _, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A duration written as Go does (`"1m30s"`, `"250ms"`), or as an integer of nanoseconds.
///
/// Both are accepted, for documentation and clients of the Machines API differ; text is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GoDuration(pub Duration);

impl GoDuration {
    /// Reads Go's notation (`time.ParseDuration`), without signs.
    pub fn parse(text: &str) -> Result<Self, String> {
        let bad =
            || format!("\"{text}\" is not a duration; write for example \"10s\" or \"1m30s\"");
        if text == "0" {
            return Ok(Self(Duration::ZERO));
        }
        let mut rest = text;
        let mut total = 0f64;
        if rest.is_empty() {
            return Err(bad());
        }
        while !rest.is_empty() {
            let digits = rest
                .find(|c: char| !c.is_ascii_digit() && c != '.')
                .ok_or_else(bad)?;
            let number: f64 = rest[..digits].parse().map_err(|_| bad())?;
            rest = &rest[digits..];
            let unit = rest
                .find(|c: char| c.is_ascii_digit() || c == '.')
                .unwrap_or(rest.len());
            total += number
                * match &rest[..unit] {
                    "ns" => 1e-9,
                    "us" | "µs" => 1e-6,
                    "ms" => 1e-3,
                    "s" => 1.0,
                    "m" => 60.0,
                    "h" => 3600.0,
                    _ => return Err(bad()),
                };
            rest = &rest[unit..];
        }
        Duration::try_from_secs_f64(total)
            .map(Self)
            .map_err(|_| bad())
    }
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.as_nanos();
        if nanos == 0 {
            return f.write_str("0s");
        }
        if !nanos.is_multiple_of(1_000_000) {
            return write!(f, "{nanos}ns");
        }
        let millis = nanos / 1_000_000;
        if !millis.is_multiple_of(1000) {
            return write!(f, "{millis}ms");
        }
        let (seconds, minutes, hours) =
            (millis / 1000 % 60, millis / 60_000 % 60, millis / 3_600_000);
        if hours > 0 {
            write!(f, "{hours}h")?;
        }
        if minutes > 0 {
            write!(f, "{minutes}m")?;
        }
        if seconds > 0 {
            write!(f, "{seconds}s")?;
        }
        Ok(())
    }
}

impl Serialize for GoDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl Visitor<'_> for Either {
            type Value = GoDuration;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration such as \"10s\", or nanoseconds")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<GoDuration, E> {
                GoDuration::parse(text).map_err(E::custom)
            }

            fn visit_u64<E: serde::de::Error>(self, nanos: u64) -> Result<GoDuration, E> {
                Ok(GoDuration(Duration::from_nanos(nanos)))
            }

            fn visit_i64<E: serde::de::Error>(self, nanos: i64) -> Result<GoDuration, E> {
                u64::try_from(nanos)
                    .map(|n| GoDuration(Duration::from_nanos(n)))
                    .map_err(|_| E::custom("a duration cannot be negative"))
            }
        }
        deserializer
            .deserialize_any(Either)
            .map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_go_writes() {
        let parse = |s| GoDuration::parse(s).map(|d| d.0.as_millis());
        assert_eq!(parse("10s"), Ok(10_000));
        assert_eq!(parse("1m30s"), Ok(90_000));
        assert_eq!(parse("1.5h"), Ok(5_400_000));
        assert_eq!(parse("250ms"), Ok(250));
        assert_eq!(parse("0"), Ok(0));
        for bad in [
            "",
            "10",
            "s",
            "1x",
            "-1s",
            "1..2s",
            "9999999999999999999999h",
            "1s junk",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn writes_what_it_reads() {
        for text in ["10s", "1m30s", "2h", "250ms", "5ns", "0s"] {
            assert_eq!(GoDuration::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn takes_nanoseconds_too() {
        let d: GoDuration = serde_json::from_str("15000000000").unwrap();
        assert_eq!(serde_json::to_string(&d).unwrap(), "\"15s\"");
        assert!(serde_json::from_str::<GoDuration>("-1").is_err());
    }
}
