//! Who moves a disk's data: `io_uring` where the kernel has it, else a few threads. Either way the device's
//! own thread goes on meanwhile, so that a read that waits for the host's disk holds up no other.
//!
//! ```text
//!          submit                    hand_over                       finished
//!  device ────────► jobs of a round ──────────► kernel, or threads ──────────► device
//! ```
//!
//! A job is known by its token, which the device chooses and does not use again before the job is finished;
//! no more than [`DEPTH`] are under way. Jobs finish in any order. What the guest wants ordered it asks for in
//! order: a flush covers the writes that were answered before it was made (virtio 1.2, section 5.2.6.4).

mod threads;
mod uring;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use crate::virtio::held::Held;
use threads::Threads;
use uring::Ring;

/// Jobs under way at once: what keeps a fast disk busy, and small enough to cost two pages of memory.
pub const DEPTH: usize = 64;

/// What is to be done with a part of the file. The disk has checked that it lies inside.
#[derive(Debug)]
pub struct Job {
    /// What.
    pub action: Action,
    /// Where in the file.
    pub offset: u64,
    /// From or to where; nothing for a flush.
    pub memory: Held,
}

/// The kinds of jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// File to memory.
    Read,
    /// Memory to file.
    Write,
    /// What was written is to be on the disk.
    Flush,
}

/// Which way the jobs go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// `io_uring`.
    Ring,
    /// A few threads.
    Threads,
    /// In the caller's thread, at once: for the fuzzer, whose runs are short.
    Inline,
}

/// Carries out jobs on one file.
#[derive(Debug)]
pub enum Engine {
    /// [`Way::Ring`].
    Ring(Ring),
    /// [`Way::Threads`], or [`Way::Inline`].
    Threads(Threads),
}

impl Engine {
    /// The engine for the disk at `path`, which is open as `file`. Must be made before the process is confined.
    pub fn open(path: &Path, file: &File, read_only: bool) -> io::Result<Self> {
        match Self::of_way(Way::Ring, path, file, read_only) {
            Ok(engine) => Ok(engine),
            // Switched off by the host (`kernel.io_uring_disabled`), or older than Linux 5.10.
            Err(error) => {
                tracing::info!(%error, "no io_uring: disks are read and written by threads");
                Self::of_way(Way::Threads, path, file, read_only)
            }
        }
    }

    /// The engine of one way.
    pub fn of_way(way: Way, path: &Path, file: &File, read_only: bool) -> io::Result<Self> {
        Ok(match way {
            Way::Ring => Self::Ring(Ring::open(path, read_only)?),
            Way::Threads => Self::Threads(Threads::new(file.try_clone()?, THREADS)?),
            Way::Inline => Self::Threads(Threads::new(file.try_clone()?, 0)?),
        })
    }

    /// Makes the threads that it needs, if they are not there.
    pub fn hire(&mut self) -> io::Result<()> {
        match self {
            Self::Ring(_) => Ok(()),
            Self::Threads(threads) => threads.hire(),
        }
    }

    /// Takes a job, which begins by the next [`Engine::hand_over`].
    pub fn submit(&mut self, token: u16, job: Job) {
        match self {
            Self::Ring(ring) => ring.submit(token, job),
            Self::Threads(threads) => threads.submit(token, job),
        }
    }

    /// Sees to it that every job taken has begun; false if the kernel takes no more just now, and this is to be
    /// called again a little later.
    pub fn hand_over(&mut self) -> bool {
        match self {
            Self::Ring(ring) => ring.hand_over(0),
            Self::Threads(_) => true,
        }
    }

    /// Readable when a job has finished.
    pub fn event(&self) -> BorrowedFd<'_> {
        match self {
            Self::Ring(ring) => ring.as_fd(),
            Self::Threads(threads) => threads.event(),
        }
    }

    /// The next job that has finished.
    pub fn finished(&mut self) -> Option<(u16, io::Result<()>)> {
        match self {
            Self::Ring(ring) => ring.finished(),
            Self::Threads(threads) => threads.finished(),
        }
    }

    /// Waits until a job has finished, if one is under way.
    pub fn wait(&mut self) {
        match self {
            Self::Ring(ring) => ring.wait(),
            Self::Threads(threads) => threads.wait(),
        }
    }
}

impl Job {
    /// Does it in the calling thread.
    fn run(&mut self, file: BorrowedFd<'_>) -> io::Result<()> {
        if self.action == Action::Flush {
            return nix::unistd::fdatasync(file).map_err(Into::into);
        }
        while !self.memory.is_empty() {
            let moved = match self.action {
                Action::Read => self.memory.read_from(file, self.offset),
                _ => self.memory.write_to(file, self.offset),
            };
            match moved {
                Ok(moved) => self.moved(moved)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A part of it is done: the kernel may move less than it was asked to.
    fn moved(&mut self, bytes: usize) -> io::Result<()> {
        if bytes == 0 {
            // The file is shorter than the disk.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.memory.advance(bytes);
        self.offset += bytes as u64; // within the file, as the disk has checked
        Ok(())
    }
}

/// One may wait in a flush and one in a read from a slow disk, and two others still go.
const THREADS: usize = 4;
