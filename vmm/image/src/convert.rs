//! From a resolved image to the bytes of its disk.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::resolve::Resolved;
use crate::{ImageConfig, ImageError, Limits, Progress};

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
    pub(crate) fn report(&self, progress: Progress) -> Result<(), ImageError> {
        if self.abandoned.load(Ordering::Relaxed) {
            return Err(ImageError::Cancelled);
        }
        (self.progress)(progress);
        Ok(())
    }
}

pub(crate) fn convert(
    _resolved: &Resolved,
    _limits: &Limits,
    _spool_dir: &Path,
    _disk: &mut File,
    observer: &Observer,
) -> Result<ImageConfig, ImageError> {
    observer.report(Progress::Writing { bytes: 0, total: 0 })?;
    Err(ImageError::Cancelled)
}
