//! An OCI image to one read-only EROFS disk.
//!
//! A Machine's root file system is an image's layers, flattened into one disk per manifest digest.
//! [`ImageStore::ensure`] takes an image from a [`Source`] (an OCI layout or a registry), reads its
//! layers in order, each checked against its digest while it streams by, applies them to a tree in
//! memory, and writes that tree as an EROFS file system. Of a registry's image the next layers are on
//! their way meanwhile, and are kept for other images that have them, until
//! [`ImageStore::collect`] needs the space.
//!
//! What the crate promises about images, whose authors it does not trust:
//!
//! - Nothing of an image is ever unpacked on the host's file system. Names, links and devices exist
//!   only in memory and on the disk image; there is no path to escape through.
//! - What is kept once is not everybody's: who has not been given an image by its registry does not get it by
//!   its digest.
//! - Memory, disk space and time are bounded by [`Limits`].
//! - A wrong byte anywhere is an error, and an error leaves nothing behind.
//! - The same image gives the same disk, byte for byte.

mod apply;
mod config;
mod convert;
mod digest;
mod erofs;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod gc;
mod layer;
mod layers;
mod layout;
mod limits;
mod manifest;
mod proofs;
mod reference;
mod registry;
mod resolve;
mod source;
mod spool;
mod store;
mod tar;
#[cfg(test)]
#[path = "../tests/it/support/layer.rs"]
mod test_layer;
mod tree;
mod verify;

pub use config::ImageConfig;
pub use digest::Digest;
pub use error::ImageError;
pub use gc::{Budget, Collected, Round};
pub use limits::Limits;
pub use reference::Reference;
pub use source::{Credentials, Progress, RegistryOptions, Source};
pub use store::{Image, ImageStore, Lease};
