//! The thread that traces.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use crate::Score;
use crate::calls::{Call, changes};

/// Whom the shot is for.
#[derive(Debug)]
pub(crate) enum Victim {
    /// The process that is aimed at.
    Itself,
    /// Its child of this program.
    Child(String),
}

/// At which call something happens to it.
#[derive(Debug)]
pub(crate) enum Aim {
    /// It is killed in front of this one, counted from 1.
    Nth(u64),
    /// The thread is held in front of the first such call on this file.
    On { name: &'static str, path: PathBuf },
}

/// Traces one process, and maybe its children.
pub(crate) struct Tracer {
    aimed: Pid,
    victim: Victim,
    /// Whose calls count, as soon as it is there.
    target: Option<Pid>,
    aim: Aim,
    /// The thread that is held in front of its call.
    held: Option<Pid>,
    score: Arc<Score>,
    /// Whether a thread is the target's.
    threads: HashMap<Pid, bool>,
}

impl Tracer {
    /// Attaches to every thread that the process has, and so to those it will have.
    pub(crate) fn attach(
        pid: Pid,
        victim: Victim,
        aim: Aim,
        score: Arc<Score>,
    ) -> nix::Result<Self> {
        let mut options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE;
        let target = match victim {
            Victim::Itself => Some(pid),
            Victim::Child(_) => {
                options |= Options::PTRACE_O_TRACEFORK
                    | Options::PTRACE_O_TRACEVFORK
                    | Options::PTRACE_O_TRACEEXEC;
                None
            }
        };
        // A thread that starts meanwhile is traced like the one that starts it, or found the next time.
        let mut attached = HashSet::new();
        loop {
            let before = attached.len();
            for thread in threads(pid)? {
                if !attached.insert(thread) {
                    continue;
                }
                match ptrace::seize(thread, options) {
                    // Traced already, or gone.
                    Ok(()) | Err(Errno::EPERM | Errno::ESRCH) => {}
                    Err(errno) => return Err(errno),
                }
            }
            if attached.len() == before {
                break;
            }
        }
        for &thread in &attached {
            // From its next stop on it stops at system calls. One that has ended does not.
            let _ = ptrace::interrupt(thread);
        }
        Ok(Self {
            aimed: pid,
            victim,
            target,
            aim,
            held: None,
            score,
            threads: HashMap::new(),
        })
    }

    /// Traces until the process that was aimed at has ended.
    pub(crate) fn run(mut self) {
        // The calling thread's own only: other children are waited for by others.
        let mine = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        let look = mine | WaitPidFlag::WEXITED | WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT;
        loop {
            let status = match waitid(Id::All, look) {
                Ok(status) => status,
                Err(Errno::EINTR) => continue,
                Err(_) => return, // ECHILD
            };
            let Some(thread) = status.pid() else { continue };
            let ended = matches!(status, WaitStatus::Exited(..) | WaitStatus::Signaled(..));
            if ended && thread == self.aimed {
                // Left for its parent, should that be this process. What else is traced goes free.
                return;
            }
            let went_on = waitpid(thread, Some(mine)).and_then(|status| self.stopped(&status));
            match went_on {
                Ok(()) | Err(Errno::ESRCH | Errno::ECHILD) => {} // killed in the meantime
                Err(errno) => panic!("tracing fails: {errno}"),
            }
            if self.score.over.load(Ordering::Acquire)
                && let Some(held) = self.held.take()
            {
                // Killed in the meantime, it needs nothing more.
                let _ = self.go_on(held, None);
            }
        }
    }

    fn stopped(&mut self, status: &WaitStatus) -> nix::Result<()> {
        match *status {
            WaitStatus::PtraceSyscall(thread) => {
                if self.is_targets(thread) && !self.score.over.load(Ordering::Acquire) {
                    self.count(thread)?;
                }
                if self.held == Some(thread) {
                    return Ok(());
                }
                self.go_on(thread, None)
            }
            WaitStatus::PtraceEvent(thread, signal, event) => {
                match event {
                    libc::PTRACE_EVENT_STOP if signal == Signal::SIGSTOP => {
                        return listen(thread);
                    }
                    libc::PTRACE_EVENT_EXEC => self.executes(thread),
                    _ => {}
                }
                self.go_on(thread, None)
            }
            WaitStatus::Stopped(thread, signal) => self.go_on(thread, Some(signal)),
            WaitStatus::Exited(thread, _) | WaitStatus::Signaled(thread, ..) => {
                self.threads.remove(&thread);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn go_on(&mut self, thread: Pid, signal: Option<Signal>) -> nix::Result<()> {
        let over = self.score.over.load(Ordering::Acquire) || self.score.fired.get().is_some();
        if self.is_targets(thread) && !over {
            ptrace::syscall(thread, signal)
        } else {
            ptrace::cont(thread, signal)
        }
    }

    /// A child becomes another program.
    fn executes(&mut self, thread: Pid) {
        self.threads.remove(&thread);
        if let Victim::Child(program) = &self.victim
            && self.target.is_none()
            && fs::read_link(format!("/proc/{thread}/exe")).is_ok_and(|path| {
                path.file_name()
                    .is_some_and(|name| name == program.as_str())
            })
        {
            self.target = Some(thread);
        }
    }

    fn is_targets(&mut self, thread: Pid) -> bool {
        let Some(target) = self.target else {
            return false;
        };
        *self
            .threads
            .entry(thread)
            .or_insert_with(|| fs::exists(format!("/proc/{target}/task/{thread}")).unwrap_or(false))
    }

    fn count(&mut self, thread: Pid) -> nix::Result<()> {
        let (Some(call), Some(target)) = (entered(thread)?, self.target) else {
            return Ok(());
        };
        let Some(name) = changes(thread, &call) else {
            return Ok(());
        };
        let seen = self.score.seen.fetch_add(1, Ordering::AcqRel) + 1;
        let is_it = match &self.aim {
            Aim::Nth(nth) => seen == *nth,
            Aim::On { name: wanted, path } => {
                let descriptor = call.arguments[0];
                let file = fs::read_link(format!("/proc/{thread}/fd/{descriptor}"));
                name == *wanted && file.is_ok_and(|file| file == *path)
            }
        };
        // Told first, and once; then it is shot, or held, before it goes on: a call at whose entry a thread is
        // killed is not carried out.
        if is_it
            && self
                .score
                .fired
                .set(format!("{name} (number {seen})"))
                .is_ok()
        {
            match self.aim {
                Aim::Nth(_) => kill(target, Signal::SIGKILL)?,
                Aim::On { .. } => self.held = Some(thread),
            }
        }
        Ok(())
    }
}

fn threads(pid: Pid) -> nix::Result<Vec<Pid>> {
    let listing = fs::read_dir(format!("/proc/{pid}/task")).map_err(|_| Errno::ESRCH)?;
    Ok(listing
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .map(Pid::from_raw)
        .collect())
}

/// The call that a thread is about to make; `None` at the end of one.
fn entered(thread: Pid) -> nix::Result<Option<Call>> {
    let info = ptrace::syscall_info(thread)?;
    if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return Ok(None);
    }
    // SAFETY: the kernel has filled in this member of the union, since the stop is at an entry.
    let entry = unsafe { info.u.entry };
    Ok(Some(Call {
        number: entry.nr as i64,
        arguments: entry.args,
    }))
}

/// Leaves a stopped process stopped until somebody lets it go on.
fn listen(thread: Pid) -> nix::Result<()> {
    // SAFETY: takes numbers only.
    let done = unsafe { libc::ptrace(libc::PTRACE_LISTEN, thread.as_raw(), 0, 0) };
    Errno::result(done).map(drop)
}
