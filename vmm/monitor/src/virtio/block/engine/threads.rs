//! Jobs by a few threads, where the kernel has no `io_uring` for us.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::EventFd;

use super::Job;
use crate::jail::seccomp::{self, ThreadKind};
use crate::virtio::Kind;

type Finished = (u16, io::Result<()>);

/// The threads of one disk, and what is between them and the device.
#[derive(Debug)]
pub struct Threads {
    file: Arc<File>,
    /// How many threads; without any, jobs are done at once by who submits them.
    count: usize,
    running: Option<Running>,
    finished: Receiver<Finished>,
    finisher: Sender<Finished>,
    event: Arc<EventFd>,
    /// What [`Threads::wait`] has received.
    waited: Option<Finished>,
    under_way: usize,
}

#[derive(Debug)]
struct Running {
    jobs: Sender<(u16, Job)>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    /// `count` threads for `file`, not yet made.
    pub fn new(file: File, count: usize) -> io::Result<Self> {
        let (finisher, finished) = channel();
        Ok(Self {
            file: Arc::new(file),
            count,
            running: None,
            finished,
            finisher,
            event: Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?),
            waited: None,
            under_way: 0,
        })
    }

    /// Makes them, if they are not there.
    pub fn hire(&mut self) -> io::Result<()> {
        if self.count == 0 || self.running.is_some() {
            return Ok(());
        }
        let (jobs, receiver) = channel();
        let receiver = Arc::new(Mutex::new(receiver));
        let mut running = Running {
            jobs,
            threads: Vec::with_capacity(self.count),
        };
        for _ in 0..self.count {
            let worker = Worker {
                file: self.file.clone(),
                jobs: receiver.clone(),
                finisher: self.finisher.clone(),
                event: self.event.clone(),
            };
            let thread = thread::Builder::new()
                .name("block-io".into())
                .stack_size(crate::THREAD_STACK_BYTES)
                .spawn(move || {
                    seccomp::confine(ThreadKind::Device(Kind::Block));
                    worker.run();
                })?;
            running.threads.push(thread);
        }
        self.running = Some(running);
        Ok(())
    }

    /// Takes a job and begins it.
    pub fn submit(&mut self, token: u16, mut job: Job) {
        self.under_way += 1;
        let job = match &self.running {
            None => job.run(self.file.as_fd()),
            Some(running) => match running.jobs.send((token, job)) {
                Ok(()) => return,
                Err(_) => Err(io::Error::other("the disk's threads are gone")),
            },
        };
        let _ = self.finisher.send((token, job)); // the receiver is ours
    }

    /// Readable when a job has finished.
    pub fn event(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }

    /// The next job that has finished.
    pub fn finished(&mut self) -> Option<Finished> {
        let next = self.waited.take().or_else(|| {
            // Cleared before the channel is read, or one that finishes in between would be missed.
            let _ = self.event.read();
            self.finished.try_recv().ok()
        });
        self.under_way -= usize::from(next.is_some());
        next
    }

    /// Waits until a job has finished, if one is under way.
    pub fn wait(&mut self) {
        if self.under_way > 0 && self.waited.is_none() {
            self.waited = self.finished.recv().ok();
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if let Some(Running { jobs, threads }) = self.running.take() {
            drop(jobs); // a closed channel is the command to end
            for thread in threads {
                let _ = thread.join(); // a panic has been reported by the process's hook
            }
        }
    }
}

struct Worker {
    file: Arc<File>,
    jobs: Arc<Mutex<Receiver<(u16, Job)>>>,
    finisher: Sender<Finished>,
    event: Arc<EventFd>,
}

impl Worker {
    fn run(self) {
        loop {
            let next = self
                .jobs
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .recv();
            let Ok((token, mut job)) = next else { return };
            let result = job.run(self.file.as_fd());
            drop(job); // guest memory is let go before anybody hears of the end
            let _ = self.finisher.send((token, result)); // the device may be gone
            let _ = self.event.write(1);
        }
    }
}
