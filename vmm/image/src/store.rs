//! The directory where converted images are kept.
//!
//! An image is two files, named after its manifest's digest: `sha256-<hex>.erofs`, the disk, and
//! `sha256-<hex>.json`, how to run it. Both are written under a temporary name, synced and renamed;
//! the description goes last, so an image that has one is whole. Conversion is deterministic:
//! whoever else writes the same image, in this process or another, writes the same bytes.
//!
//! `sha256-<hex>.alias` holds the digest of the manifest that an index of that digest leads to, so that
//! an image named by its index is found without asking anybody. `layers/` holds compressed layers of
//! images from registries, and `proofs/` who was given which of all these. A description's modification time is when the image was last handed out.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::convert::{self, Observer};
use crate::gc::{Round, digest_of};
use crate::layers::Layers;
use crate::proofs::{Asker, Proofs};
use crate::resolve::{self, Resolved};
use crate::{Digest, ImageConfig, ImageError, Limits, Progress, Source};

const TEMPORARY: &str = ".tmp-";
/// A description holds an image's configuration, which [`Limits::document_bytes`] bounds at 4 MiB;
/// JSON escapes may make it longer.
const MAX_DESCRIPTION: u64 = 64 << 20;

/// An image that is ready to be attached to a Machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The digest of the image's manifest (for linux/amd64).
    pub digest: Digest,
    /// The read-only EROFS disk.
    pub disk: PathBuf,
    /// How to run it.
    pub config: ImageConfig,
    /// The size of the disk in bytes.
    pub size: u64,
    /// As long as somebody holds it, the image is not collected.
    pub lease: Lease,
}

/// Keeps an image from being collected. All are equal: it says nothing of the image.
#[derive(Debug, Clone, Default)]
pub struct Lease(Arc<()>);

impl PartialEq for Lease {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Lease {}

/// Converted images in one directory. Clones share it.
#[derive(Debug, Clone)]
pub struct ImageStore {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) dir: PathBuf,
    limits: Limits,
    pub(crate) layers: Arc<Layers>,
    leases: Mutex<Leases>,
    /// One lock per digest that is being converted, so that one conversion serves all who ask; by server, so
    /// that one which is slow on purpose holds up nobody else's images.
    turns: Mutex<HashMap<Turn, Weak<tokio::sync::Mutex<()>>>>,
}

/// An image, and the server that it comes from if there is one.
type Turn = (Option<String>, Digest);

/// Who has which image, and since when nobody has.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    /// Counts images handed out.
    clock: u64,
    given: HashMap<Digest, (u64, Weak<()>)>,
}

impl Leases {
    fn take(&mut self, digest: Digest) -> Lease {
        self.clock += 1;
        let known = self.given.get(&digest).and_then(|(_, held)| held.upgrade());
        let lease = known.map(Lease).unwrap_or_default();
        self.given
            .insert(digest, (self.clock, Arc::downgrade(&lease.0)));
        lease
    }

    /// Whether somebody has the image, or was given it after `round`.
    pub(crate) fn is_taken(&self, digest: &Digest, round: Round) -> bool {
        self.given
            .get(digest)
            .is_some_and(|(at, held)| *at > round.0 || held.strong_count() > 0)
    }

    pub(crate) fn forget(&mut self, digest: &Digest) {
        self.given.remove(digest);
    }
}

/// What `<digest>.json` holds.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    digest: Digest,
    size: u64,
    config: ImageConfig,
    /// Its layers, in no particular order; older descriptions do not say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    layers: Vec<Digest>,
}

impl ImageStore {
    /// Opens the store in `dir`, makes the directory if need be, and removes what conversions that
    /// did not end have left there.
    pub fn open(dir: impl Into<PathBuf>, limits: Limits) -> Result<Self, ImageError> {
        let dir = dir.into();
        fs::create_dir_all(&dir).map_err(ImageError::io("create", &dir))?;
        remove_leftovers(&dir).map_err(ImageError::io("tidy", &dir))?;
        let proofs = Proofs::new(dir.join("proofs"));
        let layers =
            Layers::open(dir.join("layers"), proofs).map_err(ImageError::io("tidy", &dir))?;
        let inner = Inner {
            dir,
            limits,
            layers: Arc::new(layers),
            leases: Mutex::default(),
            turns: Mutex::default(),
        };
        inner
            .remove_halves()
            .map_err(ImageError::io("tidy", &inner.dir))?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The image of `source`: found here, or fetched and converted.
    ///
    /// `progress` is called from another thread, and only if there is something to convert that
    /// nobody else is converting already. Dropping the future abandons the conversion.
    pub async fn ensure(
        &self,
        source: &Source,
        progress: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<Image, ImageError> {
        if let Some(digest) = self.given(source)
            && let Some(image) = self.get(&digest)?
        {
            return Ok(image);
        }
        let abandoned = SetOnDrop::default();
        let observer = Observer::new(progress, Arc::clone(&abandoned.0));

        let resolved = {
            let (source, limits) = (source.clone(), self.inner.limits.clone());
            blocking(move || resolve::resolve(&source, &limits)).await?
        };
        let turn = self.inner.turn(&resolved);
        let _turn = turn.lock().await;
        let inner = Arc::clone(&self.inner);
        let kept = self.get(&resolved.digest)?;
        blocking(move || {
            let image = match kept {
                Some(image) => {
                    // That its registry knows the manifest says nothing of who may have the rest.
                    if !inner.is_proven(&resolved) {
                        let layers = &inner.layers;
                        convert::prove(&resolved, &inner.limits, layers, &observer)?;
                    }
                    image
                }
                None => inner.convert(&resolved, &observer)?,
            };
            inner.set_alias(&resolved)?;
            inner.note_proven(&resolved);
            Ok(image)
        })
        .await
    }

    /// The manifest that a source which is pinned to a digest stands for, if it was given to who asks for it: an
    /// image that is here is handed out then, and nobody is asked.
    #[must_use]
    pub fn given(&self, source: &Source) -> Option<Digest> {
        let Source::Registry { reference, options } = source else {
            return None;
        };
        let pinned = reference.digest()?;
        let claim = Asker::new(reference, options).image;
        let proven = self.inner.layers.proofs.has(&pinned, &claim);
        proven.then(|| self.inner.resolve_alias(&pinned).unwrap_or(pinned))
    }

    /// The image whose manifest has this digest, if it has been converted. Who may have it is the caller's to know.
    pub fn get(&self, digest: &Digest) -> Result<Option<Image>, ImageError> {
        // Before it is looked for: from here on it is not collected.
        let lease = self.inner.leases().take(*digest);
        let found = self.inner.get(digest)?;
        if found.is_some() {
            self.inner.touch(digest);
        }
        Ok(found.map(|image| Image { lease, ..image }))
    }

    /// All converted images, in the order of their digests.
    pub fn list(&self) -> Result<Vec<Image>, ImageError> {
        self.inner.list()
    }
}

impl Inner {
    pub(crate) fn list(&self) -> Result<Vec<Image>, ImageError> {
        let dir = &self.dir;
        let mut images = Vec::new();
        for entry in fs::read_dir(dir).map_err(ImageError::io("read", dir))? {
            let name = entry.map_err(ImageError::io("read", dir))?.file_name();
            if let Some(digest) = name.to_str().and_then(|name| digest_of(name, ".json")) {
                images.extend(self.get(&digest)?);
            }
        }
        images.sort_by_key(|image| image.digest);
        Ok(images)
    }

    pub(crate) fn leases(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn round(&self) -> Round {
        Round(self.leases().clock)
    }

    pub(crate) fn layers_of(&self, digest: &Digest) -> Vec<Digest> {
        let text = fs::read(self.description(digest)).unwrap_or_default();
        serde_json::from_slice::<Description>(&text)
            .map_or_else(|_| Vec::new(), |found| found.layers)
    }

    /// Notes that an image was of use. One that is not noted goes a little early.
    fn touch(&self, digest: &Digest) {
        let touched = File::open(self.description(digest))
            .and_then(|file| file.set_modified(SystemTime::now()));
        if let Err(error) = touched {
            tracing::debug!(%digest, %error, "the use of an image cannot be noted");
        }
    }

    /// The image that an index leads to, if it is here.
    pub(crate) fn resolve_alias(&self, index: &Digest) -> Option<Digest> {
        let mut text = String::new();
        let file = File::open(self.alias(index)).ok()?;
        file.take(128).read_to_string(&mut text).ok()?;
        let digest = text.trim().parse().ok()?;
        self.description(&digest).exists().then_some(digest)
    }

    fn set_alias(&self, resolved: &Resolved) -> Result<(), ImageError> {
        if resolved.named == resolved.digest
            || self.resolve_alias(&resolved.named) == Some(resolved.digest)
        {
            return Ok(());
        }
        let mut temporary = temporary(&self.dir)?;
        writeln!(temporary, "{}", resolved.digest)
            .map_err(ImageError::io("write", temporary.path()))?;
        self.publish(temporary, &self.alias(&resolved.named))?;
        Ok(())
    }

    pub(crate) fn alias(&self, index: &Digest) -> PathBuf {
        self.dir.join(format!("{}.alias", index.file_stem()))
    }

    pub(crate) fn disk(&self, digest: &Digest) -> PathBuf {
        self.dir.join(format!("{}.erofs", digest.file_stem()))
    }

    pub(crate) fn description(&self, digest: &Digest) -> PathBuf {
        self.dir.join(format!("{}.json", digest.file_stem()))
    }

    fn get(&self, digest: &Digest) -> Result<Option<Image>, ImageError> {
        let path = self.description(digest);
        let mut text = Vec::new();
        match File::open(&path) {
            Ok(file) => file
                .take(MAX_DESCRIPTION)
                .read_to_end(&mut text)
                .map_err(ImageError::io("read", &path))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(ImageError::io("open", &path)(error)),
        };
        let disk = self.disk(digest);
        let size = match fs::metadata(&disk) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(ImageError::io("inspect", &disk)(error)),
        };
        match serde_json::from_slice::<Description>(&text) {
            Ok(found) if found.digest == *digest && found.size == size => Ok(Some(Image {
                digest: *digest,
                disk,
                config: found.config,
                size,
                lease: Lease::default(), // none, yet
            })),
            outcome => {
                let error = outcome.err().map(tracing::field::display);
                tracing::warn!(path = %path.display(), error, "image is damaged and will be converted again");
                Ok(None)
            }
        }
    }

    /// Whether who asks has been given the image before, by this repository.
    fn is_proven(&self, resolved: &Resolved) -> bool {
        let Some(asker) = &resolved.asker else {
            return true;
        };
        self.layers.proofs.has(&resolved.digest, &asker.image)
    }

    fn note_proven(&self, resolved: &Resolved) {
        if let Some(asker) = &resolved.asker {
            for digest in [&resolved.digest, &resolved.named] {
                self.layers.proofs.note(digest, &asker.image);
            }
        }
    }

    fn turn(&self, resolved: &Resolved) -> Arc<tokio::sync::Mutex<()>> {
        let server = resolved.asker.as_ref().map(|asker| asker.server.clone());
        let key = (server, resolved.digest);
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = turns.get(&key).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::default();
        turns.insert(key, Arc::downgrade(&turn));
        turn
    }

    fn convert(&self, resolved: &Resolved, observer: &Observer) -> Result<Image, ImageError> {
        let started = std::time::Instant::now();
        let lease = self.leases().take(resolved.digest);
        let mut temporary = temporary(&self.dir)?;
        let config = convert::convert(
            resolved,
            &self.limits,
            &self.dir,
            &self.layers,
            temporary.as_file_mut(),
            observer,
        )?;
        let digest = resolved.digest;
        let disk = self.disk(&digest);
        // Whoever removes halves of images waits until this is a whole one.
        let dir = File::open(&self.dir).map_err(ImageError::io("open", &self.dir))?;
        dir.lock_shared()
            .map_err(ImageError::io("lock", &self.dir))?;
        let size = self.publish(temporary, &disk)?;

        let description = Description {
            digest,
            size,
            config,
            layers: resolved.manifest.layers.iter().map(|l| l.digest).collect(),
        };
        let mut temporary = crate::store::temporary(&self.dir)?;
        serde_json::to_writer_pretty(&mut temporary, &description)
            .map_err(io::Error::from)
            .and_then(|()| temporary.write_all(b"\n"))
            .map_err(ImageError::io("write", temporary.path()))?;
        self.publish(temporary, &self.description(&digest))?;
        dir.sync_all().map_err(ImageError::io("sync", &self.dir))?;
        tracing::info!(%digest, size, seconds = started.elapsed().as_secs_f64(), "image converted");
        Ok(Image {
            digest,
            disk,
            config: description.config,
            size,
            lease,
        })
    }

    fn publish(&self, file: NamedTempFile, path: &Path) -> Result<u64, ImageError> {
        file.as_file()
            .sync_all()
            .map_err(ImageError::io("sync", path))?;
        let file = file
            .persist(path)
            .map_err(|error| ImageError::io("rename to", path)(error.error))?;
        Ok(file
            .metadata()
            .map_err(ImageError::io("inspect", path))?
            .len())
    }
}

/// A new file that is ours while it is locked: see [`remove_leftovers`].
pub(crate) fn temporary(dir: &Path) -> Result<NamedTempFile, ImageError> {
    let create = || -> io::Result<NamedTempFile> {
        loop {
            let file = tempfile::Builder::new()
                .prefix(TEMPORARY)
                .tempfile_in(dir)?;
            file.as_file().lock()?;
            // Somebody who tidies may have found it before it was locked.
            if file.as_file().metadata()?.nlink() > 0 {
                return Ok(file);
            }
        }
    };
    create().map_err(ImageError::io("create a file in", dir))
}

/// Removes temporary files that no living process holds the lock of.
pub(crate) fn remove_leftovers(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if !entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(TEMPORARY.as_bytes())
        {
            continue;
        }
        let removed = File::open(entry.path()).and_then(|file| match file.try_lock() {
            Ok(()) => fs::remove_file(entry.path()),
            Err(fs::TryLockError::WouldBlock) => Ok(()),
            Err(fs::TryLockError::Error(error)) => Err(error),
        });
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Tells the blocking thread that nobody waits for its result any more.
#[derive(Default)]
struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(ImageError::Cancelled), // the runtime is shutting down
        },
    }
}
