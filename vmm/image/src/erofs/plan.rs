//! Decides where on the disk everything goes.

use std::collections::BTreeMap;

use super::format::{BLOCK, INODE, Layout, SLOT, directory_size, xattr_size};
use crate::ImageError;
use crate::tree::{InodeId, Node, Tree};

/// Where an inode and its content go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placement {
    /// Bytes from the start of the metadata area to the inode.
    pub(super) offset: u64,
    pub(super) layout: Layout,
    /// Bytes of content.
    pub(super) size: u64,
    /// The first block of the content that is not inline.
    pub(super) data_block: u32,
    /// How many blocks that is.
    pub(super) data_blocks: u32,
    /// The directory that holds it: what `..` is.
    pub(super) parent: InodeId,
    pub(super) links: u32,
}

impl Placement {
    pub(super) fn nid(&self) -> u64 {
        self.offset / SLOT
    }

    /// Bytes of the content that follow the inode.
    pub(super) fn inline_bytes(&self) -> usize {
        match self.layout {
            Layout::Plain => 0,
            Layout::Inline => (self.size % BLOCK as u64) as usize,
        }
    }
}

/// The whole disk.
pub(super) struct Plan {
    /// By inode; those that nothing leads to have none.
    placements: Vec<Option<Placement>>,
    /// All inodes in the order they were met, which is the order of their contents.
    pub(super) order: Vec<InodeId>,
    pub(super) meta_blocks: u32,
    pub(super) data_blocks: u32,
}

impl Plan {
    /// The superblock's block comes first.
    pub(super) const META_BLOCK: u32 = 1;

    pub(super) fn new(tree: &Tree) -> Result<Self, ImageError> {
        let mut plan = Self {
            placements: vec![None; tree.len()],
            order: Vec::new(),
            meta_blocks: 0,
            data_blocks: 0,
        };
        let mut slots = Slots::new();
        // Depth first, names in order: neighbours in a directory become neighbours on disk. The
        // root comes first, because the superblock has only 16 bits for its place.
        let mut ahead = vec![(InodeId::ROOT, InodeId::ROOT)];
        while let Some((id, parent)) = ahead.pop() {
            if plan.placements[id.index()].is_some() {
                continue; // a further hard link
            }
            plan.place(tree, id, parent, &mut slots)?;
            let at = ahead.len();
            ahead.extend(tree.children(id).map(|(_, child)| (child, id)));
            ahead[at..].reverse();
        }
        plan.meta_blocks = slots.blocks;
        let first_data = Self::META_BLOCK
            .checked_add(plan.meta_blocks)
            .ok_or(TOO_LARGE)?;
        first_data.checked_add(plan.data_blocks).ok_or(TOO_LARGE)?;
        for placement in plan.placements.iter_mut().flatten() {
            if placement.data_blocks > 0 {
                placement.data_block += first_data;
            }
        }
        Ok(plan)
    }

    /// Where an inode goes that the tree leads to.
    pub(super) fn get(&self, id: InodeId) -> &Placement {
        self.placements[id.index()]
            .as_ref()
            .expect("all inodes below the root were placed")
    }

    pub(super) fn total_blocks(&self) -> u32 {
        Self::META_BLOCK + self.meta_blocks + self.data_blocks
    }

    fn place(
        &mut self,
        tree: &Tree,
        id: InodeId,
        parent: InodeId,
        slots: &mut Slots,
    ) -> Result<(), ImageError> {
        let inode = tree.get(id);
        let size = match &inode.node {
            Node::Directory(_) => {
                let dots = [&b"."[..], b".."].into_iter();
                // Only the sizes matter here, except that blocks fill up in the order of names.
                let mut names: Vec<&[u8]> = dots.chain(tree.children(id).map(|(n, _)| n)).collect();
                names.sort_unstable();
                directory_size(names.into_iter())
            }
            Node::File(extent) => extent.length,
            Node::Symlink(target) => target.len() as u64,
            Node::Device { .. } | Node::Fifo => 0,
        };
        let links = match &inode.node {
            Node::Directory(_) => {
                let subdirectories = tree
                    .children(id)
                    .filter(|(_, child)| tree.is_directory(*child))
                    .count();
                2 + subdirectories as u32
            }
            _ => inode.names,
        };
        let head = INODE + xattr_size(&inode.metadata.xattrs);
        let tail = (size % BLOCK as u64) as usize;
        let layout = if tail > 0 && head + tail <= BLOCK {
            Layout::Inline
        } else {
            Layout::Plain
        };
        let whole_blocks = match layout {
            Layout::Inline => size / BLOCK as u64,
            Layout::Plain => size.div_ceil(BLOCK as u64),
        };
        let data_blocks = u32::try_from(whole_blocks).map_err(|_| TOO_LARGE)?;
        let inline = if layout == Layout::Inline { tail } else { 0 };
        self.placements[id.index()] = Some(Placement {
            offset: slots.take(head + inline)?,
            layout,
            size,
            data_block: if data_blocks > 0 { self.data_blocks } else { 0 },
            data_blocks,
            parent,
            links,
        });
        self.data_blocks = self.data_blocks.checked_add(data_blocks).ok_or(TOO_LARGE)?;
        self.order.push(id);
        Ok(())
    }
}

const TOO_LARGE: ImageError = ImageError::Limit {
    what: "bytes of an EROFS disk",
    limit: (u32::MAX as u64) << 12,
};

/// The free room of the metadata area.
///
/// Inline content must not cross a block's end. So whatever fits into a block goes into the fullest
/// one that still has room for it, and the rest starts a block of its own.
struct Slots {
    blocks: u32,
    /// Blocks by the bytes that are free at their ends.
    free: BTreeMap<usize, Vec<u32>>,
}

impl Slots {
    /// The first slot stays unused: nid 0 would be inode number 0, which `readdir` users skip.
    fn new() -> Self {
        Self {
            blocks: 1,
            free: BTreeMap::from([(BLOCK - SLOT as usize, vec![0])]),
        }
    }

    /// Room for `bytes` bytes: its offset in the metadata area.
    fn take(&mut self, bytes: usize) -> Result<u64, ImageError> {
        let bytes = bytes.next_multiple_of(SLOT as usize);
        let (block, free) = match self.fullest(bytes) {
            Some(found) => found,
            None => {
                let block = self.blocks;
                let needed = bytes.div_ceil(BLOCK);
                let more = u32::try_from(needed).map_err(|_| TOO_LARGE)?;
                self.blocks = self.blocks.checked_add(more).ok_or(TOO_LARGE)?;
                (block, needed * BLOCK)
            }
        };
        let end = u64::from(block) * BLOCK as u64 + BLOCK as u64;
        let offset = if free > BLOCK {
            end - BLOCK as u64
        } else {
            end - free as u64
        };
        let left = free - bytes;
        if left >= INODE {
            let last = (offset + bytes as u64) / BLOCK as u64;
            // `last` is below `self.blocks`.
            self.free.entry(left).or_default().push(last as u32);
        }
        Ok(offset)
    }

    fn fullest(&mut self, bytes: usize) -> Option<(u32, usize)> {
        let (&free, blocks) = self.free.range_mut(bytes..).next()?;
        let block = blocks.pop();
        if blocks.is_empty() {
            self.free.remove(&free);
        }
        Some((block?, free))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn rooms_never_overlap_and_small_ones_never_cross_a_block(
            sizes in proptest::collection::vec(prop_oneof![64usize..400, 64usize..4097, 4097usize..70_000], 1..200)
        ) {
            let mut slots = Slots::new();
            let mut taken = Vec::new();
            for size in sizes {
                let at = slots.take(size).unwrap();
                prop_assert!(at > 0 && at.is_multiple_of(SLOT));
                let end = at + size as u64;
                prop_assert!(end <= u64::from(slots.blocks) * BLOCK as u64);
                if size <= BLOCK {
                    prop_assert_eq!(at / BLOCK as u64, (end - 1) / BLOCK as u64);
                }
                taken.push((at, end));
            }
            taken.sort_unstable();
            for pair in taken.windows(2) {
                prop_assert!(pair[0].1 <= pair[1].0, "{:?}", pair);
            }
        }
    }

    #[test]
    fn fills_the_fullest_block_first() {
        let mut slots = Slots::new();
        assert_eq!(slots.take(3000).unwrap(), 32); // leaves 1056
        assert_eq!(slots.take(4000).unwrap(), 4096); // leaves 96
        assert_eq!(slots.take(64).unwrap(), 4096 + 4000);
        assert_eq!(slots.take(1000).unwrap(), 32 + 3008);
    }
}
