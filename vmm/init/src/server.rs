//! Answers the host on vsock.
//!
//! One thread per connection, as there are few of them: at most [`MAX_CONNECTIONS`], from the host
//! alone. A restore from a snapshot resets them all; the listener itself goes on.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, getpeername, listen,
    socket,
};
use tern_guest::{Decoder, Encoder, GUEST_PORT, Reply, Request};

use crate::guest::Guest;
use crate::{clock, exec, kmsg, status};

/// Listens for the host, and serves it in the background.
pub fn start(guest: Arc<Guest>) -> io::Result<()> {
    let listener = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    bind(
        listener.as_raw_fd(),
        &VsockAddr::new(libc::VMADDR_CID_ANY, GUEST_PORT),
    )?;
    listen(&listener, Backlog::new(BACKLOG)?)?;
    std::thread::Builder::new()
        .name("server".into())
        .spawn(move || accept_all(&listener, &guest))?;
    Ok(())
}

fn accept_all(listener: &OwnedFd, guest: &Arc<Guest>) {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let conn = match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            // SAFETY: the kernel has just made this descriptor for us.
            Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
            Err(error) => {
                wait_out(error, listener);
                continue;
            }
        };
        let from_host = getpeername::<VsockAddr>(conn.as_raw_fd())
            .is_ok_and(|peer| peer.cid() == libc::VMADDR_CID_HOST);
        if !from_host || open.load(Ordering::Relaxed) >= MAX_CONNECTIONS {
            continue;
        }
        let slot = Slot::take(&open);
        let guest = Arc::clone(guest);
        let thread = std::thread::Builder::new()
            .name("connection".into())
            .stack_size(STACK);
        let spawned = thread.spawn(move || {
            let _slot = slot;
            // The standard library's stream of bytes with time limits; what kind of socket lies
            // under it makes no difference.
            serve(&guest, UnixStream::from(conn));
        });
        if let Err(error) = spawned {
            kmsg::error(&format!("cannot serve a connection: {error}"));
        }
    }
}

/// Lets a failure to accept pass: a connection that was reset while it waited is nothing, but too
/// many open files would fail at once again.
fn wait_out(error: nix::errno::Errno, listener: &OwnedFd) {
    use nix::errno::Errno;
    if matches!(
        error,
        Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS
    ) {
        kmsg::error(&format!("cannot accept a connection: {error}"));
        std::thread::sleep(SHORTAGE_PAUSE);
        return;
    }
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    let _ = poll(&mut fds, PollTimeout::NONE);
}

/// One of the connections that may be open at once.
struct Slot(Arc<AtomicUsize>);

impl Slot {
    fn take(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(open))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves one connection. That it breaks is the host's business: it will come again.
fn serve(guest: &Guest, mut conn: UnixStream) {
    let mut decoder = Decoder::new();
    let outcome = match read_request(&mut conn, &mut decoder) {
        Ok(Request::Attach { from }) => attach(guest, conn, from),
        Ok(Request::Exec(request)) => exec::serve(guest, conn, decoder, &request),
        Ok(request) => reply(conn, &answer(guest, request)),
        Err(error) => reply(
            conn,
            &Reply::Error {
                message: error.to_string(),
            },
        ),
    };
    if let Err(error) = outcome {
        kmsg::info(&format!("connection: {error}"));
    }
}

fn read_request(conn: &mut UnixStream, decoder: &mut Decoder) -> io::Result<Request> {
    conn.set_read_timeout(Some(REQUEST_TIMEOUT))?;
    let mut buffer = [0; 4096];
    loop {
        if let Some(frame) = decoder.next_frame().map_err(io::Error::other)? {
            return frame.parse().map_err(io::Error::other);
        }
        match conn.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => decoder.feed(&buffer[..length]),
        }
    }
}

fn answer(guest: &Guest, request: Request) -> Reply {
    let result = match request {
        Request::Status => match status::read(&guest.journal) {
            Ok(status) => return Reply::Status(status),
            Err(error) => Err(error.to_string()),
        },
        Request::Resumed {
            unix_nanos,
            entropy,
        } => clock::resumed(unix_nanos, &entropy).map_err(|error| error.to_string()),
        Request::Signal { signo } => guest.signal(signo).map_err(|error| error.to_string()),
        Request::Stop { signo, timeout_ms } => guest
            .stop(signo, timeout_ms.map(Duration::from_millis))
            .map_err(|e| e.to_string()),
        // These two have conversations of their own.
        Request::Attach { .. } | Request::Exec(_) => Err("not a question".to_string()),
    };
    match result {
        Ok(()) => Reply::Ok,
        Err(message) => Reply::Error { message },
    }
}

fn reply(mut conn: UnixStream, reply: &Reply) -> io::Result<()> {
    let mut wire = Encoder::new();
    wire.json(reply).map_err(io::Error::other)?;
    conn.set_write_timeout(Some(SEND_TIMEOUT))?;
    conn.write_all(wire.wire())
}

/// Reports events until the connection ends.
fn attach(guest: &Guest, mut conn: UnixStream, from: u64) -> io::Result<()> {
    conn.set_write_timeout(Some(SEND_TIMEOUT))?;
    let news = guest.journal.subscribe()?;
    let mut cursor = guest.journal.cursor(from);
    loop {
        let mut wire = Encoder::new();
        for event in guest.journal.read(&mut cursor, BATCH) {
            wire.json(&event).map_err(io::Error::other)?;
        }
        if !wire.wire().is_empty() {
            conn.write_all(wire.wire())?;
            continue;
        }
        let mut fds = [
            PollFd::new(conn.as_fd(), PollFlags::POLLIN),
            PollFd::new(news.as_fd(), PollFlags::POLLIN),
        ];
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            continue;
        }
        if fds[0].any().unwrap_or(false) {
            // An attached host has nothing to say but goodbye, which says that it has all.
            let goodbye = conn.read(&mut [0; 1]);
            if cursor.is_finished() && matches!(goodbye, Ok(0)) {
                guest.journal.set_delivered();
            }
            return Ok(());
        }
        // It fails only when another wake has been taken already.
        let _ = news.read();
    }
}

/// How long a host may take from connecting to its request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a host may take to make room for what it has asked for.
pub const SEND_TIMEOUT: Duration = Duration::from_secs(60);

/// Connections at once: an attached agent, some status questions, people in shells.
const MAX_CONNECTIONS: usize = 128;

const BACKLOG: i32 = 64;

/// Lines per write: enough for a burst, little enough to be held in memory twice.
const BATCH: usize = 64;

/// Enough for the deepest call here, with its buffers on the heap.
const STACK: usize = 256 * 1024;

const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests;
