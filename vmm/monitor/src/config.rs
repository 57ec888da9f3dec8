//! `vm.json`: everything one monitor needs to know, checked once.
//!
//! The file is written by the host's agent and read at start. Unknown keys are refused, so that a
//! misspelt key is an error at start rather than a Machine without its disk. What passes
//! [`VmConfig::load`] is within the limits of this module; later code does not check again.

mod check;
#[cfg(test)]
mod tests;

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use self::check::{MAX_VCPUS, MIN_MEMORY_MIB};
use crate::boot::template::CpuTemplate;

/// What to run, and where to leave its files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// The Machine's id; a snapshot of another id is refused.
    pub id: String,
    /// Virtual processors, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// What the guest sees of the host's processors; a resumed one sees what it saw before.
    #[serde(default, skip_serializing_if = "CpuTemplate::is_host")]
    pub cpu_template: CpuTemplate,
    /// Whether the guest may have guests of its own, where its template and its host let it. It cannot be suspended
    /// while it has any, and what it reaches is KVM's riskiest code.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub nested: bool,
    /// An ELF `vmlinux` or a bzImage.
    pub kernel: PathBuf,
    /// Archives handed to the kernel one after the other, as one initramfs.
    #[serde(default)]
    pub initramfs: Vec<PathBuf>,
    /// Words added to the kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// Block devices in order: `/dev/vda`, `/dev/vdb`, …
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Network devices in order: `eth0`, `eth1`, …
    #[serde(default)]
    pub net: Vec<NetConfig>,
    /// The guest's vsock, if it has one.
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
    /// Unix socket of the control API.
    pub control: PathBuf,
    /// Holds the process id; locked while the monitor lives.
    pub pid_file: PathBuf,
    /// Where the guest's serial console is kept.
    pub serial_log: PathBuf,
    /// Directory of the snapshot, written by `snapshot` and read by `--restore`.
    pub snapshot_dir: PathBuf,
    /// Written just before the monitor ends: why it did.
    pub exit_file: PathBuf,
    /// Who and where the monitor is once it has opened its files; without it, who started it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jail: Option<JailConfig>,
}

/// The jail of a monitor that is started by root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailConfig {
    /// An existing directory that belongs to `uid`: all that the monitor can see later. `snapshot_dir`
    /// and `exit_file` must be in it; sockets and logs are opened before, and better outside.
    pub root: PathBuf,
    /// The user that it becomes, which nothing else should run as.
    pub uid: u32,
    /// Its only group.
    pub gid: u32,
    /// An existing cgroup v2 directory to join.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
}

/// One block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// A raw image, a multiple of 512 bytes long.
    pub path: PathBuf,
    /// Whether the guest may write.
    #[serde(default)]
    pub read_only: bool,
    /// How much it may move; without it, what the host has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<RateLimit>,
    /// Who moves its data; without it `io_uring` where the kernel has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<DiskEngine>,
}

/// Who moves a disk's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskEngine {
    /// The kernel; a host that has it switched off is an error.
    IoUring,
    /// Threads of the monitor's.
    Threads,
}

/// A rate of bytes, of operations, or both. A burst is what may be used at once after a rest, one second's
/// worth if it is not given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes each second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// Bytes at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst_bytes: Option<u64>,
    /// Requests of a disk, frames of a network card each second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operations_per_second: Option<u64>,
    /// Of those, at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst_operations: Option<u64>,
}

/// One network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Name of an existing TAP device.
    pub tap: String,
    /// The guest's Ethernet address.
    pub mac: MacAddr,
    /// How much it may receive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receive_limit: Option<RateLimit>,
    /// How much it may send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transmit_limit: Option<RateLimit>,
    /// Whether the host's kernel moves its frames (`/dev/vhost-net`) rather than a thread of the monitor. It
    /// keeps no limit.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub vhost: bool,
}

/// The vsock device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3 or more.
    pub cid: u32,
    /// Unix socket for host programs; `<path>_<port>` takes the guest's own connections.
    pub path: PathBuf,
}

/// An Ethernet address in the usual `aa:bb:cc:dd:ee:ff` form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

/// The configuration is a few hundred bytes; anything near this is not one.
const MAX_CONFIG_BYTES: u64 = 256 * 1024;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not the JSON this monitor understands.
    #[error("{path} is not a valid vm.json: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A value outside its limits.
    #[error("vm.json: {0}")]
    Invalid(String),
}

impl VmConfig {
    /// Reads and checks `path`.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        if fs::metadata(path).map_err(read)?.len() > MAX_CONFIG_BYTES {
            return Err(ConfigError::Invalid(format!(
                "longer than {MAX_CONFIG_BYTES} bytes"
            )));
        }
        let text = fs::read(path).map_err(read)?;
        let config: Self = serde_json::from_slice(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source,
        })?;
        config.check()?;
        Ok(config)
    }

    /// Guest memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) << 20
    }
}

impl TryFrom<String> for MacAddr {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not an Ethernet address");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            Err(wrong())
        } else {
            Ok(Self(bytes))
        }
    }
}

impl From<MacAddr> for String {
    fn from(MacAddr([a, b, c, d, e, f]): MacAddr) -> Self {
        format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}
