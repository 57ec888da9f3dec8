//! The file system of an image while its layers are applied: a tree in memory.
//!
//! Inodes live in one list and are named by their place in it, so that hard links are two names for
//! one place, and dropping a deep tree needs no recursion. File contents are elsewhere, in the
//! [`Spool`](crate::spool::Spool).

use std::collections::BTreeMap;

use crate::spool::Extent;
use crate::tar::Time;

/// The names of a directory in the order EROFS wants them: by bytes.
pub(crate) type Children = BTreeMap<Box<[u8]>, Child>;

/// Extended attributes by full name.
pub(crate) type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// A place in the list of inodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct InodeId(u32);

impl InodeId {
    pub(crate) const ROOT: Self = Self(0);

    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Child {
    pub(crate) inode: InodeId,
    /// The last layer that wrote this name.
    pub(crate) layer: usize,
}

/// What `stat` says of a file, apart from its kind.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metadata {
    /// Permission bits with set-user-id, set-group-id and sticky.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Time,
    pub(crate) xattrs: Xattrs,
}

impl Metadata {
    /// Of directories that layers use but never mention.
    fn implied_directory() -> Self {
        Self {
            mode: 0o755,
            ..Self::default()
        }
    }
}

/// What an inode is.
#[derive(Debug)]
pub(crate) enum Node {
    Directory(Directory),
    File(Extent),
    Symlink(Box<[u8]>),
    Device {
        character: bool,
        major: u32,
        minor: u32,
    },
    Fifo,
}

#[derive(Debug, Default)]
pub(crate) struct Directory {
    pub(crate) children: Children,
    /// The last layer that removed what lower layers had put here. Nothing of them is left then.
    swept_by: usize,
}

#[derive(Debug)]
pub(crate) struct Inode {
    pub(crate) metadata: Metadata,
    pub(crate) node: Node,
    /// Names that lead here (one for a directory).
    pub(crate) names: u32,
}

/// The tree. Layers are counted from 1; 0 made the root directory.
#[derive(Debug)]
pub(crate) struct Tree {
    inodes: Vec<Inode>,
}

impl Tree {
    pub(crate) fn new() -> Self {
        let root = Inode {
            metadata: Metadata::implied_directory(),
            node: Node::Directory(Directory::default()),
            names: 1,
        };
        Self { inodes: vec![root] }
    }

    pub(crate) fn get(&self, id: InodeId) -> &Inode {
        &self.inodes[id.index()]
    }

    pub(crate) fn get_mut(&mut self, id: InodeId) -> &mut Inode {
        &mut self.inodes[id.index()]
    }

    /// One more than the largest [`InodeId::index`].
    pub(crate) fn len(&self) -> usize {
        self.inodes.len()
    }

    /// The names in directory `id`; none if it is something else.
    pub(crate) fn children(&self, id: InodeId) -> impl Iterator<Item = (&[u8], InodeId)> {
        let children = match &self.get(id).node {
            Node::Directory(directory) => Some(&directory.children),
            _ => None,
        };
        children
            .into_iter()
            .flatten()
            .map(|(name, child)| (&**name, child.inode))
    }

    pub(crate) fn child(&self, parent: InodeId, name: &[u8]) -> Option<Child> {
        match &self.get(parent).node {
            Node::Directory(directory) => directory.children.get(name).copied(),
            _ => None,
        }
    }

    pub(crate) fn is_directory(&self, id: InodeId) -> bool {
        matches!(self.get(id).node, Node::Directory(_))
    }

    fn directory_mut(&mut self, id: InodeId) -> Option<&mut Directory> {
        match &mut self.get_mut(id).node {
            Node::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    /// Gives `parent` a child. Whatever had the name goes, with all that is below it.
    pub(crate) fn insert(
        &mut self,
        parent: InodeId,
        name: &[u8],
        layer: usize,
        metadata: Metadata,
        node: Node,
    ) -> InodeId {
        let inode = InodeId(self.inodes.len() as u32); // `Limits::entries` keeps it far below
        self.inodes.push(Inode {
            metadata,
            node,
            names: 0,
        });
        self.link(parent, name, layer, inode);
        inode
    }

    /// A directory that nobody described.
    pub(crate) fn insert_implied(&mut self, parent: InodeId, name: &[u8], layer: usize) -> InodeId {
        let node = Node::Directory(Directory::default());
        self.insert(parent, name, layer, Metadata::implied_directory(), node)
    }

    /// Gives `inode` a name in `parent`. Whatever else had the name goes.
    pub(crate) fn link(&mut self, parent: InodeId, name: &[u8], layer: usize, inode: InodeId) {
        self.get_mut(inode).names += 1;
        let child = Child { inode, layer };
        let Some(directory) = self.directory_mut(parent) else {
            return;
        };
        if let Some(old) = directory.children.insert(name.into(), child) {
            self.unlink(old.inode);
        }
    }

    /// Notes that `layer` has described the directory `name` of `parent` again.
    pub(crate) fn touch(&mut self, parent: InodeId, name: &[u8], layer: usize) {
        let directory = self.directory_mut(parent);
        if let Some(child) = directory.and_then(|directory| directory.children.get_mut(name)) {
            child.layer = layer;
        }
    }

    /// Takes a name from an inode, and everything below it if that was the last one.
    fn unlink(&mut self, id: InodeId) {
        let mut unlinked = vec![id];
        while let Some(id) = unlinked.pop() {
            let inode = self.get_mut(id);
            inode.names -= 1;
            if inode.names > 0 {
                continue;
            }
            inode.metadata.xattrs = Xattrs::new();
            if let Node::Directory(directory) = &mut inode.node {
                let children = std::mem::take(&mut directory.children);
                unlinked.extend(children.into_values().map(|child| child.inode));
            }
        }
    }

    /// Removes what layers below `layer` have put into a directory (an opaque whiteout).
    pub(crate) fn sweep(&mut self, id: InodeId, layer: usize) {
        let Some(directory) = self.directory_mut(id) else {
            return;
        };
        if directory.swept_by == layer {
            return; // else a layer of many whiteouts would walk the same names again and again
        }
        directory.swept_by = layer;
        let children = std::mem::take(&mut directory.children);
        // As deep as `Limits::depth` at most.
        let kept: Children = children
            .into_iter()
            .filter(|(_, child)| self.survives(*child, layer))
            .collect();
        if let Some(directory) = self.directory_mut(id) {
            directory.children = kept;
        }
    }

    /// Removes `name` from `parent` as far as layers below `layer` have put it there (a whiteout).
    pub(crate) fn white_out(&mut self, parent: InodeId, name: &[u8], layer: usize) {
        if let Some(child) = self.child(parent, name)
            && !self.survives(child, layer)
            && let Some(directory) = self.directory_mut(parent)
        {
            directory.children.remove(name);
        }
    }

    /// Whether a name outlives the removal of all layers below `layer`. If not, it is unlinked.
    fn survives(&mut self, child: Child, layer: usize) -> bool {
        self.sweep(child.inode, layer);
        let still_holds_something = self.children(child.inode).next().is_some();
        let survives = child.layer == layer || still_holds_something;
        if !survives {
            self.unlink(child.inode);
        }
        survives
    }
}
