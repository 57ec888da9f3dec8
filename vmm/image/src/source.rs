//! Where an image comes from.

use std::fmt;
use std::path::PathBuf;

use crate::Reference;

/// Where to take an image from.
#[derive(Debug, Clone)]
pub enum Source {
    /// An OCI image layout: a directory, or an uncompressed tar archive of one (`oci-archive:`).
    Layout {
        /// The directory or archive.
        path: PathBuf,
        /// Which image in it, by its `org.opencontainers.image.ref.name`; may be left out where
        /// there is only one.
        tag: Option<String>,
    },
    /// A registry that speaks the OCI distribution protocol.
    Registry {
        /// The image's name.
        reference: Reference,
        /// How to talk to the registry.
        options: RegistryOptions,
    },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layout {
                path,
                tag: Some(tag),
            } => write!(f, "{}:{tag}", path.display()),
            Self::Layout { path, tag: None } => write!(f, "{}", path.display()),
            Self::Registry { reference, .. } => reference.fmt(f),
        }
    }
}

/// How to talk to a registry.
#[derive(Debug, Clone, Default)]
pub struct RegistryOptions {
    /// Speak plain HTTP. Credentials then travel in the clear: meant for loopback.
    pub insecure: bool,
    /// Let the registry, and what it redirects to, be at any address. Without it only those of the
    /// public Internet are visited, because whoever writes a reference chooses where the host
    /// connects to. Meant for registries that the operator names.
    pub anywhere: bool,
    /// Sent to the registry, or to the token service it names, when it asks for them.
    pub credentials: Option<Credentials>,
    /// Who the image is for, of all who share the store: what one was given, another is not. Empty where
    /// there is nobody else.
    pub on_behalf_of: String,
    /// Take the registry's word that it would give what is kept here already. Others have to show that they
    /// have it, for whoever writes a reference may have made its registry too. Meant for the operator's own.
    pub trusted: bool,
}

/// A user name and password (or access token) of a registry.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user name.
    pub username: String,
    /// The password.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({:?}, …)", self.username)
    }
}

/// How far a conversion has come.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// The image is known; its layers come next.
    Resolved {
        /// The manifest's digest.
        digest: crate::Digest,
        /// How many layers it has.
        layers: usize,
        /// The compressed size of all layers.
        bytes: u64,
    },
    /// Layers are being read.
    Reading {
        /// The layer at hand, counted from 1.
        layer: usize,
        /// Compressed bytes read so far, of all layers.
        bytes: u64,
    },
    /// The disk is being written.
    Writing {
        /// Bytes written so far.
        bytes: u64,
        /// Bytes the disk will have.
        total: u64,
    },
}
