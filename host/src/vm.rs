//! The hands of one Machine's task: monitor, guest, disk, snapshot, network.
//!
//! The order of steps in [`Vm::sleep`] and [`Vm::wake`], and what a crash between two of them leaves
//! behind, is argued in [`dir`](crate::dir).

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use parking_lot::Mutex;
use tern_catalog::{Machine, MachineId};
use tern_guest::message::{ExitStatus, Request};
use tern_guest::run_archive;
use tokio::sync::{oneshot, watch};

use crate::bundle;
use crate::dir::{Durability, MachineDir, Memo, Seal, absent_is_fine, write_whole};
use crate::guest::{Guest, QUICK};
use crate::host::Host;
use crate::logs::Logs;
use crate::machine::core::{BootFailure, End, Epoch, Found};
use crate::machine::hands::{Hands, SleepFailure};
use crate::monitor::config::Jail;
use crate::monitor::{Monitor, Start, control};
use crate::network::{Slot, bell};
use crate::running::Running;
use crate::trace::{Marks, StartTrace};
use crate::volumes::Turn;

/// The hands of one Machine's task.
pub(crate) struct Vm {
    id: MachineId,
    host: Arc<Host>,
    pub(crate) dir: MachineDir,
    slot: Slot,
    pub(crate) guest: Guest,
    pub(crate) logs: Arc<Logs>,
    memo: Mutex<Memo>,
    /// The agent's part of the last start, if this agent has seen it.
    last_start: Mutex<Option<Marks>>,
    running: Mutex<Option<Arc<Running>>>,
    /// Starts of this epoch and before are not wanted any more.
    killed: watch::Sender<Epoch>,
    /// Held by whoever changes the disk or the snapshot, also where nobody waits for it any more.
    files: Arc<tokio::sync::Mutex<()>>,
    /// Counts seals, so that one that was broken meanwhile is not written anew.
    seals: Arc<Mutex<u64>>,
    /// The frame that called the Machine while it slept.
    calling: Mutex<Option<bell::Frame>>,
    /// Whether a monitor that woke takes frames for its guest.
    reachable: watch::Sender<bool>,
}

/// The memory of a Machine that runs, in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    /// How much it may use.
    pub limit_mib: u32,
    /// What of that programs could still have.
    pub available_mib: u64,
}

/// What an adopted monitor counts as. Whatever is started after it counts higher.
const ADOPTED: Epoch = 1;

impl Vm {
    /// Takes up a Machine: finds what there is of it, and adopts a monitor that runs.
    pub(crate) async fn open(
        host: Arc<Host>,
        id: MachineId,
        memo: Memo,
        starting: bool,
    ) -> std::io::Result<(Arc<Self>, Found)> {
        let dir = MachineDir::new(&host.config.machines_dir(), &id);
        let slot = Slot::new(memo.slot)
            .ok_or_else(|| std::io::Error::other(format!("{} is no slot", memo.slot)))?;
        let logs = Arc::new(Logs::new(dir.console_log(), Arc::clone(&host.metrics)));
        let vm = Arc::new(Self {
            id,
            slot,
            guest: Guest::new(&dir.vsock()),
            logs,
            memo: Mutex::new(memo),
            last_start: Mutex::default(),
            running: Mutex::default(),
            killed: watch::channel(0).0,
            files: Arc::default(),
            seals: Arc::default(),
            calling: Mutex::default(),
            reachable: watch::channel(false).0,
            host,
            dir,
        });
        let found = vm.find(starting).await?;
        Ok((vm, found))
    }

    /// The config that the disk belongs to.
    pub(crate) fn disk_instance(&self) -> Option<String> {
        self.memo.lock().instance_id.clone()
    }

    async fn find(&self, starting: bool) -> std::io::Result<Found> {
        let Some(monitor) = Monitor::adopt(&self.dir.pid_file())? else {
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
        match self.adopt(&running, starting).await {
            Ok(()) => {
                tracing::info!(machine = %self.id, pid = running.monitor.pid(), "adopted a monitor");
                self.host.metrics.adopted.add(1);
                *self.running.lock() = Some(running);
                Ok(Found::Running { epoch: ADOPTED })
            }
            Err(reason) => {
                tracing::warn!(machine = %self.id, %reason, "a monitor cannot be adopted");
                running.monitor.kill();
                running.monitor.ended().await;
                self.remove_snapshot().await;
                Ok(Found::Nothing {
                    end: Some(End {
                        by_guest: false,
                        reason: format!("the monitor was found, and not fit to go on: {reason}"),
                    }),
                })
            }
        }
    }

    /// A living monitor wins over a snapshot, and must run. One that was `starting` when it was last
    /// seen must come as far as its app.
    async fn adopt(&self, running: &Arc<Running>, starting: bool) -> Result<(), String> {
        self.dir
            .break_seal()
            .and_then(|()| self.dir.sync())
            .map_err(told)?;
        let socket = self.dir.control();
        let call = async {
            if control::describe(&socket).await?.state != "running" {
                control::resume(&socket).await?;
            }
            Ok::<_, control::ControlError>(())
        };
        tokio::select! {
            outcome = call => outcome.map_err(|e| e.to_string())?,
            _ = running.monitor.ended() => return Err("it has just ended".to_owned()),
        }
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

    async fn start(
        &self,
        epoch: Epoch,
        machine: &Arc<Machine>,
        reset_disk: bool,
    ) -> Result<String, BootFailure> {
        let lasting = |reason: String| BootFailure {
            reason,
            exit: None,
            lasting: true,
        };
        let passing = |reason: String| BootFailure {
            reason,
            exit: None,
            lasting: false,
        };
        let mut marks = Marks::new(true);
        // Before anything else: whatever comes, the disk may be written from here on.
        self.void_snapshot().await.map_err(&passing)?;
        let image = self.image(machine).await?;
        marks.mark("image");
        // Until the app is up: by then the monitor has locked the disks.
        let _turns = self.volumes_ready(machine).await.map_err(&passing)?;
        let run = bundle::run_config(machine, &image.config, self.slot)
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
                host.groups
                    .make(id.as_str(), guest.cpus.into(), guest.memory_mb)?;
                if reset_disk || !dir.disk().exists() {
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
        .map_err(&passing)?;
        marks.mark("prepared");
        self.plug(machine).await.map_err(&passing)?;
        marks.mark("plugged");

        let running = self.spawn(epoch, false).map_err(&passing)?;
        marks.mark("spawned");
        let limit = self.host.config.boot_timeout;
        tokio::select! {
            outcome = running.app_started() => match outcome {
                Ok(()) => {
                    marks.mark("app_started");
                    self.report(marks);
                    Ok(digest)
                }
                Err(exit) => Err(BootFailure {
                    reason: self.why_app_ended(&exit),
                    exit: Some(exit),
                    lasting: false,
                }),
            },
            signal = running.monitor.ended() => {
                // It follows the app, whose end may have been told just before.
                running.news_settled().await;
                match running.exited() {
                    Some(exit) => Err(BootFailure {
                        reason: self.why_app_ended(&exit),
                        exit: Some(exit),
                        lasting: false,
                    }),
                    None => Err(passing(self.end(&running, signal).reason)),
                }
            }
            () = tokio::time::sleep(limit) => Err(passing(format!(
                "the app did not start within {} s; console: {}",
                limit.as_secs(), MachineDir::tail(&self.dir.serial_log())
            ))),
        }
    }

    async fn resume(&self, epoch: Epoch) -> Result<(), String> {
        let seal = self.dir.seal(&self.host.boot_id).map_err(told)?;
        let seal = seal.ok_or("there is none that is good")?;
        if Some(&seal.instance_id) != self.memo.lock().instance_id.as_ref() {
            return Err("it is of another config".to_owned());
        }
        let mut marks = Marks::new(false);
        self.reachable.send_replace(false);
        self.break_seal().map_err(told)?;
        self.dir.prepare_for_monitor(self.user()).map_err(told)?;
        let sync = tokio::task::spawn_blocking({
            let dir = self.dir.clone();
            move || dir.sync()
        });
        marks.mark("prepared");
        let machine = self.host.machine(&self.id);
        // Who copies a volume while its Machine sleeps has it locked.
        let mut turns = Vec::new();
        if let Some(machine) = &machine {
            for mount in &machine.config.mounts {
                turns.push(self.host.volumes.turn(&mount.volume).await);
            }
            let guest = &machine.config.guest;
            self.host
                .groups
                .make(self.id.as_str(), guest.cpus.into(), guest.memory_mb)
                .map_err(told)?;
            self.plug(machine).await?;
        }
        marks.mark("plugged");
        let running = self.spawn(epoch, true)?;
        marks.mark("spawned");
        let limit = self.host.config.wake_timeout;
        let (up, is_up) = oneshot::channel();
        let secured = async {
            // Long done, as a rule: the monitor has memory to load meanwhile.
            sync.await.map_err(|e| e.to_string())?.map_err(told)?;
            // Not before: what a request changes must not meet the old memory after a loss of power. The guest's
            // own word need not be waited for: who calls is held until it runs.
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
            let (reachable, resumed) = tokio::try_join!(secured, spoken)?;
            let mut marks = marks.clone();
            marks.mark_at("reachable", reachable);
            marks.mark_at("resumed", resumed);
            self.report(marks);
            Ok(())
        };
        tokio::select! {
            outcome = speak => outcome,
            signal = running.monitor.ended() => Err(self.end(&running, signal).reason),
        }
    }

    /// Keeps where the time of a start went, and logs it when nobody waits for it any more.
    fn report(&self, marks: Marks) {
        let what = if marks.is_cold() { "booted" } else { "woken" };
        *self.last_start.lock() = Some(marks.clone());
        let (id, socket) = (self.id.clone(), self.dir.control());
        tokio::spawn(async move {
            match control::describe(&socket).await {
                Ok(vm) => {
                    let trace = StartTrace::new(Some(&marks), &vm, &[]);
                    tracing::info!(machine = %id, phases_us = %trace, "{what}");
                }
                Err(error) => tracing::info!(machine = %id, ?marks, %error, "{what}"),
            }
        });
    }

    /// Where the time of the last start went.
    pub(crate) async fn start_trace(&self) -> Result<StartTrace, String> {
        let vm = control::describe(&self.dir.control())
            .await
            .map_err(|e| e.to_string())?;
        let guest = self.guest.status().await.map_err(|e| e.to_string())?;
        let marks = self.last_start.lock().clone();
        Ok(StartTrace::new(marks.as_ref(), &vm, &guest.phases))
    }

    /// The memory that a started Machine may use, and what of it is left.
    pub(crate) async fn memory(&self) -> Result<MemoryUse, String> {
        let vm = control::describe(&self.dir.control())
            .await
            .map_err(|e| e.to_string())?;
        let guest = self.guest.status().await.map_err(|e| e.to_string())?;
        let limit_mib = vm.memory_limit_mib.ok_or_else(|| {
            "its monitor is from before memory could be limited; restart the Machine".to_owned()
        })?;
        // While the balloon fills, the guest still has what it is about to give.
        let available_mib = (guest.memory_available_kib / 1024).min(limit_mib.into());
        Ok(MemoryUse {
            limit_mib,
            available_mib,
        })
    }

    /// Asks the guest of a started Machine to use no more than `mib`.
    pub(crate) async fn limit_memory(&self, mib: u32) -> Result<(), String> {
        control::limit_memory(&self.dir.control(), mib)
            .await
            .map_err(|e| e.to_string())
    }

    async fn suspend(&self, running: &Running) -> Result<(), SleepFailure> {
        let alive = |reason: String| SleepFailure {
            reason,
            alive: true,
        };
        let instance_id = self.memo.lock().instance_id.clone();
        let instance_id = instance_id.ok_or_else(|| alive("its config is not known".to_owned()))?;
        let socket = self.dir.control();
        running.sleeps.store(true, Ordering::Release);
        // Who calls from now on waits for the wake.
        self.reachable.send_replace(false);
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
                Ok(()) => control::resume(&socket).await.map_err(|e| e.to_string()),
                Err(error) => Err(error),
            };
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
        self.secure_snapshot(instance_id);
        Ok(())
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
    fn secure_snapshot(&self, instance_id: String) {
        let (dir, seals) = (self.dir.clone(), Arc::clone(&self.seals));
        let cache = self.host.config.snapshot_cache;
        let seal_number = *seals.lock();
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
            let now = seals.lock();
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

    fn break_seal(&self) -> std::io::Result<()> {
        let mut seals = self.seals.lock();
        *seals += 1;
        self.dir.break_seal()
    }

    /// Makes sure that no snapshot will ever be used again.
    async fn void_snapshot(&self) -> Result<(), String> {
        self.break_seal().map_err(told)?;
        let dir = self.dir.clone();
        self.on_disk(move || {
            dir.sync()?;
            dir.remove_snapshot()
        })
        .await
    }

    /// Removes a snapshot that nobody can use any more: its seal is broken, and no monitor has it open.
    async fn remove_snapshot(&self) {
        let dir = self.dir.clone();
        let removed = self.on_disk(move || dir.remove_snapshot()).await;
        if let Err(error) = removed {
            tracing::warn!(machine = %self.id, error, "a snapshot cannot be removed");
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
            .image(&machine.config.image, known.as_deref())
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

    /// Makes the Machine's device and rules, where they are missing.
    pub(crate) async fn plug(&self, machine: &Machine) -> Result<(), String> {
        let port = crate::network::port(self.slot, machine.private_ip, machine.network);
        self.host
            .network
            .plug(port)
            .await
            .map_err(|e| e.to_string())
    }

    /// Whether a wake has come as far as taking frames for the guest. It may still be refused.
    pub(crate) fn reachable(&self) -> watch::Receiver<bool> {
        self.reachable.subscribe()
    }

    /// The guest's address for IPv4.
    pub(crate) fn ipv4(&self) -> Ipv4Addr {
        self.slot.guest_v4()
    }

    /// Waits at the TAP for a frame that calls the Machine.
    async fn listen(&self) -> Result<(), String> {
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
    fn pass_call_on(&self) {
        if let Some(frame) = self.calling.lock().take()
            && let Err(error) = bell::deliver(self.slot, &frame)
        {
            tracing::debug!(machine = %self.id, %error, "a frame is lost");
        }
    }

    fn spawn(&self, epoch: Epoch, restore: bool) -> Result<Arc<Running>, String> {
        let monitor = Monitor::spawn(Start {
            binary: &self.host.config.vmm_binary,
            config: &self.dir.vm_json(),
            log: &self.dir.vmm_log(),
            restore,
            own_pids: self.user().is_some(),
        })
        .map_err(told)?;
        let running = Running::new(epoch, monitor);
        *self.running.lock() = Some(Arc::clone(&running));
        if !restore {
            self.attend(&running);
        }
        Ok(running)
    }

    /// Who the monitor becomes. Only root can make it somebody else.
    fn user(&self) -> Option<u32> {
        nix::unistd::geteuid().is_root().then(|| self.slot.user())
    }

    /// Collects what the guest tells.
    fn attend(&self, running: &Arc<Running>) {
        let boot = self.memo.lock().boots;
        running.attend(self.guest.clone(), Arc::clone(&self.logs), boot);
    }

    /// Does something to the files that belong to a virtual machine that does not run, one thing
    /// after the other. Once begun it is done to its end, whoever waits for it or not.
    fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
    ) -> impl Future<Output = Result<T, String>> + Send + 'static {
        let files = Arc::clone(&self.files);
        async move {
            let turn = files.lock_owned().await;
            let work = tokio::task::spawn_blocking(move || {
                let _turn = turn;
                work()
            });
            work.await.map_err(|e| e.to_string())?.map_err(told)
        }
    }

    fn current(&self) -> Option<Arc<Running>> {
        self.running.lock().clone()
    }

    fn forget_running(&self, epoch: Epoch) {
        let mut running = self.running.lock();
        if running.as_ref().is_some_and(|r| r.epoch == epoch) {
            *running = None;
            self.reachable.send_replace(false);
        }
    }

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
        if outcome.is_err()
            && let Some(running) = self.current()
            && running.epoch == epoch
        {
            running.monitor.kill();
            running.monitor.ended().await;
            self.forget_running(epoch);
        }
        outcome
    }

    /// How a monitor has ended.
    fn end(&self, running: &Running, signal: Option<i32>) -> End {
        match self.dir.exit() {
            Ok(Some(exit)) => end_of(&exit.reason, &exit.message, None),
            _ => {
                let pid = running.monitor.pid();
                let tail = MachineDir::tail(&self.dir.vmm_log());
                let mut end = end_of("", &tail, signal);
                end.reason = format!("{} (process {pid})", end.reason);
                if self.host.groups.out_of_memory(self.id.as_str()) {
                    end.reason
                        .push_str(", out of the memory that the host allows this Machine");
                }
                end
            }
        }
    }

    fn why_app_ended(&self, exit: &ExitStatus) -> String {
        let lines = self.logs.tail(5).join(" | ");
        let how = match exit.signal {
            Some(signal) => tern_guest::signal::signal_name(signal),
            None => format!("code {}", exit.code),
        };
        format!("the app ended with {how} before it was up; its last words: {lines}")
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(running) = self.running.lock().take() {
            running.leave();
        }
    }
}

#[async_trait]
impl Hands for Vm {
    async fn boot(
        &self,
        epoch: Epoch,
        machine: Arc<Machine>,
        reset_disk: bool,
    ) -> Result<String, BootFailure> {
        let start = self.start(epoch, &machine, reset_disk);
        self.unless_killed(epoch, start, || BootFailure {
            reason: "the start was broken off".to_owned(),
            exit: None,
            lasting: true,
        })
        .await
    }

    async fn wake(&self, epoch: Epoch) -> Result<(), String> {
        let outcome = self
            .unless_killed(epoch, self.resume(epoch), || "it was broken off".to_owned())
            .await;
        if outcome.is_ok()
            && let Some(running) = self.current()
        {
            self.attend(&running);
            self.pass_call_on();
        }
        if outcome.is_err() {
            self.remove_snapshot().await;
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

    async fn ask(&self, signal: Option<i32>, timeout: Duration) -> Result<(), String> {
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
        loop {
            let error = match self.listen().await {
                Ok(()) => return,
                Err(error) => error,
            };
            tracing::warn!(machine = %self.id, %error, "private traffic cannot wake it");
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
        .await
    }
}

/// What a monitor's `exit.json`, or its lack, means.
fn end_of(reason: &str, message: &str, signal: Option<i32>) -> End {
    let by_guest = matches!(reason, "guest_shutdown" | "guest_reset");
    let what = match (reason, signal) {
        ("guest_shutdown" | "guest_reset", _) => "the guest ended".to_owned(),
        ("stopped", _) => "the monitor was stopped".to_owned(),
        ("snapshot_refused", _) => "the snapshot was refused".to_owned(),
        ("", Some(libc::SIGSYS)) => {
            "the monitor was killed by SIGSYS: it made a system call that its filter does not allow"
                .to_owned()
        }
        ("", Some(signal)) => format!(
            "the monitor was killed by {}",
            tern_guest::signal::signal_name(signal)
        ),
        ("", None) => "the monitor died without a word".to_owned(),
        _ => "the monitor failed".to_owned(),
    };
    let reason = if message.is_empty() {
        what
    } else {
        format!("{what}: {message}")
    };
    End { by_guest, reason }
}

/// The news for a guest that was away.
fn resumed() -> Request {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let entropy: [u8; 64] = rand::random();
    Request::Resumed {
        unix_nanos: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        entropy: entropy.to_vec(),
    }
}

fn told(error: std::io::Error) -> String {
    error.to_string()
}

/// Between two attempts to listen at the TAP of a Machine that sleeps.
const LISTEN_RETRY: Duration = Duration::from_secs(1);
/// How long a monitor may take to end after it was asked to, with nothing left to do.
const STOP_TIME: Duration = Duration::from_secs(5);
/// How long it may take where it is in the way.
const KILL_TIME: Duration = Duration::from_secs(2);
