//! Compares file trees.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// What can be known of a file, as text, so that two trees that differ show how.
pub type Listing = BTreeMap<String, String>;

/// Describes every file below `root`, and `root` itself as `.`. Left out is what `fsck.erofs` 1.5 does
/// not extract, though it is there: hard links come out as copies, and set-user-id is lost when the
/// owner is set after the mode. See [`super::dump`] and
/// [`super::mode`].
pub fn list(root: &Path) -> Listing {
    let mut listing = Listing::new();
    let mut ahead = vec![root.to_owned()];
    while let Some(path) = ahead.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let relative = path.strip_prefix(root).unwrap();
        let name = String::from_utf8_lossy(relative.as_os_str().as_bytes()).into_owned();

        let kind = metadata.file_type();
        let what = if kind.is_dir() {
            ahead.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
            "directory".to_owned()
        } else if kind.is_symlink() {
            format!("-> {}", fs::read_link(&path).unwrap().display())
        } else if kind.is_file() {
            format!("file {}", tern_image::Digest::of(&fs::read(&path).unwrap()))
        } else if kind.is_fifo() {
            "fifo".to_owned()
        } else {
            let class = if kind.is_char_device() {
                "character"
            } else {
                "block"
            };
            let (major, minor) = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
            format!("{class} {major}:{minor}")
        };
        let mode_mask = if kind.is_dir() { 0o7777 } else { 0o1777 };
        let line = format!(
            "{what} mode={:o} owner={}:{} mtime={}.{:09}",
            metadata.mode() & mode_mask,
            metadata.uid(),
            metadata.gid(),
            metadata.mtime(),
            metadata.mtime_nsec(),
        );
        listing.insert(
            if name.is_empty() {
                ".".to_owned()
            } else {
                name
            },
            line,
        );
    }
    listing
}

/// Panics with the first differences, if there are any.
pub fn assert_same(found: &Listing, expected: &Listing) {
    let names: std::collections::BTreeSet<&String> = found.keys().chain(expected.keys()).collect();
    let differences: Vec<String> = names
        .into_iter()
        .filter(|name| found.get(*name) != expected.get(*name))
        .map(|name| {
            format!(
                "{name}\n  found:    {:?}\n  expected: {:?}",
                found.get(name),
                expected.get(name)
            )
        })
        .collect();
    let shown = &differences[..differences.len().min(10)];
    assert!(
        differences.is_empty(),
        "{} differences:\n{}",
        differences.len(),
        shown.join("\n")
    );
}
