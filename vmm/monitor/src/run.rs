//! The life of a monitor: from the command line to the exit file.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use crate::bus::Power;
use crate::config::VmConfig;
use crate::control::{self, Command, ControlError, Request};
use crate::exit::{Exit, PidFile, Reason};
use crate::jail::Jail;
use crate::jail::seccomp::{self, ThreadKind};
use crate::machine::{EventSink, Machine, MachineError};
use crate::trace::Trace;
use crate::vcpu::VcpuEvent;

/// How long a stop waits for its own answer to be written.
const ANSWER_PATIENCE: Duration = Duration::from_secs(1);

/// What the main thread waits for.
#[derive(Debug)]
pub enum Event {
    /// The guest ended, or cannot go on.
    Vcpu(VcpuEvent),
    /// The control API asks for something.
    Request(Request),
    /// SIGTERM or SIGINT.
    Terminated,
    /// A guest that wakes has answered its first request: its wake ends sooner than was thought.
    Answered,
    /// The control API is gone.
    ControlFailed(String),
}

/// Why a monitor did not even begin: nothing of the Machine has been touched.
#[derive(Debug, thiserror::Error)]
#[error("cannot lock {path}: {source}")]
pub struct NotBegun {
    path: std::path::PathBuf,
    source: io::Error,
}

/// Runs a Machine to its end, and leaves `exit.json`.
///
/// SIGTERM and SIGINT must be blocked in every thread: see [`control::block_signals`].
pub fn run(config: VmConfig, jail: &Jail, restore: bool, trace: Trace) -> Result<Exit, NotBegun> {
    let pid_file = PidFile::acquire(&config.pid_file).map_err(|source| NotBegun {
        path: config.pid_file.clone(),
        source,
    })?;
    // From here on this Machine's files are ours: what a former monitor left is out of date.
    let _ = std::fs::remove_file(&config.exit_file);
    trace.mark("locked");
    let exit = live(&config, jail, restore, Arc::new(trace), pid_file.pid());
    tracing::info!(reason = ?exit.reason, message = exit.message, "ends");
    // From inside a jail they cannot be removed, and whoever starts the next monitor does.
    let _ = std::fs::remove_file(&config.control);
    if let Some(vsock) = &config.vsock {
        let _ = std::fs::remove_file(&vsock.path);
    }
    if let Err(error) = exit.write(&jail.inside(&config.exit_file)) {
        tracing::error!(path = %config.exit_file.display(), %error, "cannot write the exit file");
    }
    let _ = pid_file.release(); // the lock goes all the same
    Ok(exit)
}

fn live(config: &VmConfig, jail: &Jail, restore: bool, trace: Arc<Trace>, pid: u32) -> Exit {
    let (events, receiver) = channel();
    let error = |error: &dyn std::fmt::Display| Exit::new(Reason::Error, error.to_string());
    // The API's socket appears while the guest starts; requests wait for the Machine in its backlog.
    let socket = match prepare(config, jail) {
        Ok(socket) => socket,
        Err(cause) => return error(&format_args!("{cause:#}")),
    };
    trace.mark("control_bound");
    let sink = sink(events.clone());
    let made = if restore {
        Machine::restore(config.clone(), jail, trace.clone(), sink)
    } else {
        Machine::boot(config.clone(), jail, trace.clone(), sink)
    };
    // Threads are born with what this one has given up. Its own filter comes when all are.
    let started = made.and_then(|mut machine| {
        if let Err(cause) = control::spawn(socket, events) {
            return Err(MachineError::Control(cause));
        }
        seccomp::confine(ThreadKind::Main);
        machine.resume().map(|()| machine)
    });
    trace.mark("resumed");
    match started {
        Ok(mut machine) => {
            tracing::info!(id = config.id, restore, "runs");
            let exit = serve(&mut machine, &receiver, pid);
            machine.flush_console();
            exit
        }
        Err(error @ MachineError::Refused(_)) => {
            Exit::new(Reason::SnapshotRefused, error.to_string())
        }
        Err(error) => Exit::new(Reason::Error, error.to_string()),
    }
}

/// What is done before the guest is made, with all rights.
fn prepare(config: &VmConfig, jail: &Jail) -> anyhow::Result<control::Socket> {
    jail.join_cgroup()?;
    seccomp::prepare()?;
    Ok(control::bind(&config.control)?)
}

fn sink(events: Sender<Event>) -> EventSink {
    Arc::new(move |event| {
        // Without a receiver the monitor is ending already.
        let _ = events.send(event);
    })
}

/// Carries out one event after the other, until one of them is the last.
fn serve(machine: &mut Machine, events: &Receiver<Event>, pid: u32) -> Exit {
    loop {
        let event = match machine.wake_ends_at() {
            Some(end) => {
                let left = end.saturating_duration_since(Instant::now());
                match events.recv_timeout(left) {
                    Err(RecvTimeoutError::Timeout) => {
                        // Nobody tells when a request moves the end away.
                        if machine.wake_ends_at() == Some(end) {
                            machine.settle();
                        }
                        continue;
                    }
                    event => event.map_err(|_| RecvError),
                }
            }
            None => events.recv(),
        };
        match event {
            Ok(Event::Request(Request {
                command,
                reply,
                answered,
            })) => {
                reply.send(carry_out(machine, command, pid));
                if command == Command::Stop {
                    // Nothing is ever sent: this waits for the other end to be dropped.
                    let _ = answered.recv_timeout(ANSWER_PATIENCE);
                    return Exit::new(Reason::Stopped, "stopped by the control API");
                }
            }
            Ok(Event::Vcpu(VcpuEvent::Power(power))) => return power.into(),
            Ok(Event::Vcpu(VcpuEvent::Failed(message))) => {
                return Exit::new(Reason::Error, message);
            }
            Ok(Event::Answered) => {} // the new end is looked at above
            Ok(Event::Terminated) => return Exit::new(Reason::Stopped, "stopped by a signal"),
            Ok(Event::ControlFailed(message)) => return Exit::new(Reason::Error, message),
            Err(_) => return Exit::new(Reason::Error, "every thread of the monitor is gone"),
        }
    }
}

fn carry_out(
    machine: &mut Machine,
    command: Command,
    pid: u32,
) -> Result<control::Answer, ControlError> {
    let done = match command {
        Command::Describe => return Ok(control::Answer::Description(machine.describe(pid))),
        Command::Pause => machine.pause(),
        Command::Resume => machine.resume(),
        Command::Snapshot => machine.snapshot(),
        Command::LimitMemory(mib) => machine.limit_memory(mib),
        Command::Stop => Ok(()),
    };
    match done {
        Ok(()) => Ok(control::Answer::Done),
        Err(error @ MachineError::MemoryLimit { .. }) => {
            Err(ControlError::Invalid(error.to_string()))
        }
        Err(error @ MachineError::NotPaused) => Err(ControlError::Conflict(error.to_string())),
        Err(error) => {
            tracing::error!(?command, %error, "failed");
            Err(ControlError::Failed(error.to_string()))
        }
    }
}

impl From<Power> for Exit {
    fn from(power: Power) -> Self {
        match power {
            Power::Off => Self::new(Reason::GuestShutdown, "the guest powered off"),
            Power::Reset => Self::new(Reason::GuestReset, "the guest reset itself"),
            Power::TripleFault => {
                Self::new(Reason::GuestReset, "the guest reset by a triple fault")
            }
        }
    }
}
