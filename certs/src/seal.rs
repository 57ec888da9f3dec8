//! Private keys and apps' secrets at rest: AES-256-GCM (NIST SP 800-38D) under a key of this deployment's.
//!
//! What a ciphertext is for is bound to it as additional data: one key's ciphertext under another's name
//! does not open. The catalog may be copied and backed up; without the key file it opens nothing.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hmac;
use ring::rand::{SecureRandom as _, SystemRandom};
use tern_catalog::SealedKey;
use thiserror::Error;
use zeroize::Zeroizing;

/// Seals and opens private keys and secrets.
pub struct Sealer {
    cipher: LessSafeKey,
    digests: hmac::Key,
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealer")
    }
}

/// Why a key was not sealed or opened.
#[derive(Debug, Error)]
pub enum SealError {
    /// The key file cannot be used.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The key file does not hold a key.
    #[error("{} does not hold {KEY_BYTES} bytes; restore it from a backup", .0.display())]
    BadFile(PathBuf),
    /// It was sealed with another key, for something else, or damaged.
    #[error("the sealed key for {0} does not open; was the key file replaced?")]
    DoesNotOpen(String),
    /// The kernel gave no randomness.
    #[error("no randomness")]
    NoRandomness,
}

const KEY_BYTES: usize = 32;
/// What the key of digests is made for.
const DIGESTS: &str = "tern digests of secrets";
/// As much of a digest as is shown.
const DIGEST_BYTES: usize = 8;
const ALGORITHM: &str = "aes-256-gcm";

impl Sealer {
    /// Reads the key file, or makes it (0600). A crash leaves a whole file or none.
    pub fn load_or_create(path: &Path) -> Result<Self, SealError> {
        let io = |source| SealError::File {
            path: path.to_owned(),
            source,
        };
        let key = match File::open(path) {
            Ok(file) => {
                let mut key = Zeroizing::new(Vec::new());
                file.take(KEY_BYTES as u64 + 1)
                    .read_to_end(&mut key)
                    .map_err(io)?;
                key
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {
                let mut key = Zeroizing::new(vec![0; KEY_BYTES]);
                SystemRandom::new()
                    .fill(&mut key)
                    .map_err(|_| SealError::NoRandomness)?;
                create(path, &key).map_err(io)?;
                key
            }
            Err(e) => return Err(io(e)),
        };
        let unbound =
            UnboundKey::new(&AES_256_GCM, &key).map_err(|_| SealError::BadFile(path.to_owned()))?;
        // Another key than the cipher's: made from it, and good for nothing else.
        let derived = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &key), DIGESTS.as_bytes());
        Ok(Self {
            cipher: LessSafeKey::new(unbound),
            digests: hmac::Key::new(hmac::HMAC_SHA256, derived.as_ref()),
        })
    }

    /// What may be shown of a secret: the same for the same value and purpose. Without the key file nobody can try
    /// which value it is of.
    pub fn digest(&self, what: &str, secret: &[u8]) -> String {
        let mut context = hmac::Context::with_key(&self.digests);
        for part in [what.as_bytes(), &[0], secret] {
            context.update(part);
        }
        let tag = context.sign();
        let shown = tag.as_ref().iter().take(DIGEST_BYTES);
        shown.map(|byte| format!("{byte:02x}")).collect()
    }

    /// Encrypts a private key, for `what` and nothing else.
    pub fn seal(&self, what: &str, secret: &[u8]) -> Result<SealedKey, SealError> {
        // A random nonce is safe for 2^32 messages under one key; there is one a certificate and renewal, and one
        // a secret and change.
        let mut nonce = [0; NONCE_LEN];
        SystemRandom::new()
            .fill(&mut nonce)
            .map_err(|_| SealError::NoRandomness)?;
        let mut data = secret.to_vec();
        self.cipher
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(what),
                &mut data,
            )
            .map_err(|_| SealError::NoRandomness)?;
        Ok(SealedKey {
            algorithm: ALGORITHM.to_owned(),
            nonce: STANDARD.encode(nonce),
            ciphertext: STANDARD.encode(data),
        })
    }

    /// Decrypts a private key that was sealed for `what`.
    pub fn open(&self, what: &str, sealed: &SealedKey) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let closed = || SealError::DoesNotOpen(what.to_owned());
        let nonce = STANDARD.decode(&sealed.nonce).map_err(|_| closed())?;
        let nonce = Nonce::try_assume_unique_for_key(&nonce).map_err(|_| closed())?;
        let mut data = Zeroizing::new(STANDARD.decode(&sealed.ciphertext).map_err(|_| closed())?);
        let opened = self
            .cipher
            .open_in_place(nonce, Aad::from(what), &mut data)
            .map_err(|_| closed())?
            .len();
        data.truncate(opened);
        if sealed.algorithm == ALGORITHM {
            Ok(data)
        } else {
            Err(closed())
        }
    }
}

fn create(path: &Path, key: &[u8]) -> std::io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent)?;
    let temporary = path.with_extension(format!("{:016x}", rand::random::<u64>()));
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(key)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn opens_what_it_sealed_and_only_for_what_it_was_sealed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys/seal.key");
        let sealed = Sealer::load_or_create(&path)
            .unwrap()
            .seal("a.example", b"secret")
            .unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let again = Sealer::load_or_create(&path).unwrap();
        assert_eq!(&again.open("a.example", &sealed).unwrap()[..], b"secret");
        assert!(again.open("b.example", &sealed).is_err());
        assert!(!serde_json::to_string(&sealed).unwrap().contains("secret"));
        let other = Sealer::load_or_create(&dir.path().join("other.key")).unwrap();
        assert!(other.open("a.example", &sealed).is_err());
    }

    #[test]
    fn a_digest_tells_values_apart_and_needs_the_key() {
        let dir = tempfile::tempdir().unwrap();
        let sealer = |name: &str| Sealer::load_or_create(&dir.path().join(name)).unwrap();
        let (own, again, other) = (sealer("a.key"), sealer("a.key"), sealer("b.key"));
        let digest = own.digest("x", b"value");
        assert_eq!(digest.len(), 2 * DIGEST_BYTES);
        assert_eq!(digest, again.digest("x", b"value"));
        for different in [
            own.digest("x", b"valuf"),
            own.digest("y", b"value"),
            own.digest("xv", b"alue"),
            other.digest("x", b"value"),
        ] {
            assert_ne!(digest, different);
        }
    }

    #[test]
    fn damage_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seal.key");
        let sealer = Sealer::load_or_create(&path).unwrap();
        let sealed = sealer.seal("x", b"secret").unwrap();
        for damaged in [
            SealedKey {
                ciphertext: STANDARD.encode(b"short"),
                ..sealed.clone()
            },
            SealedKey {
                nonce: "!".into(),
                ..sealed.clone()
            },
            SealedKey {
                algorithm: "rot13".into(),
                ..sealed
            },
        ] {
            assert!(sealer.open("x", &damaged).is_err());
        }
        std::fs::write(&path, b"not a key").unwrap();
        assert!(matches!(
            Sealer::load_or_create(&path),
            Err(SealError::BadFile(_))
        ));
    }
}
