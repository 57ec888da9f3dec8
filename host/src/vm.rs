//! The hands of one Machine's task: monitor, guest, disk, snapshot, network.
//!
//! The order of steps in a suspend and in a wake, and what a crash between two of them leaves behind, is
//! argued in [`dir`](crate::dir). Here is what its parts share:
//!
//! | module | what it does |
//! |---|---|
//! | `hands` | answers the task |
//! | `files` | what two of them share, where there are two for a while |
//! | `adopt` | finds what there is when the agent starts |
//! | `boot`, `wake` | starts, from the disk and from the snapshot |
//! | `sleep` | suspends, and secures a snapshot or makes it void |
//! | `status` | asks a Machine that runs |
//! | `end` | says how one has ended |

mod adopt;
mod boot;
mod end;
mod files;
mod hands;
mod sleep;
mod status;
mod wake;

use std::net::Ipv4Addr;
use std::sync::Arc;

use parking_lot::Mutex;
use tern_catalog::{Machine, MachineId, MachineState};
use tokio::sync::watch;

pub(crate) use self::files::AllFiles;
use self::files::Files;
pub use self::status::MemoryUse;
use crate::capacity::Share;
use crate::dir::{MachineDir, Memo};
use crate::guest::Guest;
use crate::host::Host;
use crate::logs::Logs;
use crate::machine::core::{Epoch, Found};
use crate::monitor::{Monitor, Start};
use crate::network::meter::{Meter, Services};
use crate::network::{Slot, bell};
use crate::running::Running;
use crate::trace::Marks;

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
    /// What the Machine has of the host while it runs, or is being started.
    share: Mutex<Option<Share>>,
    /// Starts of this epoch and before are not wanted any more.
    killed: watch::Sender<Epoch>,
    files: Arc<Files>,
    /// The frame that called the Machine while it slept.
    calling: Mutex<Option<bell::Frame>>,
    /// Whether a monitor that woke takes frames for its guest.
    reachable: watch::Sender<bool>,
    /// Counts calls over the private network while the Machine runs, once somebody wants to know.
    meter: Mutex<Metered>,
}

#[derive(Debug, Default)]
enum Metered {
    #[default]
    NotYet,
    By(Meter),
    /// It cannot be, which has been told.
    Never,
}

impl Vm {
    /// Takes up a Machine: finds what there is of it, and adopts a monitor that runs.
    pub(crate) async fn open(
        host: Arc<Host>,
        id: MachineId,
        memo: Memo,
        last: Option<MachineState>,
    ) -> std::io::Result<(Arc<Self>, Found)> {
        let dir = MachineDir::new(&host.config.machines_dir(), &id);
        let slot = Slot::new(memo.slot)
            .ok_or_else(|| std::io::Error::other(format!("{} is no slot", memo.slot)))?;
        let logs = Arc::new(Logs::new(dir.console_log(), Arc::clone(&host.metrics)));
        let vm = Arc::new(Self {
            slot,
            guest: Guest::new(&dir.vsock()),
            logs,
            memo: Mutex::new(memo),
            last_start: Mutex::default(),
            running: Mutex::default(),
            share: Mutex::default(),
            killed: watch::channel(0).0,
            files: host.files.of(&id),
            calling: Mutex::default(),
            reachable: watch::channel(false).0,
            meter: Mutex::default(),
            id,
            host,
            dir,
        });
        let found = vm.find(last).await?;
        Ok((vm, found))
    }

    /// The config that the disk belongs to.
    pub(crate) fn disk_instance(&self) -> Option<String> {
        self.memo.lock().instance_id.clone()
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

    /// Whether the Machine, if it runs, has been called over its private network since this was last asked.
    pub(crate) fn was_called(&self) -> bool {
        // Held throughout, so that none is opened for a monitor that has just ended.
        let running = self.running.lock();
        if running.is_none() {
            return false;
        }
        let mut meter = self.meter.lock();
        let called = match &*meter {
            Metered::NotYet => self.host.machine(&self.id).map_or(Ok(false), |machine| {
                *meter = Metered::By(Meter::open(self.slot, &Services::of(&machine))?);
                Ok(false)
            }),
            Metered::By(meter) => meter.take().map(|calls| calls > 0),
            Metered::Never => Ok(false),
        };
        called.unwrap_or_else(|error| {
            tracing::error!(machine = %self.id, %error, "private traffic does not keep it awake");
            *meter = Metered::Never;
            false
        })
    }

    /// The guest's address for IPv4.
    pub(crate) fn ipv4(&self) -> Ipv4Addr {
        self.slot.guest_v4()
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
        if let Some(machine) = self.host.machine(&self.id)
            && let Err(error) = crate::oom::rank(monitor.pid(), &machine.config.guest)
        {
            tracing::warn!(machine = %self.id, %error, "a monitor is not ranked by who dies first");
        }
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
        let files = Arc::clone(&self.files.turn);
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
            *self.share.lock() = None;
            self.reachable.send_replace(false);
            *self.meter.lock() = Metered::NotYet;
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(running) = self.running.lock().take() {
            running.leave();
        }
    }
}

fn told(error: std::io::Error) -> String {
    error.to_string()
}
