//! OCI image layouts: a directory of blobs, or an uncompressed tar archive of one.
//!
//! See the [image layout specification](https://github.com/opencontainers/image-spec/blob/main/image-layout.md).

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::excerpt;
use crate::manifest::{Descriptor, Document};
use crate::resolve::Blobs;
use crate::tar::{self, Archive};
use crate::{Digest, ImageError, Limits};

const INDEX: &str = "index.json";

/// A layout that is open for reading.
pub(crate) struct Layout {
    path: PathBuf,
    storage: Storage,
}

enum Storage {
    Directory,
    /// Where each file of the archive lies in it.
    Archive {
        file: Arc<File>,
        members: HashMap<String, Member>,
    },
}

#[derive(Clone, Copy)]
struct Member {
    offset: u64,
    size: u64,
}

impl Layout {
    pub(crate) fn open(path: &Path, limits: &Limits) -> Result<Self, ImageError> {
        let metadata = std::fs::metadata(path).map_err(ImageError::io("open", path))?;
        let storage = if metadata.is_dir() {
            Storage::Directory
        } else {
            let file = open_regular(path).map_err(ImageError::io("open", path))?;
            let members = scan(&file, limits).map_err(|reason| ImageError::Layout {
                path: path.to_owned(),
                reason: format!("it is not a directory, and reading it as an archive: {reason}"),
            })?;
            Storage::Archive {
                file: Arc::new(file),
                members,
            }
        };
        Ok(Self {
            path: path.to_owned(),
            storage,
        })
    }

    /// The image called `tag`, or the only one.
    pub(crate) fn find(
        &self,
        tag: Option<&str>,
        limits: &Limits,
    ) -> Result<Descriptor, ImageError> {
        let mut text = Vec::new();
        self.read(INDEX)?
            .take(limits.document_bytes + 1)
            .read_to_end(&mut text)
            .map_err(|error| self.broken(format!("{INDEX}: {error}")))?;
        if text.len() as u64 > limits.document_bytes {
            return Err(ImageError::Limit {
                what: "bytes of a document",
                limit: limits.document_bytes,
            });
        }
        let Document::Index(index) = Document::parse(&text, limits)? else {
            return Err(self.broken(format!("{INDEX} is a manifest, not an index")));
        };
        match tag {
            Some(tag) => index
                .0
                .iter()
                .find(|entry| entry.tag() == Some(tag))
                .cloned(),
            None if index.0.len() == 1 => index.0.first().cloned(),
            // Not several images, but one for several platforms.
            None if index.0.iter().all(|entry| entry.tag().is_none()) => {
                Some(index.select()?.clone())
            }
            None => None,
        }
        .ok_or_else(|| {
            let tags: Vec<&str> = index.0.iter().filter_map(Descriptor::tag).collect();
            let tags = excerpt(&tags.join(", "));
            self.broken(match tag {
                Some(tag) => format!("no image in it is called {tag:?} (there is: {tags})"),
                None => format!("it holds several images, say which one: {tags}"),
            })
        })
    }

    fn read(&self, name: &str) -> Result<Box<dyn Read + Send>, ImageError> {
        match &self.storage {
            Storage::Directory => {
                let path = self.path.join(name);
                match open_regular(&path) {
                    Ok(file) => Ok(Box::new(file)),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        Err(self.broken(format!("it has no {name}")))
                    }
                    Err(error) => Err(ImageError::io("open", path)(error)),
                }
            }
            Storage::Archive { file, members } => match members.get(name) {
                Some(&member) => Ok(Box::new(Window {
                    file: Arc::clone(file),
                    member,
                })),
                None => Err(self.broken(format!("it has no {name}"))),
            },
        }
    }

    fn blob_at(&self, digest: &Digest) -> Result<Box<dyn Read + Send>, ImageError> {
        self.read(&format!("blobs/sha256/{}", digest.hex()))
    }

    fn broken(&self, reason: String) -> ImageError {
        ImageError::Layout {
            path: self.path.clone(),
            reason,
        }
    }
}

impl Blobs for Layout {
    fn may_read(&self, _: &Descriptor) -> bool {
        true
    }

    fn manifest(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + Send>, ImageError> {
        self.blob_at(&descriptor.digest)
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + Send>, ImageError> {
        self.blob_at(&descriptor.digest)
    }
}

/// Opens a regular file, and nothing that would block or that has no end.
fn open_regular(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ));
    }
    Ok(file)
}

/// Lists the regular files of an archive.
fn scan(file: &File, limits: &Limits) -> Result<HashMap<String, Member>, tar::Error> {
    // Entries of a layout are an index, blobs and their directories: many, but not a file system.
    const MAX_MEMBERS: usize = 10_000;

    let length = file.metadata()?.len();
    let mut archive = Archive::new(BufReader::new(file), limits);
    let mut members = HashMap::new();
    while let Some(entry) = archive.next_seeking()? {
        let offset = archive.position();
        if entry.size > length.saturating_sub(offset) {
            return Err(tar::Error::Truncated);
        }
        if !matches!(entry.kind, tar::Kind::File) {
            continue;
        }
        if members.len() == MAX_MEMBERS {
            return Err(tar::Error::Malformed(
                "it has too many entries for an image layout",
            ));
        }
        if let Ok(name) = String::from_utf8(entry.path) {
            let name = name.strip_prefix("./").unwrap_or(&name).to_owned();
            members.insert(
                name,
                Member {
                    offset,
                    size: entry.size,
                },
            );
        }
    }
    Ok(members)
}

/// A part of a file.
struct Window {
    file: Arc<File>,
    member: Member,
}

impl Read for Window {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer
            .len()
            .min(usize::try_from(self.member.size).unwrap_or(usize::MAX));
        let read = self
            .file
            .read_at(&mut buffer[..wanted], self.member.offset)?;
        self.member.offset += read as u64;
        self.member.size -= read as u64;
        Ok(read)
    }
}

impl<R: Read + Seek> Archive<R> {
    /// Like `next`, but seeks over contents instead of reading them.
    fn next_seeking(&mut self) -> Result<Option<tar::Entry>, tar::Error> {
        let skipped = self.take_rest();
        let skip = i64::try_from(skipped).map_err(|_| tar::Error::Truncated)?;
        self.input_mut().seek(SeekFrom::Current(skip))?;
        self.next()
    }
}
