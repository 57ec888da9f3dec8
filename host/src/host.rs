//! What all Machines of a host share.

use std::sync::Arc;

use tern_catalog::{AppName, AppSecrets, Machine, MachineId, NetworkId, View};
use tern_image::{
    Credentials, Digest, Image, ImageError, ImageStore, Progress, Reference, RegistryOptions,
    Source,
};

use crate::bundle::Secrets;
use crate::capacity::Capacity;
use crate::cgroup::Groups;
use crate::config::HostConfig;
use crate::departures::Departures;
use crate::disk::Blank;
use crate::disk_space::room_for;
use crate::machine::core::BootFailure;
use crate::metrics::Metrics;
use crate::network::Network;
use crate::vm::AllFiles;
use crate::volumes::Volumes;

/// What all Machines of a host share.
pub(crate) struct Host {
    pub(crate) config: HostConfig,
    pub(crate) view: View,
    pub(crate) images: ImageStore,
    pub(crate) network: Network,
    pub(crate) blank: Blank,
    pub(crate) volumes: Volumes,
    pub(crate) groups: Groups,
    pub(crate) capacity: Arc<Capacity>,
    pub(crate) files: AllFiles,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) departures: Departures,
    /// The boot of the host's kernel.
    pub(crate) boot_id: String,
}

impl Host {
    /// What is wanted of a Machine.
    pub(crate) fn machine(&self, id: &MachineId) -> Option<Arc<Machine>> {
        self.view.snapshot().machines.get(id).cloned()
    }

    /// What an app has set of secrets, of one version.
    pub(crate) fn secrets(&self, app: &AppName) -> Result<Secrets, String> {
        let Some(kept) = self.view.snapshot().secrets.get(app).cloned() else {
            return Ok(Secrets::new());
        };
        let opened = kept.secrets.iter().map(|(name, secret)| {
            let opener = self.config.secrets.as_ref();
            let opener = opener.ok_or("this host has no key for secrets")?;
            let value = opener.open(&AppSecrets::purpose(app, name), &secret.sealed)?;
            let value = String::from_utf8(value).map_err(|_| "it is not text".to_owned())?;
            Ok((name.clone(), value))
        });
        let opened: Result<Secrets, String> = opened.collect();
        opened.map_err(|error| format!("the app's secrets cannot be read: {error}"))
    }

    /// The image with this name, for a Machine of this network. `known` is the digest that the name stood for when the
    /// Machine started last, of the same config: it has been given that image, whatever its registry says today.
    pub(crate) async fn image(
        &self,
        name: &str,
        network: NetworkId,
        known: Option<&str>,
    ) -> Result<Image, BootFailure> {
        let failed = |error: &ImageError, lasting| BootFailure {
            reason: format!("the image {name} cannot be had: {error}"),
            exit: None,
            lasting,
            disk_ready: false,
        };
        let known: Option<Digest> = known.and_then(|digest| digest.parse().ok());
        if let Some(digest) = known
            && let Some(image) = self.images.get(&digest).map_err(|e| failed(&e, false))?
        {
            return Ok(image);
        }
        let source = self
            .source(name, network, known)
            .map_err(|e| failed(&e, true))?;
        room_for(&self.config.data_dir, 0).map_err(|error| {
            BootFailure::passing(format!("the image {name} cannot be had: {error}"))
        })?;
        let named = name.to_owned();
        let progress = move |progress| match progress {
            Progress::Resolved {
                digest,
                layers,
                bytes,
            } => {
                tracing::info!(image = named, %digest, layers, bytes, "fetching an image");
            }
            progress => tracing::trace!(image = named, ?progress, "image"),
        };
        let image = self.images.ensure(&source, progress).await;
        image.map_err(|e| failed(&e, false))
    }

    /// Where an image is, by the registries that this host knows, and for whom.
    pub(crate) fn source(
        &self,
        name: &str,
        network: NetworkId,
        known: Option<Digest>,
    ) -> Result<Source, ImageError> {
        let mut reference: Reference = name.parse()?;
        let mut options = RegistryOptions {
            anywhere: self.config.private_registries,
            // A network is one organization's for ever: its number is not given out again, as a name may be.
            on_behalf_of: format!("network {network}"),
            ..RegistryOptions::default()
        };
        if let Some(registry) = self.config.registries.get(reference.host()) {
            // The operator named it, and where it is.
            options.anywhere = true;
            options.trusted = true;
            options.insecure = registry.insecure;
            options.credentials = registry
                .credentials
                .clone()
                .map(|(username, password)| Credentials { username, password });
            if !registry.address.is_empty() {
                let whole = reference.to_string();
                let rest = &whole[reference.host().len()..];
                reference = format!("{}{rest}", registry.address).parse()?;
            }
        }
        if let Some(digest) = known {
            reference = reference.with_digest(digest);
        }
        Ok(Source::Registry { reference, options })
    }
}
