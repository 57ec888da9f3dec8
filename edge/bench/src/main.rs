//! Tern's edge beside nginx, HAProxy and Caddy, each on one core, before the same app, in one run.
//!
//! `tern-edge-bench run PEERS_DIR RESULTS_DIR` leaves `edge.md`, `edge.json` (every sample) and `edge.svg` there.
//! Environment: `ROUNDS` (5), `CASES` and `CONTENDERS` (all; names as in [`case::Case`] and [`contender::Kind`]),
//! `REQUESTS` of a saturated case (100000), `CONNECTIONS` that idle (10000), `PROXY_CORE` (0). It runs the
//! proxies on `PROXY_CORE`; itself, the load and the app stay where it was started, which should be another core.
//!
//! What counts is processor time: throughput on two cores is whatever the load generator leaves. Contenders take
//! turns within each case, and ratios are taken within a round, so that a machine that is slow for a while is
//! slow for all of them.

mod case;
mod client;
mod contender;
mod report;
mod serve;

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use case::{Amounts, Case};
use contender::{Contender, Kind, Process};
use report::Report;

/// The name that certificate and requests carry.
const HOST: &str = "bench.tern.test";
fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["serve"] => serve::run(),
        ["run", peers, results] => run(Path::new(peers), Path::new(results)),
        _ => bail!("usage: tern-edge-bench run PEERS_DIR RESULTS_DIR"),
    }
}

fn run(peers: &Path, results: &Path) -> Result<()> {
    let rounds: usize = setting("ROUNDS", 5)?;
    let core: usize = setting("PROXY_CORE", 0)?;
    let cases = chosen("CASES", &Case::ALL)?;
    let kinds = chosen("CONTENDERS", &Kind::ALL)?;
    let amounts = Amounts {
        requests: setting("REQUESTS", 100_000)?,
        connections: setting("CONNECTIONS", 10_000)?,
    };
    ensure!(rounds > 0, "ROUNDS is at least 1");
    raise_descriptors(amounts.connections as u64)?;

    let work = prepare(peers)?;
    let _origin = Process::origin(work.path())?;
    let mut report = Report::new(&kinds, results);
    for round in 0..rounds {
        let mut contenders = kinds
            .iter()
            .map(|&kind| Contender::start(kind, core, work.path()))
            .collect::<Result<Vec<_>>>()?;
        // Who begins changes from round to round.
        contenders.rotate_left(round % kinds.len());
        for contender in &contenders {
            case::warm_up(contender)?;
        }
        for &case in cases.iter().filter(|&&case| case != Case::Idle) {
            for contender in &contenders {
                let samples = case.run(contender, work.path(), amounts)?;
                report.add(contender.kind, case, samples);
            }
        }
        // Memory last: a proxy keeps what connections once took.
        for contender in &contenders {
            report.resident(contender.kind, contender.resident_kib()?);
            if cases.contains(&Case::Idle) {
                let samples = Case::Idle.run(contender, work.path(), amounts)?;
                report.add(contender.kind, Case::Idle, samples);
            }
        }
        drop(contenders);
        eprintln!("round {} of {rounds}", round + 1);
        report.write()?; // a run cut short leaves what it has
    }
    print!("{}", report.markdown());
    Ok(())
}

/// A directory with the certificate, the app's files and the peers' configurations: where all of them run.
fn prepare(peers: &Path) -> Result<tempfile::TempDir> {
    let work = tempfile::tempdir()?;
    let path = |name: &str| work.path().join(name);
    // rcgen's own choice is ECDSA on P-256.
    let made = rcgen::generate_simple_self_signed(vec![HOST.to_owned()])?;
    let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    std::fs::write(path("cert.pem"), &certificate)?;
    std::fs::write(path("key.pem"), &key)?;
    std::fs::write(path("both.pem"), certificate + &key)?;
    std::fs::create_dir(path("www"))?;
    std::fs::write(path("www/1k"), "k".repeat(1 << 10))?;
    std::fs::write(path("www/1m"), "m".repeat(1 << 20))?;
    for name in ["origin.conf", "nginx.conf", "haproxy.cfg", "Caddyfile"] {
        let from: PathBuf = peers.join(name);
        std::fs::copy(&from, path(name)).with_context(|| format!("{}", from.display()))?;
    }
    Ok(work)
}

/// Lets us and the children open as many files as may be: a connection each, and some.
fn raise_descriptors(connections: u64) -> Result<()> {
    const OTHERS: u64 = 2_000;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    ensure!(
        most >= connections + OTHERS,
        "at most {most} files may be open (`ulimit -Hn`); raise that, or set CONNECTIONS lower"
    );
    Ok(())
}

fn setting<T: FromStr>(name: &str, default: T) -> Result<T> {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .ok()
            .with_context(|| format!("{name}={text}: not a number")),
        Err(_) => Ok(default),
    }
}

/// Those that a comma-separated variable names, in our order; all where it is not set.
fn chosen<T: Copy + PartialEq + FromStr<Err = anyhow::Error>>(
    name: &str,
    all: &[T],
) -> Result<Vec<T>> {
    let Ok(text) = std::env::var(name) else {
        return Ok(all.to_vec());
    };
    let named = text
        .split(',')
        .map(|one| one.trim().parse())
        .collect::<Result<Vec<T>>>()
        .with_context(|| format!("{name}={text}"))?;
    Ok(all
        .iter()
        .copied()
        .filter(|one| named.contains(one))
        .collect())
}
