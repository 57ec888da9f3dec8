//! The thread that owns the engine and moves packets between device and socket.
//!
//! A thread of its own rather than a task: packets wait for nobody else's work. Others reach it
//! through a [`Mailbox`] that holds no more than the newest wish.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::engine::{Engine, Path, Sink};
use crate::tun::Tun;
use crate::udp::Udp;
use crate::{Counters, Grant, PeerStatus, PublicKey};

/// Packets read from the device before the socket is looked after again.
const BATCH: usize = 64;
/// Enough for any packet.
const PACKET: usize = 1 << 16;

/// What the thread is asked to do.
pub(crate) struct Mailbox {
    letters: Mutex<Letters>,
    bell: EventFd,
}

#[derive(Default)]
struct Letters {
    grants: Option<Vec<(PublicKey, Grant)>>,
    questions: Vec<oneshot::Sender<Report>>,
    stop: bool,
    /// Nobody reads any more.
    closed: bool,
}

/// What the thread knows.
pub(crate) struct Report {
    pub(crate) peers: Vec<PeerStatus>,
    pub(crate) counters: Counters,
    pub(crate) lost_datagrams: u64,
    pub(crate) lost_packets: u64,
}

pub(crate) struct Worker {
    engine: Engine,
    tun: Tun,
    udp: Udp,
    mailbox: Arc<Mailbox>,
    lost_packets: u64,
}

/// Where the engine's packets go.
struct Out<'a> {
    tun: &'a Tun,
    udp: &'a mut Udp,
    lost: &'a mut u64,
}

impl Mailbox {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Self {
            letters: Mutex::default(),
            bell: EventFd::from_flags(flags)?,
        })
    }

    /// Makes these the peers.
    pub(crate) fn set_peers(&self, grants: Vec<(PublicKey, Grant)>) {
        self.put(|letters| letters.grants = Some(grants));
    }

    /// Asks for a report. The answer never comes when the thread has ended.
    pub(crate) fn ask(&self) -> oneshot::Receiver<Report> {
        let (answer, question) = oneshot::channel();
        self.put(|letters| letters.questions.push(answer));
        question
    }

    /// Ends the thread.
    pub(crate) fn stop(&self) {
        self.put(|letters| letters.stop = true);
    }

    fn put(&self, write: impl FnOnce(&mut Letters)) {
        let mut letters = self.letters.lock();
        if letters.closed {
            return;
        }
        write(&mut letters);
        drop(letters);
        // A full counter is a bell that rings already.
        let _ = self.bell.write(1);
    }

    fn take(&self) -> Letters {
        let _ = self.bell.read();
        std::mem::take(&mut *self.letters.lock())
    }

    fn close(&self) {
        let mut letters = self.letters.lock();
        *letters = Letters::default();
        letters.closed = true;
    }
}

impl Worker {
    pub(crate) fn new(engine: Engine, tun: Tun, udp: Udp, mailbox: Arc<Mailbox>) -> Self {
        Self {
            engine,
            tun,
            udp,
            mailbox,
            lost_packets: 0,
        }
    }

    /// Works until it is stopped, or the device or socket fails.
    pub(crate) fn run(mut self) -> io::Result<()> {
        let mut packet = vec![0; PACKET];
        loop {
            self.wait()?;
            let letters = self.mailbox.take();
            if letters.stop {
                return Ok(());
            }
            if let Some(grants) = letters.grants {
                self.engine.set_peers(Instant::now(), &grants);
            }
            for question in letters.questions {
                // Who asked may have gone.
                let _ = question.send(self.report());
            }
            self.drain_socket()?;
            self.drain_device(&mut packet)?;
            let (engine, mut out) = self.split();
            engine.handle_timeout(Instant::now(), &mut out);
            self.udp.flush();
        }
    }

    /// Waits for something to do.
    fn wait(&self) -> io::Result<()> {
        let timeout = match self.engine.timeout() {
            None => PollTimeout::NONE,
            Some(due) => {
                // A whole millisecond more, so as not to wake just before it.
                let left = due.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
        };
        let mut sources = [
            self.udp.as_fd(),
            self.tun.as_fd(),
            self.mailbox.bell.as_fd(),
        ]
        .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut sources, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn drain_socket(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let Self {
            engine,
            tun,
            udp,
            lost_packets: lost,
            ..
        } = self;
        let received = udp.receive(|udp, path, datagram| {
            engine.handle_datagram(now, path, datagram, &mut Out { tun, udp, lost });
        });
        none_is_fine(received)
    }

    fn drain_device(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let now = Instant::now();
        for _ in 0..BATCH {
            match self.tun.read(buffer) {
                Ok(length) => {
                    let (engine, mut out) = self.split();
                    engine.handle_packet(now, &buffer[..length], &mut out);
                }
                Err(error) => return none_is_fine(Err(error)),
            }
        }
        Ok(())
    }

    fn split(&mut self) -> (&mut Engine, Out<'_>) {
        let out = Out {
            tun: &self.tun,
            udp: &mut self.udp,
            lost: &mut self.lost_packets,
        };
        (&mut self.engine, out)
    }

    fn report(&self) -> Report {
        Report {
            peers: self.engine.peers(),
            counters: self.engine.counters(),
            lost_datagrams: self.udp.unsent,
            lost_packets: self.lost_packets,
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.mailbox.close();
    }
}

impl Sink for Out<'_> {
    fn send(&mut self, path: Path, datagram: &[u8]) {
        self.udp.send(path, datagram);
    }

    fn deliver(&mut self, packet: &[u8]) {
        if let Err(error) = self.tun.write(packet) {
            tracing::debug!(%error, "the kernel did not take a packet");
            *self.lost += 1;
        }
    }
}

fn none_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}
