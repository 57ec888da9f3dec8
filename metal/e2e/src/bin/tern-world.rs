//! The demo's inside: a CA and a server until told to end, and a laptop that asks an app by name.
//!
//! `tern-world serve DIR APP`: runs in the host's own namespaces, so that forwarded ports reach it.
//! `tern-world bench DIR ROUNDS OUTPUT`: measures wakes.
//! `tern-world laptop CONFIG URL`: joins by WireGuard and prints what the URL answers.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{SigSet, Signal};
use tern_e2e::pebble::Pebble;
use tern_e2e::server::{DOMAIN, Server};
use tern_e2e::{Artefacts, Laptop, World, namespace};

/// As long as Let's Encrypt's.
const VALIDITY: Duration = Duration::from_secs(90 * 24 * 3600);

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", dir, app] => serve(Path::new(dir), app),
        ["bench", dir, rounds, output] => bench(Path::new(dir), rounds, Path::new(output)),
        ["laptop", config, url] => laptop(Path::new(config), url),
        _ => bail!(
            "usage: tern-world serve DIR APP | tern-world bench DIR ROUNDS OUTPUT | tern-world laptop CONFIG URL"
        ),
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

/// Measures the wake of `examples/hello` and writes table and plot to `output`.
fn bench(dir: &Path, rounds: &str, output: &Path) -> Result<()> {
    let world = World::with_dir(dir, VALIDITY, &["--autostop-after", "1h"])?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    let command = |verb: &str| {
        let command = world
            .server
            .command(&["machine", verb, &app.machine, "--app", "hello"]);
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        words
            .map(|w| w.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(" ")
    };
    let mut wake = world.program("tern-loadtest");
    wake.args(["wake", "--rounds", rounds, "--timeout", "120s", "--url"])
        .arg(format!("https://{}/", app.hostname));
    wake.arg("--resolve")
        .arg(format!("{}:443:127.0.0.1", app.hostname));
    wake.arg("--cacert").arg(&world.pebble.issued_root);
    wake.arg("--suspend-cmd")
        .arg(command("suspend"))
        .arg("--stop-cmd")
        .arg(command("stop"));
    wake.arg("--output").arg(output);
    for (name, value) in world.server.command(&[]).get_envs() {
        wake.env(name, value.unwrap_or_default());
    }
    let status = wake.status().context("tern-loadtest")?;
    ensure!(status.success(), "tern-loadtest ended with {status}");
    Ok(())
}

fn laptop(config: &Path, url: &str) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let laptop = Laptop::new(0, scratch.path())?;
    laptop.join(&std::fs::read_to_string(config)?)?;
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
