//! Runs one command inside a host as if it ran here: streams, signals, terminal, exit code.

use std::io::{self, IsTerminal as _, Read as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use nix::sys::termios::{self, SetArg, Termios};

use crate::host::Agent;
use crate::inbox::{Event, Inbox};
use crate::timings::Timings;
use crate::wire::{Command, Exit, Frame, Request, STDIN_WINDOW, WindowSize};

/// Exit code when the time limit ended the command, as of timeout(1).
pub const TIMED_OUT: u8 = 124;
/// Exit code when tern-metal itself failed, as of `docker run`, `env` and others.
pub const FAILED: u8 = 125;
/// How long a command may take to end after a SIGTERM, before it is killed.
const TERMINATION_PATIENCE: Duration = Duration::from_secs(10);
/// The third Ctrl-C is for tern-metal.
const INTERRUPTS_TO_FORCE: u32 = 3;
/// Input is sent in pieces of at most this size.
const INPUT_PIECE: usize = 32 * 1024;

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// By itself, or by a signal that was sent to it.
    Exited(Exit),
    /// It could not be started: reason, and the exit code for it.
    NotStarted(String, u8),
    /// By the time limit.
    TimedOut,
    /// It did not end in time after this signal, and was killed.
    Forced(Signal),
    /// The host went away under it, for this reason.
    Lost(String),
}

impl Outcome {
    /// The code to exit with.
    pub fn code(&self) -> u8 {
        match self {
            Self::Exited(Exit::Code(code)) => u8::try_from(code & 0xff).unwrap_or(FAILED),
            Self::Exited(Exit::Signal(signal)) => signal_code(*signal),
            Self::NotStarted(_, code) => *code,
            Self::TimedOut => TIMED_OUT,
            Self::Forced(signal) => signal_code(*signal as i32),
            Self::Lost(_) => FAILED,
        }
    }
}

impl From<&Outcome> for ExitCode {
    fn from(outcome: &Outcome) -> Self {
        outcome.code().into()
    }
}

/// As shells count: 128 and the signal's number.
pub fn signal_code(signal: i32) -> u8 {
    u8::try_from(128 + (signal & 0x7f)).unwrap_or(FAILED)
}

/// Runs `command` and returns when it has ended.
pub fn run(
    agent: &Agent,
    command: Command,
    limit: Option<Instant>,
    inbox: &Inbox,
    timings: &mut Timings,
) -> Result<Outcome> {
    let stream = TcpStream::connect(agent.address)
        .with_context(|| format!("cannot reach the host's agent at {}", agent.address))?;
    stream.set_nodelay(true)?;
    let on_terminal = command.tty.is_some();
    let connection = Connection {
        to: Arc::new(Mutex::new(stream.try_clone()?)),
    };
    let request = Request {
        token: agent.token.clone(),
        command,
    };
    connection
        .send(&Frame::Request(Box::new(request)))
        .context("cannot ask the agent")?;
    timings.mark("command sent");

    let _raw = on_terminal.then(RawTerminal::enter).transpose()?;
    let window = Window::new();
    listen(stream.try_clone()?, inbox);
    // A command without a terminal does not take input from ours: it may be in the background.
    if on_terminal || !io::stdin().is_terminal() {
        let (connection, window) = (connection.clone(), window.clone());
        thread::spawn(move || send_input(&connection, &window));
    } else {
        connection
            .send(&Frame::Stdin(Vec::new()))
            .context("cannot reach the agent")?;
    }
    let outcome = converse(&connection, &window, limit, inbox);
    // It may be closed already.
    let _ = stream.shutdown(Shutdown::Both);
    timings.mark("command ended");
    outcome
}

fn converse(
    connection: &Connection,
    window: &Window,
    limit: Option<Instant>,
    inbox: &Inbox,
) -> Result<Outcome> {
    let mut ending: Option<(Instant, Outcome)> = None;
    let mut interrupts = 0;
    loop {
        let deadline = ending.as_ref().map(|(deadline, _)| *deadline).or(limit);
        let Some(event) = inbox.next(deadline) else {
            if let Some((_, outcome)) = ending {
                return Ok(outcome); // the connection's end kills it
            }
            connection.signal(Signal::SIGTERM);
            ending = Some((Instant::now() + TERMINATION_PATIENCE, Outcome::TimedOut));
            continue;
        };
        match event {
            Event::Frame(Frame::Stdout(bytes)) => {
                if let Err(error) = print(&mut io::stdout().lock(), &bytes) {
                    // As a local command would end whose reader has gone away.
                    return match error.kind() {
                        io::ErrorKind::BrokenPipe => Ok(Outcome::Forced(Signal::SIGPIPE)),
                        _ => Err(error).context("cannot pass on the command's output"),
                    };
                }
            }
            // Whoever closed standard error wants to hear nothing.
            Event::Frame(Frame::Stderr(bytes)) => drop(print(&mut io::stderr().lock(), &bytes)),
            Event::Frame(Frame::StdinCredit(bytes)) => window.open(bytes as usize),
            Event::Frame(Frame::Exit(exit)) => {
                return Ok(match ending {
                    Some((_, Outcome::TimedOut)) => Outcome::TimedOut,
                    _ => Outcome::Exited(exit),
                });
            }
            Event::Frame(Frame::Failed(failure)) => {
                return Ok(Outcome::NotStarted(failure.message, failure.code));
            }
            Event::Frame(other) => bail!("the agent said something odd: {other:?}"),
            Event::Disconnected(reason) => return Ok(Outcome::Lost(reason)),
            Event::HostEnded => return Ok(Outcome::Lost("the host ended".to_owned())),
            Event::Host(_) => {}
            Event::Signal(Signal::SIGWINCH) => {
                if let Some(size) = terminal_size() {
                    connection.try_send(&Frame::Resize(size));
                }
            }
            Event::Signal(signal) => {
                connection.signal(signal);
                interrupts += u32::from(signal == Signal::SIGINT);
                if interrupts == INTERRUPTS_TO_FORCE {
                    return Ok(Outcome::Forced(signal));
                }
                let fatal = matches!(signal, Signal::SIGTERM | Signal::SIGHUP);
                if fatal && ending.is_none() {
                    let deadline = Instant::now() + TERMINATION_PATIENCE;
                    ending = Some((deadline, Outcome::Forced(signal)));
                }
            }
        }
    }
}

fn print(to: &mut impl io::Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes).and_then(|()| to.flush())
}

fn listen(mut stream: TcpStream, inbox: &Inbox) {
    let to = inbox.sender();
    thread::spawn(move || {
        loop {
            let event = match Frame::read_from(&mut stream) {
                Ok(Some(frame)) => Event::Frame(frame),
                Ok(None) => Event::Disconnected("the agent closed the connection".to_owned()),
                Err(error) => Event::Disconnected(error.to_string()),
            };
            let last = matches!(event, Event::Disconnected(_));
            if to.send(event).is_err() || last {
                return;
            }
        }
    });
}

/// The sending half of the connection.
#[derive(Debug, Clone)]
struct Connection {
    to: Arc<Mutex<TcpStream>>,
}

impl Connection {
    fn send(&self, frame: &Frame) -> io::Result<()> {
        frame.write_to(&mut *self.to.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Where the connection is broken, its reader says so; there is nothing to add.
    fn try_send(&self, frame: &Frame) {
        let _ = self.send(frame);
    }

    fn signal(&self, signal: Signal) {
        self.try_send(&Frame::Signal(signal as i32));
    }
}

/// How much input may still be sent.
#[derive(Debug, Clone)]
struct Window(Arc<(Mutex<usize>, Condvar)>);

impl Window {
    fn new() -> Self {
        Self(Arc::new((Mutex::new(STDIN_WINDOW), Condvar::new())))
    }

    fn open(&self, bytes: usize) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) += bytes;
        self.0.1.notify_all();
    }

    /// Waits until `bytes` may be sent.
    fn take(&self, bytes: usize) {
        let mut left = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        while *left < bytes {
            left = self.0.1.wait(left).unwrap_or_else(PoisonError::into_inner);
        }
        *left -= bytes;
    }
}

fn send_input(connection: &Connection, window: &Window) {
    let mut piece = vec![0; INPUT_PIECE];
    let mut stdin = io::stdin().lock();
    loop {
        // An input that cannot be read is an input that has ended.
        let length = stdin.read(&mut piece).unwrap_or(0);
        window.take(length);
        if connection
            .send(&Frame::Stdin(piece[..length].to_vec()))
            .is_err()
            || length == 0
        {
            return;
        }
    }
}

/// The size of the terminal we run in.
pub fn terminal_size() -> Option<WindowSize> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes one `winsize`, which lives through the call.
    let done = unsafe { libc::ioctl(0, libc::TIOCGWINSZ, &mut size) };
    (done == 0).then_some(WindowSize {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}

/// Our terminal with every key passed on as it is, until dropped.
#[derive(Debug)]
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn enter() -> Result<Self> {
        let before = termios::tcgetattr(io::stdin().as_fd()).context("cannot read the terminal")?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(io::stdin().as_fd(), SetArg::TCSADRAIN, &raw)
            .context("cannot set the terminal")?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = termios::tcsetattr(io::stdin().as_fd(), SetArg::TCSADRAIN, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_a_shell() {
        for (outcome, code) in [
            (Outcome::Exited(Exit::Code(0)), 0),
            (Outcome::Exited(Exit::Code(7)), 7),
            (Outcome::Exited(Exit::Signal(9)), 137),
            (Outcome::NotStarted(String::new(), 127), 127),
            (Outcome::TimedOut, 124),
            (Outcome::Forced(Signal::SIGTERM), 143),
            (Outcome::Lost(String::new()), 125),
        ] {
            assert_eq!(outcome.code(), code, "{outcome:?}");
        }
    }
}
