//! Layers for tests, written with the `tar` crate. Names go into headers as they are, so that a
//! layer can hold what no honest tool would write.

#![allow(dead_code)] // each test module that includes this uses a part of it

use tar::{Builder, EntryType, Header};

/// A layer that is being written.
pub struct Layer {
    builder: Builder<Vec<u8>>,
    mode: u32,
    owner: (u64, u64),
    mtime: u64,
}

impl Default for Layer {
    fn default() -> Self {
        Self {
            builder: Builder::new(Vec::new()),
            mode: 0o644,
            owner: (0, 0),
            mtime: 1_700_000_000,
        }
    }
}

impl Layer {
    pub fn new() -> Self {
        Self::default()
    }

    /// The mode of entries from here on.
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// The owner of entries from here on.
    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        self.owner = (uid, gid);
        self
    }

    /// The modification time of entries from here on.
    pub fn mtime(mut self, mtime: u64) -> Self {
        self.mtime = mtime;
        self
    }

    /// PAX records for the next entry.
    pub fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.builder
            .append_pax_extensions(records.iter().copied())
            .unwrap();
        self
    }

    pub fn dir(self, path: &str) -> Self {
        self.entry(EntryType::Directory, path, "", b"", |_| ())
    }

    pub fn file(self, path: &str, content: impl AsRef<[u8]>) -> Self {
        self.entry(EntryType::Regular, path, "", content.as_ref(), |_| ())
    }

    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, path, target, b"", |_| ())
    }

    pub fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Link, path, target, b"", |_| ())
    }

    pub fn fifo(self, path: &str) -> Self {
        self.entry(EntryType::Fifo, path, "", b"", |_| ())
    }

    pub fn device(self, path: &str, character: bool, major: u32, minor: u32) -> Self {
        let kind = if character {
            EntryType::Char
        } else {
            EntryType::Block
        };
        self.entry(kind, path, "", b"", |header| {
            header.set_device_major(major).unwrap();
            header.set_device_minor(minor).unwrap();
        })
    }

    /// An entry of any type, its header given a last touch before its checksum is made.
    pub fn entry(
        mut self,
        kind: EntryType,
        path: &str,
        target: &str,
        content: &[u8],
        touch: impl FnOnce(&mut Header),
    ) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(self.mode);
        header.set_uid(self.owner.0);
        header.set_gid(self.owner.1);
        header.set_mtime(self.mtime);
        header.set_size(content.len() as u64);
        for (kind, name) in [(b'L', path), (b'K', target)] {
            if name.len() > 100 {
                self.long_name(kind, name);
            }
        }
        let fill = |field: &mut [u8], text: &str| {
            let length = text.len().min(field.len());
            field[..length].copy_from_slice(&text.as_bytes()[..length]);
        };
        fill(&mut header.as_old_mut().name, path);
        fill(&mut header.as_old_mut().linkname, target);
        touch(&mut header);
        header.set_cksum();
        self.builder.append(&header, content).unwrap();
        self
    }

    fn long_name(&mut self, kind: u8, name: &str) {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..13].copy_from_slice(b"././@LongLink");
        header.set_entry_type(EntryType::new(kind));
        header.set_size(name.len() as u64 + 1);
        header.set_cksum();
        let content = [name.as_bytes(), b"\0"].concat();
        self.builder.append(&header, &*content).unwrap();
    }

    /// The archive.
    pub fn bytes(self) -> Vec<u8> {
        self.builder.into_inner().unwrap()
    }
}
