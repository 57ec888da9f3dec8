//! `vm.json`, as the monitor reads it (`ARCHITECTURE.md`, "The monitor").

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::CpuTemplate;

/// What a monitor runs.
#[derive(Debug, Serialize)]
pub(crate) struct VmConfig {
    pub(crate) id: String,
    pub(crate) vcpus: u8,
    pub(crate) memory_mib: u32,
    pub(crate) cpu_template: CpuTemplate,
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: Vec<PathBuf>,
    pub(crate) cmdline: String,
    pub(crate) disks: Vec<Disk>,
    pub(crate) net: Vec<Net>,
    pub(crate) vsock: Vsock,
    pub(crate) control: PathBuf,
    pub(crate) pid_file: PathBuf,
    pub(crate) serial_log: PathBuf,
    pub(crate) snapshot_dir: PathBuf,
    pub(crate) exit_file: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) jail: Option<Jail>,
}

/// Who and where a monitor is once it has opened its files.
#[derive(Debug, Serialize)]
pub(crate) struct Jail {
    pub(crate) root: PathBuf,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cgroup: Option<PathBuf>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rate_limit: Option<RateLimit>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Net {
    pub(crate) tap: String,
    pub(crate) mac: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) receive_limit: Option<RateLimit>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) transmit_limit: Option<RateLimit>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) vhost: bool,
}

/// How much a device may do. How much of that at once is left to the monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RateLimit {
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_per_second: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    operations_per_second: Option<u64>,
}

impl RateLimit {
    /// None where nothing is limited: a table without a rate is refused.
    pub(crate) fn new(bytes: Option<u64>, operations: Option<u64>) -> Option<Self> {
        (bytes.is_some() || operations.is_some()).then_some(Self {
            bytes_per_second: bytes,
            operations_per_second: operations,
        })
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct Vsock {
    pub(crate) cid: u32,
    pub(crate) path: PathBuf,
}

/// The disks that the guest of a `vm.json` may write to.
pub(crate) fn writable_disks(vm_json: &[u8]) -> serde_json::Result<Vec<PathBuf>> {
    #[derive(Deserialize)]
    struct Disks {
        disks: Vec<Disk>,
    }
    let Disks { disks } = serde_json::from_slice(vm_json)?;
    let writable = disks.into_iter().filter(|disk| !disk.read_only);
    Ok(writable.map(|disk| disk.path).collect())
}
