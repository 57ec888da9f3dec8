//! From a `fly.toml` to the configuration of a Machine.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tern_catalog::{
    Check, CheckKind, FileConfig, GoDuration, Guest, Handler, HttpOptions, InitConfig,
    MachineConfig, Port, Restart, RestartPolicy, Service, ServiceProtocol, StopConfig, TlsOptions,
};

use super::{
    AppConfig, CheckConfig, HttpOptionsConfig, HttpService, PortConfig, ServiceConfig,
    TlsOptionsConfig, Vm,
};

/// The metadata key that names a Machine's process group.
pub const GROUP_KEY: &str = "fly_process_group";

/// The process group of the Machine that runs a release command.
pub const RELEASE_GROUP: &str = "fly_app_release_command";

/// The configuration of the Machine that runs the release command, if there is one: the app's image, environment and
/// files, and nothing that serves or stays.
pub fn release_config(
    config: &AppConfig,
    image: &str,
    base: &Path,
) -> Result<Option<MachineConfig>> {
    let Some(command) = &config.deploy.release_command else {
        return Ok(None);
    };
    let groups = config.groups();
    let group = groups.iter().find(|g| *g == super::DEFAULT_GROUP);
    let group = group
        .or(groups.first())
        .map_or(super::DEFAULT_GROUP, String::as_str);
    let mut machine = machine_config(config, group, image, base)?;
    machine.init.cmd = Some(command.clone());
    machine.init.exec = None;
    if let Some(vm) = &config.deploy.release_command_vm {
        machine.guest = guest(vm)?;
    }
    for (key, value) in [
        ("RELEASE_COMMAND", "1"),
        ("FLY_PROCESS_GROUP", RELEASE_GROUP),
    ] {
        machine.env.insert(key.to_owned(), value.to_owned());
    }
    let name = RELEASE_GROUP.to_owned();
    machine.metadata.insert(GROUP_KEY.to_owned(), name);
    machine.services.clear();
    machine.checks.clear();
    machine.restart = Restart {
        policy: RestartPolicy::No,
        max_retries: None,
    };
    Ok(Some(machine))
}

/// The configuration of a Machine in `group`, running `image`. Files are read beside `base`.
pub fn machine_config(
    config: &AppConfig,
    group: &str,
    image: &str,
    base: &Path,
) -> Result<MachineConfig> {
    let for_group = |named: &[String]| named.is_empty() || named.iter().any(|g| g == group);
    let mut env = config.env.clone();
    env.insert("FLY_PROCESS_GROUP".to_owned(), group.to_owned());
    if let Some(region) = &config.primary_region {
        env.insert("PRIMARY_REGION".to_owned(), region.clone());
    }
    let http = config
        .http_service
        .iter()
        .filter(|s| for_group(&s.processes))
        .map(http_service);
    let others = config
        .services
        .iter()
        .filter(|s| for_group(&s.processes))
        .map(service);
    let vm = most_specific(&config.vm, group, |v| &v.processes);
    let restart = most_specific(&config.restart, group, |r| &r.processes);
    let checks = config.checks.iter();
    let checks = checks.filter(|(_, check)| for_group(&check.processes));
    let files = config.files.iter().filter(|f| for_group(&f.processes));
    Ok(MachineConfig {
        image: image.to_owned(),
        env,
        init: InitConfig {
            // A process group's command goes before that for all.
            cmd: match command(config, group)? {
                Some(cmd) => Some(cmd),
                None => config.experimental.cmd.clone(),
            },
            entrypoint: config.experimental.entrypoint.clone(),
            exec: config.experimental.exec.clone(),
            ..InitConfig::default()
        },
        guest: vm.map(guest).transpose()?.unwrap_or_default(),
        metadata: [
            (GROUP_KEY.to_owned(), group.to_owned()),
            ("fly_platform_version".to_owned(), "v2".to_owned()),
        ]
        .into(),
        services: http.chain(others).collect(),
        checks: checks
            .map(|(name, given)| {
                let check = Check {
                    port: given.port,
                    ..check(&given.how(), given.kind)
                };
                (name.clone(), check)
            })
            .collect(),
        restart: restart
            .map(|r| Restart {
                policy: r.policy,
                max_retries: r.retries,
            })
            .unwrap_or_default(),
        stop_config: StopConfig {
            signal: config.kill_signal.clone(),
            timeout: config
                .kill_timeout
                .or(config.experimental.kill_timeout)
                .map(GoDuration),
        },
        files: files
            .map(|file| {
                let raw_value = match (&file.raw_value, &file.local_path) {
                    _ if file.secret_name.is_some() => String::new(),
                    (Some(raw), _) => raw.clone(),
                    (None, Some(local)) => {
                        let path = base.join(local);
                        let content = std::fs::read(&path).with_context(|| {
                            format!("[[files]] {} cannot be read", path.display())
                        })?;
                        STANDARD.encode(content)
                    }
                    (None, None) => bail!("[[files]] {} has no content", file.guest_path),
                };
                Ok(FileConfig {
                    guest_path: file.guest_path.clone(),
                    raw_value,
                    secret_name: file.secret_name.clone(),
                    mode: None,
                })
            })
            .collect::<Result<_>>()?,
        // `tern deploy` finds the volume.
        mounts: Vec::new(),
        auto_destroy: false,
    })
}

/// Whether the file says of what size the group's Machines are.
pub fn has_vm(config: &AppConfig, group: &str) -> bool {
    most_specific(&config.vm, group, |v| &v.processes).is_some()
}

/// What is written for this group, else what is written for all, in whatever order.
fn most_specific<'a, T>(
    all: &'a [T],
    group: &str,
    processes: impl Fn(&T) -> &[String],
) -> Option<&'a T> {
    let own = all.iter().find(|t| processes(t).iter().any(|g| g == group));
    own.or_else(|| all.iter().find(|t| processes(t).is_empty()))
}

fn command(config: &AppConfig, group: &str) -> Result<Option<Vec<String>>> {
    let Some(command) = config.processes.get(group).filter(|c| !c.trim().is_empty()) else {
        return Ok(None);
    };
    match shlex::split(command) {
        Some(words) => Ok(Some(words)),
        None => bail!("process group \"{group}\": a quote in `{command}` is not closed"),
    }
}

fn guest(vm: &Vm) -> Result<Guest> {
    let mut guest = match &vm.size {
        None => Guest::default(),
        Some(size) => Guest::preset(size).with_context(|| {
            format!("there is no size \"{size}\"; write shared-cpu-1x … 8x or performance-1x … 8x")
        })?,
    };
    if let Some(kind) = &vm.cpu_kind {
        guest.cpu_kind = kind.clone();
    }
    if let Some(cpus) = vm.cpus {
        guest.cpus = cpus;
    }
    if let Some(memory) = vm.memory.or(vm.memory_mb) {
        guest.memory_mb = memory;
    }
    Ok(guest)
}

pub(super) fn http_service(http: &HttpService) -> Service {
    let tls = http.tls_options.as_ref().map(tls_options);
    let options = http.http_options.as_ref().map(http_options);
    let port = |port, handlers, force_https, tls_options| Port {
        force_https,
        tls_options,
        http_options: options.clone(),
        ..Port::new(port, handlers)
    };
    Service {
        protocol: ServiceProtocol::Tcp,
        internal_port: http.internal_port,
        autostop: http.auto_stop_machines,
        autostart: http.auto_start_machines,
        min_machines_running: http.min_machines_running,
        ports: vec![
            port(80, vec![Handler::Http], http.force_https, None),
            port(443, vec![Handler::Tls, Handler::Http], false, tls),
        ],
        checks: http
            .checks
            .iter()
            .map(|c| check(c, CheckKind::Http))
            .collect(),
        concurrency: http.concurrency.clone(),
    }
}

fn service(given: &ServiceConfig) -> Service {
    let tcp = given.tcp_checks.iter().map(|c| check(c, CheckKind::Tcp));
    let http = given.http_checks.iter().map(|c| check(c, CheckKind::Http));
    Service {
        protocol: given.protocol,
        internal_port: given.internal_port,
        autostop: given.auto_stop_machines,
        autostart: given.auto_start_machines,
        min_machines_running: given.min_machines_running,
        ports: given.ports.iter().map(port).collect(),
        checks: tcp.chain(http).collect(),
        concurrency: given.concurrency.clone(),
    }
}

pub(super) fn port(given: &PortConfig) -> Port {
    Port {
        port: given.port,
        start_port: given.start_port,
        end_port: given.end_port,
        handlers: given.handlers.clone(),
        force_https: given.force_https,
        tls_options: given.tls_options.as_ref().map(tls_options),
        http_options: given.http_options.as_ref().map(http_options),
        proxy_proto_options: given.proxy_proto_options,
    }
}

fn check(given: &CheckConfig, kind: CheckKind) -> Check {
    Check {
        kind,
        port: None,
        interval: given.interval.map(GoDuration),
        timeout: given.timeout.map(GoDuration),
        grace_period: given.grace_period.map(GoDuration),
        method: given.method.clone(),
        path: given.path.clone(),
        headers: given.headers.clone(),
    }
}

fn tls_options(given: &TlsOptionsConfig) -> TlsOptions {
    TlsOptions {
        alpn: given.alpn.clone(),
        versions: given.versions.clone(),
    }
}

fn http_options(given: &HttpOptionsConfig) -> HttpOptions {
    HttpOptions {
        h2_backend: given.h2_backend,
        idle_timeout: given.idle_timeout,
        response: given.response.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_split_as_a_shell_does() {
        let split = |text: &str| {
            let processes = [("web".to_owned(), text.to_owned())].into();
            let config = AppConfig {
                processes,
                ..AppConfig::default()
            };
            command(&config, "web")
        };
        assert_eq!(
            split(r#"a "b c" d\ e 'f "g"' """#).unwrap().unwrap(),
            ["a", "b c", "d e", "f \"g\"", ""]
        );
        assert!(split("a 'b").unwrap_err().to_string().contains("web"));
        assert_eq!(split(" ").unwrap(), None);
    }
}
