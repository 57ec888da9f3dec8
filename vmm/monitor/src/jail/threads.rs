//! Threads that are made in good time, and then wait for work.
//!
//! ```text
//!  hire ──► idle ──begin──► at work ──its job ends──► idle ──drop──► gone
//! ```
//!
//! A device's worker begins when its driver is ready, which a vCPU hears, and ends when its Machine pauses, which
//! is the main thread's doing. Neither may make threads: no filter allows that to anybody. So all threads of a monitor
//! are made before its main thread is confined, and whoever has work for one hands it over by a channel.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use super::seccomp::{self, ThreadKind};

type Job<T> = Box<dyn FnOnce() -> T + Send>;

/// A thread under its own filter, which does one job after the other.
#[derive(Debug)]
pub struct Hand<T> {
    name: &'static str,
    kind: ThreadKind,
    hired: Option<Hired<T>>,
}

#[derive(Debug)]
struct Hired<T> {
    /// Closed as the command to end.
    jobs: Sender<Job<T>>,
    done: Receiver<T>,
    thread: JoinHandle<()>,
}

impl<T: Send + 'static> Hand<T> {
    /// The thread `name` of this `kind`, which is not there yet.
    pub fn new(name: &'static str, kind: ThreadKind) -> Self {
        let hired = None;
        Self { name, kind, hired }
    }

    /// Makes the thread, if it is not there.
    pub fn hire(&mut self) -> io::Result<()> {
        if self.hired.is_some() {
            return Ok(());
        }
        let (kind, (jobs, to_do), (report, done)) = (self.kind, channel::<Job<T>>(), channel());
        let thread = thread::Builder::new()
            .name(self.name.into())
            .stack_size(crate::THREAD_STACK_BYTES)
            .spawn(move || {
                seccomp::confine(kind);
                for job in to_do {
                    let _ = report.send(job()); // nobody may wait for it any more
                }
            })?;
        self.hired = Some(Hired { jobs, done, thread });
        Ok(())
    }

    /// Hands it a job, which it does after those that it has. Makes the thread now if it was not hired before, as it
    /// is not in unit tests.
    pub fn begin(&mut self, job: impl FnOnce() -> T + Send + 'static) -> io::Result<()> {
        self.hire()?;
        if let Some(hired) = &self.hired {
            let _ = hired.jobs.send(Box::new(job)); // after a panic it goes nowhere, and `finish` tells
        }
        Ok(())
    }

    /// Waits for the end of the first job that has not been waited for. `None` after a panic in it or before, which the
    /// process's panic hook has reported, and where none was begun.
    pub fn finish(&self) -> Option<T> {
        self.hired.as_ref()?.done.recv().ok()
    }
}

impl<T> Drop for Hand<T> {
    /// Waits for what has been begun.
    fn drop(&mut self) {
        if let Some(Hired { jobs, thread, .. }) = self.hired.take() {
            drop(jobs);
            let _ = thread.join(); // a panic has been reported by the process's hook
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hand_does_one_job_after_the_other_in_one_thread() {
        let mut hand = Hand::new("hand", ThreadKind::Prefetch);
        let mut threads = Vec::new();
        for _ in 0..3 {
            hand.begin(thread::current).unwrap();
            threads.push(hand.finish().unwrap());
        }
        for thread in &threads {
            assert_eq!(
                (thread.name(), thread.id()),
                (Some("hand"), threads[0].id())
            );
        }
    }

    #[test]
    fn what_was_begun_is_done_before_it_is_gone() {
        let (send, receive) = channel();
        let mut hand = Hand::new("hand", ThreadKind::Prefetch);
        for number in 0..3 {
            let send = send.clone();
            hand.begin(move || send.send(number).unwrap()).unwrap();
        }
        drop((hand, send));
        assert_eq!(receive.iter().collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn after_a_panic_nothing_is_waited_for() {
        let mut hand = Hand::new("hand", ThreadKind::Prefetch);
        assert_eq!(hand.finish(), None::<()>, "nothing was begun");
        hand.begin(|| panic!("on purpose")).unwrap();
        assert_eq!(hand.finish(), None);
        hand.begin(|| ()).unwrap();
        assert_eq!(hand.finish(), None);
    }
}
