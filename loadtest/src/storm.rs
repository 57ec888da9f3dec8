//! `tern-loadtest storm`: many requests at one moment, again and again.

use std::sync::Arc;

use anyhow::Result;
use serde::Serialize;

use crate::args;
use crate::exchange::Expectation;
use crate::herd::herd;
use crate::tally::{Summary, Tally};
use crate::target::Target;
use crate::{hook, report};

#[derive(Debug, Serialize)]
struct Report {
    url: String,
    simultaneous: u64,
    /// Why not all rounds were run, if so.
    stopped: Option<String>,
    rounds: Vec<Summary>,
    total: Summary,
}

/// Storms and prints. True if every request was answered.
pub async fn run(arguments: &args::Storm) -> Result<bool> {
    let target = Arc::new(Target::new(&arguments.common)?);
    let expected = Expectation::new(&arguments.common);
    let mut total = Tally::default();
    let mut rounds = Vec::new();
    let mut stopped = None;
    for round in 1..=arguments.rounds {
        if let Some(command) = &arguments.between
            && let Err(error) = hook::run(command, round, arguments.common.command_timeout).await
        {
            stopped = Some(format!("before round {round}: {error:#}"));
            break;
        }
        let tally = herd(
            &target,
            &expected,
            arguments.simultaneous,
            arguments.barrier,
        )
        .await;
        let summary = tally.summary();
        eprintln!(
            "round {round}/{}: {} failed, first {:.1} ms, last {:.1} ms",
            arguments.rounds, summary.failed, summary.from_start.min, summary.from_start.max
        );
        rounds.push(summary);
        total.merge(tally);
    }
    let report = Report {
        url: target.url().to_string(),
        simultaneous: arguments.simultaneous,
        stopped,
        rounds,
        total: total.summary(),
    };
    report::print(&report, &report.text(), arguments.common.json)?;
    Ok(report.total.failed == 0 && report.stopped.is_none())
}

impl Report {
    fn text(&self) -> String {
        let mut text = format!(
            "{} rounds of {} simultaneous requests, {}\n\n",
            self.rounds.len(),
            self.simultaneous,
            self.url
        );
        text += &report::summary(&self.total);
        if let Some(reason) = &self.stopped {
            text += &format!("\nNot all rounds were run: {reason}\n");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{Server, run as command};

    #[tokio::test]
    async fn all_requests_arrive_each_on_its_own_connection() {
        for barrier in ["request", "connect"] {
            let server = Server::start().await;
            let dir = tempfile::tempdir().unwrap();
            let rounds = dir.path().join("rounds");
            let between = format!("echo $TERN_LOADTEST_ROUND >> {}", rounds.display());
            let ok = command(&[
                "storm",
                "--url",
                &server.url("/"),
                "--simultaneous",
                "50",
                "--rounds",
                "3",
                "--between",
                &between,
                "--barrier",
                barrier,
                "--expect-body",
                "hello",
            ])
            .await
            .unwrap();
            assert!(ok);
            assert_eq!((server.requests(), server.connections()), (150, 150));
            assert_eq!(std::fs::read_to_string(rounds).unwrap(), "1\n2\n3\n");
        }
    }

    #[tokio::test]
    async fn requests_are_under_way_at_the_same_time() {
        let server = Server::start().await;
        // Answers only once all forty are there.
        let ok = command(&[
            "storm",
            "--url",
            &server.url("/meet/40"),
            "--simultaneous",
            "40",
        ])
        .await;
        assert!(ok.unwrap());
    }

    #[tokio::test]
    async fn one_failure_is_a_failure() {
        let server = Server::start().await;
        let storm = |path: &str, more: &[&str]| {
            let url = server.url(path);
            let mut arguments = vec!["storm", "--simultaneous", "10", "--url"];
            arguments.push(Box::leak(url.into_boxed_str()));
            arguments.extend(
                more.iter()
                    .map(|more| &*Box::leak(more.to_string().into_boxed_str())),
            );
            async move { command(&arguments).await.unwrap() }
        };
        assert!(!storm("/every-tenth-fails", &[]).await);
        assert!(!storm("/close", &[]).await);
        assert!(!storm("/cut", &[]).await);
        assert!(!storm("/never", &["--timeout", "300ms"]).await);
        assert!(!storm("/", &["--expect-body", "something else"]).await);
        assert!(!storm("/", &["--expect-status", "204"]).await);
        assert!(!storm("/", &["--between", "false"]).await);
        assert!(storm("/status/503", &["--expect-status", "503"]).await);
    }

    #[tokio::test]
    async fn speaks_tls_by_a_given_root_and_address() {
        let server = Server::start_tls("hello.example").await;
        let port = server.address().port();
        let url = format!("https://hello.example:{port}/");
        let resolve = format!("hello.example:{port}:127.0.0.1");
        let base = [
            "storm",
            "--simultaneous",
            "5",
            "--url",
            &url,
            "--resolve",
            &resolve,
        ];
        for version in ["1.1", "2"] {
            let mut arguments = base.to_vec();
            arguments.extend(["--http", version, "--cacert", server.root()]);
            assert!(command(&arguments).await.unwrap(), "HTTP/{version}");
        }
        // Another root does not do.
        let other = Server::start_tls("hello.example").await;
        let mut arguments = base.to_vec();
        arguments.extend(["--cacert", other.root()]);
        assert!(!command(&arguments).await.unwrap());
    }
}
