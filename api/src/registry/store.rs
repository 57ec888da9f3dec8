//! The registry's files.
//!
//! ```text
//! blobs/sha256/<hex>                        content, once
//! repositories/<app>/blobs/<hex>            empty: the app was given this blob
//! repositories/<app>/manifests/<hex>        holds the manifest's media type
//! repositories/<app>/tags/<tag>             holds the manifest's digest
//! uploads/<app>.<id>                        begun, not finished; removed at start
//! ```
//!
//! Names are checked before they become paths: apps are DNS labels, digests are hexadecimal, tags are of
//! the specification's alphabet and never begin with a dot.

use std::collections::HashSet;
use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use sha2::{Digest as _, Sha256};
use tern_catalog::AppName;

use super::REGISTRY_NAME;
use crate::error::ApiError;

/// A `sha256:` digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Digest(String);

/// The registry of one API.
#[derive(Debug)]
pub struct Registry {
    pub(super) root: PathBuf,
    /// Uploads that a call is at: what is being hashed must not grow.
    pub(super) busy: Mutex<HashSet<PathBuf>>,
    /// Held for writing while something is removed, for reading while something is found there and
    /// touched, so that nothing is removed that a client has just been told of.
    pub(super) gate: RwLock<()>,
}

/// The only call that is at an upload, until dropped.
#[derive(Debug)]
pub struct Upload {
    registry: Arc<Registry>,
    /// Where it collects.
    pub path: PathBuf,
}

impl Registry {
    /// Opens it, or makes it. Uploads that a stop cut off are removed.
    pub fn open(root: &Path) -> std::io::Result<Self> {
        let uploads = root.join("uploads");
        if uploads.exists() {
            std::fs::remove_dir_all(&uploads)?;
        }
        for dir in [
            uploads,
            root.join("blobs/sha256"),
            root.join("repositories"),
        ] {
            std::fs::create_dir_all(dir)?;
        }
        Ok(Self {
            root: root.to_owned(),
            busy: Mutex::default(),
            gate: RwLock::default(),
        })
    }

    /// Where a blob's content is.
    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    /// Takes an app's upload for one call. `None` where the id is none, or another call is at it.
    pub fn upload(self: &Arc<Self>, app: &AppName, id: &str) -> Option<Upload> {
        let good = id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit());
        let path = self.root.join("uploads").join(format!("{app}.{id}"));
        let taken = good && self.busy.lock().insert(path.clone());
        taken.then(|| Upload {
            registry: Arc::clone(self),
            path,
        })
    }

    /// Forgets an app's images. Blobs that others have too stay.
    pub fn forget(&self, app: &AppName) -> std::io::Result<()> {
        match std::fs::remove_dir_all(self.of(app)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// Whether the app was given this blob. If so, it stays for a while, whoever names it or not.
    pub fn has_blob(&self, app: &AppName, digest: &Digest) -> bool {
        let _stays = self.gate.read();
        let listed = self.of(app).join("blobs").join(digest.hex());
        let blob = self.blob(digest);
        let found = listed.exists() && blob.exists();
        if found {
            touch(&listed);
            touch(&blob);
        }
        found
    }

    /// Gives the app a blob whose content is there.
    pub fn link_blob(&self, app: &AppName, digest: &Digest) -> std::io::Result<()> {
        write(&self.of(app).join("blobs").join(digest.hex()), b"")
    }

    /// Makes a finished upload the blob of this digest. Its content has been checked.
    pub fn finish(&self, upload: &Path, app: &AppName, digest: &Digest) -> std::io::Result<()> {
        let _stays = self.gate.read();
        if self.blob(digest).exists() {
            touch(&self.blob(digest));
            // The same content: what others may be reading is left alone.
            std::fs::remove_file(upload)?;
        } else {
            std::fs::File::open(upload)?.sync_all()?;
            std::fs::rename(upload, self.blob(digest))?;
            sync_parent(&self.blob(digest))?;
        }
        self.link_blob(app, digest)
    }

    /// Keeps a manifest, under a tag if there is one.
    pub fn put_manifest(
        &self,
        app: &AppName,
        tag: Option<&str>,
        media_type: &str,
        content: &[u8],
    ) -> std::io::Result<Digest> {
        let _stays = self.gate.read();
        let digest = Digest::of(content);
        write(&self.blob(&digest), content)?;
        write(
            &self.of(app).join("manifests").join(digest.hex()),
            media_type.as_bytes(),
        )?;
        if let Some(tag) = tag {
            write(
                &self.of(app).join("tags").join(tag),
                digest.to_string().as_bytes(),
            )?;
        }
        Ok(digest)
    }

    /// A manifest's digest and media type, by tag or digest.
    pub fn find_manifest(
        &self,
        app: &AppName,
        reference: &str,
    ) -> std::io::Result<Option<(Digest, String)>> {
        let digest = match reference.parse::<Digest>() {
            Ok(digest) => digest,
            Err(_) if is_tag(reference) => {
                match read(&self.of(app).join("tags").join(reference))?.and_then(|d| d.parse().ok())
                {
                    Some(digest) => digest,
                    None => return Ok(None),
                }
            }
            Err(_) => return Ok(None),
        };
        let _stays = self.gate.read();
        let listed = self.of(app).join("manifests").join(digest.hex());
        let media_type = read(&listed)?;
        if media_type.is_some() {
            touch(&listed);
        }
        Ok(media_type.map(|media_type| (digest, media_type)))
    }

    /// An app's tags, in order.
    pub fn tags(&self, app: &AppName) -> std::io::Result<Vec<String>> {
        let dir = match std::fs::read_dir(self.of(app).join("tags")) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut tags: Vec<String> = dir
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|t| is_tag(t))
            .collect();
        tags.sort();
        Ok(tags)
    }

    /// An image reference with its digest, where it is of this registry; others stay as they are.
    /// `may` says whether the caller may use that app's images.
    pub fn pin(
        &self,
        image: &str,
        may: impl FnOnce(&str) -> Result<(), ApiError>,
    ) -> Result<String, ApiError> {
        let Some(rest) = image
            .strip_prefix(REGISTRY_NAME)
            .and_then(|r| r.strip_prefix('/'))
        else {
            return if image.is_empty() {
                Err(ApiError::invalid("config.image is empty"))
            } else {
                Ok(image.to_owned())
            };
        };
        let (name, digest) = match rest.split_once('@') {
            Some((name, digest)) => (name, Some(digest)),
            None => (rest, None),
        };
        let (name, tag) = match name.split_once(':') {
            Some((name, tag)) => (name, Some(tag)),
            None => (name, None),
        };
        let reference = digest.or(tag).unwrap_or("latest");
        may(name)?;
        let app: AppName = name.parse()?;
        let found = self.find_manifest(&app, reference).map_err(|e| {
            tracing::error!(error = %e, "the registry cannot be read");
            ApiError::invalid("the registry cannot be read")
        })?;
        let (digest, _) = found.ok_or_else(|| {
            ApiError::invalid(format!(
                "image {image} is not in the registry; push it first, as `tern deploy` does"
            ))
        })?;
        // The tag stays, for people and for clients that look at what they have asked for; the digest is what runs.
        match tag {
            None => Ok(format!("{REGISTRY_NAME}/{app}@{digest}")),
            Some(tag) if is_tag(tag) => Ok(format!("{REGISTRY_NAME}/{app}:{tag}@{digest}")),
            Some(tag) => Err(ApiError::invalid(format!(
                "image {image}: {tag:?} is no tag"
            ))),
        }
    }

    fn of(&self, app: &AppName) -> PathBuf {
        self.root.join("repositories").join(app.as_str())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.registry.busy.lock().remove(&self.path);
    }
}

/// A tag by the specification's grammar.
pub fn is_tag(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    (1..=128).contains(&text.len()) && text.bytes().all(inner) && !text.starts_with(['.', '-'])
}

impl Digest {
    /// The digest of this content.
    pub fn of(content: &[u8]) -> Self {
        Self(hex::encode(Sha256::digest(content)))
    }

    /// From a finished hash.
    pub fn from_hash(hash: Sha256) -> Self {
        Self(hex::encode(hash.finalize()))
    }

    /// The digits alone.
    pub(super) fn hex(&self) -> &str {
        &self.0
    }
}

impl FromStr for Digest {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let hex = text.strip_prefix("sha256:").ok_or(())?;
        let good = hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if good {
            Ok(Self(hex.to_owned()))
        } else {
            Err(())
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

/// Writes a small file, whole or not at all, to stay.
fn write(path: &Path, content: &[u8]) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.{:016x}", rand::random::<u64>()));
    let written = std::fs::File::create_new(&temporary).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    });
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written?;
    sync_parent(path)
}

/// Notes that something is of use. What cannot be noted is removed a little early.
fn touch(path: &Path) {
    let touched =
        std::fs::File::open(path).and_then(|file| file.set_modified(std::time::SystemTime::now()));
    if let Err(error) = touched {
        tracing::debug!(path = %path.display(), %error, "its use cannot be noted");
    }
}

pub(super) fn sync_parent(path: &Path) -> std::io::Result<()> {
    path.parent()
        .map_or(Ok(()), |parent| std::fs::File::open(parent)?.sync_all())
}

fn read(path: &Path) -> std::io::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}
