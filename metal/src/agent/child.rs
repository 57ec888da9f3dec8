//! One command inside the host: started in a session and a control group of its own, its streams
//! carried over the connection, and nothing of it left behind.
//!
//! Three threads: the connection's own thread pumps output and waits for the end, one reads the
//! caller's frames, one writes standard input. A caller that goes away kills the whole group.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, setsid};

use super::group::{Group, Groups};
use super::streams::{Order, Output, feed, hear, pump};
use crate::process;
use crate::wire::{Command, Exit, Failure, Frame, WindowSize};

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

/// Whether a command can begin in `path`; over a share that may fail for other reasons than its lack.
fn check_directory(path: &str) -> Result<(), String> {
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(format!(
            "the working directory {path} is a file inside the host"
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(format!(
            "the working directory {path} does not exist inside the host: share it with --share, or \
             choose another with --cwd"
        )),
        Err(error) => Err(format!(
            "the working directory {path} cannot be looked at: {error}"
        )),
    }
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
    check_directory(&command.cwd).map_err(|message| Failure { message, code: 125 })?;
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
