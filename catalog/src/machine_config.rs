//! What a Machine should run: the `config` object of the Machines API.
//!
//! The same JSON is the wire format and the stored format, so that a config given to the API comes
//! back as it was. A key that is not here is passed over when it is read; the API tells its caller of each.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{GoDuration, Port, SecretName, VolumeId};

/// The configuration of one Machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// The image reference, for example `registry.internal/hello:deployment-01…` or `…@sha256:…`.
    pub image: String,
    /// Environment, over the image's own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Overrides of the image's entrypoint and command.
    #[serde(default)]
    pub init: InitConfig,
    /// Size of the virtual machine.
    #[serde(default)]
    pub guest: Guest,
    /// Labels; `fly_process_group` and others have meaning to clients.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// Ports served to the public through the edge.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<Service>,
    /// Health checks by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub checks: BTreeMap<String, Check>,
    /// What to do when the app exits.
    #[serde(default)]
    pub restart: Restart,
    /// How to stop the app.
    #[serde(default)]
    pub stop_config: StopConfig,
    /// Files written before the app starts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileConfig>,
    /// Volumes; one at most.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<Mount>,
    /// Destroy the Machine when its app exits.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub auto_destroy: bool,
}

/// Overrides of the image's entrypoint and command; `exec` beats all.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct InitConfig {
    /// Replaces entrypoint and command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<Vec<String>>,
    /// Replaces the image's entrypoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
    /// Give the app a terminal.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tty: bool,
}

/// Size of the virtual machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Guest {
    /// `shared` or `performance`.
    #[serde(default = "Guest::default_kind")]
    pub cpu_kind: String,
    /// Virtual processors, 1 to 8.
    #[serde(default = "Guest::default_cpus")]
    pub cpus: u8,
    /// Memory in MiB.
    #[serde(default = "Guest::default_memory")]
    pub memory_mb: u32,
}

/// A port of the Machine that the edge serves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Service {
    /// Transport.
    #[serde(default)]
    pub protocol: ServiceProtocol,
    /// Port the app listens on.
    pub internal_port: u16,
    /// What the gate does with an idle Machine.
    #[serde(default)]
    pub autostop: Autostop,
    /// Whether a request may start the Machine.
    #[serde(default = "yes")]
    pub autostart: bool,
    /// Machines that autostop leaves running, in the primary region.
    #[serde(default)]
    pub min_machines_running: u32,
    /// Public ports.
    #[serde(default)]
    pub ports: Vec<Port>,
    /// Health checks of this service.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<Check>,
    /// Load limits.
    #[serde(default)]
    pub concurrency: Concurrency,
}

/// Transport of a service.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceProtocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// What the gate does with an idle Machine.
///
/// The API answers `false`, `true` and `"suspend"`; `"off"` and `"stop"` are accepted too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Autostop {
    /// Leave it running.
    #[default]
    Off,
    /// Stop it: the next start is cold.
    Stop,
    /// Suspend it: memory is kept on disk.
    Suspend,
}

/// Load limits of a service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Concurrency {
    /// What is counted.
    #[serde(default, rename = "type")]
    pub kind: ConcurrencyKind,
    /// Load above which other Machines are preferred; 20 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soft_limit: Option<u32>,
    /// Load above which nothing is admitted; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hard_limit: Option<u32>,
}

/// What a concurrency limit counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConcurrencyKind {
    /// Open connections.
    #[default]
    Connections,
    /// Requests in flight.
    Requests,
}

/// A health check.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// What is checked.
    #[serde(rename = "type")]
    pub kind: CheckKind,
    /// Port; the service's internal port when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Time between two checks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<GoDuration>,
    /// Time one check may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<GoDuration>,
    /// Time after a start in which failures do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_period: Option<GoDuration>,
    /// HTTP method, `GET` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// HTTP path, `/` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// HTTP headers that are sent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<CheckHeader>,
}

/// A header that a health check sends, once for each value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckHeader {
    /// Its name.
    pub name: String,
    /// Its values.
    #[serde(default)]
    pub values: Vec<String>,
}

/// What a health check looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckKind {
    /// A TCP connection opens.
    Tcp,
    /// An HTTP request is answered with 2xx.
    Http,
}

/// What to do when the app exits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restart {
    /// When to start it again.
    #[serde(default)]
    pub policy: RestartPolicy,
    /// How often, for `on-failure`; 10 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_retries: Option<u32>,
}

/// When to start an app again that has exited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Never.
    #[serde(alias = "never")]
    No,
    /// Always.
    Always,
    /// When the exit code is not 0, or the monitor died.
    #[default]
    OnFailure,
}

/// How to stop the app.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopConfig {
    /// Signal name, `SIGINT` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    /// Time until it is killed, 5 s when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<GoDuration>,
}

/// A volume in the Machine's file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Which.
    pub volume: VolumeId,
    /// Where: an absolute path, not `/`.
    pub path: String,
    /// The volume's name, as clients send it; the volume's own counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The volume's size, as clients send it; the volume's own counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_gb: Option<u32>,
    /// As clients send it. Encrypt the host's disk instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encrypted: Option<bool>,
}

/// A file written into the Machine before its app starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileConfig {
    /// Absolute path in the Machine.
    pub guest_path: String,
    /// Content, base64. Empty where it is a secret.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub raw_value: String,
    /// The app's secret whose value is the content, base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_name: Option<SecretName>,
    /// Permission bits, 0644 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
}

impl Guest {
    fn default_kind() -> String {
        "shared".to_owned()
    }

    fn default_cpus() -> u8 {
        1
    }

    fn default_memory() -> u32 {
        256
    }

    /// A size by its name: `shared-cpu-1x` to `8x`, with 256 MiB a processor, and `performance-1x` to `8x` with 2 GiB.
    pub fn preset(name: &str) -> Option<Self> {
        let (kind, count, per_cpu) = if let Some(rest) = name.strip_prefix("shared-cpu-") {
            ("shared", rest, 256)
        } else {
            ("performance", name.strip_prefix("performance-")?, 2048)
        };
        let cpus: u8 = count
            .strip_suffix('x')?
            .parse()
            .ok()
            .filter(|n| matches!(n, 1 | 2 | 4 | 6 | 8))?;
        Some(Self {
            cpu_kind: kind.to_owned(),
            cpus,
            memory_mb: u32::from(cpus) * per_cpu,
        })
    }
}

impl Default for Guest {
    fn default() -> Self {
        Self {
            cpu_kind: Self::default_kind(),
            cpus: Self::default_cpus(),
            memory_mb: Self::default_memory(),
        }
    }
}

impl Check {
    /// The headers that are sent, one by one.
    pub fn sent(&self) -> impl Iterator<Item = (&str, &str)> {
        self.headers.iter().flat_map(|header| {
            let values = header.values.iter();
            values.map(|value| (header.name.as_str(), value.as_str()))
        })
    }
}

impl Concurrency {
    /// The soft limit in force.
    pub fn soft(&self) -> u32 {
        self.soft_limit.unwrap_or(20)
    }
}

impl Serialize for Autostop {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => serializer.serialize_bool(false),
            Self::Stop => serializer.serialize_bool(true),
            Self::Suspend => serializer.serialize_str("suspend"),
        }
    }
}

impl<'de> Deserialize<'de> for Autostop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Switch(bool),
            Word(String),
        }
        match Either::deserialize(deserializer)? {
            Either::Switch(false) => Ok(Self::Off),
            Either::Switch(true) => Ok(Self::Stop),
            Either::Word(word) => match word.as_str() {
                "off" => Ok(Self::Off),
                "stop" => Ok(Self::Stop),
                "suspend" => Ok(Self::Suspend),
                other => Err(serde::de::Error::custom(format!(
                    "autostop is \"off\", \"stop\" or \"suspend\", not \"{other}\""
                ))),
            },
        }
    }
}

fn yes() -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_image_is_required() {
        let config: MachineConfig = serde_json::from_str(r#"{"image":"x"}"#).unwrap();
        assert_eq!((config.guest.cpus, config.guest.memory_mb), (1, 256));
        assert_eq!(config.restart.policy, RestartPolicy::OnFailure);
    }

    #[test]
    fn presets_are_those_of_the_documentation() {
        let size = |s| Guest::preset(s).map(|g| (g.cpus, g.memory_mb));
        assert_eq!(size("shared-cpu-2x"), Some((2, 512)));
        assert_eq!(size("performance-4x"), Some((4, 8192)));
        assert_eq!(size("shared-cpu-3x"), None);
        assert_eq!(size("huge"), None);
    }

    #[test]
    fn autostop_takes_both_spellings_and_answers_the_apis() {
        let read = |s: &str| serde_json::from_str::<Autostop>(s).unwrap();
        assert_eq!(read("\"stop\""), read("true"));
        assert_eq!(read("\"off\""), read("false"));
        assert_eq!(
            serde_json::to_string(&Autostop::Suspend).unwrap(),
            "\"suspend\""
        );
        assert_eq!(serde_json::to_string(&Autostop::Stop).unwrap(), "true");
        assert!(serde_json::from_str::<Autostop>("\"nap\"").is_err());
    }

    #[test]
    fn a_config_that_a_newer_server_has_written_can_be_read() {
        let read = serde_json::from_str::<MachineConfig>(r#"{"image":"x","guest":{"gpus":1}}"#);
        assert_eq!(read.unwrap().guest, Guest::default());
    }

    #[test]
    fn a_checks_headers_are_sent_once_for_each_value() {
        let json = r#"{"type":"http","headers":[{"name":"A","values":["1","2"]},{"name":"B"}]}"#;
        let check: Check = serde_json::from_str(json).unwrap();
        assert_eq!(check.sent().collect::<Vec<_>>(), [("A", "1"), ("A", "2")]);
        assert_eq!(
            serde_json::to_value(&check).unwrap()["headers"][0]["values"][1],
            "2"
        );
    }
}
