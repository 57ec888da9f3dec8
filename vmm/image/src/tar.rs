//! Reads tar archives that nobody vouches for.
//!
//! Understands what image builders write: ustar, GNU long names and PAX headers (POSIX.1-2017,
//! [`pax`](https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html)). Where the formats
//! leave room, it reads what Go's `archive/tar` reads, since that is what most images have been
//! unpacked with so far: two readers that disagree about where an entry ends would see two different
//! images in one layer. Sparse files and multi-volume archives are refused.
//!
//! It keeps at most one header in memory, and no header larger than [`MAX_EXTENSION`].

mod pax;

use std::collections::BTreeMap;
use std::io::{self, Read};

use self::pax::Pax;
use crate::Limits;

const BLOCK: usize = 512;
/// The longest PAX header or GNU long name taken. The same as in Go.
const MAX_EXTENSION: u64 = 1 << 20;
/// The most bytes of attributes that a disk can hold for one file, with room for their framing.
const MAX_XATTRS: usize = 128 << 10;

/// Why an archive cannot be read on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the archive is truncated")]
    Truncated,
    #[error("the archive is malformed: {0}")]
    Malformed(&'static str),
    #[error("the archive has {0}, which is not supported")]
    Unsupported(&'static str),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    Symlink(Vec<u8>),
    /// Another name of an entry that came before.
    HardLink(Vec<u8>),
    Device {
        character: bool,
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// A point in time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Time {
    pub(crate) seconds: i64,
    pub(crate) nanos: u32,
}

/// One entry's header. Names are bytes as they came, except that they contain no NUL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: Kind,
    /// Permission bits with set-user-id, set-group-id and sticky.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Time,
    /// Bytes of content that follow; zero for anything but a file.
    pub(crate) size: u64,
    /// Extended attributes by their full names.
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// An archive. [`Archive::next`] goes to an entry, reading the archive reads that entry's content.
pub(crate) struct Archive<R> {
    input: R,
    position: u64,
    /// Unread content of the current entry, and the padding behind it.
    remaining: u64,
    padding: u64,
    max_xattr_bytes: usize,
}

/// Headers that say more about the entry that follows them.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: Pax,
}

impl<R: Read> Archive<R> {
    pub(crate) fn new(input: R, limits: &Limits) -> Self {
        let max_xattr_bytes = limits.xattr_bytes.min(MAX_XATTRS);
        Self {
            input,
            position: 0,
            remaining: 0,
            padding: 0,
            max_xattr_bytes,
        }
    }

    /// Bytes from the archive's start to the next unread byte.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    pub(crate) fn input_mut(&mut self) -> &mut R {
        &mut self.input
    }

    /// Goes to the next entry, over what is unread of the current one. `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, Error> {
        let mut extensions = Extensions::default();
        let mut extended = false;
        loop {
            self.skip_rest()?;
            let Some(block) = self.next_block()? else {
                // Headers about an entry that never comes.
                return if extended {
                    Err(Error::Truncated)
                } else {
                    Ok(None)
                };
            };
            let header = Header(&block);
            header.check()?;
            match header.kind() {
                b'x' => {
                    extensions.pax = Pax::parse(&self.extension(header)?, self.max_xattr_bytes)?
                }
                b'L' => extensions.path = Some(c_string(&self.extension(header)?).to_vec()),
                b'K' => extensions.link = Some(c_string(&self.extension(header)?).to_vec()),
                // Defaults for all entries: nobody who unpacks images heeds them.
                b'g' => {
                    self.extension(header)?;
                    continue;
                }
                _ => {
                    let entry = entry(header, extensions)?;
                    self.expect_content(entry.size);
                    return Ok(Some(entry));
                }
            }
            extended = true;
        }
    }

    /// The next header, or `None` at the end: two blocks of zeros, or simply no more blocks.
    fn next_block(&mut self) -> Result<Option<[u8; BLOCK]>, Error> {
        match self.block()? {
            Some(block) if is_zero(&block) => match self.block()? {
                Some(second) if !is_zero(&second) => {
                    Err(Error::Malformed("an entry follows the end mark"))
                }
                _ => Ok(None),
            },
            other => Ok(other),
        }
    }

    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, Error> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.input.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(Error::Truncated),
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.position += BLOCK as u64;
        Ok(Some(block))
    }

    fn extension(&mut self, header: Header<'_>) -> Result<Vec<u8>, Error> {
        let size = header.size()?;
        if size > MAX_EXTENSION {
            return Err(Error::Malformed("a long name or PAX header is over 1 MiB"));
        }
        self.expect_content(size);
        let mut content = Vec::new();
        self.read_to_end(&mut content)?;
        Ok(content)
    }

    fn expect_content(&mut self, size: u64) {
        self.remaining = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
    }

    fn skip_rest(&mut self) -> Result<(), Error> {
        io::copy(self, &mut io::sink())?;
        let padding = self.padding;
        let skipped = io::copy(&mut (&mut self.input).take(padding), &mut io::sink())?;
        self.position += skipped;
        self.padding = 0;
        if skipped < padding {
            Err(Error::Truncated)
        } else {
            Ok(())
        }
    }

    /// Declares the current entry read, for a caller who goes to the next one by other means, and
    /// says how far that is.
    pub(crate) fn take_rest(&mut self) -> u64 {
        let rest = self.remaining.saturating_add(self.padding);
        self.position = self.position.saturating_add(rest);
        (self.remaining, self.padding) = (0, 0);
        rest
    }
}

impl<R: Read> Read for Archive<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer
            .len()
            .min(usize::try_from(self.remaining).unwrap_or(usize::MAX));
        if wanted == 0 {
            return Ok(0);
        }
        let read = self.input.read(&mut buffer[..wanted])?;
        if read == 0 {
            let truncated = Error::Truncated.to_string();
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, truncated));
        }
        self.remaining -= read as u64;
        self.position += read as u64;
        Ok(read)
    }
}

/// Puts a header and what was said before it together.
fn entry(header: Header<'_>, extensions: Extensions) -> Result<Entry, Error> {
    let Extensions {
        path: long_path,
        link: long_link,
        pax,
    } = extensions;
    let path = long_path.or(pax.path).unwrap_or_else(|| header.path());
    let link = |refusal| {
        let link = long_link.or(pax.link).unwrap_or_else(|| header.link());
        if link.is_empty() {
            Err(Error::Malformed(refusal))
        } else {
            Ok(link)
        }
    };
    let device = |character| -> Result<Kind, Error> {
        let (major, minor) = (header.number(329, 8)?, header.number(337, 8)?);
        // What Linux packs into 32 bits.
        if major >= 1 << 12 || minor >= 1 << 20 {
            return Err(Error::Malformed("a device number is out of range"));
        }
        Ok(Kind::Device {
            character,
            major: major as u32,
            minor: minor as u32,
        })
    };
    let kind = match header.kind() {
        // Before there was a type for directories, they were files whose names end in a slash.
        0 if path.ends_with(b"/") => Kind::Directory,
        b'0' | 0 | b'7' => Kind::File,
        b'1' => Kind::HardLink(link("a hard link has no target")?),
        b'2' => Kind::Symlink(link("a symbolic link has no target")?),
        b'3' => device(true)?,
        b'4' => device(false)?,
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        b'S' => return Err(Error::Unsupported("a sparse file")),
        b'M' | b'V' | b'N' | b'D' => {
            return Err(Error::Unsupported("a multi-volume or dump entry"));
        }
        _ => return Err(Error::Unsupported("an entry of unknown type")),
    };
    // Only files have content. Some old writers give links the size of what they point to.
    let stated = pax.size.map_or_else(|| header.size(), Ok)?;
    let size = if kind == Kind::File { stated } else { 0 };
    let id = |pax: Option<u64>, at| -> Result<u32, Error> {
        let id = pax.map_or_else(|| header.number(at, 8), Ok)?;
        u32::try_from(id).map_err(|_| Error::Malformed("an owner is out of range"))
    };
    Ok(Entry {
        path,
        kind,
        mode: (header.number(100, 8)? & 0o7777) as u16,
        uid: id(pax.uid, 108)?,
        gid: id(pax.gid, 116)?,
        mtime: pax.mtime.map_or_else(|| header.mtime(), Ok)?,
        size,
        xattrs: pax.xattrs,
    })
}

/// A header block, read by the ustar field offsets.
#[derive(Clone, Copy)]
struct Header<'a>(&'a [u8; BLOCK]);

impl Header<'_> {
    fn field(&self, at: usize, length: usize) -> &[u8] {
        &self.0[at..at + length]
    }

    fn kind(&self) -> u8 {
        self.0[156]
    }

    /// The sum of all bytes, the sum's own field taken as spaces. Some writers sum signed bytes.
    fn check(&self) -> Result<(), Error> {
        let (before, after) = (&self.0[..148], &self.0[156..]);
        let bytes = || before.iter().chain(&[b' '; 8]).chain(after);
        let unsigned: i64 = bytes().map(|&b| i64::from(b)).sum();
        let signed: i64 = bytes().map(|&b| i64::from(b as i8)).sum();
        let stated = numeric(self.field(148, 8));
        if stated == Some(unsigned) || stated == Some(signed) {
            Ok(())
        } else {
            Err(Error::Malformed("a header's checksum is wrong"))
        }
    }

    fn number(&self, at: usize, length: usize) -> Result<u64, Error> {
        numeric(self.field(at, length))
            .and_then(|number| u64::try_from(number).ok())
            .ok_or(Error::Malformed("a number in a header is not one"))
    }

    fn size(&self) -> Result<u64, Error> {
        self.number(124, 12)
    }

    fn mtime(&self) -> Result<Time, Error> {
        numeric(self.field(136, 12))
            .map(|seconds| Time { seconds, nanos: 0 })
            .ok_or(Error::Malformed("a time in a header is not one"))
    }

    fn path(&self) -> Vec<u8> {
        let name = c_string(self.field(0, 100));
        // GNU's own format ("ustar  ") has other things in the place of the prefix.
        let prefix = if self.field(257, 6) == b"ustar\0" {
            c_string(self.field(345, 155))
        } else {
            b""
        };
        if prefix.is_empty() {
            name.to_vec()
        } else {
            [prefix, name].join(&b'/')
        }
    }

    fn link(&self) -> Vec<u8> {
        c_string(self.field(157, 100)).to_vec()
    }
}

fn is_zero(block: &[u8; BLOCK]) -> bool {
    block.iter().all(|&b| b == 0)
}

/// Up to the first NUL.
fn c_string(bytes: &[u8]) -> &[u8] {
    bytes.split(|&b| b == 0).next().unwrap_or(bytes)
}

/// A number in a header: octal text, or big-endian two's complement behind a set first bit.
fn numeric(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let mut value: i128 = if negative { -1 } else { 0 };
        for (n, &byte) in field.iter().enumerate() {
            let bits = if n == 0 && !negative {
                byte & 0x7f
            } else {
                byte
            };
            value = (value << 8) | i128::from(bits);
        }
        return i64::try_from(value).ok();
    }
    let text = field.trim_ascii_start();
    let text = c_string(text).trim_ascii_end();
    if text.is_empty() {
        return Some(0);
    }
    text.iter().try_fold(0i64, |value, &digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests;
