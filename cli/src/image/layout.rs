//! An OCI image layout on disk (image-spec, `image-layout.md`), as far as uploading needs it.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

/// One image in a layout.
#[derive(Debug)]
pub struct Layout {
    dir: PathBuf,
    /// The image's manifest.
    pub manifest: Descriptor,
    /// Everything the manifest points to.
    pub blobs: Vec<Descriptor>,
}

/// A blob by its content.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    pub media_type: String,
    /// `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// Its length in bytes.
    pub size: u64,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
    #[serde(default)]
    platform: Option<Platform>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Debug, Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// Indexes and manifests larger than this are refused (the distribution spec names 4 MiB).
const MAX_JSON_BYTES: u64 = 4 << 20;
/// Indexes may point to indexes; a layout made by tools has one or two levels.
const MAX_DEPTH: u32 = 4;

impl Layout {
    /// Opens a layout and chooses the image with this tag; without one there must be just one.
    pub fn open(dir: &Path, tag: Option<&str>) -> Result<Self> {
        let index = dir.join("index.json");
        let index: Index = read_json(&index)
            .with_context(|| format!("{} is not an OCI image layout", dir.display()))?;
        let named = |d: &&Descriptor| match tag {
            Some(tag) => d
                .annotations
                .get("org.opencontainers.image.ref.name")
                .is_some_and(|n| n == tag),
            None => true,
        };
        let mut found = index.manifests.iter().filter(named);
        let (Some(first), rest) = (found.next(), found.next()) else {
            bail!(
                "{} has no image{}",
                dir.display(),
                tag.map(|t| format!(" \"{t}\"")).unwrap_or_default()
            );
        };
        if rest.is_some() {
            bail!(
                "{} has several images; add the tag: oci:{}:TAG",
                dir.display(),
                dir.display()
            );
        }
        let mut manifest = first.clone();
        let mut depth = 0;
        while manifest.media_type.ends_with("image.index.v1+json") {
            depth += 1;
            if depth > MAX_DEPTH {
                bail!("{} nests its indexes too deeply", dir.display());
            }
            let inner: Index = read_json(&blob(dir, &manifest.digest)?)?;
            manifest = inner
                .manifests
                .into_iter()
                .find(is_ours)
                .context("it has no linux/amd64 image")?;
        }
        let parsed: Manifest = read_json(&blob(dir, &manifest.digest)?)?;
        let blobs = parsed.layers.into_iter().chain([parsed.config]).collect();
        Ok(Self {
            dir: dir.to_owned(),
            manifest,
            blobs,
        })
    }

    /// Where a blob is.
    pub fn blob(&self, digest: &str) -> Result<PathBuf> {
        blob(&self.dir, digest)
    }
}

fn is_ours(d: &Descriptor) -> bool {
    d.platform
        .as_ref()
        .is_some_and(|p| p.os == "linux" && p.architecture == "amd64")
}

fn blob(dir: &Path, digest: &str) -> Result<PathBuf> {
    match digest.strip_prefix("sha256:") {
        Some(hex) if hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()) => {
            Ok(dir.join("blobs/sha256").join(hex))
        }
        _ => bail!("\"{digest}\" is not a sha256 digest"),
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let cannot = || format!("{} cannot be read", path.display());
    if std::fs::metadata(path).with_context(cannot)?.len() > MAX_JSON_BYTES {
        bail!("{} is larger than 4 MiB", path.display());
    }
    serde_json::from_slice(&std::fs::read(path).with_context(cannot)?)
        .with_context(|| format!("{} is not right", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_cannot_leave_the_layout() {
        let dir = Path::new("/layout");
        for bad in [
            "sha256:../../etc/passwd",
            "md5:00",
            "",
            &format!("sha256:{}", "g".repeat(64)),
        ] {
            assert!(blob(dir, bad).is_err(), "{bad}");
        }
        let good = format!("sha256:{}", "a".repeat(64));
        assert!(
            blob(dir, &good)
                .unwrap()
                .starts_with("/layout/blobs/sha256")
        );
    }

    #[test]
    fn a_directory_that_is_no_layout_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = crate::output::chain(&Layout::open(dir.path(), None).unwrap_err());
        assert!(error.contains("not an OCI image layout"), "{error}");
    }
}
