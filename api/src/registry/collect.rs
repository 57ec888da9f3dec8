//! Gives back the space of what nobody refers to.
//!
//! From the top down, so that a stop in the middle leaves nothing that points to what is gone:
//!
//! 1. a repository's manifests without a tag, that no Machine runs, that no kept index names, and that
//!    nobody has looked up for long;
//! 2. its entries of blobs that none of its manifests names;
//! 3. blobs that no repository lists;
//! 4. uploads that nobody goes on with, and temporary files that a crash left.
//!
//! Whatever a client is told of is touched ([`Registry::has_blob`] and others), and what was touched
//! within the grace period stays: a push has that long from "there already" to its manifest. Ages are
//! looked at once more just before removing, while nobody touches anything.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use tern_catalog::Snapshot;

use super::store::{Digest, Registry, sync_parent};

/// How long things stay that nobody refers to.
#[derive(Debug, Clone)]
pub struct Grace {
    /// Blobs, and temporary files: as long as a push may take after it asked for them.
    pub blobs: Duration,
    /// Uploads, since their last byte.
    pub uploads: Duration,
    /// Manifests without a tag, since somebody asked for them. They are what an app may go back to.
    pub manifests: Duration,
}

impl Default for Grace {
    fn default() -> Self {
        const DAY: Duration = Duration::from_secs(24 * 3600);
        Self {
            blobs: DAY,
            uploads: DAY,
            manifests: 30 * DAY,
        }
    }
}

/// What a collection removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Manifests, of all repositories.
    pub manifests: usize,
    /// Blobs, manifests' contents included.
    pub blobs: usize,
    /// Bytes of those blobs.
    pub freed: u64,
}

#[derive(Debug, Deserialize)]
struct Named {
    digest: String,
}

/// As much of a manifest as tells what it needs.
#[derive(Debug, Deserialize)]
struct Manifest {
    config: Option<Named>,
    #[serde(default)]
    layers: Vec<Named>,
    #[serde(default)]
    manifests: Vec<Named>,
}

/// The digests of images that Machines run, or are to run.
pub fn in_use(snapshot: &Snapshot) -> HashSet<Digest> {
    let wanted = snapshot.machines.values().filter_map(|machine| {
        let (_, digest) = machine.config.image.split_once('@')?;
        digest.parse().ok()
    });
    let run = snapshot
        .machine_status
        .values()
        .filter_map(|status| status.image_digest.as_ref()?.parse().ok());
    wanted.chain(run).collect()
}

impl Registry {
    /// Removes what nobody refers to and is older than `grace`. If anything cannot be read, so that what
    /// it refers to is unknown, then nothing that it may need is removed. Blocks.
    pub fn collect(&self, in_use: &HashSet<Digest>, grace: &Grace) -> io::Result<Collected> {
        let now = SystemTime::now();
        let mut done = Collected::default();
        let mut listed = HashSet::new();
        for app in names(&self.root.join("repositories"))? {
            let repository = self.root.join("repositories").join(app);
            self.collect_repository(&repository, in_use, grace, now, &mut done)?;
            for kind in ["blobs", "manifests"] {
                listed.extend(names(&repository.join(kind))?);
            }
            for kind in ["blobs", "manifests", "tags"] {
                self.remove_temporary(&repository.join(kind), grace, now)?;
            }
        }
        let blobs = self.root.join("blobs/sha256");
        for name in names(&blobs)? {
            let path = blobs.join(&name);
            if listed.contains(&name) {
                continue;
            }
            let size = fs::metadata(&path).map(|m| m.len()).unwrap_or_default();
            if self.remove_old(&path, grace.blobs, now)? {
                done.blobs += 1;
                done.freed += size;
            }
        }
        self.remove_temporary(&blobs, grace, now)?;
        for name in names(&self.root.join("uploads"))? {
            let path = self.root.join("uploads").join(name);
            // Nobody begins to append while this is held.
            let busy = self.busy.lock();
            if !busy.contains(&path) {
                self.remove_old(&path, grace.uploads, now)?;
            }
        }
        Ok(done)
    }

    fn collect_repository(
        &self,
        repository: &Path,
        in_use: &HashSet<Digest>,
        grace: &Grace,
        now: SystemTime,
        done: &mut Collected,
    ) -> io::Result<()> {
        let mut kept: Vec<Digest> = Vec::new();
        for tag in names(&repository.join("tags"))? {
            let digest = fs::read_to_string(repository.join("tags").join(tag))?;
            kept.extend(digest.parse::<Digest>());
        }
        let dir = repository.join("manifests");
        let mut manifests = Vec::new();
        for name in names(&dir)? {
            let Ok(digest) = format!("sha256:{name}").parse::<Digest>() else {
                continue;
            };
            if in_use.contains(&digest) || !is_old(&dir.join(&name), grace.manifests, now)? {
                kept.push(digest.clone());
            }
            manifests.push(digest);
        }
        // What they need, and what the manifests that they name need.
        let (mut known, mut needed) = (HashSet::new(), HashSet::new());
        while let Some(digest) = kept.pop() {
            if !known.insert(digest.clone()) {
                continue;
            }
            let path = self.blob(&digest);
            let content = match fs::read(&path) {
                Ok(content) => content,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), "a manifest has no content");
                    continue;
                }
                Err(error) => return Err(error),
            };
            let manifest: Manifest = serde_json::from_slice(&content).map_err(|error| {
                let text = format!("{}: not a manifest: {error}", path.display());
                io::Error::new(io::ErrorKind::InvalidData, text)
            })?;
            let digests =
                |named: Vec<Named>| named.into_iter().filter_map(|n| n.digest.parse().ok());
            kept.extend(digests(manifest.manifests));
            needed.extend(digests(manifest.layers));
            needed.extend(digests(manifest.config.into_iter().collect()));
        }
        for digest in manifests.iter().filter(|digest| !known.contains(*digest)) {
            if self.remove_old(&dir.join(digest.hex()), grace.manifests, now)? {
                done.manifests += 1;
            }
        }
        let dir = repository.join("blobs");
        for name in names(&dir)? {
            let unneeded = format!("sha256:{name}")
                .parse()
                .is_ok_and(|d: Digest| !needed.contains(&d));
            if unneeded {
                self.remove_old(&dir.join(name), grace.blobs, now)?;
            }
        }
        Ok(())
    }

    /// Removes a file that nobody has touched for `age`, and says whether it did.
    fn remove_old(&self, path: &Path, age: Duration, now: SystemTime) -> io::Result<bool> {
        let _nobody_touches = self.gate.write();
        if !is_old(path, age, now)? {
            return Ok(false);
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            other => other?,
        }
        // What pointed to something is gone for good before that something is.
        sync_parent(path)?;
        Ok(true)
    }

    /// Removes what a crash left between writing and renaming.
    fn remove_temporary(&self, dir: &Path, grace: &Grace, now: SystemTime) -> io::Result<()> {
        for path in entries(dir)? {
            let name = path.file_name().unwrap_or_default();
            if name.as_encoded_bytes().starts_with(b".") {
                self.remove_old(&path, grace.blobs, now)?;
            }
        }
        Ok(())
    }
}

/// Whether a file has not been touched for `age`. One that is gone is not old, nor is one from the future.
fn is_old(path: &Path, age: Duration, now: SystemTime) -> io::Result<bool> {
    match fs::metadata(path).and_then(|m| m.modified()) {
        Ok(at) => Ok(now.duration_since(at).is_ok_and(|found| found >= age)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other?.map(|entry| Ok(entry?.path())).collect(),
    }
}

/// The names in a directory, without temporary files.
fn names(dir: &Path) -> io::Result<Vec<String>> {
    let names = entries(dir)?.into_iter().filter_map(|path| {
        let name = path.file_name()?.to_str()?.to_owned();
        (!name.starts_with('.')).then_some(name)
    });
    Ok(names.collect())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use serde_json::json;
    use tern_catalog::AppName;

    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    struct World {
        dir: tempfile::TempDir,
        registry: Arc<Registry>,
        app: AppName,
    }

    impl World {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let registry = Arc::new(Registry::open(dir.path()).unwrap());
            let app = "shop".parse().unwrap();
            Self { dir, registry, app }
        }

        fn push(&self, content: &str) -> Digest {
            let upload = self.dir.path().join("uploads/x");
            fs::write(&upload, content).unwrap();
            let digest = Digest::of(content.as_bytes());
            self.registry.finish(&upload, &self.app, &digest).unwrap();
            digest
        }

        fn manifest(&self, tag: Option<&str>, config: &Digest, layers: &[&Digest]) -> Digest {
            let name = |d: &Digest| json!({"digest": d.to_string()});
            let layers: Vec<_> = layers.iter().map(|d| name(d)).collect();
            let text = json!({"config": name(config), "layers": layers}).to_string();
            let kept = self
                .registry
                .put_manifest(&self.app, tag, "m", text.as_bytes());
            kept.unwrap()
        }

        /// Makes everything older.
        fn age(&self, by: Duration) {
            fn walk(dir: &Path, by: Duration) {
                for path in entries(dir).unwrap() {
                    if path.is_dir() {
                        walk(&path, by);
                    } else {
                        let file = File::open(&path).unwrap();
                        let at = file.metadata().unwrap().modified().unwrap();
                        file.set_modified(at - by).unwrap();
                    }
                }
            }
            walk(self.dir.path(), by);
        }

        fn collect(&self, in_use: &[&Digest]) -> Collected {
            let in_use = in_use.iter().map(|d| (*d).clone()).collect();
            self.registry.collect(&in_use, &Grace::default()).unwrap()
        }

        fn has(&self, digest: &Digest) -> bool {
            self.registry.blob(digest).exists()
        }
    }

    #[test]
    fn what_no_manifest_names_goes_after_its_grace() {
        let world = World::new();
        let (config, layer, stray) = (world.push("{}"), world.push("layer"), world.push("stray"));
        let manifest = world.manifest(Some("v1"), &config, &[&layer]);
        assert_eq!(world.collect(&[]), Collected::default());
        world.age(2 * DAY);
        let done = world.collect(&[]);
        assert_eq!((done.manifests, done.blobs, done.freed), (0, 1, 5));
        assert!(!world.has(&stray) && !world.registry.has_blob(&world.app, &stray));
        assert!([config, layer, manifest].iter().all(|d| world.has(d)));
        assert_eq!(world.collect(&[]), Collected::default());
    }

    #[test]
    fn a_client_that_was_told_of_a_blob_can_rely_on_it() {
        let world = World::new();
        let stray = world.push("stray");
        world.age(2 * DAY);
        assert!(world.registry.has_blob(&world.app, &stray));
        assert_eq!(world.collect(&[]).blobs, 0);
        world.manifest(Some("v1"), &stray, &[]);
        world.age(365 * DAY);
        assert_eq!(world.collect(&[]).blobs, 0);
    }

    #[test]
    fn a_manifest_stays_while_it_is_tagged_run_or_young() {
        let world = World::new();
        let (one, two) = (world.push("{\"1\":1}"), world.push("{\"2\":2}"));
        let first = world.manifest(Some("v1"), &one, &[]);
        world.age(20 * DAY);
        let second = world.manifest(Some("v1"), &two, &[]);
        assert_eq!(world.collect(&[]), Collected::default());
        world.age(20 * DAY);
        assert_eq!(world.collect(&[&first]), Collected::default());
        let done = world.collect(&[]);
        assert_eq!((done.manifests, done.blobs), (1, 2));
        assert!(!world.has(&first) && !world.has(&one));
        assert!(world.has(&second) && world.has(&two));
    }

    #[test]
    fn an_index_that_runs_keeps_what_it_names() {
        let world = World::new();
        let config = world.push("{}");
        let manifest = world.manifest(None, &config, &[]);
        let text = json!({"manifests": [{"digest": manifest.to_string()}]}).to_string();
        let index = world
            .registry
            .put_manifest(&world.app, None, "i", text.as_bytes());
        let index = index.unwrap();
        world.age(365 * DAY);
        assert_eq!(world.collect(&[&index]), Collected::default());
        assert_eq!(world.collect(&[]).blobs, 3);
    }

    #[test]
    fn uploads_and_temporary_files_go_when_nobody_is_at_them() {
        let world = World::new();
        let id = "0".repeat(32);
        let upload = world.registry.upload(&world.app, &id).unwrap();
        fs::write(&upload.path, "half").unwrap();
        let temporary = world.dir.path().join("blobs/sha256/.x.0");
        fs::write(&temporary, "").unwrap();
        world.age(2 * DAY);
        world.collect(&[]);
        assert!(upload.path.exists() && !temporary.exists());
        let path = upload.path.clone();
        drop(upload);
        world.collect(&[]);
        assert!(!path.exists());
    }

    #[test]
    fn a_manifest_that_cannot_be_read_stops_the_collection() {
        let world = World::new();
        let config = world.push("{}");
        let manifest = world.manifest(Some("v1"), &config, &[]);
        fs::write(world.registry.blob(&manifest), "spoiled").unwrap();
        world.age(365 * DAY);
        let refused = world.registry.collect(&HashSet::new(), &Grace::default());
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(world.has(&config));
    }
}
