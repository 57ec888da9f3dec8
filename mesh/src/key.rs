//! WireGuard keys: Curve25519, 32 bytes, written in base64 as `wg` does.

use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use boringtun::x25519;
use rand::TryRngCore as _;
use thiserror::Error;
use zeroize::Zeroizing;

/// A public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; 32]);

/// A private key. Wiped from memory when dropped, and never shown by `Debug`.
#[derive(Clone)]
pub struct PrivateKey(x25519::StaticSecret);

/// This server's key pair. The private half is used by the mesh and shown to nobody.
#[derive(Clone)]
pub struct MeshKey(PrivateKey);

/// Why there is no key.
#[derive(Debug, Error)]
pub enum KeyError {
    /// The text is not a key.
    #[error("not a WireGuard key: expected 44 characters of base64 (32 bytes)")]
    Malformed,
    /// The key's file holds something else.
    #[error(
        "{} is not a WireGuard key; if it is lost, remove the file: a new key is made at the next \
         start, and WireGuard clients need a new configuration",
        .0.display()
    )]
    File(PathBuf),
    /// Others can read the key.
    #[error("{0} can be read by other users (mode {mode:o}); run `chmod 600 {0}`", .path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file cannot be read or written.
    #[error("cannot {what} {}", .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl PublicKey {
    /// The key's bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<[u8; 32]> for PublicKey {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl From<x25519::PublicKey> for PublicKey {
    fn from(key: x25519::PublicKey) -> Self {
        Self(key.to_bytes())
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        decode(text).map(|bytes| Self(*bytes))
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl PrivateKey {
    /// A new random key.
    pub fn generate() -> Self {
        let mut bytes = Zeroizing::new([0; 32]);
        rand::rngs::OsRng
            .try_fill_bytes(&mut *bytes)
            .expect("the kernel gives random bytes once it has booted");
        Self(x25519::StaticSecret::from(*bytes))
    }

    /// Its public half.
    pub fn public_key(&self) -> PublicKey {
        x25519::PublicKey::from(&self.0).into()
    }

    /// The key as text, for a client's own configuration.
    pub fn to_base64(&self) -> Zeroizing<String> {
        Zeroizing::new(STANDARD.encode(self.0.as_bytes()))
    }

    pub(crate) fn secret(&self) -> &x25519::StaticSecret {
        &self.0
    }
}

impl FromStr for PrivateKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        decode(text).map(|bytes| Self(x25519::StaticSecret::from(*bytes)))
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey(of {})", self.public_key())
    }
}

impl MeshKey {
    /// Reads the key at `path`, or makes it there, readable by its owner only. Two that start at
    /// once end up with the same key, and a crash leaves a whole key or none.
    pub fn load_or_create(path: &Path) -> Result<Self, KeyError> {
        match Self::load(path) {
            Err(KeyError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                create(path)?;
                Self::load(path)
            }
            other => other,
        }
    }

    /// The half that others may know.
    pub fn public_key(&self) -> PublicKey {
        self.0.public_key()
    }

    pub(crate) fn private_key(&self) -> &PrivateKey {
        &self.0
    }

    fn load(path: &Path) -> Result<Self, KeyError> {
        let read = at("read", path);
        let text = Zeroizing::new(fs::read_to_string(path).map_err(&read)?);
        let mode = fs::metadata(path).map_err(&read)?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            let path = path.to_owned();
            return Err(KeyError::Exposed { path, mode });
        }
        let key = text.trim().parse();
        key.map(Self).map_err(|_| KeyError::File(path.to_owned()))
    }
}

impl fmt::Debug for MeshKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MeshKey(of {})", self.public_key())
    }
}

/// Makes a new key at `path` unless there is one by now.
fn create(path: &Path) -> Result<(), KeyError> {
    let write = at("write", path);
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(at("create the directory of", path))?;
    // A temporary file of this kind is 0600 from its first moment.
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(&write)?;
    let text = PrivateKey::generate().to_base64();
    file.write_all(text.as_bytes())
        .and_then(|()| file.write_all(b"\n"))
        .and_then(|()| file.as_file().sync_all())
        .map_err(&write)?;
    match file.persist_noclobber(path) {
        Ok(_) => {}
        Err(lost) if lost.error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(failed) => return Err(write(failed.error)),
    }
    fs::File::open(directory)
        .and_then(|d| d.sync_all())
        .map_err(&write)
}

fn at(what: &'static str, path: &Path) -> impl Fn(io::Error) -> KeyError {
    let path = path.to_owned();
    move |source| KeyError::Io {
        what,
        path: path.clone(),
        source,
    }
}

fn decode(text: &str) -> Result<Zeroizing<[u8; 32]>, KeyError> {
    let mut bytes = Zeroizing::new([0; 32]);
    match STANDARD.decode_slice(text, &mut *bytes) {
        Ok(32) => Ok(bytes),
        _ => Err(KeyError::Malformed),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys/wireguard.key");
        let first = MeshKey::load_or_create(&path).unwrap();
        let again = MeshKey::load_or_create(&path).unwrap();
        assert_eq!(first.public_key(), again.public_key());
        let mode = |p: &Path| fs::metadata(p).unwrap().mode() & 0o7777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        let left: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().collect();
        assert_eq!(left.len(), 1, "no temporary file stays: {left:?}");
    }

    #[test]
    fn many_that_start_at_once_agree() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wireguard.key");
        let keys: Vec<_> = std::thread::scope(|s| {
            let start = |_| s.spawn(|| MeshKey::load_or_create(&path).unwrap().public_key());
            let all: Vec<_> = (0..8).map(start).collect();
            all.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|k| *k == keys[0]), "{keys:?}");
    }

    #[test]
    fn a_key_that_others_can_read_is_refused_with_a_next_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wireguard.key");
        MeshKey::load_or_create(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = MeshKey::load_or_create(&path).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
    }

    #[test]
    fn a_damaged_key_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wireguard.key");
        let mut options = fs::OpenOptions::new();
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.write(true).create_new(true).open(&path).unwrap();
        file.write_all(b"c2hvcnQ=\n").unwrap();
        assert!(matches!(
            MeshKey::load_or_create(&path),
            Err(KeyError::File(_))
        ));
        assert_eq!(fs::read(&path).unwrap(), b"c2hvcnQ=\n");
    }

    #[test]
    fn keys_agree_with_wg() {
        // `wg pubkey` of this private key, from wireguard-tools 1.0.20210914.
        let private: PrivateKey = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk="
            .parse()
            .unwrap();
        assert_eq!(
            private.public_key().to_string(),
            "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw="
        );
        assert!(!format!("{private:?}").contains("yAnz5"));
    }

    #[test]
    fn what_is_not_a_key_is_refused() {
        for bad in [
            "",
            "AAAA",
            "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk",
            &"A".repeat(4096),
        ] {
            assert!(bad.parse::<PublicKey>().is_err(), "{bad}");
        }
    }
}
