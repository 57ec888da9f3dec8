//! `vm.json`: everything one monitor needs to know, checked once.
//!
//! The file is written by the host's agent and read at start. Unknown keys are refused, so that a
//! misspelt key is an error at start rather than a Machine without its disk. What passes
//! [`VmConfig::load`] is within the limits of this module; later code does not check again.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

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

/// Most processors a guest can have: what the issue of a small cloud needs, and one MADT entry each.
pub const MAX_VCPUS: u8 = 8;
/// Less does not boot a stock kernel with its initramfs.
pub const MIN_MEMORY_MIB: u32 = 32;
/// A bound on what a typing error may ask of the host.
const MAX_MEMORY_MIB: u32 = 256 * 1024;
/// Interrupt lines 5 to 23 of the one IOAPIC, less vsock, rng and balloon.
const MAX_DISKS: usize = 8;
/// See [`MAX_DISKS`].
const MAX_NICS: usize = 8;
/// `sun_path` is 108 bytes with its NUL; leave room for `_<port>` too.
const MAX_SOCKET_PATH: usize = 96;
/// `IFNAMSIZ` less the NUL.
const MAX_TAP_NAME: usize = 15;
/// Linux on x86 takes 2048 bytes; the monitor's own words need some 300.
const MAX_CMDLINE: usize = 1536;
/// The configuration is a few hundred bytes; anything near this is not one.
const MAX_CONFIG_BYTES: u64 = 256 * 1024;
/// 0 to 2 are reserved (hypervisor, loopback, host).
const MIN_GUEST_CID: u32 = 3;

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

    fn rate_limits(&self) -> impl Iterator<Item = (&'static str, &RateLimit)> {
        let disks = self
            .disks
            .iter()
            .map(|disk| ("rate_limit", &disk.rate_limit));
        let net = self.net.iter().flat_map(|nic| {
            [
                ("receive_limit", &nic.receive_limit),
                ("transmit_limit", &nic.transmit_limit),
            ]
        });
        disks
            .chain(net)
            .filter_map(|(name, limit)| Some((name, limit.as_ref()?)))
    }

    /// Checks every limit, and says which one is broken.
    pub fn check(&self) -> Result<(), ConfigError> {
        let require = |ok: bool, what: &dyn Fn() -> String| {
            if ok {
                Ok(())
            } else {
                Err(ConfigError::Invalid(what()))
            }
        };
        require(!self.id.is_empty() && self.id.len() <= 128, &|| {
            "id must be 1 to 128 bytes long".into()
        })?;
        require((1..=MAX_VCPUS).contains(&self.vcpus), &|| {
            format!("vcpus is {}, must be 1 to {MAX_VCPUS}", self.vcpus)
        })?;
        require(
            (MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&self.memory_mib),
            &|| {
                format!(
                    "memory_mib is {}, must be {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}",
                    self.memory_mib
                )
            },
        )?;
        require(self.disks.len() <= MAX_DISKS, &|| {
            format!("{} disks, at most {MAX_DISKS}", self.disks.len())
        })?;
        for (name, limit) in self.rate_limits() {
            limit.check(name)?;
        }
        require(self.net.len() <= MAX_NICS, &|| {
            format!("{} network devices, at most {MAX_NICS}", self.net.len())
        })?;
        require(self.cmdline.len() <= MAX_CMDLINE, &|| {
            format!(
                "cmdline is {} bytes long, at most {MAX_CMDLINE}",
                self.cmdline.len()
            )
        })?;
        require(
            self.cmdline.bytes().all(|b| (b' '..=b'~').contains(&b)),
            &|| "cmdline must be printable ASCII".into(),
        )?;
        for nic in &self.net {
            let name = &nic.tap;
            require(
                !name.is_empty()
                    && name.len() <= MAX_TAP_NAME
                    && name
                        .bytes()
                        .all(|b| b.is_ascii_graphic() && b != b'/' && b != b'%'),
                &|| format!("{name:?} is not a network device name"),
            )?;
            let limited = nic.receive_limit.is_some() || nic.transmit_limit.is_some();
            require(!(nic.vhost && limited), &|| {
                format!(
                    "net {name}: vhost keeps neither receive_limit nor transmit_limit; leave out either it or them"
                )
            })?;
            require(nic.mac.0[0] & 1 == 0, &|| {
                format!("{} is a multicast address", String::from(nic.mac))
            })?;
        }
        let mut sockets = vec![("control", &self.control)];
        if let Some(vsock) = &self.vsock {
            require(vsock.cid >= MIN_GUEST_CID && vsock.cid != u32::MAX, &|| {
                format!(
                    "vsock cid is {}, must be {MIN_GUEST_CID} or more",
                    vsock.cid
                )
            })?;
            sockets.push(("vsock path", &vsock.path));
        }
        if let Some(jail) = &self.jail {
            require(jail.uid != 0 && jail.gid != 0, &|| {
                "jail: uid and gid must not be root's".into()
            })?;
            require(jail.root.is_absolute(), &|| {
                "jail: root must be an absolute path".into()
            })?;
            for (name, path) in [
                ("snapshot_dir", &self.snapshot_dir),
                ("exit_file", &self.exit_file),
            ] {
                let below = path.parent() == Some(&*jail.root);
                require(below, &|| {
                    format!("jail: {name} must be directly in its root")
                })?;
            }
        }
        for (name, path) in sockets {
            let length = path.as_os_str().len();
            require(length <= MAX_SOCKET_PATH, &|| {
                format!("{name} is {length} bytes long, at most {MAX_SOCKET_PATH}")
            })?;
        }
        Ok(())
    }
}

impl RateLimit {
    fn check(&self, name: &str) -> Result<(), ConfigError> {
        let invalid = |what: &str| Err(ConfigError::Invalid(format!("{name}: {what}")));
        let rates = [
            (self.bytes_per_second, self.burst_bytes, "bytes"),
            (
                self.operations_per_second,
                self.burst_operations,
                "operations",
            ),
        ];
        if rates.iter().all(|(rate, ..)| rate.is_none()) {
            return invalid("has neither bytes_per_second nor operations_per_second");
        }
        for (rate, burst, what) in rates {
            if rate == Some(0) || burst == Some(0) {
                return invalid(&format!(
                    "no {what} at all would be a device that hangs; leave it out for no limit"
                ));
            }
            if rate.is_none() && burst.is_some() {
                return invalid(&format!("a burst of {what} without a rate"));
            }
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn sample() -> Value {
        json!({
            "id": "148e21ea7e7d89", "vcpus": 2, "memory_mib": 256, "cpu_template": "x86-64-v3",
            "kernel": "/k/vmlinux", "initramfs": ["/k/initramfs", "/m/run.cpio"],
            "cmdline": "tern.debug",
            "disks": [
                {"path": "/m/image.erofs", "read_only": true, "engine": "io_uring"},
                {"path": "/m/disk.ext4", "read_only": false, "rate_limit": {"operations_per_second": 1000}},
            ],
            "net": [{
                "tap": "tn0", "mac": "02:00:00:00:00:01",
                "receive_limit": {"bytes_per_second": 1_000_000, "burst_bytes": 5_000_000},
                "transmit_limit": {"bytes_per_second": 1_000_000},
            }],
            "vsock": {"cid": 3, "path": "/m/vsock.sock"},
            "control": "/m/vmm.sock", "pid_file": "/m/vmm.pid", "serial_log": "/m/serial.log",
            "snapshot_dir": "/m/snapshot", "exit_file": "/m/exit.json",
            "jail": {"root": "/m", "uid": 1_000_000, "gid": 1_000_000, "cgroup": "/sys/fs/cgroup/tern/1"}
        })
    }

    fn parse(value: &Value) -> Result<VmConfig, String> {
        let config: VmConfig = serde_json::from_value(value.clone()).map_err(|e| e.to_string())?;
        config.check().map_err(|e| e.to_string())?;
        Ok(config)
    }

    #[test]
    fn reads_the_documented_sample() {
        let config = parse(&sample()).unwrap();
        assert_eq!(config.net[0].mac, MacAddr([2, 0, 0, 0, 0, 1]));
        assert_eq!(config.memory_bytes(), 256 << 20);
        let again = serde_json::to_value(&config).unwrap();
        assert_eq!(again, sample());
    }

    #[test]
    fn vhost_is_for_a_card_without_limits() {
        let mut value = sample();
        let nic = value["net"][0].as_object_mut().unwrap();
        nic.retain(|key, _| !key.ends_with("_limit"));
        assert!(!parse(&value).unwrap().net[0].vhost);
        value["net"][0]["vhost"] = json!(true);
        let config = parse(&value).unwrap();
        assert!(config.net[0].vhost);
        assert_eq!(serde_json::to_value(&config).unwrap(), value);
        for limit in ["receive_limit", "transmit_limit"] {
            let mut limited = value.clone();
            limited["net"][0][limit] = json!({"bytes_per_second": 1});
            let error = parse(&limited).unwrap_err();
            assert!(error.contains("tn0") && error.contains("vhost"), "{error}");
        }
    }

    #[test]
    fn a_template_is_one_of_those_there_are() {
        let with = |name: &str| {
            let mut value = sample();
            value["cpu_template"] = json!(name);
            parse(&value)
        };
        for template in [
            CpuTemplate::Host,
            CpuTemplate::X86_64V2,
            CpuTemplate::X86_64V3,
        ] {
            let config = with(&template.to_string()).unwrap();
            assert_eq!(config.cpu_template, template);
        }
        let mut without = sample();
        without.as_object_mut().unwrap().remove("cpu_template");
        assert_eq!(parse(&without).unwrap().cpu_template, CpuTemplate::Host);
        for wrong in ["X86-64-v3", "x86-64-v4", ""] {
            assert!(with(wrong).unwrap_err().contains("x86-64-v2"), "{wrong}");
        }
    }

    #[test]
    fn refuses_an_unknown_key_at_every_level() {
        for pointer in [
            "",
            "/disks/0",
            "/disks/1/rate_limit",
            "/net/0",
            "/vsock",
            "/jail",
        ] {
            let mut value = sample();
            let table = value.pointer_mut(pointer).unwrap().as_object_mut().unwrap();
            table.insert("colour".into(), json!("blue"));
            let error = parse(&value).unwrap_err();
            assert!(error.contains("colour"), "{pointer}: {error}");
        }
    }

    #[test]
    fn refuses_values_outside_their_limits() {
        let cases = [
            ("/vcpus", json!(0), "vcpus"),
            ("/vcpus", json!(9), "vcpus"),
            ("/memory_mib", json!(1), "memory_mib"),
            ("/id", json!(""), "id"),
            ("/net/0/tap", json!("a-name-too-long-for-linux"), "name"),
            ("/net/0/tap", json!("tn%d"), "name"),
            ("/net/0/mac", json!("02:00:00:00:00"), "Ethernet"),
            ("/net/0/mac", json!("01:00:00:00:00:00"), "multicast"),
            ("/net/0/vhost", json!(true), "receive_limit"),
            ("/net/0/vhost", json!("yes"), "boolean"),
            ("/vsock/cid", json!(2), "cid"),
            ("/control", json!("x".repeat(200)), "control"),
            ("/disks/1/rate_limit", json!({}), "neither"),
            ("/disks/0/engine", json!("magic"), "io_uring"),
            (
                "/disks/1/rate_limit/operations_per_second",
                json!(0),
                "hangs",
            ),
            (
                "/net/0/receive_limit/bytes_per_second",
                json!(null),
                "neither",
            ),
            (
                "/net/0/transmit_limit",
                json!({"burst_bytes": 1, "operations_per_second": 1}),
                "burst",
            ),
            ("/jail/uid", json!(0), "root"),
            ("/jail/root", json!("/elsewhere"), "snapshot_dir"),
            ("/cmdline", json!("a\nb"), "ASCII"),
            ("/cmdline", json!("a".repeat(2000)), "cmdline"),
        ];
        for (pointer, bad, word) in cases {
            let mut value = sample();
            let (table, key) = pointer.rsplit_once('/').unwrap();
            value.pointer_mut(table).unwrap()[key] = bad.clone();
            let error = parse(&value).unwrap_err();
            assert!(error.contains(word), "{pointer} = {bad}: {error}");
        }
    }
}
