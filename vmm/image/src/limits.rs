//! How much an image may ask of the host.

/// Limits of one conversion. Whoever makes an image is not trusted: each limit bounds memory, disk
/// or time that the image's author could otherwise choose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one manifest, index or configuration document. Registries refuse more than 4 MiB.
    pub document_bytes: u64,
    /// Layers of an image. Docker itself stops at 127.
    pub layers: usize,
    /// Entries of an index, and indexes within indexes.
    pub index_entries: usize,
    /// How deep an index may point to another index.
    pub index_depth: usize,
    /// Unpacked bytes of all layers together, tar framing included. Compressed layers may not
    /// claim more than this either.
    pub unpacked_bytes: u64,
    /// Tar entries of all layers together.
    pub entries: u64,
    /// Bytes of names, link targets and extended attributes that are held in memory.
    pub metadata_bytes: u64,
    /// Bytes of one path, and of one symbolic link's target (Linux's `PATH_MAX`).
    pub path_bytes: usize,
    /// Directories above one entry.
    pub depth: usize,
    /// Bytes of all extended attributes of one file, names included; at most 128 KiB, whatever
    /// this says, because EROFS holds 256 KiB with its framing.
    pub xattr_bytes: usize,
    /// Unpacked over compressed bytes of one layer, enforced after [`Limits::RATIO_FROM`] unpacked
    /// bytes: short runs of zeros are normal, gigabytes of them are not.
    pub ratio: u64,
}

impl Limits {
    /// Unpacked bytes of a layer from which on its compression ratio is judged.
    pub const RATIO_FROM: u64 = 256 << 20;
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            document_bytes: 4 << 20,
            layers: 256,
            index_entries: 256,
            index_depth: 4,
            unpacked_bytes: 16 << 30,
            entries: 1_000_000,
            metadata_bytes: 256 << 20,
            path_bytes: 4095,
            depth: 256,
            xattr_bytes: 64 << 10,
            ratio: 200,
        }
    }
}
