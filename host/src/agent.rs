//! The agent: one task per Machine of this host, kept in step with the catalog.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use parking_lot::RwLock;
use rustix::fs::{FlockOperation, flock};
use tern_catalog::{
    Catalog, Machine, MachineEvent, MachineId, MachineState, MachineStatus, Snapshot, View,
};
use tern_guest::message::Request;
use tern_guest::{ExecRequest, Status};
use tern_image::{ImageError, ImageStore, Limits};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinError, JoinHandle};

use crate::activity::Activity;
use crate::capacity::{Capacity, Room};
use crate::cgroup::Groups;
use crate::checks::Checks;
use crate::config::{ConfigError, HostConfig};
use crate::departures::{Departure, Departures};
use crate::dir::{self, MachineDir, Memo};
use crate::disk::Blank;
use crate::guest::{Exec, QUICK};
use crate::host::Host;
use crate::logs::LogReader;
use crate::machine::core::{Core, Found, Order};
use crate::machine::recorder::Recorder;
use crate::machine::task::{Beginning, Message, Task};
use crate::machine::troubles::Troubles;
use crate::machine::{CommandError, Source, StopRequest};
use crate::metrics::Metrics;
use crate::network::{self, Network, NetworkError, Port, Slot};
use crate::quarantine;
use crate::trace::StartTrace;
use crate::vm::{AllFiles, MemoryUse, Vm};
use crate::volumes::{Keeper, Volumes};
use crate::watched::Watched;

/// The agent of one server. Dropping it without [`Agent::shutdown`] is as good as its process's
/// crash: nothing is lost, and monitors go on.
pub struct Agent {
    handle: AgentHandle,
    supervisor: Ending,
    /// Keeps volumes.
    keeper: Ending,
    /// The packet filter's owner.
    filter: Option<Ending>,
    /// Collects images.
    collector: Ending,
    stop: oneshot::Sender<()>,
    /// One agent per data directory.
    _lock: File,
}

/// A task that ends with the agent.
struct Ending(JoinHandle<()>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Asks things of the Machines of this host. Clones share it.
#[derive(Clone)]
pub struct AgentHandle {
    shared: Arc<Shared>,
}

struct Shared {
    host: Arc<Host>,
    catalog: Catalog,
    machines: RwLock<HashMap<MachineId, Entry>>,
    /// Machines that cannot be looked after now.
    troubles: RwLock<Troubles>,
    /// Changes whenever the agent has done all that the catalog says.
    rounds: watch::Sender<u64>,
}

/// A Machine that has a task.
struct Entry {
    messages: mpsc::UnboundedSender<Message>,
    state: watch::Receiver<MachineState>,
    vm: Arc<Vm>,
    activity: Arc<Activity>,
    /// The record as last told to the task.
    wanted: Arc<Machine>,
}

/// Why an agent could not start.
#[derive(Debug, Error)]
pub enum AgentError {
    /// What it was given contradicts itself.
    #[error("configuration: {0}")]
    Config(#[from] ConfigError),
    /// Its directory cannot be used.
    #[error("{path}: {source}")]
    Io {
        /// Where.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Another agent uses it.
    #[error("{0} is in use by another agent")]
    Locked(String),
    /// Sockets in it would have names that are too long.
    #[error("{path} is too long a path: sockets in it must have at most {MAX_SOCKET_PATH} bytes")]
    TooLong {
        /// The data directory.
        path: String,
    },
    /// The volumes cannot be used.
    #[error("volumes: {0}")]
    Volumes(String),
    /// The images cannot be used.
    #[error("images: {0}")]
    Images(#[from] ImageError),
    /// The network cannot be set up.
    #[error("network: {0}")]
    Network(#[from] NetworkError),
}

/// What a monitor accepts.
const MAX_SOCKET_PATH: usize = 96;
/// How long a Machine that is new in the catalog may take to be taken up.
const TAKE_UP_TIME: Duration = Duration::from_secs(2);
/// Machines taken up at once when an agent starts.
const TAKEN_UP_AT_ONCE: usize = 16;

impl Agent {
    /// Adopts what runs, removes what belongs to nobody, and follows the catalog from then on.
    pub async fn start(
        config: HostConfig,
        catalog: Catalog,
        view: View,
    ) -> Result<Self, AgentError> {
        config.check()?;
        let lock = prepare_dirs(&config)?;
        let snapshot = view.snapshot();
        let images = ImageStore::open(config.data_dir.join("images"), Limits::default())?;
        quarantine::finish_purges(&config.machines_dir()).await;
        let (ports, strays) = survey(&config, &snapshot)?;
        let boot_id = dir::boot_id().map_err(io_at(&"/proc/sys/kernel/random/boot_id"))?;
        let setup = network::Setup {
            outside: network::Outside {
                nat: config.nat,
                allowed: config.machine_allow.clone(),
                public: config.public.clone(),
            },
            data_dir: &config.data_dir,
            boot_id: &boot_id,
            nft: network::NFT.into(),
        };
        let network = Network::open(setup, ports).await?;
        let host = Arc::new(Host {
            blank: Blank::new(&config.data_dir, config.disk_size),
            volumes: Volumes::open(config.volumes_dir())
                .map_err(|e| AgentError::Volumes(e.to_string()))?,
            groups: Groups::open(&config.data_dir, &config.rate_limits),
            capacity: Capacity::of_this_host(config.overcommit)
                .map_err(io_at(&"this host's memory and processors"))?,
            files: AllFiles::default(),
            boot_id,
            metrics: Arc::new(Metrics::default()),
            departures: Departures::default(),
            view,
            images,
            network,
            config,
        });
        let shared = Arc::new(Shared {
            host,
            catalog,
            machines: RwLock::default(),
            troubles: RwLock::default(),
            rounds: watch::channel(0).0,
        });
        let keeper = Keeper::new(Arc::clone(&shared.host), shared.catalog.clone());
        let keeper = Ending(tokio::spawn(keeper.run()));
        let filter = shared.host.network.keeper().map(Ending);
        let mut supervisor = Supervisor {
            shared: Arc::clone(&shared),
            tasks: Watched::new(),
            gone: HashMap::new(),
        };
        supervisor.sweep(strays).await;
        supervisor.take_up_all(&snapshot).await;
        let collector = crate::images::keep_within_budget(Arc::clone(&shared.host));
        let (stop, stopped) = oneshot::channel();
        Ok(Self {
            handle: AgentHandle { shared },
            supervisor: Ending(tokio::spawn(supervisor.run(stopped))),
            keeper,
            filter,
            collector: Ending(tokio::spawn(collector)),
            stop,
            _lock: lock,
        })
    }

    /// Asks things of this host's Machines.
    pub fn handle(&self) -> AgentHandle {
        self.handle.clone()
    }

    /// Waits until a part of the agent has failed, and returns why. What is left of it is not to be trusted: monitors
    /// go on, and another agent adopts them.
    pub async fn failed(&mut self) -> JoinError {
        let parts = [&mut self.supervisor, &mut self.keeper, &mut self.collector];
        let parts = parts.into_iter().chain(&mut self.filter);
        let mut parts: FuturesUnordered<_> = parts.map(|part| &mut part.0).collect();
        while let Some(ended) = parts.next().await {
            if let Err(error) = ended {
                return error;
            }
        }
        std::future::pending().await
    }

    /// Ends the agent. Monitors, and with them Machines, go on; the next agent adopts them.
    pub async fn shutdown(mut self) {
        // It may have ended on its own, with an error that was told.
        let _ = self.stop.send(());
        // One that has failed may have been waited for already.
        if !self.supervisor.0.is_finished()
            && let Err(error) = (&mut self.supervisor.0).await
        {
            tracing::error!(%error, "the agent's supervisor has failed");
        }
    }
}

impl AgentHandle {
    /// Starts a Machine, or wakes it. Returns when its app runs; those who ask at once share one
    /// start.
    pub async fn start(&self, id: &MachineId, source: Source) -> Result<(), CommandError> {
        self.command(id, source, Order::Start).await
    }

    /// Suspends a started Machine. Returns when its memory is on disk.
    pub async fn suspend(&self, id: &MachineId, source: Source) -> Result<(), CommandError> {
        self.command(id, source, Order::Suspend).await
    }

    /// Stops a Machine. Returns when it has ended.
    pub async fn stop(
        &self,
        id: &MachineId,
        source: Source,
        request: StopRequest,
    ) -> Result<(), CommandError> {
        self.command(id, source, Order::Stop(request)).await
    }

    /// Has the image on this host when it returns, so that a start of the Machine with it finds it. It is spared by
    /// collections for some minutes, whoever uses it.
    pub async fn prepare(&self, id: &MachineId, image: &str) -> Result<(), CommandError> {
        let host = &self.shared.host;
        let machine = host.machine(id);
        let machine = machine.ok_or_else(|| CommandError::Unknown(id.clone()))?;
        let had = host.image(image, machine.network, None).await;
        had.map(drop).map_err(|e| CommandError::Failed(e.reason))
    }

    /// Whether a started Machine takes connections on this TCP port, as a health check would find.
    pub async fn accepts(&self, id: &MachineId, port: u16) -> Result<bool, CommandError> {
        let vm = self.started(id).await?;
        let machine = self.shared.host.machine(id);
        let machine = machine.ok_or_else(|| CommandError::Unknown(id.clone()))?;
        Ok(crate::checks::accepts(&machine, vm.ipv4(), port).await)
    }

    /// Sends the app of a started Machine a signal.
    pub async fn signal(&self, id: &MachineId, signo: i32) -> Result<(), CommandError> {
        let vm = self.started(id).await?;
        let outcome = vm.guest.ask(&Request::Signal { signo }, QUICK).await;
        outcome
            .map(drop)
            .map_err(|e| CommandError::Failed(e.to_string()))
    }

    /// Runs a command in a started Machine, beside its app. The Machine is in use until the command has ended.
    pub async fn exec(&self, id: &MachineId, request: ExecRequest) -> Result<Exec, CommandError> {
        // Before its state is looked at: from here on it is not put to sleep for want of use.
        let session = self.entry(id, |entry| entry.activity.session())?;
        let vm = self.started(id).await?;
        let outcome = vm.guest.exec(request).await;
        let exec = outcome.map_err(|e| CommandError::Failed(e.to_string()))?;
        Ok(exec.within(session))
    }

    /// When a Machine was last of use to anybody, beside the requests that the gate counts itself: it was started,
    /// or the API wished something of it; a command ran in it; or it was called over its private network, which
    /// is noticed when this is asked, and counts from then. To be asked every few seconds of a Machine that may be
    /// put to sleep.
    pub fn last_use(&self, id: &MachineId) -> Option<Instant> {
        let (vm, activity) = self
            .entry(id, |entry| {
                (Arc::clone(&entry.vm), Arc::clone(&entry.activity))
            })
            .ok()?;
        if vm.was_called() {
            activity.touch();
        }
        Some(activity.last())
    }

    /// How the guest of a started Machine is doing.
    pub async fn guest_status(&self, id: &MachineId) -> Result<Status, CommandError> {
        let vm = self.started(id).await?;
        let outcome = vm.guest.status().await;
        outcome.map_err(|e| CommandError::Failed(e.to_string()))
    }

    /// Where the time of a started Machine's last start went.
    pub async fn start_trace(&self, id: &MachineId) -> Result<StartTrace, CommandError> {
        let vm = self.started(id).await?;
        vm.start_trace().await.map_err(CommandError::Failed)
    }

    /// The memory that a started Machine may use, and what of it is left.
    pub async fn memory(&self, id: &MachineId) -> Result<MemoryUse, CommandError> {
        let vm = self.started(id).await?;
        vm.memory().await.map_err(CommandError::Failed)
    }

    /// Asks a started Machine to use no more than `mib` of its memory, until its next cold start.
    pub async fn limit_memory(&self, id: &MachineId, mib: u32) -> Result<(), CommandError> {
        let vm = self.started(id).await?;
        vm.limit_memory(mib).await.map_err(CommandError::Failed)
    }

    /// The output of a Machine's app, from line number `from` on as far as it is kept; with
    /// `follow`, then what comes. It may be read in any state.
    pub async fn logs(
        &self,
        id: &MachineId,
        from: u64,
        follow: bool,
    ) -> Result<LogReader, CommandError> {
        let vm = self.vm(id)?;
        let read = tokio::task::spawn_blocking(move || vm.logs.read(from, follow)).await;
        match read {
            Ok(Ok(reader)) => Ok(reader),
            Ok(Err(error)) => Err(CommandError::Failed(error.to_string())),
            Err(error) => Err(CommandError::Failed(error.to_string())),
        }
    }

    /// Tells from now on, and nobody else any more, which Machines are about to be put to sleep. Each waits a while
    /// for the answer.
    pub fn departures(&self) -> mpsc::UnboundedReceiver<Departure> {
        self.shared.host.departures.follow()
    }

    /// Waits until a Machine that is being woken takes frames: they are held until its guest runs, which is sooner than
    /// [`Self::start`] returns. Never returns for one that is not.
    pub async fn reachable(&self, id: &MachineId) {
        let reachable = self.vm(id).map(|vm| vm.reachable());
        if let Ok(mut reachable) = reachable
            && reachable.wait_for(|is| *is).await.is_ok()
        {
            return;
        }
        std::future::pending().await
    }

    /// The address that a Machine has for IPv4. Only its own host can reach it there.
    pub fn ipv4(&self, id: &MachineId) -> Result<Ipv4Addr, CommandError> {
        Ok(self.vm(id)?.ipv4())
    }

    /// The state of a Machine, ahead of what the catalog says.
    pub fn state(&self, id: &MachineId) -> Result<watch::Receiver<MachineState>, CommandError> {
        self.entry(id, |entry| entry.state.clone())
    }

    /// What this host has for Machines that run, and what of it is taken.
    pub fn room(&self) -> Room {
        self.shared.host.capacity.room()
    }

    /// What the agent has counted.
    pub fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.shared.host.metrics)
    }

    async fn command(
        &self,
        id: &MachineId,
        source: Source,
        order: Order,
    ) -> Result<(), CommandError> {
        self.known(id).await;
        let (reply, outcome) = oneshot::channel();
        self.entry(id, |entry| {
            let message = Message::Command(source, order, reply);
            // A task that ends drops its messages, and the outcome then says so.
            let _ = entry.messages.send(message);
        })?;
        outcome.await.unwrap_or(Err(CommandError::ShuttingDown))
    }

    /// Waits until the agent has taken up a Machine that others see in the catalog already.
    async fn known(&self, id: &MachineId) {
        let mut rounds = self.shared.rounds.subscribe();
        let expected = || {
            let host = &self.shared.host;
            !self.shared.machines.read().contains_key(id)
                && self.shared.troubles.read().reason(id).is_none()
                && host.machine(id).is_some_and(|m| m.host == host.config.host)
        };
        let taken_up = async { while expected() && rounds.changed().await.is_ok() {} };
        // Why one cannot be taken up is in its status.
        let _ = tokio::time::timeout(TAKE_UP_TIME, taken_up).await;
    }

    fn vm(&self, id: &MachineId) -> Result<Arc<Vm>, CommandError> {
        self.entry(id, |entry| Arc::clone(&entry.vm))
    }

    fn entry<T>(&self, id: &MachineId, of: impl FnOnce(&Entry) -> T) -> Result<T, CommandError> {
        let machines = self.shared.machines.read();
        let entry = machines.get(id).ok_or_else(|| {
            let troubles = self.shared.troubles.read();
            match troubles.reason(id) {
                Some(reason) => CommandError::Failed(format!(
                    "the host cannot look after the Machine now, and tries again: {reason}"
                )),
                None => CommandError::Unknown(id.clone()),
            }
        })?;
        Ok(of(entry))
    }

    /// The hands of a started Machine. One that is starting is waited for a little: it may have answered requests
    /// already.
    async fn started(&self, id: &MachineId) -> Result<Arc<Vm>, CommandError> {
        let mut states = self.state(id)?;
        let settled = states.wait_for(|state| *state != MachineState::Starting);
        let _ = tokio::time::timeout(QUICK, settled).await;
        let state = *states.borrow();
        if state != MachineState::Started {
            return Err(CommandError::Refused(format!(
                "the Machine is {state}: start it first"
            )));
        }
        self.vm(id)
    }
}

/// Keeps one task per Machine, as the catalog says.
struct Supervisor {
    shared: Arc<Shared>,
    /// Each tells whether its Machine was destroyed.
    tasks: Watched<MachineId, bool>,
    /// Machines that are destroyed while the view still shows them, by when they were made.
    gone: HashMap<MachineId, jiff::Timestamp>,
}

/// A Machine's directory that the catalog does not know.
struct Stray {
    path: PathBuf,
    slot: Option<Slot>,
}

impl Supervisor {
    async fn run(mut self, mut stopped: oneshot::Receiver<()>) {
        let view = self.shared.host.view.clone();
        let mut changes = view.changes();
        loop {
            changes.mark_unchanged();
            self.reconcile(&view.snapshot()).await;
            self.shared.rounds.send_modify(|rounds| *rounds += 1);
            let retry_at = self.shared.troubles.read().next();
            let retry = async {
                match retry_at {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = &mut stopped => break,
                changed = changes.changed() => if changed.is_err() { break },
                Some((id, ended)) = self.tasks.next() => self.ended(id, ended),
                () = retry => {}
            }
        }
        // With their entries go the tasks' last senders; each writes what it has and ends.
        self.shared.machines.write().clear();
        while let Some((id, ended)) = self.tasks.next().await {
            self.ended(id, ended);
        }
    }

    /// Tells every task what has changed, and starts and ends tasks.
    async fn reconcile(&mut self, snapshot: &Snapshot) {
        let own = self.shared.host.config.host;
        self.gone.retain(|id, made| {
            snapshot
                .machines
                .get(id)
                .is_some_and(|m| m.created_at == *made)
        });
        let (mut new, mut lost) = (Vec::new(), Vec::new());
        {
            let mut machines = self.shared.machines.write();
            for machine in snapshot.machines.values().filter(|m| m.host == own) {
                match machines.get_mut(&machine.id) {
                    Some(entry) if Arc::ptr_eq(&entry.wanted, machine) => {}
                    Some(entry) => {
                        entry.wanted = Arc::clone(machine);
                        let _ = entry.messages.send(Message::Wanted(Arc::clone(machine)));
                    }
                    None if self.gone.contains_key(&machine.id) => {}
                    // Its record was gone for a moment, and its last task has not ended yet.
                    None if self.tasks.has(&machine.id) => {}
                    None => new.push(Arc::clone(machine)),
                }
            }
            // With its entry goes the task's last sender: it ends, and leaves everything as it is.
            let known = |id: &MachineId| snapshot.machines.get(id).is_some_and(|m| m.host == own);
            lost.extend(machines.extract_if(|id, _| !known(id)).map(|(id, _)| id));
        }
        {
            let now = Instant::now();
            let mut troubles = self.shared.troubles.write();
            troubles.keep(|id| snapshot.machines.contains_key(id));
            new.retain(|machine| troubles.may_try(machine, now));
        }
        for id in lost {
            let path = MachineDir::new(&self.shared.host.config.machines_dir(), &id);
            // One that was destroyed has left nothing.
            if path.path().exists() {
                self.quarantine(path.path());
                self.cut_off(&path).await;
            }
        }
        for machine in new {
            let before = self.shared.troubles.read().before(&machine.id);
            let told = || snapshot.machine_status.get(&machine.id).cloned();
            let status = before.unwrap_or_else(told);
            self.take_up(machine, status).await;
        }
    }

    /// Takes up all Machines of this host when the agent starts.
    async fn take_up_all(&mut self, snapshot: &Snapshot) {
        let own = self.shared.host.config.host;
        let machines: Vec<_> = snapshot
            .machines
            .values()
            .filter(|m| m.host == own)
            .cloned()
            .collect();
        let opening = futures::stream::iter(machines).map(|machine| {
            let status = snapshot.machine_status.get(&machine.id).cloned();
            let shared = Arc::clone(&self.shared);
            async move {
                let begun = begin(&shared, &machine, status.as_deref()).await;
                (machine, status, begun)
            }
        });
        let begun: Vec<_> = opening.buffer_unordered(TAKEN_UP_AT_ONCE).collect().await;
        for (machine, status, begun) in begun {
            self.spawn(machine, status, begun).await;
        }
    }

    async fn take_up(&mut self, machine: Arc<Machine>, status: Option<Arc<MachineStatus>>) {
        let begun = begin(&self.shared, &machine, status.as_deref()).await;
        self.spawn(machine, status, begun).await;
    }

    async fn spawn(
        &mut self,
        machine: Arc<Machine>,
        status: Option<Arc<MachineStatus>>,
        begun: Result<(Entry, Beginning), String>,
    ) {
        let id = machine.id.clone();
        match begun {
            Ok((entry, beginning)) => {
                self.shared.machines.write().insert(id.clone(), entry);
                self.shared.troubles.write().over(&id);
                self.tasks.spawn(id, Task::run(beginning));
            }
            Err(reason) => {
                let now = Instant::now();
                let before = status.clone();
                let told =
                    |troubles: &mut Troubles| troubles.refused(&machine, before, &reason, now);
                let news = told(&mut self.shared.troubles.write());
                if !news {
                    tracing::debug!(machine = %id, reason, "a Machine still cannot be taken up");
                    return;
                }
                tracing::error!(machine = %id, reason, "a Machine cannot be taken up; it is tried again");
                let failed = refusal(&machine, status.as_deref(), reason);
                if let Err(error) = self.shared.catalog.put(&failed).await {
                    tracing::warn!(machine = %machine.id, %error, "a status cannot be written");
                }
            }
        }
    }

    fn ended(&mut self, id: MachineId, ended: Result<bool, JoinError>) {
        let entry = self.shared.machines.write().remove(&id);
        match (ended, entry) {
            (Ok(true), Some(entry)) => _ = self.gone.insert(id, entry.wanted.created_at),
            (Ok(_), _) => {}
            // The next task finds the Machine as an agent does that starts: its monitor is adopted.
            (Err(error), entry) => {
                tracing::error!(machine = %id, %error, "a Machine's task has failed; it is begun anew");
                if let Some(entry) = entry {
                    let mut troubles = self.shared.troubles.write();
                    troubles.lost(&entry.wanted, &error.to_string(), Instant::now());
                }
            }
        }
    }

    /// Keeps Machines that the catalog does not know as they are, and removes devices that are of none.
    async fn sweep(&self, strays: Vec<Stray>) {
        let host = &self.shared.host;
        for stray in strays {
            if let Some(slot) = stray.slot {
                host.network.reserve(slot);
            }
            self.quarantine(&stray.path);
        }
        match host.network.sweep().await {
            Ok(removed) => host.metrics.leftovers.add(removed),
            Err(error) => tracing::error!(%error, "left over devices cannot be removed"),
        }
    }

    /// A Machine that nobody knows any more, its guest still running as may be, is nobody's neighbour.
    async fn cut_off(&self, dir: &MachineDir) {
        let slot = dir.memo().ok().flatten().and_then(|m| Slot::new(m.slot));
        let Some(slot) = slot else {
            return;
        };
        if let Err(error) = self.shared.host.network.cut_off(slot).await {
            tracing::error!(%error, path = %dir.path().display(), "it is not cut off from the network");
        }
    }

    fn quarantine(&self, path: &Path) {
        let host = &self.shared.host;
        host.metrics.quarantined.add(1);
        let marked = quarantine::mark(path);
        let error = marked.err().map(|e| e.to_string());
        tracing::error!(
            path = %path.display(), error,
            "the catalog does not know this Machine, which is left as it is: serve with the catalog that does, or \
             see `tern host quarantine`"
        );
    }
}

/// Prepares the task of a Machine.
async fn begin(
    shared: &Arc<Shared>,
    machine: &Arc<Machine>,
    status: Option<&MachineStatus>,
) -> Result<(Entry, Beginning), String> {
    let host = &shared.host;
    let dir = MachineDir::new(&host.config.machines_dir(), &machine.id);
    let at = |error: io::Error| format!("{}: {error}", dir.path().display());
    let memo = match dir.memo().map_err(at)? {
        Some(memo) => memo,
        None => {
            let slot = host.network.take_slot().map_err(|e| e.to_string())?;
            let memo = Memo {
                slot: slot.number(),
                instance_id: None,
                image_digest: None,
                boots: 0,
            };
            let made = fs::create_dir_all(dir.path()).and_then(|()| dir.set_memo(&memo));
            if let Err(error) = made {
                // It may be there although it could not be made to last, and the next try goes on with it then.
                if matches!(dir.memo(), Ok(None)) {
                    host.network.release(slot);
                }
                return Err(at(error));
            }
            memo
        }
    };
    quarantine::unmark(dir.path()).map_err(at)?;
    let last = status.map(|s| s.state);
    let opened = Vm::open(Arc::clone(host), machine.id.clone(), memo, last).await;
    let (vm, found) = opened.map_err(at)?;
    if !matches!(found, Found::Nothing { .. }) {
        // Now, so that no wake has to wait for it. One that needs it tries again.
        if let Err(error) = vm.plug(machine).await {
            tracing::error!(machine = %machine.id, error, "the network cannot be set up");
        }
    }
    let adopted = match found {
        Found::Running { epoch } | Found::Busy { epoch } => Some(epoch),
        _ => None,
    };
    let now = Instant::now();
    let core = Core::new(Arc::clone(machine), status, vm.disk_instance(), found, now);
    let events = status.map(|s| s.events.clone()).unwrap_or_default();
    let (messages, received) = mpsc::unbounded_channel();
    let (state, states) = watch::channel(core.0.state());
    let activity = Activity::new();
    let beginning = Beginning {
        core,
        adopted,
        hands: Arc::clone(&vm) as Arc<dyn crate::machine::hands::Hands>,
        recorder: Recorder::new(shared.catalog.clone(), machine.id.clone(), events),
        checks: Checks::new(vm.ipv4(), Arc::clone(&host.metrics)),
        metrics: Arc::clone(&host.metrics),
        activity: Arc::clone(&activity),
        messages: received,
        state,
    };
    let entry = Entry {
        messages,
        state: states,
        vm,
        activity,
        wanted: Arc::clone(machine),
    };
    Ok((entry, beginning))
}

/// What is told of a Machine that this host cannot look after.
pub(crate) fn refusal(
    machine: &Machine,
    status: Option<&MachineStatus>,
    reason: String,
) -> MachineStatus {
    let now = jiff::Timestamp::now();
    let mut events = status.map(|s| s.events.clone()).unwrap_or_default();
    events.push(MachineEvent {
        id: ulid::Ulid::generate().to_string(),
        kind: crate::machine::core::REFUSED.to_owned(),
        status: MachineState::Failed,
        source: Source::Host.as_str().to_owned(),
        timestamp: now.as_millisecond(),
        request: serde_json::json!({
            "error": reason,
            "taken_up": status.map_or(0, crate::machine::core::taken_up),
        }),
    });
    let surplus = events.len().saturating_sub(MachineStatus::MAX_EVENTS);
    events.drain(..surplus);
    MachineStatus {
        id: machine.id.clone(),
        state: MachineState::Failed,
        reason: Some(reason),
        // What is told is of this wish, which an agent takes up all the same: see the event.
        generation: machine.desired.generation,
        instance_id: machine.instance_id.clone(),
        image_digest: status.and_then(|s| s.image_digest.clone()),
        events,
        checks: Vec::new(),
        updated_at: now,
    }
}

/// Makes the agent's directories, and takes the lock that keeps other agents out.
fn prepare_dirs(config: &HostConfig) -> Result<File, AgentError> {
    let machines = config.machines_dir();
    let longest = machines.join("0123456789abcd").join("vsock.sock");
    if longest.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(AgentError::TooLong {
            path: config.data_dir.display().to_string(),
        });
    }
    // Memory, disks and output of apps: nobody's business but root's.
    fs::create_dir_all(&machines)
        .and_then(|()| fs::set_permissions(&machines, fs::Permissions::from_mode(0o700)))
        .map_err(io_at(&machines.display()))?;
    let path = config.data_dir.join("agent.lock");
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(io_at(&path.display()))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Err(AgentError::Locked(config.data_dir.display().to_string()))
        }
        Err(error) => Err(io_at(&path.display())(error.into())),
    }
}

/// Looks at the Machines' directories: which have their place in the network, and which belong to
/// none of this host's Machines.
fn survey(config: &HostConfig, snapshot: &Snapshot) -> Result<(Vec<Port>, Vec<Stray>), AgentError> {
    let machines = config.machines_dir();
    let failed = io_at(&machines.display());
    let mut ports: Vec<Port> = Vec::new();
    let mut strays = Vec::new();
    for entry in fs::read_dir(&machines).map_err(&failed)? {
        let path = entry.map_err(&failed)?.path();
        // What has not the form of a Machine's id is somebody else's, and left alone.
        let name = path.file_name().and_then(|n| n.to_str());
        let Some(Ok(id)) = name.map(str::parse::<MachineId>) else {
            continue;
        };
        let memo = MachineDir::new(&machines, &id).memo().map_err(&failed)?;
        let slot = memo.and_then(|memo| Slot::new(memo.slot));
        let machine = snapshot.machines.get(&id);
        match machine.filter(|m| m.host == config.host) {
            Some(machine) => ports
                .extend(slot.map(|slot| network::port(slot, machine.private_ip, machine.network))),
            None => strays.push(Stray { path, slot }),
        }
    }
    Ok((ports, strays))
}

fn io_at(path: &dyn std::fmt::Display) -> impl Fn(io::Error) -> AgentError + use<> {
    let path = path.to_string();
    move |source| AgentError::Io {
        path: path.clone(),
        source,
    }
}
