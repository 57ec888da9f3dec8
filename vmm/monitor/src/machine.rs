//! The Machine: a guest with everything it is made of, and what can be done with it.
//!
//! ```text
//!  boot, restore ─► ready ──start──► running ◄──resume── paused ──snapshot──► (two files)
//!                                       └──────pause───────▲
//! ```
//!
//! One thread owns it and carries out one operation after the other. A pause stops, in this order, the
//! processors and the devices' workers; from then on nothing changes the guest's memory or state.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;
use serde::Serialize;

use crate::boot::{self, BootError, Entry, cpu, generation, layout, template};
use crate::bus::Bus;
use crate::config::{MIN_MEMORY_MIB, NetConfig, VmConfig};
use crate::jail::seccomp::ThreadKind;
use crate::jail::threads::Hand;
use crate::jail::{Jail, JailError};
use crate::kvm::{KvmError, Vm, call, pre_fault};
use crate::memory::{Memory, MemoryError};
use crate::run::Event;
use crate::serial::SerialPort;
use crate::snapshot::{self, MachineState, MemoryIndex, Opened, Refused, SingleFaults, WorkingSet};
use crate::trace::Trace;
use crate::vcpu::state::extra_xsave_words;
use crate::vcpu::{Vcpu, VcpuContext, VcpuError};
use crate::virtio::balloon::{self, Balloon};
use crate::virtio::block::Block;
use crate::virtio::net::{Net, tap::Tap, vhost::VhostNet};
use crate::virtio::rng::Rng;
use crate::virtio::transport::{Transport, TransportState};
use crate::virtio::vsock::Vsock;
use crate::virtio::{Device, DeviceState, Kind, Metrics};
use crate::wake::SharedWake;

/// A guest waits for its working set before it runs; after this time nothing more of it is begun. Some thousand pages of
/// a page cache take less, and it is less than a slow disk's answer is noticed.
const MAP_AHEAD: Duration = Duration::from_millis(25);

/// A guest.
#[derive(Debug)]
pub struct Machine {
    config: VmConfig,
    // Dropped in this order: the processors' threads first, what they use after them.
    vcpus: Vec<Vcpu>,
    bus: Arc<Bus>,
    vm: Vm,
    memory: Memory,
    /// The checksums of the memory file under `memory`, after a restore.
    memory_index: Option<MemoryIndex>,
    touched: Touched,
    /// Where it can be told to the page what the guest touches, and nothing was known before. Until the next pause: its end
    /// takes all that KVM has mapped into the guest, which a guest that runs would have to ask for again.
    singly: Option<SingleFaults>,
    /// So many runs of the last wake's pages were mapped before the guest ran.
    ready: usize,
    /// Maps the others in its first moments.
    prefetching: Option<Prefetching>,
    state: State,
    trace: Arc<Trace>,
}

/// What is known of the pages that the guest has touched since its restore.
///
/// ```text
/// boot ──► Unobserved        restore ──► Observing ──settle──► Observed ──► its next snapshot
/// ```
#[derive(Debug)]
enum Touched {
    /// It was not restored, or nobody could look, or that is left to the next wake.
    Unobserved,
    /// It is waking, and the pages of `before` are mapped meanwhile.
    Observing {
        wake: Arc<SharedWake>,
        before: Option<Arc<WorkingSet>>,
    },
    /// These were all.
    Observed(WorkingSet),
}

/// A thread that maps pages, and how it is told to leave off.
#[derive(Debug)]
struct Prefetching {
    hand: Hand<()>,
    enough: Arc<AtomicBool>,
}

impl Prefetching {
    fn hire() -> Result<Self, MachineError> {
        let mut hand = Hand::new("prefetch", ThreadKind::Prefetch);
        hand.hire().map_err(MachineError::Thread)?;
        let enough = Arc::default();
        Ok(Self { hand, enough })
    }
}

impl Drop for Prefetching {
    /// Its thread is waited for next, and from a slow disk the rest could take long.
    fn drop(&mut self) {
        self.enough.store(true, Ordering::Relaxed);
    }
}

/// What the guest is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Its processors run.
    Running,
    /// Nothing moves.
    Paused,
}

/// The answer to `GET /v1/vm`.
#[derive(Debug, Clone, Serialize)]
pub struct Description {
    /// The Machine's id.
    pub id: String,
    /// What it is doing.
    pub state: State,
    /// The monitor's process id in the host.
    pub pid: u32,
    /// Processors.
    pub vcpus: u8,
    /// Memory.
    pub memory_mib: u32,
    /// What of it the guest is to use, and what its balloon holds.
    #[serde(flatten)]
    pub balloon: BalloonSize,
    /// What each device has done since then, in the order of their windows.
    pub devices: Vec<DeviceDescription>,
    /// When this process began, in microseconds since 1970.
    pub started_unix_us: u64,
    /// Where the time of the start went.
    #[serde(serialize_with = "serialize_shared")]
    pub boot: Arc<Trace>,
}

/// One device in [`Description`].
#[derive(Debug, Clone, Serialize)]
pub struct DeviceDescription {
    /// Its kind, as threads are named.
    pub kind: &'static str,
    /// Its counters.
    #[serde(flatten)]
    pub metrics: Metrics,
}

impl DeviceDescription {
    fn of(transport: &Transport) -> Self {
        Self {
            kind: transport.kind().name(),
            metrics: transport.metrics().clone(),
        }
    }
}

/// How the guest's memory is limited while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct BalloonSize {
    /// What the host wants the guest to use at most, in MiB.
    pub memory_limit_mib: u32,
    /// What the guest has given away for that, in MiB. It gives slowly, and takes back what it must.
    pub balloon_mib: u32,
}

fn serialize_shared<S: serde::Serializer>(trace: &Trace, serializer: S) -> Result<S::Ok, S::Error> {
    trace.serialize(serializer)
}

/// What is called when the guest ends, and when it has answered after a wake.
pub type EventSink = Arc<dyn Fn(Event) + Send + Sync>;

/// Why a Machine does not start, or an operation fails.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM is missing or refuses.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The host has less than the configuration's CPU template.
    #[error(transparent)]
    Template(#[from] template::Lacking),
    /// Kernel or initramfs cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The walls around the monitor cannot be put up.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// No thread for a device, or for the prefetch.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    /// The control API cannot be served.
    #[error(transparent)]
    Control(crate::control::SpawnError),
    /// A processor's thread fails.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A device cannot be made.
    #[error("{what}: {source}")]
    Device {
        /// Which.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// The snapshot is not for this Machine, or is damaged.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The snapshot cannot be written.
    #[error("cannot write the snapshot to {path}: {source}")]
    Snapshot {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A limit beyond what the guest has, or less than it can live with.
    #[error("a memory limit must be {least} to {most} MiB")]
    MemoryLimit {
        /// The least.
        least: u32,
        /// All that the guest has.
        most: u32,
    },
    /// A snapshot is of a guest that does not move.
    #[error("the Machine is running; pause it first")]
    NotPaused,
}

impl Machine {
    /// Loads a guest that is about to execute its first instruction.
    pub fn boot(
        mut config: VmConfig,
        jail: &Jail,
        trace: Arc<Trace>,
        events: EventSink,
    ) -> Result<Self, MachineError> {
        // Making a VM takes about as long as reading a kernel, and neither needs the other.
        let (vm, loaded) = beside(&trace, || -> Result<_, MachineError> {
            let memory = Memory::anonymous(config.memory_bytes())?;
            trace.mark("memory");
            let devices = new_devices(&config)?;
            trace.mark("devices");
            let entry = boot::load(&config, &memory, devices.len())?;
            trace.mark("kernel_loaded");
            let serial = SerialPort::new(&config.serial_log).map_err(device_error("serial log"))?;
            jail.isolate()?;
            trace.mark("isolated");
            Ok((memory, devices, entry, serial))
        });
        let (mut vm, (memory, devices, entry, serial)) = (vm?, loaded?);
        vm.attach_memory(&memory)?;
        let transports = devices
            .into_iter()
            .map(|device| Transport::new(device, memory.ram().clone(), trace.clone()))
            .collect::<io::Result<Vec<_>>>()
            .map_err(device_error("virtio device"))?;
        let bus = connect(&vm, serial, transports)?;
        let fds = create_vcpus(&vm, config.vcpus)?;
        let mut shown = config.cpu_template.apply(vm.supported_cpuid())?;
        if !config.nested {
            template::hide_nesting(&mut shown);
        }
        for (id, fd) in fds.iter().enumerate() {
            set_up_vcpu(
                &shown,
                fd,
                id as u8,
                &config,
                (id == 0).then_some(entry),
                &memory,
            )?;
        }
        confine(jail, &mut config, &trace)?;
        let vcpus = spawn_vcpus(&vm, &bus, fds, &trace, &events)?;
        hire(&bus)?;
        trace.mark("vcpus");
        let state = State::Paused;
        Ok(Self {
            config,
            vcpus,
            bus,
            vm,
            memory,
            memory_index: None,
            touched: Touched::Unobserved,
            singly: None,
            ready: 0,
            prefetching: None,
            state,
            trace,
        })
    }

    /// Takes a guest from its snapshot.
    pub fn restore(
        mut config: VmConfig,
        jail: &Jail,
        trace: Arc<Trace>,
        events: EventSink,
    ) -> Result<Self, MachineError> {
        let wake = {
            let events = events.clone();
            let answered = Box::new(move || events(Event::Answered));
            Arc::new(SharedWake::new(trace.clone(), answered))
        };
        let (vm, loaded) = beside(&trace, || -> Result<_, MachineError> {
            let opened = snapshot::open(&config, &trace)?;
            trace.mark("snapshot_checked");
            let devices = restored_devices(&config, &opened, &wake)?;
            trace.mark("devices");
            let serial = SerialPort::restore(&config.serial_log, &opened.machine.serial)
                .map_err(device_error("serial log"))?;
            jail.isolate()?;
            trace.mark("isolated");
            Ok((opened, devices, serial))
        });
        let (mut vm, (opened, devices, serial)) = (vm?, loaded?);
        let Opened {
            machine,
            memory,
            index,
            working_set,
        } = opened;
        generation::renew(memory.ram())?;
        vm.attach_memory(&memory)?;
        trace.mark("memory_attached");
        let transports = devices
            .into_iter()
            .zip(&machine.devices)
            .enumerate()
            .map(|(index, (device, state))| {
                Transport::restore(device, state, memory.ram().clone(), trace.clone())
                    .map_err(|source| refused_device(index, state.kind, source))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let bus = connect(&vm, serial, transports)?;
        trace.mark("devices_connected");
        let fds = create_vcpus(&vm, config.vcpus)?;
        trace.mark("vcpus_created");
        let extra = extra_xsave_words(vm.fd());
        for (fd, state) in fds.iter().zip(&machine.vcpus) {
            state
                .check_processor(vm.supported_cpuid())
                .map_err(Refused::Processor)?;
            state.restore(fd, extra).map_err(Refused::Kvm)?;
        }
        trace.mark("vcpus_restored");
        vm.restore(&machine.vm).map_err(Refused::Kvm)?;
        generation::announce(vm.fd())?;
        trace.mark("state_restored");
        // One that is old is dropped, to be taken anew.
        let working_set = working_set.filter(|set| !set.is_old());
        let singly = match &working_set {
            None if vm.can_pre_fault() => fault_singly(&memory),
            _ => None,
        };
        let ready = map_ahead(&vm, &fds, &memory, working_set.as_ref(), &trace);
        confine(jail, &mut config, &trace)?;
        let vcpus = spawn_vcpus(&vm, &bus, fds, &trace, &events)?;
        hire(&bus)?;
        let prefetching = match &working_set {
            Some(set) if ready < set.runs() => Some(Prefetching::hire()?),
            _ => None,
        };
        trace.mark("vcpus");
        let state = State::Paused;
        Ok(Self {
            config,
            vcpus,
            bus,
            vm,
            memory,
            memory_index: Some(index),
            touched: Touched::Observing {
                wake,
                before: working_set.map(Arc::new),
            },
            singly,
            ready,
            prefetching,
            state,
            trace,
        })
    }

    /// Runs a Machine that is ready or paused; one that runs goes on.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        if self.state == State::Running {
            return Ok(());
        }
        if let Touched::Observing { wake, .. } = &self.touched {
            wake.begin();
        }
        // Network cards before the processors: on them is whoever woke the guest, and a frame that waits there is
        // the first that it sees. The others after them: nothing is lost meanwhile.
        self.resume_devices(|kind| kind == Kind::Net);
        self.bus.serial().raise_pending();
        for vcpu in &self.vcpus {
            vcpu.run()?;
        }
        self.resume_devices(|kind| kind != Kind::Net);
        self.prefetch();
        self.state = State::Running;
        Ok(())
    }

    fn resume_devices(&self, which: impl Fn(Kind) -> bool) {
        let transports = self.bus.transports();
        for mut transport in transports.filter(|transport| which(transport.kind())) {
            transport.resume();
        }
    }

    /// Stops everything; a Machine that is paused stays so.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        if self.state == State::Paused {
            return Ok(());
        }
        // The last chance, for a guest that hardly ran.
        self.settle();
        let parking: Vec<_> = self
            .vcpus
            .iter()
            .map(Vcpu::pause)
            .collect::<Result<_, _>>()?;
        for vcpu in parking {
            vcpu.wait()?;
        }
        for mut transport in self.bus.transports() {
            transport.pause();
        }
        self.bus.serial().flush_line();
        self.singly = None;
        self.state = State::Paused;
        Ok(())
    }

    /// Has the pages mapped that the guest needed when it last woke and that are not yet, while it runs already:
    /// where there is more than one processor they are there before it comes to them, and else it is not held up.
    fn prefetch(&mut self) {
        let Touched::Observing {
            before: Some(set), ..
        } = &self.touched
        else {
            return;
        };
        let Some(Prefetching { hand, enough }) = &mut self.prefetching else {
            return self.trace.mark("prefetched"); // by `map_ahead`
        };
        let (set, memory, trace) = (set.clone(), self.memory.clone(), self.trace.clone());
        let (done, enough) = (self.ready, enough.clone());
        let begun = hand.begin(move || match set.prefetch(&memory, done, &enough) {
            Ok(()) => trace.mark("prefetched"),
            Err(error) => tracing::warn!(%error, "the working set is not prefetched"),
        });
        if let Err(error) = begun {
            tracing::warn!(%error, "the working set is not prefetched");
        }
    }

    /// Takes down what a restored guest has touched until now, once: its wake is over.
    pub fn settle(&mut self) {
        let Touched::Observing { wake, before } = &self.touched else {
            return;
        };
        let answered = wake.end();
        self.prefetching = None;
        let set = match before {
            // Mapped beforehand it looks touched, with pages around it: it tells no more than it did.
            Some(set) if self.vm.can_pre_fault() => Ok(set.kept(answered)),
            before => WorkingSet::observe(&self.memory, before.as_deref())
                .map(|set| Some(set.of_reply(answered))),
        };
        match set {
            Ok(set) => {
                let pages = set.as_ref().map(WorkingSet::pages);
                tracing::debug!(pages, "the working set of this wake");
                self.trace.mark("working_set_taken");
                self.touched = set.map_or(Touched::Unobserved, Touched::Observed);
            }
            Err(error) => {
                tracing::warn!(%error, "the working set of this wake is not known");
                self.touched = Touched::Unobserved;
            }
        }
    }

    /// When [`Self::settle`] will have something to do, as it looks now: the first reply brings it nearer, the
    /// first request moves it away.
    pub fn wake_ends_at(&self) -> Option<Instant> {
        match &self.touched {
            Touched::Observing { wake, .. } => wake.ends_at(),
            _ => None,
        }
    }

    /// Writes a snapshot of a paused Machine.
    pub fn snapshot(&mut self) -> Result<(), MachineError> {
        if self.state != State::Paused {
            return Err(MachineError::NotPaused);
        }
        let path = &self.config.snapshot_dir;
        let failed = |source| MachineError::Snapshot {
            path: path.clone(),
            source,
        };
        let vcpus = self
            .vcpus
            .iter()
            .map(|vcpu| vcpu.save().map(|state| *state));
        let machine = MachineState {
            vcpus: vcpus.collect::<Result<_, _>>()?,
            vm: self.vm.save()?,
            serial: self.bus.serial().save(),
            devices: self
                .bus
                .transports()
                .map(|transport| transport.save())
                .collect::<io::Result<_>>()
                .map_err(failed)?,
        };
        let working_set = match &self.touched {
            Touched::Observed(set) => Some(set),
            _ => None,
        };
        let index = self.memory_index.as_mut();
        snapshot::write(&self.config, &machine, &self.memory, index, working_set).map_err(failed)
    }

    /// Asks the guest to use no more than `mib` of its memory. It is asked through its balloon, and takes
    /// its time.
    pub fn limit_memory(&mut self, mib: u32) -> Result<(), MachineError> {
        let (least, most) = (MIN_MEMORY_MIB, self.config.memory_mib);
        if !(least..=most).contains(&mib) {
            return Err(MachineError::MemoryLimit { least, most });
        }
        let pages = (most - mib) * balloon::PAGES_PER_MIB;
        for mut transport in self.bus.transports() {
            if transport.kind() == Kind::Balloon {
                transport.set_config(balloon::TARGET.start, &pages.to_le_bytes());
            }
        }
        Ok(())
    }

    fn balloon_size(&self) -> BalloonSize {
        let all = self.config.memory_mib;
        let mut size = BalloonSize {
            memory_limit_mib: all,
            balloon_mib: 0,
        };
        for transport in self.bus.transports() {
            if transport.kind() == Kind::Balloon {
                let mib = |part| balloon::mib(transport.config(), part);
                size.memory_limit_mib = all.saturating_sub(mib(balloon::TARGET));
                // The guest writes this: never more than there is.
                size.balloon_mib = mib(balloon::ACTUAL).min(all);
            }
        }
        size
    }

    /// What it is and does; `pid` is this process, as the host numbers it.
    pub fn describe(&self, pid: u32) -> Description {
        Description {
            id: self.config.id.clone(),
            state: self.state,
            pid,
            vcpus: self.config.vcpus,
            memory_mib: self.config.memory_mib,
            balloon: self.balloon_size(),
            devices: self
                .bus
                .transports()
                .map(|t| DeviceDescription::of(&t))
                .collect(),
            started_unix_us: self.trace.started_unix_micros(),
            boot: self.trace.clone(),
        }
    }

    /// The serial port, for what is left of its last line at the end.
    pub fn flush_console(&self) {
        self.bus.serial().flush_line();
    }
}

/// Makes the devices' threads.
fn hire(bus: &Bus) -> Result<(), MachineError> {
    let hired = bus
        .transports()
        .try_for_each(|mut transport| transport.hire());
    hired.map_err(MachineError::Thread)
}

/// The last step before there are threads: everything is open.
fn confine(jail: &Jail, config: &mut VmConfig, trace: &Trace) -> Result<(), JailError> {
    jail.drop_privileges()?;
    config.snapshot_dir = jail.inside(&config.snapshot_dir);
    trace.mark("confined");
    Ok(())
}

/// Creates the VM in a thread of its own while `work` goes on in this one.
fn beside<T>(trace: &Trace, work: impl FnOnce() -> T) -> (Result<Vm, KvmError>, T) {
    thread::scope(|scope| {
        let create = || {
            let vm = Vm::create(trace);
            trace.mark("kvm");
            vm
        };
        let aside = thread::Builder::new()
            .stack_size(crate::THREAD_STACK_BYTES)
            .spawn_scoped(scope, create);
        let done = work();
        let vm = match aside {
            Ok(thread) => thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            // Without a thread it only takes longer.
            Err(_) => create(),
        };
        (vm, done)
    })
}

/// The devices in the order of their windows: disks, network cards, vsock, randomness, balloon.
fn new_devices(config: &VmConfig) -> Result<Vec<Box<dyn Device>>, MachineError> {
    let mut devices: Vec<Box<dyn Device>> = Vec::new();
    for (index, disk) in config.disks.iter().enumerate() {
        let block = Block::open(disk, index)
            .map_err(device_error(&format!("disk {}", disk.path.display())))?;
        devices.push(Box::new(block));
    }
    for nic in &config.net {
        devices.push(open_nic(nic, None)?);
    }
    if let Some(vsock) = &config.vsock {
        let device =
            Vsock::new(vsock).map_err(device_error(&format!("vsock {}", vsock.path.display())))?;
        devices.push(Box::new(device));
    }
    devices.push(Box::new(Rng::default()));
    devices.push(Box::new(Balloon::default()));
    Ok(devices)
}

/// A network card by whichever moves its frames. A snapshot does not know which it was. Of a guest that wakes the
/// frames are looked at, where they can be.
fn open_nic(
    nic: &NetConfig,
    wake: Option<&Arc<SharedWake>>,
) -> Result<Box<dyn Device>, MachineError> {
    let tap = Tap::open(&nic.tap).map_err(device_error(&format!("TAP device {}", nic.tap)))?;
    if !nic.vhost {
        let net = Net::new(tap, nic.mac).limited(nic);
        return Ok(Box::new(match wake {
            Some(wake) => net.waking(wake.clone()),
            None => net,
        }));
    }
    let card = VhostNet::open(tap, nic.mac).map_err(device_error(&format!(
        "vhost-net of TAP device {}",
        nic.tap
    )))?;
    Ok(Box::new(card))
}

/// The same devices, each checked against what the guest knew of it.
fn restored_devices(
    config: &VmConfig,
    opened: &Opened,
    wake: &Arc<SharedWake>,
) -> Result<Vec<Box<dyn Device>>, MachineError> {
    let states = &opened.machine.devices;
    let expected = config.disks.len() + config.net.len() + usize::from(config.vsock.is_some()) + 2;
    if states.len() != expected || opened.machine.vcpus.len() != usize::from(config.vcpus) {
        return Err(Refused::Shape {
            found: states.len(),
            expected,
            found_vcpus: opened.machine.vcpus.len(),
            expected_vcpus: config.vcpus.into(),
        }
        .into());
    }
    let (mut disks, mut nics) = (config.disks.iter(), config.net.iter());
    let mut devices: Vec<Box<dyn Device>> = Vec::new();
    for (index, TransportState { kind, device, .. }) in states.iter().enumerate() {
        let refused = |source| MachineError::from(refused_device(index, *kind, source));
        let gone = || refused(io::Error::other("this Machine does not have it"));
        devices.push(match device {
            DeviceState::Block(state) => {
                let disk = disks.next().ok_or_else(gone)?;
                let block = Block::open(disk, index)
                    .map_err(device_error(&format!("disk {}", disk.path.display())))?;
                block.check(state).map_err(refused)?;
                Box::new(block)
            }
            DeviceState::Net(state) => {
                let nic = nics.next().ok_or_else(gone)?;
                state.check(nic.mac).map_err(refused)?;
                open_nic(nic, Some(wake))?
            }
            DeviceState::Vsock(state) => {
                let vsock = config.vsock.as_ref().ok_or_else(gone)?;
                state.check(vsock).map_err(refused)?;
                let device = Vsock::restore(vsock)
                    .map_err(device_error(&format!("vsock {}", vsock.path.display())))?;
                Box::new(device)
            }
            DeviceState::Rng => Box::new(Rng::default()),
            DeviceState::Balloon(_) => Box::new(Balloon::default()),
        });
    }
    Ok(devices)
}

fn refused_device(index: usize, kind: Kind, source: io::Error) -> Refused {
    Refused::Device {
        index,
        kind: kind.name(),
        source,
    }
}

fn device_error(what: &str) -> impl FnOnce(io::Error) -> MachineError + use<> {
    let what = what.to_owned();
    move |source| MachineError::Device { what, source }
}

/// Connects serial port and devices to the VM's interrupts and notifications.
fn connect(
    vm: &Vm,
    serial: SerialPort,
    transports: Vec<Transport>,
) -> Result<Arc<Bus>, MachineError> {
    vm.fd()
        .register_irqfd(serial.interrupt(), layout::SERIAL_GSI)
        .map_err(call("KVM_IRQFD"))?;
    for (index, transport) in transports.iter().enumerate() {
        transport
            .connect(vm.fd(), index)
            .map_err(device_error("virtio device"))?;
    }
    Ok(Arc::new(Bus::new(serial, transports)))
}

/// So that what the guest touches can be told to the page. If not it is too many.
fn fault_singly(memory: &Memory) -> Option<SingleFaults> {
    let singly = SingleFaults::of(memory);
    if let Err(error) = &singly {
        tracing::debug!(%error, "faults map the pages around them too");
    }
    singly.ok()
}

/// Puts the pages of the last wake into the guest's page tables, where KVM can: how many runs of `set` are there.
fn map_ahead(
    vm: &Vm,
    vcpus: &[VcpuFd],
    memory: &Memory,
    set: Option<&WorkingSet>,
    trace: &Trace,
) -> usize {
    let (Some(set), Some(vcpu), true) = (set, vcpus.first(), vm.can_pre_fault()) else {
        return 0;
    };
    let deadline = Instant::now() + MAP_AHEAD;
    let is_late = || Instant::now() >= deadline;
    let done = set.map_ahead(memory, is_late, |start, len| pre_fault(vcpu, start, len));
    match done {
        Ok(done) => {
            tracing::debug!(done, of = set.runs(), "runs of the working set are mapped");
            trace.mark("working_set_mapped");
            done
        }
        Err(error) => {
            // It only takes longer.
            tracing::debug!(%error, "the working set is not mapped ahead");
            0
        }
    }
}

fn create_vcpus(vm: &Vm, count: u8) -> Result<Vec<VcpuFd>, KvmError> {
    (0..count)
        .map(|id| {
            vm.fd()
                .create_vcpu(id.into())
                .map_err(call("KVM_CREATE_VCPU"))
        })
        .collect()
}

/// The state of a processor at power-on; the boot processor also gets what its first instruction needs.
fn set_up_vcpu(
    shown: &CpuId,
    fd: &VcpuFd,
    id: u8,
    config: &VmConfig,
    entry: Option<Entry>,
    memory: &Memory,
) -> Result<(), MachineError> {
    let cpuid = cpu::cpuid(shown, id, config.vcpus);
    fd.set_cpuid2(&cpuid).map_err(call("KVM_SET_CPUID2"))?;
    fd.set_msrs(&cpu::boot_msrs())
        .map_err(call("KVM_SET_MSRS"))?;
    if let Some(entry) = entry {
        let mut sregs = fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        cpu::long_mode(memory.ram(), &mut sregs)?;
        fd.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
        fd.set_regs(&cpu::entry_registers(entry))
            .map_err(call("KVM_SET_REGS"))?;
    }
    Ok(())
}

fn spawn_vcpus(
    vm: &Vm,
    bus: &Arc<Bus>,
    fds: Vec<VcpuFd>,
    trace: &Arc<Trace>,
    events: &EventSink,
) -> Result<Vec<Vcpu>, MachineError> {
    let msrs_to_save: Arc<[u32]> = vm.msrs_to_save().into();
    let extra_xsave_words = extra_xsave_words(vm.fd());
    let spawn = |(id, fd): (usize, VcpuFd)| {
        let events = events.clone();
        let context = VcpuContext {
            bus: bus.clone(),
            events: Box::new(move |event| events(Event::Vcpu(event))),
            trace: trace.clone(),
            msrs_to_save: msrs_to_save.clone(),
            extra_xsave_words,
        };
        Ok(Vcpu::spawn(id as u8, fd, context)?)
    };
    fds.into_iter().enumerate().map(spawn).collect()
}
