//! Writes EROFS file systems: read-only, uncompressed, mounted by any Linux from 5.4 on.
//!
//! The disk is, in this order: a block with the superblock, the inodes (each followed by its
//! extended attributes and, where it fits, the tail of its content), and the blocks of contents and
//! directories. [`plan`] decides where everything goes before [`mod@write`] writes it front to back.
//! Nothing of it depends on time, chance or the machine.
//!
//! See [the kernel's documentation](https://docs.kernel.org/filesystems/erofs.html#on-disk-details).

mod format;
mod plan;
mod write;

pub(crate) use format::can_hold_xattr;
pub(crate) use write::write;
