//! What a store gives up when it holds too much.
//!
//! Candidates are images that nobody refers to and cached layers. Three things protect an image:
//! the caller's list of references; a lease, which every [`Image`](crate::Image) that somebody holds carries; and the
//! [`Round`], which spares whatever was handed out since before the references were looked up, so that
//! nothing falls between "handed out" and "referred to". [`Budget::min_age`] does the same for other
//! processes that use the store.
//!
//! Order: least recently used first. Layers of images that are referred to go last: the images stand
//! without them, but the next version of an app will want them.
//!
//! An image goes description first; without one it does not count as there. What a crash leaves in
//! between is removed when the store is opened.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::time::{Duration, SystemTime};

use crate::store::Inner;
use crate::{Digest, ImageError, ImageStore};

/// How much a store may keep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budget {
    /// Bytes of disks, descriptions and layers.
    pub bytes: u64,
    /// What was used within this time stays in any case.
    pub min_age: Duration,
}

/// A moment of a store's life: see [`ImageStore::round`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Round(pub(crate) u64);

/// What a collection did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Collected {
    /// The images removed.
    pub images: Vec<Digest>,
    /// The cached layers removed.
    pub layers: Vec<Digest>,
    /// Bytes freed.
    pub freed: u64,
    /// Bytes that are still there.
    pub kept: u64,
}

impl ImageStore {
    /// To be called before the references for [`ImageStore::collect`] are looked up.
    #[must_use]
    pub fn round(&self) -> Round {
        self.inner.round()
    }

    /// Removes images and layers until the store is within its budget, or nothing is left that may go.
    /// `in_use` holds the digests of images that must stay. Blocks.
    pub fn collect(
        &self,
        round: Round,
        in_use: &HashSet<Digest>,
        budget: &Budget,
    ) -> Result<Collected, ImageError> {
        let inner = &*self.inner;
        let items = inner.items(in_use)?;
        let mut done = Collected {
            kept: items.iter().map(|item| item.size).sum(),
            ..Collected::default()
        };
        for item in order(items, SystemTime::now(), budget.min_age) {
            if done.kept <= budget.bytes {
                break;
            }
            let removed = match item.kind {
                Kind::Image => inner.remove_image(&item.digest, round)?,
                Kind::Layer { .. } => {
                    let path = inner.layers.path(&item.digest);
                    inner
                        .layers
                        .forget(&item.digest)
                        .map_err(ImageError::io("remove", path))?;
                    true
                }
            };
            if removed {
                done.freed += item.size;
                done.kept -= item.size;
                match item.kind {
                    Kind::Image => done.images.push(item.digest),
                    Kind::Layer { .. } => done.layers.push(item.digest),
                }
            }
        }
        if !done.images.is_empty() || !done.layers.is_empty() {
            // Names of indexes that led to them, and who was given them.
            inner
                .remove_halves()
                .map_err(ImageError::io("tidy", &inner.dir))?;
        }
        Ok(done)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Image,
    Layer {
        /// Whether an image has it that is referred to.
        needed: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Item {
    kind: Kind,
    digest: Digest,
    size: u64,
    used: SystemTime,
    /// Referred to: counted, but never removed.
    stays: bool,
}

/// What may go, the first to go first.
fn order(items: Vec<Item>, now: SystemTime, min_age: Duration) -> Vec<Item> {
    let mut going: Vec<Item> = items
        .into_iter()
        // What was used in the future was used just now: somebody has set the clock.
        .filter(|item| {
            !item.stays
                && now
                    .duration_since(item.used)
                    .is_ok_and(|age| age >= min_age)
        })
        .collect();
    going.sort_by_key(|item| {
        let last = item.kind == Kind::Layer { needed: true };
        (last, item.used, item.kind, item.digest)
    });
    going
}

impl Inner {
    fn items(&self, in_use: &HashSet<Digest>) -> Result<Vec<Item>, ImageError> {
        let mut items = Vec::new();
        let mut needed = HashSet::new();
        for image in self.list()? {
            let description = self.description(&image.digest);
            let Some((own, used)) = inspect(&description)? else {
                continue;
            };
            let stays = in_use.contains(&image.digest);
            if stays {
                needed.extend(self.layers_of(&image.digest));
            }
            items.push(Item {
                kind: Kind::Image,
                digest: image.digest,
                size: image.size + own,
                used,
                stays,
            });
        }
        let dir = self.layers.dir();
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(items),
            other => other.map_err(ImageError::io("read", dir))?,
        };
        for entry in entries {
            let name = entry.map_err(ImageError::io("read", dir))?.file_name();
            let Some(digest) = name.to_str().and_then(|name| digest_of(name, "")) else {
                continue;
            };
            if let Some((size, used)) = inspect(&dir.join(&name))? {
                items.push(Item {
                    kind: Kind::Layer {
                        needed: needed.contains(&digest),
                    },
                    digest,
                    size,
                    used,
                    stays: false,
                });
            }
        }
        Ok(items)
    }

    /// Removes an image unless somebody has it or has had it since `round`.
    fn remove_image(&self, digest: &Digest, round: Round) -> Result<bool, ImageError> {
        // Nobody gets a lease while this is held.
        let mut leases = self.leases();
        if leases.is_taken(digest, round) {
            return Ok(false);
        }
        let dir = File::open(&self.dir).map_err(ImageError::io("open", &self.dir))?;
        // Not between somebody's disk and its description; nor do we wait for those, as whoever asks
        // for an image waits for us. It goes the next time.
        match dir.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Ok(false),
            Err(fs::TryLockError::Error(error)) => {
                return Err(ImageError::io("lock", &self.dir)(error));
            }
        }
        for path in [self.description(digest), self.disk(digest)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(ImageError::io("remove", path)(error));
                }
                _ => {}
            }
            // The description must not come back alone after a power cut.
            dir.sync_all().map_err(ImageError::io("sync", &self.dir))?;
        }
        leases.forget(digest);
        Ok(true)
    }

    /// Removes halves of images, names that lead to none, and proofs of what is not here. Does nothing while another process
    /// publishes an image: halves are normal then.
    pub(crate) fn remove_halves(&self) -> io::Result<()> {
        let dir = File::open(&self.dir)?;
        match dir.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Ok(()),
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or("");
            let alone = if let Some(digest) = digest_of(name, ".erofs") {
                !self.description(&digest).exists()
            } else if let Some(digest) = digest_of(name, ".json") {
                !self.disk(&digest).exists()
            } else if let Some(digest) = digest_of(name, ".alias") {
                self.resolve_alias(&digest).is_none()
            } else {
                false
            };
            if alone {
                tracing::warn!(path = %path.display(), "removing half an image");
                match fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
        }
        self.layers.proofs.retain(|digest| {
            let mut places = [
                self.description(digest),
                self.layers.path(digest),
                self.alias(digest),
            ]
            .into_iter();
            places.any(|path| path.exists())
        })
    }
}

/// The digest in a file's name.
pub(crate) fn digest_of(name: &str, suffix: &str) -> Option<Digest> {
    let hex = name.strip_prefix("sha256-")?.strip_suffix(suffix)?;
    format!("sha256:{hex}").parse().ok()
}

/// A file's size, and when it was last of use.
fn inspect(path: &std::path::Path) -> Result<Option<(u64, SystemTime)>, ImageError> {
    match fs::metadata(path).and_then(|m| Ok((m.len(), m.modified()?))) {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ImageError::io("inspect", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn items() -> impl Strategy<Value = Vec<Item>> {
        let item = (0..3, 0u64..20, any::<bool>());
        prop::collection::vec(item, 0..20).prop_map(|items| {
            let items = items.into_iter().enumerate();
            let make = |(n, (kind, age, stays)): (usize, (i32, u64, bool))| Item {
                kind: match kind {
                    0 => Kind::Image,
                    kind => Kind::Layer { needed: kind == 1 },
                },
                digest: Digest::of(&[u8::try_from(n).unwrap()]),
                size: 1,
                used: SystemTime::UNIX_EPOCH + Duration::from_secs(100 - age),
                stays: stays && kind == 0,
            };
            items.map(make).collect()
        })
    }

    proptest! {
        /// Nothing that stays or is young, all else once, older before younger, needed layers last.
        #[test]
        fn the_oldest_go_first_and_needed_layers_last(items in items(), min_age in 0u64..20) {
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(100);
            let min_age = Duration::from_secs(min_age);
            let may_go = |item: &&Item| !item.stays && item.used + min_age <= now;
            let going = order(items.clone(), now, min_age);
            prop_assert_eq!(items.iter().filter(may_go).count(), going.len());
            prop_assert!(going.iter().all(|item| may_go(&item) && items.contains(item)));
            for pair in going.windows(2) {
                let needed = |item: &Item| item.kind == Kind::Layer { needed: true };
                prop_assert!(needed(&pair[0]) <= needed(&pair[1]));
                prop_assert!(needed(&pair[0]) != needed(&pair[1]) || pair[0].used <= pair[1].used);
            }
        }
    }

    /// An image of a store, made up.
    #[derive(Debug, Clone)]
    struct Made {
        size: u64,
        layers: Vec<u8>,
        age: u64,
        in_use: bool,
        held: bool,
        handed_out: bool,
    }

    fn made() -> impl Strategy<Value = Made> {
        let layers = prop::collection::vec(0u8..6, 0..4);
        let flags = (any::<bool>(), any::<bool>(), any::<bool>());
        (0u64..5000, layers, 0u64..1000, flags).prop_map(|(size, layers, age, flags)| Made {
            size,
            layers,
            age,
            in_use: flags.0,
            held: flags.1,
            handed_out: flags.2,
        })
    }

    fn write(path: &std::path::Path, content: &[u8], age: u64) {
        fs::write(path, content).unwrap();
        let at = SystemTime::now() - Duration::from_secs(age);
        File::open(path).unwrap().set_modified(at).unwrap();
    }

    fn bytes_in(dir: &std::path::Path) -> u64 {
        let entries = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let size = |path: std::path::PathBuf| match path.is_dir() {
            true => bytes_in(&path),
            false => fs::metadata(path).unwrap().len(),
        };
        entries.map(size).sum()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever a store holds: what is used stays whole, the rest goes until the budget is met and no
        /// further, and the account of it is true.
        #[test]
        fn a_store_comes_within_its_budget_and_keeps_what_is_used(
            made in prop::collection::vec(made(), 0..8),
            bytes in 0u64..20_000,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let layers = dir.path().join("layers");
            fs::create_dir(&layers).unwrap();
            let store = ImageStore::open(dir.path(), crate::Limits::default()).unwrap();
            let (mut in_use, mut leases) = (HashSet::new(), Vec::new());
            let digest = |n: usize| Digest::of(format!("image {n}").as_bytes());
            for (n, image) in made.iter().enumerate() {
                let own: Vec<Digest> = image.layers.iter().map(|n| Digest::of(&[*n])).collect();
                for layer in &own {
                    write(&layers.join(layer.file_stem()), &[0; 700], image.age);
                }
                let text = serde_json::json!({
                    "digest": digest(n), "size": image.size, "config": crate::ImageConfig::default(),
                    "layers": own,
                });
                let size = usize::try_from(image.size).unwrap();
                write(&store.inner.disk(&digest(n)), &vec![0; size], 0);
                write(&store.inner.description(&digest(n)), text.to_string().as_bytes(), image.age);
                if image.in_use {
                    in_use.insert(digest(n));
                }
                if image.held {
                    leases.push(store.get(&digest(n)).unwrap().unwrap());
                }
            }
            let before = bytes_in(dir.path());
            let round = store.round();
            for (n, _) in made.iter().enumerate().filter(|(_, image)| image.handed_out) {
                prop_assert!(store.get(&digest(n)).unwrap().is_some());
            }
            let budget = Budget { bytes, min_age: Duration::ZERO };
            let done = store.collect(round, &in_use, &budget).unwrap();

            let after = bytes_in(dir.path());
            prop_assert_eq!((done.kept, done.freed), (after, before - after));
            let mut free = 0;
            for (n, image) in made.iter().enumerate() {
                let there = store.get(&digest(n)).unwrap().is_some();
                let used = image.in_use || image.held || image.handed_out;
                prop_assert!(there || !used);
                prop_assert_eq!(there, !done.images.contains(&digest(n)));
                free += usize::from(there && !used);
            }
            free += fs::read_dir(&layers).unwrap().count();
            prop_assert!(after <= bytes || free == 0, "{} over {}, and {} may go", after, bytes, free);
            let removed = done.images.len() + done.layers.len();
            prop_assert!(before > bytes || removed == 0);
        }
    }
}
