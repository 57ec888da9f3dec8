//! The way from layers to a disk, for the fuzzer: what an image's author decides, and nothing else.

use std::io;

use crate::apply::Applier;
use crate::layer::Layer;
use crate::manifest::Descriptor;
use crate::spool::Spool;
use crate::verify::Verified;
use crate::{Digest, ImageError, Limits, erofs};

/// Unpacks `layers`, as they come from a registry, in order, and writes the disk they make. Digests are
/// right by construction: nobody reaches the code behind them with a wrong one.
pub fn convert(layers: &[&[u8]], limits: &Limits) -> Result<Vec<u8>, ImageError> {
    let dir = std::env::temp_dir();
    let io_error = |error: io::Error| ImageError::io("use", &dir)(error);
    let mut applier = Applier::new(Spool::create(&dir).map_err(io_error)?, limits);
    let mut budget = limits.unpacked_bytes;
    for (index, bytes) in layers.iter().enumerate() {
        let digest = Digest::of(bytes);
        let size = bytes.len() as u64;
        let descriptor = Descriptor {
            media_type: String::new(),
            digest,
            size,
            platform: None,
            annotations: Default::default(),
        };
        let layer = Layer {
            number: index + 1,
            descriptor: &descriptor,
            diff_id: digest,
        };
        let mut verified = Verified::new(*bytes, digest, size, "a layer");
        layer.unpack(&mut verified, &mut applier, &mut budget, limits)?;
    }
    let (tree, spool) = applier.finish();
    let contents = spool.finish().map_err(io_error)?;
    let mut disk = tempfile::tempfile().map_err(io_error)?;
    erofs::write(&tree, &contents, &Digest::of(b""), &mut disk, |_, _| Ok(()))?;
    let mut bytes = Vec::new();
    io::Seek::rewind(&mut disk).map_err(io_error)?;
    io::Read::read_to_end(&mut disk, &mut bytes).map_err(io_error)?;
    Ok(bytes)
}
