//! From a Dockerfile to an image in the API's registry.
//!
//! `buildah` builds (as root, without a daemon) into an OCI layout in a temporary directory; [`push()`]
//! uploads what the registry lacks. The token never appears on a command line.

mod build;
mod expose;
mod layout;
mod push;

pub use build::build;
pub use expose::of_dockerfile;
pub use layout::Layout;
pub use push::push;

/// The name of the API's own registry in image references; hosts know how to reach it.
pub const REGISTRY: &str = "registry.internal";
