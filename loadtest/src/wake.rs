//! `tern-loadtest wake`: a request to a suspended, to a running, and to a stopped Machine.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::args::{self, Barrier};
use crate::exchange::Expectation;
use crate::herd::herd;
use crate::tally::{Summary, Tally};
use crate::target::Target;
use crate::{hook, plot, report};

/// From the first wake's reply to the next suspend. A monitor takes the working set of a wake 100 ms after its first
/// reply; one suspended before that wakes the next time as for the first.
const UNTIL_KNOWN: Duration = Duration::from_millis(200);

/// What the Machine is doing when the request arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Suspended for the first time since its cold start: nothing is known yet of what its wake needs.
    FirstSuspended,
    /// Suspended to a snapshot, after it has been woken from one before.
    Suspended,
    /// Running, and just asked.
    Warm,
    /// Stopped: it must boot.
    Cold,
}

impl State {
    fn label(self) -> &'static str {
        match self {
            Self::FirstSuspended => "suspended, first time",
            Self::Suspended => "suspended",
            Self::Warm => "warm",
            Self::Cold => "cold start",
        }
    }
}

/// The outcome of all rounds.
#[derive(Debug, Serialize)]
pub struct Report {
    url: String,
    rounds: u64,
    simultaneous: u64,
    /// Why not all rounds were measured, if so.
    stopped: Option<String>,
    states: Vec<Measured>,
}

#[derive(Debug, Serialize)]
struct Measured {
    state: State,
    summary: Summary,
    /// Each time from request to first byte.
    samples_ms: Vec<f64>,
}

/// Measures, prints and writes. True if all went well.
pub async fn run(arguments: &args::Wake) -> Result<bool> {
    let report = measure(arguments).await?;
    let markdown = report.markdown();
    report::print(&report, &markdown, arguments.common.json)?;
    if let Some(dir) = &arguments.output {
        report.write(dir, &markdown)?;
    }
    let failed = report
        .states
        .iter()
        .any(|measured| measured.summary.failed > 0);
    Ok(!failed && report.stopped.is_none())
}

async fn measure(arguments: &args::Wake) -> Result<Report> {
    let target = Arc::new(Target::new(&arguments.common)?);
    let expected = Expectation::new(&arguments.common);
    let ask = |count| herd(&target, &expected, count, Barrier::Request);
    let must_answer = async || match ask(1).await.summary().failures.first() {
        Some(reason) => bail!("{} does not answer: {}", target.url(), reason.detail),
        None => Ok(()),
    };

    // Whether it works at all is better known before anything is suspended.
    must_answer().await?;
    if let Some(command) = &arguments.stop_cmd {
        // As each round ends with a cold start, so the first one is to follow one.
        hook::run(command, 0, arguments.common.command_timeout).await?;
        must_answer().await?;
    }
    let states = match arguments.stop_cmd {
        Some(_) => vec![
            State::FirstSuspended,
            State::Suspended,
            State::Warm,
            State::Cold,
        ],
        None => vec![State::Suspended, State::Warm],
    };
    let mut tallies: Vec<Tally> = states.iter().map(|_| Tally::default()).collect();
    let mut stopped = None;
    'rounds: for round in 1..=arguments.rounds {
        let mut line = format!("round {round}/{}:", arguments.rounds);
        for (state, tally) in states.iter().zip(&mut tallies) {
            let command = match state {
                State::FirstSuspended | State::Suspended => Some(&arguments.suspend_cmd),
                State::Warm => None,
                State::Cold => arguments.stop_cmd.as_ref(),
            };
            if let Some(command) = command
                && let Err(error) =
                    hook::run(command, round, arguments.common.command_timeout).await
            {
                stopped = Some(format!("in round {round}: {error:#}"));
                break 'rounds;
            }
            let outcome = ask(arguments.simultaneous).await;
            let summary = outcome.summary();
            line += &format!(" {} {:.1} ms", state.label(), summary.first_byte.median);
            if summary.failed > 0 {
                line += &format!(" ({} failed)", summary.failed);
            }
            tally.merge(outcome);
            if *state == State::FirstSuspended {
                tokio::time::sleep(UNTIL_KNOWN).await;
            }
        }
        eprintln!("{line}");
    }
    Ok(Report {
        url: target.url().to_string(),
        rounds: arguments.rounds,
        simultaneous: arguments.simultaneous,
        stopped,
        states: states
            .into_iter()
            .zip(tallies)
            .map(|(state, tally)| Measured {
                state,
                summary: tally.summary(),
                samples_ms: tally.samples(),
            })
            .collect(),
    })
}

impl Report {
    fn markdown(&self) -> String {
        let rows = self.states.iter().map(|measured| {
            let Summary {
                requests,
                failed,
                first_byte,
                from_start,
                ..
            } = &measured.summary;
            let mut row = vec![
                measured.state.label().to_owned(),
                requests.to_string(),
                failed.to_string(),
            ];
            let times = [
                first_byte.median,
                first_byte.p95,
                first_byte.max,
                from_start.p95,
            ];
            row.extend(times.map(report::millis));
            row
        });
        let mut text = format!(
            "Request sent to first byte, in milliseconds: {} rounds, {} at a time, {}\n\n",
            self.rounds, self.simultaneous, self.url
        );
        text += &report::table(
            &[
                "Machine",
                "requests",
                "failed",
                "median",
                "p95",
                "max",
                "p95 from intended start",
            ],
            rows,
        );
        for measured in &self.states {
            let failures = report::failures(&measured.summary);
            if !failures.is_empty() {
                text += &format!("\n{}:\n{failures}", measured.state.label());
            }
        }
        if let Some(reason) = &self.stopped {
            text += &format!("\nNot all rounds were measured: {reason}\n");
        }
        text
    }

    fn write(&self, dir: &Path, markdown: &str) -> Result<()> {
        let rows: Vec<(&str, &[f64])> = self
            .states
            .iter()
            .map(|measured| (measured.state.label(), &*measured.samples_ms))
            .collect();
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        report::write(&dir.join("wake.md"), markdown)?;
        report::write(
            &dir.join("wake.json"),
            &(serde_json::to_string_pretty(self)? + "\n"),
        )?;
        let title = "Request sent to first byte";
        report::write(&dir.join("wake.svg"), &plot::strips(title, &rows)?)
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{Server, run as command};

    #[tokio::test]
    async fn suspended_warm_and_cold_requests_are_told_apart() {
        let server = Server::start().await;
        let dir = tempfile::tempdir().unwrap();
        let (state, out) = (dir.path().join("state"), dir.path().join("out"));
        let set = |to: &str| format!("echo {to} > {}", state.display());
        server.sleeps_by(&state);
        let ok = command(&[
            "wake",
            "--url",
            &server.url("/"),
            "--rounds",
            "3",
            "--simultaneous",
            "2",
            "--suspend-cmd",
            &set("200"),
            "--stop-cmd",
            &set("600"),
            "--output",
            out.to_str().unwrap(),
        ])
        .await
        .unwrap();
        assert!(ok);

        let text = std::fs::read_to_string(out.join("wake.json")).unwrap();
        let report: serde_json::Value = serde_json::from_str(&text).unwrap();
        let states = report["states"].as_array().unwrap();
        let states: Vec<_> = states.iter().map(|s| s["state"].as_str()).collect();
        let order = ["first_suspended", "suspended", "warm", "cold"];
        assert_eq!(states, order.map(Some));
        let median = |n: usize| {
            report["states"][n]["summary"]["first_byte"]["median"]
                .as_f64()
                .unwrap()
        };
        for asleep in [median(0), median(1)] {
            assert!((200.0..600.0).contains(&asleep), "{asleep}");
        }
        assert!(median(2) < 200.0, "{}", median(2));
        assert!(median(3) >= 600.0, "{}", median(3));
        assert_eq!(
            report["states"][0]["samples_ms"].as_array().unwrap().len(),
            6
        );
        // One to see that it answers, one to start it cold before the rounds.
        assert_eq!(server.requests(), 2 + 3 * 4 * 2);

        let table = std::fs::read_to_string(out.join("wake.md")).unwrap();
        assert!(table.contains("| suspended             |"), "{table}");
        assert!(
            std::fs::read_to_string(out.join("wake.svg"))
                .unwrap()
                .contains("cold start")
        );
    }

    #[tokio::test]
    async fn a_failing_command_keeps_what_was_measured() {
        let server = Server::start().await;
        let out = tempfile::tempdir().unwrap();
        let ok = command(&[
            "wake",
            "--url",
            &server.url("/"),
            "--rounds",
            "5",
            "--suspend-cmd",
            "test $TERN_LOADTEST_ROUND != 3",
            "--output",
            out.path().to_str().unwrap(),
        ])
        .await
        .unwrap();
        assert!(!ok);
        let text = std::fs::read_to_string(out.path().join("wake.md")).unwrap();
        assert!(text.contains("in round 3"), "{text}");
        assert!(text.contains("| suspended |        2 |"), "{text}");
    }

    #[tokio::test]
    async fn a_target_that_does_not_answer_is_named_before_anything_is_suspended() {
        let server = Server::start().await;
        let dir = tempfile::tempdir().unwrap();
        let touched = dir.path().join("touched");
        let touch = format!("touch {}", touched.display());
        let url = server.url("/status/503");
        let error = command(&["wake", "--url", &url, "--suspend-cmd", &touch])
            .await
            .unwrap_err();
        assert!(error.to_string().contains("status 503"), "{error}");
        assert!(!touched.exists());
    }
}
