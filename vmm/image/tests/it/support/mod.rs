//! Images to convert, and ways to look at what came out.

pub mod compare;
pub mod layer;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use tern_image::{Digest, Image, ImageError, ImageStore, Limits, Source};

pub use layer::Layer;

/// How a layer travels.
#[derive(Clone, Copy, Debug)]
pub enum Packing {
    Plain,
    Gzip,
    /// Several gzip members in a row, as `pigz` and eStargz write.
    GzipMembers,
    Zstd,
}

impl Packing {
    pub fn pack(self, bytes: &[u8]) -> Vec<u8> {
        let gzip = |bytes: &[u8]| {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        };
        match self {
            Self::Plain => bytes.to_vec(),
            Self::Gzip => gzip(bytes),
            Self::GzipMembers => bytes.chunks(700).flat_map(gzip).collect(),
            Self::Zstd => zstd::encode_all(bytes, 1).unwrap(),
        }
    }

    fn media_type(self) -> &'static str {
        match self {
            Self::Plain => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip | Self::GzipMembers => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// An image in memory: its blobs, and the JSON above them, free to be spoiled.
pub struct TestImage {
    pub blobs: BTreeMap<Digest, Vec<u8>>,
    pub config: Value,
    pub layers: Vec<Value>,
}

impl TestImage {
    /// An image of `layers`, gzipped.
    pub fn new(layers: impl IntoIterator<Item = Layer>) -> Self {
        let layers: Vec<Vec<u8>> = layers.into_iter().map(Layer::bytes).collect();
        Self::packed(&layers, Packing::Gzip)
    }

    pub fn packed(layers: &[Vec<u8>], packing: Packing) -> Self {
        let diff_ids: Vec<Digest> = layers.iter().map(|layer| Digest::of(layer)).collect();
        let mut image = Self {
            blobs: BTreeMap::new(),
            config: json!({
                "os": "linux", "architecture": "amd64",
                "config": {"Entrypoint": ["/bin/app"], "Cmd": ["--serve"], "Env": ["A=b"],
                    "WorkingDir": "/srv", "User": "app", "ExposedPorts": {"80/tcp": {}}},
                "rootfs": {"type": "layers", "diff_ids": diff_ids},
            }),
            layers: Vec::new(),
        };
        for layer in layers {
            let packed = packing.pack(layer);
            let size = packed.len();
            let digest = image.add(packed);
            image
                .layers
                .push(json!({"mediaType": packing.media_type(), "digest": digest, "size": size}));
        }
        image
    }

    pub fn add(&mut self, blob: impl Into<Vec<u8>>) -> Digest {
        let blob = blob.into();
        let digest = Digest::of(&blob);
        self.blobs.insert(digest, blob);
        digest
    }

    /// Adds a document and says how to point to it.
    pub fn describe(&mut self, media_type: &str, document: &Value) -> Value {
        let text = document.to_string();
        json!({"mediaType": media_type, "size": text.len(), "digest": self.add(text)})
    }

    /// Adds the configuration and the manifest.
    pub fn manifest(&mut self) -> Value {
        let config = self.config.clone();
        let config = self.describe("application/vnd.oci.image.config.v1+json", &config);
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": self.layers});
        self.describe("application/vnd.oci.image.manifest.v1+json", &manifest)
    }

    /// Adds an index of `entries`.
    pub fn index(&mut self, entries: &[Value]) -> Value {
        let index = json!({"schemaVersion": 2, "manifests": entries});
        self.describe("application/vnd.oci.image.index.v1+json", &index)
    }

    /// Writes a layout whose index holds `entries`.
    pub fn write(&self, dir: &Path, entries: &[Value]) -> Source {
        let blobs = dir.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        for (digest, blob) in &self.blobs {
            std::fs::write(blobs.join(digest.hex()), blob).unwrap();
        }
        std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let index = json!({"schemaVersion": 2, "manifests": entries});
        std::fs::write(dir.join("index.json"), index.to_string()).unwrap();
        Source::Layout {
            path: dir.to_owned(),
            tag: None,
        }
    }

    /// Writes a layout of this one image.
    pub fn layout(mut self, dir: &Path) -> Source {
        let manifest = self.manifest();
        self.write(dir, &[manifest])
    }
}

/// A directory with a layout and a store in it.
pub struct Workshop {
    dir: tempfile::TempDir,
    pub limits: Limits,
}

impl Workshop {
    pub fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            limits: Limits::default(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn store(&self) -> ImageStore {
        ImageStore::open(self.path("store"), self.limits.clone()).unwrap()
    }

    /// The layers that the store keeps, by name; without those that are on their way.
    pub fn layers(&self) -> BTreeMap<String, Vec<u8>> {
        let Ok(entries) = std::fs::read_dir(self.path("store/layers")) else {
            return BTreeMap::new();
        };
        entries
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name().into_string().unwrap(), entry.path()))
            .filter(|(name, _)| !name.starts_with(".tmp-"))
            .map(|(name, path)| (name, std::fs::read(path).unwrap()))
            .collect()
    }

    pub fn layout(&self, image: TestImage) -> Source {
        image.layout(&self.path("layout"))
    }

    pub async fn convert(&self, image: TestImage) -> Result<Image, ImageError> {
        let source = self.layout(image);
        self.store().ensure(&source, |_| ()).await
    }

    /// Converts, and lets `fsck.erofs` check the disk and extract it.
    pub async fn extract(&self, image: TestImage) -> PathBuf {
        let image = self.convert(image).await.unwrap();
        self.extract_disk(&image.disk)
    }

    pub fn extract_disk(&self, disk: &Path) -> PathBuf {
        let extracted = self.path("extracted");
        run(Command::new("fsck.erofs")
            .arg(format!("--extract={}", extracted.display()))
            .arg("--preserve")
            .arg(disk));
        extracted
    }

    /// Converts what must be refused, checks that nothing is left of it, and returns the message.
    pub async fn refusal(&self, image: TestImage) -> String {
        let source = self.layout(image);
        self.refusal_of(&source).await
    }

    pub async fn refusal_of(&self, source: &Source) -> String {
        let error = self
            .store()
            .ensure(source, |_| ())
            .await
            .expect_err("it was accepted");
        let left: Vec<_> = std::fs::read_dir(self.path("store"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .filter(|name| name != "layers" && name != "proofs")
            .collect();
        assert!(left.is_empty(), "left behind: {left:?}");
        for (name, content) in self.layers() {
            assert_eq!(
                name,
                Digest::of(&content).file_stem(),
                "a layer that is not one"
            );
        }
        error.to_string()
    }
}

/// What `dump.erofs` says of one file of a disk: the word that follows `field`.
pub fn dump(disk: &Path, path: &str, field: &str) -> String {
    let output = run(Command::new("dump.erofs")
        .arg(format!("--path={path}"))
        .arg(disk));
    let text = String::from_utf8(output.stdout).unwrap();
    let mut words = text.split_whitespace().skip_while(|word| *word != field);
    words
        .nth(1)
        .unwrap_or_else(|| panic!("no {field} in {text}"))
        .to_owned()
}

/// The whole mode of a file of a disk, which neither `dump.erofs` nor `fsck.erofs` 1.5 shows: the
/// sixteen bits at byte 4 of its inode. The inodes start in the second block.
pub fn mode(disk: &Path, path: &str) -> u16 {
    let nid: u64 = dump(disk, path, "NID:").parse().unwrap();
    let mut mode = [0; 2];
    let disk = std::fs::File::open(disk).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&disk, &mut mode, 4096 + nid * 32 + 4).unwrap();
    u16::from_le_bytes(mode)
}

/// Runs a tool that must be installed and must succeed.
pub fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| {
        panic!(
            "{command:?}: {error}. These tests need: apt-get install erofs-utils buildah tar mount kmod"
        )
    });
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}
