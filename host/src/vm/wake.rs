//! A wake from the snapshot, and the frame on the private network that may have caused it.

use std::time::{SystemTime, UNIX_EPOCH};

use tern_guest::message::Request;
use tokio::sync::oneshot;

use super::{Vm, told};
use crate::dir::{Durability, Seal};
use crate::machine::core::Epoch;
use crate::machine::hands::WakeFailure;
use crate::network::bell;
use crate::trace::Marks;

impl Vm {
    /// Everything that may fail for a while, of the host's own, comes before the seal is broken: with that the
    /// snapshot is this wake's, and gone if it fails.
    pub(super) async fn resume(&self, epoch: Epoch) -> Result<(), WakeFailure> {
        let (refused, not_ready) = (WakeFailure::refused, WakeFailure::not_ready);
        let mut marks = Marks::new(false);
        let seal = self.dir.seal(&self.host.boot_id).map_err(told);
        let seal = seal.map_err(not_ready)?;
        let seal = seal.ok_or_else(|| refused(NO_SNAPSHOT.to_owned()))?;
        if Some(&seal.instance_id) != self.memo.lock().instance_id.as_ref() {
            return Err(refused("it is of another config".to_owned()));
        }
        self.reachable.send_replace(false);
        self.dir
            .prepare_for_monitor(self.user())
            .map_err(|e| not_ready(told(e)))?;
        marks.mark("prepared");
        let machine = self.host.machine(&self.id);
        // Who copies a volume while its Machine sleeps has it locked.
        let mut turns = Vec::new();
        if let Some(machine) = &machine {
            for mount in &machine.config.mounts {
                turns.push(self.host.volumes.turn(&mount.volume).await);
            }
            let guest = &machine.config.guest;
            let share = self.host.capacity.take(guest);
            *self.share.lock() = Some(share.map_err(|lack| not_ready(lack.to_string()))?);
            self.host
                .groups
                .make(self.id.as_str(), guest)
                .map_err(|e| not_ready(told(e)))?;
            self.plug(machine).await.map_err(not_ready)?;
        }
        marks.mark("plugged");
        let seal = self.take_seal().map_err(|e| not_ready(told(e)))?;
        // It may have become good in any boot meanwhile, and nothing else.
        let seal = seal.ok_or_else(|| refused(NO_SNAPSHOT.to_owned()))?;
        // One that was good in this boot of the host alone may come back with the power: it is void then.
        if seal.boot_id.is_none() {
            let dir = self.dir.clone();
            let gone = tokio::task::spawn_blocking(move || dir.sync()).await;
            // A guest that runs writes to its disk, if only by timers that were due while it slept.
            if let Err(error) = gone
                .map_err(|e| e.to_string())
                .and_then(|s| s.map_err(told))
            {
                return Err(self.put_back(&seal, error));
            }
            marks.mark("seal_gone");
        }
        let running = match self.spawn(epoch, true) {
            Ok(running) => running,
            Err(error) => return Err(self.put_back(&seal, error)),
        };
        marks.mark("spawned");
        let limit = self.host.config.wake_timeout;
        let (up, is_up) = oneshot::channel();
        let taking_frames = async {
            // The guest's own word need not be waited for: who calls is held until it runs.
            if is_up.await.is_ok() {
                self.reachable.send_replace(true);
            }
            Ok(marks.elapsed())
        };
        let spoken = async {
            let monitor_is_up = || {
                let _ = up.send(()); // who listens is beside this
            };
            let spoken = Box::pin(self.guest.insist(resumed, limit, monitor_is_up));
            spoken.await.map_err(|e| e.to_string())?;
            Ok::<_, String>(marks.elapsed())
        };
        let speak = async {
            let (reachable, resumed) = tokio::try_join!(taking_frames, spoken)?;
            let mut marks = marks.clone();
            marks.mark_at("reachable", reachable);
            marks.mark_at("resumed", resumed);
            self.report(marks);
            Ok(())
        };
        let outcome = tokio::select! {
            outcome = speak => outcome,
            signal = running.monitor.ended() => Err(self.end(&running, signal).reason),
        };
        outcome.map_err(refused)
    }

    /// No monitor has come of it: the snapshot is as it was.
    fn put_back(&self, seal: &Seal, reason: String) -> WakeFailure {
        match self.dir.write_seal(seal, Durability::Synced) {
            Ok(()) => {
                // That it was broken has ended what was to make it outlast this boot.
                if seal.boot_id.is_some() {
                    self.secure_snapshot(seal.instance_id.clone());
                }
                WakeFailure::not_ready(reason)
            }
            Err(error) => WakeFailure::refused(format!("{reason}; and its seal is lost: {error}")),
        }
    }

    /// Waits at the TAP for a frame that calls the Machine.
    pub(super) async fn listen(&self) -> Result<(), String> {
        *self.calling.lock() = None;
        let Some(machine) = self.host.machine(&self.id) else {
            return std::future::pending().await;
        };
        let Some(calls) = bell::Calls::of(&machine) else {
            return std::future::pending().await;
        };
        self.plug(&machine).await?;
        let frame = bell::listen(self.slot, &calls).await.map_err(told)?;
        *self.calling.lock() = Some(frame);
        Ok(())
    }

    /// Gives the guest the frame that woke it. One that is lost is sent again, a little later.
    pub(super) fn pass_call_on(&self) {
        if let Some(frame) = self.calling.lock().take()
            && let Err(error) = bell::deliver(self.slot, &frame)
        {
            tracing::debug!(machine = %self.id, %error, "a frame is lost");
        }
    }
}

const NO_SNAPSHOT: &str = "there is none that is good";

/// The news for a guest that was away.
pub(super) fn resumed() -> Request {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let entropy: [u8; 64] = rand::random();
    Request::Resumed {
        unix_nanos: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        entropy: entropy.to_vec(),
    }
}
