//! From a resolved image to the bytes of its disk.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::apply::Applier;
use crate::layer::Layer;
use crate::layers::{Fetching, Layers};
use crate::manifest::Configuration;
use crate::resolve::{Resolved, read_document};
use crate::spool::Spool;
use crate::{ImageConfig, ImageError, Limits, Progress, erofs};

/// Who watches a conversion: told how far it has come, and able to end it.
pub(crate) struct Observer {
    progress: Box<dyn Fn(Progress) + Send + Sync>,
    abandoned: Arc<AtomicBool>,
}

impl Observer {
    pub(crate) fn new(
        progress: impl Fn(Progress) + Send + Sync + 'static,
        abandoned: Arc<AtomicBool>,
    ) -> Self {
        Self {
            progress: Box::new(progress),
            abandoned,
        }
    }

    /// Reports progress, and fails if nobody wants the result any more.
    fn report(&self, progress: Progress) -> Result<(), ImageError> {
        if self.abandoned.load(Ordering::Relaxed) {
            return Err(ImageError::Cancelled);
        }
        (self.progress)(progress);
        Ok(())
    }
}

/// Reads the image's configuration and layers, and writes its disk.
pub(crate) fn convert(
    image: &Resolved,
    limits: &Limits,
    spool_dir: &Path,
    layers: &Arc<Layers>,
    disk: &mut File,
    observer: &Observer,
) -> Result<ImageConfig, ImageError> {
    let manifest = &image.manifest;
    let configuration = configuration(image, limits)?;
    observer.report(Progress::Resolved {
        digest: image.digest,
        layers: manifest.layers.len(),
        bytes: manifest.layer_bytes(),
    })?;

    let spool = Spool::create(spool_dir)
        .map_err(ImageError::io("create a temporary file in", spool_dir))?;
    let mut applier = Applier::new(spool, limits);
    let fetching = fetch(image, layers, observer)?;
    let mut budget = limits.unpacked_bytes;
    let mut bytes = 0;
    for (n, (descriptor, &diff_id)) in manifest
        .layers
        .iter()
        .zip(&configuration.diff_ids)
        .enumerate()
    {
        let layer = Layer {
            number: n + 1,
            descriptor,
            diff_id,
        };
        let stream: Box<dyn Read> = match &fetching {
            Some(fetching) => Box::new(fetching.reader(n)),
            None => image.blobs.blob(descriptor)?,
        };
        let stream = Observed::new(stream, layer.number, bytes, observer);
        let outcome = layer.read(stream, &mut applier, &mut budget, limits);
        if let Err(ImageError::DigestMismatch { .. } | ImageError::SizeMismatch { .. }) = outcome {
            // A kept layer that has gone bad must not stand in the way of the next attempt.
            layers
                .forget(&descriptor.digest)
                .map_err(ImageError::io("remove", layers.path(&descriptor.digest)))?;
        }
        outcome?;
        if let Some(fetching) = &fetching {
            fetching.applied(n + 1);
        }
        bytes += descriptor.size;
    }
    let (tree, spool) = applier.finish();
    let contents = spool
        .finish()
        .map_err(ImageError::io("write a temporary file in", spool_dir))?;
    erofs::write(&tree, &contents, &image.digest, disk, |bytes, total| {
        observer.report(Progress::Writing { bytes, total })
    })?;
    Ok(configuration.run)
}

/// Has the registry give all of an image that is here already to who asks for it, and keeps nothing but the proof of
/// it. Of a layout there is nothing to prove: it is at hand.
pub(crate) fn prove(
    image: &Resolved,
    limits: &Limits,
    layers: &Arc<Layers>,
    observer: &Observer,
) -> Result<(), ImageError> {
    configuration(image, limits)?;
    let Some(fetching) = fetch(image, layers, observer)? else {
        return Ok(());
    };
    for n in 0..image.manifest.layers.len() {
        let what = format!("layer {}", n + 1);
        io::copy(&mut fetching.reader(n), &mut io::sink())
            .map_err(|error| ImageError::from_read(error, &what))?;
        fetching.applied(n + 1);
    }
    Ok(())
}

fn configuration(image: &Resolved, limits: &Limits) -> Result<Configuration, ImageError> {
    let config = &image.manifest.config;
    let what = "the image's configuration";
    let text = read_document(image.blobs.blob(config)?, config, what, limits)?;
    Configuration::parse(&text, image.manifest.layers.len())
}

/// Begins to fetch the layers of a registry's image.
fn fetch(
    image: &Resolved,
    layers: &Arc<Layers>,
    observer: &Observer,
) -> Result<Option<Fetching>, ImageError> {
    let Some(asker) = &image.asker else {
        return Ok(None);
    };
    let wanted = &image.manifest.layers;
    Fetching::start(layers, &image.blobs, asker, wanted, &observer.abandoned).map(Some)
}

/// A stream that tells the observer how much of it was read.
struct Observed<'a, R> {
    inner: R,
    layer: usize,
    bytes: u64,
    reported: u64,
    observer: &'a Observer,
}

impl<'a, R: Read> Observed<'a, R> {
    /// Bytes between two reports.
    const STEP: u64 = 256 << 10;

    fn new(inner: R, layer: usize, bytes: u64, observer: &'a Observer) -> Self {
        Self {
            inner,
            layer,
            bytes,
            reported: bytes,
            observer,
        }
    }
}

impl<R: Read> Read for Observed<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.bytes += read as u64;
        if read == 0 || self.bytes - self.reported >= Self::STEP {
            self.reported = self.bytes;
            let progress = Progress::Reading {
                layer: self.layer,
                bytes: self.bytes,
            };
            self.observer.report(progress).map_err(io::Error::other)?;
        }
        Ok(read)
    }
}
