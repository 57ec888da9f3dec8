//! Whether a Machine that was just deployed has come up.
//!
//! [`stand`] judges one look at a Machine, without I/O. [`wait`] looks until there is a verdict:
//!
//! - an app that ends is a failure at once, however often its host will start it again;
//! - with checks, all must pass;
//! - without, every service's port must take connections. An app that listens elsewhere is told where;
//! - without either, it must run for [`STEADY`].
//!
//! A Machine that its gate puts to sleep before that is seen is started again, and looked at while it starts.

use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use tern_catalog::{MachineConfig, RestartPolicy, ServiceProtocol};
use tokio::time::Instant;

use super::sockets::Listening;
use super::step;
use crate::client::{ApiError, Client};
use crate::commands::wire::{Event, Machine};

/// Time between two looks.
pub const POLL: Duration = Duration::from_millis(500);
/// How long an app must run that nothing else can be asked of. One that cannot run mostly ends within a second.
const STEADY: Duration = Duration::from_secs(5);
/// An app that has listened elsewhere for so long, and not where it should, will not any more. Some open a port for
/// metrics or debugging long before their own.
const ELSEWHERE: Duration = Duration::from_secs(30);
/// Where web frameworks listen of their own accord.
const USUAL: [u16; 10] = [80, 3000, 4000, 4567, 5000, 5173, 8000, 8080, 8081, 9000];
/// When somebody who waits is told what for.
const TELL: Duration = Duration::from_secs(10);

/// How a Machine stands, as one look at it shows.
#[derive(Debug, PartialEq, Eq)]
pub enum Standing {
    /// On its way.
    Coming,
    /// Its host starts its new configuration.
    Starting,
    /// Its app runs.
    Running,
    /// Its app has run, and was put to sleep for want of requests.
    Asleep,
    /// Its app has done what it was for, and is not to be started again.
    Done,
    /// Its app, or its start, has ended. The reason.
    Ended(String),
}

/// How a Machine stands in what has happened since the event `since`, the last one before its new configuration.
pub fn stand(machine: &Machine, since: &str) -> Standing {
    let mut news: Vec<&Event> = machine
        .events
        .iter()
        .filter(|event| event.id.as_str() > since)
        .collect();
    news.sort_by(|a, b| a.id.cmp(&b.id));
    // What came before is of the last configuration, whose end may only just be told.
    let begun = news
        .iter()
        .rposition(|event| matches!(event.kind.as_str(), "launch" | "update"));
    match begun {
        Some(begun) => drop(news.drain(..begun)),
        None if machine.state == "failed" => return Standing::Ended(reason(machine)),
        None => return Standing::Coming,
    }
    if let Some(exit) = news.iter().find(|event| event.kind == "exit") {
        let exit = &exit.request["exit_event"];
        let once = machine.config.restart.policy == RestartPolicy::No;
        if exit["exit_code"] == 0 && once && machine.config.services.is_empty() {
            return Standing::Done;
        }
        return Standing::Ended(told(exit));
    }
    let by_gate = || {
        let stop = news.iter().rev().find(|event| event.kind == "stop");
        stop.is_some_and(|event| event.source == "proxy")
    };
    match machine.state.as_str() {
        "started" => Standing::Running,
        "starting" => Standing::Starting,
        "suspending" | "suspended" => Standing::Asleep,
        "stopping" | "stopped" if by_gate() => Standing::Asleep,
        "failed" | "stopped" | "destroying" | "destroyed" => Standing::Ended(reason(machine)),
        _ => Standing::Coming,
    }
}

fn reason(machine: &Machine) -> String {
    machine
        .last_reason()
        .or_else(|| machine.reason.clone())
        .unwrap_or_else(|| format!("it is {}", machine.state))
}

/// How it ended, and whether its host goes on trying.
fn told(exit: &Value) -> String {
    let reason = exit["error"].as_str().filter(|text| !text.is_empty());
    let mut text = match (reason, exit["exit_code"].as_i64()) {
        (Some(reason), _) => reason.to_owned(),
        (None, Some(code)) => format!("the app exited with code {code}"),
        (None, None) => "its app ended".to_owned(),
    };
    if exit["restarting"] == true {
        text.push_str("; it is being started again");
    }
    text
}

/// Waits until a Machine is well. Ends at once when it cannot become so.
pub async fn wait(
    client: &Client,
    path: &str,
    config: &MachineConfig,
    since: &str,
    patience: Duration,
) -> Result<()> {
    let deadline = Instant::now() + patience;
    let mut watch = Watch {
        client,
        path,
        wanted: Wanted::of(config),
        running_since: None,
        elsewhere_since: None,
        told: false,
    };
    loop {
        let machine: Machine = match client.get(path).await {
            Ok(machine) => machine,
            // The way there is broken, which says nothing of the Machine.
            Err(error) if !error.is::<ApiError>() && Instant::now() < deadline => {
                tokio::time::sleep(POLL).await;
                continue;
            }
            Err(error) => return Err(error),
        };
        let lacking = match stand(&machine, since) {
            Standing::Done => return Ok(()),
            Standing::Ended(reason) => bail!("Machine {}: {reason}", machine.id),
            Standing::Coming => format!("it is still {}", machine.state),
            standing => {
                if standing == Standing::Asleep {
                    watch.wake(&machine).await;
                }
                match watch.look(&machine, &standing).await? {
                    None => return Ok(()),
                    Some(lacking) => lacking,
                }
            }
        };
        if Instant::now() >= deadline {
            let lacking = watch.explain().await.unwrap_or(lacking);
            bail!(
                "Machine {} is not well after {} s: {lacking}",
                machine.id,
                patience.as_secs()
            );
        }
        tokio::time::sleep(POLL).await;
    }
}

/// What must be seen of a Machine.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    /// So many checks pass.
    Checks(usize),
    /// These ports take connections.
    Ports(Vec<u16>),
    /// It runs for a while.
    Steady,
}

impl Wanted {
    fn of(config: &MachineConfig) -> Self {
        let of_services = config.services.iter().map(|s| s.checks.len());
        let checks = config.checks.len() + of_services.sum::<usize>();
        if checks > 0 {
            return Self::Checks(checks);
        }
        let tcp = config
            .services
            .iter()
            .filter(|s| s.protocol == ServiceProtocol::Tcp);
        let mut ports: Vec<u16> = tcp.map(|s| s.internal_port).collect();
        ports.sort_unstable();
        ports.dedup();
        if ports.is_empty() {
            Self::Steady
        } else {
            Self::Ports(ports)
        }
    }
}

struct Watch<'a> {
    client: &'a Client,
    path: &'a str,
    wanted: Wanted,
    running_since: Option<Instant>,
    elsewhere_since: Option<Instant>,
    told: bool,
}

impl Watch<'_> {
    /// Has a Machine that fell asleep before it was seen to be well run again: its gate's patience may be shorter than
    /// the time between two looks.
    async fn wake(&self, machine: &Machine) {
        let seen = match &self.wanted {
            Wanted::Checks(wanted) => checks(machine, *wanted).is_none(),
            Wanted::Steady => true,
            Wanted::Ports(_) => false,
        };
        if !seen {
            // Where this fails, the next look tells.
            let path = format!("{}/start", self.path);
            let _: Result<Value> = self.client.post(&path, &json!({})).await;
        }
    }

    /// Looks at a Machine that runs, or is about to: what it lacks, if anything.
    async fn look(&mut self, machine: &Machine, standing: &Standing) -> Result<Option<String>> {
        let running = *standing != Standing::Starting;
        let since = running.then(|| *self.running_since.get_or_insert_with(Instant::now));
        let ran = since.map_or(Duration::ZERO, |since| since.elapsed());
        let lacking = match &self.wanted {
            Wanted::Checks(wanted) => checks(machine, *wanted),
            Wanted::Steady => (ran < STEADY).then(|| "it has only just begun".to_owned()),
            Wanted::Ports(ports) => {
                // Its host waits with the answer until a start is over: however short the Machine then runs, the
                // first moment is not missed.
                let mut closed = Vec::new();
                for port in ports {
                    if !self.open(*port).await? {
                        closed.push(port.to_string());
                    }
                }
                let closed = closed.join(" and ");
                (!closed.is_empty())
                    .then(|| format!("nothing takes connections on its port {closed}"))
            }
        };
        let (Some(_), Wanted::Ports(_)) = (&lacking, &self.wanted) else {
            return Ok(lacking);
        };
        if ran < TELL {
            return Ok(lacking);
        }
        let Some(instead) = self.explain().await else {
            self.elsewhere_since = None;
            return Ok(lacking);
        };
        if !std::mem::replace(&mut self.told, true) {
            step(&format!("Still waiting: {instead}"));
        }
        let since = self.elsewhere_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= ELSEWHERE {
            bail!("Machine {}: {instead}", machine.id);
        }
        Ok(Some(instead))
    }

    /// Whether the Machine's host can connect to it there.
    async fn open(&self, port: u16) -> Result<bool> {
        let answer: Result<Value> = self
            .client
            .get(&format!("{}/ports/{port}", self.path))
            .await;
        match answer {
            Ok(answer) => Ok(answer["open"] == true),
            // It has just ended, or gone to sleep: the next look at it tells.
            Err(error) if error.is::<ApiError>() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Where the app listens instead, as far as that can be told.
    async fn explain(&self) -> Option<String> {
        let Wanted::Ports(ports) = &self.wanted else {
            return None;
        };
        let mut listening = self.listening().await.unwrap_or_default();
        if listening == Listening::default() {
            // An image without so much as `cat`: a look at where apps mostly are.
            for port in USUAL {
                if self.open(port).await.unwrap_or(false) {
                    listening.open.insert(port);
                }
            }
        }
        let told = ports.iter().find_map(|port| listening.instead_of(*port))?;
        Some(format!("the app {told}"))
    }

    /// Where it listens by its own kernel's word.
    async fn listening(&self) -> Option<Listening> {
        let body = json!({"command": ["cat", "/proc/net/tcp", "/proc/net/tcp6"], "timeout": 10});
        let path = format!("{}/exec", self.path);
        let answer: Value = self.client.post(&path, &body).await.ok()?;
        Some(Listening::read(answer["stdout"].as_str()?))
    }
}

/// What of its checks does not pass.
fn checks(machine: &Machine, wanted: usize) -> Option<String> {
    let passing = |status: &str| status == "passing";
    let count = machine.checks.iter().filter(|c| passing(&c.status)).count();
    if count >= wanted {
        return None;
    }
    let failing = machine.checks.iter().filter(|c| !passing(&c.status));
    let failing: Vec<String> = failing
        .map(|c| format!("{}: {}", c.name, c.output))
        .collect();
    Some(format!("its checks do not pass: {}", failing.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A Machine in this state, with events: id, type and exit event.
    fn machine(state: &str, config: Value, events: &[(&str, &str, Value)]) -> Machine {
        let events: Vec<Value> = events
            .iter()
            .map(|(id, kind, exit)| {
                json!({"id": id, "type": kind, "status": "started", "timestamp": 0, "request": {"exit_event": exit}})
            })
            .collect();
        serde_json::from_value(
            json!({"id": "1", "state": state, "config": config, "events": events}),
        )
        .unwrap()
    }

    fn plain() -> Value {
        json!({"image": "x"})
    }

    fn exit(code: i32, restarting: bool) -> Value {
        let error = format!("the app exited with code {code}");
        json!({"exit_code": code, "restarting": restarting, "error": error})
    }

    #[test]
    fn an_app_that_ends_has_failed_whatever_its_code() {
        for code in [0, 1] {
            let events = [
                ("2", "launch", Value::Null),
                ("3", "start", Value::Null),
                ("4", "exit", exit(code, code != 0)),
            ];
            // Also in the moment in which it runs again.
            for state in ["stopped", "starting", "started", "failed"] {
                let stands = stand(&machine(state, plain(), &events), "");
                let Standing::Ended(reason) = stands else {
                    panic!("{state}: {stands:?}");
                };
                assert!(reason.contains(&format!("code {code}")), "{reason}");
                assert_eq!(reason.contains("started again"), code != 0, "{reason}");
            }
        }
    }

    #[test]
    fn a_task_that_is_to_run_once_may_end_well() {
        let once = json!({"image": "x", "restart": {"policy": "no"}});
        let done = [("2", "launch", Value::Null), ("3", "exit", exit(0, false))];
        assert_eq!(
            stand(&machine("stopped", once.clone(), &done), ""),
            Standing::Done
        );
        let failed = [("2", "launch", Value::Null), ("3", "exit", exit(1, false))];
        assert!(matches!(
            stand(&machine("stopped", once, &failed), ""),
            Standing::Ended(_)
        ));
        let served =
            json!({"image": "x", "restart": {"policy": "no"}, "services": [{"internal_port": 80}]});
        assert!(matches!(
            stand(&machine("stopped", served, &done), ""),
            Standing::Ended(_)
        ));
    }

    #[test]
    fn how_the_last_configuration_ended_is_not_held_against_the_new_one() {
        let events = [
            ("1", "exit", exit(1, true)),
            ("3", "exit", exit(1, true)),
            ("4", "update", Value::Null),
            ("5", "start", Value::Null),
        ];
        assert_eq!(
            stand(&machine("started", plain(), &events), "2"),
            Standing::Running
        );
        assert_eq!(
            stand(&machine("starting", plain(), &events), "2"),
            Standing::Starting
        );
    }

    #[test]
    fn the_end_of_the_last_configuration_may_be_told_after_the_update() {
        let late = [("3", "exit", exit(1, true))];
        for state in ["starting", "stopped", "started"] {
            let stands = stand(&machine(state, plain(), &late), "2");
            assert_eq!(stands, Standing::Coming, "{state}");
        }
        // A Machine that its host cannot even take up has no events.
        assert_eq!(
            stand(&machine("failed", plain(), &[]), ""),
            Standing::Ended("it is failed".into())
        );
    }

    #[test]
    fn a_start_that_failed_gives_its_reason() {
        let error = json!({"error": "no kernel", "restarting": false});
        let events = [("2", "launch", Value::Null), ("3", "exit", error)];
        assert_eq!(
            stand(&machine("failed", plain(), &events), ""),
            Standing::Ended("no kernel".into())
        );
    }

    #[test]
    fn what_its_gate_puts_to_sleep_has_run() {
        let begun = [("2", "update", Value::Null), ("3", "start", Value::Null)];
        let stands = |state: &str| stand(&machine(state, plain(), &begun), "1");
        assert_eq!(stands("suspending"), Standing::Asleep);
        assert_eq!(stands("suspended"), Standing::Asleep);
        // Before the new configuration has begun it is the old one's sleep.
        let before = machine("suspended", plain(), &[]);
        assert_eq!(stand(&before, "1"), Standing::Coming);
        let mut stopped = machine("stopped", plain(), &begun);
        assert!(matches!(stand(&stopped, "1"), Standing::Ended(_)));
        for (source, asleep) in [("user", false), ("proxy", true)] {
            let stop = json!({"id": "4", "type": "stop", "status": "stopped", "source": source, "timestamp": 0});
            stopped.events.push(serde_json::from_value(stop).unwrap());
            assert_eq!(stand(&stopped, "1") == Standing::Asleep, asleep, "{source}");
            stopped.events.pop();
        }
    }

    #[test]
    fn without_checks_the_services_ports_are_looked_at() {
        let of = |config: Value| Wanted::of(&serde_json::from_value(config).unwrap());
        assert_eq!(of(plain()), Wanted::Steady);
        let services = json!([{"internal_port": 80}, {"internal_port": 80}, {"internal_port": 53, "protocol": "udp"}]);
        assert_eq!(
            of(json!({"image": "x", "services": services})),
            Wanted::Ports(vec![80])
        );
        let checked = json!({"image": "x", "checks": {"a": {"type": "tcp"}},
            "services": [{"internal_port": 80, "checks": [{"type": "http"}]}]});
        assert_eq!(of(checked), Wanted::Checks(2));
    }
}
