//! `vm.json`, as the monitor reads it (`ARCHITECTURE.md`, "The monitor").

use std::path::PathBuf;

use serde::Serialize;

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

#[derive(Debug, Serialize)]
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
}

#[derive(Debug, Serialize)]
pub(crate) struct Net {
    pub(crate) tap: String,
    pub(crate) mac: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct Vsock {
    pub(crate) cid: u32,
    pub(crate) path: PathBuf,
}
