//! What can go wrong between an image and its disk.

use std::io;
use std::path::PathBuf;

use crate::Digest;

/// Why an image could not be turned into a disk.
///
/// The messages are meant for the person who deploys the image; the sources carry the detail.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A digest that is not `sha256:` and 64 lower-case hexadecimal digits.
    #[error("not a sha256 digest: {value:?}")]
    InvalidDigest {
        /// What was given.
        value: String,
    },
    /// An image reference that does not follow the grammar.
    #[error("not an image reference: {value:?}: {reason}")]
    InvalidReference {
        /// What was given.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The host's file system failed us.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// A verb, as in "cannot create".
        action: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// The system's word on it.
        #[source]
        source: io::Error,
    },
    /// A directory or archive that is no OCI image layout.
    #[error("{} is not a usable OCI image layout: {reason}", path.display())]
    Layout {
        /// The directory or archive.
        path: PathBuf,
        /// What is missing or wrong.
        reason: String,
    },
    /// A manifest, index or configuration that does not say what it must.
    #[error("the image's {what} is malformed: {reason}")]
    Document {
        /// Which document.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The image has nothing for this machine.
    #[error("the image has no linux/amd64 variant (it has: {found})")]
    Platform {
        /// The platforms it does have.
        found: String,
    },
    /// Content that is not what its digest says.
    #[error("{what} is damaged: its digest should be {expected} but is {found}")]
    DigestMismatch {
        /// Which content.
        what: String,
        /// The digest it was asked for by.
        expected: Digest,
        /// The digest of what came.
        found: Digest,
    },
    /// Content that is longer or shorter than its descriptor says.
    #[error("{what} should have {expected} bytes but has {}{found}", if found > expected { "at least " } else { "" })]
    SizeMismatch {
        /// Which content.
        what: String,
        /// The size in the descriptor.
        expected: u64,
        /// Bytes seen.
        found: u64,
    },
    /// A layer whose archive cannot be read or whose entries break the rules.
    #[error("layer {number} ({digest}) was refused: {reason}")]
    Layer {
        /// Which layer, counted from 1, the lowest first.
        number: usize,
        /// The layer's digest.
        digest: Digest,
        /// What is wrong with it.
        reason: String,
    },
    /// The image asks for more than [`crate::Limits`] allow.
    #[error("the image exceeds the limit of {limit} {what}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How much is allowed.
        limit: u64,
    },
    /// The registry did not answer as hoped.
    #[error("registry {host}: {reason}")]
    Registry {
        /// The registry's host and port.
        host: String,
        /// What happened.
        reason: String,
        /// The transport's error, if there was one.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The registry does not have the image, or does not show it to us.
    #[error("image {reference} was not found")]
    NotFound {
        /// The reference as understood.
        reference: String,
    },
    /// The registry wants credentials, or other ones.
    #[error("registry {host} refused access to {repository}; check the credentials")]
    Unauthorized {
        /// The registry's host and port.
        host: String,
        /// The repository asked for.
        repository: String,
    },
    /// The registry, or what it leads to, is at an address that references may not lead to.
    #[error(
        "registry {host} is not on the public Internet, or leads away from it; the server's operator \
         can allow this with --private-registries"
    )]
    NotPublic {
        /// The registry's host and port.
        host: String,
    },
    /// Whoever asked for the conversion went away.
    #[error("the conversion was cancelled")]
    Cancelled,
}

impl ImageError {
    /// An [`ImageError::Io`], to be used with `map_err`.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    /// What a failed read means. Readers that have more to say than an [`io::Error`] can carry an
    /// [`ImageError`] inside one.
    pub(crate) fn from_read(error: io::Error, what: &str) -> Self {
        match error.downcast::<Self>() {
            Ok(inner) => inner,
            Err(source) => Self::Io {
                action: "read",
                path: what.into(),
                source,
            },
        }
    }
}

/// The start of a hostile string, fit for a message.
pub(crate) fn excerpt(text: &str) -> String {
    const SHOWN: usize = 128; // characters; enough to recognise it, too few to flood a log
    let mut shown: String = text.chars().take(SHOWN).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    shown
}
