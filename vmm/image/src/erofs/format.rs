//! The bytes of EROFS's on-disk structures. All integers are little-endian.

use crate::tar::Time;
use crate::tree::{Inode, Node, Xattrs};

pub(super) const BLOCK: usize = 4096;
const BLOCK_BITS: u8 = 12;
/// Inodes start at multiples of this, and are named by them: the "nid".
pub(super) const SLOT: u64 = 32;
/// We write the "extended" form only: it has a modification time and wide owners.
pub(super) const INODE: usize = 64;

const SUPERBLOCK_AT: usize = 1024;
const MAGIC: u32 = 0xE0F5_E1E2;
/// The superblock carries a checksum.
const COMPAT_CHECKSUM: u32 = 0x1;
/// Times of inodes are modification times.
const COMPAT_MTIME: u32 = 0x2;

const XATTR_HEADER: usize = 12;
const XATTR_ENTRY: usize = 4;
const DIRENT: usize = 12;

/// Where an inode's content is: in blocks, with a last part of less than a block behind the inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// All of it in blocks.
    Plain,
    /// The last part, less than a block, behind the inode.
    Inline,
}

/// What the superblock says.
pub(super) struct Superblock {
    pub(super) root_nid: u16,
    pub(super) inodes: u64,
    pub(super) blocks: u32,
    pub(super) meta_block: u32,
    pub(super) uuid: [u8; 16],
}

impl Superblock {
    /// The disk's first block.
    pub(super) fn block(&self) -> Vec<u8> {
        let mut sb = Bytes::default();
        sb.u32(MAGIC);
        sb.u32(0); // checksum, below
        sb.u32(COMPAT_CHECKSUM | COMPAT_MTIME);
        sb.u8(BLOCK_BITS);
        sb.u8(0); // no extension slots
        sb.u16(self.root_nid);
        sb.u64(self.inodes);
        sb.u64(0); // build time: of inodes without their own, and we have none
        sb.u32(0); // its nanoseconds
        sb.u32(self.blocks);
        sb.u32(self.meta_block);
        sb.u32(0); // shared attributes: none
        sb.raw(&self.uuid);
        sb.zeros(16); // volume name
        sb.u32(0); // incompatible features: none
        sb.zeros(44); // compression, further devices, directory blocks of other sizes, …

        let mut block = vec![0; SUPERBLOCK_AT];
        block.extend_from_slice(&sb.0);
        block.resize(BLOCK, 0);
        let checksum = crc32c(&block[SUPERBLOCK_AT..]);
        block[SUPERBLOCK_AT + 4..SUPERBLOCK_AT + 8].copy_from_slice(&checksum.to_le_bytes());
        block
    }
}

/// What an inode says beside what the tree knows.
pub(super) struct InodeFields {
    pub(super) layout: Layout,
    pub(super) size: u64,
    /// The first block of its content.
    pub(super) data_block: u32,
    pub(super) number: u32,
    pub(super) links: u32,
}

/// An inode and its attributes.
pub(super) fn inode(inode: &Inode, fields: &InodeFields) -> Vec<u8> {
    const EXTENDED: u16 = 1;
    let layout = match fields.layout {
        Layout::Plain => 0,
        Layout::Inline => 2,
    };
    let xattr_bytes = xattr_size(&inode.metadata.xattrs);
    // The header counts as one unit, each further four bytes as another.
    let xattr_units = if xattr_bytes == 0 {
        0
    } else {
        (xattr_bytes - XATTR_HEADER) / XATTR_ENTRY + 1
    };
    let (file_type, where_to) = match &inode.node {
        Node::Directory(_) => (libc::S_IFDIR, fields.data_block),
        Node::File(_) => (libc::S_IFREG, fields.data_block),
        Node::Symlink(_) => (libc::S_IFLNK, fields.data_block),
        Node::Device {
            character: true,
            major,
            minor,
        } => (libc::S_IFCHR, device(*major, *minor)),
        Node::Device {
            character: false,
            major,
            minor,
        } => (libc::S_IFBLK, device(*major, *minor)),
        Node::Fifo => (libc::S_IFIFO, 0),
    };
    let metadata = &inode.metadata;
    let Time { seconds, nanos } = metadata.mtime;

    let mut bytes = Bytes::default();
    bytes.u16(EXTENDED | layout << 1);
    bytes.u16(xattr_units as u16); // `Limits::xattr_bytes`, and the archive's reader, bound it
    bytes.u16(file_type as u16 | metadata.mode);
    bytes.u16(0);
    bytes.u64(fields.size);
    bytes.u32(where_to);
    bytes.u32(fields.number);
    bytes.u32(metadata.uid);
    bytes.u32(metadata.gid);
    bytes.u64(seconds as u64); // two's complement
    bytes.u32(nanos);
    bytes.u32(fields.links);
    bytes.zeros(16);
    debug_assert_eq!(bytes.0.len(), INODE);
    xattrs(&metadata.xattrs, &mut bytes);
    bytes.0
}

/// Linux's 32-bit form of a device number.
fn device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The namespaces of extended attributes that EROFS has numbers for.
const XATTR_PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// Splits an attribute's name into the number of its namespace and the rest.
fn split_xattr(name: &[u8]) -> Option<(u8, &[u8])> {
    XATTR_PREFIXES.iter().find_map(|&(prefix, number)| {
        let rest = name.strip_prefix(prefix)?;
        // A namespace needs a name in it; the two ACLs are whole names.
        (rest.is_empty() != prefix.ends_with(b".")).then_some((number, rest))
    })
}

/// Whether an extended attribute has a place in EROFS.
pub(crate) fn can_hold_xattr(name: &[u8]) -> bool {
    split_xattr(name).is_some()
}

/// Bytes between an inode and what follows.
pub(super) fn xattr_size(xattrs: &Xattrs) -> usize {
    if xattrs.is_empty() {
        return 0;
    }
    let entry = |(name, value): (&Vec<u8>, &Vec<u8>)| {
        let rest = split_xattr(name).map_or(0, |(_, rest)| rest.len());
        (XATTR_ENTRY + rest + value.len()).next_multiple_of(XATTR_ENTRY)
    };
    XATTR_HEADER + xattrs.iter().map(entry).sum::<usize>()
}

fn xattrs(xattrs: &Xattrs, bytes: &mut Bytes) {
    if xattrs.is_empty() {
        return;
    }
    bytes.zeros(XATTR_HEADER); // no name filter, no shared attributes
    for (name, value) in xattrs {
        let Some((namespace, rest)) = split_xattr(name) else {
            continue;
        };
        bytes.u8(rest.len() as u8); // at most 255, and less the prefix
        bytes.u8(namespace);
        bytes.u16(value.len() as u16); // at most 65535
        bytes.raw(rest);
        bytes.raw(value);
        bytes.zeros(bytes.0.len().next_multiple_of(XATTR_ENTRY) - bytes.0.len());
    }
}

/// A name in a directory.
pub(super) struct Dirent<'a> {
    pub(super) name: &'a [u8],
    pub(super) nid: u64,
    pub(super) file_type: u8,
}

/// The number by which a directory says what its entry is.
pub(super) fn file_type(node: &Node) -> u8 {
    match node {
        Node::File(_) => 1,
        Node::Directory(_) => 2,
        Node::Device {
            character: true, ..
        } => 3,
        Node::Device {
            character: false, ..
        } => 4,
        Node::Fifo => 5,
        Node::Symlink(_) => 7,
    }
}

/// Splits names into directory blocks: how many go into each, and how many bytes the last one has.
fn directory_blocks<'a>(names: impl Iterator<Item = &'a [u8]>) -> (Vec<usize>, usize) {
    let mut counts = vec![0];
    let mut used = 0;
    for name in names {
        let needed = DIRENT + name.len();
        if used + needed > BLOCK {
            counts.push(0);
            used = 0;
        }
        if let Some(last) = counts.last_mut() {
            *last += 1;
        }
        used += needed;
    }
    (counts, used)
}

/// Bytes of a directory with these names.
pub(super) fn directory_size<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let (counts, last) = directory_blocks(names);
    ((counts.len() - 1) * BLOCK + last) as u64
}

/// A directory's content. Entries come sorted by name, `.` and `..` among them.
///
/// Each block stands for itself: entries of fixed size, then their names. The first entry's name
/// offset tells how many there are.
pub(super) fn directory(entries: &[Dirent<'_>]) -> Vec<u8> {
    let (counts, _) = directory_blocks(entries.iter().map(|entry| entry.name));
    let mut bytes = Bytes::default();
    let mut rest = entries;
    for count in counts {
        bytes.zeros(bytes.0.len().next_multiple_of(BLOCK) - bytes.0.len());
        let (block, others) = rest.split_at(count);
        rest = others;
        let mut name_at = count * DIRENT;
        for entry in block {
            bytes.u64(entry.nid);
            bytes.u16(name_at as u16); // within a block
            bytes.u8(entry.file_type);
            bytes.u8(0);
            name_at += entry.name.len();
        }
        for entry in block {
            bytes.raw(entry.name);
        }
    }
    bytes.0
}

/// CRC-32C as the kernel uses it here: seeded with ones and not inverted at the end. Bit by bit: it
/// is done once for 3 KiB.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82F6_3B78;
    bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ if crc & 1 == 1 { POLYNOMIAL } else { 0 }
        })
    })
}

#[derive(Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    fn u16(&mut self, value: u16) {
        self.raw(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.raw(&value.to_le_bytes());
    }

    fn raw(&mut self, value: &[u8]) {
        self.0.extend_from_slice(value);
    }

    fn zeros(&mut self, count: usize) {
        self.0.resize(self.0.len() + count, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_is_the_known_one_without_the_final_inversion() {
        assert_eq!(!crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn device_numbers_are_packed_as_linux_does() {
        assert_eq!(device(1, 3), 0x103);
        assert_eq!(device(0xfff, 0xf_ffff), u32::MAX);
        assert_eq!(device(8, 0x1_02), 0x0010_0802);
    }

    #[test]
    fn names_that_have_no_namespace_have_no_place() {
        assert_eq!(
            split_xattr(b"security.capability"),
            Some((6, &b"capability"[..]))
        );
        assert_eq!(split_xattr(b"system.posix_acl_access"), Some((2, &b""[..])));
        for bad in [
            "user.",
            "user",
            "system.posix_acl_accessx",
            "com.apple.x",
            "",
        ] {
            assert!(!can_hold_xattr(bad.as_bytes()), "{bad}");
        }
    }

    #[test]
    fn a_full_directory_block_starts_a_new_one() {
        let name = [b'n'; 244]; // 256 bytes with its entry
        let names = |count| std::iter::repeat_n(&name[..], count);
        assert_eq!(directory_size(names(16)), BLOCK as u64);
        assert_eq!(directory_size(names(17)), BLOCK as u64 + 256);
        let entries: Vec<Dirent<'_>> = names(17)
            .map(|name| Dirent {
                name,
                nid: 7,
                file_type: 1,
            })
            .collect();
        let bytes = directory(&entries);
        assert_eq!(bytes.len(), BLOCK + 256);
        assert_eq!(bytes[8..10], (16 * DIRENT as u16).to_le_bytes());
        assert_eq!(bytes[BLOCK + 8..BLOCK + 10], (DIRENT as u16).to_le_bytes());
    }
}
