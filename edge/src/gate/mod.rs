//! The gate of one host: counts, admits, wakes.
//!
//! What is decided is the [`ledger`]'s, one for each app. Here are its hands: the lock around it, the clock, the view that
//! it is fed from, the tasks that start Machines, and the futures of those that wait.

mod admission;
mod early;
mod ledger;
mod reach;
mod starting;
mod waiting;

use std::collections::HashMap;
use std::net::TcpStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use parking_lot::{Mutex, RwLock};
use tern_catalog::{
    AppName, HostId, Machine, MachineId, MachineStatus, Revision, ServiceProtocol, Snapshot, View,
};
use thiserror::Error;
use tokio::sync::{Notify, oneshot, watch};

use crate::control::{MachineControl, StartError};
use crate::metrics::Metrics;
pub use admission::Admission;
use early::Silent;
use ledger::{Act, Arrival, Facts, Ledger, Now, Offer, Port, Slot};
pub use reach::is_shortage;
use starting::Starting;
use waiting::Waiting;

/// The gate. Clones share it.
#[derive(Clone)]
pub struct Gate(Arc<Inner>);

struct Inner {
    shared: Arc<Shared>,
    apps: RwLock<HashMap<AppName, Arc<AppGate>>>,
}

/// What the gates of all apps have in common.
struct Shared {
    view: View,
    /// Whose Machines these are. Others' cannot be reached or woken from here yet.
    host: HostId,
    control: Arc<dyn MachineControl>,
    metrics: Arc<Metrics>,
    wake_timeout: Duration,
    /// Where starts run: they go on whatever becomes of the thread that asked for one.
    runtime: tokio::runtime::Handle,
    /// Requests that wait.
    waiting: AtomicU32,
    /// Clients that were wrongly expected to ask for something.
    silent: Silent,
}

/// One app's part of the gate.
struct AppGate {
    app: AppName,
    shared: Arc<Shared>,
    core: Mutex<Core>,
    /// Requests that wait.
    waiting: AtomicU32,
    /// Early wakes that have brought no request yet, or did not lately.
    early: AtomicU32,
    /// Told when a Machine that leaves may have no requests any more.
    seen_off: Notify,
}

struct Core {
    ledger: Ledger<Teller>,
    /// What the ledger was told of the view.
    revision: Option<Revision>,
    known: HashMap<MachineId, Known>,
}

struct Known {
    machine: Arc<Machine>,
    status: Option<Arc<MachineStatus>>,
    at: Revision,
}

type Outcome = Result<Admission, Refused>;
type Teller = oneshot::Sender<Outcome>;

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

/// Requests that may wait at once, of all apps and of one: more are refused at once. One app's storm leaves room
/// for others'.
const MAX_WAITING: u32 = 65_536;
const MAX_WAITING_OF_APP: u32 = 16_384;

impl Gate {
    /// A gate that admits to the Machines of a host. Starts run on the caller's runtime.
    pub fn new(
        host: HostId,
        view: View,
        control: Arc<dyn MachineControl>,
        metrics: Arc<Metrics>,
        wake_timeout: Duration,
    ) -> Self {
        let changes = view.changes();
        let runtime = tokio::runtime::Handle::current();
        let inner = Arc::new(Inner {
            shared: Arc::new(Shared {
                host,
                view,
                control,
                metrics,
                wake_timeout,
                runtime: runtime.clone(),
                waiting: AtomicU32::new(0),
                silent: Silent::default(),
            }),
            apps: RwLock::default(),
        });
        runtime.spawn(follow(Arc::downgrade(&inner), changes));
        Self(inner)
    }

    /// A place at a Machine of the app, for its service on this internal port. Waits for room and for a
    /// start, up to the wake timeout.
    pub async fn admit(&self, app: &AppName, port: u16, protocol: ServiceProtocol) -> Outcome {
        let app = self.app(app);
        let number = port;
        let port = Port { number, protocol };
        let outcome = match app.arrive(port) {
            Arrived::Granted(admission) => return Ok(admission),
            Arrived::Refused(refused) => Err(refused),
            Arrived::Waits(waiting) => {
                let begun = Instant::now();
                let outcome = waiting.outcome().await;
                app.shared.metrics.waits.add(begun.elapsed());
                outcome
            }
        };
        if matches!(outcome, Err(Refused::AtCapacity)) {
            app.shared.metrics.at_capacity.add();
        }
        outcome
    }

    fn app(&self, name: &AppName) -> Arc<AppGate> {
        if let Some(app) = self.0.apps.read().get(name) {
            return Arc::clone(app);
        }
        let mut apps = self.0.apps.write();
        let app = apps.entry(name.clone()).or_insert_with(|| {
            Arc::new(AppGate {
                app: name.clone(),
                shared: Arc::clone(&self.0.shared),
                core: Mutex::new(Core {
                    ledger: Ledger::new(),
                    revision: None,
                    known: HashMap::new(),
                }),
                waiting: AtomicU32::new(0),
                early: AtomicU32::new(0),
                seen_off: Notify::new(),
            })
        });
        Arc::clone(app)
    }

    fn app_of(&self, machine: &MachineId) -> Option<Arc<AppGate>> {
        let snapshot = self.0.shared.view.snapshot();
        Some(self.app(&snapshot.machines.get(machine)?.app))
    }

    /// Whether the Machine has been of no use to anybody for `idle`: it is believed asleep from now on, and the next
    /// request waits for its start. `last_use` is by whom the gate does not see.
    pub(crate) fn lay_down(
        &self,
        machine: &Machine,
        idle: Duration,
        last_use: Option<Instant>,
    ) -> bool {
        let app = self.app(&machine.app);
        app.with(|core, now, _| core.ledger.lay_down(&machine.id, idle, last_use, now))
    }

    /// Somebody is about to put the Machine to sleep: it is believed asleep from now on, and the next request waits
    /// for its start. Returns when those that it has have ended.
    pub(crate) async fn see_off(&self, id: &MachineId) {
        let Some(app) = self.app_of(id) else {
            return;
        };
        if !app.with(|core, now, acts| core.ledger.depart(id, now, acts)) {
            return;
        }
        loop {
            let ended = app.seen_off.notified();
            tokio::pin!(ended);
            // Registered before looking, so that none that ends in between is missed.
            ended.as_mut().enable();
            if !app.core.lock().ledger.has_earlier(id) {
                return;
            }
            ended.await;
        }
    }

    /// Putting it to sleep ended: it sleeps from now on, or is not known to.
    pub(crate) fn laid_down(&self, id: &MachineId, sleeps: bool) {
        if let Some(app) = self.app_of(id) {
            app.with(|core, now, acts| core.ledger.laid_down(id, sleeps, now, acts));
        }
    }

    /// Whether the Machine is believed to run, and how many requests it has.
    pub(crate) fn load(&self, machine: &Machine) -> (bool, u32) {
        let app = self.app(&machine.app);
        app.with(|core, _, _| core.ledger.load(&machine.id))
    }

    /// Forgets apps that are no more.
    pub(crate) fn forget_others(&self, snapshot: &Snapshot) {
        let is_needed = |app: &Arc<AppGate>| {
            snapshot.machines_of(&app.app).next().is_some()
                || Arc::strong_count(app) > 1
                || !app.with(|core, _, _| core.ledger.is_empty())
        };
        self.0.apps.write().retain(|_, app| is_needed(app));
    }

    pub(crate) fn control(&self) -> &Arc<dyn MachineControl> {
        &self.0.shared.control
    }

    pub(crate) fn view(&self) -> &View {
        &self.0.shared.view
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.0.shared.metrics
    }
}

/// Tells apps in which somebody waits what has changed. Others look when somebody comes.
async fn follow(gate: Weak<Inner>, mut changes: watch::Receiver<Revision>) {
    while changes.changed().await.is_ok() {
        let Some(gate) = gate.upgrade() else {
            return;
        };
        let apps = gate.apps.read();
        let waited = apps
            .values()
            .filter(|a| a.waiting.load(Ordering::SeqCst) > 0);
        let waited: Vec<_> = waited.map(Arc::clone).collect();
        drop(apps);
        for app in waited {
            app.with(|_, _, _| ());
        }
    }
}

enum Arrived {
    Granted(Admission),
    Waits(Waiting),
    Refused(Refused),
}

impl AppGate {
    /// Has the ledger do something, with what the view says now, and does what it asks for.
    fn with<R>(
        self: &Arc<Self>,
        call: impl FnOnce(&mut Core, Now, &mut Vec<Act<Teller>>) -> R,
    ) -> R {
        let mut acts = Vec::new();
        let done = {
            let mut core = self.core.lock();
            let now = now();
            // Taken under the lock: nobody is told of an older one after a newer.
            core.sync(self, &self.shared.view.snapshot(), now, &mut acts);
            call(&mut core, now, &mut acts)
        };
        self.perform(acts, None);
        done
    }

    fn arrive(self: &Arc<Self>, port: Port) -> Arrived {
        let may_wait = self.waiting.load(Ordering::Relaxed) < MAX_WAITING_OF_APP
            && self.shared.waiting.load(Ordering::Relaxed) < MAX_WAITING;
        let mut told = None;
        let arrival = self.with(|core, now, acts| {
            let tell = || {
                let (tell, outcome) = oneshot::channel();
                told = Some(outcome);
                tell
            };
            let arrival = core.ledger.arrive(port, now, may_wait, tell, acts);
            if matches!(arrival, Arrival::Waits(_)) {
                self.waiting.fetch_add(1, Ordering::SeqCst);
                self.shared.waiting.fetch_add(1, Ordering::SeqCst);
            }
            arrival
        });
        match (arrival, told) {
            (Arrival::Granted(grant), _) => Arrived::Granted(Admission::new(self, grant, None)),
            (Arrival::Waits(ticket), Some(outcome)) => {
                // What has changed before it counted as one that waits is told to nobody else.
                self.with(|_, _, _| ());
                Arrived::Waits(Waiting::new(self, port, ticket, outcome))
            }
            (Arrival::Refused(refused), _) => Arrived::Refused(refused),
            // Who waits has said how to tell it.
            (Arrival::Waits(_), None) => Arrived::Refused(Refused::Nobody),
        }
    }

    /// Does what the ledger asks for. `first` is a connection that a start has made, for the first that is sent there.
    fn perform(
        self: &Arc<Self>,
        acts: Vec<Act<Teller>>,
        mut first: Option<(TcpStream, Slot, Port)>,
    ) {
        for act in acts {
            match act {
                Act::Grant(tell, grant) => {
                    let fits = |(_, slot, port): &mut _| (*slot, *port) == (grant.slot, grant.port);
                    let stream = first.take_if(fits).map(|(stream, ..)| stream);
                    // Who has gone meanwhile gives the place back by dropping it.
                    let _ = tell.send(Ok(Admission::new(self, grant, stream)));
                }
                Act::Refuse(tell, why) => {
                    let _ = tell.send(Err(why));
                }
                Act::Start(start) => {
                    // In a task of its own: whoever asked may go away before it is done.
                    let starting = Starting {
                        app: Arc::clone(self),
                        start,
                        is_told: false,
                    };
                    self.shared.runtime.spawn(starting.run());
                }
                Act::SeenOff => self.seen_off.notify_waiters(),
                Act::Alarm(at) => {
                    let app = Arc::clone(self);
                    self.shared.runtime.spawn(async move {
                        tokio::time::sleep_until(at.into()).await;
                        app.with(|core, now, acts| core.ledger.tick(now, acts));
                    });
                }
            }
        }
    }
}

impl Core {
    /// Tells the ledger what has changed in the view.
    fn sync(&mut self, app: &AppGate, snapshot: &Snapshot, now: Now, acts: &mut Vec<Act<Teller>>) {
        let revision = snapshot.revision;
        if self.revision == Some(revision) {
            return;
        }
        self.revision = Some(revision);
        let mut changed = false;
        let all = snapshot.machines_of(&app.app);
        for (machine, status) in all.filter(|(machine, _)| machine.host == app.shared.host) {
            if let Some(known) = self.known.get_mut(&machine.id) {
                known.at = revision;
                if known.is(machine, status) {
                    continue;
                }
            }
            changed = true;
            self.ledger.sync(&machine.id, facts(machine, status), now);
            let known = Known {
                machine: Arc::clone(machine),
                status: status.map(Arc::clone),
                at: revision,
            };
            self.known.insert(machine.id.clone(), known);
        }
        self.known.retain(|id, known| {
            let stays = known.at == revision;
            if !stays {
                changed = true;
                self.ledger.forget(id);
            }
            stays
        });
        if changed {
            self.ledger.tick(now, acts);
        }
    }
}

impl Known {
    fn is(&self, machine: &Arc<Machine>, status: Option<&Arc<MachineStatus>>) -> bool {
        let same = match (&self.status, status) {
            (Some(known), Some(status)) => Arc::ptr_eq(known, status),
            (None, None) => true,
            _ => false,
        };
        same && Arc::ptr_eq(&self.machine, machine)
    }
}

fn facts(machine: &Machine, status: Option<&Arc<MachineStatus>>) -> Facts {
    use tern_catalog::DesiredState::{Created, Destroyed};
    let wanted = !matches!(machine.desired.state, Destroyed { .. } | Created);
    let services = machine.config.services.iter().map(|service| {
        let hard = service.concurrency.hard_limit.unwrap_or(u32::MAX);
        Offer {
            port: Port {
                number: service.internal_port,
                protocol: service.protocol,
            },
            autostart: service.autostart,
            soft: service.concurrency.soft().max(1).min(hard),
            hard,
        }
    });
    Facts {
        address: machine.private_ip,
        instance: machine.instance_id.clone(),
        eligible: wanted && !machine.cordoned && status.is_none_or(|s| s.state.can_serve()),
        seen: status.map(|s| (s.state, s.updated_at)),
        offers: services.collect(),
    }
}

fn now() -> Now {
    Now {
        at: Instant::now(),
        wall: Timestamp::now(),
    }
}
