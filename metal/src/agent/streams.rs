//! What flows between a command and its caller: output one way, input and orders the other.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};

use anyhow::Result;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::wire::{Frame, STDIN_WINDOW, WindowSize};

/// Output is passed on in pieces of at most this size, half of a pipe's default capacity.
const OUTPUT_PIECE: usize = 32 * 1024;
/// One output of a command.
#[derive(Debug)]
pub struct Output {
    /// Pipe or terminal.
    pub from: File,
    /// The frame that carries it.
    pub frame: fn(Vec<u8>) -> Frame,
}

/// Passes output on until the process has ended and the pipes are empty. `ended` is called once,
/// at the end of the process; what leftovers print after that is theirs to lose.
pub fn pump<T>(
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

/// What a caller may ask for while its command runs.
#[derive(Debug)]
pub enum Order {
    /// Send this signal.
    Signal(i32),
    /// The terminal has a new size.
    Resize(WindowSize),
}

/// Reads the caller's frames until it closes.
pub fn hear(
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
pub fn feed(
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
