//! What this host is, as far as whoever asks may see. `None` is unknown.

use std::fs;
use std::io;
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What was found.
#[derive(Debug, Clone, Default)]
pub(super) struct Facts {
    pub(super) root: bool,
    /// As the kernel names itself.
    pub(super) kernel: Option<String>,
    /// Whether the device could be opened.
    pub(super) kvm: Device,
    /// `vmx` or `svm` is among the processor's flags.
    pub(super) virtualization: bool,
    pub(super) tun: Device,
    /// What `/sys/fs/cgroup/cgroup.controllers` says; `None` without a cgroup v2 there.
    pub(super) controllers: Option<String>,
    /// What `nft --version` says.
    pub(super) nft: Option<String>,
    /// What `nft list tables` says. Only root is told.
    pub(super) tables: Option<String>,
    /// Whether `nftables.service` is started at boot, which then flushes all tables.
    pub(super) nftables_service: bool,
    /// Whether the kernel's clock is synchronized.
    pub(super) clock_synchronized: Option<bool>,
    pub(super) disk: Option<Disk>,
    pub(super) memory_mib: Option<u64>,
    pub(super) swap_mib: Option<u64>,
    /// The soft and hard limits of descriptors.
    pub(super) descriptors: Option<(u64, u64)>,
    /// Ports that `tern serve` listens on by default, and who has them.
    pub(super) ports: Vec<Port>,
    /// Whether `tern serve` runs in this data directory.
    pub(super) serving: bool,
    pub(super) nameservers: Vec<String>,
    /// `net.ipv4.ip_forward` and `net.ipv6.conf.all.forwarding`.
    pub(super) forwarding: Option<(bool, bool)>,
    /// Devices of a nested guest's processor.
    pub(super) nested: Option<bool>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Device {
    #[default]
    Absent,
    /// It is there, and may not be opened.
    Closed,
    Open,
}

/// The file system of the data directory.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    pub(super) path: PathBuf,
    pub(super) kind: String,
    pub(super) options: String,
    pub(super) free: u64,
    pub(super) total: u64,
    pub(super) free_inodes: u64,
}

/// A port, and whether it can be had.
#[derive(Debug, Clone)]
pub(super) struct Port {
    pub(super) name: &'static str,
    pub(super) state: PortState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PortState {
    Free,
    Taken,
    /// Only root may have it.
    Unknown,
}

/// Looks at everything. Nothing is changed, and nobody called.
pub(super) fn gather(data_dir: &Path) -> Facts {
    let meminfo = read("/proc/meminfo").unwrap_or_default();
    let mib = |key: &str| {
        let line = meminfo.lines().find_map(|l| l.strip_prefix(key))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib >> 10)
    };
    let cpus = read("/proc/cpuinfo").unwrap_or_default();
    let flags = cpus.lines().find(|line| line.starts_with("flags"));
    let virtualization = flags.is_some_and(|line| {
        line.split_whitespace()
            .any(|flag| flag == "vmx" || flag == "svm")
    });
    // Not in the PATH of a Debian user.
    let nft = ["/usr/sbin/nft", "/sbin/nft"];
    let nft = nft
        .into_iter()
        .find(|path| Path::new(path).exists())
        .unwrap_or("nft");
    let switch = |path: &str| read(path).map(|text| text == "1");
    Facts {
        root: nix::unistd::geteuid().is_root(),
        kernel: read("/proc/sys/kernel/osrelease"),
        kvm: device("/dev/kvm"),
        virtualization,
        tun: device("/dev/net/tun"),
        controllers: read("/sys/fs/cgroup/cgroup.controllers"),
        nft: said(nft, &["--version"]),
        tables: said(nft, &["list", "tables"]),
        nftables_service: Path::new("/etc/systemd/system/sysinit.target.wants/nftables.service")
            .exists()
            || Path::new("/etc/systemd/system/multi-user.target.wants/nftables.service").exists(),
        clock_synchronized: clock(),
        disk: disk(data_dir),
        memory_mib: mib("MemTotal:"),
        swap_mib: mib("SwapTotal:"),
        descriptors: descriptors(),
        ports: ports(),
        serving: is_locked(&data_dir.join("agent.lock")),
        nameservers: nameservers(&read("/etc/resolv.conf").unwrap_or_default()),
        forwarding: switch("/proc/sys/net/ipv4/ip_forward")
            .zip(switch("/proc/sys/net/ipv6/conf/all/forwarding")),
        nested: ["kvm_intel", "kvm_amd"].into_iter().find_map(|module| {
            let told = read(&format!("/sys/module/{module}/parameters/nested"))?;
            Some(matches!(told.as_str(), "Y" | "1"))
        }),
    }
}

fn read(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// What a program prints; `None` where it is not there, or has failed.
fn said(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    output.status.success().then_some(text)
}

fn device(path: &str) -> Device {
    match fs::File::options().read(true).write(true).open(path) {
        Ok(_) => Device::Open,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Device::Closed,
        Err(_) => Device::Absent,
    }
}

/// The kernel itself knows whether somebody keeps its clock (adjtimex(2), `STA_UNSYNC`).
fn clock() -> Option<bool> {
    // SAFETY: a `timex` of zeroes asks for nothing to be changed, and the kernel writes to it alone.
    let state = unsafe {
        let mut told: libc::timex = std::mem::zeroed();
        libc::adjtimex(&raw mut told)
    };
    (state >= 0).then_some(state != libc::TIME_ERROR)
}

fn disk(data_dir: &Path) -> Option<Disk> {
    // One that has not been made yet will be where its nearest ancestor is.
    let path = data_dir.ancestors().find(|path| path.exists())?;
    let path = path.canonicalize().ok()?;
    let told = nix::sys::statvfs::statvfs(&path).ok()?;
    let mounts = read("/proc/self/mountinfo")?;
    let (kind, options) = mounted(&mounts, &path)?;
    let size = told.fragment_size();
    Some(Disk {
        path: data_dir.to_owned(),
        kind,
        options,
        free: told.blocks_available() * size,
        total: told.blocks() * size,
        free_inodes: told.files_available(),
    })
}

/// The kind and the options of the file system that a path is on (proc_pid_mountinfo(5)): the last of those
/// mounted nearest to it.
fn mounted(mounts: &str, path: &Path) -> Option<(String, String)> {
    let parsed = mounts.lines().filter_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let point = PathBuf::from(mount.split(' ').nth(4)?);
        let mut file_system = file_system.split(' ');
        let (kind, options) = (file_system.next()?, file_system.nth(1)?);
        Some((point, (kind.to_owned(), options.to_owned())))
    });
    let holding = parsed.filter(|(point, _)| path.starts_with(point));
    let nearest = holding.max_by_key(|(point, _)| point.components().count());
    nearest.map(|(_, told)| told)
}

fn descriptors() -> Option<(u64, u64)> {
    nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).ok()
}

fn ports() -> Vec<Port> {
    let state = |had: io::Result<()>| match had {
        Ok(()) => PortState::Free,
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => PortState::Taken,
        Err(_) => PortState::Unknown,
    };
    let tcp = |address: &str| state(TcpListener::bind(address).map(drop));
    let udp = |address: &str| state(UdpSocket::bind(address).map(drop));
    vec![
        Port {
            name: "80",
            state: tcp("[::]:80"),
        },
        Port {
            name: "443",
            state: tcp("[::]:443"),
        },
        Port {
            name: "443/udp",
            state: udp("[::]:443"),
        },
        Port {
            name: "4280",
            state: tcp("127.0.0.1:4280"),
        },
        Port {
            name: "51820/udp",
            state: udp("[::]:51820"),
        },
    ]
}

/// Whether somebody has the lock on a file that keeps agents apart.
fn is_locked(path: &Path) -> bool {
    let Ok(file) = fs::File::open(path) else {
        return false;
    };
    matches!(file.try_lock_shared(), Err(fs::TryLockError::WouldBlock))
}

fn nameservers(resolv_conf: &str) -> Vec<String> {
    let lines = resolv_conf.lines();
    let servers = lines.filter_map(|line| line.trim().strip_prefix("nameserver"));
    servers.map(|server| server.trim().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_on_the_file_system_that_is_mounted_nearest() {
        let mounts = "1 0 8:1 / / rw - ext4 /dev/sda1 rw,errors=remount-ro\n\
                      2 1 8:2 / /var/lib rw shared:1 - xfs /dev/sdb rw,prjquota\n\
                      3 1 8:3 / /var/library rw - tmpfs tmpfs rw\n";
        let kind = |path: &str| mounted(mounts, Path::new(path)).unwrap();
        assert_eq!(kind("/var/lib/tern"), ("xfs".into(), "rw,prjquota".into()));
        assert_eq!(kind("/var/librarian").0, "ext4");
        assert_eq!(mounted("", Path::new("/")), None);
    }

    #[test]
    fn a_server_that_runs_is_known_by_its_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.lock");
        assert!(!is_locked(&path));
        let file = fs::File::create(&path).unwrap();
        assert!(!is_locked(&path));
        file.lock().unwrap();
        assert!(is_locked(&path));
    }

    #[test]
    fn nameservers_are_those_of_resolv_conf() {
        let text = "# nameserver 9.9.9.9\nsearch x\nnameserver 192.0.2.1\nnameserver ::1\n";
        assert_eq!(nameservers(text), ["192.0.2.1", "::1"]);
    }

    #[test]
    fn a_port_that_somebody_has_is_taken() {
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        let error = TcpListener::bind(held.local_addr().unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert_eq!(ports().len(), 5);
    }
}
