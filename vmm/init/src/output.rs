//! Brings a program's output into the journal.
//!
//! A thread reads the app's pipes (or terminal) until they end. Processes that the app leaves behind
//! may hold them open for ever, so when the app has ended, only what is already in them counts.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tern_guest::message::Stream;

use crate::children::Process;
use crate::guest::Guest;
use crate::lines::LineSplitter;

/// What a program writes to.
pub struct Source {
    file: File,
    stream: Stream,
    lines: LineSplitter,
}

impl Source {
    /// A descriptor to read `stream` from.
    pub fn new(fd: OwnedFd, stream: Stream) -> io::Result<Self> {
        set_nonblocking(&fd)?;
        Ok(Self {
            file: File::from(fd),
            stream,
            lines: LineSplitter::default(),
        })
    }

    /// Reads once. Says whether more may come, and how much came now.
    fn read(&mut self, buffer: &mut [u8], sink: &mut Sink<'_>) -> (bool, usize) {
        match self.file.read(buffer) {
            Ok(length) if length > 0 => {
                let stream = self.stream;
                self.lines
                    .feed(&buffer[..length], |line| sink.line(stream, line));
                (true, length)
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                (true, 0)
            }
            // A terminal ends with EIO, when nobody has it open any more.
            Ok(_) | Err(_) => {
                self.finish(sink);
                (false, 0)
            }
        }
    }

    fn finish(&mut self, sink: &mut Sink<'_>) {
        let stream = self.stream;
        self.lines.finish(|line| sink.line(stream, line));
    }
}

/// Copies the output of `process` into the journal; the thread ends when all of it is there.
pub fn collect(
    guest: Arc<Guest>,
    process: Arc<Process>,
    mut sources: Vec<Source>,
    to_console: bool,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("output".into())
        .spawn(move || {
            let console =
                to_console.then(|| OpenOptions::new().write(true).open("/dev/console").ok());
            let mut sink = Sink {
                guest: &guest,
                console: console.flatten(),
            };
            let mut buffer = vec![0; READ_SIZE];
            while !sources.is_empty() && !wait_for_end(&process, &sources) {
                sources.retain_mut(|source| source.read(&mut buffer, &mut sink).0);
            }
            let mut last_words = LAST_WORDS;
            while last_words > 0 && wait_for_more(&sources) {
                sources.retain_mut(|source| {
                    let (goes_on, length) = source.read(&mut buffer, &mut sink);
                    last_words = last_words.saturating_sub(length);
                    goes_on
                });
            }
            for source in &mut sources {
                source.finish(&mut sink);
            }
        })
}

/// Waits until there is something to read or the process has ended; says whether it has.
fn wait_for_end(process: &Process, sources: &[Source]) -> bool {
    let mut fds = vec![PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    fds.extend(
        sources
            .iter()
            .map(|s| PollFd::new(s.file.as_fd(), PollFlags::POLLIN)),
    );
    // An error is an interruption: come back.
    let _ = poll(&mut fds, PollTimeout::NONE);
    fds[0].any().unwrap_or(false)
}

/// Whether there is more to read after the process has ended.
fn wait_for_more(sources: &[Source]) -> bool {
    let fd = |source| PollFd::new(AsFd::as_fd(source), PollFlags::POLLIN);
    let mut fds: Vec<_> = sources.iter().map(|source| fd(&source.file)).collect();
    poll(&mut fds, PollTimeout::from(GRACE_MS)).is_ok_and(|ready| ready > 0)
}

struct Sink<'a> {
    guest: &'a Guest,
    console: Option<File>,
}

impl Sink<'_> {
    fn line(&mut self, stream: Stream, line: String) {
        if let Some(console) = &mut self.console {
            // The console is a help, not a promise.
            let _ = console.write_all(format!("{line}\r\n").as_bytes());
        }
        self.guest.journal.line(stream, line);
    }
}

/// Makes reads and writes of this descriptor return at once.
pub fn set_nonblocking(fd: &impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// A pipe's default size.
const READ_SIZE: usize = 64 * 1024;

/// The most that two pipes of the largest size can hold when the app ends.
const LAST_WORDS: usize = 2 * 1024 * 1024;

/// How long all may be silent after the app has ended before it counts as done: a terminal hands
/// over its last words a moment later.
const GRACE_MS: u16 = 50;
