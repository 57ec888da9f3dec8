//! PAX headers: records that say more about an entry than its header block can.

use std::collections::BTreeMap;

use super::{Error, Time};

/// The PAX records we know.
#[derive(Default)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<Time>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Pax {
    /// Reads `<length> <key>=<value>\n` records; the length counts the whole record. Values may hold
    /// any byte, newlines too.
    pub(super) fn parse(mut text: &[u8], max_xattr_bytes: usize) -> Result<Self, Error> {
        const BROKEN: Error = Error::Malformed("a PAX header is broken");

        let mut pax = Self::default();
        let mut xattr_bytes = 0usize;
        while !text.is_empty() {
            let space = text
                .iter()
                .take(20)
                .position(|&b| b == b' ')
                .ok_or(BROKEN)?;
            let length = decimal(&text[..space]).and_then(|n| usize::try_from(n).ok());
            let length = length
                .filter(|&n| n > space + 1 && n <= text.len())
                .ok_or(BROKEN)?;
            let record = text[space + 1..length].strip_suffix(b"\n").ok_or(BROKEN)?;
            text = &text[length..];

            let equals = record.iter().position(|&b| b == b'=').ok_or(BROKEN)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                xattr_bytes += name.len() + value.len();
                if xattr_bytes > max_xattr_bytes {
                    return Err(Error::Malformed(
                        "a file's extended attributes are too long",
                    ));
                }
                pax.xattrs.insert(name.to_vec(), value.to_vec());
            } else if key.starts_with(b"GNU.sparse.") {
                return Err(Error::Unsupported("a sparse file"));
            } else if !value.is_empty() {
                // An empty value takes a record back: the header's own field counts.
                pax.record(key, value)?;
            }
        }
        Ok(pax)
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        const NUMBER: Error = Error::Malformed("a number in a PAX header is not one");

        let number = || decimal(value).map(Some).ok_or(NUMBER);
        let name = || {
            if value.contains(&0) {
                Err(Error::Malformed("a name contains NUL"))
            } else {
                Ok(Some(value.to_vec()))
            }
        };
        match key {
            b"path" => self.path = name()?,
            b"linkpath" => self.link = name()?,
            b"size" => self.size = number()?,
            b"uid" => self.uid = number()?,
            b"gid" => self.gid = number()?,
            b"mtime" => self.mtime = Some(time(value).ok_or(NUMBER)?),
            _ => {}
        }
        Ok(())
    }
}

fn decimal(text: &[u8]) -> Option<u64> {
    if text.first() == Some(&b'+') {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds with a fraction, like `-1.25`.
pub(super) fn time(text: &[u8]) -> Option<Time> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let nanos = fraction
        .bytes()
        .chain(std::iter::repeat(b'0'))
        .take(9)
        .fold(0u32, |nanos, digit| nanos * 10 + u32::from(digit - b'0'));
    if whole.starts_with('-') && nanos > 0 {
        return Some(Time {
            seconds: seconds.checked_sub(1)?,
            nanos: 1_000_000_000 - nanos,
        });
    }
    Some(Time { seconds, nanos })
}
