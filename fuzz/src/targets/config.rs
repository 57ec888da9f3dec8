//! `vm.json`.
//!
//! Promised: what is taken is within its limits, and is taken again as it was.

use std::io::Write;
use std::os::fd::AsRawFd;

use nix::sys::memfd::{MFdFlags, memfd_create};
use tern_vmm::config::{ConfigError, MAX_VCPUS, VmConfig};

pub fn run(bytes: &[u8]) {
    let Ok(config) = load(bytes) else { return };
    assert!((1..=MAX_VCPUS).contains(&config.vcpus));
    assert!(config.memory_bytes() >= 32 << 20 && config.memory_bytes() <= 256 << 30);
    assert!(config.disks.len() + config.net.len() <= 16);
    let text = serde_json::to_vec(&config).unwrap();
    assert_eq!(load(&text).unwrap(), config);
}

fn load(bytes: &[u8]) -> Result<VmConfig, ConfigError> {
    let mut file = std::fs::File::from(memfd_create("vm.json", MFdFlags::MFD_CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    VmConfig::load(format!("/proc/self/fd/{}", file.as_raw_fd()).as_ref())
}

pub fn seeds() -> Vec<Vec<u8>> {
    let paths = r#""kernel":"/k","control":"/c","pid_file":"/p","serial_log":"/s","snapshot_dir":"/d","exit_file":"/e""#;
    let small = format!(r#"{{"id":"m","vcpus":1,"memory_mib":32,{paths}}}"#);
    let full = format!(
        r#"{{"id":"m1","vcpus":8,"memory_mib":256,{paths},"initramfs":["/a","/b"],"cmdline":"quiet",
        "disks":[{{"path":"/x","read_only":true}},{{"path":"/y"}}],
        "net":[{{"tap":"tn0","mac":"02:00:00:00:00:01"}}],"vsock":{{"cid":3,"path":"/v"}}}}"#
    );
    vec![small.into(), full.into()]
}
