//! Who was given what: images and layers are kept once, and are not everybody's for that.
//!
//! Many organizations share a store. Knowing a digest is not the right to read what it is of: what is here
//! already is handed to an organization only once that organization has been *given* it. For an image that
//! is the repository it was asked for in, so that a reference means the same on every host. For its layers it is
//! any registry that has sent their bytes on the organization's behalf: who has had them needs no leave to read
//! them again. A registry's mere word is no proof, for tenants choose their registries and may have
//! made them; only the operator's own are [`trusted`](crate::RegistryOptions::trusted).
//!
//! A proof does not lapse. It says that somebody has had these very bytes, which stays true; so a registry that is
//! down, or has since forgotten the image, stops nobody who runs it.
//!
//! `proofs/sha256-<hex of what was given>/<hash of the claim>` is one proof; it holds the claim for people
//! to read, and its modification time says when it was made. A proof that cannot be written costs another
//! question, one that outlives its image opens nothing; so neither is synced.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::{Digest, Reference, RegistryOptions};

/// Proofs kept of one digest, the newest. Repositories cost their owner nothing, inodes do us.
const MOST: usize = 1024;

/// Who asks, and whom they ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asker {
    /// The registry.
    pub(crate) server: String,
    /// Whether its word is enough.
    pub(crate) trusted: bool,
    /// Of an image, or an index that leads to it.
    pub(crate) image: Claim,
    /// Of a layer.
    pub(crate) layer: Claim,
}

/// What a proof is of: somebody was given something, in so many words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claim(String);

impl Asker {
    pub(crate) fn new(reference: &Reference, options: &RegistryOptions) -> Self {
        let of = &options.on_behalf_of;
        // Other credentials may be shown other things. Their password may change without that.
        let user = options.credentials.as_ref().map_or("", |c| &c.username);
        let (host, repository) = (reference.host(), reference.repository());
        Self {
            server: host.to_owned(),
            trusted: options.trusted,
            image: Claim(format!(
                "{host}/{repository} gave this image to {of:?} as {user:?}\n"
            )),
            layer: Claim(format!("this layer was given to {of:?}\n")),
        }
    }
}

/// The proofs of one store.
#[derive(Debug)]
pub(crate) struct Proofs {
    dir: PathBuf,
}

impl Proofs {
    /// The directory is made when it is first needed.
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Whether this was proven.
    pub(crate) fn has(&self, digest: &Digest, claim: &Claim) -> bool {
        self.path(digest, claim).exists()
    }

    /// Keeps a proof of what is in the store by now.
    pub(crate) fn note(&self, digest: &Digest, claim: &Claim) {
        if self.has(digest, claim) {
            return;
        }
        let path = self.path(digest, claim);
        let dir = self.of(digest);
        let noted = fs::create_dir_all(&dir)
            .and_then(|()| make_room(&dir))
            .and_then(|()| fs::write(&path, &claim.0));
        if let Err(error) = noted {
            tracing::warn!(path = %path.display(), %error, "who was given an image cannot be noted");
        }
    }

    /// Removes the proofs of what is not `kept` any more.
    pub(crate) fn retain(&self, kept: impl Fn(&Digest) -> bool) -> io::Result<()> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for entry in entries {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let digest = name.and_then(|name| crate::gc::digest_of(name, ""));
            if digest.is_some_and(|digest| kept(&digest)) {
                continue;
            }
            match fs::remove_dir_all(&path) {
                // Somebody notes another just now: it goes the next time.
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
        Ok(())
    }

    fn of(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.file_stem())
    }

    fn path(&self, digest: &Digest, claim: &Claim) -> PathBuf {
        let name = Digest::of(claim.0.as_bytes());
        self.of(digest).join(name.hex())
    }
}

/// Removes the oldest proof while there is no room for one more.
fn make_room(dir: &Path) -> io::Result<()> {
    let mut proofs = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        match entry.metadata().and_then(|metadata| metadata.modified()) {
            Ok(at) => proofs.push((at, entry.path())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    proofs.sort();
    let surplus = (proofs.len() + 1).saturating_sub(MOST);
    for (_, path) in proofs.into_iter().take(surplus) {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    fn asker(reference: &str, of: &str) -> Asker {
        let options = RegistryOptions {
            on_behalf_of: of.to_owned(),
            ..RegistryOptions::default()
        };
        Asker::new(&reference.parse().unwrap(), &options)
    }

    #[test]
    fn a_proof_is_of_one_digest_for_one_claim() {
        let dir = tempfile::tempdir().unwrap();
        let proofs = Proofs::new(dir.path().join("proofs"));
        let (image, other) = (Digest::of(b"image"), Digest::of(b"other"));
        let one = asker("r.x/a:1", "one");
        proofs.note(&image, &one.image);
        assert!(proofs.has(&image, &one.image));
        // Another tag of the repository is of it as well.
        assert!(proofs.has(&image, &asker("r.x/a:2", "one").image));
        for stranger in [
            asker("r.x/a:1", "two"),
            asker("r.x/b:1", "one"),
            asker("s.x/a:1", "one"),
            // No organization can be named so that it reads as another's claim.
            asker("r.x/a:1", "one\" as \"\"\n"),
        ] {
            assert!(!proofs.has(&image, &stranger.image), "{stranger:?}");
        }
        assert!(!proofs.has(&other, &one.image) && !proofs.has(&image, &one.layer));
        proofs.retain(|digest| *digest == image).unwrap();
        assert!(proofs.has(&image, &one.image));
        proofs.retain(|_| false).unwrap();
        assert!(!proofs.has(&image, &one.image));
    }

    #[test]
    fn a_digest_has_so_many_proofs_and_the_oldest_go() {
        let dir = tempfile::tempdir().unwrap();
        let proofs = Proofs::new(dir.path().to_owned());
        let image = Digest::of(b"image");
        let claim = |n: usize| asker("r.x/a:1", &n.to_string()).image;
        let start = SystemTime::now() - Duration::from_secs(1 << 20);
        for n in 0..MOST + 2 {
            proofs.note(&image, &claim(n));
            let file = fs::File::open(proofs.path(&image, &claim(n))).unwrap();
            file.set_modified(start + Duration::from_secs(n as u64))
                .unwrap();
        }
        assert_eq!(fs::read_dir(proofs.of(&image)).unwrap().count(), MOST);
        assert!(!proofs.has(&image, &claim(1)) && proofs.has(&image, &claim(2)));
    }
}
