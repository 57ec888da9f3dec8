//! One command inside the host: started in a session and a control group of its own, its streams
//! carried over the connection, and nothing of it left behind.
//!
//! Three threads: the connection's own thread pumps output and waits for the end, one reads the
//! caller's frames, one writes standard input. A caller that goes away kills the whole group.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, setsid};

use crate::process;
use crate::wire::{Command, Exit, Failure, Frame, STDIN_WINDOW, WindowSize};

/// Output is passed on in pieces of at most this size, half of a pipe's default capacity.
const OUTPUT_PIECE: usize = 32 * 1024;
/// How long to wait for killed leftovers to be gone. They are dead already; this is for a process
/// that hangs in the kernel, which must not hang its successor.
const LEFTOVER_PATIENCE: Duration = Duration::from_secs(5);
/// How long a finished connection may linger until its caller has closed it.
const CLOSE_PATIENCE: Duration = Duration::from_secs(10);
/// What a command finds in its environment before the caller's own variables.
const ENVIRONMENT: [(&str, &str); 5] = [
    ("HOME", "/root"),
    ("LANG", "C.UTF-8"),
    ("LOGNAME", "root"),
    (
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ),
    ("USER", "root"),
];

/// Control groups for commands, one each, below a directory of this agent's own.
#[derive(Debug)]
pub struct Groups {
    root: PathBuf,
    next: AtomicU64,
}

impl Groups {
    /// Makes the directory.
    pub fn new(root: PathBuf) -> Result<Self> {
        fs::create_dir_all(&root).with_context(|| {
            format!(
                "cannot make the control group {} (is cgroup v2 mounted?)",
                root.display()
            )
        })?;
        Ok(Self {
            root,
            next: AtomicU64::new(1),
        })
    }

    fn make(&self) -> io::Result<Group> {
        let path = self
            .root
            .join(self.next.fetch_add(1, Ordering::Relaxed).to_string());
        fs::create_dir(&path)?;
        Ok(Group { path })
    }
}

/// All processes of one command, wherever they forked to.
#[derive(Debug)]
struct Group {
    path: PathBuf,
}

impl Group {
    fn entrance(&self) -> io::Result<File> {
        File::options()
            .write(true)
            .open(self.path.join("cgroup.procs"))
    }

    fn kill(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
    }

    /// Waits until no process is left, or patience is.
    fn wait_empty(&self) -> io::Result<()> {
        let deadline = Instant::now() + LEFTOVER_PATIENCE;
        let mut events = File::open(self.path.join("cgroup.events"))?;
        loop {
            let mut text = String::new();
            io::Seek::rewind(&mut events)?;
            events.read_to_string(&mut text)?;
            let left = deadline.saturating_duration_since(Instant::now());
            if text.contains("populated 0") || left.is_zero() {
                return Ok(());
            }
            // The kernel flags the file each time the group becomes empty or not empty.
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            poll(
                &mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)],
                timeout,
            )?;
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Not empty when processes were to live on: then it stays with them.
        let _ = fs::remove_dir(&self.path);
    }
}

/// Runs `command` for the caller at the other end of `stream`, to its end.
pub fn run(stream: TcpStream, command: Command, groups: &Groups) -> Result<()> {
    let caller = Arc::new(Mutex::new(stream.try_clone()?));
    let group = groups.make().context("cannot make a control group")?;
    let running = match start(&command, &group) {
        Ok(running) => running,
        Err(failure) => {
            drop(group);
            say_last(&caller, &Frame::Failed(failure))?;
            return drain(&stream);
        }
    };
    let Running {
        child,
        input,
        outputs,
        terminal,
    } = running;
    let pid = Pid::from_raw(i32::try_from(child.id()).context("a process id out of range")?);
    let process = process::open(pid.as_raw())?;
    let child = Mutex::new(Some(child));

    let queued = Arc::new(AtomicUsize::new(0));
    thread::scope(|scope| {
        let (bytes, queue) = mpsc::channel();
        let (credit, given) = (caller.clone(), queued.clone());
        // Not waited for: leftovers that live on may hold the pipe's other end, full.
        thread::spawn(move || feed(input, &queue, &given, &credit));
        scope.spawn(|| {
            let heard = hear(&stream, bytes, &queued, |order| match order {
                Order::Signal(signal) => signal_if_alive(&child, pid, signal),
                Order::Resize(size) => resize(terminal.as_ref(), size),
            });
            // The caller is gone: nobody wants the rest. (After the end, this finds nobody.)
            let alive = child
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .is_some();
            if alive && group.kill().is_err() {
                signal_if_alive(&child, pid, libc::SIGKILL);
            }
            heard
        });

        let exit = pump(outputs, &process, &caller, || {
            let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
            let status = child.take().map(|mut child| child.wait()).transpose()?;
            if !command.keep_background {
                group.kill()?;
                group.wait_empty()?;
            }
            Ok(status)
        });
        let last = match exit {
            Ok(status) => Frame::Exit(exit_of(status)),
            Err(error) => {
                let _ = group.kill();
                let message = format!("the agent lost the command: {error:#}");
                Frame::Failed(Failure { message, code: 125 })
            }
        };
        // The thread that hears goes on until the caller closes, as `drain` would.
        say_last(&caller, &last)
    })
}

fn say_last(caller: &Mutex<TcpStream>, last: &Frame) -> Result<()> {
    let mut caller = caller.lock().unwrap_or_else(PoisonError::into_inner);
    last.write_to(&mut *caller)?;
    caller.shutdown(Shutdown::Write)?;
    Ok(())
}

/// Lets the caller close first: closing with unread input in the socket would reset the connection
/// and take the last word with it.
fn drain(mut stream: &TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(CLOSE_PATIENCE))?;
    io::copy(&mut stream, &mut io::sink())?;
    Ok(())
}

struct Running {
    child: Child,
    input: File,
    outputs: Vec<Output>,
    terminal: Option<OwnedFd>,
}

struct Output {
    from: File,
    frame: fn(Vec<u8>) -> Frame,
}

fn start(command: &Command, group: &Group) -> Result<Running, Failure> {
    let odd = |error: io::Error| Failure {
        message: error.to_string(),
        code: 125,
    };
    let Some((program, arguments)) = command.argv.split_first() else {
        return Err(Failure {
            message: "no command was given".to_owned(),
            code: 125,
        });
    };
    if !Path::new(&command.cwd).is_dir() {
        let message = format!(
            "the working directory {} does not exist inside the host: share it with --share, or \
             choose another with --cwd",
            command.cwd
        );
        return Err(Failure { message, code: 125 });
    }
    let mut environment: BTreeMap<&str, &str> = ENVIRONMENT.into();
    environment.extend(
        command
            .env
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str())),
    );
    let mut process = std::process::Command::new(program);
    process
        .args(arguments)
        .env_clear()
        .envs(environment)
        .current_dir(&command.cwd);

    let entrance = group.entrance().map_err(odd)?;
    let on_terminal = command.tty.is_some();
    // SAFETY: between fork and exec only system calls are made: no allocation, no locks. `entrance`
    // is owned by the closure, so its descriptor is open in the child.
    unsafe {
        process.pre_exec(move || {
            setsid()?;
            nix::unistd::write(&entrance, b"0")?;
            if on_terminal && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let terminal = match command.tty {
        None => {
            process
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            None
        }
        Some(size) => {
            let pair = openpty(&window(size), None).map_err(|error| odd(error.into()))?;
            process.stdin(Stdio::from(pair.slave.try_clone().map_err(odd)?));
            process.stdout(Stdio::from(pair.slave.try_clone().map_err(odd)?));
            process.stderr(Stdio::from(pair.slave));
            Some(pair.master)
        }
    };
    let mut child = process
        .spawn()
        .map_err(|error| not_started(program, &error))?;
    let (input, outputs) = match (&terminal, child.stdin.take()) {
        (None, Some(stdin)) => {
            let stdout = child.stdout.take().map(OwnedFd::from);
            let stderr = child.stderr.take().map(OwnedFd::from);
            let outputs = stdout
                .map(|pipe| Output {
                    from: pipe.into(),
                    frame: Frame::Stdout,
                })
                .into_iter()
                .chain(stderr.map(|pipe| Output {
                    from: pipe.into(),
                    frame: Frame::Stderr,
                }))
                .collect();
            (File::from(OwnedFd::from(stdin)), outputs)
        }
        (Some(master), _) => {
            let input = master.try_clone().map_err(odd)?.into();
            let from = master.try_clone().map_err(odd)?.into();
            (
                input,
                vec![Output {
                    from,
                    frame: Frame::Stdout,
                }],
            )
        }
        (None, None) => unreachable!("standard input was asked to be a pipe"),
    };
    Ok(Running {
        child,
        input,
        outputs,
        terminal,
    })
}

fn not_started(program: &str, error: &io::Error) -> Failure {
    let code = match error.kind() {
        io::ErrorKind::NotFound => 127,
        io::ErrorKind::PermissionDenied => 126,
        _ if error.raw_os_error() == Some(libc::ENOEXEC) => 126,
        _ => 125,
    };
    let hint = match code {
        127 => ": is it in a shared directory, and built for this Debian's C library?",
        _ => "",
    };
    Failure {
        message: format!("cannot start {program} inside the host: {error}{hint}"),
        code,
    }
}

fn exit_of(status: Option<ExitStatus>) -> Exit {
    match status.map(|status| (status.code(), status.signal())) {
        Some((Some(code), _)) => Exit::Code(code),
        Some((None, Some(signal))) => Exit::Signal(signal),
        _ => Exit::Signal(libc::SIGKILL),
    }
}

/// Passes output on until the process has ended and the pipes are empty. `ended` is called once,
/// at the end of the process; what leftovers print after that is theirs to lose.
fn pump<T>(
    mut outputs: Vec<Output>,
    process: &OwnedFd,
    caller: &Mutex<TcpStream>,
    ended: impl FnOnce() -> io::Result<T>,
) -> Result<T> {
    for Output { from, .. } in &outputs {
        let flags = OFlag::from_bits_retain(fcntl(from, FcntlArg::F_GETFL)?);
        fcntl(from, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    }
    let mut deaf = false;
    loop {
        let mut polled: Vec<PollFd<'_>> = outputs
            .iter()
            .map(|o| PollFd::new(o.from.as_fd(), PollFlags::POLLIN))
            .collect();
        polled.push(PollFd::new(process.as_fd(), PollFlags::POLLIN));
        match poll(&mut polled, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        let ready: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        let mut still_open = ready.iter();
        outputs.retain_mut(|output| match still_open.next() {
            Some(true) => pass_on(output, caller, &mut deaf, 1),
            _ => true,
        });
        if ready.last() == Some(&true) {
            let result = ended()?;
            for output in &mut outputs {
                pass_on(output, caller, &mut deaf, usize::MAX);
            }
            return Ok(result);
        }
    }
}

/// Passes on up to `pieces` pieces; false at the end of the output. Once the caller is gone, output
/// is read and dropped, so that the command does not hang on a full pipe before it is killed.
fn pass_on(output: &mut Output, caller: &Mutex<TcpStream>, deaf: &mut bool, pieces: usize) -> bool {
    for _ in 0..pieces {
        let mut piece = vec![0; OUTPUT_PIECE];
        match output.from.read(&mut piece) {
            Ok(0) => return false,
            Ok(length) => {
                piece.truncate(length);
                let mut caller = caller.lock().unwrap_or_else(PoisonError::into_inner);
                *deaf = *deaf || (output.frame)(piece).write_to(&mut *caller).is_err();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A terminal whose last process is gone answers EIO: that is its end of file.
            Err(_) => return false,
        }
    }
    true
}

enum Order {
    Signal(i32),
    Resize(WindowSize),
}

/// Reads the caller's frames until it closes.
fn hear(
    mut stream: &TcpStream,
    input: mpsc::Sender<Vec<u8>>,
    queued: &AtomicUsize,
    mut obey: impl FnMut(Order),
) -> io::Result<()> {
    let mut input = Some(input);
    while let Some(frame) = Frame::read_from(&mut stream)? {
        match frame {
            Frame::Stdin(bytes) if bytes.is_empty() => input = None,
            Frame::Stdin(bytes) => {
                let before = queued.fetch_add(bytes.len(), Ordering::Relaxed);
                if before + bytes.len() > STDIN_WINDOW {
                    return Err(io::Error::other("more input than there was credit for"));
                }
                // A command that has closed its input wants no more of it; that is no error.
                let _ = input.as_ref().map(|input| input.send(bytes));
            }
            Frame::Signal(signal) => obey(Order::Signal(signal)),
            Frame::Resize(size) => obey(Order::Resize(size)),
            other => return Err(io::Error::other(format!("unexpected {other:?}"))),
        }
    }
    Ok(())
}

/// Writes standard input and gives credit for more.
fn feed(
    mut input: File,
    queue: &mpsc::Receiver<Vec<u8>>,
    queued: &AtomicUsize,
    caller: &Mutex<TcpStream>,
) {
    for bytes in queue {
        if write_all(&mut input, &bytes).is_err() {
            return;
        }
        queued.fetch_sub(bytes.len(), Ordering::Relaxed);
        let credit = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let mut caller = caller.lock().unwrap_or_else(PoisonError::into_inner);
        if Frame::StdinCredit(credit).write_to(&mut *caller).is_err() {
            return;
        }
    }
}

/// As `Write::write_all`, for a descriptor that may be non-blocking (a terminal's two directions
/// share the flag).
fn write_all(to: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll(
                    &mut [PollFd::new(to.as_fd(), PollFlags::POLLOUT)],
                    PollTimeout::NONE,
                )?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn signal_if_alive(child: &Mutex<Option<Child>>, pid: Pid, signal: i32) {
    // The lock keeps the process from being waited for, and its number from being used again.
    let child = child.lock().unwrap_or_else(PoisonError::into_inner);
    if let (Some(_), Ok(signal)) = (child.as_ref(), Signal::try_from(signal)) {
        // It may have ended by itself in this moment; then there is nothing to signal.
        let _ = killpg(pid, signal);
    }
}

fn window(size: WindowSize) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

fn resize(terminal: Option<&OwnedFd>, size: WindowSize) {
    if let Some(terminal) = terminal {
        // SAFETY: TIOCSWINSZ reads one `winsize`, which lives through the call.
        unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &window(size)) };
    }
}
