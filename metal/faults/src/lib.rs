//! Kills a process just before its Nth system call that changes something outside of it.
//!
//! What a crash leaves behind is what the process had done to files, devices and other processes by then,
//! so between two such [calls] all moments are alike: a test that walks N from 1 up, until what it
//! asked for is done before the Nth call, has seen every crash there can be (save for the order in which
//! threads come to their calls). The process needs no points of its own for this, and a step that is
//! added to it tomorrow is walked too.
//!
//! ```no_run
//! # fn ask_for_something() {}
//! # let pid = nix::unistd::Pid::from_raw(1);
//! let shot = tern_faults::Shot::at(pid, 7)?;
//! ask_for_something();
//! match shot.fired() {
//!     Some(call) => println!("killed before {call}"),
//!     None => println!("done after {} calls", shot.seen()),
//! }
//! # std::io::Result::Ok(())
//! ```
//!
//! And where the order of two steps is what matters, a [`Hold`] keeps a thread in front of a call for as long as
//! a test looks at what has not happened without it.
//!
//! The process is traced (ptrace(2)) by a thread of its own until it ends. Where it is a child of this
//! process, `waitpid(2)` for it would see the tracer's stops too: wait when it is known to be dead. x86-64
//! only.

pub mod calls;
mod tracer;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, OnceLock};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use tracer::{Aim, Tracer, Victim};

/// A process that will be killed at some call, if it gets that far.
#[derive(Debug)]
pub struct Shot {
    score: Arc<Score>,
}

#[derive(Debug, Default)]
struct Score {
    seen: AtomicU64,
    fired: OnceLock<String>,
    over: AtomicBool,
}

impl Shot {
    /// Aims at the running process `pid`: it dies in front of the `nth` call from now, counted from 1.
    pub fn at(pid: Pid, nth: u64) -> io::Result<Self> {
        let score = trace(pid, Victim::Itself, Aim::Nth(nth))?;
        Ok(Self { score })
    }

    /// Aims at the next process that `parent` starts and whose program is called `program`.
    ///
    /// It is traced from its first instruction on, its parent until it ends.
    pub fn at_child(parent: Pid, program: &str, nth: u64) -> io::Result<Self> {
        let victim = Victim::Child(program.to_owned());
        let score = trace(parent, victim, Aim::Nth(nth))?;
        Ok(Self { score })
    }

    /// Does not shoot any more; the process goes on at its own speed. Returns before which call it was
    /// killed, if it was.
    pub fn stand_down(&self) -> Option<&str> {
        self.score.over.store(true, Ordering::Release);
        self.fired()
    }

    /// Before which call the process was killed, if it was.
    pub fn fired(&self) -> Option<&str> {
        self.score.fired.get().map(String::as_str)
    }

    /// How many calls have counted so far.
    pub fn seen(&self) -> u64 {
        self.score.seen.load(Ordering::Acquire)
    }
}

/// A process one of whose threads is held in front of a call, once. Its other threads go on.
#[derive(Debug)]
pub struct Hold {
    score: Arc<Score>,
    pid: Pid,
}

impl Hold {
    /// Lies in wait in the running process `pid` for the next call of this name (see [`calls`]) whose first
    /// argument is a descriptor of `path`.
    pub fn at(pid: Pid, name: &'static str, path: PathBuf) -> io::Result<Self> {
        let score = trace(pid, Victim::Itself, Aim::On { name, path })?;
        Ok(Self { score, pid })
    }

    /// Whether a thread is, or was, held.
    pub fn caught(&self) -> bool {
        self.score.fired.get().is_some()
    }

    /// Lets the thread go on, and holds no other.
    pub fn release(&self) -> io::Result<()> {
        self.score.over.store(true, Ordering::Release);
        // The tracer sees every signal, and so wakes; to the process this one means nothing.
        Ok(kill(self.pid, Signal::SIGURG)?)
    }
}

/// Traces `pid` by a thread of its own.
fn trace(pid: Pid, victim: Victim, aim: Aim) -> io::Result<Arc<Score>> {
    let score = Arc::new(Score::default());
    let (ready, attached) = channel();
    let kept = Arc::clone(&score);
    // Who attaches must do all the tracing: ptrace(2) knows threads, not processes.
    thread::Builder::new()
        .name("tracer".into())
        .spawn(move || {
            let tracer = Tracer::attach(pid, victim, aim, kept);
            let (tracer, outcome) = match tracer {
                Ok(tracer) => (Some(tracer), Ok(())),
                Err(errno) => (None, Err(io::Error::from(errno))),
            };
            // The asker waits below.
            let _ = ready.send(outcome);
            if let Some(tracer) = tracer {
                tracer.run();
            }
        })?;
    attached
        .recv()
        .map_err(|_| io::Error::other("the tracer died"))??;
    Ok(score)
}
