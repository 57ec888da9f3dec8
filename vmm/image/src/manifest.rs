//! The JSON documents of an image: index, manifest, configuration.
//!
//! Both the [OCI](https://github.com/opencontainers/image-spec) and Docker's schema 2 spellings are
//! read; they differ in their media types only. Unknown fields are left alone, as the
//! specification asks; what is used is checked here, once.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::config::null_is_empty;
use crate::error::excerpt;
use crate::{Digest, ImageConfig, ImageError, Limits};

/// The media types that a registry may answer with.
pub(crate) const MANIFESTS: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

const CONFIGS: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];

/// What layers may be called. How a layer is compressed is seen from its first bytes: builders are
/// known to mislabel them, and the layer's `diff_id` settles what it must unpack to.
const LAYERS: [&str; 10] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
];

/// A pointer from one document to other content.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    #[serde(default)]
    pub(crate) platform: Option<Platform>,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(crate) annotations: BTreeMap<String, String>,
}

impl Descriptor {
    fn is_manifest(&self) -> bool {
        self.media_type.is_empty() || MANIFESTS.contains(&self.media_type.as_str())
    }

    /// The tag of an image in a layout.
    pub(crate) fn tag(&self) -> Option<&str> {
        self.annotations
            .get("org.opencontainers.image.ref.name")
            .map(String::as_str)
    }
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    variant: Option<String>,
}

impl Platform {
    fn is_ours(&self) -> bool {
        self.os == "linux" && self.architecture == "amd64"
    }
}

/// What a manifest's digest can name.
#[derive(Debug)]
pub(crate) enum Document {
    Index(Index),
    Manifest(Manifest),
}

/// Images for several platforms.
#[derive(Debug)]
pub(crate) struct Index(pub(crate) Vec<Descriptor>);

/// One image.
#[derive(Debug)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
}

impl Manifest {
    /// The compressed size of all layers; [`Document::parse`] saw that it fits.
    pub(crate) fn layer_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.size).sum()
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

impl Document {
    /// Reads a manifest or index. A document that could be taken for both is refused: two readers
    /// would run two different images under one digest (CVE-2021-41190).
    pub(crate) fn parse(bytes: &[u8], limits: &Limits) -> Result<Self, ImageError> {
        let raw: RawDocument =
            serde_json::from_slice(bytes).map_err(|error| malformed("manifest", error))?;
        if raw.schema_version != 2 {
            return Err(malformed(
                "manifest",
                format!(
                    "schema version {} is not supported, only 2 is",
                    raw.schema_version
                ),
            ));
        }
        let media_type = raw.media_type.as_deref().unwrap_or_default();
        let claims = |what: &str| media_type.is_empty() || media_type.contains(what);
        match (raw.manifests, raw.config, raw.layers) {
            (Some(manifests), None, None) if claims("index") || claims("list") => {
                if manifests.len() > limits.index_entries {
                    return Err(ImageError::Limit {
                        what: "index entries",
                        limit: limits.index_entries as u64,
                    });
                }
                Ok(Self::Index(Index(manifests)))
            }
            (None, Some(config), Some(layers)) if claims("manifest.v") => {
                Manifest::check(config, layers, limits).map(Self::Manifest)
            }
            _ => Err(malformed(
                "manifest",
                "it is neither an image manifest nor an index",
            )),
        }
    }
}

impl Manifest {
    fn check(
        config: Descriptor,
        layers: Vec<Descriptor>,
        limits: &Limits,
    ) -> Result<Self, ImageError> {
        if !CONFIGS.contains(&config.media_type.as_str()) {
            let kind = excerpt(&config.media_type);
            return Err(malformed(
                "manifest",
                format!("it is no container image but {kind:?}"),
            ));
        }
        if layers.len() > limits.layers {
            return Err(ImageError::Limit {
                what: "layers",
                limit: limits.layers as u64,
            });
        }
        let mut total = 0u64;
        for layer in &layers {
            if !LAYERS.contains(&layer.media_type.as_str()) {
                let kind = excerpt(&layer.media_type);
                return Err(malformed(
                    "manifest",
                    format!("a layer has the media type {kind:?}"),
                ));
            }
            total = total.saturating_add(layer.size);
        }
        if total > limits.unpacked_bytes {
            return Err(ImageError::Limit {
                what: "bytes",
                limit: limits.unpacked_bytes,
            });
        }
        Ok(Self { config, layers })
    }
}

impl Index {
    /// The entry to follow for linux/amd64: one that says so, the plainest variant first, or the
    /// only one that does not say what it is for.
    pub(crate) fn select(&self) -> Result<&Descriptor, ImageError> {
        let candidates = || self.0.iter().filter(|entry| entry.is_manifest());
        let ours = candidates()
            .filter(|entry| entry.platform.as_ref().is_some_and(Platform::is_ours))
            .min_by_key(|entry| entry.platform.as_ref().and_then(|p| p.variant.clone()));
        if let Some(entry) = ours {
            return Ok(entry);
        }
        let mut unsaid = candidates().filter(|entry| entry.platform.is_none());
        match (unsaid.next(), unsaid.next()) {
            (Some(entry), None) => Ok(entry),
            (None, _) => Err(ImageError::Platform {
                found: self.platforms(),
            }),
            (Some(_), Some(_)) => Err(malformed(
                "index",
                "several entries do not say which platform they are for",
            )),
        }
    }

    fn platforms(&self) -> String {
        let mut found: Vec<String> = self
            .0
            .iter()
            .filter_map(|entry| entry.platform.as_ref())
            .map(|platform| format!("{}/{}", platform.os, platform.architecture))
            .collect();
        found.sort();
        found.dedup();
        if found.is_empty() {
            "none".to_owned()
        } else {
            excerpt(&found.join(", "))
        }
    }
}

/// The part of an image's configuration that conversion needs, and [`ImageConfig`].
#[derive(Debug)]
pub(crate) struct Configuration {
    pub(crate) run: ImageConfig,
    /// The digest of each layer's unpacked archive.
    pub(crate) diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
struct RawConfiguration {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default, deserialize_with = "null_is_empty")]
    config: ImageConfig,
    rootfs: RawRootfs,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(default, deserialize_with = "null_is_empty")]
    diff_ids: Vec<Digest>,
}

impl Configuration {
    pub(crate) fn parse(bytes: &[u8], layers: usize) -> Result<Self, ImageError> {
        let raw: RawConfiguration =
            serde_json::from_slice(bytes).map_err(|error| malformed("configuration", error))?;
        let says = |found: &str, wanted: &str| found.is_empty() || found == wanted;
        if !says(&raw.os, "linux") || !says(&raw.architecture, "amd64") {
            let found = excerpt(&format!("{}/{}", raw.os, raw.architecture));
            return Err(ImageError::Platform { found });
        }
        let diff_ids = raw.rootfs.diff_ids;
        if diff_ids.len() != layers {
            return Err(malformed(
                "configuration",
                format!("it lists {} layers, the manifest {layers}", diff_ids.len()),
            ));
        }
        Ok(Self {
            run: raw.config,
            diff_ids,
        })
    }
}

fn malformed(what: &str, reason: impl ToString) -> ImageError {
    ImageError::Document {
        what: what.to_owned(),
        reason: excerpt(&reason.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const A: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

    fn parse(document: &Value) -> Result<Document, ImageError> {
        Document::parse(document.to_string().as_bytes(), &Limits::default())
    }

    fn layer(size: u64) -> Value {
        json!({"mediaType": LAYERS[1], "digest": A, "size": size})
    }

    fn manifest(layers: Value) -> Value {
        json!({"schemaVersion": 2, "mediaType": MANIFESTS[1],
            "config": {"mediaType": CONFIGS[0], "digest": A, "size": 1}, "layers": layers})
    }

    fn index(platforms: &[Option<&str>]) -> Value {
        let entries: Vec<Value> = platforms
            .iter()
            .enumerate()
            .map(|(n, platform)| {
                let mut entry = json!({"mediaType": MANIFESTS[1], "digest": A, "size": n});
                if let Some(platform) = platform {
                    let mut parts = platform.split('/');
                    entry["platform"] = json!({"os": parts.next(), "architecture": parts.next()});
                    if let Some(variant) = parts.next() {
                        entry["platform"]["variant"] = variant.into();
                    }
                }
                entry
            })
            .collect();
        json!({"schemaVersion": 2, "manifests": entries})
    }

    fn selected(platforms: &[Option<&str>]) -> Result<u64, String> {
        match parse(&index(platforms)).unwrap() {
            Document::Index(index) => index
                .select()
                .map(|entry| entry.size)
                .map_err(|error| error.to_string()),
            Document::Manifest(_) => panic!("an index was taken for a manifest"),
        }
    }

    #[test]
    fn selects_linux_amd64() {
        assert_eq!(selected(&[Some("linux/arm64"), Some("linux/amd64")]), Ok(1));
        assert_eq!(
            selected(&[Some("linux/amd64/v3"), Some("linux/amd64")]),
            Ok(1)
        );
        assert_eq!(selected(&[Some("unknown/unknown"), None]), Ok(1));
        assert_eq!(selected(&[None]), Ok(0));
        let error = selected(&[Some("linux/arm64"), Some("windows/amd64")]).unwrap_err();
        assert!(error.contains("linux/arm64, windows/amd64"), "{error}");
        assert!(
            selected(&[None, None])
                .unwrap_err()
                .contains("several entries")
        );
        assert!(selected(&[]).is_err());
    }

    #[test]
    fn refuses_what_could_be_two_things() {
        let mut both = manifest(json!([]));
        both["manifests"] = json!([]);
        assert!(parse(&both).is_err());

        let mut mislabelled = manifest(json!([]));
        mislabelled["mediaType"] = MANIFESTS[0].into();
        assert!(parse(&mislabelled).is_err());
    }

    #[test]
    fn refuses_old_schemas_artifacts_and_unknown_layers() {
        assert!(parse(&json!({"schemaVersion": 1, "fsLayers": []})).is_err());

        let mut artifact = manifest(json!([]));
        artifact["config"]["mediaType"] = "application/vnd.cncf.helm.config.v1+json".into();
        assert!(parse(&artifact).unwrap_err().to_string().contains("helm"));

        let mut strange = layer(1);
        strange["mediaType"] = "text/plain".into();
        assert!(parse(&manifest(json!([strange]))).is_err());
    }

    #[test]
    fn bounds_layers_and_their_sizes() {
        let limits = Limits::default();
        let many: Vec<Value> = (0..=limits.layers).map(|_| layer(1)).collect();
        assert!(matches!(
            parse(&manifest(many.into())),
            Err(ImageError::Limit { .. })
        ));
        let huge = json!([layer(u64::MAX), layer(u64::MAX)]);
        assert!(matches!(
            parse(&manifest(huge)),
            Err(ImageError::Limit { .. })
        ));
        let negative = json!({"mediaType": LAYERS[0], "digest": A, "size": -1});
        assert!(parse(&manifest(json!([negative]))).is_err());
        let entries = vec![None; limits.index_entries + 1];
        assert!(matches!(
            parse(&index(&entries)),
            Err(ImageError::Limit { .. })
        ));
    }

    #[test]
    fn configuration_must_be_for_this_platform_and_these_layers() {
        let parse = |text: &str, layers| Configuration::parse(text.as_bytes(), layers);
        let good =
            format!(r#"{{"os":"linux","architecture":"amd64","rootfs":{{"diff_ids":["{A}"]}}}}"#);
        assert_eq!(parse(&good, 1).unwrap().run, ImageConfig::default());
        assert!(parse(&good, 2).is_err());
        assert!(matches!(
            parse(&good.replace("amd64", "arm64"), 1),
            Err(ImageError::Platform { found }) if found == "linux/arm64"
        ));
        assert!(parse("{}", 0).is_err());
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Document::parse(&bytes, &Limits::default());
            let _ = Configuration::parse(&bytes, 1);
        }

        #[test]
        fn a_damaged_manifest_never_panics(at in 0usize..300, byte in any::<u8>()) {
            let mut bytes = manifest(json!([layer(7)])).to_string().into_bytes();
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = Document::parse(&bytes, &Limits::default());
        }
    }
}
