//! A suspend, and what becomes of its snapshot: it is made to last, or void.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Vm, told};
use crate::dir::{Durability, Seal};
use crate::disk_space::room_for;
use crate::machine::core::DRAIN_TIME;
use crate::machine::hands::SleepFailure;
use crate::monitor::control;
use crate::running::Running;

impl Vm {
    pub(super) async fn suspend(&self, running: &Running) -> Result<(), SleepFailure> {
        let alive = |reason: String| SleepFailure {
            reason,
            alive: true,
        };
        let instance_id = self.memo.lock().instance_id.clone();
        let instance_id = instance_id.ok_or_else(|| alive("its config is not known".to_owned()))?;
        // Before anything of it is touched: it runs on rather than take the disk's last bytes. One that has woken
        // before has its room already.
        if !self.dir.snapshot().exists() {
            let machine = self.host.machine(&self.id);
            let mib = machine.map_or(0, |m| u64::from(m.config.guest.memory_mb));
            room_for(self.dir.path(), mib << 20).map_err(|e| alive(told(e)))?;
        }
        let socket = self.dir.control();
        // Who calls from now on waits for the wake.
        self.reachable.send_replace(false);
        let leaving = self.host.departures.announce(&self.id, DRAIN_TIME);
        let left = tokio::select! {
            left = leaving => left,
            signal = running.monitor.ended() => {
                return Err(SleepFailure { reason: self.end(running, signal).reason, alive: false });
            }
        };
        self.dir.set_suspending(true).map_err(|e| alive(told(e)))?;
        running.sleeps.store(true, Ordering::Release);
        let write = async {
            control::pause(&socket).await.map_err(|e| e.to_string())?;
            control::snapshot(&socket)
                .await
                .map_err(|e| e.to_string())?;
            let seal = Seal {
                instance_id: instance_id.clone(),
                boot_id: Some(self.host.boot_id.clone()),
            };
            self.dir
                .write_seal(&seal, Durability::Unsynced)
                .map_err(told)
        };
        let write = self.telling_progress(running, write);
        let written = tokio::select! {
            written = write => written,
            signal = running.monitor.ended() => {
                // Without its monitor's word a snapshot is not trusted.
                let _ = self.break_seal();
                self.remove_snapshot().await;
                return Err(SleepFailure { reason: self.end(running, signal).reason, alive: false });
            }
        };
        if let Err(reason) = written {
            running.sleeps.store(false, Ordering::Release);
            let back = self.break_seal().map_err(told);
            let back = match back {
                Ok(()) => tokio::select! {
                    back = control::resume(&socket) => back.map_err(|e| e.to_string()),
                    _ = running.monitor.ended() => Err("its monitor has ended".to_owned()),
                },
                Err(error) => Err(error),
            };
            self.suspend_is_over();
            let Err(error) = back else {
                return Err(alive(reason));
            };
            running.monitor.kill();
            running.monitor.ended().await;
            self.remove_snapshot().await;
            let reason = format!("{reason}; and it could not go on: {error}");
            return Err(SleepFailure {
                reason,
                alive: false,
            });
        }
        self.end_paused(running).await;
        self.suspend_is_over();
        self.secure_snapshot(instance_id);
        // Nobody may want to hear it.
        let _ = left.send(());
        Ok(())
    }

    /// Tells now and then how a snapshot gets on that takes long. However slow it is, it is not given up: its Machine's
    /// memory is in it and nowhere else.
    async fn telling_progress<T>(&self, running: &Running, write: impl Future<Output = T>) -> T {
        tokio::pin!(write);
        let mut before = running.monitor.written();
        loop {
            match tokio::time::timeout(PROGRESS_TIME, &mut write).await {
                Ok(written) => return written,
                Err(_) => {
                    let now = running.monitor.written();
                    let mib = now.saturating_sub(before) >> 20;
                    before = now;
                    tracing::warn!(machine = %self.id, mib, "a suspend takes long; this was written in the last minute");
                }
            }
        }
    }

    /// One that is told of although it is over makes an agent wait longer for a monitor that says nothing.
    pub(super) fn suspend_is_over(&self) {
        if let Err(error) = self.dir.set_suspending(false) {
            tracing::warn!(machine = %self.id, %error, "that a suspend is over cannot be written down");
        }
    }

    /// Ends a monitor whose vCPUs stand still: however it goes, nothing is lost.
    async fn end_paused(&self, running: &Running) {
        let polite = async {
            if let Err(error) = control::stop(&self.dir.control()).await {
                tracing::warn!(machine = %self.id, %error, "a monitor does not stop");
                return;
            }
            running.monitor.ended().await;
        };
        if tokio::time::timeout(STOP_TIME, polite).await.is_err() || !running.monitor.has_ended() {
            running.monitor.kill();
        }
        running.monitor.ended().await;
        self.forget_running(running.epoch);
    }

    /// Makes the snapshot outlast a loss of power, in the background; and has the host's memory back, where
    /// that is its policy: what is on disk can be dropped.
    pub(super) fn secure_snapshot(&self, instance_id: String) {
        let (dir, files) = (self.dir.clone(), Arc::clone(&self.files));
        let cache = self.host.config.snapshot_cache;
        let seal_number = *files.seals.lock();
        // Beside everything else: the disk may be slow, and limited.
        let synced = {
            let dir = dir.clone();
            tokio::task::spawn_blocking(move || dir.sync_snapshot())
        };
        let publish = self.on_disk(move || {
            let seal = Seal {
                instance_id,
                boot_id: None,
            };
            let publish = dir.prepare_seal(&seal)?;
            let now = files.seals.lock();
            let sleeps = *now == seal_number;
            if sleeps {
                publish()?;
            }
            drop(now);
            dir.sync()?;
            // A wake may begin at this moment: it is only slower, see there.
            if sleeps && cache.drops_now() {
                dir.drop_snapshot_cache()?;
            }
            Ok(())
        });
        let id = self.id.clone();
        tokio::spawn(async move {
            let secured = async {
                synced.await.map_err(|e| e.to_string())?.map_err(told)?;
                publish.await
            };
            if let Err(error) = secured.await {
                // It stays good as long as the host has power; or it was woken meanwhile.
                tracing::debug!(machine = %id, error, "a snapshot is not secured");
            }
        });
    }

    pub(super) fn break_seal(&self) -> std::io::Result<()> {
        let mut seals = self.files.seals.lock();
        *seals += 1;
        self.dir.break_seal()
    }

    /// Breaks the seal, and returns what it said if it was good. One that was good in any boot of the host can
    /// come back by a loss of power until the directory is synced.
    pub(super) fn take_seal(&self) -> std::io::Result<Option<Seal>> {
        let mut seals = self.files.seals.lock();
        // Under the lock: it may be made good in any boot at this moment.
        let seal = self.dir.seal(&self.host.boot_id)?;
        *seals += 1;
        self.dir.break_seal()?;
        Ok(seal)
    }

    /// Makes sure that no snapshot will ever be used again.
    pub(super) async fn void_snapshot(&self) -> Result<(), String> {
        self.break_seal().map_err(told)?;
        let dir = self.dir.clone();
        self.on_disk(move || {
            dir.sync()?;
            dir.remove_snapshot()
        })
        .await
    }

    /// Removes a snapshot that nobody can use any more: its seal is broken, and no monitor has it open.
    pub(super) async fn remove_snapshot(&self) {
        let dir = self.dir.clone();
        let removed = self.on_disk(move || dir.remove_snapshot()).await;
        if let Err(error) = removed {
            tracing::warn!(machine = %self.id, error, "a snapshot cannot be removed");
        }
    }
}

/// Between two words about a suspend that takes long.
const PROGRESS_TIME: Duration = Duration::from_secs(60);
/// How long a monitor may take to end after it was asked to, with nothing left to do.
const STOP_TIME: Duration = Duration::from_secs(5);
