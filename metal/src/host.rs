//! A host from its start to its end: virtual, or the machine itself.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use nix::unistd::{Whence, lseek};
use rand::TryRngCore as _;
use rand::rngs::OsRng;

use crate::cpio;
use crate::forward::Forward;
use crate::inbox::{Event, Inbox};
use crate::native::Native;
use crate::plan::{self, Card, GuestShare, Kind, Plan};
use crate::qemu::{Machine, Qemu, Size};
use crate::relay;
use crate::rootfs::Rootfs;
use crate::share::Share;
use crate::tail::Tail;
use crate::timings::Timings;

/// A start takes 3 to 5 seconds on an idle machine; this is for one with a queue before each CPU.
const START_PATIENCE: Duration = Duration::from_secs(120);
/// The agent's port on the control card.
const CONTROL_PORT: u16 = 1000;

/// What a host is to be like.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// CPUs and memory.
    pub size: Size,
    /// Processor of a virtual host, if not the usual one.
    pub cpu: Option<String>,
    /// Directories to show inside, arranged.
    pub shares: Vec<Share>,
    /// Ports to forward.
    pub forwards: Vec<Forward>,
    /// Ends by itself after so long without a command.
    pub idle: Option<Duration>,
}

/// How to reach a host's agent.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Agent {
    /// Where it listens.
    pub address: SocketAddr,
    /// What to show it.
    pub token: String,
}

/// A running host. It ends when this is dropped.
#[derive(Debug)]
pub struct Host {
    /// How to run commands.
    pub agent: Agent,
    /// Forwarded ports, with those in place that were to be chosen.
    pub forwards: Vec<Forward>,
    backend: Backend,
}

#[derive(Debug)]
enum Backend {
    Virtual(Virtual),
    Native { native: Native, words: Tail },
}

#[derive(Debug)]
struct Virtual {
    qemu: Qemu,
    words: Tail,
    console: Tail,
}

impl Host {
    /// Makes this machine itself the host.
    pub fn start_native(wanted: &Wanted, inbox: &Inbox, timings: &mut Timings) -> Result<Self> {
        ensure!(
            wanted.cpu.is_none(),
            "--cpu is for a virtual host, and this machine itself is used; set TERN_METAL=qemu"
        );
        let token = new_token()?;
        let (mut native, events, stderr) = Native::start(&token, wanted)?;
        let mut words = Tail::of(stderr, || ());
        let to = inbox.sender();
        thread::spawn(move || {
            pass_on(events, &to);
            // Nobody listens any more when the host was ended on purpose.
            let _ = to.send(Event::HostEnded);
        });
        let port = wait_until_ready(inbox, timings)
            .map_err(|error| explained(error, || post_mortem_native(&mut native, &mut words)))?;
        let forwards = wanted
            .forwards
            .iter()
            .copied()
            .map(relay::start)
            .collect::<Result<_>>()?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let agent = Agent { address, token };
        Ok(Self {
            agent,
            forwards,
            backend: Backend::Native { native, words },
        })
    }

    /// Starts a virtual host and waits until it takes commands.
    pub fn start_virtual(
        rootfs: &Rootfs,
        wanted: &Wanted,
        inbox: &Inbox,
        timings: &mut Timings,
    ) -> Result<Self> {
        let network = card("eth0", 2);
        let control = card("control0", 3);
        let plan = Plan {
            token: new_token()?,
            events: "/dev/ttyS1".into(),
            groups: "/sys/fs/cgroup/exec".into(),
            idle_seconds: wanted.idle.map(|idle| idle.as_secs().max(1)),
            kind: Kind::Virtual {
                shares: guest_shares(&wanted.shares),
                network: network.clone(),
                control: control.clone(),
                control_port: CONTROL_PORT,
            },
        };
        let initramfs = initramfs(rootfs, &plan).context("cannot make the initramfs")?;
        let data = data_disk(rootfs).context("cannot make the data disk")?;
        timings.mark("disks prepared");
        let (qemu, stderr) = Qemu::start(&Machine {
            rootfs,
            initramfs: &initramfs,
            data: &data,
            size: wanted.size,
            cpu: wanted.cpu.as_deref(),
            shares: &wanted.shares,
            forwards: &wanted.forwards,
            network: &network,
            control: &control,
            control_port: CONTROL_PORT,
        })?;
        let to = inbox.sender();
        let console = qemu.console.try_clone()?;
        let mut machine = Virtual {
            words: Tail::of(stderr, || ()),
            // Nobody listens any more when the host was ended on purpose.
            console: Tail::of(console, move || drop(to.send(Event::HostEnded))),
            qemu,
        };
        listen(machine.qemu.events.try_clone()?, inbox);
        let mut ready = || -> Result<_> {
            let ports = machine.qemu.forwards()?;
            timings.mark("QEMU running");
            wait_until_ready(inbox, timings)?;
            Ok(ports)
        };
        let ports = ready().map_err(|error| explained(error, || post_mortem(&mut machine)))?;
        let of = |card: &Card| {
            let address = card.address;
            ports
                .iter()
                .filter(move |port| port.address == address)
                .map(|port| port.forward)
        };
        let agent = of(&control)
            .next()
            .context("QEMU does not say where the agent's port is")?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, agent.outer));
        let forwards = of(&network).collect();
        let agent = Agent {
            address,
            token: plan.token,
        };
        Ok(Self {
            agent,
            forwards,
            backend: Backend::Virtual(machine),
        })
    }

    /// Last words, for an error message after the host ended unexpectedly.
    pub fn post_mortem(&mut self) -> String {
        match &mut self.backend {
            Backend::Virtual(machine) => post_mortem(machine),
            Backend::Native { native, words } => post_mortem_native(native, words),
        }
    }
}

/// Adds what the host had to say to `error`, unless it was a person who ended it.
fn explained(error: anyhow::Error, words: impl FnOnce() -> String) -> anyhow::Error {
    if error.downcast_ref::<Interrupted>().is_some() {
        return error;
    }
    let words = words();
    if words.is_empty() {
        error
    } else {
        anyhow::anyhow!("{error:#}\n{words}")
    }
}

fn post_mortem(machine: &mut Virtual) -> String {
    let cpu_seconds = machine.qemu.cpu_seconds();
    machine.qemu.kill();
    let mut words: Vec<String> = machine.words.last_lines();
    words.extend(cpu_seconds.map(|seconds| format!("QEMU had {seconds} s of CPU time")));
    // Said at every start, about instructions that nobody misses.
    words.retain(|line| !line.contains("TCG doesn't support"));
    if words
        .iter()
        .any(|line| line.contains("Could not set up host forwarding rule"))
    {
        words.push("a port to forward is taken: choose another, or 0 for any free one".to_owned());
    }
    let console = machine.console.last_lines();
    if !console.is_empty() {
        words.push("last lines of the kernel's console:".to_owned());
        words.extend(console.into_iter().map(|line| format!("  {line}")));
    }
    words.join("\n")
}

fn post_mortem_native(native: &mut Native, words: &mut Tail) -> String {
    native.kill();
    words.last_lines().join("\n")
}

/// A signal ended the wait for a host.
#[derive(Debug)]
pub struct Interrupted(pub Signal);

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "interrupted by {}", self.0)
    }
}

impl std::error::Error for Interrupted {}

fn wait_until_ready(inbox: &Inbox, timings: &mut Timings) -> Result<u16> {
    let deadline = Instant::now() + START_PATIENCE;
    let mut reached = "nothing".to_owned();
    loop {
        match inbox.next(Some(deadline)) {
            Some(Event::Host(plan::Event::Phase { name, .. })) => {
                timings.mark(format!("inside: {name}"));
                reached = name;
            }
            Some(Event::Host(plan::Event::Ready { port })) => {
                timings.mark("agent ready");
                return Ok(port);
            }
            Some(Event::Host(plan::Event::Failed { message })) => {
                bail!("the host could not start: {message}");
            }
            Some(Event::HostEnded) => bail!("the host ended while it started"),
            Some(Event::Signal(Signal::SIGWINCH)) => {}
            Some(Event::Signal(signal)) => return Err(Interrupted(signal).into()),
            Some(Event::Host(plan::Event::Idle) | Event::Frame(_) | Event::Disconnected(_)) => {}
            None => bail!(
                "the host did not start within {} s (it reached: {reached}): is the machine very busy?",
                START_PATIENCE.as_secs()
            ),
        }
    }
}

/// Passes on the events of a starting host.
fn listen(events: UnixStream, inbox: &Inbox) {
    let to = inbox.sender();
    thread::spawn(move || pass_on(events, &to));
}

fn pass_on(events: impl io::Read, to: &Sender<Event>) {
    for line in BufReader::new(events).lines().map_while(Result::ok) {
        // A line that a boot left unfinished is no event.
        if let Ok(event) = serde_json::from_str(line.trim())
            && to.send(Event::Host(event)).is_err()
        {
            return;
        }
    }
}

fn card(name: &str, subnet: u8) -> Card {
    Card {
        // Locally administered, as QEMU's own are.
        mac: format!("52:54:00:74:6d:{subnet:02x}"),
        name: name.to_owned(),
        address: Ipv4Addr::new(10, 0, subnet, 15),
        gateway: Ipv4Addr::new(10, 0, subnet, 2),
        resolver: Ipv4Addr::new(10, 0, subnet, 3),
    }
}

fn guest_shares(shares: &[Share]) -> Vec<GuestShare> {
    shares
        .iter()
        .enumerate()
        .map(|(number, share)| GuestShare {
            tag: format!("share{number}"),
            path: share.inner.clone(),
            read_only: share.read_only,
        })
        .collect()
}

/// 128 random bits, so that no other user of the outer machine runs commands inside.
pub fn new_token() -> Result<String> {
    let mut bytes = [0; 16];
    OsRng
        .try_fill_bytes(&mut bytes)
        .context("the kernel gives no random numbers")?;
    Ok(hex::encode(bytes))
}

/// The cached initramfs, continued with this very program and its plan.
fn initramfs(rootfs: &Rootfs, plan: &Plan) -> Result<File> {
    let program: PathBuf = "/proc/self/exe".into();
    let program = std::fs::read(program).context("cannot read tern-metal's own program")?;
    let mut file = File::from(memfd_create(c"initramfs", MFdFlags::MFD_CLOEXEC)?);
    let mut base = File::open(rootfs.initramfs())?;
    io::copy(&mut base, &mut file)?;
    let mut rest = Vec::with_capacity(program.len() + 4096);
    cpio::file(&mut rest, "tern-metal", 0o755, &program)?;
    cpio::file(&mut rest, "plan.json", 0o600, &serde_json::to_vec(plan)?)?;
    cpio::end(&mut rest)?;
    file.write_all(&rest)?;
    Ok(file)
}

/// A copy of the template that has no name: it is gone when QEMU is.
fn data_disk(rootfs: &Rootfs) -> Result<File> {
    let template = File::open(rootfs.data())?;
    let length = template.metadata()?.len();
    let directory = std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from);
    let copy = tempfile::tempfile_in(&directory)
        .with_context(|| format!("cannot make a file in {}", directory.display()))?;
    copy.set_len(length)?;
    copy_sparsely(&template, &copy, length)?;
    Ok(copy)
}

/// Copies what is data and leaves the holes: a few MB of many GB.
fn copy_sparsely(from: &File, to: &File, length: u64) -> Result<()> {
    let mut at = 0;
    loop {
        let start = match lseek(from, at, Whence::SeekData) {
            Ok(start) => start,
            Err(nix::errno::Errno::ENXIO) => return Ok(()), // no data from here on
            Err(error) => return Err(error).context("cannot look for data"),
        };
        let end = lseek(from, start, Whence::SeekHole).context("cannot look for holes")?;
        ensure!(
            end > start && u64::try_from(end)? <= length,
            "the template changed meanwhile"
        );
        (&mut &*from).seek(SeekFrom::Start(u64::try_from(start)?))?;
        (&mut &*to).seek(SeekFrom::Start(u64::try_from(start)?))?;
        let piece = u64::try_from(end - start)?;
        let copied = io::copy(&mut from.take(piece), &mut &*to).context("cannot copy")?;
        ensure!(copied == piece, "the template was cut off meanwhile");
        at = end;
    }
}
