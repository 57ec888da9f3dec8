//! Jobs by `io_uring` (io_uring(7)): a round of requests is one system call, and what the page cache has is
//! there when it returns.
//!
//! A ring can do what no system call filter sees, so this one is bound (`IORING_REGISTER_RESTRICTIONS`,
//! Linux 5.10) before the monitor is confined: to read, write and sync the one file that is registered with
//! it, and to nothing else for good.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::{Action, DEPTH, Job};

/// A ring, and the jobs that are in it.
pub struct Ring {
    ring: IoUring,
    /// By token. The kernel has pointers into what is here, until the job's completion.
    jobs: Box<[Option<Job>]>,
    under_way: usize,
}

/// The only file that it knows.
const FILE: types::Fixed = types::Fixed(0);
/// The kernel's own threads, for what would wait: writes and flushes, and reads where the page cache cannot tell.
/// They count as the Machine's (`pids.max`).
const WORKERS: u32 = 4;
/// Between two attempts where the kernel is short of memory.
const SHORT: Duration = Duration::from_millis(1);

impl Ring {
    /// A ring for the file at `path`.
    ///
    /// Opened once more, rather than shared with the disk: the kernel takes rings down some time after their
    /// process has ended, and would hold the disk's lock until then.
    pub fn open(path: &Path, read_only: bool) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(!read_only).open(path)?;
        let ring = IoUring::builder().setup_r_disabled().build(DEPTH as u32)?;
        if !ring.params().is_feature_submit_stable() || !ring.params().is_feature_nodrop() {
            return Err(io::Error::other("it is older than Linux 5.5"));
        }
        let submitter = ring.submitter();
        let mut restrictions = vec![
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
        ];
        if !read_only {
            restrictions.push(Restriction::sqe_op(opcode::Writev::CODE));
        }
        submitter.register_restrictions(&mut restrictions)?;
        submitter.register_files(&[file.as_raw_fd()])?;
        // Linux 5.15; without it there may be more of them, within the Machine's limit.
        let _ = submitter.register_iowq_max_workers(&mut [WORKERS, WORKERS]);
        submitter.register_enable_rings()?;
        Ok(Self {
            ring,
            jobs: std::iter::repeat_with(|| None).take(DEPTH).collect(),
            under_way: 0,
        })
    }

    /// Takes a job.
    pub fn submit(&mut self, token: u16, job: Job) {
        if let Some(slot) = self.jobs.get_mut(usize::from(token)) {
            let job = slot.insert(job);
            self.under_way += 1;
            push(&mut self.ring, token, job);
        }
    }

    /// Hands over what was taken and waits until `want` have finished. False if the kernel did not take all.
    pub fn hand_over(&mut self, want: usize) -> bool {
        if want == 0 && self.ring.submission().is_empty() {
            return true;
        }
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(_) => return self.ring.submission().is_empty(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if crate::virtio::may_log() {
                        tracing::warn!(%error, "io_uring takes no requests just now");
                    }
                    return false;
                }
            }
        }
    }

    /// The next job that has finished. One of which the kernel has done a part goes on.
    pub fn finished(&mut self) -> Option<(u16, io::Result<()>)> {
        while let Some(completion) = self.next_completion() {
            let token = completion.user_data() as u16; // as `push` made it
            let slot = self.jobs.get_mut(usize::from(token))?;
            let job = slot.as_mut()?;
            if let Some(result) = settle(job, completion.result()) {
                *slot = None;
                self.under_way -= 1;
                return Some((token, result));
            }
            push(&mut self.ring, token, job);
            self.hand_over(0);
        }
        None
    }

    fn next_completion(&mut self) -> Option<cqueue::Entry> {
        self.ring.completion().next()
    }

    /// Waits until a job has finished, if one is under way.
    pub fn wait(&mut self) {
        while self.under_way > 0 && self.ring.completion().is_empty() {
            if !self.hand_over(1) {
                // Nothing tells when the kernel has memory again.
                std::thread::sleep(SHORT);
            }
        }
    }
}

impl AsFd for Ring {
    /// The ring itself is readable while completions wait.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("under_way", &self.under_way)
            .finish_non_exhaustive()
    }
}

impl Drop for Ring {
    /// No completion may write to memory that is gone.
    fn drop(&mut self) {
        while self.under_way > 0 {
            self.wait();
            while self.finished().is_some() {}
        }
    }
}

/// Puts `job` into the submission queue, which has room: it has an entry for every token.
fn push(ring: &mut IoUring, token: u16, job: &Job) {
    let entry = entry(job).user_data(token.into());
    // SAFETY: the iovecs stay where they are in `Ring::jobs`, unchanged, until the kernel has taken the entry
    // (IORING_FEAT_SUBMIT_STABLE), and the guest memory that they describe until its completion, because a
    // `Held` keeps it and `Ring::drop` waits.
    let pushed = unsafe { ring.submission().push(&entry) };
    debug_assert!(pushed.is_ok(), "an entry for every token");
}

fn entry(job: &Job) -> squeue::Entry {
    let iovecs = job.memory.iovecs();
    let (start, count) = (iovecs.as_ptr(), iovecs.len() as u32); // at most 1024, see `chain`
    match job.action {
        Action::Read => opcode::Readv::new(FILE, start, count)
            .offset(job.offset)
            .build(),
        Action::Write => opcode::Writev::new(FILE, start, count)
            .offset(job.offset)
            .build(),
        Action::Flush => opcode::Fsync::new(FILE)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
    }
}

/// What a completion means: the job's end, or `None` if there is more to do.
fn settle(job: &mut Job, result: i32) -> Option<io::Result<()>> {
    match usize::try_from(result) {
        Err(_) => match -result {
            libc::EINTR | libc::EAGAIN => None,
            errno => Some(Err(io::Error::from_raw_os_error(errno))),
        },
        Ok(_) if job.action == Action::Flush => Some(Ok(())),
        Ok(bytes) => match job.moved(bytes) {
            Ok(()) if !job.memory.is_empty() => None,
            result => Some(result),
        },
    }
}
