//! The demo's inside: a CA and a server until told to end, and a laptop that asks an app by name.
//!
//! `tern-world serve DIR APP`: runs in the host's own namespaces, so that forwarded ports reach it.
//! `tern-world laptop CONFIG URL`: joins by WireGuard and prints what the URL answers.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{SigSet, Signal};
use tern_e2e::pebble::Pebble;
use tern_e2e::server::{DOMAIN, Server};
use tern_e2e::{Artefacts, Laptop, namespace};

/// As long as Let's Encrypt's.
const VALIDITY: Duration = Duration::from_secs(90 * 24 * 3600);

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", dir, app] => serve(Path::new(dir), app),
        ["laptop", config, url] => laptop(Path::new(config), url),
        _ => bail!("usage: tern-world serve DIR APP | tern-world laptop CONFIG URL"),
    }
}

fn serve(dir: &Path, app: &str) -> Result<()> {
    let ending = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    ending.thread_block().context("block signals")?;
    std::fs::create_dir_all(dir)?;
    let artefacts = Artefacts::find()?;
    namespace::add_host("127.0.0.1", &format!("{app}.{DOMAIN}"))?;
    let pebble = Pebble::start(&dir.join("pebble"), VALIDITY)?;
    let mut server = Server::start(&artefacts, dir, &pebble, &["--api", "0.0.0.0:4280"])?;
    println!("ready");
    ending.wait().context("wait for a signal")?;
    server.stop()
}

fn laptop(config: &Path, url: &str) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let laptop = Laptop::new(0, scratch.path())?;
    let config = std::fs::read_to_string(config)?;
    // The server knows its public addresses, not the one that this cable leads to.
    let lines = config
        .lines()
        .map(|line| match line.starts_with("Endpoint") {
            true => format!("Endpoint = {}:51820", laptop.server),
            false => line.to_owned(),
        });
    laptop.join(&lines.collect::<Vec<_>>().join("\n"))?;
    print!(
        "{}",
        laptop.run(
            "curl",
            &[
                "-sSf",
                "--retry",
                "5",
                "--retry-connrefused",
                "--max-time",
                "60",
                url
            ]
        )?
    );
    Ok(())
}
