//! What a run configuration must keep to, beyond its types.

use super::{DiskConfig, InterfaceConfig, RunConfig};
use crate::signal::is_signal;

impl RunConfig {
    /// Says what is wrong, if anything.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.check_names()?;
        self.check_process()?;
        self.check_disks()?;
        for file in &self.files {
            path("files.guest_path", &file.guest_path)?;
            if file.guest_path.ends_with('/') {
                return bad("files.guest_path", &file.guest_path, "must name a file");
            }
            if file.mode & !0o7777 != 0 {
                return bad(
                    "files.mode",
                    &format!("{:o}", file.mode),
                    "has more than permissions",
                );
            }
        }
        for (at, interface) in self.interfaces.iter().enumerate() {
            check_interface(interface)?;
            if self.interfaces[..at]
                .iter()
                .any(|other| other.name == interface.name)
            {
                return bad("interfaces.name", &interface.name, "is given twice");
            }
        }
        for limit in &self.rlimits {
            if limit.soft > limit.hard {
                return bad(
                    "rlimits.soft",
                    &limit.soft.to_string(),
                    "is above the hard limit",
                );
            }
        }
        Ok(())
    }

    fn check_names(&self) -> Result<(), ConfigError> {
        if !self.machine_id.is_empty() {
            domain("machine_id", &self.machine_id)?;
        }
        if !self.hostname.is_empty() {
            domain("hostname", &self.hostname)?;
            if self.hostname.len() > MAX_HOSTNAME {
                return bad("hostname", &self.hostname, "is longer than 64 characters");
            }
        }
        for search in &self.dns.searches {
            domain("dns.searches", search)?;
        }
        for name in self.hosts.iter().flat_map(|entry| &entry.names) {
            domain("hosts.names", name)?;
        }
        Ok(())
    }

    fn check_process(&self) -> Result<(), ConfigError> {
        let process = &self.process;
        for word in process
            .entrypoint
            .iter()
            .chain(&process.cmd)
            .chain(&process.exec)
        {
            no_nul("process", word)?;
        }
        for (name, value) in &process.env {
            check_variable(name, value)?;
        }
        no_nul("process.user", &process.user)?;
        if !process.working_dir.is_empty() {
            path("process.working_dir", &process.working_dir)?;
        }
        if !is_signal(self.stop.signal) {
            return bad(
                "stop.signal",
                &self.stop.signal.to_string(),
                "is not a signal",
            );
        }
        Ok(())
    }

    fn check_disks(&self) -> Result<(), ConfigError> {
        let disk = |what, disk: &DiskConfig| device(what, &disk.device, &disk.fs);
        disk("root.image.device", &self.root.image)?;
        if let Some(own) = &self.root.disk {
            disk("root.disk.device", own)?;
        }
        for mount in &self.mounts {
            device("mounts.device", &mount.device, &mount.fs)?;
            path("mounts.path", &mount.path)?;
            if mount.path.bytes().all(|b| b == b'/') {
                return bad(
                    "mounts.path",
                    &mount.path,
                    "would hide the root file system",
                );
            }
        }
        Ok(())
    }
}

/// A configuration that cannot be run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {value:?} {problem}")]
pub struct ConfigError {
    /// Where in the configuration.
    pub key: &'static str,
    /// What stands there.
    pub value: String,
    /// What is wrong with it.
    pub problem: &'static str,
}

/// Whether an environment variable can be given to a program.
pub(crate) fn check_variable(name: &str, value: &str) -> Result<(), ConfigError> {
    if name.is_empty() || name.contains(['=', '\0']) {
        return bad("process.env", name, "is not a variable's name");
    }
    no_nul("process.env", value)
}

fn check_interface(interface: &InterfaceConfig) -> Result<(), ConfigError> {
    let name = &interface.name;
    let plain = |b: u8| b.is_ascii_graphic() && b != b'/' && b != b':';
    if name.is_empty() || name.len() > MAX_INTERFACE || !name.bytes().all(plain) {
        return bad("interfaces.name", name, "is not an interface's name");
    }
    if interface
        .mac
        .as_deref()
        .is_some_and(|mac| parse_mac(mac).is_none())
    {
        let mac = interface.mac.as_deref().unwrap_or_default();
        return bad(
            "interfaces.mac",
            mac,
            "is not a station's address like 02:00:00:00:00:01",
        );
    }
    if !(MIN_MTU..=MAX_MTU).contains(&interface.mtu) {
        return bad(
            "interfaces.mtu",
            &interface.mtu.to_string(),
            "is not from 1280 to 65535",
        );
    }
    Ok(())
}

/// The six bytes of a hardware address as `02:00:00:00:00:01`; none if it is not one, or is a
/// group's address, which no interface can have.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts
            .next()
            .filter(|p| p.len() == 2 && !p.starts_with('+'))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    (parts.next().is_none() && mac[0] & 1 == 0 && mac != [0; 6]).then_some(mac)
}

fn path(key: &'static str, value: &str) -> Result<(), ConfigError> {
    no_nul(key, value)?;
    if !value.starts_with('/') {
        return bad(key, value, "is not an absolute path");
    }
    if value.split('/').any(|part| part == "..") {
        return bad(key, value, "has a `..` in it");
    }
    Ok(())
}

fn device(key: &'static str, value: &str, fs: &str) -> Result<(), ConfigError> {
    path(key, value)?;
    if !value.starts_with("/dev/") {
        return bad(key, value, "is not under /dev");
    }
    if fs.is_empty() || !fs.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return bad(key, fs, "is not a file system");
    }
    Ok(())
}

fn domain(key: &'static str, value: &str) -> Result<(), ConfigError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if value.is_empty() || value.len() > MAX_DOMAIN || !value.bytes().all(plain) {
        return bad(key, value, "is not a host name");
    }
    Ok(())
}

fn no_nul(key: &'static str, value: &str) -> Result<(), ConfigError> {
    if value.contains('\0') {
        bad(key, value, "has a NUL in it")
    } else {
        Ok(())
    }
}

fn bad<T>(key: &'static str, value: &str, problem: &'static str) -> Result<T, ConfigError> {
    // Enough to recognize it by: the sentence goes into logs and API errors.
    let value = value.chars().take(80).collect();
    Err(ConfigError {
        key,
        value,
        problem,
    })
}

/// `__NEW_UTS_LEN` of the kernel.
const MAX_HOSTNAME: usize = 64;
/// RFC 1035, section 2.3.4, without the trailing dot.
const MAX_DOMAIN: usize = 253;
/// `IFNAMSIZ` of the kernel, without the closing NUL.
const MAX_INTERFACE: usize = 15;
/// IPv6 needs this much (RFC 8200, section 5).
const MIN_MTU: u32 = 1280;
const MAX_MTU: u32 = 65_535;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{FileConfig, MountConfig, Resource, Rlimit};

    #[test]
    fn the_default_is_fine() {
        RunConfig::default().check().unwrap();
    }

    #[test]
    fn each_mistake_is_named() {
        let file = |path: &str, mode| FileConfig {
            guest_path: path.into(),
            content: vec![],
            mode,
        };
        let interface = |f: fn(&mut InterfaceConfig)| {
            let mut interface = InterfaceConfig::default();
            f(&mut interface);
            interface
        };
        type Spoil = Box<dyn Fn(&mut RunConfig)>;
        let mistakes: [(&str, Spoil); 18] = [
            ("hostname", Box::new(|c| c.hostname = "a b".into())),
            ("hostname", Box::new(|c| c.hostname = "a".repeat(65))),
            ("machine_id", Box::new(|c| c.machine_id = "../x".into())),
            ("process", Box::new(|c| c.process.cmd = vec!["a\0b".into()])),
            (
                "process.env",
                Box::new(|c| c.process.env = vec![("A=B".into(), "".into())]),
            ),
            (
                "process.env",
                Box::new(|c| c.process.env = vec![("".into(), "".into())]),
            ),
            (
                "process.working_dir",
                Box::new(|c| c.process.working_dir = "srv".into()),
            ),
            ("stop.signal", Box::new(|c| c.stop.signal = 0)),
            (
                "root.image.device",
                Box::new(|c| c.root.image.device = "/etc/passwd".into()),
            ),
            (
                "root.image.device",
                Box::new(|c| c.root.image.fs = "er fs".into()),
            ),
            (
                "files.guest_path",
                Box::new(move |c| c.files = vec![file("/a/../b", 0o644)]),
            ),
            (
                "files.guest_path",
                Box::new(move |c| c.files = vec![file("/a/", 0o644)]),
            ),
            (
                "files.mode",
                Box::new(move |c| c.files = vec![file("/a", 0o100_644)]),
            ),
            (
                "mounts.path",
                Box::new(|c| {
                    c.mounts = vec![MountConfig {
                        device: "/dev/vdc".into(),
                        fs: "ext4".into(),
                        path: "//".into(),
                        read_only: false,
                    }];
                }),
            ),
            ("interfaces.name", {
                Box::new(move |c| c.interfaces = vec![interface(|i| i.name = "a/b".into())])
            }),
            ("interfaces.mac", {
                Box::new(move |c| c.interfaces = vec![interface(|i| i.mac = Some("02:00".into()))])
            }),
            ("interfaces.mtu", {
                Box::new(move |c| c.interfaces = vec![interface(|i| i.mtu = 576)])
            }),
            (
                "rlimits.soft",
                Box::new(|c| {
                    c.rlimits = vec![Rlimit {
                        resource: Resource::Nofile,
                        soft: 2,
                        hard: 1,
                    }];
                }),
            ),
        ];
        for (at, (key, spoil)) in mistakes.iter().enumerate() {
            let mut config = RunConfig::default();
            spoil(&mut config);
            assert_eq!(config.check().map_err(|e| e.key), Err(*key), "mistake {at}");
        }
    }

    #[test]
    fn hardware_addresses() {
        assert_eq!(parse_mac("02:fe:00:00:00:0A"), Some([2, 0xfe, 0, 0, 0, 10]));
        for text in [
            "",
            "02",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "01:00:00:00:00:00",
        ] {
            assert_eq!(parse_mac(text), None, "{text}");
        }
        assert_eq!(parse_mac("+2:00:00:00:00:01"), None);
        assert_eq!(parse_mac("00:00:00:00:00:00"), None);
    }
}
