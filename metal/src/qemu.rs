//! The QEMU process of a virtual host: its command line, and what it says.
//!
//! Nothing of it has a name in the file system: initramfs and data disk are unlinked files, consoles
//! and monitor are socket pairs. So there is nothing to clean up, however it ends; and the kernel
//! kills it when `tern-metal` ends, however that ends.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::forward::{Forward, Protocol};
use crate::plan::Card;
use crate::process::{self, spawn_bound};
use crate::rootfs::Rootfs;
use crate::share::Share;
use crate::usernet::{self, Listening};

/// The emulator; from Debian's qemu-system-x86.
const PROGRAM: &str = "qemu-system-x86_64";
/// Kernel command line. No mitigations: they only cost, nothing in here is secret from itself. The
/// clock is the TSC (QEMU's is invariant), or a restored Machine's wall clock could not be set right.
/// The timer is not checked: it works, but on a starved outer machine too late for the kernel's taste.
/// One CPU until `tern-metal init` switches on the others, if there are any: a starting kernel makes its
/// CPUs wait for each other all the time, which is slow where two emulated CPUs share half a real one.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr \
     tsc=reliable clocksource=tsc no_timer_check random.trust_cpu=on maxcpus=1";
/// How long QEMU may take to answer on its monitor: a moment, but not on a machine whose disk or CPUs
/// are swamped.
const MONITOR_PATIENCE: Duration = Duration::from_secs(60);

/// The processor: one whose virtualization QEMU emulates, with a clock that does not change its pace.
const CPU: &str = "EPYC-Rome,+svm,+invtsc";

/// Size of the virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// CPUs.
    pub cpus: u32,
    /// Memory.
    pub memory_mib: u32,
}

/// Everything that makes up one virtual machine.
#[derive(Debug)]
pub struct Machine<'a> {
    /// Kernel and disks.
    pub rootfs: &'a Rootfs,
    /// Complete initramfs.
    pub initramfs: &'a File,
    /// Writable copy of the data disk.
    pub data: &'a File,
    /// CPUs and memory.
    pub size: Size,
    /// The processor, if not [`CPU`].
    pub cpu: Option<&'a str>,
    /// Directories, in the order of their tags (`share0`, `share1`...).
    pub shares: &'a [Share],
    /// Ports that lead to `network`.
    pub forwards: &'a [Forward],
    /// The card that commands see.
    pub network: &'a Card,
    /// The agent's card.
    pub control: &'a Card,
    /// The agent's port.
    pub control_port: u16,
}

/// A running QEMU.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    /// The kernel's console.
    pub console: UnixStream,
    /// The second serial line: events.
    pub events: UnixStream,
    monitor: BufReader<UnixStream>,
}

impl Qemu {
    /// Starts the machine; returns it, and what it has to say.
    pub fn start(machine: &Machine<'_>) -> Result<(Self, ChildStderr)> {
        let (console, console_end) = UnixStream::pair()?;
        let (events, events_end) = UnixStream::pair()?;
        let (monitor, monitor_end) = UnixStream::pair()?;
        let fds = Descriptors {
            initramfs: machine.initramfs.as_raw_fd(),
            data: machine.data.as_raw_fd(),
            console: console_end.as_raw_fd(),
            events: events_end.as_raw_fd(),
            monitor: monitor_end.as_raw_fd(),
        };
        let mut command = Command::new(PROGRAM);
        command
            .args(arguments(machine, &fds))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // A Ctrl-C at the terminal is for the command inside, not for the machine under it.
            .process_group(0);
        inherit(&mut command, fds.all());
        let mut child = spawn_bound(&mut command, Signal::SIGKILL)
            .with_context(|| format!("cannot run {PROGRAM}: apt-get install qemu-system-x86"))?;
        let stderr = child.stderr.take().context("its output is a pipe")?;
        monitor.set_read_timeout(Some(MONITOR_PATIENCE))?;
        // Our copies of QEMU's ends close here: when QEMU ends, each line ends.
        let qemu = Self {
            child,
            console,
            events,
            monitor: BufReader::new(monitor),
        };
        Ok((qemu, stderr))
    }

    /// The forwarded ports as they are, with those in place that QEMU was to choose, and ready for
    /// many connections at once.
    pub fn forwards(&mut self) -> Result<Vec<Listening>> {
        self.monitor_answer()?; // its greeting
        self.monitor_ask(&json!({"execute": "qmp_capabilities"}))?;
        let table = self.monitor_ask(&json!({
            "execute": "human-monitor-command",
            "arguments": {"command-line": "info usernet"},
        }))?;
        let table = table
            .as_str()
            .context("QEMU's list of forwarded ports is no text")?;
        let ports = usernet::parse(table);
        let process = process::open(i32::try_from(self.child.id())?)?;
        for port in &ports {
            port.widen(&process)?;
        }
        Ok(ports)
    }

    fn monitor_ask(&mut self, question: &Value) -> Result<Value> {
        writeln!(self.monitor.get_mut(), "{question}").context("cannot ask QEMU")?;
        loop {
            let mut answer = self.monitor_answer()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refused {question}: {error}");
            }
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            } // else it is an event
        }
    }

    fn monitor_answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        let length = self
            .monitor
            .read_line(&mut line)
            .context("QEMU's monitor does not answer")?;
        if length == 0 {
            bail!("QEMU ended at once");
        }
        serde_json::from_str(&line).context("QEMU's monitor is not understood")
    }

    /// CPU time it has had so far, in seconds: tells a slow host from a starved one.
    pub fn cpu_seconds(&self) -> Option<u64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).ok()?;
        // proc(5): the name in parentheses may contain anything; utime and stime are the 12th and
        // 13th fields after it, in clock ticks of 1/100 s.
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_whitespace().skip(11);
        let user: u64 = fields.next()?.parse().ok()?;
        let system: u64 = fields.next()?.parse().ok()?;
        Some((user + system) / 100)
    }

    /// Ends it, at once: its disk is thrown away, and shared files are written through.
    pub fn kill(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Numbers of the descriptors that QEMU inherits.
#[derive(Debug)]
struct Descriptors {
    initramfs: i32,
    data: i32,
    console: i32,
    events: i32,
    monitor: i32,
}

impl Descriptors {
    fn all(&self) -> [i32; 5] {
        [
            self.initramfs,
            self.data,
            self.console,
            self.events,
            self.monitor,
        ]
    }
}

/// Keeps `fds` open in the child, and in no other.
fn inherit(command: &mut Command, fds: [i32; 5]) {
    // SAFETY: between fork and exec this makes only fcntl calls, on descriptors that the caller
    // keeps open until the child has started.
    unsafe {
        command.pre_exec(move || {
            for fd in fds {
                let fd = std::os::fd::BorrowedFd::borrow_raw(fd);
                fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).map_err(io::Error::from)?;
            }
            Ok(())
        });
    }
}

fn arguments(machine: &Machine<'_>, fds: &Descriptors) -> Vec<OsString> {
    let Size { cpus, memory_mib } = machine.size;
    let mut arguments: Vec<OsString> = Vec::new();
    let mut add = |name: &str, value: String| {
        arguments.push(name.into());
        arguments.push(value.into());
    };
    add("-name", "tern-metal".into());
    add("-accel", "tcg,thread=multi".into());
    add("-machine", "q35,hpet=off".into());
    add("-cpu", machine.cpu.unwrap_or(CPU).into());
    add("-smp", cpus.to_string());
    add("-m", memory_mib.to_string());
    add("-kernel", machine.rootfs.kernel().display().to_string());
    add("-initrd", format!("/proc/self/fd/{}", fds.initramfs));
    add("-append", KERNEL_ARGUMENTS.into());
    add("-display", "none".into());
    add("-rtc", "base=utc".into());
    for (name, fd) in [
        ("console", fds.console),
        ("events", fds.events),
        ("monitor", fds.monitor),
    ] {
        add("-chardev", format!("socket,id={name},fd={fd}"));
    }
    add("-serial", "chardev:console".into());
    add("-serial", "chardev:events".into());
    add("-mon", "chardev=monitor,mode=control".into());

    let root = escape(&machine.rootfs.root().display().to_string());
    add(
        "-drive",
        format!("file={root},if=virtio,format=raw,readonly=on"),
    );
    // `unsafe`: a sync inside costs nothing outside. It survives any crash inside, kernel included;
    // a crash outside ends the whole disk anyway.
    add(
        "-drive",
        format!(
            "file=/proc/self/fd/{},if=virtio,format=raw,cache=unsafe,discard=unmap",
            fds.data
        ),
    );

    let forwards: String = machine
        .forwards
        .iter()
        .map(|forward| rule(forward, machine.network))
        .collect();
    add(
        "-netdev",
        format!("{}{forwards}", user_network("network", machine.network)),
    );
    add(
        "-device",
        format!("virtio-net-pci,netdev=network,mac={}", machine.network.mac),
    );
    let agent = Forward {
        protocol: Protocol::Tcp,
        outer: 0,
        inner: machine.control_port,
    };
    let agent = rule(&agent, machine.control);
    add(
        "-netdev",
        format!(
            "{},restrict=on{agent}",
            user_network("control", machine.control)
        ),
    );
    add(
        "-device",
        format!("virtio-net-pci,netdev=control,mac={}", machine.control.mac),
    );

    // Memory that is free again inside goes back to the outer machine.
    add(
        "-device",
        "virtio-balloon-pci,free-page-reporting=on".into(),
    );

    // Only root can show owners and devices as they are.
    let model = if nix::unistd::geteuid().is_root() {
        "passthrough"
    } else {
        "none"
    };
    for (number, share) in machine.shares.iter().enumerate() {
        let path = escape(&share.outer.display().to_string());
        let access = if share.read_only { ",readonly=on" } else { "" };
        add(
            "-fsdev",
            format!(
                "local,id=share{number},path={path},security_model={model},multidevs=remap{access}"
            ),
        );
        add(
            "-device",
            format!("virtio-9p-pci,fsdev=share{number},mount_tag=share{number}"),
        );
    }
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
        arguments.push(flag.into());
    }
    arguments
}

fn user_network(id: &str, card: &Card) -> String {
    let Card {
        gateway, resolver, ..
    } = card;
    let [a, b, c, _] = gateway.octets();
    format!("user,id={id},ipv6=off,net={a}.{b}.{c}.0/24,host={gateway},dns={resolver}")
}

fn rule(forward: &Forward, card: &Card) -> String {
    let Forward {
        protocol,
        outer,
        inner,
    } = forward;
    format!(
        ",hostfwd={protocol}:127.0.0.1:{outer}-{}:{inner}",
        card.address
    )
}

/// In QEMU's options a comma is written twice.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_in_paths_do_not_become_options() {
        assert_eq!(escape("/a,readonly=off"), "/a,,readonly=off");
    }
}
