//! Compressed layers: fetched ahead of who unpacks them, and kept for the next image that has them.
//!
//! [`Fetching`] downloads the layers of one image, [`AT_ONCE`] at a time and in order, into files of
//! [`Layers`]; [`Fetching::reader`] reads one while it grows. So layers are applied one after the
//! other as the format demands, while the next ones are on their way. Memory is a few network buffers
//! per download; disk is what the manifest declares, which [`crate::Limits::unpacked_bytes`] bounds,
//! and no more than [`AT_ONCE`] layers ahead of what is applied.
//!
//! A file under a layer's digest has been checked against it, and is checked again by whoever unpacks
//! it. Knowing a digest is not the right to read it: a kept layer is used for an image only after the
//! image's own registry has said that it would give it to us, and only for who has been given it before
//! or where that registry is [trusted](crate::proofs). Everybody else has it sent once more.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use crate::manifest::Descriptor;
use crate::proofs::{Asker, Proofs};
use crate::resolve::Blobs;
use crate::store::{remove_leftovers, temporary};
use crate::verify::Verified;
use crate::{Digest, ImageError};

/// Layers on their way at once, the one being applied included. More connections make one image hardly
/// faster, and registries begin to refuse.
const AT_ONCE: usize = 4;
/// Bytes moved at a time.
const BUFFER: usize = 128 << 10;

/// The layers that a store keeps: one file each, named after its digest.
#[derive(Debug)]
pub(crate) struct Layers {
    dir: PathBuf,
    pub(crate) proofs: Proofs,
    /// Who is fetching what, by server. Whoever waits for a fetch trusts its server anyway: a server
    /// that is slow on purpose holds up nobody else's images.
    busy: Mutex<HashSet<(String, Digest)>>,
    freed: Condvar,
}

impl Layers {
    /// The directory is made when it is first needed. What fetches that did not end left is removed.
    pub(crate) fn open(dir: PathBuf, proofs: Proofs) -> io::Result<Self> {
        match remove_leftovers(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(Self {
            dir,
            proofs,
            busy: Mutex::default(),
            freed: Condvar::new(),
        })
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.file_stem())
    }

    /// Removes a layer, if it is there. Who is reading it reads on.
    pub(crate) fn forget(&self, digest: &Digest) -> io::Result<()> {
        match fs::remove_file(self.path(digest)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn get(&self, descriptor: &Descriptor) -> Option<File> {
        let file = File::open(self.path(&descriptor.digest)).ok()?;
        let whole = file.metadata().is_ok_and(|m| m.len() == descriptor.size);
        // The time tells who collects garbage that it is of use.
        let _ = file.set_modified(SystemTime::now());
        whole.then_some(file)
    }

    /// Waits until nobody fetches this layer from this server, and is then the one who does.
    fn claim(&self, server: &str, digest: Digest) -> Claim<'_> {
        let key = (server.to_owned(), digest);
        let mut busy = lock(&self.busy);
        while !busy.insert(key.clone()) {
            busy = self
                .freed
                .wait(busy)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Claim { layers: self, key }
    }
}

struct Claim<'a> {
    layers: &'a Layers,
    key: (String, Digest),
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        lock(&self.layers.busy).remove(&self.key);
        self.layers.freed.notify_all();
    }
}

/// The downloads of one image. Dropping it ends them.
pub(crate) struct Fetching(Arc<Plan>);

struct Plan {
    layers: Arc<Layers>,
    blobs: Arc<dyn Blobs>,
    asker: Asker,
    wanted: Vec<(Descriptor, Growing)>,
    turn: Mutex<Turn>,
    changed: Condvar,
    abandoned: Arc<AtomicBool>,
}

/// Who does what next.
#[derive(Default)]
struct Turn {
    /// The layer to be fetched next.
    next: usize,
    /// Layers that are applied.
    applied: usize,
    ended: bool,
}

/// A layer's file, as far as it has come.
#[derive(Default)]
struct Growing {
    state: Mutex<Growth>,
    changed: Condvar,
}

#[derive(Default)]
struct Growth {
    file: Option<Arc<File>>,
    length: u64,
    ended: bool,
    /// Why it ended early, until somebody has read it.
    error: Option<ImageError>,
}

impl Fetching {
    /// Begins to fetch `wanted` for `asker`.
    pub(crate) fn start(
        layers: &Arc<Layers>,
        blobs: &Arc<dyn Blobs>,
        asker: &Asker,
        wanted: &[Descriptor],
        abandoned: &Arc<AtomicBool>,
    ) -> Result<Self, ImageError> {
        fs::create_dir_all(&layers.dir).map_err(ImageError::io("create", &layers.dir))?;
        let wanted = wanted.iter().map(|d| (d.clone(), Growing::default()));
        let fetching = Self(Arc::new(Plan {
            layers: Arc::clone(layers),
            blobs: Arc::clone(blobs),
            asker: asker.clone(),
            wanted: wanted.collect(),
            turn: Mutex::default(),
            changed: Condvar::new(),
            abandoned: Arc::clone(abandoned),
        }));
        for _ in 0..AT_ONCE.min(fetching.0.wanted.len()) {
            // Not joined: one that waits for a silent server need not hold up who has failed already.
            let plan = Arc::clone(&fetching.0);
            std::thread::Builder::new()
                .name("layer".to_owned())
                .spawn(move || plan.work())
                .map_err(ImageError::io("start a thread for", &layers.dir))?;
        }
        Ok(fetching)
    }

    /// The bytes of a layer, counted from 0. They are not to be trusted before they are verified.
    pub(crate) fn reader(&self, layer: usize) -> impl Read + use<> {
        Reader {
            plan: Arc::clone(&self.0),
            layer,
            offset: 0,
        }
    }

    /// So many layers are applied: later ones may come.
    pub(crate) fn applied(&self, layers: usize) {
        lock(&self.0.turn).applied = layers;
        self.0.changed.notify_all();
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        lock(&self.0.turn).ended = true;
        self.0.changed.notify_all();
    }
}

impl Plan {
    fn work(&self) {
        while let Some(layer) = self.take() {
            let (descriptor, growing) = &self.wanted[layer];
            // Whoever reads must not wait for ever, whatever happens here.
            let _end = EndOnDrop(growing);
            let what = format!("layer {} ({})", layer + 1, descriptor.digest);
            if let Err(error) = self.fetch(descriptor, growing, &what) {
                lock(&growing.state).error = Some(error);
            }
        }
    }

    fn take(&self) -> Option<usize> {
        let mut turn = lock(&self.turn);
        loop {
            if turn.ended || turn.next == self.wanted.len() {
                return None;
            }
            if turn.next < turn.applied + AT_ONCE {
                turn.next += 1;
                return Some(turn.next - 1);
            }
            turn = self
                .changed
                .wait(turn)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn fetch(
        &self,
        descriptor: &Descriptor,
        growing: &Growing,
        what: &str,
    ) -> Result<(), ImageError> {
        let _claim = self.layers.claim(&self.asker.server, descriptor.digest);
        let (proofs, claim) = (&self.layers.proofs, &self.asker.layer);
        if let Some(file) = self.layers.get(descriptor)
            && (self.asker.trusted || proofs.has(&descriptor.digest, claim))
            && self.blobs.may_read(descriptor)
        {
            proofs.note(&descriptor.digest, claim);
            tracing::debug!(layer = %descriptor.digest, "layer is here already");
            growing.begin(file);
            growing.grow(descriptor.size);
            return Ok(());
        }
        let dir = &self.layers.dir;
        let write = || ImageError::io("write a layer in", dir);
        let mut temporary = temporary(dir)?;
        growing.begin(temporary.reopen().map_err(write())?);
        let stream = self.blobs.blob(descriptor)?;
        let mut verified = Verified::new(stream, descriptor.digest, descriptor.size, what);
        let mut buffer = vec![0; BUFFER];
        loop {
            if lock(&self.turn).ended || self.abandoned.load(Ordering::Relaxed) {
                return Err(ImageError::Cancelled);
            }
            let read = match verified.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(ImageError::from_read(error, what)),
            };
            temporary.write_all(&buffer[..read]).map_err(write())?;
            growing.grow(read as u64);
        }
        verified.finish()?;
        // Not synced: what a power cut spoils is found out when it is read, and fetched again.
        temporary
            .persist(self.layers.path(&descriptor.digest))
            .map_err(|error| write()(error.error))?;
        proofs.note(&descriptor.digest, claim);
        Ok(())
    }
}

impl Growing {
    fn begin(&self, file: File) {
        lock(&self.state).file = Some(Arc::new(file));
    }

    fn grow(&self, bytes: u64) {
        lock(&self.state).length += bytes;
        self.changed.notify_all();
    }
}

struct EndOnDrop<'a>(&'a Growing);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).ended = true;
        self.0.changed.notify_all();
    }
}

struct Reader {
    plan: Arc<Plan>,
    layer: usize,
    offset: u64,
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let growing = &self.plan.wanted[self.layer].1;
        let mut state = lock(&growing.state);
        while state.length == self.offset && !state.ended {
            state = growing
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let left = state.length - self.offset;
        if left == 0 {
            return match state.error.take() {
                Some(error) => Err(io::Error::other(error)),
                None => Ok(0),
            };
        }
        let Some(file) = state.file.clone() else {
            return Err(io::Error::other("a layer without a file"));
        };
        drop(state);
        let wanted = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        let read = file.read_at(&mut buffer[..wanted], self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
