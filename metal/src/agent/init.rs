//! First process of a host (process 1 of its kernel, or of its process namespace on a real
//! machine): sets the host up as its [`Plan`] says, starts the agent, adopts and buries orphans,
//! and ends the host when the agent ends.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, sethostname};

use super::Reporter;
use crate::plan::{Card, Event, GuestShare, Kind, Plan};

/// Host name inside.
const HOSTNAME: &str = "metal";
/// Loaded before the first command. Others (nftables' expressions, device mapper...) come by
/// themselves when the kernel is asked for them.
const MODULES: [&str; 7] = [
    "kvm-amd",
    "tun",
    "wireguard",
    "nf_tables",
    "vhost-net",
    "vhost-vsock",
    "virtio_balloon",
];
/// One request of 9p, the largest QEMU's virtio ring takes (128 pages minus a header).
const NINE_P_MESSAGE: u32 = 512_000;
/// Open files: as on a Debian server under systemd for the hard limit; the soft one is raised too,
/// because a test driver has no unit file to ask for more.
const OPEN_FILES: (u64, u64) = (65_536, 1_048_576);

/// Sets up the host, runs the agent, and never returns alive under QEMU: the machine is off then.
pub fn init(plan_file: &Path) -> Result<()> {
    let text = fs::read(plan_file)
        .with_context(|| format!("cannot read the plan {}", plan_file.display()))?;
    let plan: Plan = serde_json::from_slice(&text).context("the plan is not understood")?;
    let mut reporter = Reporter::open(&plan)?;
    let result = host(&plan, plan_file, &mut reporter);
    if let Err(error) = &result {
        // Nobody is left to tell if the line itself is broken.
        let _ = reporter.report(&Event::Failed {
            message: format!("{error:#}"),
        });
    }
    if matches!(plan.kind, Kind::Virtual { .. }) {
        nix::unistd::sync();
        reboot(RebootMode::RB_POWER_OFF).context("cannot power off")?;
    }
    result
}

fn host(plan: &Plan, plan_file: &Path, reporter: &mut Reporter) -> Result<()> {
    match &plan.kind {
        Kind::Virtual {
            shares,
            network,
            control,
            ..
        } => {
            reporter.phase("root")?;
            set_up_virtual(shares, network, control, reporter)?;
        }
        Kind::Native { data } => set_up_native(data)?,
    }
    limits()?;
    let agent = Command::new("/proc/self/exe")
        .arg("agent")
        .arg("--plan")
        .arg(plan_file)
        .spawn()
        .context("cannot start the agent")?;
    let status = reap_until(&agent)?;
    ensure!(status.success(), "the agent inside ended with {status}");
    Ok(())
}

fn set_up_virtual(
    shares: &[GuestShare],
    network: &Card,
    control: &Card,
    reporter: &mut Reporter,
) -> Result<()> {
    kernel_trees()?;
    switch_on_cpus()?;
    // The three slow things (finding modules, the cards, file systems over 9p) do not need each
    // other, and the host has more than one CPU.
    thread::scope(|scope| {
        let modules = scope.spawn(load_modules);
        let cards = scope.spawn(|| cards(network, control));
        mount_shares(shares)?;
        reporter.phase("shares")?;
        cards
            .join()
            .unwrap_or_else(|_| bail!("setting up the network panicked"))?;
        reporter.phase("network")?;
        modules
            .join()
            .unwrap_or_else(|_| bail!("loading kernel modules panicked"))?;
        reporter.phase("modules")
    })
}

/// What systemd or an initscript would mount, with the flags they use.
fn kernel_trees() -> Result<()> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    for (kind, at, flags, data) in [
        ("cgroup2", "/sys/fs/cgroup", quiet, "nsdelegate"),
        (
            "devpts",
            "/dev/pts",
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
            "mode=620,ptmxmode=666",
        ),
        (
            "tmpfs",
            "/dev/shm",
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            "mode=1777",
        ),
    ] {
        fs::create_dir_all(at).with_context(|| format!("cannot make {at}"))?;
        mount(Some(kind), at, Some(kind), flags, Some(data))
            .with_context(|| format!("cannot mount {kind} at {at}"))?;
    }
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        match symlink(target, link) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("cannot link {link}"));
            }
            _ => {}
        }
    }
    // As systemd does: a manager of services below finds the controllers ready to hand out.
    let controllers = "+cpu +io +memory +pids";
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", controllers)
        .context("cannot enable the cgroup controllers")?;
    sethostname(HOSTNAME).context("cannot set the host name")?;
    fs::write("/etc/hostname", format!("{HOSTNAME}\n")).context("cannot write /etc/hostname")?;
    let hosts = format!("127.0.0.1 localhost {HOSTNAME}\n::1 localhost ip6-localhost\n");
    fs::write("/etc/hosts", hosts).context("cannot write /etc/hosts")
}

/// The kernel was started with one (see the arguments in `qemu`).
fn switch_on_cpus() -> Result<()> {
    let all = "/sys/devices/system/cpu";
    for number in 1.. {
        // The first, which is always on, has no such file; the last one's successor neither.
        let online = format!("{all}/cpu{number}/online");
        match fs::write(&online, "1") {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => break,
            done => done.with_context(|| format!("cannot switch on {all}/cpu{number}"))?,
        }
    }
    Ok(())
}

fn load_modules() -> Result<()> {
    run("modprobe", &[&["-a"], MODULES.as_slice()].concat())
}

fn mount_shares(shares: &[GuestShare]) -> Result<()> {
    for GuestShare {
        tag,
        path,
        read_only,
    } in shares
    {
        let shown = path.display();
        fs::create_dir_all(path).with_context(|| format!("cannot make {shown}"))?;
        // `cache=mmap` alone both reads ahead when a program is paged in and forgets everything
        // when a file is closed: a binary rebuilt outside is seen at once. (Measured, 23 MB
        // program, start to end: none 290 ms, mmap 200 ms, loose 190 ms then 125 ms but stale.)
        let data = format!("trans=virtio,version=9p2000.L,cache=mmap,msize={NINE_P_MESSAGE}");
        let flags = if *read_only {
            MsFlags::MS_RDONLY
        } else {
            MsFlags::empty()
        };
        mount(
            Some(tag.as_str()),
            path,
            Some("9p"),
            flags,
            Some(data.as_str()),
        )
        .with_context(|| format!("cannot mount the share {shown}"))?;
    }
    Ok(())
}

fn cards(network: &Card, control: &Card) -> Result<()> {
    run("modprobe", &["virtio_net"])?;
    for card in [network, control] {
        let found = interface_with(&card.mac)?;
        if found != card.name {
            run("ip", &["link", "set", "dev", &found, "name", &card.name])?;
        }
    }
    let Card {
        name,
        address,
        gateway,
        resolver,
        ..
    } = network;
    run("ip", &["link", "set", "dev", "lo", "up"])?;
    run(
        "ip",
        &["addr", "add", &format!("{address}/24"), "dev", name],
    )?;
    run("ip", &["link", "set", "dev", name, "up"])?;
    run(
        "ip",
        &["route", "add", "default", "via", &gateway.to_string()],
    )?;
    fs::write("/etc/resolv.conf", format!("nameserver {resolver}\n"))
        .context("cannot write /etc/resolv.conf")
}

fn interface_with(mac: &str) -> Result<String> {
    let cards = fs::read_dir("/sys/class/net").context("cannot list network cards")?;
    for card in cards {
        let card = card?;
        if fs::read_to_string(card.path().join("address"))?.trim() == mac {
            return Ok(card.file_name().to_string_lossy().into_owned());
        }
    }
    bail!("no network card has the address {mac}")
}

/// Nothing but a data directory of its own: the rest of a real machine is used as it is.
fn set_up_native(data: &Path) -> Result<()> {
    let target = PathBuf::from("/var/lib/tern");
    fs::create_dir_all(&target).with_context(|| format!("cannot make {}", target.display()))?;
    // `unshare --mount` made all mounts private already, so this one stays in the namespace.
    mount(
        Some(data),
        &target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .with_context(|| format!("cannot mount {} at {}", data.display(), target.display()))
}

fn limits() -> Result<()> {
    let (soft, hard) = OPEN_FILES;
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).context("cannot raise the open file limit")?;
    let unlimited = libc::RLIM_INFINITY;
    setrlimit(Resource::RLIMIT_MEMLOCK, unlimited, unlimited)
        .context("cannot raise the locked memory limit")
}

/// Waits for the agent, and for every orphan that ends meanwhile.
fn reap_until(agent: &Child) -> Result<ExitStatus> {
    let agent = i32::try_from(agent.id()).context("a process id out of range")?;
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) if pid == Pid::from_raw(agent) => {
                return Ok(ExitStatus::from_raw(code << 8));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == Pid::from_raw(agent) => {
                return Ok(ExitStatus::from_raw(signal as i32));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait for the agent"),
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
