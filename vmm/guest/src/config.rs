//! The run configuration: what a guest's init has to know before it starts the app.
//!
//! The host writes it, init reads it once. Names, defaults and the rules for the command line are
//! those of OCI images. Unknown keys are refused on both sides, and [`RunConfig::check`] says what
//! else is wrong in one sentence, so that a bad configuration fails at the host, before a boot.

mod check;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use check::{ConfigError, parse_mac};

use crate::signal::SIGINT;

/// All that a guest needs to know.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// The Machine's id, which in the guest is a name of the guest itself.
    pub machine_id: String,
    /// The guest's host name.
    pub hostname: String,
    /// The program to run, and as whom.
    pub process: ProcessConfig,
    /// How the app is asked to end.
    pub stop: StopConfig,
    /// Where the root file system comes from.
    pub root: RootConfig,
    /// More file systems: volumes.
    pub mounts: Vec<MountConfig>,
    /// Files written into the root file system before the app starts.
    pub files: Vec<FileConfig>,
    /// The network interfaces; `lo` needs no entry.
    pub interfaces: Vec<InterfaceConfig>,
    /// `/etc/resolv.conf`.
    pub dns: DnsConfig,
    /// Added to `/etc/hosts`.
    pub hosts: Vec<HostsEntry>,
    /// Limits that differ from init's own choice.
    pub rlimits: Vec<Rlimit>,
    /// Copy the app's output to the serial console too. For debugging: serial output is dear.
    pub log_to_console: bool,
}

/// The program to run, by the rules of OCI images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProcessConfig {
    /// The image's `Entrypoint`, or what replaces it.
    pub entrypoint: Vec<String>,
    /// The image's `Cmd`, or what replaces it.
    pub cmd: Vec<String>,
    /// If not empty, run this instead of entrypoint and command.
    pub exec: Vec<String>,
    /// The environment: the image's, then the Machine's own. Of two with one name the later counts.
    pub env: Vec<(String, String)>,
    /// Made if it is missing. Empty means `/`.
    pub working_dir: String,
    /// `user[:group]`, by name or number. Empty means root.
    pub user: String,
    /// Give the app a terminal instead of pipes.
    pub tty: bool,
}

impl ProcessConfig {
    /// The program and its arguments: `exec` if there is any, else entrypoint, then command.
    pub fn argv(&self) -> Vec<String> {
        if !self.exec.is_empty() {
            return self.exec.clone();
        }
        self.entrypoint.iter().chain(&self.cmd).cloned().collect()
    }

    /// The environment with each name once, in the order of first appearance, with its last value.
    pub fn merged_env(&self) -> Vec<(String, String)> {
        merge_env(&self.env, &[])
    }
}

/// `base`, then `extra`, with each name once: in the order of first appearance, with its last value.
pub fn merge_env(base: &[(String, String)], extra: &[(String, String)]) -> Vec<(String, String)> {
    let mut merged: Vec<(String, String)> = Vec::with_capacity(base.len() + extra.len());
    for (name, value) in base.iter().chain(extra) {
        match merged.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => value.clone_into(old),
            None => merged.push((name.clone(), value.clone())),
        }
    }
    merged
}

/// How the app is asked to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StopConfig {
    /// The signal that asks it.
    pub signal: i32,
    /// How long it may take before `SIGKILL`.
    pub timeout_ms: u64,
}

impl Default for StopConfig {
    /// `SIGINT` and five seconds, as on Fly.io.
    fn default() -> Self {
        Self {
            signal: SIGINT,
            timeout_ms: 5_000,
        }
    }
}

/// Where the root file system comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RootConfig {
    /// The image: the read-only lower layer.
    pub image: DiskConfig,
    /// The Machine's own disk: the upper layer. Without one, changes live in memory.
    pub disk: Option<DiskConfig>,
}

impl Default for RootConfig {
    /// The monitor's order of disks: an EROFS image on `/dev/vda`, the own disk on `/dev/vdb`.
    fn default() -> Self {
        Self {
            image: DiskConfig {
                device: "/dev/vda".into(),
                fs: "erofs".into(),
            },
            disk: Some(DiskConfig {
                device: "/dev/vdb".into(),
                fs: "ext4".into(),
            }),
        }
    }
}

/// A disk with a file system on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The device, under `/dev`.
    pub device: String,
    /// The file system, by the kernel's name.
    pub fs: String,
}

/// A file system to mount on top of the root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountConfig {
    /// The device, under `/dev`.
    pub device: String,
    /// The file system, by the kernel's name.
    #[serde(default = "ext4")]
    pub fs: String,
    /// Where; made if missing, and owned by the app's user.
    pub path: String,
    /// Whether it may only be read.
    #[serde(default)]
    pub read_only: bool,
}

/// A file to write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileConfig {
    /// Where; missing directories are made.
    pub guest_path: String,
    /// What, as base64.
    #[serde(with = "base64_bytes")]
    pub content: Vec<u8>,
    /// Permission bits.
    #[serde(default = "mode_0644")]
    pub mode: u32,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterfaceConfig {
    /// Its name in the guest, such as `eth0`.
    pub name: String,
    /// Its hardware address as `02:00:00:00:00:01`; without one, the device's own stays.
    #[serde(default)]
    pub mac: Option<String>,
    /// The longest packet.
    #[serde(default = "mtu")]
    pub mtu: u32,
    /// Its addresses, each with the length of its prefix.
    #[serde(default)]
    pub addresses: Vec<IpNet>,
    /// Where IPv4 for others goes.
    #[serde(default)]
    pub gateway_v4: Option<Ipv4Addr>,
    /// Where IPv6 for others goes.
    #[serde(default)]
    pub gateway_v6: Option<Ipv6Addr>,
}

impl Default for InterfaceConfig {
    fn default() -> Self {
        Self {
            name: "eth0".into(),
            mac: None,
            mtu: mtu(),
            addresses: Vec::new(),
            gateway_v4: None,
            gateway_v6: None,
        }
    }
}

/// The resolver's configuration. With no name server, the image's `/etc/resolv.conf` stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DnsConfig {
    /// Name servers, in order.
    pub nameservers: Vec<IpAddr>,
    /// Search domains.
    pub searches: Vec<String>,
}

/// One line of `/etc/hosts`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostsEntry {
    /// The address.
    pub ip: IpAddr,
    /// Its names.
    pub names: Vec<String>,
}

/// A limit on what one process may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rlimit {
    /// Of what.
    pub resource: Resource,
    /// What holds; `u64::MAX` is unlimited.
    pub soft: u64,
    /// Up to where the process itself may raise it.
    pub hard: u64,
}

/// What a limit is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// Open files.
    Nofile,
    /// Processes of one user.
    Nproc,
    /// Locked memory, in bytes.
    Memlock,
    /// The size of a core dump, in bytes.
    Core,
    /// The size of the stack, in bytes.
    Stack,
}

/// The largest packet that still fits, wrapped in WireGuard, into an Ethernet frame over IPv6.
pub const DEFAULT_MTU: u32 = 1420;

fn mtu() -> u32 {
    DEFAULT_MTU
}

fn ext4() -> String {
    "ext4".into()
}

fn mode_0644() -> u32 {
    0o644
}

/// Bytes as a base64 string in JSON.
pub(crate) mod base64_bytes {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<u8>, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(input)?;
        STANDARD.decode(text.as_bytes()).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn argv_follows_the_rules_of_oci() {
        let strings = |words: &[&str]| words.iter().map(|w| (*w).to_string()).collect::<Vec<_>>();
        let mut process = ProcessConfig {
            entrypoint: strings(&["/entry", "-v"]),
            cmd: strings(&["serve"]),
            ..Default::default()
        };
        assert_eq!(process.argv(), ["/entry", "-v", "serve"]);
        process.exec = strings(&["sh"]);
        assert_eq!(process.argv(), ["sh"]);
        assert!(ProcessConfig::default().argv().is_empty());
    }

    #[test]
    fn the_later_value_of_a_variable_counts() {
        let pair = |n: &str, v: &str| (n.to_string(), v.to_string());
        let process = ProcessConfig {
            env: vec![
                pair("PATH", "/bin"),
                pair("A", "1"),
                pair("PATH", "/usr/bin"),
            ],
            ..Default::default()
        };
        assert_eq!(
            process.merged_env(),
            [pair("PATH", "/usr/bin"), pair("A", "1")]
        );
    }

    #[test]
    fn defaults_follow_the_monitors_disks() {
        let config: RunConfig = serde_json::from_str("{}").unwrap();
        assert_eq!(config.root.image.device, "/dev/vda");
        assert_eq!(config.root.disk.unwrap().device, "/dev/vdb");
        assert_eq!((config.stop.signal, config.stop.timeout_ms), (2, 5000));
        let memory: RunConfig = serde_json::from_str(r#"{"root":{"disk":null}}"#).unwrap();
        assert_eq!(memory.root.disk, None);
    }

    #[test]
    fn unknown_keys_are_refused_everywhere() {
        let samples = [
            r#"{"x":1}"#,
            r#"{"process":{"x":1}}"#,
            r#"{"stop":{"x":1}}"#,
            r#"{"root":{"x":1}}"#,
            r#"{"root":{"image":{"device":"/dev/vda","fs":"erofs","x":1}}}"#,
            r#"{"mounts":[{"device":"/dev/vdc","path":"/data","x":1}]}"#,
            r#"{"files":[{"guest_path":"/a","content":"","x":1}]}"#,
            r#"{"interfaces":[{"name":"eth0","x":1}]}"#,
            r#"{"dns":{"x":1}}"#,
            r#"{"hosts":[{"ip":"::1","names":[],"x":1}]}"#,
            r#"{"rlimits":[{"resource":"nofile","soft":1,"hard":1,"x":1}]}"#,
        ];
        for sample in samples {
            let error = serde_json::from_str::<RunConfig>(sample)
                .unwrap_err()
                .to_string();
            assert!(error.contains("unknown field `x`"), "{sample}: {error}");
            let cleaned = sample.replace(r#","x":1"#, "").replace(r#""x":1"#, "");
            serde_json::from_str::<RunConfig>(&cleaned).expect(&cleaned);
        }
    }

    #[test]
    fn an_address_keeps_its_host_part() {
        let interface: InterfaceConfig =
            serde_json::from_str(r#"{"name":"eth0","addresses":["fdaa:0:1::2/112"]}"#).unwrap();
        assert_eq!(interface.addresses[0].to_string(), "fdaa:0:1::2/112");
        assert_eq!(interface.mtu, 1420);
    }
}
