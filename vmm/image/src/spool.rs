//! The contents of files, between the layers they come from and the disk they go to.
//!
//! One unlinked temporary file: it needs no cleaning up, and no name in an image has any bearing on
//! where bytes are put.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Where a content lies in the spool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// A spool that is being filled.
pub(crate) struct Spool {
    file: BufWriter<File>,
    length: u64,
}

/// A spool that is full.
pub(crate) struct Contents(File);

impl Spool {
    /// Large enough that most files are written together with their neighbours.
    const BUFFER: usize = 256 << 10;

    /// Makes a spool on the file system of `dir`.
    pub(crate) fn create(dir: &Path) -> io::Result<Self> {
        let file = BufWriter::with_capacity(Self::BUFFER, tempfile::tempfile_in(dir)?);
        Ok(Self { file, length: 0 })
    }

    /// Adds all that `content` yields. Errors of either side come back as they are.
    pub(crate) fn add(&mut self, content: &mut impl Read) -> Result<Extent, SpoolError> {
        let offset = self.length;
        let mut buffer = [0; 64 << 10];
        loop {
            let read = match content.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(SpoolError::Read(error)),
            };
            self.file
                .write_all(&buffer[..read])
                .map_err(SpoolError::Write)?;
            self.length += read as u64;
        }
        Ok(Extent {
            offset,
            length: self.length - offset,
        })
    }

    /// Ends the filling.
    pub(crate) fn finish(self) -> io::Result<Contents> {
        Ok(Contents(
            self.file
                .into_inner()
                .map_err(io::IntoInnerError::into_error)?,
        ))
    }
}

/// Which side failed.
pub(crate) enum SpoolError {
    Read(io::Error),
    Write(io::Error),
}

impl Contents {
    /// Fills `buffer` with what lies `offset` bytes into `extent`.
    pub(crate) fn read(&self, extent: Extent, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buffer, extent.offset + offset)
    }
}
