//! The task that owns one Machine.
//!
//! It takes inputs one after the other, asks the [core](super::core) what they lead to, and has the
//! [hands](super::hands) do it. Every operation runs beside it and comes back as an input, so the
//! task itself never waits for anything but the next input.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tern_catalog::{Machine, MachineState};
use tokio::sync::{mpsc, oneshot, watch};

use super::core::{Action, Core, Epoch, Event, Input, Order, Waiter};
use super::hands::{Hands, WakeFailure};
use super::recorder::Recorder;
use super::{CommandError, Source};
use crate::activity::Activity;
use crate::checks::Checks;
use crate::metrics::Metrics;

/// What a task is told by others.
pub(crate) enum Message {
    /// The record in the catalog.
    Wanted(Arc<Machine>),
    /// A command, and where its outcome goes.
    Command(Source, Order, oneshot::Sender<Result<(), CommandError>>),
}

/// The task that owns one Machine.
pub(crate) struct Task {
    core: Core,
    hands: Arc<dyn Hands>,
    recorder: Recorder,
    checks: Checks,
    metrics: Arc<Metrics>,
    activity: Arc<Activity>,
    messages: mpsc::UnboundedReceiver<Message>,
    /// What watches of monitors tell.
    told: (mpsc::UnboundedSender<Input>, mpsc::UnboundedReceiver<Input>),
    operations: FuturesUnordered<Operation>,
    /// Listens, while the Machine is suspended, whether private traffic calls it.
    call: Option<Call>,
    waiting: HashMap<Waiter, oneshot::Sender<Result<(), CommandError>>>,
    next_waiter: Waiter,
    state: watch::Sender<MachineState>,
}

type Operation = Pin<Box<dyn Future<Output = Input> + Send>>;
type Call = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What a task begins with.
pub(crate) struct Beginning {
    pub(crate) core: (Core, Vec<Action>),
    /// The monitor that was found running.
    pub(crate) adopted: Option<Epoch>,
    pub(crate) hands: Arc<dyn Hands>,
    pub(crate) recorder: Recorder,
    pub(crate) checks: Checks,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) activity: Arc<Activity>,
    pub(crate) messages: mpsc::UnboundedReceiver<Message>,
    pub(crate) state: watch::Sender<MachineState>,
}

impl Task {
    /// Runs until the Machine is destroyed, or nobody can send messages any more. Returns whether
    /// it was destroyed.
    pub(crate) async fn run(beginning: Beginning) -> bool {
        let (core, actions) = beginning.core;
        let mut task = Self {
            core,
            hands: beginning.hands,
            recorder: beginning.recorder,
            checks: beginning.checks,
            metrics: beginning.metrics,
            activity: beginning.activity,
            messages: beginning.messages,
            told: mpsc::unbounded_channel(),
            operations: FuturesUnordered::new(),
            call: None,
            waiting: HashMap::new(),
            next_waiter: 0,
            state: beginning.state,
        };
        if let Some(epoch) = beginning.adopted {
            // Whatever is wanted of it: it may be leaving the state it was found in already.
            task.watch(epoch);
        }
        task.act(actions);
        while task.core.state() != MachineState::Destroyed {
            let Some(input) = task.next().await else {
                break;
            };
            if let Input::Up { epoch, .. } | Input::Woken { epoch, .. } = input {
                // Even if nobody wants it any more: then its end is waited for.
                task.watch(epoch);
            }
            if matches!(input, Input::Up { .. }) {
                task.checks.reset();
            }
            let actions = task.step(input);
            task.act(actions);
        }
        let destroyed = task.core.state() == MachineState::Destroyed;
        for (_, waiting) in task.waiting.drain() {
            // Who has gone away does not hear it.
            let _ = waiting.send(Err(CommandError::ShuttingDown));
        }
        drop(task.operations);
        task.recorder.finish().await;
        destroyed
    }

    fn step(&mut self, input: Input) -> Vec<Action> {
        let idle_end = match input {
            Input::Command {
                waiter,
                source: Source::Proxy,
                order: Order::Suspend | Order::Stop(_),
            } => Some(waiter),
            _ => None,
        };
        let activity = Arc::clone(&self.activity);
        if let Some(waiter) = idle_end {
            // Who begins a session meanwhile finds the Machine on its way to sleep.
            let stepped = activity.unless_in_session(|| self.step_core(input));
            return stepped.unwrap_or_else(|| {
                let why = "somebody is in the Machine".to_owned();
                let outcome = Err(CommandError::Refused(why));
                vec![Action::Answer { waiter, outcome }]
            });
        }
        let wished = matches!(
            input,
            Input::Wanted(_)
                | Input::Command {
                    order: Order::Start,
                    ..
                }
        );
        let before = self.core.state();
        let actions = self.step_core(input);
        let started = self.core.state() == MachineState::Started && before != MachineState::Started;
        if wished || started {
            activity.touch();
        }
        actions
    }

    fn step_core(&mut self, input: Input) -> Vec<Action> {
        let before = self.core.state();
        let actions = self.core.step(input, Instant::now());
        let now = self.core.state();
        if now != before {
            // Before anybody is answered: who then looks must not see what was.
            self.state.send_replace(now);
        }
        actions
    }

    /// The next input; `None` when the agent shuts down.
    async fn next(&mut self) -> Option<Input> {
        loop {
            let deadline = self.core.deadline();
            let tick = async {
                match deadline {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                message = self.messages.recv() => match message? {
                    Message::Wanted(machine) => return Some(Input::Wanted(machine)),
                    Message::Command(source, order, reply) => {
                        let waiter = self.next_waiter;
                        self.next_waiter += 1;
                        self.waiting.insert(waiter, reply);
                        return Some(Input::Command { waiter, source, order });
                    }
                },
                Some(input) = self.operations.next() => return Some(input),
                Some(input) = self.told.1.recv() => return Some(input),
                () = called(&mut self.call) => {
                    self.call = None;
                    // As if the gate had asked, but that nobody waits for the outcome.
                    let waiter = self.next_waiter;
                    self.next_waiter += 1;
                    return Some(Input::Command { waiter, source: Source::Proxy, order: Order::Start });
                }
                () = self.checks.changed() => self.record(None),
                () = tick => return Some(Input::Tick),
            }
        }
    }

    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            self.act_one(action);
        }
        self.attend_calls();
        match self.core.state() {
            MachineState::Started => self.checks.run(self.core.wanted()),
            // What was seen before a sleep still stands after it.
            MachineState::Suspending | MachineState::Suspended | MachineState::Starting => {
                self.checks.stop();
            }
            _ => self.checks.reset(),
        }
    }

    /// Listens for private traffic, or stops: at once, so that a start finds the TAP free.
    fn attend_calls(&mut self) {
        if self.core.state() != MachineState::Suspended {
            self.call = None;
        } else if self.call.is_none() {
            let hands = Arc::clone(&self.hands);
            self.call = Some(Box::pin(async move { hands.called().await }));
        }
    }

    fn act_one(&mut self, action: Action) {
        let hands = Arc::clone(&self.hands);
        let metrics = Arc::clone(&self.metrics);
        let since = Instant::now();
        match action {
            Action::Boot {
                epoch,
                machine,
                reset_disk,
            } => {
                metrics.cold_starts.add(1);
                self.begin(async move {
                    match hands.boot(epoch, machine, reset_disk).await {
                        Ok(digest) => Input::Up {
                            epoch,
                            digest,
                            took: since.elapsed(),
                        },
                        Err(failure) => {
                            metrics.failed_starts.add(1);
                            Input::BootFailed { epoch, failure }
                        }
                    }
                });
            }
            Action::Wake { epoch } => {
                metrics.wakes.add(1);
                self.begin(async move {
                    match hands.wake(epoch).await {
                        Ok(()) => {
                            let took = since.elapsed();
                            metrics
                                .wake_micros
                                .add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
                            Input::Woken { epoch, took }
                        }
                        Err(WakeFailure { reason, kept }) => {
                            metrics.refused_wakes.add(1);
                            if kept {
                                Input::WakeNotReady { epoch, reason }
                            } else {
                                Input::WakeRefused { epoch, reason }
                            }
                        }
                    }
                });
            }
            Action::Sleep { epoch } => {
                metrics.suspends.add(1);
                self.begin(async move {
                    match hands.sleep().await {
                        Ok(()) => Input::Slept {
                            epoch,
                            took: since.elapsed(),
                        },
                        Err(failure) => {
                            metrics.failed_suspends.add(1);
                            Input::SleepFailed {
                                epoch,
                                reason: failure.reason,
                                alive: failure.alive,
                            }
                        }
                    }
                });
            }
            Action::TakeOver { epoch } => self.begin(async move {
                match hands.take_over().await {
                    Ok(()) => Input::TakenOver { epoch },
                    Err(reason) => Input::SleepFailed {
                        epoch,
                        reason,
                        alive: false,
                    },
                }
            }),
            Action::Ask {
                epoch,
                signal,
                timeout,
                drain,
            } => {
                metrics.stops.add(1);
                self.begin(async move {
                    match hands.ask(signal, timeout, drain).await {
                        // The deadline is running already.
                        Ok(()) => Input::Tick,
                        Err(reason) => {
                            tracing::warn!(reason, "the guest cannot be asked to stop");
                            Input::AskFailed { epoch }
                        }
                    }
                });
            }
            Action::Kill { epoch } => {
                metrics.kills.add(1);
                hands.kill(epoch);
            }
            Action::Discard => self.begin(async move {
                hands.discard().await;
                Input::Tick
            }),
            Action::Remove => self.begin(async move {
                match hands.remove().await {
                    Ok(()) => Input::Removed,
                    Err(reason) => Input::RemoveFailed { reason },
                }
            }),
            Action::Forget => {
                metrics.destroyed.add(1);
                self.recorder.forget();
            }
            Action::Record(event) => {
                if let Some(event) = &event
                    && event.kind == "exit"
                {
                    metrics.exits.add(1);
                }
                self.record(event);
            }
            Action::Answer { waiter, outcome } => {
                if let Some(waiting) = self.waiting.remove(&waiter) {
                    // Who has gone away does not need the answer.
                    let _ = waiting.send(outcome);
                }
            }
        }
    }

    fn begin(&mut self, operation: impl Future<Output = Input> + Send + 'static) {
        self.operations.push(Box::pin(operation));
    }

    /// Follows a monitor to its end. Both ends are told on one channel: the app's comes first, also
    /// when both are found at once.
    fn watch(&mut self, epoch: Epoch) {
        let hands = Arc::clone(&self.hands);
        // The receiver is this task's own: it is there for as long as anything is told.
        let told = self.told.0.clone();
        self.begin(async move {
            let app = told.clone();
            let exited = Box::new(move |exit| {
                let _ = app.send(Input::AppExited { epoch, exit });
            });
            let end = hands.watch(exited).await;
            let _ = told.send(Input::MonitorExited { epoch, end });
            Input::Tick
        });
    }

    fn record(&mut self, event: Option<Event>) {
        self.recorder
            .record(&self.core, event, self.checks.current().to_vec());
    }
}

async fn called(call: &mut Option<Call>) {
    match call {
        Some(call) => call.await,
        None => std::future::pending().await,
    }
}
