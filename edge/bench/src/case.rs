//! What is done to a contender, and what is taken down of it.

use std::path::Path;
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context as _, Result, ensure};

use crate::HOST;
use crate::client;
use crate::contender::Contender;

/// One kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Case {
    /// HTTP/1.1, 32 connections, 1 KiB, as fast as it goes.
    H1,
    /// HTTP/2, 8 connections of 16 streams, 1 KiB, as fast as it goes.
    H2,
    /// HTTP/1.1 at 2,000 requests a second.
    Rate,
    /// HTTP/1.1, 8 connections, 1 MiB.
    Large,
    /// A connection and a full handshake for each request.
    Handshake,
    /// Connections that have made a request, and wait.
    Idle,
}

/// How much of it.
#[derive(Debug, Clone, Copy)]
pub struct Amounts {
    /// Requests of a saturated case; the others follow.
    pub requests: usize,
    /// Connections of [`Case::Idle`].
    pub connections: usize,
}

/// One figure of a case. The first of a case is what it is about.
pub type Sample = (Measure, f64);

/// What a figure means; less is better for all but `PerSecond`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// Processor time, seconds for 100,000 requests.
    Cpu,
    /// Requests a second.
    PerSecond,
    /// Latency, median, milliseconds.
    P50,
    /// Latency, 99th percentile, milliseconds.
    P99,
    /// Memory of a connection, KiB.
    PerConnection,
}

impl Measure {
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "CPU s per 100k",
            Self::PerSecond => "requests/s",
            Self::P50 => "p50 ms",
            Self::P99 => "p99 ms",
            Self::PerConnection => "KiB each",
        }
    }
}

impl Case {
    pub const ALL: [Self; 6] = [
        Self::H1,
        Self::H2,
        Self::Rate,
        Self::Large,
        Self::Handshake,
        Self::Idle,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::H1 => "h1",
            Self::H2 => "h2",
            Self::Rate => "rate",
            Self::Large => "large",
            Self::Handshake => "handshake",
            Self::Idle => "idle",
        }
    }

    pub fn title(self) -> &'static str {
        match self {
            Self::H1 => "HTTP/1.1, 32 connections",
            Self::H2 => "HTTP/2, 8 connections of 16 streams",
            Self::Rate => "HTTP/1.1 at 2,000 requests/s",
            Self::Large => "HTTP/1.1, bodies of 1 MiB",
            Self::Handshake => "a full handshake per request",
            Self::Idle => "idle TLS connections",
        }
    }

    /// Does it, and says what it cost.
    pub fn run(self, contender: &Contender, work: &Path, amounts: Amounts) -> Result<Vec<Sample>> {
        let n = amounts.requests;
        let load = |options: &str, file: &str, n: usize| {
            let before = contender.cpu_seconds()?;
            let told = h2load(contender, work, options, file, n)
                .with_context(|| format!("{} under {}", contender.kind.name(), self.name()))?;
            let cpu = contender.cpu_seconds()? - before;
            anyhow::Ok(vec![
                (Measure::Cpu, cpu * 100_000.0 / n as f64),
                (Measure::PerSecond, told.per_second),
                (Measure::P50, told.p50),
                (Measure::P99, told.p99),
            ])
        };
        match self {
            Self::H1 => load("--h1 -c 32", "1k", n),
            Self::H2 => load("-c 8 -m 16", "1k", n),
            Self::Rate => load("--h1 -c 20 --rps 100", "1k", n / 10),
            Self::Large => load("--h1 -c 8", "1m", n / 50),
            Self::Handshake => {
                let n = n / 25;
                let before = contender.cpu_seconds()?;
                let elapsed = client::handshakes(contender.kind.address(), work, n)?;
                let cpu = contender.cpu_seconds()? - before;
                Ok(vec![
                    (Measure::Cpu, cpu * 100_000.0 / n as f64),
                    (Measure::PerSecond, n as f64 / elapsed.as_secs_f64()),
                ])
            }
            Self::Idle => {
                let n = amounts.connections;
                let before = contender.resident_kib()?;
                let held = client::idle(contender.kind.address(), work, n)?;
                let each = (contender.resident_kib()? - before) / n as f64;
                drop(held);
                Ok(vec![(Measure::PerConnection, each)])
            }
        }
    }
}

impl FromStr for Case {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|case| case.name() == text);
        found.with_context(|| format!("there is no case {text:?}"))
    }
}

/// Its first requests, and the proof that it answers.
pub fn warm_up(contender: &Contender) -> Result<()> {
    let work = tempfile::tempdir()?;
    for (options, file, n) in [
        ("--h1 -c 32", "1k", 2000),
        ("-c 8 -m 16", "1k", 2000),
        ("--h1 -c 8", "1m", 50),
    ] {
        h2load(contender, work.path(), options, file, n)
            .with_context(|| format!("{} does not serve", contender.kind.name()))?;
    }
    Ok(())
}

struct Told {
    per_second: f64,
    p50: f64,
    p99: f64,
}

/// Runs h2load (of nghttp2): each request must be answered with 200.
fn h2load(contender: &Contender, work: &Path, options: &str, file: &str, n: usize) -> Result<Told> {
    let log = work.join("requests.log");
    if log.exists() {
        std::fs::remove_file(&log)?; // it appends
    }
    let output = Command::new("h2load")
        .args(options.split(' '))
        .args(["-t", "1", "-n", &n.to_string(), "--log-file"])
        .arg(&log)
        // One cipher for all: what is compared is the proxies.
        .args(["--tls13-ciphers", "TLS_AES_128_GCM_SHA256"])
        .args(["--connect-to", &contender.kind.address().to_string()])
        .arg(format!(
            "https://{HOST}:{}/{file}",
            contender.kind.address().port()
        ))
        .output()
        .context("cannot start h2load; run .ci/setup bench")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "h2load failed: {text}");
    told(&text, &std::fs::read_to_string(&log)?, n).with_context(|| text.into_owned())
}

/// Reads h2load's summary and its log: a line a request, with start, status and microseconds.
fn told(text: &str, log: &str, n: usize) -> Result<Told> {
    let finished = text.lines().find(|line| line.starts_with("finished in "));
    let per_second = finished
        .and_then(|line| line.split(", ").nth(1)?.strip_suffix(" req/s"))
        .context("h2load did not say how fast it was")?
        .parse()?;
    let mut micros = Vec::new();
    for line in log.lines() {
        let mut fields = line.split('\t').skip(1);
        let (status, time) = (fields.next(), fields.next());
        ensure!(status == Some("200"), "a request was answered: {line}");
        micros.push(time.context("no time")?.parse::<f64>()?);
    }
    ensure!(
        micros.len() == n,
        "{} of {n} requests were answered",
        micros.len()
    );
    micros.sort_by(f64::total_cmp);
    let percentile = |share: f64| {
        let at = (share * n as f64).ceil() as usize;
        micros[at.clamp(1, n) - 1] / 1000.0
    };
    Ok(Told {
        per_second,
        p50: percentile(0.5),
        p99: percentile(0.99),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUMMARY: &str = "starting benchmark...\n\nfinished in 2.00s, 1.50 req/s, 1KB/s\n";

    #[test]
    fn what_h2load_says_is_read() {
        let told = told(SUMMARY, "1\t200\t1500\n2\t200\t9000\n3\t200\t500\n", 3).unwrap();
        assert_eq!((told.per_second, told.p50, told.p99), (1.5, 1.5, 9.0));
    }

    #[test]
    fn a_request_that_failed_fails_the_case() {
        for log in [
            "1\t200\t1\n2\t502\t1\n",
            "1\t200\t1\n",
            "1\t200\t1\n2\t200\n",
        ] {
            assert!(told(SUMMARY, log, 2).is_err(), "{log}");
        }
        assert!(told("", "1\t200\t1\n", 1).is_err());
    }
}
