//! Images in, disks out, judged by others: `fsck.erofs`, `buildah`, the kernel.
#![allow(clippy::unwrap_used)] // helpers of tests, which clippy does not take for tests

mod convert;
mod hostile;
mod kernel;
mod registry;
mod support;
