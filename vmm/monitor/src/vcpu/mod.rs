//! A virtual processor: one thread that enters the guest and answers its exits.
//!
//! ```text
//!            Run                      Pause, or the guest's end
//!   parked ───────► running (KVM_RUN) ───────────────────────► parked
//!     │ Save, Quit
//! ```
//!
//! The machine's owner talks to the thread by a channel; a kick (a signal) brings it out of the guest to
//! read it. A thread parks only where KVM itself reported an interruption, which is after it has
//! finished any I/O instruction that was half done: so a parked processor can always be saved.

pub mod features;
pub mod state;

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::sync::{Arc, Once};
use std::thread::{self, JoinHandle};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::bus::{Bus, Power};
use crate::jail::seccomp::{self, ThreadKind};
use crate::kvm::KvmError;
use crate::trace::Trace;
use state::VcpuState;

/// What a processor tells the machine's owner.
#[derive(Debug)]
pub enum VcpuEvent {
    /// The guest ended by its own act.
    Power(Power),
    /// The guest can not go on.
    Failed(String),
}

/// What a vCPU thread works with.
pub struct VcpuContext {
    /// Where its port and memory accesses go.
    pub bus: Arc<Bus>,
    /// Where the guest's end is reported.
    pub events: Box<dyn Fn(VcpuEvent) + Send>,
    /// Marked at the first entry into the guest.
    pub trace: Arc<Trace>,
    /// What a snapshot must hold besides the plain registers.
    pub msrs_to_save: Arc<[u32]>,
    /// See [`state::extra_xsave_words`].
    pub extra_xsave_words: usize,
}

/// The owner's side of one processor.
#[derive(Debug)]
pub struct Vcpu {
    id: u8,
    commands: Sender<Command>,
    immediate_exit: ImmediateExit,
    /// Ends with the descriptor, which so lives until the thread is joined.
    thread: Option<JoinHandle<VcpuFd>>,
}

enum Command {
    Run,
    Pause(SyncSender<()>),
    Save(SyncSender<Result<Box<VcpuState>, KvmError>>),
}

/// Why a processor does not answer.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// No thread for it.
    #[error("cannot start the thread of vCPU {0}: {1}")]
    Spawn(u8, io::Error),
    /// Its thread is gone.
    #[error("the thread of vCPU {0} is gone")]
    Gone(u8),
    /// KVM would not give its state.
    #[error("vCPU {0}: {1}")]
    Kvm(u8, KvmError),
}

impl Vcpu {
    /// Starts the thread of a processor whose state is set; it stays parked until [`Vcpu::run`].
    pub fn spawn(id: u8, mut fd: VcpuFd, context: VcpuContext) -> Result<Self, VcpuError> {
        install_kick_handler();
        let immediate_exit = ImmediateExit::of(&mut fd);
        let (commands, receiver) = channel();
        let thread = thread::Builder::new()
            .name(format!("vcpu{id}"))
            .stack_size(crate::THREAD_STACK_BYTES)
            .spawn(move || {
                seccomp::confine(ThreadKind::Vcpu);
                Runner {
                    id,
                    fd,
                    context,
                    commands: receiver,
                }
                .park()
            })
            .map_err(|error| VcpuError::Spawn(id, error))?;
        Ok(Self {
            id,
            commands,
            immediate_exit,
            thread: Some(thread),
        })
    }

    /// Enters the guest.
    pub fn run(&self) -> Result<(), VcpuError> {
        self.send(Command::Run)
    }

    /// Asks the thread to park; [`Parking::wait`] for it after all were asked.
    pub fn pause(&self) -> Result<Parking, VcpuError> {
        let (parked, receiver) = sync_channel(1);
        self.send(Command::Pause(parked))?;
        self.kick();
        Ok(Parking {
            id: self.id,
            receiver,
        })
    }

    /// Saves a parked processor.
    pub fn save(&self) -> Result<Box<VcpuState>, VcpuError> {
        let (reply, receiver) = sync_channel(1);
        self.send(Command::Save(reply))?;
        receiver
            .recv()
            .map_err(|_| VcpuError::Gone(self.id))?
            .map_err(|error| VcpuError::Kvm(self.id, error))
    }

    fn send(&self, command: Command) -> Result<(), VcpuError> {
        self.commands
            .send(command)
            .map_err(|_| VcpuError::Gone(self.id))
    }

    /// Brings the thread out of `KVM_RUN`, or keeps it from entering, exactly once.
    fn kick(&self) {
        self.immediate_exit.set();
        if let Some(thread) = &self.thread {
            // SAFETY: the thread has not been joined, so its pthread id is valid; the signal has a
            // handler that does nothing.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
        }
    }
}

impl Drop for Vcpu {
    /// Ends the thread: a closed channel is the command to quit.
    fn drop(&mut self) {
        (self.commands, _) = channel();
        self.kick();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by the process's panic hook.
            let _ = thread.join();
        }
    }
}

/// A processor on its way to being parked.
#[derive(Debug)]
pub struct Parking {
    id: u8,
    receiver: Receiver<()>,
}

impl Parking {
    /// Returns when the thread is parked.
    pub fn wait(self) -> Result<(), VcpuError> {
        self.receiver.recv().map_err(|_| VcpuError::Gone(self.id))
    }
}

struct Runner {
    id: u8,
    fd: VcpuFd,
    context: VcpuContext,
    commands: Receiver<Command>,
}

enum Step {
    /// Go on.
    Continue,
    /// Look for commands: KVM was interrupted.
    Interrupted,
    /// Park: the guest is over.
    Over,
}

impl Runner {
    fn park(mut self) -> VcpuFd {
        while let Ok(command) = self.commands.recv() {
            match command {
                Command::Run => {
                    if !self.run() {
                        break;
                    }
                }
                Command::Pause(parked) => {
                    let _ = parked.send(()); // whoever asked may have given up
                }
                Command::Save(reply) => {
                    let state = VcpuState::save(
                        &self.fd,
                        self.context.extra_xsave_words,
                        &self.context.msrs_to_save,
                    );
                    let _ = reply.send(state.map(Box::new));
                }
            }
        }
        self.fd
    }

    /// Runs the guest until it is to park; false if the thread is to end.
    fn run(&mut self) -> bool {
        self.context.trace.mark("first_vcpu_run");
        let mut exits = false;
        loop {
            let step = self.step();
            if !exits {
                exits = true;
                self.context.trace.mark("first_exit");
            }
            match step {
                Step::Continue => {}
                Step::Over => return true,
                Step::Interrupted => {
                    // Cleared before the channel is read: whoever sends after this read sets it again.
                    self.fd.set_kvm_immediate_exit(0);
                    match self.commands.try_recv() {
                        Ok(Command::Pause(parked)) => {
                            let _ = parked.send(());
                            return true;
                        }
                        // It runs already; and only a parked processor can be saved, so the asker is
                        // told by its closed channel.
                        Ok(Command::Run | Command::Save(_)) | Err(TryRecvError::Empty) => {}
                        Err(TryRecvError::Disconnected) => return false,
                    }
                }
            }
        }
    }

    fn step(&mut self) -> Step {
        let bus = &self.context.bus;
        let failure = match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                bus.port_read(port, data);
                return Step::Continue;
            }
            Ok(VcpuExit::IoOut(port, data)) => match bus.port_write(port, data) {
                None => return Step::Continue,
                Some(power) => {
                    (self.context.events)(VcpuEvent::Power(power));
                    return Step::Over;
                }
            },
            Ok(VcpuExit::MmioRead(address, data)) => {
                bus.mmio_read(address, data);
                return Step::Continue;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                bus.mmio_write(address, data);
                return Step::Continue;
            }
            Ok(VcpuExit::Intr) => return Step::Interrupted,
            Ok(VcpuExit::Shutdown) => {
                (self.context.events)(VcpuEvent::Power(Power::TripleFault));
                return Step::Over;
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                let event = match kind {
                    kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => VcpuEvent::Power(Power::Off),
                    kvm_bindings::KVM_SYSTEM_EVENT_RESET => VcpuEvent::Power(Power::Reset),
                    other => VcpuEvent::Failed(format!("the guest crashed (system event {other})")),
                };
                (self.context.events)(event);
                return Step::Over;
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                format!("cannot enter the guest on host CPU {cpu}: hardware reason {reason:#x}")
            }
            Ok(VcpuExit::InternalError) => {
                // SAFETY: the exit reason says which member of the union is set.
                let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
                format!("KVM cannot run the guest on (internal error {suberror})")
            }
            Ok(other) => format!("KVM stopped for an unknown reason: {other:?}"),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return Step::Interrupted;
            }
            Err(error) => format!("KVM_RUN: {error}"),
        };
        (self.context.events)(VcpuEvent::Failed(format!("vCPU {}: {failure}", self.id)));
        Step::Over
    }
}

/// The byte of the shared `kvm_run` page that makes `KVM_RUN` return at once.
#[derive(Debug, Clone, Copy)]
struct ImmediateExit(NonNull<AtomicU8>);

// SAFETY: the pointee is one byte that is only accessed atomically here, and by the kernel.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn of(fd: &mut VcpuFd) -> Self {
        Self(NonNull::from(&mut fd.get_kvm_run().immediate_exit).cast())
    }

    /// Only called by [`Vcpu`], before it joins the thread that owns the descriptor.
    fn set(self) {
        // SAFETY: the page is mapped as long as the `VcpuFd` lives, and that is the runner's until it
        // is the thread's result, which nobody takes before the join. (A panic of the thread, which
        // would drop it, ends the process: the panic hook sees to it.)
        unsafe { self.0.as_ref() }.store(1, Ordering::SeqCst);
    }
}

/// The kick only has to interrupt `KVM_RUN`: its handler does nothing, but must exist.
fn install_kick_handler() {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if let Err(error) = register_signal_handler(SIGRTMIN(), ignore) {
            tracing::error!(%error, "no handler for the signal that interrupts vCPUs");
        }
    });
}
