//! What an agent that starts finds of a Machine: a monitor to adopt, a snapshot, or neither.

use std::sync::Arc;
use std::time::Duration;

use tern_catalog::MachineState;

use super::end::end_of;
use super::wake::resumed;
use super::{Vm, told};
use crate::guest::QUICK;
use crate::machine::core::{End, Epoch, Found};
use crate::monitor::{Monitor, control};
use crate::running::Running;

/// A monitor that does nothing else answers in this time, or is taken for one that does.
const BUSY_TIME: Duration = Duration::from_secs(2);
/// What an adopted monitor counts as. Whatever is started after it counts higher.
const ADOPTED: Epoch = 1;

impl Vm {
    /// `last` is the state in which another agent has left it.
    pub(super) async fn find(&self, last: Option<MachineState>) -> std::io::Result<Found> {
        let Some(monitor) = Monitor::adopt(&self.dir.pid_file())? else {
            self.suspend_is_over();
            self.forget_bundle().await;
            let seal = self.dir.seal(&self.host.boot_id)?;
            if seal.is_some() {
                self.host.metrics.adopted.add(1);
                return Ok(Found::Asleep);
            }
            self.remove_snapshot().await;
            let ran = self.memo.lock().boots > 0;
            let end = self
                .dir
                .exit()?
                .map(|exit| end_of(&exit.reason, &exit.message, None));
            return Ok(Found::Nothing {
                end: end.filter(|_| ran),
            });
        };
        let running = Running::new(ADOPTED, monitor);
        let machine = self.host.machine(&self.id);
        *self.share.lock() = machine.map(|m| self.host.capacity.hold(&m.config.guest));
        // The agent before may have died before the catalog had heard of it.
        let suspends = last == Some(MachineState::Suspending) || self.dir.is_suspending();
        if suspends && self.writes_snapshot(&running).await {
            let pid = running.monitor.pid();
            tracing::info!(machine = %self.id, pid, "a monitor writes its snapshot, and is adopted then");
            *self.running.lock() = Some(running);
            return Ok(Found::Busy { epoch: ADOPTED });
        }
        let starting = last == Some(MachineState::Starting);
        match self.adopt(&running, starting, QUICK).await {
            Ok(()) => {
                tracing::info!(machine = %self.id, pid = running.monitor.pid(), "adopted a monitor");
                self.host.metrics.adopted.add(1);
                // It answers, so it has read what it was started with.
                self.forget_bundle().await;
                *self.running.lock() = Some(running);
                Ok(Found::Running { epoch: ADOPTED })
            }
            Err(reason) => {
                self.give_up(&running, &reason).await;
                Ok(Found::Nothing {
                    end: Some(End {
                        by_guest: false,
                        reason: format!("the monitor was found, and not fit to go on: {reason}"),
                    }),
                })
            }
        }
    }

    /// Whether a monitor that was told to write a snapshot still does: until then it answers nobody.
    async fn writes_snapshot(&self, running: &Running) -> bool {
        let socket = self.dir.control();
        let answer = tokio::time::timeout(BUSY_TIME, control::describe(&socket));
        answer.await.is_err() && !running.monitor.has_ended()
    }

    pub(super) async fn take_over_from_another(
        &self,
        running: &Arc<Running>,
    ) -> Result<(), String> {
        let outcome = self.adopt(running, false, Duration::MAX).await;
        match &outcome {
            Ok(()) => self.host.metrics.adopted.add(1),
            Err(reason) => {
                self.give_up(running, reason).await;
                self.forget_running(running.epoch);
            }
        }
        outcome
    }

    async fn give_up(&self, running: &Running, reason: &str) {
        tracing::warn!(machine = %self.id, %reason, "a monitor cannot be adopted");
        running.monitor.kill();
        running.monitor.ended().await;
        *self.share.lock() = None;
        self.remove_snapshot().await;
    }

    /// A living monitor wins over a snapshot, and must run. One that was `starting` when it was last
    /// seen must come as far as its app.
    async fn adopt(
        &self,
        running: &Arc<Running>,
        starting: bool,
        limit: Duration,
    ) -> Result<(), String> {
        self.dir
            .break_seal()
            .and_then(|()| self.dir.sync())
            .map_err(told)?;
        let socket = self.dir.control();
        let call = async {
            if control::describe_within(&socket, limit).await?.state != "running" {
                control::resume(&socket).await?;
            }
            Ok::<_, control::ControlError>(())
        };
        tokio::select! {
            outcome = call => outcome.map_err(|e| e.to_string())?,
            _ = running.monitor.ended() => return Err("it has just ended".to_owned()),
        }
        self.suspend_is_over();
        // It may have been paused, or woken by an agent that died before it could tell the time. A
        // guest that still boots does not listen, and needs no telling.
        match self.guest.ask(&resumed(), QUICK).await {
            Ok(_) => {}
            Err(error) => tracing::debug!(machine = %self.id, %error, "not told the time"),
        }
        self.attend(running);
        if starting {
            let limit = self.host.config.boot_timeout;
            tokio::select! {
                started = running.app_started() => started.map_err(|e| self.why_app_ended(&e))?,
                _ = running.monitor.ended() => return Err("it has just ended".to_owned()),
                () = tokio::time::sleep(limit) => return Err("its app does not start".to_owned()),
            }
        }
        Ok(())
    }
}
