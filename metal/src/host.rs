//! A host from its start to its end: virtual, or the machine itself.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
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
use crate::timings::Timings;

/// A start takes 3 to 5 seconds on an idle machine; this is for one with a queue before each CPU.
const START_PATIENCE: Duration = Duration::from_secs(120);
/// The agent's port on the control card.
const CONTROL_PORT: u16 = 1000;
/// Lines of the kernel's console kept for an error message.
const CONSOLE_LINES: usize = 40;

/// What a host is to be like.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// CPUs and memory.
    pub size: Size,
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
    Virtual { qemu: Qemu, console: Console },
    Native { _native: Native },
}

impl Host {
    /// Makes this machine itself the host.
    pub fn start_native(wanted: &Wanted, inbox: &Inbox, timings: &mut Timings) -> Result<Self> {
        let token = new_token()?;
        let (native, events) = Native::start(&token, wanted)?;
        let to = inbox.sender();
        thread::spawn(move || {
            pass_on(events, &to);
            // Nobody listens any more when the host was ended on purpose.
            let _ = to.send(Event::HostEnded);
        });
        let port = wait_until_ready(inbox, timings)?;
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
            backend: Backend::Native { _native: native },
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
        let mut qemu = Qemu::start(&Machine {
            rootfs,
            initramfs: &initramfs,
            data: &data,
            size: wanted.size,
            shares: &wanted.shares,
            forwards: &wanted.forwards,
            network: &network,
            control: &control,
            control_port: CONTROL_PORT,
        })?;
        let console = Console::watch(qemu.console.try_clone()?, inbox);
        listen(qemu.events.try_clone()?, inbox);
        let ports = match qemu.forwards() {
            Ok(ports) => ports,
            Err(error) => return Err(unable(error, &mut qemu, &console)),
        };
        timings.mark("QEMU running");
        let agent = ports
            .iter()
            .find(|(address, _)| *address == control.address)
            .map(|(_, forward)| SocketAddr::from((Ipv4Addr::LOCALHOST, forward.outer)))
            .context("QEMU does not say where the agent's port is")?;
        let forwards = ports
            .into_iter()
            .filter(|(address, _)| *address == network.address)
            .map(|(_, forward)| forward)
            .collect();
        if let Err(error) = wait_until_ready(inbox, timings) {
            return Err(unable(error, &mut qemu, &console));
        }
        let agent = Agent {
            address: agent,
            token: plan.token,
        };
        Ok(Self {
            agent,
            forwards,
            backend: Backend::Virtual { qemu, console },
        })
    }

    /// Last words, for an error message after the host ended unexpectedly.
    pub fn post_mortem(&mut self) -> String {
        match &mut self.backend {
            Backend::Virtual { qemu, console } => post_mortem(qemu, console),
            Backend::Native { .. } => String::new(),
        }
    }
}

/// Ends QEMU and adds what it and the kernel had to say to `error`.
fn unable(error: anyhow::Error, qemu: &mut Qemu, console: &Console) -> anyhow::Error {
    if error.downcast_ref::<Interrupted>().is_some() {
        return error;
    }
    let words = post_mortem(qemu, console);
    if words.is_empty() {
        error
    } else {
        error.context(words)
    }
}

fn post_mortem(qemu: &mut Qemu, console: &Console) -> String {
    qemu.kill();
    let mut words = qemu.complaints();
    if words.contains("Could not set up host forwarding rule") {
        words.push_str("\nA port to forward is taken: choose another, or 0 for any free one");
    }
    let console = console.last_lines();
    if !console.is_empty() {
        words.push_str("\nlast lines of the kernel's console:\n");
        words.push_str(&console);
    }
    words.trim().to_owned()
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
    loop {
        match inbox.next(Some(deadline)) {
            Some(Event::Host(plan::Event::Phase { name, .. })) => {
                timings.mark(format!("inside: {name}"));
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
            Some(Event::Frame(_) | Event::Disconnected) => {}
            None => bail!(
                "the host did not start within {} s: is the machine very busy?",
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

/// The last lines of the kernel's console.
#[derive(Debug, Clone)]
struct Console {
    lines: Arc<Mutex<VecDeque<String>>>,
}

impl Console {
    /// Reads the console until it ends, which is when the host ends.
    fn watch(from: UnixStream, inbox: &Inbox) -> Self {
        let console = Self {
            lines: Arc::default(),
        };
        let (lines, to) = (console.lines.clone(), inbox.sender());
        thread::spawn(move || {
            for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                if lines.len() == CONSOLE_LINES {
                    lines.pop_front();
                }
                lines.push_back(line);
            }
            // Nobody listens any more when the host was ended on purpose.
            let _ = to.send(Event::HostEnded);
        });
        console
    }

    fn last_lines(&self) -> String {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(|line| format!("  {line}\n")).collect()
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
