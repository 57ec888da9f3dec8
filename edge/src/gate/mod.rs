//! The gate of one host: counts, admits, wakes.
//!
//! What a Machine is believed to be, and what changes the belief:
//!
//! ```text
//!            view says started          wake asked for
//!   Unknown ◄──────────────── Asleep ◄──────┐ ┌──────────► Waking
//!      │  view says it sleeps    ▲          │ │               │ accepts
//!      └─────────────────────────┘    put to sleep,           ▼
//!                                   or a connection failed ─ Ready
//! ```
//!
//! Being wrong is cheap on purpose: a Machine wrongly believed asleep is asked to start, which it answers
//! at once; one wrongly believed awake fails to connect, and is asked to start then. A Machine that wakes may
//! accept, and be Ready, before its host calls it started.

mod choose;
mod ready;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use parking_lot::Mutex;
use tern_catalog::{
    AppName, Machine, MachineId, MachineState, MachineStatus, Service, ServiceProtocol, Snapshot,
    View,
};
use thiserror::Error;
use tokio::sync::{Notify, watch};

use crate::control::{MachineControl, StartError};
use crate::metrics::Metrics;
use choose::{Candidate, Choice, choose};

/// The gate. Clones share it.
#[derive(Clone)]
pub struct Gate(Arc<Inner>);

struct Inner {
    view: View,
    control: Arc<dyn MachineControl>,
    metrics: Arc<Metrics>,
    wake_timeout: Duration,
    /// Where starts run: they go on whatever becomes of the thread that asked for one.
    runtime: tokio::runtime::Handle,
    machines: Mutex<HashMap<MachineId, Entry>>,
    /// Told whenever a request ends.
    ended: Notify,
    /// The same by app, for those that wait for room.
    rooms: Mutex<HashMap<AppName, Arc<Room>>>,
    /// Requests that wait for room.
    waiting: AtomicU32,
}

struct Entry {
    belief: Belief,
    in_flight: u32,
    last_active: Instant,
    /// Counts wakes and departures: connections of an earlier life are not used again.
    epoch: u64,
    /// Requests of earlier lives that are still with it.
    earlier: u32,
    /// Where the app was found to listen on a port.
    found: HashMap<u16, SocketAddr>,
}

enum Belief {
    Unknown,
    Ready { since: Timestamp },
    Asleep { since: Timestamp },
    Waking(watch::Receiver<Option<Result<(), StartError>>>),
}

/// A place at a Machine; given back when dropped.
pub struct Admission {
    gate: Gate,
    app: AppName,
    /// The Machine.
    pub machine: MachineId,
    /// Where its app listens.
    pub address: SocketAddr,
    /// Connections are only used again within one epoch.
    pub epoch: u64,
}

/// Why a request was not admitted.
#[derive(Debug, Clone, Error)]
pub enum Refused {
    /// Nobody to send it to.
    #[error("the app has no Machine that runs or may be started")]
    Nobody,
    /// All are full, and stayed so.
    #[error("all Machines of the app are at their limit")]
    AtCapacity,
    /// None could be started; the last one's reason.
    #[error("no Machine of the app could be started: {0}")]
    NotStarted(StartError),
}

/// Requests that may wait for room at once, of all apps and of one: more are refused at once. One app's storm leaves room
/// for others'.
const MAX_WAITING: u32 = 40_000;
const MAX_WAITING_OF_APP: u32 = 10_000;

/// Where those wait that found an app full.
#[derive(Default)]
struct Room {
    made: Arc<Notify>,
    waiting: AtomicU32,
}

impl Gate {
    /// A gate that admits to the Machines of this view. Starts run on the caller's runtime.
    pub fn new(
        view: View,
        control: Arc<dyn MachineControl>,
        metrics: Arc<Metrics>,
        wake_timeout: Duration,
    ) -> Self {
        let machines = Mutex::default();
        Self(Arc::new(Inner {
            view,
            control,
            metrics,
            wake_timeout,
            runtime: tokio::runtime::Handle::current(),
            machines,
            ended: Notify::new(),
            rooms: Mutex::default(),
            waiting: AtomicU32::new(0),
        }))
    }

    /// A place at a Machine of the app, for its service on this internal port. Waits for room and for a
    /// start, up to the wake timeout.
    pub async fn admit(
        &self,
        app: &AppName,
        port: u16,
        protocol: ServiceProtocol,
    ) -> Result<Admission, Refused> {
        let deadline = tokio::time::Instant::now() + self.0.wake_timeout;
        let mut failed: Vec<MachineId> = Vec::new();
        let mut last = Refused::Nobody;
        loop {
            let mut taken = self.take(&self.0.view.snapshot(), app, port, protocol, &failed);
            let mut waiting = None;
            if matches!(taken, Taken::Full) {
                let room = self.room(app);
                let made = Arc::clone(&room.made);
                let Some(place) = Waiting::join(&self.0.waiting, room) else {
                    self.0.metrics.at_capacity.add();
                    return Err(Refused::AtCapacity);
                };
                let mut room = Box::pin(made.notified_owned());
                // Registered before looking again, so that room made in between is not missed.
                room.as_mut().enable();
                let mut changes = self.0.view.changes();
                changes.mark_unchanged();
                taken = self.take(&self.0.view.snapshot(), app, port, protocol, &failed);
                waiting = Some((place, room, changes));
            }
            match taken {
                Taken::Admitted(admission) => return Ok(admission),
                Taken::MustWake(mut admission) => {
                    match tokio::time::timeout_at(
                        deadline,
                        self.wake(&admission.machine, admission.address, protocol),
                    )
                    .await
                    {
                        Ok(Ok((epoch, address))) => {
                            admission.epoch = epoch;
                            admission.address = address;
                            return Ok(admission);
                        }
                        Ok(Err(error)) => last = Refused::NotStarted(error),
                        Err(_) => {
                            let text =
                                format!("it took longer than {} s", self.0.wake_timeout.as_secs());
                            failed.push(admission.machine.clone());
                            // One that runs may have room meanwhile.
                            let snapshot = self.0.view.snapshot();
                            return match self.take(&snapshot, app, port, protocol, &failed) {
                                Taken::Admitted(admission) => Ok(admission),
                                _ => Err(Refused::NotStarted(StartError { text })),
                            };
                        }
                    }
                    failed.push(admission.machine.clone());
                }
                Taken::Full => {
                    let Some((_place, room, mut changes)) = waiting else {
                        continue;
                    };
                    let made = async {
                        tokio::select! {
                            () = room => {}
                            _ = changes.changed() => {}
                        }
                    };
                    if tokio::time::timeout_at(deadline, made).await.is_err() {
                        self.0.metrics.at_capacity.add();
                        return Err(Refused::AtCapacity);
                    }
                }
                Taken::Nobody => return Err(last),
            }
        }
    }

    /// Where those wait that found an app full.
    fn room(&self, app: &AppName) -> Arc<Room> {
        let mut rooms = self.0.rooms.lock();
        Arc::clone(rooms.entry(app.clone()).or_default())
    }

    /// A connection to the Machine failed: it may not be what it was believed to be.
    pub fn doubt(&self, machine: &MachineId) {
        if let Some(entry) = self.0.machines.lock().get_mut(machine)
            && !matches!(entry.belief, Belief::Waking(_))
        {
            entry.belief = Belief::Asleep {
                since: Timestamp::now(),
            };
        }
    }

    fn take(
        &self,
        snapshot: &Snapshot,
        app: &AppName,
        port: u16,
        protocol: ServiceProtocol,
        failed: &[MachineId],
    ) -> Taken {
        let mut machines = self.0.machines.lock();
        let mut addresses = HashMap::new();
        let mut candidates = Vec::new();
        for (machine, status) in snapshot.machines_of(app) {
            let Some(service) =
                service_of(machine, port, protocol).filter(|_| eligible(machine, status))
            else {
                continue;
            };
            if failed.contains(&machine.id) {
                continue;
            }
            let says_started = status.is_some_and(|s| s.state == MachineState::Started);
            let entry = machines
                .entry(machine.id.clone())
                .or_insert_with(Entry::new);
            let private = SocketAddr::new(IpAddr::V6(machine.private_ip), port);
            addresses.insert(machine.id.clone(), private);
            candidates.push(Candidate {
                id: machine.id.clone(),
                // One that may not be started is tried as long as its host says it runs.
                awake: entry.is_awake(status.map(|s| &**s)) || (!service.autostart && says_started),
                autostart: service.autostart,
                in_flight: entry.in_flight,
                soft: service.concurrency.soft(),
                hard: service.concurrency.hard_limit,
            });
        }
        let choice = choose(&candidates);
        let (Choice::Admit(id) | Choice::Wake(id)) = &choice else {
            let full = choice == Choice::Wait;
            return if full { Taken::Full } else { Taken::Nobody };
        };
        let (Some(entry), Some(&private)) = (machines.get_mut(id), addresses.get(id)) else {
            return Taken::Nobody;
        };
        // Those that wait for a start count too: the Machine will have them all at once.
        entry.in_flight += 1;
        entry.last_active = Instant::now();
        let admitted = matches!(choice, Choice::Admit(_));
        let found = entry.found.get(&port).filter(|_| admitted);
        let admission = Admission {
            gate: self.clone(),
            app: app.clone(),
            machine: id.clone(),
            address: found.copied().unwrap_or(private),
            epoch: entry.epoch,
        };
        if admitted {
            Taken::Admitted(admission)
        } else {
            Taken::MustWake(admission)
        }
    }

    /// Starts a Machine, once however many ask, and waits until its app accepts connections. Tells the
    /// epoch that begins with it, and where to connect to.
    async fn wake(
        &self,
        id: &MachineId,
        address: SocketAddr,
        protocol: ServiceProtocol,
    ) -> Result<(u64, SocketAddr), StartError> {
        let mut outcome = {
            let mut machines = self.0.machines.lock();
            let entry = machines.entry(id.clone()).or_insert_with(Entry::new);
            match &entry.belief {
                // One whose start was given up, by a panic, is begun anew.
                Belief::Waking(outcome)
                    if outcome.has_changed().is_ok() || outcome.borrow().is_some() =>
                {
                    outcome.clone()
                }
                _ => {
                    let (tell, outcome) = watch::channel(None);
                    entry.belief = Belief::Waking(outcome.clone());
                    // In a task of its own: whoever asked first may go away before it is done.
                    let start = self.clone().start(id.clone(), address, protocol, tell);
                    self.0.runtime.spawn(start);
                    outcome
                }
            }
        };
        let ended = outcome.wait_for(Option::is_some).await;
        let broken = || StartError {
            text: "the start was given up".to_owned(),
        };
        ended.map_err(|_| broken())?.clone().ok_or_else(broken)??;
        let machines = self.0.machines.lock();
        let entry = machines.get(id).ok_or_else(broken)?;
        let found = entry.found.get(&address.port());
        Ok((entry.epoch, found.copied().unwrap_or(address)))
    }

    async fn start(
        self,
        id: MachineId,
        address: SocketAddr,
        protocol: ServiceProtocol,
        tell: watch::Sender<Option<Result<(), StartError>>>,
    ) {
        let inner = &self.0;
        inner.metrics.wakes.add();
        let begun = Instant::now();
        let outcome = tokio::time::timeout(
            inner.wake_timeout,
            self.started(&id, address, protocol),
        )
        .await
        .unwrap_or_else(|_| {
            let text = format!(
                "its app did not accept connections on port {} within {} s; it must listen on :: \
                     or 0.0.0.0",
                address.port(),
                inner.wake_timeout.as_secs()
            );
            Err(StartError { text })
        });
        match &outcome {
            Ok(at) => {
                inner.metrics.wake_durations.add(begun.elapsed());
                tracing::debug!(machine = %id, %at, millis = begun.elapsed().as_millis(), "woken")
            }
            Err(error) => {
                inner.metrics.wake_failures.add();
                tracing::warn!(machine = %id, %error, "not woken");
            }
        }
        if let Some(entry) = inner.machines.lock().get_mut(&id) {
            let since = Timestamp::now();
            entry.epoch += u64::from(outcome.is_ok());
            entry.last_active = Instant::now();
            entry.belief = if let Ok(at) = outcome {
                if protocol == ServiceProtocol::Tcp {
                    entry.found.insert(at.port(), at);
                }
                Belief::Ready { since }
            } else {
                Belief::Asleep { since }
            };
        }
        tell.send_replace(Some(outcome.map(drop)));
    }

    /// Starts a Machine, and tells where its app accepts connections. Whoever connects early need not wait until its
    /// host has heard from the guest: only the guest itself can accept. Should the start fail after that, the view
    /// tells, or a connection that fails.
    async fn started(
        &self,
        id: &MachineId,
        address: SocketAddr,
        protocol: ServiceProtocol,
    ) -> Result<SocketAddr, StartError> {
        let control = &self.0.control;
        if protocol == ServiceProtocol::Udp {
            // Nothing says that somebody listens: it is ready when it runs.
            return control.start(id).await.map(|()| address);
        }
        let done = Notify::new();
        let accepted = async {
            tokio::select! {
                () = control.reachable(id) => {}
                () = done.notified() => {}
            }
            let ipv4 = control.ipv4(id).map(IpAddr::V4);
            let ipv4 = ipv4.map(|ip| SocketAddr::new(ip, address.port()));
            let addresses: Vec<_> = [address].into_iter().chain(ipv4).collect();
            ready::accepts(&addresses).await
        };
        tokio::pin!(accepted);
        tokio::select! {
            at = &mut accepted => return Ok(at),
            started = control.start(id) => started?,
        }
        done.notify_one(); // kept for it, should it not listen yet
        Ok(accepted.await)
    }

    /// Whether the Machine has been of no use to anybody for `idle`: it is believed asleep from now on, and the next
    /// request waits for its start. `last_use` is by whom the gate does not see.
    pub(crate) fn lay_down(
        &self,
        id: &MachineId,
        idle: Duration,
        last_use: Option<Instant>,
        status: &MachineStatus,
    ) -> bool {
        let mut machines = self.0.machines.lock();
        let entry = machines.entry(id.clone()).or_insert_with(Entry::new);
        let last_use = last_use.map_or(entry.last_active, |at| at.max(entry.last_active));
        let quiet =
            entry.in_flight == 0 && last_use.elapsed() >= idle && entry.is_awake(Some(status));
        if quiet {
            entry.belief = Belief::Asleep {
                since: Timestamp::now(),
            };
        }
        quiet
    }

    /// Somebody is about to put the Machine to sleep: it is believed asleep from now on, and the next request waits
    /// for its start. Returns when those that it has have ended.
    pub(crate) async fn see_off(&self, id: &MachineId) {
        {
            let mut machines = self.0.machines.lock();
            let entry = machines.entry(id.clone()).or_insert_with(Entry::new);
            if matches!(entry.belief, Belief::Waking(_)) {
                // Its requests wait for a start, and that may wait for this.
                return;
            }
            entry.belief = Belief::Asleep {
                since: Timestamp::now(),
            };
            entry.epoch += 1;
            entry.earlier = entry.in_flight;
        }
        loop {
            let ended = self.0.ended.notified();
            tokio::pin!(ended);
            // Registered before looking, so that none that ends in between is missed.
            ended.as_mut().enable();
            if self
                .0
                .machines
                .lock()
                .get(id)
                .is_none_or(|e| e.earlier == 0)
            {
                return;
            }
            ended.await;
        }
    }

    /// Putting it to sleep ended: it sleeps from now on, or is not known to.
    pub(crate) fn laid_down(&self, id: &MachineId, sleeps: bool) {
        if let Some(entry) = self.0.machines.lock().get_mut(id)
            && matches!(entry.belief, Belief::Asleep { .. })
        {
            entry.last_active = Instant::now();
            entry.belief = if sleeps {
                Belief::Asleep {
                    since: Timestamp::now(),
                }
            } else {
                Belief::Unknown
            };
        }
    }

    /// Whether the Machine is believed to run, and how many requests it has.
    pub(crate) fn load(&self, id: &MachineId, status: Option<&MachineStatus>) -> (bool, u32) {
        let mut machines = self.0.machines.lock();
        let entry = machines.entry(id.clone()).or_insert_with(Entry::new);
        (entry.is_awake(status), entry.in_flight)
    }

    /// Forgets Machines that are no more.
    pub(crate) fn forget_others(&self, snapshot: &Snapshot) {
        // Where nobody waits.
        self.0
            .rooms
            .lock()
            .retain(|_, room| Arc::strong_count(room) > 1);
        self.0
            .machines
            .lock()
            .retain(|id, entry| entry.in_flight > 0 || snapshot.machines.contains_key(id));
    }

    pub(crate) fn control(&self) -> &Arc<dyn MachineControl> {
        &self.0.control
    }

    pub(crate) fn view(&self) -> &View {
        &self.0.view
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }
}

/// A place among those that wait, given up when dropped.
struct Waiting<'a> {
    all: &'a AtomicU32,
    room: Arc<Room>,
}

impl<'a> Waiting<'a> {
    fn join(all: &'a AtomicU32, room: Arc<Room>) -> Option<Self> {
        let of_app = room.waiting.fetch_add(1, Ordering::SeqCst);
        let of_all = all.fetch_add(1, Ordering::SeqCst);
        // Counted in any case, and given back when dropped.
        let place = Self { all, room };
        (of_app < MAX_WAITING_OF_APP && of_all < MAX_WAITING).then_some(place)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.all.fetch_sub(1, Ordering::SeqCst);
        self.room.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

enum Taken {
    Admitted(Admission),
    MustWake(Admission),
    Full,
    Nobody,
}

impl Entry {
    fn new() -> Self {
        Self {
            belief: Belief::Unknown,
            in_flight: 0,
            last_active: Instant::now(),
            epoch: 0,
            earlier: 0,
            found: HashMap::new(),
        }
    }

    /// Whether it runs, by what we did ourselves and what its host says since.
    fn is_awake(&mut self, status: Option<&MachineStatus>) -> bool {
        let started = status.is_some_and(|s| s.state == MachineState::Started);
        let news = |since: &Timestamp| status.filter(|s| s.updated_at > *since);
        match &self.belief {
            Belief::Unknown => started,
            Belief::Waking(_) => false,
            Belief::Ready { since } => {
                if news(since).is_some_and(|s| sleeps(s.state)) {
                    self.belief = Belief::Unknown;
                    return false;
                }
                true
            }
            Belief::Asleep { since } => {
                if news(since).is_some_and(|s| s.state == MachineState::Started) {
                    // Somebody else woke it: its time without requests begins now.
                    self.last_active = Instant::now();
                    self.belief = Belief::Unknown;
                    return true;
                }
                false
            }
        }
    }
}

fn sleeps(state: MachineState) -> bool {
    use MachineState::{Created, Failed, Stopped, Stopping, Suspended, Suspending};
    matches!(
        state,
        Created | Stopping | Stopped | Suspending | Suspended | Failed
    )
}

fn eligible(machine: &Machine, status: Option<&Arc<MachineStatus>>) -> bool {
    use tern_catalog::DesiredState::{Created, Destroyed};
    let wanted = !matches!(machine.desired.state, Destroyed { .. } | Created);
    wanted && !machine.cordoned && status.is_none_or(|s| s.state.can_serve())
}

/// A Machine's service on this internal port.
fn service_of(machine: &Machine, port: u16, protocol: ServiceProtocol) -> Option<&Service> {
    let mut services = machine.config.services.iter();
    services.find(|s| s.internal_port == port && s.protocol == protocol)
}

impl Drop for Admission {
    fn drop(&mut self) {
        if let Some(entry) = self.gate.0.machines.lock().get_mut(&self.machine) {
            entry.in_flight = entry.in_flight.saturating_sub(1);
            if self.epoch < entry.epoch {
                entry.earlier = entry.earlier.saturating_sub(1);
            }
            entry.last_active = Instant::now();
        }
        self.gate.0.ended.notify_waiters();
        // Who joined before this Machine had room is seen here, who joins now finds the room.
        if self.gate.0.waiting.load(Ordering::SeqCst) > 0
            && let Some(room) = self.gate.0.rooms.lock().get(&self.app)
        {
            // All of the app: one that waits for another of its ports must not swallow the only call.
            room.made.notify_waiters();
        }
    }
}
