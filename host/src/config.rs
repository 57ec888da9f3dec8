//! What the agent of one server is given.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tern_catalog::{HostId, SealedKey};
use thiserror::Error;

use crate::capacity::Overcommit;
use crate::network::AllowedPrefix;
use crate::page_cache::SnapshotCache;

/// What the agent of one server is given.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// This host: the agent looks after its Machines and no others.
    pub host: HostId,
    /// Where Machines (`machines/`), volumes (`volumes/`), converted images (`images/`) and blank disks
    /// are kept. Paths
    /// under it must stay short: a Unix socket's has 108 bytes.
    pub data_dir: PathBuf,
    /// The monitor, `tern-vmm`.
    pub vmm_binary: PathBuf,
    /// The guests' kernel.
    pub kernel: PathBuf,
    /// The common initramfs, with init.
    pub initramfs: PathBuf,
    /// Registries by the host name that image references use.
    pub registries: BTreeMap<String, Registry>,
    /// Whether other registries may be at addresses that are not on the public Internet: this host's
    /// own, its neighbours', the platform's. References come from users, so by default they may not.
    pub private_registries: bool,
    /// Bytes of converted images and cached layers to keep. What a Machine of this host refers to
    /// stays, even beyond that. `None` is a quarter of the file system.
    pub image_budget: Option<u64>,
    /// Whether Machines reach the outside over IPv4.
    pub nat: bool,
    /// What of the outside they reach although it is private or special (RFC 6890).
    pub machine_allow: Vec<AllowedPrefix>,
    /// Where the edge of this host listens. Machines may call it there at the host's public addresses.
    pub public: Vec<SocketAddr>,
    /// The size of a Machine's own disk, in bytes. It is sparse: only what is written takes space.
    pub disk_size: u64,
    /// What each Machine may take of the host's disks and network.
    pub rate_limits: RateLimits,
    /// How much more is given to Machines that run than this host has.
    pub overcommit: Overcommit,
    /// Whether the host's kernel moves the frames of Machines, by `/dev/vhost-net`, from their next cold start
    /// on. Refused together with `rate_limits.network_bytes`, which the kernel would not keep.
    pub vhost_net: bool,
    /// Whether the memory of a suspended Machine stays in the host's page cache.
    pub snapshot_cache: SnapshotCache,
    /// How long a cold start may take, from the monitor's start to the app's.
    pub boot_timeout: Duration,
    /// How long a wake may take before it counts as failed.
    pub wake_timeout: Duration,
    /// Words added to the guests' kernel command line.
    pub cmdline: String,
    /// What guests see of this host's processors from their next cold start on.
    pub cpu_template: CpuTemplate,
    /// Decrypts apps' secrets. Without one, Machines of apps that have any do not start.
    pub secrets: Option<Arc<dyn SecretOpener>>,
}

/// Decrypts what the catalog holds of apps' secrets.
pub trait SecretOpener: fmt::Debug + Send + Sync {
    /// Decrypts a value that was encrypted for this purpose.
    fn open(&self, purpose: &str, sealed: &SealedKey) -> Result<Vec<u8>, String>;
}

/// What guests see of a processor; `ARCHITECTURE.md`, "The monitor", has what that means.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub enum CpuTemplate {
    /// All that the host's KVM supports.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// A level of the x86-64 psABI.
    #[serde(rename = "x86-64-v2")]
    X86_64V2,
    /// The one after that.
    #[serde(rename = "x86-64-v3")]
    X86_64V3,
}

/// What each Machine may take of the host's disks and network in a second. `None` is without a limit, and
/// zero is not allowed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Bytes of each disk.
    pub disk_bytes: Option<u64>,
    /// Reads and writes of each disk.
    pub disk_operations: Option<u64>,
    /// Bytes of network traffic, in each direction.
    pub network_bytes: Option<u64>,
}

/// Why an agent does not start with what it was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// [`HostConfig::vhost_net`] with a limit on the network. Each monitor would refuse it, one Machine's start
    /// after the other.
    #[error(
        "vhost_net has the host's kernel move the frames of Machines, and the kernel keeps no limit: \
         leave out either it or rate_limits.network_bytes"
    )]
    VhostKeepsNoLimit,
}

/// How the images of one registry are reached.
#[derive(Clone, Default)]
pub struct Registry {
    /// `host[:port]` to speak to instead of the name in the reference; empty is that name itself.
    pub address: String,
    /// User name and password.
    pub credentials: Option<(String, String)>,
    /// Plain HTTP.
    pub insecure: bool,
}

impl HostConfig {
    /// Defaults for everything but what only the caller knows.
    pub fn new(host: HostId, data_dir: impl Into<PathBuf>) -> Self {
        Self {
            host,
            data_dir: data_dir.into(),
            vmm_binary: "tern-vmm".into(),
            kernel: "vmlinux".into(),
            initramfs: "initramfs.cpio".into(),
            registries: BTreeMap::new(),
            private_registries: false,
            image_budget: None,
            nat: true,
            machine_allow: Vec::new(),
            public: Vec::new(),
            disk_size: DISK_SIZE,
            rate_limits: RateLimits::default(),
            overcommit: Overcommit::default(),
            vhost_net: false,
            snapshot_cache: SnapshotCache::default(),
            boot_timeout: BOOT_TIMEOUT,
            wake_timeout: WAKE_TIMEOUT,
            cmdline: String::new(),
            cpu_template: CpuTemplate::Host,
            secrets: None,
        }
    }

    /// Says what contradicts itself, if anything. [`Agent::start`](crate::Agent::start) asks before it does
    /// anything else.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.vhost_net && self.rate_limits.network_bytes.is_some() {
            return Err(ConfigError::VhostKeepsNoLimit);
        }
        Ok(())
    }

    /// Where Machines are kept.
    pub fn machines_dir(&self) -> PathBuf {
        self.data_dir.join("machines")
    }

    /// Where volumes are kept.
    pub fn volumes_dir(&self) -> PathBuf {
        self.data_dir.join("volumes")
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("address", &self.address)
            .field("user", &self.credentials.as_ref().map(|(user, _)| user))
            .field("insecure", &self.insecure)
            .finish()
    }
}

/// As large as an image's root file system may grow on Fly.io.
const DISK_SIZE: u64 = 8 << 30;
/// A kernel boots in a second on hardware and in ten in an emulated host under load.
const BOOT_TIMEOUT: Duration = Duration::from_secs(60);
/// A wake that takes longer than a cold start is none.
const WAKE_TIMEOUT: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Agent, AgentError};
    use tern_catalog::{Catalog, SqliteStore, Store, View};

    #[tokio::test]
    async fn vhost_with_a_limit_on_the_network_is_refused_before_anything_is_made() {
        let dir = tempfile::tempdir().unwrap();
        // Too long a path: an agent that overlooked the one would end at the other, and make no network here.
        let data = dir.path().join("x".repeat(96));
        let mut config = HostConfig::new(HostId(1), &data);
        config.rate_limits = RateLimits {
            disk_bytes: Some(1),
            disk_operations: Some(1),
            network_bytes: Some(1),
        };
        config.check().unwrap();
        config.vhost_net = true;
        let without = RateLimits {
            network_bytes: None,
            ..config.rate_limits
        };
        let unlimited = HostConfig {
            rate_limits: without,
            ..config.clone()
        };
        unlimited.check().unwrap();

        let store: Arc<dyn Store> =
            Arc::new(SqliteStore::open(&dir.path().join("catalog.db")).unwrap());
        let view = View::follow(Arc::clone(&store)).await.unwrap();
        let started = Agent::start(config, Catalog::new(store), view).await;
        let error = started.err().unwrap();
        assert!(matches!(
            error,
            AgentError::Config(ConfigError::VhostKeepsNoLimit)
        ));
        let error = error.to_string();
        for name in ["vhost_net", "rate_limits.network_bytes"] {
            assert!(error.contains(name), "{error}");
        }
        assert!(!data.exists());
    }
}
