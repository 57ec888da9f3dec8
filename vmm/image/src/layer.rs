//! One layer: from a stream of compressed bytes to entries applied to the tree.
//!
//! The stream is checked four ways while it flows: compressed size and digest (the manifest's word),
//! and unpacked digest (the configuration's word) and volume (ours).

use std::cell::Cell;
use std::io::{self, BufReader, Cursor, Read};
use std::rc::Rc;

use flate2::bufread::MultiGzDecoder;

use crate::apply::{Applier, Refusal};
use crate::digest::Hasher;
use crate::manifest::Descriptor;
use crate::tar::{self, Archive};
use crate::verify::Verified;
use crate::{Digest, ImageError, Limits};

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The largest window that a zstd frame may ask us to keep: 128 MiB, what `zstd --ultra -22` uses.
const ZSTD_WINDOW_LOG: u32 = 27;
/// Compressed bytes read at a time.
const BUFFER: usize = 64 << 10;

/// A layer as the manifest and the configuration describe it.
pub(crate) struct Layer<'a> {
    /// Counted from 1, the lowest first.
    pub(crate) number: usize,
    pub(crate) descriptor: &'a Descriptor,
    pub(crate) diff_id: Digest,
}

impl Layer<'_> {
    /// Reads the layer from `stream` and applies it. `budget` is what is left of
    /// [`Limits::unpacked_bytes`].
    pub(crate) fn read(
        &self,
        stream: impl Read,
        applier: &mut Applier<'_>,
        budget: &mut u64,
        limits: &Limits,
    ) -> Result<(), ImageError> {
        let what = format!("layer {} ({})", self.number, self.descriptor.digest);
        let mut verified =
            Verified::new(stream, self.descriptor.digest, self.descriptor.size, &what);
        let outcome = self.unpack(&mut verified, applier, budget, limits);
        match &outcome {
            Ok(_) | Err(ImageError::Layer { .. }) => {
                // If the bytes are not even those asked for, then that is what went wrong.
                verified.finish()?;
            }
            Err(_) => {}
        }
        let found = outcome?;
        if found != self.diff_id {
            let what = format!("the unpacked {what}");
            return Err(ImageError::DigestMismatch {
                what,
                expected: self.diff_id,
                found,
            });
        }
        Ok(())
    }

    /// Unpacks and applies; returns the digest of what was unpacked.
    pub(crate) fn unpack(
        &self,
        verified: &mut Verified<impl Read>,
        applier: &mut Applier<'_>,
        budget: &mut u64,
        limits: &Limits,
    ) -> Result<Digest, ImageError> {
        let compressed = verified.count();
        let decoder = decoder(verified).map_err(|error| self.refuse(error.into()))?;
        let mut unpacked = Metered {
            inner: decoder,
            hasher: Hasher::new(),
            unpacked: 0,
            compressed,
            budget,
            limits,
        };
        let mut archive = Archive::new(&mut unpacked, limits);
        applier.begin_layer(self.number);
        let mut apply = || -> Result<(), Refusal> {
            while let Some(entry) = archive.next()? {
                applier.apply(entry, &mut archive)?;
            }
            Ok(())
        };
        apply().map_err(|error| self.refuse(error))?;
        // What follows the archive's end mark belongs to the digest as well.
        io::copy(&mut unpacked, &mut io::sink()).map_err(|error| self.refuse(error.into()))?;
        Ok(unpacked.hasher.finish())
    }

    fn refuse(&self, refusal: Refusal) -> ImageError {
        let reason = match refusal {
            Refusal::Image(error) => return error,
            // Not the archive's fault, if the reader below says so.
            Refusal::Tar(tar::Error::Io(error)) => match error.downcast::<ImageError>() {
                Ok(error) => return error,
                Err(error) => error.to_string(),
            },
            Refusal::Tar(error) => error.to_string(),
            Refusal::Entry { path, reason } => {
                format!(
                    "{}: {reason}",
                    crate::error::excerpt(&String::from_utf8_lossy(&path))
                )
            }
        };
        ImageError::Layer {
            number: self.number,
            digest: self.descriptor.digest,
            reason,
        }
    }
}

/// Decompresses what its first bytes say is compressed.
fn decoder<'a>(stream: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut stream = BufReader::with_capacity(BUFFER, stream);
    let mut magic = [0; ZSTD.len()];
    let mut known = 0;
    while known < magic.len() {
        match stream.read(&mut magic[known..])? {
            0 => break,
            read => known += read,
        }
    }
    let magic = magic[..known].to_vec();
    let (gzip, zstd) = (magic.starts_with(&GZIP), magic == ZSTD);
    let whole = Cursor::new(magic).chain(stream);
    Ok(if gzip {
        Box::new(MultiGzDecoder::new(whole))
    } else if zstd {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(whole)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG)?;
        Box::new(decoder)
    } else {
        Box::new(whole)
    })
}

/// Hashes what is unpacked, and stops what unpacks to too much.
struct Metered<'a, R> {
    inner: R,
    hasher: Hasher,
    unpacked: u64,
    compressed: Rc<Cell<u64>>,
    budget: &'a mut u64,
    limits: &'a Limits,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        self.unpacked += read as u64;
        let limit = |what, limit| Err(io::Error::other(ImageError::Limit { what, limit }));
        match self.budget.checked_sub(read as u64) {
            Some(left) => *self.budget = left,
            None => return limit("unpacked bytes", self.limits.unpacked_bytes),
        }
        let judged = self.unpacked > Limits::RATIO_FROM;
        if judged && self.unpacked / self.limits.ratio > self.compressed.get() {
            return limit("times the compressed size", self.limits.ratio);
        }
        Ok(read)
    }
}
