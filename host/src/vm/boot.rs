//! A cold start: image, volumes, disk and configuration are made ready, and a monitor boots from them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tern_catalog::Machine;
use tern_guest::message::ExitStatus;
use tern_guest::run_archive;

use super::Vm;
use crate::bundle;
use crate::dir::{Durability, MachineDir, absent_is_fine, write_whole};
use crate::machine::core::{BootFailure, Epoch};
use crate::monitor::config::Jail;
use crate::trace::Marks;
use crate::volumes::Turn;

impl Vm {
    pub(super) async fn start(
        &self,
        epoch: Epoch,
        machine: &Arc<Machine>,
        reset_disk: bool,
        disk_ready: &AtomicBool,
    ) -> Result<String, BootFailure> {
        let (lasting, passing) = (BootFailure::lasting, BootFailure::passing);
        let ended = |exit: ExitStatus| BootFailure {
            exit: Some(exit),
            ..passing(self.why_app_ended(&exit))
        };
        let mut marks = Marks::new(true);
        // Nothing is lost for want of room.
        let share = self.host.capacity.take(&machine.config.guest);
        *self.share.lock() = Some(share.map_err(|lack| passing(lack.to_string()))?);
        // Before anything else: whatever comes, the disk may be written from here on.
        self.void_snapshot().await.map_err(passing)?;
        self.suspend_is_over();
        if reset_disk {
            // At once, and a blank one is put there below by whichever start gets so far: this one may not, nor
            // the agent live to tell the next.
            let disk = self.dir.disk();
            self.on_disk(move || absent_is_fine(std::fs::remove_file(disk)))
                .await
                .map_err(passing)?;
        }
        // Read when this has ended, by who has called it.
        disk_ready.store(true, Ordering::Relaxed);
        let image = self.image(machine).await?;
        marks.mark("image");
        // Until the app is up: by then the monitor has locked the disks.
        let _turns = self.volumes_ready(machine).await.map_err(passing)?;
        let secrets = self.host.secrets(&machine.app).map_err(lasting)?;
        let run = bundle::run_config(machine, &image.config, &secrets, self.slot)
            .map_err(|e| lasting(e.to_string()))?;
        let archive = run_archive(&run).map_err(|e| lasting(e.to_string()))?;
        let vm = bundle::vm_config(
            &self.host.config,
            machine,
            &self.dir,
            &image.disk,
            machine
                .config
                .mounts
                .iter()
                .map(|m| self.host.volumes.disk(&m.volume)),
            self.slot,
            self.user().map(|user| Jail {
                root: self.dir.jail(),
                uid: user,
                gid: user,
                cgroup: self.host.groups.path(self.id.as_str()),
            }),
        );
        let vm = serde_json::to_vec_pretty(&vm).map_err(|e| lasting(e.to_string()))?;
        let digest = image.digest.to_string();
        let memo = {
            let mut memo = self.memo.lock();
            memo.boots += 1;
            memo.instance_id = Some(machine.instance_id.clone());
            memo.image_digest = Some(digest.clone());
            memo.clone()
        };
        self.on_disk({
            let (dir, host) = (self.dir.clone(), Arc::clone(&self.host));
            let user = self.user();
            let (id, guest) = (self.id.clone(), machine.config.guest.clone());
            move || {
                host.groups.make(id.as_str(), &guest)?;
                if !dir.disk().exists() {
                    host.blank.put(&dir.disk())?;
                }
                dir.set_memo(&memo)?;
                dir.prepare_for_monitor(user)?;
                absent_is_fine(std::fs::remove_file(dir.serial_log()))?;
                write_whole(&dir.run_cpio(), &archive, Durability::Unsynced)?;
                write_whole(&dir.vm_json(), &vm, Durability::Unsynced)
            }
        })
        .await
        .map_err(passing)?;
        marks.mark("prepared");
        self.plug(machine).await.map_err(passing)?;
        marks.mark("plugged");

        let running = self.spawn(epoch, false).map_err(passing)?;
        marks.mark("spawned");
        let limit = self.host.config.boot_timeout;
        tokio::select! {
            outcome = running.app_started() => match outcome {
                Ok(()) => {
                    marks.mark("app_started");
                    self.report(marks);
                    Ok(digest)
                }
                Err(exit) => Err(ended(exit)),
            },
            signal = running.monitor.ended() => {
                // It follows the app, whose end may have been told just before.
                running.news_settled().await;
                match running.exited() {
                    Some(exit) => Err(ended(exit)),
                    None => Err(passing(self.end(&running, signal).reason)),
                }
            }
            () = tokio::time::sleep(limit) => Err(passing(format!(
                "the app did not start within {} s; console: {}",
                limit.as_secs(), MachineDir::tail(&self.dir.serial_log())
            ))),
        }
    }

    /// Removes what a guest was started with, once its monitor has read it or is not there: it holds the app's secrets in
    /// the clear. The next cold start writes it anew.
    pub(super) async fn forget_bundle(&self) {
        let archive = self.dir.run_cpio();
        let removed = self.on_disk(move || absent_is_fine(std::fs::remove_file(archive)));
        if let Err(error) = removed.await {
            tracing::warn!(machine = %self.id, error, "what it was started with stays on the disk");
        }
    }

    async fn image(&self, machine: &Machine) -> Result<tern_image::Image, BootFailure> {
        // A config runs one image for ever, even where its tag has moved on.
        let known = {
            let memo = self.memo.lock();
            let same = memo.instance_id.as_ref() == Some(&machine.instance_id);
            memo.image_digest.clone().filter(|_| same)
        };
        self.host
            .image(&machine.config.image, machine.network, known.as_deref())
            .await
    }

    /// Makes the Machine's volumes ready, and keeps others here from them until the turns are dropped.
    async fn volumes_ready(&self, machine: &Machine) -> Result<Vec<Turn>, String> {
        let mut turns = Vec::new();
        for mount in &machine.config.mounts {
            let told = |why: &dyn std::fmt::Display| format!("volume {}: {why}", mount.volume);
            turns.push(self.host.volumes.turn(&mount.volume).await);
            let volume = self
                .host
                .view
                .snapshot()
                .volumes
                .get(&mount.volume)
                .cloned();
            let volume = volume.ok_or_else(|| told(&"there is none"))?;
            let host = Arc::clone(&self.host);
            let ready = tokio::task::spawn_blocking(move || host.volumes.ready(&volume));
            let ready = ready.await.map_err(|e| told(&e))?;
            ready.map_err(|e| told(&e))?;
        }
        Ok(turns)
    }
}
