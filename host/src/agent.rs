//! The agent: one task per Machine of this host, kept in step with the catalog.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use parking_lot::RwLock;
use rustix::fs::{FlockOperation, flock};
use tern_catalog::{Catalog, Machine, MachineId, MachineState, MachineStatus, Snapshot, View};
use tern_guest::message::Request;
use tern_guest::{ExecRequest, Status};
use tern_image::{ImageError, ImageStore, Limits};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};

use crate::cgroup::Groups;
use crate::checks::Checks;
use crate::config::{ConfigError, HostConfig};
use crate::dir::{self, MachineDir, Memo};
use crate::disk::Blank;
use crate::guest::{Exec, QUICK};
use crate::host::Host;
use crate::logs::LogReader;
use crate::machine::core::{Core, Found, Order};
use crate::machine::recorder::Recorder;
use crate::machine::task::{Beginning, Message, Task};
use crate::machine::{CommandError, Source, StopRequest};
use crate::metrics::Metrics;
use crate::monitor::Monitor;
use crate::network::{self, Network, NetworkError, Port, Slot};
use crate::trace::StartTrace;
use crate::vm::MemoryUse;
use crate::vm::Vm;
use crate::volumes::{Keeper, Volumes};

/// The agent of one server. Dropping it without [`Agent::shutdown`] is as good as its process's
/// crash: nothing is lost, and monitors go on.
pub struct Agent {
    handle: AgentHandle,
    supervisor: Ending,
    /// Keeps volumes.
    _keeper: Ending,
    /// Collects images.
    _collector: Ending,
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
    /// Changes whenever the agent has done all that the catalog says.
    rounds: watch::Sender<u64>,
}

/// A Machine that has a task.
struct Entry {
    messages: mpsc::UnboundedSender<Message>,
    state: watch::Receiver<MachineState>,
    vm: Arc<Vm>,
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
        let (ports, leftovers) = survey(&config, &snapshot)?;
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
            boot_id,
            metrics: Arc::new(Metrics::default()),
            view,
            images,
            network,
            config,
        });
        let shared = Arc::new(Shared {
            host,
            catalog,
            machines: RwLock::default(),
            rounds: watch::channel(0).0,
        });
        let keeper = Keeper::new(Arc::clone(&shared.host), shared.catalog.clone());
        let keeper = Ending(tokio::spawn(keeper.run()));
        let mut supervisor = Supervisor {
            shared: Arc::clone(&shared),
            tasks: JoinSet::new(),
            gone: HashMap::new(),
        };
        supervisor.sweep(leftovers).await;
        supervisor.take_up_all(&snapshot).await;
        let collector = crate::images::keep_within_budget(Arc::clone(&shared.host));
        let (stop, stopped) = oneshot::channel();
        Ok(Self {
            handle: AgentHandle { shared },
            supervisor: Ending(tokio::spawn(supervisor.run(stopped))),
            _keeper: keeper,
            _collector: Ending(tokio::spawn(collector)),
            stop,
            _lock: lock,
        })
    }

    /// Asks things of this host's Machines.
    pub fn handle(&self) -> AgentHandle {
        self.handle.clone()
    }

    /// Ends the agent. Monitors, and with them Machines, go on; the next agent adopts them.
    pub async fn shutdown(mut self) {
        // It may have ended on its own, with an error that was told.
        let _ = self.stop.send(());
        if let Err(error) = (&mut self.supervisor.0).await {
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

    /// Sends the app of a started Machine a signal.
    pub async fn signal(&self, id: &MachineId, signo: i32) -> Result<(), CommandError> {
        let vm = self.started(id).await?;
        let outcome = vm.guest.ask(&Request::Signal { signo }, QUICK).await;
        outcome
            .map(drop)
            .map_err(|e| CommandError::Failed(e.to_string()))
    }

    /// Runs a command in a started Machine, beside its app.
    pub async fn exec(&self, id: &MachineId, request: ExecRequest) -> Result<Exec, CommandError> {
        let vm = self.started(id).await?;
        let outcome = vm.guest.exec(request).await;
        outcome.map_err(|e| CommandError::Failed(e.to_string()))
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
        let machines = self.shared.machines.read();
        let entry = machines.get(id);
        let entry = entry.ok_or_else(|| CommandError::Unknown(id.clone()))?;
        Ok(entry.state.clone())
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
        {
            let machines = self.shared.machines.read();
            let entry = machines.get(id);
            let entry = entry.ok_or_else(|| CommandError::Unknown(id.clone()))?;
            let message = Message::Command(source, order, reply);
            // A task that ends drops its messages, and the outcome then says so.
            let _ = entry.messages.send(message);
        }
        outcome.await.unwrap_or(Err(CommandError::ShuttingDown))
    }

    /// Waits until the agent has taken up a Machine that others see in the catalog already.
    async fn known(&self, id: &MachineId) {
        let mut rounds = self.shared.rounds.subscribe();
        let expected = || {
            let host = &self.shared.host;
            !self.shared.machines.read().contains_key(id)
                && host.machine(id).is_some_and(|m| m.host == host.config.host)
        };
        let taken_up = async { while expected() && rounds.changed().await.is_ok() {} };
        // One that cannot be taken up is unknown: why is in its status.
        let _ = tokio::time::timeout(TAKE_UP_TIME, taken_up).await;
    }

    fn vm(&self, id: &MachineId) -> Result<Arc<Vm>, CommandError> {
        let machines = self.shared.machines.read();
        let entry = machines.get(id);
        let entry = entry.ok_or_else(|| CommandError::Unknown(id.clone()))?;
        Ok(Arc::clone(&entry.vm))
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
    tasks: JoinSet<(MachineId, bool)>,
    /// Machines that are destroyed while the view still shows them, by when they were made.
    gone: HashMap<MachineId, jiff::Timestamp>,
}

/// A directory in the agent's own that belongs to no Machine.
type Leftover = std::path::PathBuf;

impl Supervisor {
    async fn run(mut self, mut stopped: oneshot::Receiver<()>) {
        let view = self.shared.host.view.clone();
        let mut changes = view.changes();
        loop {
            changes.mark_unchanged();
            self.reconcile(&view.snapshot()).await;
            self.shared.rounds.send_modify(|rounds| *rounds += 1);
            tokio::select! {
                _ = &mut stopped => break,
                changed = changes.changed() => if changed.is_err() { break },
                Some(ended) = self.tasks.join_next() => self.ended(ended),
            }
        }
        // With their entries go the tasks' last senders; each writes what it has and ends.
        self.shared.machines.write().clear();
        while let Some(ended) = self.tasks.join_next().await {
            self.ended(ended);
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
        let mut new = Vec::new();
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
                    None => new.push(Arc::clone(machine)),
                }
            }
            for (id, entry) in machines.iter() {
                if snapshot.machines.get(id).is_none_or(|m| m.host != own) {
                    let _ = entry.messages.send(Message::Gone);
                }
            }
        }
        for machine in new {
            let status = snapshot.machine_status.get(&machine.id).cloned();
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
                self.tasks
                    .spawn(async move { (id, Task::run(beginning).await) });
            }
            Err(reason) => {
                tracing::error!(machine = %id, reason, "a Machine cannot be taken up");
                // Once per record: it is tried again when the record changes or the agent restarts.
                self.gone.insert(id, machine.created_at);
                let failed = refusal(&machine, status.as_deref(), reason);
                if let Err(error) = self.shared.catalog.put(&failed).await {
                    tracing::warn!(machine = %machine.id, %error, "a status cannot be written");
                }
            }
        }
    }

    fn ended(&mut self, ended: Result<(MachineId, bool), tokio::task::JoinError>) {
        match ended {
            Ok((id, destroyed)) => {
                let entry = self.shared.machines.write().remove(&id);
                if destroyed && let Some(entry) = entry {
                    self.gone.insert(id, entry.wanted.created_at);
                }
            }
            Err(error) => tracing::error!(%error, "a Machine's task has failed"),
        }
    }

    /// Removes what belongs to no Machine.
    async fn sweep(&self, leftovers: Vec<Leftover>) {
        let host = &self.shared.host;
        for path in leftovers {
            tracing::warn!(path = %path.display(), "removing what belongs to no Machine");
            let removed = async {
                if let Some(monitor) = Monitor::adopt(&path.join("vmm.pid"))? {
                    monitor.kill();
                    monitor.ended().await;
                }
                if let Some(name) = path.file_name().and_then(|n| n.to_str()) {
                    host.groups.remove(name)?;
                }
                fs::remove_dir_all(&path)
            };
            match removed.await {
                Ok(()) => host.metrics.leftovers.add(1),
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "it cannot be removed");
                }
            }
        }
        match host.network.sweep().await {
            Ok(removed) => host.metrics.leftovers.add(removed),
            Err(error) => tracing::error!(%error, "left over devices cannot be removed"),
        }
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
    let memo = match dir.memo().map_err(|e| e.to_string())? {
        Some(memo) => memo,
        None => {
            let slot = host.network.take_slot().map_err(|e| e.to_string())?;
            let memo = Memo {
                slot: slot.number(),
                instance_id: None,
                image_digest: None,
                boots: 0,
            };
            fs::create_dir_all(dir.path())
                .and_then(|()| dir.set_memo(&memo))
                .map_err(|e| format!("{}: {e}", dir.path().display()))?;
            memo
        }
    };
    let starting = status.is_some_and(|s| s.state == MachineState::Starting);
    let opened = Vm::open(Arc::clone(host), machine.id.clone(), memo, starting).await;
    let (vm, found) = opened.map_err(|e| e.to_string())?;
    if !matches!(found, Found::Nothing { .. }) {
        // Now, so that no wake has to wait for it. One that needs it tries again.
        if let Err(error) = vm.plug(machine).await {
            tracing::error!(machine = %machine.id, error, "the network cannot be set up");
        }
    }
    let adopted = match found {
        Found::Running { epoch } => Some(epoch),
        _ => None,
    };
    let now = std::time::Instant::now();
    let core = Core::new(Arc::clone(machine), status, vm.disk_instance(), found, now);
    let events = status.map(|s| s.events.clone()).unwrap_or_default();
    let (messages, received) = mpsc::unbounded_channel();
    let (state, states) = watch::channel(core.0.state());
    let beginning = Beginning {
        core,
        adopted,
        hands: Arc::clone(&vm) as Arc<dyn crate::machine::hands::Hands>,
        recorder: Recorder::new(shared.catalog.clone(), machine.id.clone(), events),
        checks: Checks::new(vm.ipv4(), Arc::clone(&host.metrics)),
        metrics: Arc::clone(&host.metrics),
        messages: received,
        state,
    };
    let entry = Entry {
        messages,
        state: states,
        vm,
        wanted: Arc::clone(machine),
    };
    Ok((entry, beginning))
}

/// What is told of a Machine that this host cannot look after.
fn refusal(machine: &Machine, status: Option<&MachineStatus>, reason: String) -> MachineStatus {
    MachineStatus {
        id: machine.id.clone(),
        state: MachineState::Failed,
        reason: Some(reason),
        generation: machine.desired.generation,
        instance_id: machine.instance_id.clone(),
        image_digest: None,
        events: status.map(|s| s.events.clone()).unwrap_or_default(),
        checks: Vec::new(),
        updated_at: jiff::Timestamp::now(),
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
fn survey(
    config: &HostConfig,
    snapshot: &Snapshot,
) -> Result<(Vec<Port>, Vec<Leftover>), AgentError> {
    let machines = config.machines_dir();
    let failed = io_at(&machines.display());
    let mut ports: Vec<Port> = Vec::new();
    let mut leftovers = Vec::new();
    for entry in fs::read_dir(&machines).map_err(&failed)? {
        let path = entry.map_err(&failed)?.path();
        let name = path
            .file_name()
            .and_then(|n| n.to_str())
            .unwrap_or_default();
        let machine = snapshot
            .machines
            .get(name)
            .filter(|m| m.host == config.host);
        let Some(machine) = machine else {
            // The snapshot is a whole picture of the catalog, so this is certain. What has not
            // the form of a Machine's id is somebody else's, and left alone.
            if name.parse::<MachineId>().is_ok() {
                leftovers.push(path);
            }
            continue;
        };
        let dir = MachineDir::new(&machines, &machine.id);
        let memo = dir.memo().map_err(&failed)?;
        let slot = memo.and_then(|memo| Slot::new(memo.slot));
        if let Some(slot) = slot {
            ports.push(network::port(slot, machine.private_ip, machine.network));
        }
    }
    Ok((ports, leftovers))
}

fn io_at(path: &dyn std::fmt::Display) -> impl Fn(io::Error) -> AgentError + use<> {
    let path = path.to_string();
    move |source| AgentError::Io {
        path: path.clone(),
        source,
    }
}
