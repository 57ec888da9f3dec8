//! The little initramfs that brings a run configuration into the guest.
//!
//! The kernel unpacks every archive it is given, one after another, so the configuration needs no
//! disk of its own: a `newc` archive with `/tern/run.json` follows the common one with init.
//! Format: `Documentation/driver-api/early-userspace/buffer-format.rst` of Linux.

use crate::config::{ConfigError, RunConfig};

/// Where init finds the configuration.
pub const RUN_JSON: &str = "/tern/run.json";

/// Packs a configuration for the kernel. Its length is a multiple of 512.
pub fn run_archive(config: &RunConfig) -> Result<Vec<u8>, ArchiveError> {
    config.check()?;
    let json = serde_json::to_vec(config).map_err(ArchiveError::Json)?;
    if json.len() > MAX_RUN_JSON {
        return Err(ArchiveError::TooLong(json.len()));
    }
    let mut archive = Vec::with_capacity(json.len() + 2 * BLOCK);
    // Nobody but root may read it: it holds the app's secrets.
    append(&mut archive, "tern", S_IFDIR | 0o700, 2, &[]);
    append(&mut archive, "tern/run.json", S_IFREG | 0o600, 1, &json);
    append(&mut archive, TRAILER, 0, 1, &[]);
    pad(&mut archive, BLOCK);
    Ok(archive)
}

/// Finds the configuration in an archive, as init will see it.
pub fn read_run_archive(archive: &[u8]) -> Result<RunConfig, ArchiveError> {
    let mut rest = archive;
    loop {
        let (entry, after) = take_entry(rest)?;
        if entry.name == TRAILER.as_bytes() {
            return Err(ArchiveError::Missing);
        }
        if entry.name == b"tern/run.json" && entry.mode & S_IFMT == S_IFREG {
            return parse_run_json(entry.data);
        }
        rest = after;
    }
}

/// Reads and checks the text of `/tern/run.json`.
pub fn parse_run_json(json: &[u8]) -> Result<RunConfig, ArchiveError> {
    if json.len() > MAX_RUN_JSON {
        return Err(ArchiveError::TooLong(json.len()));
    }
    let config: RunConfig = serde_json::from_slice(json).map_err(ArchiveError::Json)?;
    config.check()?;
    Ok(config)
}

/// Why there is no archive, or no configuration in it.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The configuration itself is wrong.
    #[error("bad run configuration: {0}")]
    Config(#[from] ConfigError),
    /// Its JSON is wrong.
    #[error("bad run configuration: {0}")]
    Json(#[source] serde_json::Error),
    /// It is longer than [`MAX_RUN_JSON`].
    #[error("a run configuration of {0} bytes is longer than the {MAX_RUN_JSON} allowed")]
    TooLong(usize),
    /// The archive ends too early, or is none.
    #[error("not a newc archive at byte {0} from its end")]
    Malformed(usize),
    /// The archive has no `/tern/run.json`.
    #[error("the archive has no {RUN_JSON}")]
    Missing,
}

/// The longest configuration: its files are part of it, and both live in the guest's memory twice
/// while it boots.
pub const MAX_RUN_JSON: usize = 8 * 1024 * 1024;

struct Entry<'a> {
    name: &'a [u8],
    mode: u32,
    data: &'a [u8],
}

fn take_entry(archive: &[u8]) -> Result<(Entry<'_>, &[u8]), ArchiveError> {
    let malformed = || ArchiveError::Malformed(archive.len());
    let header = archive.get(..HEADER).ok_or_else(malformed)?;
    if !header.starts_with(MAGIC) {
        return Err(malformed());
    }
    let field = |n: usize| {
        let digits = &header[MAGIC.len() + 8 * n..][..8];
        let text = std::str::from_utf8(digits)
            .ok()
            .filter(|t| !t.starts_with('+'));
        text.and_then(|t| u32::from_str_radix(t, 16).ok())
            .ok_or_else(malformed)
    };
    let (mode, size, name_size) = (field(1)?, field(6)? as usize, field(11)? as usize);
    let name = archive
        .get(HEADER..HEADER + name_size)
        .ok_or_else(malformed)?;
    let name = name.strip_suffix(b"\0").ok_or_else(malformed)?;
    let start = (HEADER + name_size).next_multiple_of(ALIGN);
    let data = archive.get(start..start + size).ok_or_else(malformed)?;
    let end = (start + size).next_multiple_of(ALIGN);
    Ok((
        Entry { name, mode, data },
        archive.get(end..).unwrap_or_default(),
    ))
}

fn append(archive: &mut Vec<u8>, name: &str, mode: u32, links: u32, data: &[u8]) {
    debug_assert!(archive.len().is_multiple_of(ALIGN) && data.len() <= MAX_RUN_JSON);
    let (inode, owner, time, device) = (0, 0, 0, 0);
    let fields = [
        inode,
        mode,
        owner,
        owner,
        links,
        time,
        data.len() as u32,
        device,
        device,
        device,
        device,
        name.len() as u32 + 1,
        0, // the checksum, which `newc` does not use
    ];
    archive.extend_from_slice(MAGIC);
    for field in fields {
        archive.extend_from_slice(format!("{field:08X}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    pad(archive, ALIGN);
    archive.extend_from_slice(data);
    pad(archive, ALIGN);
}

fn pad(archive: &mut Vec<u8>, to: usize) {
    archive.resize(archive.len().next_multiple_of(to), 0);
}

const MAGIC: &[u8] = b"070701";
const HEADER: usize = 6 + 13 * 8;
const TRAILER: &str = "TRAILER!!!";
const ALIGN: usize = 4;
const BLOCK: usize = 512;
const S_IFMT: u32 = 0o170_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{FileConfig, HostsEntry, InterfaceConfig};
    use proptest::prelude::*;

    fn config() -> impl Strategy<Value = RunConfig> {
        let word = "[ -~äöü€]{0,20}";
        let env = prop::collection::vec(("[A-Z_]{1,8}", word), 0..8);
        let file = (
            "(/[a-z.]{1,2}[a-z]{1,8}){1,3}",
            any::<Vec<u8>>(),
            0u32..0o10000,
        );
        let file = file.prop_map(|(guest_path, content, mode)| FileConfig {
            guest_path,
            content,
            mode,
        });
        let address = any::<(u128, u8)>()
            .prop_map(|(ip, bits)| ipnet::Ipv6Net::new(ip.into(), bits % 129).unwrap().into());
        let interface = (prop::collection::vec(address, 0..3), 1280u32..9000);
        let interface = interface.prop_map(|(addresses, mtu)| InterfaceConfig {
            addresses,
            mtu,
            gateway_v6: Some("fe80::1".parse().unwrap()),
            ..Default::default()
        });
        let hosts = any::<u32>().prop_map(|ip| HostsEntry {
            ip: std::net::Ipv4Addr::from(ip).into(),
            names: vec!["fly-local-6pn".into()],
        });
        (
            prop::collection::vec(word, 0..5),
            env,
            prop::collection::vec(file, 0..4),
            interface,
            prop::collection::vec(hosts, 0..3),
            any::<bool>(),
        )
            .prop_map(|(cmd, env, files, interface, hosts, tty)| {
                let mut config = RunConfig {
                    files,
                    hosts,
                    ..Default::default()
                };
                config.interfaces = vec![interface];
                config.process.cmd = cmd;
                config.process.env = env;
                config.process.tty = tty;
                config
            })
    }

    proptest! {
        #[test]
        fn a_configuration_survives_its_archive(config in config()) {
            let archive = run_archive(&config).unwrap();
            prop_assert_eq!(archive.len() % 512, 0);
            prop_assert_eq!(read_run_archive(&archive).unwrap(), config);
        }

        #[test]
        fn a_cut_or_spoilt_archive_is_an_error_and_no_panic(
            config in config(),
            cut in any::<prop::sample::Index>(),
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
        ) {
            let mut archive = run_archive(&config).unwrap();
            let whole = archive.len();
            let _ = read_run_archive(&archive[..cut.index(whole)]);
            archive[at.index(whole)] = byte;
            let _ = read_run_archive(&archive);
        }

        #[test]
        fn garbage_is_an_error(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
            prop_assert!(read_run_archive(&bytes).is_err());
        }
    }

    #[test]
    fn cpio_agrees() {
        use std::io::Write;
        use std::process::{Command, Stdio};

        let archive = run_archive(&RunConfig::default()).unwrap();
        let mut cpio = Command::new("cpio")
            .args(["--list", "--verbose", "--quiet", "--numeric-uid-gid"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this test needs cpio: apt-get install cpio");
        cpio.stdin.take().unwrap().write_all(&archive).unwrap();
        let output = cpio.wait_with_output().unwrap();
        assert!(output.status.success());
        let list = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<&str> = list.lines().collect();
        assert_eq!(lines.len(), 2, "{list}");
        assert!(
            lines[0].starts_with("drwx------") && lines[0].ends_with(" tern"),
            "{list}"
        );
        assert!(
            lines[1].starts_with("-rw-------") && lines[1].ends_with("tern/run.json"),
            "{list}"
        );
    }

    #[test]
    fn a_configuration_that_cannot_run_is_not_packed() {
        let config = RunConfig {
            hostname: "a b".into(),
            ..Default::default()
        };
        assert!(matches!(run_archive(&config), Err(ArchiveError::Config(_))));
    }

    #[test]
    fn too_much_is_refused() {
        let content = vec![0; MAX_RUN_JSON];
        let file = FileConfig {
            guest_path: "/big".into(),
            content,
            mode: 0o644,
        };
        let config = RunConfig {
            files: vec![file],
            ..Default::default()
        };
        assert!(matches!(
            run_archive(&config),
            Err(ArchiveError::TooLong(_))
        ));
    }
}
