//! A whole world: CA, server, apps.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::artefacts::Artefacts;
use crate::http::Reply;
use crate::laptop::Laptop;
use crate::namespace;
use crate::pebble::Pebble;
use crate::process::{tail, wait_for};
use crate::server::{DOMAIN, Server};

/// Longest a Machine may take to get anywhere, on an emulated host under load.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A world of its own.
pub struct World {
    /// The host's server.
    pub server: Server,
    /// The CA.
    pub pebble: Pebble,
    artefacts: Artefacts,
    dir: PathBuf,
}

impl World {
    /// Makes a world for the test of this name. Its directory is removed first, not last, so that a
    /// failed test can be looked at.
    pub fn new(name: &str) -> Result<Self> {
        Self::with(
            name,
            Duration::from_secs(90 * 24 * 3600),
            &["--autostop-after", "1h"],
        )
    }

    /// As [`World::new`], with this validity of certificates and these arguments for `tern serve`.
    pub fn with(name: &str, validity: Duration, serve: &[&str]) -> Result<Self> {
        Self::with_dir(&Path::new("/var/lib/tern-e2e").join(name), validity, serve)
    }

    /// As [`World::with`], in this directory.
    pub fn with_dir(dir: &Path, validity: Duration, serve: &[&str]) -> Result<Self> {
        let dir = dir.to_owned();
        match std::fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e).context("the last run's files");
            }
            _ => std::fs::create_dir_all(&dir)?,
        }
        let artefacts = Artefacts::find()?;
        namespace::isolate(&dir)?;
        let pebble = Pebble::start(&dir.join("pebble"), validity)?;
        let server = Server::start(&artefacts, &dir, &pebble, serve)?;
        Ok(Self {
            server,
            pebble,
            artefacts,
            dir,
        })
    }

    /// Makes an app of the `hello` example in the organization and deploys it.
    pub fn launch(&self, app: &str, org: &str) -> Result<App<'_>> {
        self.launch_with(app, org, "hello", &fly_toml(app))
    }

    /// Makes an app of an example's image with this `fly.toml` and deploys it.
    pub fn launch_with(
        &self,
        app: &str,
        org: &str,
        image: &str,
        fly_toml: &str,
    ) -> Result<App<'_>> {
        let hostname = format!("{app}.{DOMAIN}");
        namespace::add_host("127.0.0.1", &hostname)?;
        let dir = self.dir.join("apps").join(app);
        std::fs::create_dir_all(&dir)?;
        std::fs::write(dir.join("fly.toml"), fly_toml)?;
        let orgs = self.server.tern(&["orgs", "list", "--json"])?;
        if !orgs.contains(&format!("\"{org}\"")) {
            self.server.tern(&["orgs", "create", org])?;
        }
        let image = self.image(image)?;
        let dir = dir.to_str().context("a path that is not UTF-8")?;
        self.server
            .tern(&["launch", dir, "--org", org, "--image", &image])
            .with_context(|| format!("serve's log:\n{}", tail(&self.server.log())))?;
        let machines = self.server.tern_json(&["machine", "list", "--app", app])?;
        let id = machines[0]["id"]
            .as_str()
            .context("the app has no Machine")?
            .to_owned();
        Ok(App {
            world: self,
            name: app.to_owned(),
            hostname,
            machine: id,
        })
    }

    /// An example's image, as `--image` takes it.
    pub fn image(&self, name: &str) -> Result<String> {
        Ok(format!("oci:{}", self.artefacts.image(name)?.display()))
    }

    /// A laptop outside.
    pub fn laptop(&self, n: u8) -> Result<Laptop> {
        Laptop::new(n, &self.dir)
    }

    /// The `n`-th laptop, on the organization's private network.
    pub fn joined_laptop(&self, n: u8, org: &str) -> Result<Laptop> {
        let laptop = self.laptop(n)?;
        let name = format!("laptop{n}");
        let config = self
            .server
            .tern(&["wireguard", "create", &name, "--org", org])?;
        laptop.join(&config)?;
        Ok(laptop)
    }

    /// A program of ours, to be run against this world.
    pub fn program(&self, name: &str) -> Command {
        Command::new(self.artefacts.program(name))
    }

    /// Where this world's files are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for World {
    /// Ends the monitors, which outlive `tern serve` on purpose.
    fn drop(&mut self) {
        let machines = self.server.data.join("machines");
        for entry in std::fs::read_dir(machines).into_iter().flatten().flatten() {
            if let Ok(pid) = monitor_pid(&entry.path()) {
                let _ = kill(pid, Signal::SIGKILL);
            }
        }
        if std::thread::panicking() {
            eprintln!("--- serve's log ---\n{}", tail(&self.server.log()));
            eprintln!("--- pebble's log ---\n{}", tail(&self.pebble.log()));
        }
    }
}

/// The `fly.toml` of a test's app.
pub fn fly_toml(app: &str) -> String {
    format!(
        "app = \"{app}\"\n\n[http_service]\n  internal_port = 8080\n  force_https = true\n  \
         auto_stop_machines = \"suspend\"\n  auto_start_machines = true\n\n\
         [http_service.concurrency]\n  type = \"requests\"\n  soft_limit = 250\n\n[[vm]]\n  memory = \"128mb\"\n"
    )
}

/// A deployed app with one Machine.
pub struct App<'a> {
    world: &'a World,
    /// Its name.
    pub name: String,
    /// Its public host name.
    pub hostname: String,
    /// Its Machine.
    pub machine: String,
}

impl<'a> App<'a> {
    /// A Machine of an app that there is already.
    pub fn of(world: &'a World, app: &str, machine: &str) -> Self {
        Self {
            world,
            name: app.to_owned(),
            hostname: format!("{app}.{DOMAIN}"),
            machine: machine.to_owned(),
        }
    }
    /// `GET https://<hostname><path>`, verified against the CA's root.
    pub fn get(&self, path: &str) -> Result<Reply> {
        self.curl(path, &[])
    }

    /// A request with more arguments for `curl`.
    pub fn curl(&self, path: &str, more: &[&str]) -> Result<Reply> {
        let url = format!("https://{}{path}", self.hostname);
        Reply::of(
            Command::new("curl")
                .args(["--max-time", "120", "--cacert"])
                .arg(&self.world.pebble.issued_root)
                .args(more)
                .arg(url),
        )
    }

    /// The body of a `GET` that must be answered with 200.
    pub fn body(&self, path: &str) -> Result<String> {
        let reply = self.get(path)?;
        ensure!(
            reply.status == 200,
            "GET {path} was answered with {reply:?}"
        );
        Ok(reply.body)
    }

    /// Waits until the app has a certificate and answers.
    pub fn wait_for_https(&self) -> Result<()> {
        wait_for("HTTPS with a good certificate", PATIENCE, || {
            self.body("/").map(Some)
        })
        .map(drop)
    }

    /// `tern machine <verb> <id>`.
    pub fn machine(&self, verb: &str) -> Result<String> {
        self.world
            .server
            .tern(&["machine", verb, &self.machine, "--app", &self.name])
    }

    /// The Machine as the API shows it.
    pub fn status(&self) -> Result<Value> {
        self.world
            .server
            .tern_json(&["machine", "status", &self.machine, "--app", &self.name])
    }

    /// The Machine's state.
    pub fn state(&self) -> Result<String> {
        Ok(self.status()?["state"]
            .as_str()
            .unwrap_or_default()
            .to_owned())
    }

    /// Waits until the Machine is in a state.
    pub fn wait_for_state(&self, state: &str) -> Result<()> {
        wait_for(&format!("{} is {state}", self.machine), PATIENCE, || {
            Ok((self.state()? == state).then_some(()))
        })
    }

    /// The Machine's events of this type, oldest first.
    pub fn events(&self, kind: &str) -> Result<Vec<Value>> {
        let mut events = self.status()?["events"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        events.retain(|e| e["type"] == kind);
        events.sort_by_key(|e| e["timestamp"].as_i64());
        Ok(events)
    }

    /// Its address.
    pub fn address(&self) -> Result<String> {
        Ok(self.status()?["private_ip"]
            .as_str()
            .context("it has no address")?
            .to_owned())
    }

    /// The process of its monitor.
    pub fn monitor(&self) -> Result<Pid> {
        monitor_pid(&self.world.server.data.join("machines").join(&self.machine))
    }
}

fn monitor_pid(machine: &Path) -> Result<Pid> {
    let text = std::fs::read_to_string(machine.join("vmm.pid"))?;
    Ok(Pid::from_raw(
        text.trim().parse().context("vmm.pid holds no number")?,
    ))
}
