//! `tern serve`, and the `tern` command that speaks to it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;

use crate::artefacts::Artefacts;
use crate::pebble::{DIRECTORY, Pebble};
use crate::process::{Background, checked, output, wait_for};
use crate::world::PATIENCE;

/// The domain of the test's apps.
pub const DOMAIN: &str = "tern.test";
const API: &str = "http://127.0.0.1:4280";

/// A host's server, with its data directory.
#[derive(Debug)]
pub struct Server {
    artefacts: Artefacts,
    process: Option<Background>,
    arguments: Vec<String>,
    /// Where it keeps everything.
    pub data: PathBuf,
    log: PathBuf,
}

impl Server {
    /// Starts it and waits until its API answers. `more` are arguments for `tern serve`.
    pub fn start(
        artefacts: &Artefacts,
        dir: &Path,
        pebble: &Pebble,
        more: &[&str],
    ) -> Result<Self> {
        let data = dir.join("data");
        std::fs::create_dir_all(&data)?;
        let text = |path: &Path| {
            path.to_str()
                .map(str::to_owned)
                .context("a path that is not UTF-8")
        };
        let mut arguments: Vec<String> =
            ["serve", "--domain", DOMAIN, "--acme-directory", DIRECTORY]
                .map(Into::into)
                .into();
        arguments.extend(["--data-dir".to_owned(), text(&data)?]);
        arguments.extend(["--acme-root-ca".to_owned(), text(&pebble.directory_ca)?]);
        // As on a host where Tern is installed: what a start reads is on the host's own disk, and in its
        // memory from the second time on. The checkout is seen over a network protocol.
        let installed = dir.join("installed");
        std::fs::create_dir_all(&installed)?;
        for (option, from) in [
            ("--vmm", artefacts.program("tern-vmm")),
            ("--kernel", artefacts.program("guest/vmlinux")),
            ("--initramfs", artefacts.program("guest/initramfs.cpio")),
        ] {
            let name = from.file_name().context("a file without a name")?;
            let to = installed.join(name);
            std::fs::copy(&from, &to).with_context(|| format!("copy {}", from.display()))?;
            arguments.extend([option.to_owned(), text(&to)?]);
        }
        arguments.extend(more.iter().map(|&m| m.to_owned()));
        let log = dir.join("serve.log");
        let mut server = Self {
            artefacts: artefacts.clone(),
            process: None,
            arguments,
            data,
            log,
        };
        server.up()?;
        Ok(server)
    }

    /// Starts `tern serve` (again) and waits until its API answers.
    pub fn up(&mut self) -> Result<()> {
        let mut command = Command::new(self.artefacts.program("tern"));
        command.args(&self.arguments).env("RUST_BACKTRACE", "1");
        let mut process = Background::start("tern serve", &mut command, &self.log)?;
        wait_for("the API answers", PATIENCE, || {
            process.must_run()?;
            let health = format!("{API}/healthz");
            Ok(checked(Command::new("curl").args(["-sf", "--max-time", "5", &health])).ok())
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// Kills `tern serve` as a power cut would kill it: nothing is flushed, nobody is told.
    pub fn kill(&mut self) -> Result<()> {
        let mut process = self.process.take().context("tern serve is not running")?;
        process.signal(Signal::SIGKILL)?;
        process.wait(Duration::from_secs(10)).map(drop)
    }

    /// Asks `tern serve` to end and waits until it has.
    pub fn stop(&mut self) -> Result<()> {
        let mut process = self.process.take().context("tern serve is not running")?;
        process.signal(Signal::SIGTERM)?;
        process.wait(Duration::from_secs(60)).map(drop)
    }

    /// Runs a `tern` command; its failure is an error.
    pub fn tern(&self, args: &[&str]) -> Result<String> {
        checked(&mut self.command(args))
    }

    /// Runs a `tern` command, whatever its end.
    pub fn tern_output(&self, args: &[&str]) -> Result<Output> {
        output(&mut self.command(args))
    }

    /// Runs a `tern` command that prints JSON.
    pub fn tern_json(&self, args: &[&str]) -> Result<Value> {
        let mut all = args.to_vec();
        all.push("--json");
        let text = self.tern(&all)?;
        serde_json::from_str(&text).with_context(|| format!("tern {all:?} printed no JSON: {text}"))
    }

    /// A `tern` command to run.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.artefacts.program("tern"));
        command
            .args(args)
            .env("TERN_DATA_DIR", &self.data)
            .env("TERN_API_URL", API);
        command.env("XDG_CONFIG_HOME", self.data.join("no-settings"));
        command
    }

    /// A call of the API as this server's administrator; anything but success is an error.
    pub fn api(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let token = std::fs::read_to_string(self.data.join("admin-token"))?;
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--fail-with-body", "--max-time", "120", "-X", method])
            .args(["-H", &format!("authorization: Bearer {}", token.trim())]);
        if let Some(body) = body {
            curl.args([
                "-H",
                "content-type: application/json",
                "-d",
                &body.to_string(),
            ]);
        }
        let text = checked(curl.arg(format!("{API}{path}")))?;
        serde_json::from_str(&text).with_context(|| format!("{method} {path} answered {text}"))
    }

    /// The process of `tern serve`.
    pub fn pid(&self) -> Result<Pid> {
        let process = self.process.as_ref().context("tern serve is not running")?;
        Ok(process.pid())
    }

    /// What `tern serve` has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}
