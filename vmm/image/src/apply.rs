//! The rules by which a layer's entries change the tree.
//!
//! See the [OCI layer specification](https://github.com/opencontainers/image-spec/blob/main/layer.md).
//! Where it is silent, this does what containerd does, minus the file system: a path's last
//! component replaces what is there, unless both are directories; symbolic links in the components
//! before it are followed, but never out of the image's root.

use std::collections::VecDeque;
use std::io::Read;

use crate::spool::{Spool, SpoolError};
use crate::tar::{self, Entry, Kind};
use crate::tree::{Directory, InodeId, Metadata, Node, Tree, Xattrs};
use crate::{ImageError, Limits};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What AUFS, the first file system under Docker, kept in its layers for itself.
const AUFS: &[u8] = b".wh..wh.";
/// Longest name of one file, in Linux and in EROFS.
const MAX_NAME: usize = 255;
/// Symbolic links followed in one path: Linux's own limit.
const MAX_LINKS: usize = 40;
/// Path components walked for each entry that [`Limits::entries`] allows, on average. File systems
/// are about eight deep; chains of links are how an image could make us walk much more.
const STEPS_PER_ENTRY: u64 = 64;

/// Why an entry was not applied.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The entry breaks the rules.
    Entry { path: Vec<u8>, reason: &'static str },
    /// The archive does.
    Tar(tar::Error),
    /// It is not the layer's fault, or a limit was reached.
    Image(ImageError),
}

impl From<tar::Error> for Refusal {
    fn from(error: tar::Error) -> Self {
        Self::Tar(error)
    }
}

impl From<std::io::Error> for Refusal {
    fn from(error: std::io::Error) -> Self {
        Self::Tar(error.into())
    }
}

/// Applies entries to a tree.
pub(crate) struct Applier<'a> {
    tree: Tree,
    spool: Spool,
    limits: &'a Limits,
    layer: usize,
    entries: u64,
    metadata_bytes: u64,
    steps: u64,
}

/// What to do about directories that are missing on the way.
#[derive(Clone, Copy, PartialEq)]
enum Missing {
    Create,
    Stop,
}

impl<'a> Applier<'a> {
    pub(crate) fn new(spool: Spool, limits: &'a Limits) -> Self {
        let tree = Tree::new();
        Self {
            tree,
            spool,
            limits,
            layer: 0,
            entries: 0,
            metadata_bytes: 0,
            steps: 0,
        }
    }

    /// The entries to come belong to layer `number`, counted from 1.
    pub(crate) fn begin_layer(&mut self, number: usize) {
        self.layer = number;
    }

    pub(crate) fn finish(self) -> (Tree, Spool) {
        (self.tree, self.spool)
    }

    /// Applies one entry, whose content, if it has some, is read from `content`.
    pub(crate) fn apply(
        &mut self,
        mut entry: Entry,
        content: &mut impl Read,
    ) -> Result<(), Refusal> {
        self.account(&entry).map_err(Refusal::Image)?;
        let path = std::mem::take(&mut entry.path);
        self.change(&path, entry, content)
            .map_err(|fault| match fault {
                Fault::Rule(reason) => Refusal::Entry { path, reason },
                Fault::Image(error) => Refusal::Image(error),
                Fault::Read(error) => Refusal::Tar(error.into()),
            })
    }

    fn account(&mut self, entry: &Entry) -> Result<(), ImageError> {
        let limits = self.limits;
        let link = match &entry.kind {
            Kind::Symlink(target) | Kind::HardLink(target) => target.len(),
            _ => 0,
        };
        let xattrs: usize = entry
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        self.entries += 1;
        self.metadata_bytes += (entry.path.len() + link + xattrs) as u64;
        if self.entries > limits.entries {
            return Err(ImageError::Limit {
                what: "entries",
                limit: limits.entries,
            });
        }
        if self.metadata_bytes > limits.metadata_bytes {
            let limit = limits.metadata_bytes;
            return Err(ImageError::Limit {
                what: "bytes of names and attributes",
                limit,
            });
        }
        if entry.path.len() > limits.path_bytes || link > limits.path_bytes {
            let limit = limits.path_bytes as u64;
            return Err(ImageError::Limit {
                what: "bytes in a path",
                limit,
            });
        }
        Ok(())
    }

    fn change(&mut self, path: &[u8], entry: Entry, content: &mut impl Read) -> Result<(), Fault> {
        let components = components(path)?;
        let Some((&name, parents)) = components.split_last() else {
            return self.describe_root(entry);
        };
        if components
            .iter()
            .any(|component| component.starts_with(AUFS) && *component != OPAQUE)
        {
            return Ok(());
        }
        if parents
            .iter()
            .any(|component| component.starts_with(WHITEOUT))
        {
            return Err(THROUGH_WHITEOUT);
        }
        if name == OPAQUE {
            if let Some(directory) = self.walk(parents, Missing::Stop)? {
                self.tree.sweep(directory, self.layer);
            }
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(Fault::Rule("the whiteout names no file"));
            }
            if let Some(directory) = self.walk(parents, Missing::Stop)? {
                self.tree.white_out(directory, hidden, self.layer);
            }
            return Ok(());
        }
        let parent = self
            .walk(parents, Missing::Create)?
            .ok_or(Fault::Rule("the directory it is in does not exist"))?;
        self.put(parent, name, entry, content)
    }

    /// An entry for `/` itself.
    fn describe_root(&mut self, entry: Entry) -> Result<(), Fault> {
        if entry.kind != Kind::Directory {
            return Err(Fault::Rule("the root can only be a directory"));
        }
        self.tree.get_mut(InodeId::ROOT).metadata = metadata(entry)?;
        Ok(())
    }

    /// Puts an entry in its place.
    fn put(
        &mut self,
        parent: InodeId,
        name: &[u8],
        mut entry: Entry,
        content: &mut impl Read,
    ) -> Result<(), Fault> {
        let layer = self.layer;
        let kind = std::mem::replace(&mut entry.kind, Kind::File);
        let node = match kind {
            Kind::HardLink(target) => return self.put_hard_link(parent, name, &target),
            Kind::Directory => {
                let existing = self.tree.child(parent, name).map(|child| child.inode);
                if let Some(existing) = existing.filter(|&id| self.tree.is_directory(id)) {
                    self.tree.get_mut(existing).metadata = metadata(entry)?;
                    self.tree.touch(parent, name, layer);
                    return Ok(());
                }
                Node::Directory(Directory::default())
            }
            Kind::File => Node::File(self.spool.add(content).map_err(|error| match error {
                SpoolError::Read(error) => Fault::Read(error),
                SpoolError::Write(error) => {
                    Fault::Image(ImageError::io("write", "the image's temporary file")(error))
                }
            })?),
            Kind::Symlink(target) => {
                entry.mode = 0o777; // all that Linux shows for any link
                Node::Symlink(target.into())
            }
            Kind::Device {
                character,
                major,
                minor,
            } => Node::Device {
                character,
                major,
                minor,
            },
            Kind::Fifo => Node::Fifo,
        };
        self.tree
            .insert(parent, name, layer, metadata(entry)?, node);
        Ok(())
    }

    /// A further name for something that is there already. What the entry says about owner, mode
    /// and the like is the same as, or less than, what the first one said.
    fn put_hard_link(&mut self, parent: InodeId, name: &[u8], target: &[u8]) -> Result<(), Fault> {
        const MISSING: Fault = Fault::Rule("the file it is a hard link to does not exist");

        let target = components(target)?;
        let (last, parents) = target.split_last().ok_or(MISSING)?;
        let directory = self.walk(parents, Missing::Stop)?.ok_or(MISSING)?;
        let inode = self.tree.child(directory, last).ok_or(MISSING)?.inode;
        if self.tree.is_directory(inode) {
            return Err(Fault::Rule("a hard link to a directory"));
        }
        self.tree.link(parent, name, self.layer, inode);
        Ok(())
    }

    /// Goes from the root through `components`, following symbolic links within the image. `None`
    /// if there is no such directory and none is to be made.
    fn walk(&mut self, components: &[&[u8]], missing: Missing) -> Result<Option<InodeId>, Fault> {
        let mut path = vec![InodeId::ROOT];
        let mut links = 0;
        let mut ahead: VecDeque<Box<[u8]>> = components.iter().map(|&c| c.into()).collect();
        while let Some(component) = ahead.pop_front() {
            self.steps += 1;
            let limit = self.limits.entries.saturating_mul(STEPS_PER_ENTRY);
            if self.steps > limit {
                return Err(Fault::Image(ImageError::Limit {
                    what: "path components",
                    limit,
                }));
            }
            let here = *path.last().unwrap_or(&InodeId::ROOT);
            match &*component {
                b"" | b"." => continue,
                b".." => {
                    if path.len() > 1 {
                        path.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let next = match self.tree.child(here, &component) {
                Some(child) => child.inode,
                None if missing == Missing::Stop => return Ok(None),
                None => self.make_directory(here, &component)?,
            };
            match &self.tree.get(next).node {
                Node::Directory(_) => path.push(next),
                Node::Symlink(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Fault::Rule("too many symbolic links on the way"));
                    }
                    if target.starts_with(b"/") {
                        path.truncate(1);
                    }
                    for part in target.rsplit(|&b| b == b'/') {
                        ahead.push_front(part.into());
                    }
                }
                _ if missing == Missing::Stop => return Ok(None),
                _ => return Err(Fault::Rule("a component of the path is not a directory")),
            }
            if path.len() > self.limits.depth {
                let limit = self.limits.depth as u64;
                return Err(Fault::Image(ImageError::Limit {
                    what: "nested directories",
                    limit,
                }));
            }
        }
        Ok(path.pop())
    }

    fn make_directory(&mut self, parent: InodeId, name: &[u8]) -> Result<InodeId, Fault> {
        if name.len() > MAX_NAME {
            return Err(Fault::Rule("a name is longer than 255 bytes"));
        }
        // The name may come from a link's target, which nobody has looked at yet.
        if name.starts_with(WHITEOUT) {
            return Err(THROUGH_WHITEOUT);
        }
        self.entries += 1;
        if self.entries > self.limits.entries {
            let limit = self.limits.entries;
            return Err(Fault::Image(ImageError::Limit {
                what: "entries",
                limit,
            }));
        }
        Ok(self.tree.insert_implied(parent, name, self.layer))
    }
}

const THROUGH_WHITEOUT: Fault = Fault::Rule("the path leads through a whiteout");

enum Fault {
    Rule(&'static str),
    Image(ImageError),
    Read(std::io::Error),
}

/// The parts of an entry's path. Absolute paths are taken from the image's root; `..` is refused,
/// for no builder has a reason to write it.
fn components(path: &[u8]) -> Result<Vec<&[u8]>, Fault> {
    let components: Vec<&[u8]> = path
        .split(|&b| b == b'/')
        .filter(|part| !matches!(*part, b"" | b"."))
        .collect();
    for component in &components {
        if *component == b".." {
            return Err(Fault::Rule("the path contains \"..\""));
        }
        if component.len() > MAX_NAME {
            return Err(Fault::Rule("a name is longer than 255 bytes"));
        }
        if component.contains(&0) {
            return Err(Fault::Rule("a name contains NUL"));
        }
    }
    Ok(components)
}

fn metadata(entry: Entry) -> Result<Metadata, Fault> {
    let Entry {
        mode,
        uid,
        gid,
        mtime,
        xattrs,
        ..
    } = entry;
    let mut kept = Xattrs::new();
    for (name, value) in xattrs {
        if !crate::erofs::can_hold_xattr(&name) || is_overlayfs(&name) {
            let name = String::from_utf8_lossy(&name).into_owned();
            tracing::debug!(name, "extended attribute left out");
            continue;
        }
        if name.len() > MAX_NAME || value.len() > usize::from(u16::MAX) {
            return Err(Fault::Rule("an extended attribute is too long"));
        }
        kept.insert(name, value);
    }
    Ok(Metadata {
        mode,
        uid,
        gid,
        mtime,
        xattrs: kept,
    })
}

/// The Machine's root is an overlay above this disk, which would take these for its own.
fn is_overlayfs(xattr: &[u8]) -> bool {
    xattr.starts_with(b"trusted.overlay.")
}

#[cfg(test)]
mod tests;
