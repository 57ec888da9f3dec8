//! From a [`Source`] to one manifest for this platform, and the place to read its blobs from.

use std::io::Read;
use std::sync::Arc;

use crate::layout::Layout;
use crate::manifest::{Descriptor, Document, Manifest};
use crate::proofs::Asker;
use crate::registry::Registry;
use crate::verify::Verified;
use crate::{Digest, ImageError, Limits, Source};

/// Where the content of an image is read from. What comes is not to be trusted, not even its
/// length: [`Verified`] checks it.
pub(crate) trait Blobs: Send + Sync {
    /// Whether whoever has the blobs would give us this one. Must not be called from an asynchronous task.
    fn may_read(&self, descriptor: &Descriptor) -> bool;
    /// A manifest or index.
    fn manifest(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + Send>, ImageError>;
    /// A configuration or layer.
    fn blob(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + Send>, ImageError>;
}

/// An image that is known, but not yet read.
pub(crate) struct Resolved {
    /// The manifest's digest.
    pub(crate) digest: Digest,
    /// The digest of what the source named: the manifest, or an index that leads to it.
    pub(crate) named: Digest,
    pub(crate) manifest: Manifest,
    pub(crate) blobs: Arc<dyn Blobs>,
    /// Who asks, if it is a registry: what comes from one is worth keeping, and is not everybody's.
    pub(crate) asker: Option<Asker>,
}

/// Finds the manifest of `source`. Blocks; for a registry it must run in a Tokio runtime's blocking
/// thread.
pub(crate) fn resolve(source: &Source, limits: &Limits) -> Result<Resolved, ImageError> {
    match source {
        Source::Layout { path, tag } => {
            let layout = Layout::open(path, limits)?;
            let start = layout.find(tag.as_deref(), limits)?;
            follow(Start::At(start), Arc::new(layout), None, limits)
        }
        Source::Registry { reference, options } => {
            let registry = Registry::new(reference, options)?;
            let (digest, bytes) = registry.start(limits)?;
            let asker = Asker::new(reference, options);
            let start = Start::Read(digest, bytes);
            follow(start, Arc::new(registry), Some(asker), limits)
        }
    }
}

enum Start {
    At(Descriptor),
    Read(Digest, Vec<u8>),
}

/// Follows indexes down to a manifest.
fn follow(
    start: Start,
    blobs: Arc<dyn Blobs>,
    asker: Option<Asker>,
    limits: &Limits,
) -> Result<Resolved, ImageError> {
    let read = |descriptor: &Descriptor| {
        let bytes = read_document(
            blobs.manifest(descriptor)?,
            descriptor,
            "the manifest",
            limits,
        )?;
        Ok((descriptor.digest, bytes))
    };
    let (mut digest, mut bytes) = match start {
        Start::At(descriptor) => read(&descriptor)?,
        Start::Read(digest, bytes) => (digest, bytes),
    };
    let named = digest;
    for _ in 0..=limits.index_depth {
        match Document::parse(&bytes, limits)? {
            Document::Manifest(manifest) => {
                return Ok(Resolved {
                    digest,
                    named,
                    manifest,
                    blobs,
                    asker,
                });
            }
            Document::Index(index) => (digest, bytes) = read(index.select()?)?,
        }
    }
    Err(ImageError::Limit {
        what: "nested indexes",
        limit: limits.index_depth as u64,
    })
}

/// Reads a whole small document and checks it against its descriptor.
pub(crate) fn read_document(
    reader: Box<dyn Read + Send>,
    descriptor: &Descriptor,
    what: &str,
    limits: &Limits,
) -> Result<Vec<u8>, ImageError> {
    if descriptor.size > limits.document_bytes {
        return Err(ImageError::Limit {
            what: "bytes of a document",
            limit: limits.document_bytes,
        });
    }
    let mut verified = Verified::new(reader, descriptor.digest, descriptor.size, what);
    let mut bytes = Vec::new();
    verified
        .read_to_end(&mut bytes)
        .map_err(|error| ImageError::from_read(error, what))?;
    verified.finish()?;
    Ok(bytes)
}
