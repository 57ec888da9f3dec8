//! Running a command for a host: its input and output over one connection.
//!
//! One thread per command, one `poll` for everything: the connection, the command's descriptors, its
//! end. Nothing blocks, and nothing is buffered without bound: while one side does not take what is
//! meant for it, the other side is not read. When the connection ends before the command does, the
//! command and its process group are killed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::Arc;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tern_guest::message::TerminalSize;
use tern_guest::signal::{SIGKILL, is_signal};
use tern_guest::{Decoder, Encoder, ExecInput, ExecRequest, ExitStatus, Frame, FrameKind, Reply};

use crate::children::{self, Exit, Process};
use crate::guest::Guest;
use crate::output::set_nonblocking;
use crate::process::{Descriptors, StartError};
use crate::terminal;

/// Serves one `exec` request to its end. `decoder` may already hold what follows the request.
pub fn serve(
    guest: &Guest,
    conn: UnixStream,
    decoder: Decoder,
    request: &ExecRequest,
) -> io::Result<()> {
    conn.set_nonblocking(true)?;
    let program = match guest.program(request) {
        Ok(program) => program,
        Err(error) => {
            return refuse(
                conn,
                &Reply::Error {
                    message: error.to_string(),
                },
            );
        }
    };
    let (descriptors, ends) = open_descriptors(request)?;
    let (process, exit) = match program.start(&guest.children, descriptors) {
        Ok(started) => started,
        Err(error) => return report_start_error(conn, request, &error),
    };
    let mut session = Session {
        guest,
        conn,
        decoder,
        process,
        stdin: ends.stdin,
        outputs: ends.outputs,
        terminal: ends.terminal,
        to_command: Vec::new(),
        input_over: !request.stdin,
        line_begun: false,
        to_host: Encoder::new(),
        buffer: vec![0; READ_SIZE],
        last_words: LAST_WORDS,
    };
    let result = session.run(&exit);
    if result.is_err() {
        guest.children.signal_group(&session.process, SIGKILL);
    }
    result
}

/// Our ends of a command's descriptors.
struct Ends {
    stdin: Option<File>,
    outputs: Vec<(FrameKind, File)>,
    terminal: Option<OwnedFd>,
}

fn open_descriptors(request: &ExecRequest) -> io::Result<(Descriptors, Ends)> {
    if let Some(size) = request.tty {
        let (ours, theirs) = terminal::open()?;
        terminal::resize(&ours, size)?;
        set_nonblocking(&ours)?;
        let ends = Ends {
            stdin: Some(File::from(ours.try_clone()?)),
            outputs: vec![(FrameKind::Stdout, File::from(ours.try_clone()?))],
            terminal: Some(ours),
        };
        return Ok((Descriptors::terminal(theirs)?, ends));
    }
    let (stdin, our_stdin) = if request.stdin {
        let (theirs, ours) = pipe2(OFlag::O_CLOEXEC)?;
        set_nonblocking(&ours)?;
        (Stdio::from(theirs), Some(File::from(ours)))
    } else {
        (Stdio::null(), None)
    };
    let (our_stdout, stdout) = pipe2(OFlag::O_CLOEXEC)?;
    let (our_stderr, stderr) = pipe2(OFlag::O_CLOEXEC)?;
    set_nonblocking(&our_stdout)?;
    set_nonblocking(&our_stderr)?;
    let descriptors = Descriptors {
        stdin,
        stdout: stdout.into(),
        stderr: stderr.into(),
        controlling_terminal: false,
    };
    let outputs = vec![
        (FrameKind::Stdout, File::from(our_stdout)),
        (FrameKind::Stderr, File::from(our_stderr)),
    ];
    Ok((
        descriptors,
        Ends {
            stdin: our_stdin,
            outputs,
            terminal: None,
        },
    ))
}

struct Session<'a> {
    guest: &'a Guest,
    conn: UnixStream,
    decoder: Decoder,
    process: Arc<Process>,
    stdin: Option<File>,
    outputs: Vec<(FrameKind, File)>,
    terminal: Option<OwnedFd>,
    to_command: Vec<u8>,
    input_over: bool,
    /// Whether the input so far ends within a line.
    line_begun: bool,
    to_host: Encoder,
    buffer: Vec<u8>,
    /// How much output still counts once the command has ended.
    last_words: usize,
}

/// What `poll` found.
struct Ready {
    conn: bool,
    stdin: bool,
    outputs: Vec<bool>,
    /// All outputs were asked, and none has anything.
    silent: bool,
    ended: bool,
}

impl Session<'_> {
    /// Ends with an error when the connection does.
    fn run(&mut self, exit: &Exit) -> io::Result<()> {
        self.take_frames()?;
        let mut ended = false;
        loop {
            let ready = self.wait(ended)?;
            if ready.conn {
                self.read_conn()?;
            }
            self.write_conn()?;
            if ready.stdin {
                self.write_command();
            }
            let taken = self.read_outputs(&ready.outputs);
            if ended {
                self.last_words = self.last_words.saturating_sub(taken);
            }
            // All that the command has written was in its pipes when it ended; what others that it
            // left behind write later is not its output.
            let dry = ready.silent && self.to_host.wire().is_empty();
            let all_told = self.outputs.is_empty() || self.last_words == 0;
            if ready.ended && all_told || ended && dry {
                break;
            }
            ended = ready.ended;
        }
        let status = children::wait(exit);
        self.to_host
            .json(&Reply::Exit(status))
            .map_err(io::Error::other)?;
        self.conn.set_nonblocking(false)?;
        self.conn
            .set_write_timeout(Some(crate::server::SEND_TIMEOUT))?;
        self.conn.write_all(self.to_host.wire())
    }

    fn wait(&self, ended: bool) -> io::Result<Ready> {
        // The end of the connection is told even while nothing more is read from it. On vsock that is
        // RDHUP alone: HUP would need both sides to have closed.
        let mut conn = libc::POLLRDHUP;
        if self.to_command.len() < BUFFER_LIMIT {
            conn |= libc::POLLIN;
        }
        if !self.to_host.wire().is_empty() {
            conn |= libc::POLLOUT;
        }
        let stdin = self.stdin.as_ref().filter(|_| !self.to_command.is_empty());
        let has_room = self.to_host.wire().len() < BUFFER_LIMIT;
        let outputs: &[_] = if has_room { &self.outputs } else { &[] };

        let mut fds = vec![poll_fd(&self.conn, conn)];
        if !ended {
            fds.push(poll_fd(&*self.process, libc::POLLIN));
        }
        let first_output = fds.len();
        fds.extend(outputs.iter().map(|(_, f)| poll_fd(f, libc::POLLIN)));
        fds.extend(stdin.map(|stdin| poll_fd(stdin, libc::POLLOUT)));
        let timeout_ms = match (ended, &self.terminal) {
            (true, _) if !has_room => FOR_EVER,
            // A terminal hands over its last words a moment after the command has ended.
            (true, Some(_)) => TERMINAL_GRACE_MS,
            (true, None) if self.to_host.wire().is_empty() => 0,
            _ => FOR_EVER,
        };
        poll(&mut fds, timeout_ms)?;
        let any = |fd: &libc::pollfd| fd.revents != 0;
        let ready: Vec<bool> = fds[first_output..][..outputs.len()]
            .iter()
            .map(any)
            .collect();
        Ok(Ready {
            conn: fds[0].revents & !libc::POLLOUT != 0,
            ended: ended || any(&fds[1]),
            stdin: fds[first_output + outputs.len()..].iter().any(any),
            silent: has_room && !ready.contains(&true),
            outputs: ready,
        })
    }

    fn read_conn(&mut self) -> io::Result<()> {
        match (&self.conn).read(&mut self.buffer) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => {
                self.decoder.feed(&self.buffer[..length]);
                self.take_frames()
            }
            Err(error) if is_transient(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn take_frames(&mut self) -> io::Result<()> {
        while let Some(frame) = self.decoder.next_frame().map_err(io::Error::other)? {
            self.on_frame(frame)?;
        }
        self.close_stdin_when_done();
        Ok(())
    }

    fn on_frame(&mut self, frame: Frame) -> io::Result<()> {
        match frame.kind {
            FrameKind::Stdin if frame.payload.is_empty() => self.end_input(),
            FrameKind::Stdin if !self.input_over && self.stdin.is_some() => {
                self.to_command.extend_from_slice(&frame.payload);
                self.line_begun = !frame.payload.ends_with(b"\n");
            }
            // The command has closed its input, or has none: what comes for it goes nowhere.
            FrameKind::Stdin => {}
            FrameKind::Json => match frame.parse().map_err(io::Error::other)? {
                ExecInput::Resize(size) => self.resize(size),
                ExecInput::Signal { signo } if is_signal(signo) => {
                    self.guest.children.signal_group(&self.process, signo);
                }
                ExecInput::Signal { .. } => return Err(io::ErrorKind::InvalidData.into()),
            },
            FrameKind::Stdout | FrameKind::Stderr => {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        Ok(())
    }

    fn end_input(&mut self) {
        if self.terminal.is_some() && !self.input_over {
            // Behind an unfinished line the first only hands over that line.
            let times = if self.line_begun { 2 } else { 1 };
            let ends = std::iter::repeat_n(END_OF_TRANSMISSION, times);
            self.to_command.extend(ends);
        }
        self.input_over = true;
    }

    fn close_stdin_when_done(&mut self) {
        // A terminal stays open for its output.
        if self.input_over && self.to_command.is_empty() && self.terminal.is_none() {
            self.stdin = None;
        }
    }

    fn resize(&self, size: TerminalSize) {
        if let Some(terminal) = &self.terminal {
            // A failure leaves the old size, which is no reason to end the command.
            let _ = terminal::resize(terminal, size);
        }
    }

    fn write_conn(&mut self) -> io::Result<()> {
        if self.to_host.wire().is_empty() {
            return Ok(());
        }
        match (&self.conn).write(self.to_host.wire()) {
            Ok(written) => {
                self.to_host.consume(written);
                Ok(())
            }
            Err(error) if is_transient(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn write_command(&mut self) {
        let Some(stdin) = &mut self.stdin else { return };
        match stdin.write(&self.to_command) {
            Ok(written) => {
                self.to_command.drain(..written);
            }
            Err(error) if is_transient(&error) => {}
            // It does not want any more, which is its right.
            Err(_) => {
                self.to_command.clear();
                self.input_over = true;
            }
        }
        self.close_stdin_when_done();
    }

    /// Reads each output that is ready once, and returns how much that brought.
    fn read_outputs(&mut self, ready: &[bool]) -> usize {
        let mut taken = 0;
        let mut ready = ready.iter();
        let (buffer, to_host) = (&mut self.buffer, &mut self.to_host);
        self.outputs.retain_mut(|(kind, file)| {
            if ready.next() != Some(&true) {
                return true;
            }
            match file.read(buffer) {
                Ok(0) => false,
                Ok(length) => {
                    to_host.raw(*kind, &buffer[..length]);
                    taken += length;
                    true
                }
                // A terminal's end is EIO.
                Err(error) => is_transient(&error),
            }
        });
        taken
    }
}

/// Tells the host why a command did not start, as a shell would.
fn report_start_error(
    conn: UnixStream,
    request: &ExecRequest,
    error: &StartError,
) -> io::Result<()> {
    let kind = if request.tty.is_some() {
        FrameKind::Stdout
    } else {
        FrameKind::Stderr
    };
    let mut wire = Encoder::new();
    wire.raw(kind, format!("{error}\n").as_bytes());
    let status = ExitStatus {
        code: error.code(),
        ..Default::default()
    };
    wire.json(&Reply::Exit(status)).map_err(io::Error::other)?;
    send_all(conn, &wire)
}

fn refuse(conn: UnixStream, reply: &Reply) -> io::Result<()> {
    let mut wire = Encoder::new();
    wire.json(reply).map_err(io::Error::other)?;
    send_all(conn, &wire)
}

fn send_all(mut conn: UnixStream, wire: &Encoder) -> io::Result<()> {
    conn.set_nonblocking(false)?;
    conn.set_write_timeout(Some(crate::server::SEND_TIMEOUT))?;
    conn.write_all(wire.wire())
}

fn poll_fd(fd: &impl AsFd, events: i16) -> libc::pollfd {
    libc::pollfd {
        fd: fd.as_fd().as_raw_fd(),
        events,
        revents: 0,
    }
}

/// `poll` itself, since nix has no `POLLRDHUP`. An interruption finds nothing.
fn poll(fds: &mut [libc::pollfd], timeout_ms: i32) -> io::Result<()> {
    let count = fds.len() as libc::nfds_t;
    // SAFETY: the kernel reads and writes `count` entries, which outlive the call; a descriptor that
    // was closed would be reported, and harm nothing.
    if unsafe { libc::poll(fds.as_mut_ptr(), count, timeout_ms) } >= 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        error => Err(error),
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// What makes a terminal's reader see the end of its input at the start of a line (Ctrl-D).
const END_OF_TRANSMISSION: u8 = 4;

/// When more than this waits for one side, the other is not read.
const BUFFER_LIMIT: usize = 128 * 1024;

const READ_SIZE: usize = 32 * 1024;

/// The most that two pipes of the largest size can hold.
const LAST_WORDS: usize = 2 * 1024 * 1024;

/// How long a terminal may be silent after its command has ended before it counts as done.
const TERMINAL_GRACE_MS: i32 = 100;

/// `poll` without a time limit.
const FOR_EVER: i32 = -1;
