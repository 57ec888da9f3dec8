//! Writes the disk from front to back.

use std::fs::File;
use std::io::{self, BufWriter, Write};

use super::format::{self, BLOCK, Dirent, InodeFields, Layout, Superblock};
use super::plan::{Placement, Plan};
use crate::spool::{Contents, Extent};
use crate::tree::{Inode, InodeId, Node, Tree};
use crate::{Digest, ImageError};

/// Bytes copied at a time.
const BUFFER: usize = 1 << 20;

/// Writes `tree` to `disk`. `name` tells this file system from others: its UUID is made from it.
/// `progress` gets the bytes written and to be written; its error ends the writing.
pub(crate) fn write(
    tree: &Tree,
    contents: &Contents,
    name: &Digest,
    disk: &mut File,
    progress: impl Fn(u64, u64) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let plan = Plan::new(tree)?;
    let total = u64::from(plan.total_blocks()) * BLOCK as u64;
    let mut writer = Writer {
        tree,
        contents,
        plan: &plan,
        out: BufWriter::with_capacity(BUFFER, disk),
        at: 0,
        total,
        progress,
    };
    writer.superblock(name)?;
    writer.metadata()?;
    writer.data()?;
    writer.out.flush().map_err(write_error)?;
    debug_assert_eq!(writer.at, total);
    (writer.progress)(total, total)
}

struct Writer<'a, P> {
    tree: &'a Tree,
    contents: &'a Contents,
    plan: &'a Plan,
    out: BufWriter<&'a mut File>,
    at: u64,
    total: u64,
    progress: P,
}

impl<P: Fn(u64, u64) -> Result<(), ImageError>> Writer<'_, P> {
    fn superblock(&mut self, name: &Digest) -> Result<(), ImageError> {
        let superblock = Superblock {
            root_nid: u16::try_from(self.plan.get(InodeId::ROOT).nid())
                .expect("the root is placed first, in the first or second block"),
            inodes: self.plan.order.len() as u64,
            blocks: self.plan.total_blocks(),
            meta_block: Plan::META_BLOCK,
            uuid: uuid(name),
        };
        self.put(&superblock.block())
    }

    /// Inodes, attributes, tails.
    fn metadata(&mut self) -> Result<(), ImageError> {
        let start = self.at;
        let mut by_place: Vec<(u64, usize)> = self
            .plan
            .order
            .iter()
            .enumerate()
            .map(|(n, &id)| (self.plan.get(id).offset, n))
            .collect();
        by_place.sort_unstable();
        for (offset, n) in by_place {
            let id = self.plan.order[n];
            let placement = *self.plan.get(id);
            let inode = self.tree.get(id);
            self.pad_to(start + offset)?;
            let fields = InodeFields {
                layout: placement.layout,
                size: placement.size,
                data_block: placement.data_block,
                number: n as u32 + 1, // for 32-bit `stat`, where 0 is no number
                links: placement.links,
            };
            self.put(&format::inode(inode, &fields))?;
            self.tail(id, inode, &placement)?;
        }
        self.pad_to(start + u64::from(self.plan.meta_blocks) * BLOCK as u64)
    }

    fn tail(&mut self, id: InodeId, inode: &Inode, placed: &Placement) -> Result<(), ImageError> {
        let length = placed.inline_bytes();
        if length == 0 {
            return Ok(());
        }
        let from = placed.size - length as u64;
        match &inode.node {
            Node::File(extent) => {
                let mut tail = vec![0; length];
                self.contents
                    .read(*extent, from, &mut tail)
                    .map_err(read_error)?;
                self.put(&tail)
            }
            Node::Symlink(target) => self.put(&target[from as usize..]),
            Node::Directory(_) => self.put(&self.directory(id, placed)[from as usize..]),
            Node::Device { .. } | Node::Fifo => Ok(()),
        }
    }

    /// Whole blocks.
    fn data(&mut self) -> Result<(), ImageError> {
        for &id in &self.plan.order {
            let placed = self.plan.get(id);
            if placed.data_blocks == 0 {
                continue;
            }
            let length = match placed.layout {
                Layout::Plain => placed.size,
                Layout::Inline => u64::from(placed.data_blocks) * BLOCK as u64,
            };
            match &self.tree.get(id).node {
                Node::File(extent) => self.copy(*extent, length)?,
                Node::Symlink(target) => self.put(target)?,
                Node::Directory(_) => {
                    let bytes = self.directory(id, placed);
                    self.put(&bytes[..length as usize])?;
                }
                Node::Device { .. } | Node::Fifo => {}
            }
            self.pad_to(self.at.next_multiple_of(BLOCK as u64))?;
        }
        Ok(())
    }

    fn directory(&self, id: InodeId, placed: &Placement) -> Vec<u8> {
        let entry = |name, id| {
            let file_type = format::file_type(&self.tree.get(id).node);
            Dirent {
                name,
                nid: self.plan.get(id).nid(),
                file_type,
            }
        };
        let mut entries: Vec<Dirent<'_>> = self
            .tree
            .children(id)
            .map(|(name, child)| entry(name, child))
            .collect();
        entries.push(entry(b".", id));
        entries.push(entry(b"..", placed.parent));
        entries.sort_unstable_by_key(|entry| entry.name);
        format::directory(&entries)
    }

    fn copy(&mut self, extent: Extent, length: u64) -> Result<(), ImageError> {
        let mut buffer = vec![0; BUFFER.min(length as usize)];
        let mut done = 0;
        while done < length {
            let part = buffer.len().min((length - done) as usize);
            self.contents
                .read(extent, done, &mut buffer[..part])
                .map_err(read_error)?;
            self.put(&buffer[..part])?;
            done += part as u64;
        }
        Ok(())
    }

    fn pad_to(&mut self, to: u64) -> Result<(), ImageError> {
        const ZEROS: [u8; BLOCK] = [0; BLOCK];
        while self.at < to {
            let part = (to - self.at).min(BLOCK as u64) as usize;
            self.put(&ZEROS[..part])?;
        }
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.out.write_all(bytes).map_err(write_error)?;
        let before = self.at / BUFFER as u64;
        self.at += bytes.len() as u64;
        if self.at / BUFFER as u64 != before {
            (self.progress)(self.at, self.total)?;
        }
        Ok(())
    }
}

/// A custom (version 8) UUID of the digest's first bits.
fn uuid(name: &Digest) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&name.as_bytes()[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

fn write_error(error: io::Error) -> ImageError {
    ImageError::io("write", "the image's disk")(error)
}

fn read_error(error: io::Error) -> ImageError {
    ImageError::io("read", "the image's temporary file")(error)
}
