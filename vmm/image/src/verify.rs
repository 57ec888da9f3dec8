//! Content that is checked while it streams by.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

use crate::digest::Hasher;
use crate::{Digest, ImageError};

/// Passes content on and remembers what came, so that [`Verified::finish`] can tell whether it was
/// what its descriptor says. Never passes on more than one byte above the size it should have.
pub(crate) struct Verified<R> {
    inner: R,
    what: String,
    expected: Digest,
    size: u64,
    hasher: Hasher,
    count: Rc<Cell<u64>>,
}

impl<R: Read> Verified<R> {
    pub(crate) fn new(inner: R, expected: Digest, size: u64, what: &str) -> Self {
        Self {
            inner,
            what: what.to_owned(),
            expected,
            size,
            hasher: Hasher::new(),
            count: Rc::default(),
        }
    }

    /// Bytes that came so far, for those who only have the reader wrapped around this one.
    pub(crate) fn count(&self) -> Rc<Cell<u64>> {
        Rc::clone(&self.count)
    }

    /// Reads what is left, and judges.
    pub(crate) fn finish(mut self) -> Result<(), ImageError> {
        io::copy(&mut self, &mut io::sink())
            .map_err(|error| ImageError::from_read(error, &self.what))?;
        let found = self.count.get();
        if found != self.size {
            return Err(ImageError::SizeMismatch {
                what: self.what,
                expected: self.size,
                found,
            });
        }
        let found = self.hasher.finish();
        if found != self.expected {
            return Err(ImageError::DigestMismatch {
                what: self.what,
                expected: self.expected,
                found,
            });
        }
        Ok(())
    }
}

impl<R: Read> Read for Verified<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.size.saturating_add(1) - self.count.get();
        let wanted = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        let read = self.inner.read(&mut buffer[..wanted])?;
        self.hasher.update(&buffer[..read]);
        self.count.set(self.count.get() + read as u64);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(content: &[u8], digest_of: &[u8], size: u64) -> Result<(), ImageError> {
        Verified::new(content, Digest::of(digest_of), size, "it").finish()
    }

    #[test]
    fn tells_right_from_wrong_short_and_long() {
        assert!(check(b"abc", b"abc", 3).is_ok());
        assert!(matches!(
            check(b"abd", b"abc", 3),
            Err(ImageError::DigestMismatch { .. })
        ));
        assert!(matches!(
            check(b"ab", b"abc", 3),
            Err(ImageError::SizeMismatch {
                expected: 3,
                found: 2,
                ..
            })
        ));
        assert!(matches!(
            check(&[0; 4096], b"abc", 3),
            Err(ImageError::SizeMismatch {
                expected: 3,
                found: 4,
                ..
            })
        ));
        assert!(check(b"", b"", u64::MAX).is_err());
    }
}
