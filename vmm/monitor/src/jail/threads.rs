//! Starts threads on behalf of those whose filters do not allow it.
//!
//! A device's worker starts when its driver is ready, which a vCPU hears; and a thread inherits the
//! filter of the thread that starts it. So that neither a vCPU nor the main thread may make threads, and a
//! worker is not bound to what those may do, one thread exists to start others: it takes closures by a channel and gives back
//! what to join.

use std::io;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use super::seccomp::{self, ThreadKind};

type Job = Box<dyn FnOnce() + Send>;

static STARTER: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();

/// Brings the starter up. From then on [`start`] goes by way of it.
pub fn prepare() -> io::Result<()> {
    let (jobs, receiver) = channel::<Job>();
    thread::Builder::new()
        .name("starter".into())
        .stack_size(crate::THREAD_STACK_BYTES)
        .spawn(move || {
            seccomp::confine(ThreadKind::Starter);
            for job in receiver {
                job();
            }
        })?;
    let _ = STARTER.set(Mutex::new(jobs)); // a second one would only be idle
    Ok(())
}

/// Starts a thread that runs `work`; directly where there is no starter, as in unit tests.
pub fn start<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let builder = thread::Builder::new()
        .name(name.into())
        .stack_size(crate::THREAD_STACK_BYTES);
    let Some(starter) = STARTER.get() else {
        return builder.spawn(work);
    };
    let (reply, started) = sync_channel(1);
    let job: Job = Box::new(move || {
        let _ = reply.send(builder.spawn(work)); // the asker waits below
    });
    let gone = || io::Error::other("the thread that starts others is gone");
    starter
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send(job)
        .map_err(|_| gone())?;
    started.recv().map_err(|_| gone())?
}
