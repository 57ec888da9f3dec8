//! Files that init writes into the guest: names, resolver, and those the configuration brings.
//!
//! The Machine's disk keeps them from boot to boot, so each is written in a way that can be repeated.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result};
use tern_guest::RunConfig;
use tern_guest::config::{DnsConfig, FileConfig};

/// Sets the host name and writes all files, under `root`.
pub fn write_all(root: &Path, config: &RunConfig) -> Result<()> {
    let etc = root.join("etc");
    fs::create_dir_all(&etc)?;
    if !config.hostname.is_empty() {
        replace(
            &etc.join("hostname"),
            format!("{}\n", config.hostname).as_bytes(),
            0o644,
        )?;
    }
    let hosts = etc.join("hosts");
    let old = read_if_regular(&hosts)?;
    replace(&hosts, hosts_text(&old, config).as_bytes(), 0o644)?;
    if !config.dns.nameservers.is_empty() {
        replace(
            &etc.join("resolv.conf"),
            resolv_conf(&config.dns).as_bytes(),
            0o644,
        )?;
    }
    for file in &config.files {
        write_file(root, file).with_context(|| format!("file {}", file.guest_path))?;
    }
    Ok(())
}

fn write_file(root: &Path, file: &FileConfig) -> Result<()> {
    let path = root.join(file.guest_path.trim_start_matches('/'));
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    replace(&path, &file.content, file.mode)
}

/// Writes a file in place of whatever is there, unless that is a directory. A link is replaced, not
/// followed: images link `/etc/resolv.conf` to services that do not run here.
fn replace(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
    .with_context(|| path.display().to_string())?;
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| path.display().to_string())?;
    file.write_all(content)?;
    file.set_permissions(Permissions::from_mode(mode))?;
    Ok(())
}

/// The text of a file; empty if there is none, or it is something else.
fn read_if_regular(path: &Path) -> Result<String> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_file() && found.len() <= MAX_HOSTS => {
            let bytes = fs::read(path).with_context(|| path.display().to_string())?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        }
        _ => Ok(String::new()),
    }
}

/// The image's own lines, then ours between two marks, which replace those of an earlier boot.
fn hosts_text(old: &str, config: &RunConfig) -> String {
    let mut text = String::new();
    let mut ours = false;
    for line in old.lines() {
        match line {
            BEGIN => ours = true,
            END => ours = false,
            _ if !ours => {
                text.push_str(line);
                text.push('\n');
            }
            _ => {}
        }
    }
    let has_localhost = text
        .lines()
        .filter_map(|line| line.split('#').next())
        .any(|line| {
            line.split_whitespace()
                .skip(1)
                .any(|name| name == "localhost")
        });
    text.push_str(BEGIN);
    text.push('\n');
    if !has_localhost {
        text.push_str("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n");
    }
    let own = own_address(config);
    let mut own_names = Vec::new();
    let given = |name: &str| {
        config
            .hosts
            .iter()
            .any(|entry| entry.names.iter().any(|n| n == name))
    };
    for name in [config.hostname.as_str(), config.machine_id.as_str()] {
        if !name.is_empty() && !own_names.contains(&name) && !given(name) {
            own_names.push(name);
        }
    }
    if matches!(own, Some(IpAddr::V6(_))) && !given(LOCAL_6PN) {
        own_names.push(LOCAL_6PN);
    }
    if !own_names.is_empty() {
        let own = own.map_or("127.0.1.1".to_string(), |ip| ip.to_string());
        // Writing into a string cannot fail.
        let _ = writeln!(text, "{own} {}", own_names.join(" "));
    }
    for entry in config.hosts.iter().filter(|entry| !entry.names.is_empty()) {
        let _ = writeln!(text, "{} {}", entry.ip, entry.names.join(" "));
    }
    text.push_str(END);
    text.push('\n');
    text
}

/// The address by which others know this guest: IPv6 is the private network, IPv4 only leads out.
fn own_address(config: &RunConfig) -> Option<IpAddr> {
    let addresses = || {
        config
            .interfaces
            .iter()
            .flat_map(|i| &i.addresses)
            .map(|net| net.addr())
    };
    addresses()
        .find(IpAddr::is_ipv6)
        .or_else(|| addresses().next())
}

fn resolv_conf(dns: &DnsConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        let _ = writeln!(text, "search {}", dns.searches.join(" "));
    }
    for server in &dns.nameservers {
        let _ = writeln!(text, "nameserver {server}");
    }
    text
}

const BEGIN: &str = "# These names were added when this Machine was started:";
const END: &str = "# (end of added names)";

/// The name under which a program finds the private address of its own Machine.
const LOCAL_6PN: &str = "fly-local-6pn";

/// An image's `/etc/hosts` that is longer is not a list of names.
const MAX_HOSTS: u64 = 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use tern_guest::config::{HostsEntry, InterfaceConfig};

    fn config() -> RunConfig {
        let mut config = RunConfig {
            hostname: "web-1".into(),
            machine_id: "e784079b449483".into(),
            ..Default::default()
        };
        config.interfaces = vec![InterfaceConfig {
            addresses: vec![
                "172.19.0.2/30".parse().unwrap(),
                "fdaa:0:1::2/112".parse().unwrap(),
            ],
            ..Default::default()
        }];
        config.hosts = vec![HostsEntry {
            ip: "10.0.0.1".parse().unwrap(),
            names: vec!["db".into()],
        }];
        config
    }

    #[test]
    fn names_are_added_once_however_often_the_machine_boots() {
        let first = hosts_text("127.0.0.1\tlocalhost\n", &config());
        assert_eq!(
            first,
            format!(
                "127.0.0.1\tlocalhost\n{BEGIN}\nfdaa:0:1::2 web-1 e784079b449483 fly-local-6pn\n\
                 10.0.0.1 db\n{END}\n"
            )
        );
        assert_eq!(hosts_text(&first, &config()), first);
    }

    #[test]
    fn an_image_without_names_gets_localhost() {
        let text = hosts_text("# 127.0.0.1 localhost\n", &RunConfig::default());
        assert!(
            text.contains("\n127.0.0.1 localhost\n::1 localhost"),
            "{text}"
        );
        assert!(!text.contains(LOCAL_6PN), "{text}");
    }

    #[test]
    fn files_take_the_place_of_links() {
        let root = tempfile::tempdir().unwrap();
        let etc = root.path().join("etc");
        fs::create_dir(&etc).unwrap();
        fs::write(root.path().join("precious"), "keep").unwrap();
        symlink("../precious", etc.join("resolv.conf")).unwrap();
        symlink("/dev/null", etc.join("hosts")).unwrap();
        let mut config = config();
        config.dns.nameservers = vec!["fdaa::3".parse().unwrap()];
        config.dns.searches = vec!["internal".into(), "x.internal".into()];
        config.files = vec![FileConfig {
            guest_path: "/a/b/secret".into(),
            content: b"\0\xff".into(),
            mode: 0o400,
        }];
        for _ in 0..2 {
            write_all(root.path(), &config).unwrap();
        }
        let read = |name: &str| fs::read_to_string(root.path().join(name)).unwrap();
        assert_eq!(
            read("etc/resolv.conf"),
            "search internal x.internal\nnameserver fdaa::3\n"
        );
        assert_eq!(read("precious"), "keep");
        assert_eq!(read("etc/hostname"), "web-1\n");
        let secret = root.path().join("a/b/secret");
        assert_eq!(fs::read(&secret).unwrap(), b"\0\xff");
        assert_eq!(
            fs::metadata(secret).unwrap().permissions().mode() & 0o7777,
            0o400
        );
    }

    #[test]
    fn without_name_servers_the_images_resolver_stays() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(root.path().join("etc/resolv.conf"), "nameserver 9.9.9.9\n").unwrap();
        write_all(root.path(), &RunConfig::default()).unwrap();
        let text = fs::read_to_string(root.path().join("etc/resolv.conf")).unwrap();
        assert_eq!(text, "nameserver 9.9.9.9\n");
    }

    #[test]
    fn a_directory_in_the_way_is_named() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("etc/hosts")).unwrap();
        let error = format!("{:#}", write_all(root.path(), &config()).unwrap_err());
        assert!(error.contains("etc/hosts"), "{error}");
    }
}
