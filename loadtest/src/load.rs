//! `tern-loadtest load`: requests for a while, at a constant rate or from busy clients.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::args;
use crate::exchange::{Answer, Expectation, Failure, FailureKind, connect, exchange};
use crate::report;
use crate::tally::{Summary, Tally};
use crate::target::{Connection, Target};

/// A client whose request failed waits so long before the next one: a server that refuses all is
/// not to be asked as fast as this machine can.
const AFTER_FAILURE: Duration = Duration::from_millis(50);

#[derive(Debug, Serialize)]
struct Report {
    url: String,
    /// Requests a second that were wanted, in an open loop.
    wanted_rate: Option<u64>,
    /// Busy clients, in a closed loop.
    clients: Option<u64>,
    seconds: f64,
    /// Good answers a second.
    answered_rate: f64,
    summary: Summary,
}

/// What all requests of a run share.
struct Run {
    target: Target,
    expected: Expectation,
    keep_alive: bool,
    /// Connections that nobody uses right now.
    idle: Mutex<Vec<Connection>>,
}

/// Loads and prints. True if every request was answered.
pub async fn run(arguments: &args::Load) -> Result<bool> {
    let run = Arc::new(Run {
        target: Target::new(&arguments.common)?,
        expected: Expectation::new(&arguments.common),
        keep_alive: !arguments.no_keep_alive,
        idle: Mutex::default(),
    });
    let start = Instant::now();
    let tally = match arguments.rate {
        Some(rate) => open_loop(&run, rate, arguments, start).await,
        None => closed_loop(&run, arguments, start).await,
    };
    let seconds = start.elapsed().as_secs_f64();
    let summary = tally.summary();
    let report = Report {
        url: run.target.url().to_string(),
        wanted_rate: arguments.rate,
        clients: arguments.rate.is_none().then_some(arguments.clients),
        seconds,
        answered_rate: (summary.requests - summary.failed) as f64 / seconds,
        summary,
    };
    report::print(&report, &report.text(), arguments.common.json)?;
    Ok(report.summary.failed == 0)
}

/// Sends each request at its time, whatever became of the others.
async fn open_loop(run: &Arc<Run>, rate: u64, arguments: &args::Load, start: Instant) -> Tally {
    let places = Arc::new(Semaphore::new(arguments.max_in_flight as usize));
    let (outcomes, mut received) = mpsc::unbounded_channel();
    let collector = tokio::spawn(async move {
        let mut tally = Tally::default();
        while let Some(outcome) = received.recv().await {
            tally.add(&outcome);
        }
        tally
    });
    for n in 0..arguments.max_requests {
        let at = Duration::from_secs_f64(n as f64 / rate as f64);
        if at >= arguments.duration {
            break;
        }
        let intended = start + at;
        tokio::time::sleep_until(intended.into()).await;
        let outcomes = outcomes.clone();
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            let detail = format!("{} requests are unanswered", arguments.max_in_flight);
            let _ = outcomes.send(Err(Failure::plain(FailureKind::NotSent, detail)));
            continue;
        };
        let run = Arc::clone(run);
        tokio::spawn(async move {
            let outcome = run.request(intended).await;
            drop(place);
            let _ = outcomes.send(outcome);
        });
    }
    drop(outcomes); // the collector ends with the last request
    finished(collector.await)
}

/// Keeps each client busy.
async fn closed_loop(run: &Arc<Run>, arguments: &args::Load, start: Instant) -> Tally {
    let end = start + arguments.duration;
    let sent = Arc::new(AtomicU64::new(0));
    let most = arguments.max_requests;
    let mut clients = JoinSet::new();
    for _ in 0..arguments.clients {
        let (run, sent) = (Arc::clone(run), Arc::clone(&sent));
        clients.spawn(async move {
            let mut tally = Tally::default();
            while Instant::now() < end && sent.fetch_add(1, Ordering::Relaxed) < most {
                let outcome = run.request(Instant::now()).await;
                tally.add(&outcome);
                if outcome.is_err() {
                    tokio::time::sleep(AFTER_FAILURE).await;
                }
            }
            tally
        });
    }
    let mut total = Tally::default();
    while let Some(tally) = clients.join_next().await {
        total.merge(finished(tally));
    }
    total
}

/// Nobody aborts these tasks, so that they can only have panicked.
fn finished<T>(result: Result<T, tokio::task::JoinError>) -> T {
    result.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

impl Run {
    async fn request(&self, intended: Instant) -> Result<Answer, Failure> {
        // A server may close an idle connection just when a request is under way to it. Then that
        // request is sent again, as every client does.
        if let Some(mut connection) = self.idle_connection()
            && connection.ready().await
        {
            match exchange(&self.target, &mut connection, &self.expected, intended).await {
                Err(Failure {
                    kind: FailureKind::NoAnswer,
                    ..
                }) => {}
                outcome => {
                    self.keep(connection, &outcome);
                    return outcome;
                }
            }
        }
        let mut connection = connect(&self.target, self.expected.timeout).await?;
        let outcome = exchange(&self.target, &mut connection, &self.expected, intended).await;
        self.keep(connection, &outcome);
        outcome
    }

    fn idle_connection(&self) -> Option<Connection> {
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop()
    }

    fn keep(&self, connection: Connection, outcome: &Result<Answer, Failure>) {
        if self.keep_alive && outcome.is_ok() {
            self.idle
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(connection);
        }
    }
}

impl Report {
    fn text(&self) -> String {
        let how = match (self.wanted_rate, self.clients) {
            (Some(rate), _) => format!("{rate} requests a second wanted"),
            (None, clients) => format!("{} clients", clients.unwrap_or_default()),
        };
        format!(
            "{how}, {:.0} good answers a second for {:.1} s, {}\n\n{}",
            self.answered_rate,
            self.seconds,
            self.url,
            report::summary(&self.summary)
        )
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{Server, run as command};

    #[tokio::test]
    async fn a_closed_loop_keeps_its_connections_and_stops_at_its_count() {
        let server = Server::start().await;
        let url = server.url("/");
        let load = [
            "load",
            "--url",
            &url,
            "--clients",
            "4",
            "--max-requests",
            "200",
            "--duration",
            "60s",
        ];
        assert!(command(&load).await.unwrap());
        assert_eq!(server.requests(), 200);
        assert!(server.connections() <= 4, "{}", server.connections());

        assert!(
            command(&[&load[..], &["--no-keep-alive"]].concat())
                .await
                .unwrap()
        );
        assert_eq!(server.requests(), 400);
        assert!(server.connections() >= 200);
    }

    #[tokio::test]
    async fn an_open_loop_sends_at_its_rate() {
        let server = Server::start().await;
        let url = server.url("/");
        assert!(
            command(&["load", "--url", &url, "--rate", "200", "--duration", "1s"])
                .await
                .unwrap()
        );
        assert_eq!(server.requests(), 200);
    }

    #[tokio::test]
    async fn an_open_loop_is_not_slowed_down_by_a_server_that_stalls() {
        let server = Server::start().await;
        let url = server.url("/never");
        let ok = command(&[
            "load",
            "--url",
            &url,
            "--rate",
            "100",
            "--duration",
            "1s",
            "--timeout",
            "1s",
            "--max-in-flight",
            "30",
        ])
        .await
        .unwrap();
        assert!(!ok);
        assert!(server.requests() >= 30, "{}", server.requests());
    }

    #[tokio::test]
    async fn connections_that_the_server_closes_are_made_anew() {
        let server = Server::start().await;
        let url = server.url("/and-close");
        let load = [
            "load",
            "--url",
            &url,
            "--clients",
            "2",
            "--max-requests",
            "100",
        ];
        assert!(command(&load).await.unwrap());
        assert_eq!(server.requests(), 100);
    }
}
