//! Brings a program's output into the journal.
//!
//! A thread reads the app's pipes (or terminal) until they end. Processes that the app leaves behind
//! may hold them open for ever and keep writing, so when the app has ended, only what is already in
//! them counts.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

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
            let (mut last_words, grace_ends) = (LAST_WORDS, Instant::now() + GRACE);
            while last_words > 0 && !sources.is_empty() && wait_for_more(&sources, grace_ends) {
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

/// Whether there is more to read after the process has ended: now, or until the grace is over.
fn wait_for_more(sources: &[Source], grace_ends: Instant) -> bool {
    let fd = |source| PollFd::new(AsFd::as_fd(source), PollFlags::POLLIN);
    let mut fds: Vec<_> = sources.iter().map(|source| fd(&source.file)).collect();
    let left = grace_ends.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
    poll(&mut fds, timeout).is_ok_and(|ready| ready > 0)
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

/// How long after the app's end something that comes still counts: a terminal hands over its last
/// words a moment later.
const GRACE: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::children::{Children, ONE_FAMILY_AT_A_TIME};
    use nix::unistd::pipe2;
    use std::process::{Command, Stdio};
    use std::sync::mpsc;
    use tern_guest::Event;

    fn start(children: &Children, script: &str) -> (Arc<Process>, Source) {
        let (ours, theirs) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command.stdin(Stdio::null()).stdout(theirs);
        let (process, _) = children.spawn(&mut command).unwrap();
        (process, Source::new(ours, Stream::Stdout).unwrap())
    }

    fn lines(guest: &Guest) -> Vec<String> {
        let events = guest.journal.read(&mut guest.journal.cursor(0), usize::MAX);
        let line = |event| match event {
            Event::Log { line, .. } => Some(line),
            _ => None,
        };
        events.into_iter().filter_map(line).collect()
    }

    /// Ends the process whose number is the first of these lines that is one.
    fn kill_left_behind(lines: &[String]) {
        let number = lines.iter().find_map(|line| line.parse::<i32>().ok());
        let number = number.expect("the script tells whom it left behind");
        // SAFETY: `kill` takes no pointers; the process is one that this test started.
        unsafe { libc::kill(number, libc::SIGKILL) };
    }

    #[test]
    fn who_is_left_behind_and_keeps_talking_does_not_hold_up_the_end() {
        let _alone = ONE_FAMILY_AT_A_TIME.lock();
        let guest = Arc::new(Guest::default());
        let script = "(while :; do echo more; sleep 0.01; done) & echo $!";
        let (process, source) = start(&guest.children, script);
        let thread = collect(Arc::clone(&guest), process, vec![source], false).unwrap();
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || tell.send(thread.join().is_ok()));
        let outcome = told.recv_timeout(Duration::from_secs(20));
        let lines = lines(&guest);
        kill_left_behind(&lines);
        assert_eq!(outcome, Ok(true), "{} lines, and no end", lines.len());
    }

    #[test]
    fn all_that_was_written_before_the_end_counts() {
        let _alone = ONE_FAMILY_AT_A_TIME.lock();
        let guest = Arc::new(Guest::default());
        // It all fits into a pipe: nobody reads before the end.
        let script = "sleep 1000 & echo $!; yes more | head -n 5000";
        let (process, source) = start(&guest.children, script);
        assert!(process.wait(Duration::from_secs(20)));
        let thread = collect(Arc::clone(&guest), process, vec![source], false).unwrap();
        thread.join().unwrap();
        let lines = lines(&guest);
        assert_eq!(lines.len(), 5001);
        kill_left_behind(&lines);
    }
}
