//! An OCI image layout on disk (image-spec, `image-layout.md`), as far as uploading needs it.

use std::collections::{BTreeMap, BTreeSet};
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
    /// The TCP ports that it says its app listens on.
    pub exposed: BTreeSet<u16>,
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
    annotations: BTreeMap<String, String>,
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

/// An image's configuration.
#[derive(Debug, Deserialize)]
struct Config {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Option<Run>,
}

#[derive(Debug, Deserialize)]
struct Run {
    #[serde(default, rename = "ExposedPorts")]
    exposed_ports: Option<BTreeMap<String, serde_json::Value>>,
}

impl Config {
    fn exposed(&self) -> BTreeSet<u16> {
        let run = self.config.as_ref();
        let listed = run.and_then(|run| run.exposed_ports.as_ref());
        let names = listed.into_iter().flat_map(BTreeMap::keys);
        names.flat_map(|name| super::expose::ports(name)).collect()
    }
}

/// Indexes and manifests larger than this are refused (the distribution spec names 4 MiB).
const MAX_JSON_BYTES: u64 = 4 << 20;
/// Indexes may point to indexes; a layout made by tools has one or two levels.
const MAX_DEPTH: u32 = 4;

impl Layout {
    /// The layout that an image reference names: `oci:DIRECTORY[:TAG]`. `None` for an image in a registry.
    pub fn named(reference: &str) -> Result<Option<Self>> {
        let Some(local) = reference.strip_prefix("oci:") else {
            return Ok(None);
        };
        let (dir, tag) = split_tag(local);
        Self::open(&dir, tag).map(Some)
    }

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
        while manifest.is_index() {
            depth += 1;
            if depth > MAX_DEPTH {
                bail!("{} nests its indexes too deeply", dir.display());
            }
            let inner: Index = read_json(&blob(dir, &manifest.digest)?)?;
            manifest = choose(dir, inner.manifests)?;
        }
        let parsed: Manifest = read_json(&blob(dir, &manifest.digest)?)?;
        let config: Config = read_json(&blob(dir, &parsed.config.digest)?)?;
        let blobs = parsed.layers.into_iter().chain([parsed.config]).collect();
        Ok(Self {
            dir: dir.to_owned(),
            manifest,
            blobs,
            exposed: config.exposed(),
        })
    }

    /// Where a blob is.
    pub fn blob(&self, digest: &str) -> Result<PathBuf> {
        blob(&self.dir, digest)
    }
}

impl Descriptor {
    /// An OCI index, or Docker's manifest list: one image in variants.
    fn is_index(&self) -> bool {
        self.media_type.ends_with(".image.index.v1+json")
            || self.media_type.ends_with(".manifest.list.v2+json")
    }
}

/// The variant for Machines. As a host does that reads the same index: one that says so, else one that says nothing
/// of its platform and whose own configuration does, or is silent too.
fn choose(dir: &Path, variants: Vec<Descriptor>) -> Result<Descriptor> {
    let ours = |os: &str, architecture: &str| os == "linux" && architecture == "amd64";
    let said = |d: &&Descriptor| {
        let platform = d.platform.as_ref();
        platform.is_some_and(|p| ours(&p.os, &p.architecture))
    };
    if let Some(found) = variants.iter().find(said) {
        return Ok(found.clone());
    }
    for variant in variants.iter().filter(|d| d.platform.is_none()) {
        if variant.is_index() {
            return Ok(variant.clone());
        }
        let manifest: Manifest = read_json(&blob(dir, &variant.digest)?)?;
        let config: Config = read_json(&blob(dir, &manifest.config.digest)?)?;
        if config.os.is_empty() || ours(&config.os, &config.architecture) {
            return Ok(variant.clone());
        }
    }
    bail!("{} has no linux/amd64 image", dir.display())
}

/// `DIRECTORY[:TAG]`; a colon inside a path component is not a tag.
fn split_tag(local: &str) -> (PathBuf, Option<&str>) {
    match local.rsplit_once(':') {
        Some((dir, tag)) if !tag.contains('/') && !Path::new(local).is_dir() => {
            (dir.into(), Some(tag))
        }
        _ => (local.into(), None),
    }
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
    use serde_json::json;
    use sha2::Digest as _;

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

    /// Made of the digests of those before it.
    type Document<'a> = &'a dyn Fn(&[String]) -> serde_json::Value;

    /// A layout of these blobs, whose index points to the last one, written as one of this type.
    fn layout(documents: &[(&str, Document<'_>)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let blobs = dir.path().join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        let mut digests = Vec::new();
        let mut last = serde_json::Value::Null;
        for (media_type, document) in documents {
            let content = document(&digests).to_string();
            let hex = hex::encode(sha2::Sha256::digest(&content));
            std::fs::write(blobs.join(&hex), &content).unwrap();
            digests.push(format!("sha256:{hex}"));
            last = json!({"mediaType": media_type, "digest": format!("sha256:{hex}"), "size": content.len()});
        }
        let index = json!({"schemaVersion": 2, "manifests": [last]});
        std::fs::write(dir.path().join("index.json"), index.to_string()).unwrap();
        dir
    }

    const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

    fn config(architecture: &str, port: u16) -> serde_json::Value {
        json!({"architecture": architecture, "os": "linux", "config": {"ExposedPorts": {format!("{port}/tcp"): {}}}})
    }

    fn manifest(config: &str) -> serde_json::Value {
        json!({"config": {"mediaType": CONFIG, "digest": config, "size": 2}, "layers": []})
    }

    fn entry(digest: &str, platform: Option<serde_json::Value>) -> serde_json::Value {
        let mut entry = json!({"mediaType": MANIFEST, "digest": digest, "size": 2});
        if let Some(platform) = platform {
            entry["platform"] = platform;
        }
        entry
    }

    #[test]
    fn an_index_that_does_not_name_platforms_is_read_by_what_it_leads_to() {
        let dir = layout(&[
            (CONFIG, &|_| config("arm64", 1)),
            (CONFIG, &|_| config("amd64", 3000)),
            (MANIFEST, &|d| manifest(&d[0])),
            (MANIFEST, &|d| manifest(&d[1])),
            (
                INDEX,
                &|d| json!({"manifests": [entry(&d[2], None), entry(&d[3], None)]}),
            ),
        ]);
        let layout = Layout::open(dir.path(), None).unwrap();
        assert_eq!(layout.exposed, [3000].into());
    }

    #[test]
    fn dockers_manifest_list_is_an_index_too() {
        let amd64 = json!({"architecture": "amd64", "os": "linux"});
        let arm64 = json!({"architecture": "arm64", "os": "linux"});
        let dir = layout(&[
            (CONFIG, &|_| config("amd64", 80)),
            (MANIFEST, &|d| manifest(&d[0])),
            (
                DOCKER_LIST,
                &|d| json!({"manifests": [entry("sha256:00", Some(arm64.clone())), entry(&d[1], Some(amd64.clone()))]}),
            ),
        ]);
        assert_eq!(Layout::open(dir.path(), None).unwrap().exposed, [80].into());
        let foreign = layout(&[(
            INDEX,
            &|_| json!({"manifests": [entry("sha256:00", Some(arm64.clone()))]}),
        )]);
        let error = Layout::open(foreign.path(), None).unwrap_err().to_string();
        assert!(error.contains("no linux/amd64 image"), "{error}");
    }

    #[test]
    fn a_directory_that_is_no_layout_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = crate::output::chain(&Layout::open(dir.path(), None).unwrap_err());
        assert!(error.contains("not an OCI image layout"), "{error}");
    }
}
