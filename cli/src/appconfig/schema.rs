//! The keys of `fly.toml` that Tern acts on.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Deserialize;
use tern_catalog::{
    Autostop, CheckHeader, CheckKind, Concurrency, Handler, Port, ProxyProtoOptions,
    ResponseOptions, RestartPolicy, SecretName, ServiceProtocol, VolumeName,
};

use super::forms::{
    concurrency, gigabytes, headers, memory, millis, one_or_many, port, processes, seconds,
    some_port, text_map, words,
};

/// A whole `fly.toml`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct AppConfig {
    /// The app's name; `--app` goes before it.
    pub app: Option<String>,
    /// Where new Machines are made.
    pub primary_region: Option<String>,
    /// Signal that asks the app to stop.
    pub kill_signal: Option<String>,
    /// Time until it is killed; a bare number is seconds.
    #[serde(default, deserialize_with = "seconds")]
    pub kill_timeout: Option<Duration>,
    /// Where the image comes from.
    #[serde(default)]
    pub build: Build,
    /// How a deploy goes.
    #[serde(default)]
    pub deploy: Deploy,
    /// Environment of the app.
    #[serde(default, deserialize_with = "text_map")]
    pub env: BTreeMap<String, String>,
    /// Process groups: name and command.
    #[serde(default, deserialize_with = "processes")]
    pub processes: BTreeMap<String, String>,
    /// The HTTP service on ports 80 and 443.
    pub http_service: Option<HttpService>,
    /// Other services.
    #[serde(default)]
    pub services: Vec<ServiceConfig>,
    /// Size of Machines.
    #[serde(default, deserialize_with = "one_or_many")]
    pub vm: Vec<Vm>,
    /// As `vm`, under its older name; `vm` has them all once the file is read.
    #[serde(default, alias = "computes", deserialize_with = "one_or_many")]
    pub(super) compute: Vec<Vm>,
    /// What to do when the app exits.
    #[serde(default, deserialize_with = "one_or_many")]
    pub restart: Vec<RestartConfig>,
    /// Volumes; one for a process group.
    #[serde(default, alias = "mount", deserialize_with = "one_or_many")]
    pub mounts: Vec<MountConfig>,
    /// Files to put into Machines.
    #[serde(default)]
    pub files: Vec<FileEntry>,
    /// Health checks of Machines, whatever they serve.
    #[serde(default)]
    pub checks: BTreeMap<String, MachineCheck>,
    /// What Fly.io tries out.
    #[serde(default)]
    pub experimental: Experimental,
}

/// `[experimental]`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Experimental {
    /// Replaces the image's command.
    #[serde(default, deserialize_with = "words")]
    pub cmd: Option<Vec<String>>,
    /// Replaces the image's entrypoint.
    #[serde(default, deserialize_with = "words")]
    pub entrypoint: Option<Vec<String>>,
    /// Replaces both.
    #[serde(default, deserialize_with = "words")]
    pub exec: Option<Vec<String>>,
    /// `kill_timeout`, where it once stood.
    #[serde(default, deserialize_with = "seconds")]
    pub kill_timeout: Option<Duration>,
}

/// `[checks.NAME]`.
#[derive(Debug, Clone, Deserialize)]
pub struct MachineCheck {
    /// What is checked.
    #[serde(rename = "type")]
    pub kind: CheckKind,
    /// The port; that of the first service when absent.
    #[serde(default, deserialize_with = "some_port")]
    pub port: Option<u16>,
    /// Process groups it is for; all when empty.
    #[serde(default)]
    pub processes: Vec<String>,
    // As in `CheckConfig`; flattened, a key that nobody knows would go by unseen.
    #[serde(default, deserialize_with = "millis")]
    interval: Option<Duration>,
    #[serde(default, deserialize_with = "millis")]
    timeout: Option<Duration>,
    #[serde(default, deserialize_with = "millis")]
    grace_period: Option<Duration>,
    method: Option<String>,
    path: Option<String>,
    #[serde(default, deserialize_with = "headers")]
    headers: Vec<CheckHeader>,
}

impl MachineCheck {
    /// How it is checked.
    pub fn how(&self) -> CheckConfig {
        CheckConfig {
            interval: self.interval,
            timeout: self.timeout,
            grace_period: self.grace_period,
            method: self.method.clone(),
            path: self.path.clone(),
            headers: self.headers.clone(),
        }
    }
}

/// `[build]`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Build {
    /// Use this image; build nothing.
    pub image: Option<String>,
    /// The Dockerfile, `Dockerfile` when absent.
    pub dockerfile: Option<String>,
    /// The ignore file, `.dockerignore` when absent.
    pub ignorefile: Option<String>,
    /// Stage to build.
    #[serde(rename = "build-target", alias = "build_target")]
    pub build_target: Option<String>,
    /// Build arguments.
    #[serde(default, deserialize_with = "text_map")]
    pub args: BTreeMap<String, String>,
}

/// `[deploy]`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Deploy {
    /// How Machines are replaced.
    pub strategy: Option<Strategy>,
    /// How many Machines are replaced at a time.
    pub max_unavailable: Option<MaxUnavailable>,
    /// Longest wait for a Machine to become healthy.
    #[serde(default, deserialize_with = "seconds")]
    pub wait_timeout: Option<Duration>,
    /// Runs in a Machine of its own before any is replaced; its failure ends the deploy.
    #[serde(default, deserialize_with = "words")]
    pub release_command: Option<Vec<String>>,
    /// Longest that it may run.
    #[serde(default, deserialize_with = "seconds")]
    pub release_command_timeout: Option<Duration>,
    /// Size of its Machine; that of the first process group when absent.
    pub release_command_vm: Option<Vm>,
}

/// How Machines are replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Some at a time, healthy before the next.
    Rolling,
    /// All at once, without waiting.
    Immediate,
    /// One first, and then the others as by [`Self::Rolling`].
    Canary,
    /// All anew beside the old ones, which serve until all are healthy.
    Bluegreen,
}

/// How many Machines are replaced at a time.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum MaxUnavailable {
    /// So many.
    Count(usize),
    /// This share of them.
    Share(f64),
}

/// `[http_service]`.
#[derive(Debug, Clone, Deserialize)]
pub struct HttpService {
    /// Port the app listens on.
    #[serde(default = "default_port", deserialize_with = "port")]
    pub internal_port: u16,
    /// Redirect http to https.
    #[serde(default)]
    pub force_https: bool,
    /// What happens to an idle Machine.
    #[serde(default)]
    pub auto_stop_machines: Autostop,
    /// Whether a request starts a Machine.
    #[serde(default = "yes")]
    pub auto_start_machines: bool,
    /// Machines left running.
    #[serde(default)]
    pub min_machines_running: u32,
    /// Process groups it is for; all when empty.
    #[serde(default)]
    pub processes: Vec<String>,
    /// Load limits.
    #[serde(default, deserialize_with = "concurrency")]
    pub concurrency: Concurrency,
    /// TLS settings.
    pub tls_options: Option<TlsOptionsConfig>,
    /// HTTP settings.
    pub http_options: Option<HttpOptionsConfig>,
    /// Health checks.
    #[serde(default)]
    pub checks: Vec<CheckConfig>,
}

/// `tls_options`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct TlsOptionsConfig {
    /// Protocols offered.
    #[serde(default)]
    pub alpn: Vec<String>,
    /// TLS versions.
    #[serde(default)]
    pub versions: Vec<String>,
}

/// `http_options`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct HttpOptionsConfig {
    /// Speak HTTP/2 without TLS to the app.
    #[serde(default)]
    pub h2_backend: bool,
    /// Seconds without a byte until a connection is closed.
    pub idle_timeout: Option<u32>,
    /// Changes to responses.
    pub response: Option<ResponseOptions>,
}

/// `[[services]]`.
#[derive(Debug, Clone, Deserialize)]
pub struct ServiceConfig {
    /// Transport.
    #[serde(default)]
    pub protocol: ServiceProtocol,
    /// Port the app listens on.
    #[serde(default = "default_port", deserialize_with = "port")]
    pub internal_port: u16,
    /// Process groups it is for; all when empty.
    #[serde(default)]
    pub processes: Vec<String>,
    /// What happens to an idle Machine.
    #[serde(default)]
    pub auto_stop_machines: Autostop,
    /// Whether a request starts a Machine.
    #[serde(default = "yes")]
    pub auto_start_machines: bool,
    /// Machines left running.
    #[serde(default)]
    pub min_machines_running: u32,
    /// Load limits.
    #[serde(default, deserialize_with = "concurrency")]
    pub concurrency: Concurrency,
    /// Public ports; without any it is for the private network.
    #[serde(default)]
    pub ports: Vec<PortConfig>,
    /// Checks that open a connection.
    #[serde(default)]
    pub tcp_checks: Vec<CheckConfig>,
    /// Checks that ask over HTTP.
    #[serde(default)]
    pub http_checks: Vec<CheckConfig>,
}

/// `[[services.ports]]`.
#[derive(Debug, Clone, Deserialize)]
pub struct PortConfig {
    /// The public port.
    #[serde(default, deserialize_with = "some_port")]
    pub port: Option<u16>,
    /// The first port of a range.
    #[serde(default, deserialize_with = "some_port")]
    pub start_port: Option<u16>,
    /// The last one.
    #[serde(default, deserialize_with = "some_port")]
    pub end_port: Option<u16>,
    /// What the edge does with a connection.
    #[serde(default)]
    pub handlers: Vec<Handler>,
    /// Redirect http to https.
    #[serde(default)]
    pub force_https: bool,
    /// TLS settings.
    pub tls_options: Option<TlsOptionsConfig>,
    /// HTTP settings.
    pub http_options: Option<HttpOptionsConfig>,
    /// How the app is told who connected.
    pub proxy_proto_options: Option<ProxyProtoOptions>,
}

/// A health check. Bare numbers are milliseconds.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct CheckConfig {
    /// Time between two checks.
    #[serde(default, deserialize_with = "millis")]
    pub interval: Option<Duration>,
    /// Time one may take.
    #[serde(default, deserialize_with = "millis")]
    pub timeout: Option<Duration>,
    /// Time after a start in which failures do not count.
    #[serde(default, deserialize_with = "millis")]
    pub grace_period: Option<Duration>,
    /// HTTP method.
    pub method: Option<String>,
    /// HTTP path.
    pub path: Option<String>,
    /// HTTP headers that are sent.
    #[serde(default, deserialize_with = "headers")]
    pub headers: Vec<CheckHeader>,
}

/// `[[vm]]`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Vm {
    /// A preset, `shared-cpu-1x` and so on; the keys below go before it.
    pub size: Option<String>,
    /// `"1gb"`, or an integer of MiB.
    #[serde(default, deserialize_with = "memory")]
    pub memory: Option<u32>,
    /// MiB.
    pub memory_mb: Option<u32>,
    /// Virtual processors.
    pub cpus: Option<u8>,
    /// `shared` or `performance`.
    pub cpu_kind: Option<String>,
    /// Process groups it is for; all when empty.
    #[serde(default)]
    pub processes: Vec<String>,
}

/// `[[restart]]`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct RestartConfig {
    /// When to start again.
    #[serde(default)]
    pub policy: RestartPolicy,
    /// How often.
    pub retries: Option<u32>,
    /// Process groups it is for; all when empty.
    #[serde(default)]
    pub processes: Vec<String>,
}

/// `[[files]]`.
#[derive(Debug, Clone, Deserialize)]
pub struct FileEntry {
    /// Where it goes.
    pub guest_path: String,
    /// A file beside `fly.toml`.
    pub local_path: Option<String>,
    /// Content, base64.
    pub raw_value: Option<String>,
    /// The secret that holds the content, base64.
    pub secret_name: Option<SecretName>,
    /// Process groups it is for; all when empty.
    #[serde(default)]
    pub processes: Vec<String>,
}

/// `[[mounts]]`.
#[derive(Debug, Clone, Deserialize)]
pub struct MountConfig {
    /// The volume's name; any free volume of this name will do, and one is made where there is none.
    pub source: VolumeName,
    /// Where it is mounted.
    pub destination: String,
    /// The size of a volume that is made, in GiB.
    #[serde(default, deserialize_with = "gigabytes")]
    pub initial_size: Option<u32>,
    /// Process groups it is for; all when empty.
    #[serde(default)]
    pub processes: Vec<String>,
}

/// The process group of an app that names none.
pub const DEFAULT_GROUP: &str = "app";

impl MountConfig {
    /// Whether Machines of this process group mount it.
    pub fn is_for(&self, group: &str) -> bool {
        self.processes.is_empty() || self.processes.iter().any(|g| g == group)
    }
}

impl AppConfig {
    /// The volume of a process group.
    pub fn mount_of(&self, group: &str) -> Option<&MountConfig> {
        self.mounts.iter().find(|mount| mount.is_for(group))
    }

    /// The process groups, in order of name.
    pub fn groups(&self) -> Vec<String> {
        if self.processes.is_empty() {
            vec![DEFAULT_GROUP.to_owned()]
        } else {
            self.processes.keys().cloned().collect()
        }
    }

    /// What to say of services whose port is none of those that the image exposes.
    pub fn unexposed(&self, exposed: &BTreeSet<u16>) -> Vec<String> {
        if exposed.is_empty() {
            return Vec::new();
        }
        let http = self.http_service.iter().map(|s| s.internal_port);
        let ports: BTreeSet<u16> = http
            .chain(self.services.iter().map(|s| s.internal_port))
            .collect();
        let all: Vec<String> = exposed.iter().map(u16::to_string).collect();
        let missing = ports.difference(exposed);
        let told = |port: &u16| {
            format!(
                "the image exposes {}, fly.toml says internal_port = {port}",
                all.join(", ")
            )
        };
        missing.map(told).collect()
    }

    /// What is wrong beyond its shape: key path and text.
    pub(super) fn check(&self) -> Vec<(String, String)> {
        let mut wrong = Vec::new();
        let mut say = |path: String, text: String| wrong.push((path, text));
        let groups = self.groups();
        let mut known = |path: String, named: &[String]| {
            for group in named.iter().filter(|g| !groups.contains(g)) {
                let all = groups.join(", ");
                say(
                    path.clone(),
                    format!("there is no process group \"{group}\"; there is {all}"),
                );
            }
        };
        if let Some(service) = &self.http_service {
            known("http_service.processes".into(), &service.processes);
        }
        for (i, service) in self.services.iter().enumerate() {
            known(format!("services.{i}.processes"), &service.processes);
        }
        for (i, vm) in self.vm.iter().enumerate() {
            known(format!("vm.{i}.processes"), &vm.processes);
        }
        for (i, mount) in self.mounts.iter().enumerate() {
            known(format!("mounts.{i}.processes"), &mount.processes);
        }
        for (name, check) in &self.checks {
            known(format!("checks.{name}.processes"), &check.processes);
        }
        for (i, mount) in self.mounts.iter().enumerate() {
            let place = &mount.destination;
            if !place.starts_with('/') || place.len() == 1 || place.split('/').any(|s| s == "..") {
                say(
                    format!("mounts.{i}.destination"),
                    format!(
                        "{place:?} is no place for a volume; write an absolute path other than /"
                    ),
                );
            }
            let before = &self.mounts[..i];
            let twice = groups.iter().find(|group| {
                mount.is_for(group) && before.iter().any(|other| other.is_for(group))
            });
            if let Some(group) = twice {
                say(
                    format!("mounts.{i}"),
                    format!(
                        "process group \"{group}\" has a volume already; a Machine has one at most"
                    ),
                );
            }
        }
        for key in self.env.keys().filter(|k| k.starts_with("FLY_")) {
            say(
                format!("env.{key}"),
                format!("`{key}`: names that start with FLY_ are the platform's own"),
            );
        }
        if self.deploy.strategy == Some(Strategy::Bluegreen) && !self.mounts.is_empty() {
            say(
                "deploy.strategy".into(),
                "bluegreen has two of each Machine for a while, and a volume is in one alone; write \"rolling\"".into(),
            );
        }
        for (i, file) in self.files.iter().enumerate() {
            let path = format!("files.{i}");
            let contents = [
                file.local_path.is_some(),
                file.raw_value.is_some(),
                file.secret_name.is_some(),
            ];
            if contents.into_iter().filter(|given| *given).count() != 1 {
                say(
                    path.clone(),
                    "a file has exactly one of `local_path`, `raw_value` and `secret_name`".into(),
                );
            }
            if !file.guest_path.starts_with('/') {
                say(
                    path,
                    format!("`guest_path` \"{}\" is not absolute", file.guest_path),
                );
            }
        }
        wrong.extend(self.unserved_ports());
        wrong
    }

    /// The ports that the edge does not serve as they are written, and those that two services want.
    fn unserved_ports(&self) -> Vec<(String, String)> {
        let mut wrong = Vec::new();
        let mut taken: Vec<(ServiceProtocol, Port, &[String])> = Vec::new();
        if let Some(http) = &self.http_service {
            for port in super::machine::http_service(http).ports {
                // The ports are right: what is left is of the options.
                wrong.extend(
                    port.unserved(ServiceProtocol::Tcp)
                        .into_iter()
                        .map(|(key, text)| (format!("http_service.{key}"), text)),
                );
                taken.push((ServiceProtocol::Tcp, port, &http.processes));
            }
        }
        for (i, service) in self.services.iter().enumerate() {
            for (j, given) in service.ports.iter().enumerate() {
                let path = format!("services.{i}.ports.{j}");
                let at = |key: &str| match key {
                    "" if given.port.is_some() => format!("{path}.port"),
                    "" if given.start_port.is_some() => format!("{path}.start_port"),
                    "" => path.clone(),
                    key => format!("{path}.{key}"),
                };
                let port = super::machine::port(given);
                let told = port.unserved(service.protocol).into_iter();
                wrong.extend(told.map(|(key, text)| (at(key), text)));
                let shared = |groups: &[String]| {
                    let among = |g: &String| service.processes.contains(g);
                    groups.is_empty() || service.processes.is_empty() || groups.iter().any(among)
                };
                let twice = port.numbers().and_then(|mut numbers| {
                    numbers.find(|number| {
                        taken.iter().any(|(protocol, other, groups)| {
                            *protocol == service.protocol && other.has(*number) && shared(groups)
                        })
                    })
                });
                if let Some(number) = twice {
                    let text = format!("port {number} is another service's already");
                    wrong.push((at(""), text));
                }
                taken.push((service.protocol, port, &service.processes));
            }
        }
        wrong
    }
}

fn default_port() -> u16 {
    8080
}

fn yes() -> bool {
    true
}
