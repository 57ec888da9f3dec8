//! What the facts mean.

use super::Line;
use super::facts::{Device, Disk, Facts, PortState};

/// Of everything, in the order of need.
pub(super) fn all(facts: &Facts) -> Vec<Line> {
    vec![
        root(facts),
        kvm(facts),
        kernel(facts),
        tun(facts),
        cgroups(facts),
        filter(facts),
        forwarding(facts),
        memory(facts),
        disk(facts),
        quotas(facts),
        descriptors(facts),
        ports(facts),
        dns(facts),
        clock(facts),
        nested(facts),
    ]
}

fn root(facts: &Facts) -> Line {
    match facts.root {
        true => Line::ok("root", "everything can be seen"),
        false => Line::warn(
            "root",
            "asked by somebody who is not root",
            "run it by sudo, as `tern serve` runs: some of this may be seen wrong",
        ),
    }
}

fn kvm(facts: &Facts) -> Line {
    let what = "KVM";
    match facts.kvm {
        Device::Open => Line::ok(what, "/dev/kvm can be used"),
        Device::Closed if !facts.root => Line::warn(
            what,
            "/dev/kvm is there, and not for this user",
            "ask as root",
        ),
        Device::Closed => Line::fail(
            what,
            "/dev/kvm may not be opened, even by root",
            "let this container have the device /dev/kvm",
        ),
        Device::Absent if facts.virtualization => Line::fail(
            what,
            "there is no /dev/kvm although the processor can virtualize",
            "load its module: modprobe kvm_intel, or kvm_amd; or let this container have the device",
        ),
        Device::Absent => Line::fail(
            what,
            "the processor does not virtualize",
            "turn VT-x or SVM on in the firmware, or take a server, or a cloud's instance, that has it",
        ),
    }
}

fn kernel(facts: &Facts) -> Line {
    let what = "kernel";
    let Some(text) = &facts.kernel else {
        return Line::warn(what, "its version is not known", "see `uname -r`");
    };
    match version(text) {
        Some(version) if version >= FAST_KERNEL => Line::ok(what, text),
        Some(version) if version >= OLDEST_KERNEL => Line::ok(
            what,
            format!("{text} (6.11 and later wake Machines a little sooner)"),
        ),
        _ => Line::fail(what, text, "Tern is made for Linux 6.1 and later"),
    }
}

/// Major and minor.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn tun(facts: &Facts) -> Line {
    let what = "TUN";
    match facts.tun {
        Device::Open => Line::ok(what, "WireGuard and Machines get their devices"),
        Device::Closed => Line::warn(what, "/dev/net/tun may not be opened", "ask as root"),
        Device::Absent => Line::fail(
            what,
            "there is no /dev/net/tun: neither WireGuard nor Machines get devices",
            "load its module: modprobe tun",
        ),
    }
}

fn cgroups(facts: &Facts) -> Line {
    let what = "cgroup v2";
    let Some(has) = &facts.controllers else {
        return Line::fail(
            what,
            "none at /sys/fs/cgroup: a Machine could take all of this host",
            "boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 there",
        );
    };
    let lacks = |needed: &[&'static str]| -> Vec<&'static str> {
        let has = |name: &str| has.split_whitespace().any(|c| c == name);
        needed.iter().copied().filter(|name| !has(name)).collect()
    };
    let missing = lacks(&["cpu", "memory", "pids"]);
    if !missing.is_empty() {
        return Line::fail(
            what,
            format!("without {}", missing.join(", ")),
            "Machines run without limits: let the kernel have these controllers (cgroup_disable= on its command \
             line, or the container's settings)",
        );
    }
    match lacks(&["io"]).is_empty() {
        true => Line::ok(what, has),
        false => Line::warn(
            what,
            "without io",
            "Machines share the disk as it comes; --machine-disk-bandwidth is not kept for their monitors",
        ),
    }
}

fn filter(facts: &Facts) -> Line {
    let what = "nftables";
    let Some(version) = &facts.nft else {
        return Line::fail(
            what,
            "there is no nft: nothing would keep Machines apart",
            "apt-get install nftables",
        );
    };
    let has_ours = facts
        .tables
        .as_ref()
        .map(|tables| tables.lines().any(|t| t.trim() == "table inet tern"));
    if facts.serving && has_ours == Some(false) {
        return Line::fail(
            what,
            "`tern serve` runs, and its table inet tern is not there",
            "see its log: Machines have no network until it is back",
        );
    }
    if facts.nftables_service {
        return Line::warn(
            what,
            "nftables.service flushes all tables when it is started or reloaded",
            "put `destroy table` of your own tables into /etc/nftables.conf instead of `flush ruleset`: Tern puts \
             its table back, and Machines lose connections meanwhile",
        );
    }
    Line::ok(what, version)
}

fn forwarding(facts: &Facts) -> Line {
    let what = "forwarding";
    match (facts.forwarding, facts.serving) {
        (None, _) => Line::warn(what, "not known", "see `sysctl net.ipv4.ip_forward`"),
        (Some((true, true)), true) => Line::ok(what, "on, for Machines"),
        (Some(_), true) => Line::fail(
            what,
            "off while `tern serve` runs: Machines reach nobody",
            "somebody has turned it off (sysctl --system?); restart `tern serve`",
        ),
        (Some((false, false)), false) => Line::ok(what, "off, until `tern serve` needs it"),
        (Some(_), false) => Line::warn(
            what,
            "on, before `tern serve`: it takes this host for a router of yours",
            "if it is none, set net.ipv4.ip_forward and net.ipv6.conf.all.forwarding to 0 first: what passes \
             through is not judged otherwise",
        ),
    }
}

fn memory(facts: &Facts) -> Line {
    let what = "memory";
    let (Some(memory), swap) = (facts.memory_mib, facts.swap_mib.unwrap_or(0)) else {
        return Line::warn(what, "not known", "see /proc/meminfo");
    };
    let found = format!("{memory} MiB, and {swap} of swap");
    match memory < LEAST_MEMORY_MIB {
        true => Line::warn(
            what,
            found,
            "that is room for one or two Machines that run; others wait for them to sleep",
        ),
        false => Line::ok(what, found),
    }
}

fn disk(facts: &Facts) -> Line {
    let what = "disk";
    let Some(disk) = &facts.disk else {
        return Line::warn(what, "not known", "give --data-dir as `tern serve` has it");
    };
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let at = disk.path.display();
    let found = format!(
        "{:.1} of {:.1} GiB free at {at} ({})",
        gib(disk.free),
        gib(disk.total),
        disk.kind
    );
    let advice = "make room, or put --data-dir on a larger disk; `tern serve --image-budget` bounds images, `tern \
                  host quarantine list` shows what nobody knows any more";
    if disk.free < LEAST_DISK || disk.free_inodes < LEAST_INODES {
        return Line::fail(what, found, advice);
    }
    if ["tmpfs", "overlay"].contains(&disk.kind.as_str()) {
        return Line::warn(
            what,
            found,
            "its data would not outlast a restart: put --data-dir on a disk, with ext4, xfs or btrfs",
        );
    }
    if disk.free < disk.total / 10 {
        return Line::warn(what, found, advice);
    }
    Line::ok(what, found)
}

fn quotas(facts: &Facts) -> Line {
    let what = "quotas";
    match facts.disk.as_ref().map(has_quotas) {
        Some(true) => Line::ok(what, "the file system counts by project"),
        _ => Line::warn(
            what,
            "the file system does not count by project",
            "a monitor that its guest has taken over can fill the disk: keep other services' data on another one",
        ),
    }
}

fn has_quotas(disk: &Disk) -> bool {
    let mut options = disk.options.split(',');
    options.any(|option| matches!(option, "prjquota" | "pquota"))
}

fn descriptors(facts: &Facts) -> Line {
    let what = "descriptors";
    match facts.descriptors {
        None => Line::warn(what, "their limit is not known", "see `ulimit -Hn`"),
        Some((_, hard)) if hard < LEAST_DESCRIPTORS => Line::fail(
            what,
            format!("at most {hard}"),
            "set LimitNOFILE=1048576 for its service: connections and Machines take some each",
        ),
        Some((soft, hard)) => Line::ok(what, format!("{soft}, and up to {hard}")),
    }
}

fn ports(facts: &Facts) -> Line {
    let what = "ports";
    let with = |state| -> Vec<&str> {
        let with = facts.ports.iter().filter(|port| port.state == state);
        with.map(|port| port.name).collect()
    };
    let (taken, unknown) = (with(PortState::Taken), with(PortState::Unknown));
    match (facts.serving, taken.is_empty(), unknown.is_empty()) {
        (true, ..) => Line::ok(what, "`tern serve` runs"),
        (false, false, _) => Line::fail(
            what,
            format!("somebody has {}", taken.join(", ")),
            "see `ss -tulpn`; end that, or give `tern serve` others (--http, --https, --api, --wireguard)",
        ),
        (false, true, false) => Line::warn(
            what,
            format!("whether {} can be had is not known", unknown.join(", ")),
            "ask as root",
        ),
        (false, true, true) => Line::ok(what, "all are free"),
    }
}

fn dns(facts: &Facts) -> Line {
    let what = "DNS";
    match facts.nameservers.is_empty() {
        true => Line::fail(
            what,
            "/etc/resolv.conf names no server: images and certificates cannot be had",
            "name one there, or give `tern serve --upstream-dns`",
        ),
        false => Line::ok(what, facts.nameservers.join(", ")),
    }
}

fn clock(facts: &Facts) -> Line {
    let what = "clock";
    match facts.clock_synchronized {
        Some(true) => Line::ok(what, "synchronized"),
        Some(false) => Line::warn(
            what,
            "nobody keeps it",
            "run chrony or systemd-timesyncd: certificates and leases go by it",
        ),
        None => Line::warn(what, "not known", "see `timedatectl`"),
    }
}

fn nested(facts: &Facts) -> Line {
    let what = "nesting";
    match facts.nested {
        Some(true) => Line::warn(
            what,
            "guests of this host may have guests of their own: KVM's riskiest code",
            "if nobody needs it, put `options kvm_intel nested=0` (kvm_amd) into /etc/modprobe.d and reboot",
        ),
        Some(false) => Line::ok(what, "off"),
        None => Line::ok(what, "not built in, or not to be seen"),
    }
}

/// Debian's stable release has it.
const OLDEST_KERNEL: (u32, u32) = (6, 1);
/// Maps what a wake needs beforehand (`KVM_PRE_FAULT_MEMORY`).
const FAST_KERNEL: (u32, u32) = (6, 11);
const LEAST_MEMORY_MIB: u64 = 1024;
/// Less is one image, or one snapshot.
const LEAST_DISK: u64 = 2 << 30;
const LEAST_INODES: u64 = 10_000;
const LEAST_DESCRIPTORS: u64 = 8192;

#[cfg(test)]
mod tests {
    use super::super::Level::{self, Fail, Ok, Warn};
    use super::super::facts::Port;
    use super::*;

    /// A host that lacks nothing.
    fn good() -> Facts {
        Facts {
            root: true,
            kernel: Some("6.12.9-amd64".into()),
            kvm: Device::Open,
            virtualization: true,
            tun: Device::Open,
            controllers: Some("cpuset cpu io memory pids".into()),
            nft: Some("nftables v1.0.6".into()),
            tables: Some(String::new()),
            nftables_service: false,
            clock_synchronized: Some(true),
            disk: Some(Disk {
                path: "/var/lib/tern".into(),
                kind: "ext4".into(),
                options: "rw,prjquota".into(),
                free: 50 << 30,
                total: 100 << 30,
                free_inodes: 1 << 20,
            }),
            memory_mib: Some(16 << 10),
            swap_mib: Some(0),
            descriptors: Some((1024, 1 << 20)),
            ports: vec![port(PortState::Free)],
            serving: false,
            nameservers: vec!["192.0.2.1".into()],
            forwarding: Some((false, false)),
            nested: Some(false),
        }
    }

    fn port(state: PortState) -> Port {
        Port { name: "443", state }
    }

    /// What is said of a good host with one thing changed.
    fn said(judge: fn(&Facts) -> Line, change: impl FnOnce(&mut Facts)) -> Level {
        let mut facts = good();
        change(&mut facts);
        judge(&facts).level
    }

    #[test]
    fn a_good_host_is_told_so() {
        for line in all(&good()) {
            assert_eq!(line.level, Ok, "{line:?}");
        }
        assert_eq!(said(root, |f| f.root = false), Warn);
    }

    #[test]
    fn devices() {
        assert_eq!(said(kvm, |f| f.kvm = Device::Absent), Fail);
        assert_eq!(said(kvm, |f| f.kvm = Device::Closed), Fail);
        let other_user = |f: &mut Facts| (f.kvm, f.root) = (Device::Closed, false);
        assert_eq!(said(kvm, other_user), Warn);
        let mut facts = good();
        (facts.kvm, facts.virtualization) = (Device::Absent, false);
        assert!(kvm(&facts).advice.unwrap().contains("firmware"));
        assert_eq!(said(tun, |f| f.tun = Device::Absent), Fail);
        assert_eq!(said(tun, |f| f.tun = Device::Closed), Warn);
        assert_eq!(said(nested, |f| f.nested = Some(true)), Warn);
        assert_eq!(said(nested, |f| f.nested = None), Ok);
    }

    #[test]
    fn kernels() {
        let with = |text: &'static str| said(kernel, |f| f.kernel = Some(text.into()));
        assert_eq!(with("6.1.0-28-amd64"), Ok);
        assert_eq!(with("10.0"), Ok);
        assert_eq!(with("5.15.0-generic"), Fail);
        assert_eq!(with("strange"), Fail);
        assert_eq!(said(kernel, |f| f.kernel = None), Warn);
    }

    #[test]
    fn groups() {
        assert_eq!(said(cgroups, |f| f.controllers = None), Fail);
        let with = |text: &'static str| said(cgroups, |f| f.controllers = Some(text.into()));
        assert_eq!(with("cpu pids"), Fail);
        assert_eq!(with("cpuset memory pids io"), Fail, "cpuset is not cpu");
        assert_eq!(with("cpu memory pids"), Warn);
    }

    #[test]
    fn the_packet_filter() {
        assert_eq!(said(filter, |f| f.nft = None), Fail);
        assert_eq!(said(filter, |f| f.nftables_service = true), Warn);
        assert_eq!(said(filter, |f| f.serving = true), Fail);
        let whole = |f: &mut Facts| {
            f.serving = true;
            f.tables = Some("table ip owner\ntable inet tern".into());
        };
        assert_eq!(said(filter, whole), Ok);
        let unseen = |f: &mut Facts| (f.serving, f.tables) = (true, None);
        assert_eq!(said(filter, unseen), Ok);
        assert_eq!(said(forwarding, |f| f.serving = true), Fail);
        assert_eq!(
            said(forwarding, |f| f.forwarding = Some((true, false))),
            Warn
        );
        let on = |f: &mut Facts| (f.serving, f.forwarding) = (true, Some((true, true)));
        assert_eq!(said(forwarding, on), Ok);
        assert_eq!(said(forwarding, |f| f.forwarding = None), Warn);
    }

    #[test]
    fn room() {
        let with = |change: fn(&mut Disk)| said(disk, |f| change(f.disk.as_mut().unwrap()));
        assert_eq!(with(|d| d.free = 1 << 30), Fail);
        assert_eq!(with(|d| d.free_inodes = 10), Fail);
        assert_eq!(with(|d| d.free = 9 << 30), Warn);
        assert_eq!(with(|d| d.kind = "tmpfs".into()), Warn);
        assert_eq!(said(disk, |f| f.disk = None), Warn);
        let without = |f: &mut Facts| f.disk.as_mut().unwrap().options = "rw".into();
        assert_eq!(said(quotas, without), Warn);
        assert_eq!(said(memory, |f| f.memory_mib = Some(512)), Warn);
        assert_eq!(said(memory, |f| f.memory_mib = None), Warn);
        assert_eq!(
            said(descriptors, |f| f.descriptors = Some((1024, 4096))),
            Fail
        );
        assert_eq!(said(descriptors, |f| f.descriptors = None), Warn);
    }

    #[test]
    fn neighbours() {
        assert_eq!(
            said(ports, |f| f.ports = vec![port(PortState::Taken)]),
            Fail
        );
        assert_eq!(
            said(ports, |f| f.ports = vec![port(PortState::Unknown)]),
            Warn
        );
        let own = |f: &mut Facts| (f.ports, f.serving) = (vec![port(PortState::Taken)], true);
        assert_eq!(said(ports, own), Ok);
        assert_eq!(said(dns, |f| f.nameservers.clear()), Fail);
        assert_eq!(said(clock, |f| f.clock_synchronized = Some(false)), Warn);
        assert_eq!(said(clock, |f| f.clock_synchronized = None), Warn);
    }
}
