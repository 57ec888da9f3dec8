//! Scenarios, and random ones against a simulated world.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::json;
use tern_catalog::{DesiredState, MachineEvent, RestartPolicy};
use tern_guest::signal::SIGKILL;

use super::steps::{FLUSH_TIME, STOP_TIMEOUT};
use super::*;
use crate::bundle::tests::machine;
use crate::machine::StopRequest;

const TOOK: Duration = Duration::from_millis(3);

/// A core, with the clock and what it has said so far.
struct Bench {
    core: Core,
    now: Instant,
    wanted: Machine,
    actions: Vec<Action>,
}

impl Bench {
    fn new() -> Self {
        Self::with(machine(r#"{"image":"x"}"#))
    }

    fn with(mut wanted: Machine) -> Self {
        wanted.desired.state = DesiredState::Created;
        let now = Instant::now();
        let found = Found::Nothing { end: None };
        let (core, actions) = Core::new(Arc::new(wanted.clone()), None, None, found, now);
        Self {
            core,
            now,
            wanted,
            actions,
        }
    }

    /// As an agent finds it that comes after one which has left this status.
    fn found(status: &MachineStatus, found: Found) -> Self {
        Self::found_wanted(status, found, DesiredState::Started, "01A")
    }

    /// An agent comes back to a wish that the one before had taken up.
    fn found_wanted(
        status: &MachineStatus,
        found: Found,
        state: DesiredState,
        instance: &str,
    ) -> Self {
        let mut wanted = machine(r#"{"image":"x"}"#);
        wanted.desired.generation = status.generation;
        wanted.desired.state = state;
        wanted.instance_id = instance.into();
        let now = Instant::now();
        let (core, actions) = Core::new(Arc::new(wanted.clone()), Some(status), None, found, now);
        Self {
            core,
            now,
            wanted,
            actions,
        }
    }

    fn tell(&mut self, input: Input) -> &mut Self {
        self.actions = self.core.step(input, self.now);
        self
    }

    fn order(&mut self, waiter: Waiter, source: Source, order: Order) -> &mut Self {
        self.tell(Input::Command {
            waiter,
            source,
            order,
        })
    }

    fn start(&mut self, waiter: Waiter) -> &mut Self {
        self.order(waiter, Source::Proxy, Order::Start)
    }

    fn wish(&mut self, state: DesiredState) -> &mut Self {
        self.wanted.desired.generation += 1;
        self.wanted.desired.state = state;
        self.tell(Input::Wanted(Arc::new(self.wanted.clone())))
    }

    fn up(&mut self) -> &mut Self {
        let epoch = self.core.epoch;
        let digest = "sha256:0".to_owned();
        self.tell(Input::Up {
            epoch,
            digest,
            took: TOOK,
        })
    }

    fn slept(&mut self) -> &mut Self {
        let epoch = self.core.epoch;
        self.tell(Input::Slept { epoch, took: TOOK })
    }

    fn woken(&mut self) -> &mut Self {
        let epoch = self.core.epoch;
        self.tell(Input::Woken { epoch, took: TOOK })
    }

    fn app_exits(&mut self, code: i32) -> &mut Self {
        let epoch = self.core.epoch;
        let exit = ExitStatus {
            code,
            ..ExitStatus::default()
        };
        self.tell(Input::AppExited { epoch, exit })
    }

    fn monitor_ends(&mut self, by_guest: bool) -> &mut Self {
        let epoch = self.core.epoch;
        let reason = "the monitor was killed by SIGKILL".to_owned();
        self.tell(Input::MonitorExited {
            epoch,
            end: End { by_guest, reason },
        })
    }

    /// To the next deadline.
    fn wait(&mut self) -> &mut Self {
        self.now = self.core.deadline().expect("there is nothing to wait for");
        self.tell(Input::Tick)
    }

    fn started() -> Self {
        let mut bench = Self::new();
        bench.wish(DesiredState::Started).up();
        bench.is(MachineState::Started);
        bench
    }

    fn suspended() -> Self {
        let mut bench = Self::started();
        bench.wish(DesiredState::Suspended).slept();
        bench.is(MachineState::Suspended);
        bench
    }

    #[track_caller]
    fn is(&self, state: MachineState) {
        assert_eq!(self.core.state(), state, "{:#?}", self.core);
    }

    fn boots(&self) -> Vec<bool> {
        let boot = |a: &Action| match a {
            Action::Boot { reset_disk, .. } => Some(*reset_disk),
            _ => None,
        };
        self.actions.iter().filter_map(boot).collect()
    }

    fn does(&self, what: fn(&Action) -> bool) -> bool {
        self.actions.iter().any(what)
    }

    fn answers(&self) -> BTreeMap<Waiter, Result<(), CommandError>> {
        let answer = |a: &Action| match a {
            Action::Answer { waiter, outcome } => Some((*waiter, outcome.clone())),
            _ => None,
        };
        self.actions.iter().filter_map(answer).collect()
    }

    fn events(&self) -> Vec<&Event> {
        let event = |a: &'_ Action| matches!(a, Action::Record(Some(_)));
        self.actions
            .iter()
            .filter(|a| event(a))
            .map(|a| match a {
                Action::Record(Some(event)) => event,
                _ => unreachable!(),
            })
            .collect()
    }
}

fn status(state: MachineState) -> MachineStatus {
    MachineStatus {
        id: machine(r#"{"image":"x"}"#).id,
        state,
        reason: None,
        generation: 1,
        instance_id: "01A".into(),
        image_digest: None,
        events: Vec::new(),
        checks: Vec::new(),
        updated_at: jiff::Timestamp::UNIX_EPOCH,
    }
}

#[test]
fn a_launch_boots_with_an_empty_disk() {
    let mut bench = Bench::new();
    bench.is(MachineState::Created);
    bench.wish(DesiredState::Started);
    bench.is(MachineState::Starting);
    assert_eq!(bench.boots(), [true]);
    assert_eq!(bench.events()[0].kind, "launch");
    bench.up();
    bench.is(MachineState::Started);
    assert_eq!(bench.core.generation(), 2);
    assert_eq!(bench.events()[0].kind, "start");
}

#[test]
fn a_thousand_starts_share_one_wake_which_comes_before_any_bookkeeping() {
    let mut bench = Bench::suspended();
    let mut wakes = 0;
    for waiter in 0..1000 {
        bench.start(waiter);
        wakes += bench
            .actions
            .iter()
            .filter(|a| matches!(a, Action::Wake { .. }))
            .count();
        if waiter == 0 {
            assert!(matches!(bench.actions[0], Action::Wake { .. }));
        }
        assert!(bench.answers().is_empty());
    }
    assert_eq!(wakes, 1);
    bench.woken();
    let answers = bench.answers();
    assert!(answers.len() == 1000 && answers.values().all(Result::is_ok));
    assert!(
        matches!(bench.actions[0], Action::Answer { .. }),
        "answered first"
    );
    assert_eq!(
        bench.start(1000).answers()[&1000],
        Ok(()),
        "it runs already"
    );
}

#[test]
fn a_snapshot_that_is_refused_becomes_a_cold_start_with_the_same_disk() {
    let mut bench = Bench::suspended();
    bench.start(1);
    let epoch = bench.core.epoch;
    let reason = "bit flip".to_owned();
    bench.tell(Input::WakeRefused { epoch, reason });
    assert_eq!(bench.boots(), [false]);
    let told = &bench.events()[0].detail["cold_because"];
    assert!(
        told.as_str().unwrap().contains("snapshot") && told.as_str().unwrap().contains("bit flip")
    );
    bench.up();
    assert_eq!(bench.answers()[&1], Ok(()));
}

#[test]
fn a_wake_that_is_not_ready_yet_keeps_the_snapshot_for_the_next() {
    let mut bench = Bench::suspended();
    let not_ready = |bench: &mut Bench| {
        let epoch = bench.core.epoch;
        let reason = "no device".to_owned();
        bench.tell(Input::WakeNotReady { epoch, reason });
    };
    bench.start(1);
    not_ready(&mut bench);
    bench.is(MachineState::Suspended);
    assert!(bench.boots().is_empty(), "its memory would be gone");
    let Err(CommandError::Failed(told)) = &bench.answers()[&1] else {
        panic!("{:?}", bench.answers())
    };
    assert!(told.contains("no device"), "{told}");
    assert!(bench.core.reason().unwrap().contains("no device"));
    bench.start(2);
    assert!(bench.does(|a| matches!(a, Action::Wake { .. })));
    bench.woken();
    assert_eq!(bench.answers()[&2], Ok(()));
    assert_eq!(bench.core.reason(), None);

    // Who wants no wake any more gets what he wants.
    let mut bench = Bench::suspended();
    bench.start(1);
    let request = StopRequest {
        signal: Some(SIGKILL),
        timeout: None,
    };
    bench.order(2, Source::User, Order::Stop(request));
    not_ready(&mut bench);
    bench.is(MachineState::Stopped);
    assert!(bench.does(|a| matches!(a, Action::Discard)));
    assert_eq!(bench.answers()[&2], Ok(()));
}

#[test]
fn a_start_after_a_stop_begins_with_an_empty_disk_and_after_a_crash_it_does_not() {
    let mut bench = Bench::started();
    bench.order(1, Source::User, Order::Stop(StopRequest::default()));
    assert!(bench.does(|a| matches!(a, Action::Ask { .. })));
    bench.app_exits(0).monitor_ends(true);
    bench.is(MachineState::Stopped);
    assert_eq!(bench.answers()[&1], Ok(()));
    assert_eq!(bench.start(2).boots(), [true]);
    bench.up().monitor_ends(false);
    bench.is(MachineState::Failed);
    assert!(bench.core.reason().unwrap().contains("monitor"));
    assert_eq!(bench.wait().boots(), [false]);
}

#[test]
fn a_stop_that_is_not_heeded_ends_in_a_kill() {
    let mut bench = Bench::started();
    let timeout = Some(Duration::from_secs(1));
    let request = StopRequest {
        signal: Some(15),
        timeout,
    };
    bench.order(1, Source::User, Order::Stop(request));
    bench.wait();
    assert!(bench.does(|a| matches!(a, Action::Kill { .. })));
    bench.is(MachineState::Stopping);
    bench.monitor_ends(false);
    bench.is(MachineState::Stopped);
    assert_eq!(bench.answers()[&1], Ok(()));
    assert_eq!(
        bench.core.deadline(),
        None,
        "a stop is not followed by a restart"
    );
}

#[test]
fn a_stop_under_way_is_hastened_by_a_harder_wish() {
    let asked = |bench: &Bench| -> Vec<(Option<i32>, Duration)> {
        let ask = |a: &Action| match a {
            Action::Ask {
                signal, timeout, ..
            } => Some((*signal, *timeout)),
            _ => None,
        };
        bench.actions.iter().filter_map(ask).collect()
    };
    let (hour, second) = (Duration::from_secs(3600), Duration::from_secs(1));
    let stopping = || {
        let mut bench = Bench::started();
        let request = StopRequest {
            signal: None,
            timeout: Some(hour),
        };
        bench.order(1, Source::User, Order::Stop(request));
        assert_eq!(asked(&bench), [(None, hour)]);
        bench
    };
    let left = |bench: &Bench| bench.core.deadline().unwrap() - bench.now;
    let by_force = [
        DesiredState::Destroyed { force: true },
        DesiredState::Restarted { force: true },
        DesiredState::Stopped {
            signal: Some(SIGKILL),
            timeout_ms: Some(0),
        },
    ];
    for wish in by_force {
        let mut bench = stopping();
        bench.wish(wish.clone());
        assert_eq!(asked(&bench), [(Some(SIGKILL), Duration::ZERO)], "{wish:?}");
        assert_eq!(left(&bench), FLUSH_TIME);
        bench.tell(Input::Tick);
        assert!(asked(&bench).is_empty(), "once");
        bench.wait();
        assert!(bench.does(|a| matches!(a, Action::Kill { .. })));
        bench.monitor_ends(false);
        bench.is(match wish {
            DesiredState::Destroyed { .. } => MachineState::Destroying,
            DesiredState::Restarted { .. } => MachineState::Starting,
            _ => MachineState::Stopped,
        });
        // A restart keeps the disk, hastened or not.
        assert!(bench.boots().iter().all(|&reset| !reset));
    }
    // Without force by what it would have been given, and by no more than is left already.
    let mut bench = stopping();
    bench.wish(DesiredState::Destroyed { force: false });
    assert_eq!(left(&bench), DRAIN_TIME + STOP_TIMEOUT + FLUSH_TIME);
    let mut bench = stopping();
    for (signal, timeout, is_asked, is_left) in [
        (None, Some(second), true, second),
        (None, Some(hour), false, second),
        (Some(10), Some(hour), true, second),
    ] {
        bench.order(
            2,
            Source::User,
            Order::Stop(StopRequest { signal, timeout }),
        );
        let asks = timeout
            .filter(|_| is_asked)
            .map(|timeout| (signal, timeout));
        assert_eq!(asked(&bench), Vec::from_iter(asks));
        // The requests' time is the app's once more, at most.
        assert_eq!(left(&bench), is_left * 2 + FLUSH_TIME);
    }
    // The app may have ended before it was asked once more: its disks are being flushed.
    let epoch = bench.core.epoch;
    bench.tell(Input::AskFailed { epoch });
    assert!(!bench.does(|a| matches!(a, Action::Kill { .. })));
    assert_eq!(left(&bench), FLUSH_TIME);
    bench.app_exits(0);
    bench.wish(DesiredState::Destroyed { force: true });
    assert!(asked(&bench).is_empty(), "nobody is left to be asked");
}

#[test]
fn a_failing_app_is_restarted_and_then_given_up() {
    let mut bench = Bench::started();
    let mut restarts = 0;
    loop {
        bench.app_exits(1).monitor_ends(true);
        if bench.core.deadline().is_none() {
            break;
        }
        bench.is(MachineState::Stopped);
        bench.wait();
        assert_eq!(
            (bench.boots(), bench.events()[0].kind),
            (vec![false], "restart")
        );
        bench.up();
        restarts += 1;
    }
    assert_eq!(restarts, 10);
    bench.is(MachineState::Failed);
    assert!(
        bench.core.reason().unwrap().contains("given up"),
        "{:?}",
        bench.core.reason()
    );
    assert!(bench.start(1).boots() == [false], "the gate may still try");
}

#[test]
fn an_app_that_is_done_stays_stopped_or_is_destroyed() {
    let mut bench = Bench::started();
    bench.app_exits(0).monitor_ends(true);
    bench.is(MachineState::Stopped);
    assert_eq!(bench.core.deadline(), None);
    let event = &bench.events()[0].detail["exit_event"];
    assert_eq!(
        (&event["exit_code"], &event["requested_stop"]),
        (&json!(0), &json!(false))
    );

    let mut bench = Bench::with(machine(r#"{"image":"x","auto_destroy":true}"#));
    bench
        .wish(DesiredState::Started)
        .up()
        .app_exits(0)
        .monitor_ends(true);
    bench.is(MachineState::Destroying);
    bench.tell(Input::Removed);
    assert!(bench.does(|a| matches!(a, Action::Forget)));
}

#[test]
fn an_app_that_ended_while_its_machine_did_not_is_helped() {
    let mut bench = Bench::started();
    bench.app_exits(3);
    bench.is(MachineState::Started);
    bench.wait();
    assert!(bench.does(|a| matches!(a, Action::Kill { .. })));
    bench.monitor_ends(false);
    bench.is(MachineState::Stopped);
    assert_eq!(bench.events()[0].detail["exit_event"]["exit_code"], 3);
    assert!(
        bench.core.deadline().is_some(),
        "and restarted by its policy"
    );
}

#[test]
fn a_stop_while_an_app_s_end_is_enforced_is_not_followed_by_a_restart() {
    let stopped = DesiredState::Stopped {
        signal: None,
        timeout_ms: None,
    };
    for by_order in [true, false] {
        let mut bench = Bench::started();
        bench.app_exits(3).wait();
        bench.is(MachineState::Stopping);
        if by_order {
            bench.order(1, Source::User, Order::Stop(StopRequest::default()));
        } else {
            bench.wish(stopped.clone());
        }
        assert!(
            bench.does(|a| matches!(a, Action::Record(_))),
            "for the next agent"
        );
        bench.monitor_ends(false);
        bench.is(MachineState::Stopped);
        assert_eq!(bench.core.deadline(), None);
        assert_eq!(bench.answers().get(&1), by_order.then_some(&Ok(())));
        let [event] = bench.events()[..] else {
            panic!("{:?}", bench.events())
        };
        let told = &event.detail["exit_event"];
        assert_eq!((event.kind, event.source), ("stop", Source::User));
        assert_eq!(
            (&told["requested_stop"], &told["exit_code"]),
            (&json!(true), &json!(3))
        );
    }
}

#[test]
fn a_new_config_replaces_the_running_one() {
    let mut bench = Bench::started();
    bench.wanted.instance_id = "01B".into();
    bench.wish(DesiredState::Started);
    bench.is(MachineState::Stopping);
    bench.app_exits(0).monitor_ends(true);
    bench.is(MachineState::Starting);
    assert_eq!(bench.boots(), [true], "its disk is its own");
    assert!(bench.events().iter().any(|e| e.kind == "update"));
    assert_eq!(bench.core.instance(), "01B");
}

#[test]
fn a_start_that_fails_before_it_has_its_disk_leaves_its_reset_to_the_next() {
    let fails = |bench: &mut Bench, disk_ready| {
        let epoch = bench.core.epoch;
        let failure = BootFailure {
            disk_ready,
            ..BootFailure::passing("no such image".into())
        };
        bench.tell(Input::BootFailed { epoch, failure });
    };
    // An update, and a start that follows a stop.
    for update in [true, false] {
        let mut bench = Bench::started();
        if update {
            bench.wanted.instance_id = "01B".into();
            bench.wish(DesiredState::Started).monitor_ends(true);
        } else {
            bench.order(1, Source::User, Order::Stop(StopRequest::default()));
            bench.monitor_ends(true).start(2);
        }
        assert_eq!(bench.boots(), [true]);
        fails(&mut bench, false);
        bench.is(MachineState::Failed);
        assert_eq!(bench.wait().boots(), [true], "it is still as it was");
        fails(&mut bench, true);
        assert_eq!(bench.wait().boots(), [false], "its guest may have run");
        bench.up().monitor_ends(false);
        assert_eq!(bench.wait().boots(), [false]);
    }
    // A start that is broken off for another.
    let mut bench = Bench::started();
    bench.wanted.instance_id = "01B".into();
    bench.wish(DesiredState::Started).monitor_ends(true);
    bench.wish(DesiredState::Restarted { force: true });
    bench.is(MachineState::Stopping);
    fails(&mut bench, false);
    assert_eq!(bench.boots(), [true]);
}

#[test]
fn a_snapshot_of_an_old_config_is_not_woken() {
    let mut bench = Bench::suspended();
    bench.wanted.instance_id = "01B".into();
    bench.wish(DesiredState::Created);
    bench.is(MachineState::Suspended);
    assert_eq!(bench.start(1).boots(), [true]);
}

#[test]
fn a_stop_breaks_a_start_off() {
    let mut bench = Bench::new();
    bench.start(1);
    bench.order(2, Source::User, Order::Stop(StopRequest::default()));
    bench.is(MachineState::Stopping);
    assert!(bench.does(|a| matches!(a, Action::Kill { .. })));
    let epoch = bench.core.epoch;
    let failure = BootFailure::lasting("broken off".into());
    bench.tell(Input::BootFailed { epoch, failure });
    bench.is(MachineState::Stopped);
    assert_eq!(bench.answers()[&2], Ok(()));
    assert!(bench.answers()[&1].is_err());
}

#[test]
fn a_stop_lets_a_wake_end_because_its_guest_may_have_requests() {
    let stop = || Order::Stop(StopRequest::default());
    let kills = |bench: &Bench| bench.does(|a| matches!(a, Action::Kill { .. }));
    let mut bench = Bench::suspended();
    bench.start(1);
    bench.order(2, Source::User, stop());
    assert!(!kills(&bench), "it is asked, when it can be");
    bench.is(MachineState::Starting);
    bench.woken();
    assert!(bench.does(|a| matches!(a, Action::Ask { .. })));
    bench.is(MachineState::Stopping);

    // One that is refused need not start cold for that.
    let mut bench = Bench::suspended();
    bench.start(1);
    bench.order(2, Source::User, stop());
    let epoch = bench.core.epoch;
    let reason = "bit flip".to_owned();
    bench.tell(Input::WakeRefused { epoch, reason });
    assert!(bench.boots().is_empty());
    bench.is(MachineState::Stopped);
    assert_eq!(bench.answers()[&2], Ok(()));

    // By force at once; and the proxy, whose requests they are, does not stop what starts.
    let mut bench = Bench::suspended();
    bench.start(1);
    bench.order(2, Source::Proxy, stop());
    assert!(matches!(bench.answers()[&2], Err(CommandError::Refused(_))));
    let signal = Some(SIGKILL);
    let timeout = None;
    bench.order(
        3,
        Source::User,
        Order::Stop(StopRequest { signal, timeout }),
    );
    assert!(kills(&bench));
}

#[test]
fn a_start_during_a_suspend_wakes_it_right_after() {
    let mut bench = Bench::started();
    bench.order(1, Source::Proxy, Order::Suspend);
    bench.is(MachineState::Suspending);
    bench.start(2);
    assert!(bench.answers().is_empty());
    let refused = bench.order(3, Source::Proxy, Order::Suspend).answers();
    assert!(
        matches!(refused[&3], Err(CommandError::Refused(_))),
        "it is wanted again"
    );
    bench.slept();
    assert_eq!(bench.answers()[&1], Ok(()));
    bench.is(MachineState::Starting);
    bench.woken();
    assert_eq!(bench.answers()[&2], Ok(()));
}

#[test]
fn a_request_that_waits_for_a_suspend_is_answered_however_often_that_is_asked_for() {
    let mut bench = Bench::started();
    bench.wish(DesiredState::Suspended);
    bench.start(1);
    bench.wish(DesiredState::Suspended);
    bench.slept();
    assert_eq!(bench.events()[0].kind, "suspend");
    bench.is(MachineState::Starting);
    bench.woken();
    assert_eq!(bench.answers()[&1], Ok(()));
    bench.is(MachineState::Started);
}

#[test]
fn a_request_does_not_take_back_what_the_owner_wants_of_a_machine_that_starts() {
    let stop = DesiredState::Stopped {
        signal: None,
        timeout_ms: None,
    };
    for (wish, state) in [
        (DesiredState::Suspended, MachineState::Suspending),
        (stop, MachineState::Stopping),
    ] {
        let mut bench = Bench::suspended();
        bench.start(1).wish(wish);
        bench.start(2).woken();
        let answers = bench.answers();
        assert!(answers.len() == 2 && answers.values().all(Result::is_ok));
        bench.is(state);
    }
}

#[test]
fn a_suspend_of_what_does_not_run_says_so() {
    let mut bench = Bench::started();
    bench.app_exits(0).monitor_ends(true);
    bench.is(MachineState::Stopped);
    bench.wish(DesiredState::Suspended);
    let [event] = bench.events()[..] else {
        panic!("{:?}", bench.events())
    };
    assert_eq!((event.kind, event.source), ("suspend", Source::User));
    let error = event.detail["error"].as_str().unwrap();
    assert!(error.contains("stopped"), "{error}");
    let mut bench = Bench::suspended();
    bench.wish(DesiredState::Suspended);
    assert!(bench.events().is_empty(), "it is that already");
}

#[test]
fn a_stop_lets_requests_end_unless_it_is_in_a_hurry() {
    for (timeout, drain) in [
        (None, DRAIN_TIME),
        (Some(Duration::from_secs(1)), Duration::from_secs(1)),
        (Some(Duration::ZERO), Duration::ZERO),
    ] {
        let mut bench = Bench::started();
        let signal = None;
        bench.order(
            1,
            Source::User,
            Order::Stop(StopRequest { signal, timeout }),
        );
        let asked = bench.actions.iter().find_map(|action| match action {
            Action::Ask { drain, .. } => Some(*drain),
            _ => None,
        });
        assert_eq!(asked, Some(drain));
        let by = drain + timeout.unwrap_or(STOP_TIMEOUT) + FLUSH_TIME;
        assert_eq!(bench.core.deadline(), Some(bench.now + by));
        // An app that ends of itself meanwhile is not there to be asked, and its disks are being flushed.
        bench.app_exits(0);
        let epoch = bench.core.epoch;
        bench.tell(Input::AskFailed { epoch });
        assert!(!bench.does(|a| matches!(a, Action::Kill { .. })));
        assert!(bench.core.deadline().unwrap() <= bench.now + FLUSH_TIME);
    }
}

#[test]
fn a_stop_repeated_within_its_drain_leaves_the_requests_their_time() {
    let asked = |bench: &Bench| {
        bench.actions.iter().find_map(|action| match action {
            Action::Ask { drain, .. } => Some(*drain),
            _ => None,
        })
    };
    let stop = |signal, timeout| Order::Stop(StopRequest { signal, timeout });
    let second = Duration::from_secs(1);
    let mut bench = Bench::started();
    bench.order(1, Source::User, stop(None, None));
    let by = bench.core.deadline();
    bench.now += second;
    bench.order(2, Source::User, stop(None, None));
    assert_eq!(asked(&bench), None, "it is under way already");
    assert_eq!(bench.core.deadline(), by);
    // Who wants a signal of their own sent, or it over sooner, takes from the requests what they do not give them.
    bench.order(3, Source::User, stop(Some(10), None));
    assert_eq!(asked(&bench), Some(DRAIN_TIME - second));
    bench.order(4, Source::User, stop(None, Some(second)));
    assert_eq!(asked(&bench), Some(second));
    bench.now += second * 2;
    bench.order(5, Source::User, stop(Some(10), None));
    assert_eq!(asked(&bench), Some(Duration::ZERO), "it is over");
    let mut bench = Bench::started();
    bench.order(1, Source::User, stop(None, None));
    bench.wish(DesiredState::Destroyed { force: false });
    assert_eq!(asked(&bench), None);
    for (signal, timeout) in [(None, Duration::ZERO), (Some(SIGKILL), DRAIN_TIME)] {
        let mut bench = Bench::started();
        bench.order(1, Source::User, stop(None, Some(second * 3600)));
        bench.order(2, Source::User, stop(signal, Some(timeout)));
        assert_eq!(asked(&bench), Some(Duration::ZERO));
        assert_eq!(
            bench.core.deadline(),
            Some(bench.now + timeout + FLUSH_TIME)
        );
    }
}

#[test]
fn a_suspend_that_another_agent_began_is_waited_for_and_then_done() {
    let suspending = status(MachineState::Suspending);
    let busy = || Bench::found(&suspending, Found::Busy { epoch: 1 });
    let taken_over = |bench: &mut Bench| {
        bench.tell(Input::TakenOver { epoch: 1 });
    };
    let mut bench = busy();
    bench.is(MachineState::Suspending);
    assert!(bench.does(|a| matches!(a, Action::TakeOver { .. })));
    taken_over(&mut bench);
    bench.is(MachineState::Suspending);
    assert!(bench.does(|a| matches!(a, Action::Sleep { .. })));
    let mut bench = busy();
    bench.start(1);
    taken_over(&mut bench);
    assert_eq!(bench.answers()[&1], Ok(()));
    bench.is(MachineState::Started);
}

#[test]
fn a_suspend_is_broken_off_by_force_alone() {
    let kills = |bench: &Bench| bench.does(|a| matches!(a, Action::Kill { .. }));
    let fails = |bench: &mut Bench| {
        let epoch = bench.core.epoch;
        let reason = "killed".to_owned();
        bench.monitor_ends(false).tell(Input::SleepFailed {
            epoch,
            reason,
            alive: false,
        });
    };
    let mut bench = Bench::started();
    bench.wish(DesiredState::Suspended);
    bench.order(1, Source::User, Order::Stop(StopRequest::default()));
    assert!(!kills(&bench), "its memory is being written");
    bench.wish(DesiredState::Stopped {
        signal: Some(SIGKILL),
        timeout_ms: None,
    });
    assert!(kills(&bench));
    bench.tell(Input::Tick);
    assert!(!kills(&bench), "once");
    bench.is(MachineState::Suspending);
    fails(&mut bench);
    bench.is(MachineState::Stopped);
    assert_eq!(bench.core.deadline(), None, "no restart follows");
    assert_eq!(bench.events()[0].kind, "stop");

    for (wish, state) in [
        (
            DesiredState::Restarted { force: true },
            MachineState::Starting,
        ),
        (
            DesiredState::Destroyed { force: true },
            MachineState::Destroying,
        ),
    ] {
        let mut bench = Bench::started();
        bench.wish(DesiredState::Suspended).wish(wish);
        assert!(kills(&bench));
        fails(&mut bench);
        bench.is(state);
    }
    // It may have been done by then.
    let mut bench = Bench::started();
    bench.wish(DesiredState::Suspended);
    bench.wish(DesiredState::Stopped {
        signal: Some(SIGKILL),
        timeout_ms: None,
    });
    bench.slept();
    bench.is(MachineState::Stopped);
    assert!(bench.does(|a| matches!(a, Action::Discard)));
}

#[test]
fn a_failed_suspend_leaves_it_running() {
    let mut bench = Bench::started();
    bench.order(1, Source::Proxy, Order::Suspend);
    let epoch = bench.core.epoch;
    let reason = "the disk is full".to_owned();
    bench.tell(Input::SleepFailed {
        epoch,
        reason,
        alive: true,
    });
    bench.is(MachineState::Started);
    assert!(
        bench.answers()[&1]
            .as_ref()
            .unwrap_err()
            .to_string()
            .contains("disk is full")
    );
}

#[test]
fn a_start_that_fails_is_told_at_once() {
    let mut bench = Bench::new();
    bench.start(1);
    let epoch = bench.core.epoch;
    let failure = BootFailure::passing("no such image".into());
    bench.tell(Input::BootFailed {
        epoch,
        failure: failure.clone(),
    });
    bench.is(MachineState::Failed);
    assert!(
        bench.answers()[&1]
            .as_ref()
            .unwrap_err()
            .to_string()
            .contains("no such image")
    );
    assert!(bench.core.deadline().is_some(), "a registry may come back");

    let mut bench = Bench::new();
    bench.start(1);
    let epoch = bench.core.epoch;
    bench.tell(Input::BootFailed {
        epoch,
        failure: BootFailure {
            lasting: true,
            ..failure
        },
    });
    assert_eq!(
        bench.core.deadline(),
        None,
        "a bad config does not get better"
    );
}

#[test]
fn destruction_is_final() {
    let mut bench = Bench::started();
    bench.wish(DesiredState::Destroyed { force: false });
    bench.is(MachineState::Stopping);
    let refused = bench.start(1).answers();
    assert_eq!(refused[&1], Err(CommandError::Gone));
    bench.wish(DesiredState::Started);
    bench.app_exits(0).monitor_ends(true);
    bench.is(MachineState::Destroying);
    assert!(bench.does(|a| matches!(a, Action::Remove)));
    let reason = "device busy".to_owned();
    bench.tell(Input::RemoveFailed { reason }).wait();
    assert!(bench.does(|a| matches!(a, Action::Remove)));
    bench.tell(Input::Removed);
    bench.is(MachineState::Destroyed);
    assert_eq!(bench.start(2).answers()[&2], Err(CommandError::Gone));
}

#[test]
fn a_generation_is_acted_on_once() {
    let mut bench = Bench::started();
    bench.order(1, Source::Proxy, Order::Suspend);
    bench.slept();
    let again = Arc::new(bench.wanted.clone());
    bench.tell(Input::Wanted(again));
    bench.is(MachineState::Suspended);
    assert!(bench.actions.is_empty());
}

#[test]
fn what_is_told_of_an_old_monitor_is_ignored() {
    let mut bench = Bench::suspended();
    let old = bench.core.epoch;
    bench.start(1).woken();
    let end = End {
        by_guest: false,
        reason: "late news".into(),
    };
    bench.tell(Input::MonitorExited { epoch: old, end });
    bench.is(MachineState::Started);
}

#[test]
fn an_agent_that_comes_back_finds_things_as_they_are() {
    let running = || Found::Running { epoch: 1 };
    let nothing = || Found::Nothing { end: None };
    let mut bench = Bench::found(&status(MachineState::Started), running());
    bench.is(MachineState::Started);
    assert!(bench.boots().is_empty() && bench.events().is_empty());
    bench.monitor_ends(false);
    bench.is(MachineState::Failed);

    let bench = Bench::found(&status(MachineState::Suspended), Found::Asleep);
    bench.is(MachineState::Suspended);

    let mut bench = Bench::found(&status(MachineState::Suspended), nothing());
    bench.is(MachineState::Suspended);
    bench.start(1);
    assert!(
        bench.does(|a| matches!(a, Action::Wake { .. })),
        "which will be refused"
    );

    let mut bench = Bench::found(&status(MachineState::Started), nothing());
    bench.is(MachineState::Failed);
    assert_eq!(
        bench.wait().boots(),
        [false],
        "what should run is started again"
    );

    let bench = Bench::found(&status(MachineState::Starting), nothing());
    bench.is(MachineState::Starting);

    let bench = Bench::found(&status(MachineState::Suspending), running());
    bench.is(MachineState::Suspending);
    assert!(bench.does(|a| matches!(a, Action::Sleep { .. })));

    let bench = Bench::found(&status(MachineState::Stopping), running());
    assert!(bench.does(|a| matches!(a, Action::Ask { .. })));

    let bench = Bench::found(&status(MachineState::Destroying), nothing());
    assert!(bench.does(|a| matches!(a, Action::Remove)));

    let bench = Bench::found(&status(MachineState::Stopped), nothing());
    bench.is(MachineState::Stopped);
    assert_eq!(bench.core.deadline(), None);
}

#[test]
fn a_wish_that_an_agent_died_over_is_not_forgotten() {
    let running = || Found::Running { epoch: 1 };
    let nothing = || Found::Nothing { end: None };
    let destroyed = DesiredState::Destroyed { force: false };
    for state in [
        MachineState::Started,
        MachineState::Stopping,
        MachineState::Suspending,
    ] {
        let status = status(state);
        let mut bench = Bench::found_wanted(&status, running(), destroyed.clone(), "01A");
        assert!(bench.does(|a| matches!(a, Action::Ask { .. })), "{state}");
        bench.monitor_ends(true);
        bench.is(MachineState::Destroying);
        let bench = Bench::found_wanted(&status, nothing(), destroyed.clone(), "01A");
        bench.is(MachineState::Destroying);
    }
    let stopping = status(MachineState::Stopping);
    let restarted = DesiredState::Restarted { force: false };
    let mut bench = Bench::found_wanted(&stopping, running(), restarted.clone(), "01A");
    bench.is(MachineState::Stopping);
    assert_eq!(bench.monitor_ends(true).boots(), [false]);
    let bench = Bench::found_wanted(&stopping, nothing(), restarted, "01A");
    assert_eq!(bench.boots(), [false], "a restart keeps the disk");
    let bench = Bench::found_wanted(&stopping, nothing(), DesiredState::Started, "01B");
    assert_eq!(bench.boots(), [true], "an update");
    let bench = Bench::found_wanted(&stopping, nothing(), DesiredState::Started, "01A");
    bench.is(MachineState::Stopped);
}

#[test]
fn a_restart_that_was_due_when_the_agent_died_is_not_forgotten() {
    let mut status = status(MachineState::Stopped);
    status.events.push(MachineEvent {
        id: "1".into(),
        kind: "exit".into(),
        status: MachineState::Stopped,
        source: "machine".into(),
        timestamp: 0,
        request: json!({"exit_event": {"restarting": true}}),
    });
    let mut bench = Bench::found(&status, Found::Nothing { end: None });
    assert_eq!(bench.wait().boots(), [false]);
}

/// What may happen in a simulated world.
#[derive(Debug, Clone)]
enum Happening {
    /// The operation under way ends, well or badly; and a start before or after it had its disk, a wake after or
    /// before it touched its snapshot.
    Done {
        well: bool,
        disk_ready: bool,
    },
    Order {
        source: Source,
        order: Order,
    },
    Wish(DesiredState),
    NewConfig,
    AppExits {
        code: i32,
    },
    MonitorDies,
    TimePasses,
}

fn happening() -> impl Strategy<Value = Happening> {
    let source = prop_oneof![Just(Source::User), Just(Source::Proxy)];
    let order = prop_oneof![
        4 => Just(Order::Start),
        2 => Just(Order::Suspend),
        1 => Just(Order::Stop(StopRequest::default())),
        1 => Just(Order::Stop(StopRequest {
            signal: Some(SIGKILL),
            timeout: Some(Duration::from_secs(3600)),
        })),
    ];
    let wish = prop_oneof![
        4 => Just(DesiredState::Started),
        2 => Just(DesiredState::Suspended),
        1 => any::<bool>().prop_map(|force| DesiredState::Restarted { force }),
        1 => Just(DesiredState::Stopped { signal: None, timeout_ms: Some(10) }),
        1 => Just(DesiredState::Created),
    ];
    prop_oneof![
        8 => (prop::bool::weighted(0.8), any::<bool>())
            .prop_map(|(well, disk_ready)| Happening::Done { well, disk_ready }),
        6 => (source, order).prop_map(|(source, order)| Happening::Order { source, order }),
        3 => wish.prop_map(Happening::Wish),
        1 => Just(Happening::NewConfig),
        2 => (0..3).prop_map(|code| Happening::AppExits { code }),
        1 => Just(Happening::MonitorDies),
        3 => Just(Happening::TimePasses),
    ]
}

/// The world as far as the core's promises speak of it.
struct World {
    bench: Bench,
    /// The operation under way.
    operation: Option<Action>,
    /// A monitor runs, and of which epoch.
    monitor: Option<Epoch>,
    /// There is a snapshot that nobody has used.
    snapshot: bool,
    killed: bool,
    /// The config that the disk belongs to.
    disk: Option<String>,
    open: std::collections::BTreeSet<Waiter>,
    next_waiter: Waiter,
}

impl World {
    fn new(policy: RestartPolicy) -> Self {
        let mut wanted = machine(r#"{"image":"x"}"#);
        wanted.config.restart.policy = policy;
        let mut world = Self {
            bench: Bench::with(wanted),
            operation: None,
            monitor: None,
            snapshot: false,
            killed: false,
            disk: None,
            open: Default::default(),
            next_waiter: 0,
        };
        world.act();
        world
    }

    /// Does what the core has said, and checks that it may be said.
    fn act(&mut self) {
        for action in std::mem::take(&mut self.bench.actions) {
            match &action {
                Action::Boot {
                    epoch,
                    machine,
                    reset_disk,
                } => {
                    assert!(
                        self.operation.is_none() && self.monitor.is_none(),
                        "one at a time"
                    );
                    let same = self.disk.as_ref() == Some(&machine.instance_id);
                    assert!(same || *reset_disk, "a config has its own disk");
                    assert_eq!(*epoch, self.bench.core.epoch());
                    self.snapshot = false;
                    self.killed = false;
                    self.operation = Some(action);
                }
                Action::Wake { .. } => {
                    assert!(
                        self.operation.is_none() && self.monitor.is_none(),
                        "one at a time"
                    );
                    assert!(self.snapshot, "a snapshot is used once");
                    self.snapshot = false;
                    self.killed = false;
                    self.operation = Some(action);
                }
                Action::Sleep { epoch } => {
                    assert!(self.operation.is_none(), "one at a time");
                    assert_eq!(Some(*epoch), self.bench.core.state_epoch());
                    self.operation = Some(action);
                }
                Action::TakeOver { .. } => panic!("only of what is found"),
                Action::Remove => {
                    assert!(self.operation.is_none() && self.monitor.is_none());
                    self.operation = Some(action);
                }
                Action::Kill { .. } => self.killed = true,
                Action::Discard => self.snapshot = false,
                Action::Answer { waiter, .. } => {
                    assert!(self.open.remove(waiter), "answered once");
                }
                Action::Ask { .. } | Action::Forget | Action::Record(_) => {}
            }
        }
        // A kill takes effect on whatever runs.
        if self.killed && matches!(self.operation, None | Some(Action::Sleep { .. })) {
            self.monitor_dies();
        }
    }

    fn tell(&mut self, input: Input) {
        self.bench.tell(input);
        self.act();
    }

    fn monitor_dies(&mut self) {
        if let Some(epoch) = self.monitor.take() {
            self.killed = false;
            let end = End {
                by_guest: false,
                reason: "killed".into(),
            };
            self.tell(Input::MonitorExited { epoch, end });
        }
    }

    fn done(&mut self, well: bool, disk_ready: bool) {
        let Some(operation) = self.operation.take() else {
            return;
        };
        let well = well && !self.killed;
        if let Action::Boot { machine, .. } = &operation
            && (well || disk_ready)
        {
            self.disk = Some(machine.instance_id.clone());
        }
        let reason = "chance".to_owned();
        match operation {
            Action::Boot { epoch, .. } if well => {
                self.monitor = Some(epoch);
                self.tell(Input::Up {
                    epoch,
                    digest: "d".into(),
                    took: TOOK,
                });
            }
            Action::Boot { epoch, .. } => {
                self.killed = false;
                let failure = BootFailure {
                    disk_ready,
                    ..BootFailure::passing(reason)
                };
                self.tell(Input::BootFailed { epoch, failure });
            }
            Action::Wake { epoch } if well => {
                self.monitor = Some(epoch);
                self.tell(Input::Woken { epoch, took: TOOK });
            }
            Action::Wake { epoch } if disk_ready && !self.killed => {
                self.snapshot = true;
                self.tell(Input::WakeNotReady { epoch, reason });
            }
            Action::Wake { epoch } => {
                self.killed = false;
                self.tell(Input::WakeRefused { epoch, reason });
            }
            Action::Sleep { epoch } if well && self.monitor.is_some() => {
                // The monitor's end is seen as well, before or after.
                self.monitor = None;
                self.snapshot = true;
                let end = End {
                    by_guest: false,
                    reason: "stopped".into(),
                };
                self.tell(Input::MonitorExited { epoch, end });
                self.tell(Input::Slept { epoch, took: TOOK });
            }
            Action::Sleep { epoch } => {
                let alive = self.monitor.is_some();
                self.tell(Input::SleepFailed {
                    epoch,
                    reason,
                    alive,
                });
            }
            Action::Remove if well => self.tell(Input::Removed),
            Action::Remove => self.tell(Input::RemoveFailed { reason }),
            _ => unreachable!("only these are operations"),
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Done { well, disk_ready } => self.done(well, disk_ready),
            Happening::Order { source, order } => {
                let waiter = self.next_waiter;
                self.next_waiter += 1;
                self.open.insert(waiter);
                self.tell(Input::Command {
                    waiter,
                    source,
                    order,
                });
            }
            Happening::Wish(state) => {
                self.bench.wish(state);
                self.act();
            }
            Happening::NewConfig => {
                self.bench.wanted.instance_id.push('x');
                self.bench.wish(DesiredState::Started);
                self.act();
            }
            Happening::AppExits { code } => {
                if let (Some(epoch), None) = (self.monitor, &self.operation) {
                    let exit = ExitStatus {
                        code,
                        ..ExitStatus::default()
                    };
                    self.tell(Input::AppExited { epoch, exit });
                }
            }
            Happening::MonitorDies => self.monitor_dies(),
            Happening::TimePasses => self.time_passes(),
        }
    }

    fn time_passes(&mut self) {
        if let Some(at) = self.bench.core.deadline() {
            self.bench.now = at;
            self.tell(Input::Tick);
        }
    }

    /// Lets everything under way come to its end.
    fn settle(&mut self) {
        for _ in 0..1000 {
            if self.operation.is_some() {
                self.done(true, true);
            } else if self.bench.core.deadline().is_some() {
                self.time_passes();
            } else {
                return;
            }
        }
        panic!("it does not come to rest: {:#?}", self.bench.core);
    }
}

impl Core {
    /// The monitor that must be there in the present state.
    fn state_epoch(&self) -> Option<Epoch> {
        matches!(self.phase, Phase::Started { .. } | Phase::Suspending { .. }).then_some(self.epoch)
    }
}

fn policies() -> impl Strategy<Value = RestartPolicy> {
    prop_oneof![
        Just(RestartPolicy::No),
        Just(RestartPolicy::OnFailure),
        Just(RestartPolicy::Always)
    ]
}

proptest! {
    #[test]
    fn whatever_happens_the_promises_hold(
        policy in policies(),
        happenings in prop::collection::vec(happening(), 1..80),
    ) {
        let mut world = World::new(policy);
        for happening in happenings {
            world.happen(happening);
        }
        world.settle();
        prop_assert!(world.open.is_empty(), "everybody is answered: {:?}", world.open);
        let runs = world.bench.core.state() == MachineState::Started;
        prop_assert_eq!(runs, world.monitor.is_some());
        let asleep = world.bench.core.state() == MachineState::Suspended;
        prop_assert!(!asleep || world.snapshot);

        // And it can always be started, and destroyed.
        let waiter = world.next_waiter;
        world.open.insert(waiter);
        world.tell(Input::Command { waiter, source: Source::User, order: Order::Start });
        world.settle();
        prop_assert_eq!(world.bench.core.state(), MachineState::Started);
        world.happen(Happening::Wish(DesiredState::Destroyed { force: true }));
        world.monitor_dies();
        world.settle();
        prop_assert_eq!(world.bench.core.state(), MachineState::Destroyed);
        prop_assert!(world.open.is_empty());
    }
}
