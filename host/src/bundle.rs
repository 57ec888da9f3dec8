//! What a Machine boots with: its run configuration and the monitor's `vm.json`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tern_catalog::{Machine, RESOLVER, SecretName};
use tern_guest::RunConfig;
use tern_guest::config::{
    DnsConfig, FileConfig, HostsEntry, InterfaceConfig, MountConfig, ProcessConfig, StopConfig,
};
use tern_guest::signal::parse_signal;
use tern_image::ImageConfig;
use thiserror::Error;

use crate::config::HostConfig;
use crate::dir::MachineDir;
use crate::monitor::config::{Disk, Jail, Net, RateLimit, VmConfig, Vsock};
use crate::network::{GATEWAY, Slot};

/// A config that cannot be run, whatever is tried.
#[derive(Debug, Error)]
pub(crate) enum BundleError {
    #[error("the file {path} has a raw_value that is not base64: {source}")]
    File {
        path: String,
        source: base64::DecodeError,
    },
    #[error(
        "the file {path} is to hold the secret {name}, which is not set; `tern secrets set {name}=…` does that"
    )]
    NoSecret { path: String, name: SecretName },
    #[error("the file {path} is to hold the secret {name}, whose value is not base64: {source}")]
    SecretFile {
        path: String,
        name: SecretName,
        source: base64::DecodeError,
    },
    #[error("\"{0}\" is not a signal")]
    Signal(String),
    #[error("neither the image nor the config says what to run")]
    NoCommand,
    #[error(transparent)]
    Archive(#[from] tern_guest::archive::ArchiveError),
}

/// An app's secrets, in the clear.
pub(crate) type Secrets = BTreeMap<SecretName, String>;

/// What init is told.
pub(crate) fn run_config(
    machine: &Machine,
    image: &ImageConfig,
    secrets: &Secrets,
    slot: Slot,
) -> Result<RunConfig, BundleError> {
    let config = &machine.config;
    let id = machine.id.to_string();
    let init = &config.init;
    // An entrypoint of one's own makes the image's arguments meaningless, as in OCI runtimes.
    let cmd = match (&init.cmd, &init.entrypoint) {
        (Some(cmd), _) => cmd.clone(),
        (None, Some(_)) => Vec::new(),
        (None, None) => image.cmd.clone(),
    };
    let process = ProcessConfig {
        entrypoint: init
            .entrypoint
            .clone()
            .unwrap_or_else(|| image.entrypoint.clone()),
        cmd,
        exec: init.exec.clone().unwrap_or_default(),
        env: environment(machine, image, secrets),
        working_dir: image.working_dir.clone(),
        user: image.user.clone(),
        tty: init.tty,
    };
    if process.argv().is_empty() {
        return Err(BundleError::NoCommand);
    }
    let files = config.files.iter().map(|file| {
        Ok(FileConfig {
            guest_path: file.guest_path.clone(),
            content: content(file, secrets)?,
            mode: file.mode.unwrap_or(0o644),
        })
    });
    let own = IpNet::V6(net6(machine));
    let v4 = IpNet::V4(Ipv4Net::new(slot.guest_v4(), 30).expect("30 is at most 32"));
    // The monitor's order of disks: image, own disk, then the volumes, in the order of the config.
    let mounts = config
        .mounts
        .iter()
        .zip('c'..)
        .map(|(mount, letter)| MountConfig {
            device: format!("/dev/vd{letter}"),
            fs: "ext4".to_owned(),
            path: mount.path.clone(),
            read_only: false,
        });
    Ok(RunConfig {
        mounts: mounts.collect(),
        machine_id: id.clone(),
        hostname: id.clone(),
        process,
        stop: stop(machine, image)?,
        files: files.collect::<Result<_, BundleError>>()?,
        interfaces: vec![InterfaceConfig {
            mac: Some(slot.guest_mac().to_string()),
            addresses: vec![own, v4],
            gateway_v4: Some(slot.host_v4()),
            gateway_v6: Some(GATEWAY),
            ..InterfaceConfig::default()
        }],
        dns: DnsConfig {
            nameservers: vec![IpAddr::V6(RESOLVER)],
            searches: Vec::new(),
        },
        hosts: vec![HostsEntry {
            ip: IpAddr::V6(machine.private_ip),
            names: vec![
                "fly-local-6pn".to_owned(),
                format!("{id}.vm.{}.internal", machine.app),
            ],
        }],
        ..RunConfig::default()
    })
}

/// What the monitor is told.
pub(crate) fn vm_config(
    host: &HostConfig,
    machine: &Machine,
    dir: &MachineDir,
    image: &std::path::Path,
    volumes: impl Iterator<Item = PathBuf>,
    slot: Slot,
    jail: Option<Jail>,
) -> VmConfig {
    let limits = &host.rate_limits;
    let disk = |path, read_only| Disk {
        path,
        read_only,
        rate_limit: RateLimit::new(limits.disk_bytes, limits.disk_operations),
    };
    let network = RateLimit::new(limits.network_bytes, None);
    let own = [disk(image.to_owned(), true), disk(dir.disk(), false)];
    VmConfig {
        id: machine.id.to_string(),
        vcpus: machine.config.guest.cpus,
        memory_mib: machine.config.guest.memory_mb,
        cpu_template: host.cpu_template,
        kernel: host.kernel.clone(),
        initramfs: vec![host.initramfs.clone(), dir.run_cpio()],
        cmdline: host.cmdline.clone(),
        disks: own
            .into_iter()
            .chain(volumes.map(|path| disk(path, false)))
            .collect(),
        net: vec![Net {
            tap: slot.tap(),
            mac: slot.guest_mac().to_string(),
            receive_limit: network,
            transmit_limit: network,
            vhost: host.vhost_net,
        }],
        vsock: Vsock {
            cid: slot.cid(),
            path: dir.vsock(),
        },
        control: dir.control(),
        pid_file: dir.pid_file(),
        serial_log: dir.serial_log(),
        snapshot_dir: dir.snapshot(),
        exit_file: dir.exit_file(),
        jail,
    }
}

/// What a file holds: what the config says, or a secret.
fn content(file: &tern_catalog::FileConfig, secrets: &Secrets) -> Result<Vec<u8>, BundleError> {
    let path = || file.guest_path.clone();
    let Some(name) = &file.secret_name else {
        let content = BASE64.decode(&file.raw_value);
        return content.map_err(|source| BundleError::File {
            path: path(),
            source,
        });
    };
    let value = secrets.get(name).ok_or_else(|| BundleError::NoSecret {
        path: path(),
        name: name.clone(),
    })?;
    // As `base64` writes it: in lines.
    let value: String = value.split_ascii_whitespace().collect();
    BASE64
        .decode(value)
        .map_err(|source| BundleError::SecretFile {
            path: path(),
            name: name.clone(),
            source,
        })
}

/// The image's, then the Machine's own, then the app's secrets, then what tells the app where it is.
fn environment(machine: &Machine, image: &ImageConfig, secrets: &Secrets) -> Vec<(String, String)> {
    let config = &machine.config;
    let pair = |name: &str, value: String| (name.to_owned(), value);
    let mut env: Vec<_> = image
        .env
        .iter()
        .filter_map(|word| word.split_once('='))
        .filter(|(name, _)| !name.is_empty())
        .map(|(name, value)| pair(name, value.to_owned()))
        .collect();
    if !config.env.contains_key("PRIMARY_REGION") {
        env.push(pair("PRIMARY_REGION", machine.region.clone()));
    }
    env.extend(config.env.iter().map(|(n, v)| pair(n, v.clone())));
    env.extend(secrets.iter().map(|(n, v)| pair(n.as_str(), v.clone())));
    let id = machine.id.to_string();
    env.push(pair("FLY_APP_NAME", machine.app.to_string()));
    env.push(pair("FLY_MACHINE_ID", id.clone()));
    env.push(pair("FLY_ALLOC_ID", id));
    env.push(pair("FLY_REGION", machine.region.clone()));
    env.push(pair("FLY_IMAGE_REF", config.image.clone()));
    env.push(pair("FLY_MACHINE_VERSION", machine.instance_id.clone()));
    env.push(pair("FLY_PRIVATE_IP", machine.private_ip.to_string()));
    env.push(pair("FLY_VM_MEMORY_MB", config.guest.memory_mb.to_string()));
    if let Some(group) = config.metadata.get("fly_process_group") {
        env.push(pair("FLY_PROCESS_GROUP", group.clone()));
    }
    env
}

/// The signal is the config's, else the image's, else `SIGINT`.
fn stop(machine: &Machine, image: &ImageConfig) -> Result<StopConfig, BundleError> {
    let config = &machine.config.stop_config;
    let default = StopConfig::default();
    let signal = match (&config.signal, &image.stop_signal) {
        (Some(name), _) => parse_signal(name).ok_or_else(|| BundleError::Signal(name.clone()))?,
        // An image's nonsense is not worth a failed start.
        (None, Some(name)) => parse_signal(name).unwrap_or(default.signal),
        (None, None) => default.signal,
    };
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    Ok(StopConfig {
        signal,
        timeout_ms: config.timeout.map_or(default.timeout_ms, |t| millis(t.0)),
    })
}

fn net6(machine: &Machine) -> Ipv6Net {
    Ipv6Net::new(machine.private_ip, 112).expect("112 is at most 128")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use tern_catalog::{
        Desired, DesiredState, HostId, MachineConfig, MachineId, MachineNumber, NetworkId,
        PrivateAddress,
    };

    pub(crate) fn machine(config: &str) -> Machine {
        let config: MachineConfig = serde_json::from_str(config).unwrap();
        let (network, host, number) = (NetworkId(7), HostId(1), MachineNumber(3));
        Machine {
            id: MachineId::random(),
            name: "calm-fox".into(),
            app: "hello".parse().unwrap(),
            network,
            host,
            region: "ams".into(),
            number,
            private_ip: PrivateAddress::of_machine(network, host, number),
            config,
            instance_id: "01A".into(),
            version: 1,
            desired: Desired {
                state: DesiredState::Started,
                generation: 1,
            },
            cordoned: false,
            created_at: jiff::Timestamp::UNIX_EPOCH,
            updated_at: jiff::Timestamp::UNIX_EPOCH,
        }
    }

    fn image() -> ImageConfig {
        ImageConfig {
            entrypoint: vec!["/entry".into()],
            cmd: vec!["serve".into()],
            env: vec!["A=image".into(), "PATH=/opt/bin".into(), "rubbish".into()],
            stop_signal: Some("SIGQUIT".into()),
            ..ImageConfig::default()
        }
    }

    #[test]
    fn the_config_overrides_the_image_and_the_host_has_the_last_word() {
        let machine = machine(
            r#"{"image":"registry.internal/hello:1","env":{"A":"own","FLY_APP_NAME":"lie"},
                "metadata":{"fly_process_group":"web"}}"#,
        );
        let run = run_config(&machine, &image(), &Secrets::new(), Slot::new(5).unwrap()).unwrap();
        run.check().unwrap();
        let env = run.process.merged_env();
        let get = |name: &str| env.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
        assert_eq!(get("A"), Some("own"));
        assert_eq!(get("PATH"), Some("/opt/bin"));
        assert_eq!(get("FLY_APP_NAME"), Some("hello"));
        assert_eq!(get("FLY_PRIVATE_IP"), Some("fdaa:0:7:0:1:0:3:2"));
        assert_eq!(get("FLY_PROCESS_GROUP"), Some("web"));
        assert_eq!(get("PRIMARY_REGION"), Some("ams"));
        assert_eq!(run.stop.signal, 3);
        assert_eq!(run.process.argv(), ["/entry", "serve"]);
        let addresses: Vec<_> = run.interfaces[0]
            .addresses
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(addresses, ["fdaa:0:7:0:1:0:3:2/112", "172.19.0.22/30"]);
    }

    #[test]
    fn secrets_win_over_the_config_and_are_in_nothing_that_is_shown() {
        let machine = machine(
            r#"{"image":"x","env":{"A":"config"},
                "files":[{"guest_path":"/key","secret_name":"KEY"}]}"#,
        );
        let secrets: Secrets = [
            ("A", "hunter2"),
            ("FLY_APP_NAME", "lie"),
            ("KEY", "aHVu\ndGVyMg==\n"),
        ]
        .map(|(name, value)| (name.parse().unwrap(), value.to_owned()))
        .into();
        let slot = Slot::new(0).unwrap();
        let run = run_config(&machine, &image(), &secrets, slot).unwrap();
        let env = run.process.merged_env();
        let get = |name: &str| env.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
        assert_eq!(get("A"), Some("hunter2"));
        assert_eq!(get("FLY_APP_NAME"), Some("hello"));
        assert_eq!(run.files[0].content, b"hunter2");
        let host = HostConfig::new(HostId(1), "/d");
        let dir = MachineDir::new(&host.machines_dir(), &machine.id);
        let path = std::path::Path::new("/d/image");
        let vm = vm_config(&host, &machine, &dir, path, std::iter::empty(), slot, None);
        assert!(!serde_json::to_string(&vm).unwrap().contains("hunter2"));

        // A file whose secret is missing, or not base64: the start says which, and never the value.
        let missing = run_config(&machine, &image(), &Secrets::new(), slot).unwrap_err();
        assert!(
            missing.to_string().contains("tern secrets set KEY"),
            "{missing}"
        );
        let bad: Secrets = [("KEY".parse().unwrap(), "hunter2!".to_owned())].into();
        let bad = run_config(&machine, &image(), &bad, slot).unwrap_err();
        let bad = bad.to_string();
        assert!(bad.contains("KEY") && !bad.contains("hunter2"), "{bad}");
    }

    #[test]
    fn vm_json_has_the_limits_that_there_are() {
        let machine = machine(r#"{"image":"x"}"#);
        let mut host = HostConfig::new(HostId(1), "/d");
        let dir = MachineDir::new(&host.machines_dir(), &machine.id);
        let vm = |host: &HostConfig| {
            let volume = PathBuf::from("/d/volumes/vol_1/disk.ext4");
            let (image, slot) = (std::path::Path::new("/d/image"), Slot::new(0).unwrap());
            let vm = vm_config(
                host,
                &machine,
                &dir,
                image,
                [volume].into_iter(),
                slot,
                None,
            );
            serde_json::to_value(vm).unwrap()
        };
        let keys = |value: &serde_json::Value| -> Vec<String> {
            value.as_object().unwrap().keys().cloned().collect()
        };
        let unlimited = vm(&host);
        assert_eq!(keys(&unlimited["disks"][1]), ["path", "read_only"]);
        assert_eq!(keys(&unlimited["net"][0]), ["mac", "tap"]);
        host.vhost_net = true;
        assert_eq!(vm(&host)["net"][0]["vhost"], true);
        host.vhost_net = false;
        host.rate_limits.disk_operations = Some(500);
        assert_eq!(
            vm(&host)["disks"][0]["rate_limit"],
            serde_json::json!({"operations_per_second": 500})
        );
        host.rate_limits.disk_bytes = Some(100 << 20);
        host.rate_limits.network_bytes = Some(50 << 20);
        let limited = vm(&host);
        for disk in limited["disks"].as_array().unwrap() {
            let both = serde_json::json!(
                {"bytes_per_second": 104_857_600, "operations_per_second": 500}
            );
            assert_eq!(disk["rate_limit"], both);
        }
        for direction in ["receive_limit", "transmit_limit"] {
            let bytes = serde_json::json!({"bytes_per_second": 52_428_800});
            assert_eq!(limited["net"][0][direction], bytes);
        }
    }

    #[test]
    fn an_entrypoint_of_ones_own_drops_the_images_arguments() {
        let machine = machine(r#"{"image":"x","init":{"entrypoint":["/mine"]}}"#);
        let run = run_config(&machine, &image(), &Secrets::new(), Slot::new(0).unwrap()).unwrap();
        assert_eq!(run.process.argv(), ["/mine"]);
    }

    #[test]
    fn what_cannot_run_is_refused_before_a_boot() {
        let slot = Slot::new(0).unwrap();
        let nothing = run_config(
            &machine(r#"{"image":"x"}"#),
            &ImageConfig::default(),
            &Secrets::new(),
            slot,
        );
        assert!(matches!(nothing, Err(BundleError::NoCommand)));
        let signal = machine(r#"{"image":"x","stop_config":{"signal":"SIGNOPE"}}"#);
        assert!(matches!(
            run_config(&signal, &image(), &Secrets::new(), slot),
            Err(BundleError::Signal(_))
        ));
        let file = machine(r#"{"image":"x","files":[{"guest_path":"/a","raw_value":"%"}]}"#);
        assert!(matches!(
            run_config(&file, &image(), &Secrets::new(), slot),
            Err(BundleError::File { .. })
        ));
    }
}
