//! Image references: `[host[:port]/]name[:tag][@sha256:…]`.
//!
//! The grammar is that of the
//! [distribution specification](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pulling-manifests),
//! with Docker's rules for names without a host. It is strict, because the parts become parts of
//! URLs.

use std::fmt;
use std::str::FromStr;

use crate::error::excerpt;
use crate::{Digest, ImageError};

const DEFAULT_HOST: &str = "docker.io";
const DEFAULT_TAG: &str = "latest";
/// Longest repository name and tag that registries take.
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// The name of an image in a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// The registry's host, with its port if one was given.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository, like `library/debian`.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if the reference names one (a reference with neither tag nor digest is `latest`).
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if the reference is pinned to one.
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The same image, pinned to what it is now.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self {
            digest: Some(digest),
            ..self.clone()
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, ImageError> {
        parse(text).map_err(|reason| ImageError::InvalidReference {
            value: excerpt(text),
            reason,
        })
    }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => {
            let digest = digest
                .parse()
                .map_err(|_| "what follows @ must be a sha256 digest")?;
            (name, Some(digest))
        }
        None => (text, None),
    };
    let (host, rest) = match name.split_once('/') {
        Some((first, rest)) if names_a_host(first) => (first, rest),
        _ => (DEFAULT_HOST, name),
    };
    let (repository, tag) = match rest.rsplit_once(':') {
        Some((repository, tag)) => (repository, Some(tag)),
        None => (rest, None),
    };
    check_host(host)?;
    check_repository(repository)?;
    tag.map(check_tag).transpose()?;

    let official = host == DEFAULT_HOST && !repository.contains('/');
    Ok(Reference {
        host: host.to_owned(),
        repository: if official {
            format!("library/{repository}")
        } else {
            repository.to_owned()
        },
        tag: match (tag, digest) {
            (None, None) => Some(DEFAULT_TAG.to_owned()),
            (tag, _) => tag.map(str::to_owned),
        },
        digest,
    })
}

/// Docker's rule: `debian/x` is on Docker Hub, `debian.org/x`, `host:5000/x` and `localhost/x` are not.
fn names_a_host(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':'])
}

fn check_host(host: &str) -> Result<(), &'static str> {
    let bracketed = host.strip_prefix('[').and_then(|rest| rest.split_once(']'));
    let (name_ok, port) = match bracketed {
        Some((address, rest)) => (
            address.parse::<std::net::Ipv6Addr>().is_ok(),
            if rest.is_empty() {
                None
            } else {
                Some(rest.strip_prefix(':').unwrap_or(""))
            },
        ),
        None => {
            let (name, port) = match host.split_once(':') {
                Some((name, port)) => (name, Some(port)),
                None => (host, None),
            };
            let label = |label: &str| {
                !label.is_empty()
                    && label
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || b == b'-')
                    && !label.starts_with('-')
                    && !label.ends_with('-')
            };
            (name.len() <= MAX_NAME && name.split('.').all(label), port)
        }
    };
    if !name_ok {
        return Err("the host name is malformed");
    }
    match port {
        Some(port) if port.starts_with('+') || !port.parse::<u16>().is_ok_and(|p| p != 0) => {
            Err("the port must be a number from 1 to 65535")
        }
        _ => Ok(()),
    }
}

fn check_repository(repository: &str) -> Result<(), &'static str> {
    if repository.is_empty() || repository.len() > MAX_NAME {
        return Err("the repository name must have 1 to 255 characters");
    }
    let well_formed = |part: &str| {
        let mut previous = b'.'; // a separator: none may come first
        let mut run = 1;
        for &byte in part.as_bytes() {
            match byte {
                b'a'..=b'z' | b'0'..=b'9' => run = 0,
                // `.`, `_`, `__` or any number of `-` may stand between letters and digits.
                b'.' | b'_' | b'-' => {
                    run += 1;
                    let allowed = run == 1
                        || (byte == b'-' && previous == b'-')
                        || (byte == b'_' && previous == b'_' && run == 2);
                    if !allowed {
                        return false;
                    }
                }
                _ => return false,
            }
            previous = byte;
        }
        run == 0 && !part.is_empty()
    };
    if repository.split('/').all(well_formed) {
        Ok(())
    } else {
        Err("repository names are lower-case letters and digits with single . _ or - between them")
    }
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let well_formed = !tag.is_empty()
        && tag.len() <= MAX_TAG
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
        && tag.bytes().next().is_some_and(word);
    if well_formed {
        Ok(())
    } else {
        Err("tags are up to 128 letters, digits, _ . and -")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn fills_in_what_is_left_out() {
        for (given, meant) in [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:12", "docker.io/library/debian:12"),
            ("me/app", "docker.io/me/app:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("127.0.0.1:5000/a/b:v1", "127.0.0.1:5000/a/b:v1"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
            (
                "registry.example/a__b/c-d.e",
                "registry.example/a__b/c-d.e:latest",
            ),
        ] {
            assert_eq!(given.parse::<Reference>().unwrap().to_string(), meant);
        }
    }

    #[test]
    fn keeps_a_digest_and_adds_no_tag_to_it() {
        let reference: Reference = format!("host:1/app@{DIGEST}").parse().unwrap();
        assert_eq!(reference.to_string(), format!("host:1/app@{DIGEST}"));
        assert_eq!(reference.tag(), None);
        let both: Reference = format!("host:1/app:v1@{DIGEST}").parse().unwrap();
        assert_eq!(
            (both.tag(), both.digest()),
            (Some("v1"), Some(DIGEST.parse().unwrap()))
        );
    }

    #[test]
    fn refuses_what_could_mean_something_else_in_a_url() {
        for bad in [
            "",
            ":tag",
            "a:",
            "a:-x",
            "A",
            "a//b",
            "/a",
            "a/",
            "a/../b",
            "a..b",
            "a___b",
            "-a",
            "a-",
            "host:/a",
            "host:0/a",
            "host:99999/a",
            "host:+1/a",
            "user@host.x/a",
            "ho st.x/a",
            "a?b",
            "a#b",
            "a%2e/b",
            "[::1/a",
            "[zz]:1/a",
            "[::1]x/a",
            "a@sha256:12",
            ".x/a",
            "x./a",
            "a\0",
            "ä",
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad:?} was accepted");
        }
        assert!("a".repeat(256).parse::<Reference>().is_err());
    }

    proptest! {
        #[test]
        fn never_panics_and_reads_back_what_it_prints(text in "\\PC{0,64}|[a-z0-9.:/@_-]{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
            }
        }
    }
}
