//! Everything that can happen to a waiting `tern-metal`, in one queue: so the one loop that waits
//! can be read from top to bottom, and nothing is missed between two waits.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};

use crate::plan;
use crate::wire::Frame;

/// Something happened.
#[derive(Debug)]
pub enum Event {
    /// The host reports on its start.
    Host(plan::Event),
    /// The host ended.
    HostEnded,
    /// This process was sent a signal.
    Signal(Signal),
    /// The agent said something.
    Frame(Frame),
    /// The connection to the agent ended, for this reason.
    Disconnected(String),
}

/// The queue.
#[derive(Debug)]
pub struct Inbox {
    sender: Sender<Event>,
    receiver: Receiver<Event>,
}

/// Signals that a person or a test runner sends to this process and means for the command.
const FORWARDED: [Signal; 7] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

impl Inbox {
    /// Makes the queue, and from now on receives signals through it. To be called while there is
    /// one thread: others inherit its signal mask. Children do not (std resets it).
    pub fn open() -> Result<Self> {
        let (sender, receiver) = channel();
        let signals: SigSet = FORWARDED.into_iter().collect();
        signals.thread_block().context("cannot block signals")?;
        let to = sender.clone();
        thread::spawn(move || {
            while let Ok(signal) = signals.wait() {
                if to.send(Event::Signal(signal)).is_err() {
                    return;
                }
            }
        });
        Ok(Self { sender, receiver })
    }

    /// A way in.
    pub fn sender(&self) -> Sender<Event> {
        self.sender.clone()
    }

    /// The next event; `None` when `deadline` comes first.
    pub fn next(&self, deadline: Option<Instant>) -> Option<Event> {
        let Some(deadline) = deadline else {
            return self.receiver.recv().ok();
        };
        // The queue is never closed: this very struct holds a sender.
        self.receiver
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            .ok()
    }
}
