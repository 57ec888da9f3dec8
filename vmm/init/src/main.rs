//! PID 1 of a Tern Machine.
//!
//! The monitor boots a kernel with two initramfs archives: the common one with this program, and the
//! Machine's own with its [`RunConfig`]. From there on, in order: kernel modules, the vsock server,
//! the root file system, its mounts and files, the network, the app; then waiting. When the app has
//! ended, or could not be started, the host is told, the disks are written out, and the machine is
//! reset, which ends the monitor.
//!
//! Whatever fails before the app runs is reported to the host like an app that ended, with code 125
//! and the reason in the log. Nothing but a lost kernel makes PID 1 exit.

mod children;
mod clock;
mod etc;
mod exec;
mod guest;
mod journal;
mod kmsg;
mod lines;
mod modules;
mod net;
mod netlink;
mod output;
mod process;
mod root;
mod server;
mod shutdown;
mod status;
mod terminal;
mod users;

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use nix::fcntl::OFlag;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{pipe2, sethostname};
use tern_guest::archive::parse_run_json;
use tern_guest::message::Stream;
use tern_guest::{ExitStatus, RUN_JSON, RunConfig};

use crate::children::Exit;
use crate::guest::Guest;
use crate::kmsg::OomWatch;
use crate::output::Source;
use crate::process::{Descriptors, StartError};
use crate::root::Disks;

fn main() {
    if std::process::id() != 1 {
        eprintln!("tern-init is the first program of a Machine; it does nothing else");
        std::process::exit(2);
    }
    std::panic::set_hook(Box::new(|panic| kmsg::error(&panic.to_string())));
    let guest = Arc::new(Guest::default());
    let mut disks = Disks::default();
    let status = match set_up(&guest, &mut disks) {
        Ok(config) => run_app(&guest, &config),
        Err(error) => fail(
            &guest,
            SETUP_FAILED,
            &format!("cannot set up the Machine: {error:#}"),
        ),
    };
    shutdown::finish(&guest, status, &disks)
}

/// Makes the guest a place in which a program can run.
fn set_up(guest: &Arc<Guest>, disks: &mut Disks) -> Result<RunConfig> {
    status::mark("kernel");
    root::mount_early()?;
    // Else the kernel drops what init says when it says much at once.
    let _ = fs::write("/proc/sys/kernel/printk_devkmsg", "on");
    guest::raise_own_limits().context("limits")?;
    watch_signals(guest).context("signals")?;
    modules::load_all()?;
    status::mark("modules");
    server::start(Arc::clone(guest)).context("vsock")?;
    let config = parse_run_json(&fs::read(RUN_JSON).context(RUN_JSON)?)?;
    *disks = root::enter(&config.root)?;
    root::mount_system()?;
    status::mark("root");
    if !config.hostname.is_empty() {
        sethostname(&config.hostname).context("hostname")?;
    }
    etc::write_all(Path::new("/"), &config)?;
    net::bring_up(&config.interfaces)?;
    status::mark("network");
    let account = users::lookup(Path::new("/"), &config.process.user)?;
    for volume in &config.mounts {
        let context = || format!("volume {}", volume.path);
        disks.mount_volume(volume, &account).with_context(context)?;
    }
    let working_dir = &config.process.working_dir;
    if !working_dir.is_empty() {
        fs::create_dir_all(working_dir).with_context(|| format!("directory {working_dir}"))?;
    }
    status::mark("set_up");
    kmsg::info("the Machine is set up");
    Ok(config)
}

/// Takes all signals for PID 1 in a thread: children that ended, and requests to stop.
fn watch_signals(guest: &Arc<Guest>) -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [
        Signal::SIGCHLD,
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGPWR,
    ] {
        signals.add(signal);
    }
    // Threads started from now on inherit this.
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)?;
    let guest = Arc::clone(guest);
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            loop {
                match signals.read_signal() {
                    Ok(Some(signal)) if signal.ssi_signo == Signal::SIGCHLD as u32 => {
                        guest.children.reap();
                    }
                    Ok(Some(_)) => {
                        if let Err(error) = guest.stop(None, None) {
                            kmsg::error(&format!("asked to stop: {error}"));
                        }
                    }
                    // It can only have been interrupted.
                    Ok(None) | Err(_) => {}
                }
            }
        })?;
    Ok(())
}

/// Runs the app to its end.
fn run_app(guest: &Arc<Guest>, config: &RunConfig) -> ExitStatus {
    let config = guest.set_ready(config.clone());
    let mut oom = OomWatch::start();
    let (pid, exit, output) = match start_app(guest, config) {
        Ok(started) => started,
        Err(error) => {
            let code = error
                .downcast_ref::<StartError>()
                .map_or(SETUP_FAILED, StartError::code);
            return fail(guest, code, &format!("cannot start the app: {error:#}"));
        }
    };
    let mut status = children::wait(&exit);
    let killed = oom.killed();
    // A shell that ran the app returns what killed it: 128 and the signal.
    status.oom_killed = killed.contains(&pid) || status.code == 137 && !killed.is_empty();
    // All that the app has written comes before its end.
    if output.join().is_err() {
        guest.say("the rest of the output is lost");
    }
    if status.code == 0 {
        kmsg::info("the app has ended");
    } else {
        kmsg::error(&format!(
            "the app has ended with code {}; its last words:",
            status.code
        ));
        guest
            .journal
            .tail(LAST_LINES)
            .iter()
            .for_each(|line| kmsg::error(line));
    }
    status
}

fn start_app(guest: &Arc<Guest>, config: &RunConfig) -> Result<(i32, Exit, JoinHandle<()>)> {
    let program = guest.app_program()?;
    let (descriptors, sources) = open_descriptors(config.process.tty)?;
    let (process, exit) = program.start(&guest.children, descriptors)?;
    let pid = process.pid();
    status::mark("app");
    guest.set_app(Arc::clone(&process));
    let output = output::collect(Arc::clone(guest), process, sources, config.log_to_console)?;
    Ok((pid, exit, output))
}

/// What the app writes to, and where we read it.
fn open_descriptors(tty: bool) -> Result<(Descriptors, Vec<Source>)> {
    if tty {
        let (ours, theirs) = terminal::open()?;
        let source = Source::new(ours, Stream::Stdout)?;
        return Ok((Descriptors::terminal(theirs)?, vec![source]));
    }
    let pipe = || -> Result<(OwnedFd, OwnedFd)> { Ok(pipe2(OFlag::O_CLOEXEC)?) };
    let ((our_stdout, stdout), (our_stderr, stderr)) = (pipe()?, pipe()?);
    let descriptors = Descriptors {
        stdin: Stdio::null(),
        stdout: stdout.into(),
        stderr: stderr.into(),
        controlling_terminal: false,
    };
    let sources = vec![
        Source::new(our_stdout, Stream::Stdout)?,
        Source::new(our_stderr, Stream::Stderr)?,
    ];
    Ok((descriptors, sources))
}

/// The end of a Machine whose app never ran, for the log and for the serial console.
fn fail(guest: &Guest, code: i32, message: &str) -> ExitStatus {
    guest.journal.line(Stream::Init, message.to_string());
    kmsg::error(message);
    ExitStatus {
        code,
        ..Default::default()
    }
}

/// What goes to the serial console when an app fails: enough to see why, and little, for each byte
/// is an exit to the monitor.
const LAST_LINES: usize = 10;

/// What container engines return when they fail before the program could run.
const SETUP_FAILED: i32 = 125;
