//! What the Machine's task may call, as [`Hands`] promises it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tern_catalog::Machine;
use tern_guest::message::{ExitStatus, Request};

use super::Vm;
use super::end::end_of;
use crate::dir::absent_is_fine;
use crate::guest::QUICK;
use crate::machine::core::{BootFailure, End, Epoch};
use crate::machine::hands::{Hands, SleepFailure, WakeFailure};
use crate::monitor::control;

#[async_trait]
impl Hands for Vm {
    async fn boot(
        &self,
        epoch: Epoch,
        machine: Arc<Machine>,
        reset_disk: bool,
    ) -> Result<String, BootFailure> {
        let disk_ready = AtomicBool::new(false);
        let start = self.start(epoch, &machine, reset_disk, &disk_ready);
        let outcome = self.unless_killed(epoch, start, || {
            BootFailure::lasting("the start was broken off".to_owned())
        });
        let outcome = outcome.await;
        // Whatever has come of it.
        self.forget_bundle().await;
        outcome.map_err(|failure| BootFailure {
            disk_ready: disk_ready.load(Ordering::Relaxed),
            ..failure
        })
    }

    async fn wake(&self, epoch: Epoch) -> Result<(), WakeFailure> {
        let outcome = self
            .unless_killed(epoch, self.resume(epoch), || {
                WakeFailure::refused("it was broken off".to_owned())
            })
            .await;
        if outcome.is_ok()
            && let Some(running) = self.current()
        {
            self.attend(&running);
            self.pass_call_on();
        }
        if let Err(WakeFailure { kept: false, .. }) = outcome {
            self.discard().await;
        }
        outcome
    }

    async fn sleep(&self) -> Result<(), SleepFailure> {
        match self.current() {
            Some(running) => self.suspend(&running).await,
            None => Err(SleepFailure {
                reason: "it does not run".to_owned(),
                alive: false,
            }),
        }
    }

    async fn take_over(&self) -> Result<(), String> {
        match self.current() {
            Some(running) => self.take_over_from_another(&running).await,
            None => Err("it does not run".to_owned()),
        }
    }

    async fn watch(&self, app_exited: Box<dyn Fn(ExitStatus) + Send + Sync>) -> End {
        let Some(running) = self.current() else {
            return end_of("", "", None);
        };
        let mut told = false;
        let signal = tokio::select! {
            exit = running.app_exited() => {
                told = true;
                app_exited(exit);
                running.monitor.ended().await
            }
            signal = running.monitor.ended() => signal,
        };
        // Both may be so at once, and the app's end must not be lost by who is looked at first.
        if !told {
            running.news_settled().await;
            if let Some(exit) = running.exited() {
                app_exited(exit);
            }
        }
        self.forget_running(running.epoch);
        if !running.sleeps.load(Ordering::Acquire) {
            self.remove_snapshot().await;
        }
        self.end(&running, signal)
    }

    async fn ask(
        &self,
        signal: Option<i32>,
        timeout: Duration,
        drain: Duration,
    ) -> Result<(), String> {
        // Who calls from now on waits for the next start.
        self.reachable.send_replace(false);
        let asked = self.current();
        if !drain.is_zero() {
            let announced = self.host.departures.announce(&self.id, drain);
            let ended = async {
                match &asked {
                    Some(running) => drop(running.monitor.ended().await),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                left = announced => drop(left),
                () = ended => {}
            }
        }
        // Meanwhile it may have ended, and another guest listen at the same socket.
        let epoch = |running: Option<&Arc<super::Running>>| running.map(|r| r.epoch);
        if epoch(asked.as_ref()) != epoch(self.current().as_ref()) {
            return Err("it has ended before it was asked".to_owned());
        }
        let request = Request::Stop {
            signo: signal,
            timeout_ms: Some(u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
        };
        let outcome = self.guest.ask(&request, QUICK).await;
        outcome.map(drop).map_err(|e| e.to_string())
    }

    fn kill(&self, epoch: Epoch) {
        self.killed.send_if_modified(|killed| {
            let later = epoch > *killed;
            *killed = epoch.max(*killed);
            later
        });
        if let Some(running) = self.current()
            && running.epoch <= epoch
        {
            let socket = self.dir.control();
            tokio::spawn(async move {
                // Asked first, a monitor ends its disks' requests and says why it ended.
                let polite = async {
                    if !running.monitor.has_ended() && control::stop(&socket).await.is_ok() {
                        running.monitor.ended().await;
                    }
                };
                let _ = tokio::time::timeout(KILL_TIME, polite).await;
                running.monitor.kill();
            });
        }
    }

    async fn called(&self) {
        let mut told = String::new();
        loop {
            let Err(error) = self.listen().await else {
                return;
            };
            if is_news(&mut told, error.to_string()) {
                tracing::warn!(machine = %self.id, %error, "private traffic cannot wake it");
            }
            tokio::time::sleep(LISTEN_RETRY).await;
        }
    }

    async fn discard(&self) {
        if let Err(reason) = self.void_snapshot().await {
            tracing::warn!(machine = %self.id, reason, "a snapshot cannot be removed");
        }
    }

    async fn remove(&self) -> Result<(), String> {
        if let Some(running) = self.current() {
            running.monitor.kill();
            running.monitor.ended().await;
            self.forget_running(running.epoch);
        }
        self.host
            .network
            .unplug(self.slot)
            .await
            .map_err(|e| e.to_string())?;
        let (dir, host, id) = (self.dir.clone(), Arc::clone(&self.host), self.id.clone());
        self.on_disk(move || {
            host.groups.remove(id.as_str())?;
            absent_is_fine(std::fs::remove_dir_all(dir.path()))
        })
        .await?;
        self.host.network.release(self.slot);
        Ok(())
    }
}

impl Vm {
    /// Runs a start, unless it is killed, and leaves no monitor behind where it fails.
    async fn unless_killed<T, E>(
        &self,
        epoch: Epoch,
        start: impl Future<Output = Result<T, E>> + Send,
        killed: impl FnOnce() -> E + Send,
    ) -> Result<T, E> {
        let mut killing = self.killed.subscribe();
        let outcome = tokio::select! {
            biased;
            _ = killing.wait_for(|&k| k >= epoch) => Err(killed()),
            outcome = start => outcome,
        };
        if outcome.is_err() {
            if let Some(running) = self.current()
                && running.epoch == epoch
            {
                running.monitor.kill();
                running.monitor.ended().await;
                self.forget_running(epoch);
            }
            *self.share.lock() = None;
        }
        outcome
    }
}

/// Whether this error is another than the one before it: what goes on for hours is logged once.
fn is_news(told: &mut String, error: String) -> bool {
    let news = *told != error;
    *told = error;
    news
}

/// Between two attempts to listen at the TAP of a Machine that sleeps.
const LISTEN_RETRY: Duration = Duration::from_secs(1);
/// How long a monitor may take to end after it was asked to, where it is in the way.
const KILL_TIME: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_told_again_when_it_has_changed() {
        let mut told = String::new();
        let errors = ["no device", "no device", "busy", "no device", "no device"];
        let news = errors.map(|error| is_news(&mut told, error.to_owned()));
        assert_eq!(news, [true, false, true, true, false]);
    }
}
