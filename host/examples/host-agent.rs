//! An agent with a catalog of its own, driven by lines of JSON: for tests, and for trying Machines
//! out by hand.
//!
//! Each line of input is a request, `{"n": 1, "op": "start", "id": "…"}`; its answer is a line with
//! the same `n`, and `ok` or `error`. Requests are served side by side. Operations: `put` (a
//! `machine` record), `destroy` (as the API does it), `forget` (remove the records), `start`, `suspend`, `stop` (`source` is `user` unless it says `proxy`),
//! `exec` (`cmd`), `signal` (`signo`), `logs`, `status`, `wait` (until `state`), `records`,
//! `metrics`, `idle` (milliseconds since its last use), `shutdown`. As the gate does: `follow` (departures from now
//! on), `departure` (the next), `let_go` (the last, which is answered with whether it is suspended then).

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use clap::Parser;
use nix::sys::signal::{Signal, kill};
use nix::unistd::getpid;
use serde_json::{Value, json};
use tern_catalog::{
    Catalog, DesiredState, HostId, Machine, MachineId, MachineState, MachineStatus, SqliteStore,
    Store, View,
};
use tern_guest::ExecRequest;
use tern_host::{
    Agent, AgentHandle, Departure, ExecOutput, HostConfig, LogItem, Registry, Source, StopRequest,
};
use tokio::sync::Mutex;
use tokio::sync::mpsc::{self, UnboundedReceiver};

#[derive(Parser)]
struct Options {
    /// The agent's directory.
    #[arg(long)]
    data: PathBuf,
    /// The catalog; `catalog.db` in the agent's directory unless given.
    #[arg(long)]
    catalog: Option<PathBuf>,
    /// The monitor.
    #[arg(long)]
    vmm: PathBuf,
    /// The guests' kernel.
    #[arg(long, default_value = "/nonexistent/vmlinux")]
    kernel: PathBuf,
    /// The guests' initramfs.
    #[arg(long, default_value = "/nonexistent/initramfs")]
    initramfs: PathBuf,
    /// The size of a Machine's own disk in MiB.
    #[arg(long, default_value_t = 64)]
    disk_mib: u64,
    /// Seconds that a start may take.
    #[arg(long, default_value_t = 60)]
    boot_timeout: u64,
    /// How much more memory is given to Machines that run than there is.
    #[arg(long, default_value_t = 1.0)]
    memory_overcommit: f64,
    /// `name=host:port` of a registry without TLS.
    #[arg(long)]
    registry: Vec<String>,
}

#[derive(Clone)]
struct Agency {
    catalog: Catalog,
    view: View,
    handle: AgentHandle,
    departures: Arc<Mutex<Departures>>,
}

#[derive(Default)]
struct Departures {
    told: Option<UnboundedReceiver<Departure>>,
    last: Option<Departure>,
}

#[tokio::main]
async fn main() -> Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let options = Options::parse();
    std::fs::create_dir_all(&options.data)?;
    let path = options
        .catalog
        .clone()
        .unwrap_or_else(|| options.data.join("catalog.db"));
    die_when_asked();
    let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&path)?);
    let catalog = Catalog::new(Arc::clone(&store));
    let view = View::follow(store).await?;
    let mut config = HostConfig::new(HostId(1), &options.data);
    config.vmm_binary = options.vmm;
    config.kernel = options.kernel;
    config.initramfs = options.initramfs;
    config.disk_size = options.disk_mib << 20;
    config.overcommit.memory = options.memory_overcommit;
    config.boot_timeout = Duration::from_secs(options.boot_timeout);
    for registry in &options.registry {
        let (name, address) = registry
            .split_once('=')
            .context("a registry is name=host:port")?;
        let address = address.to_owned();
        let registry = Registry {
            address,
            insecure: true,
            ..Registry::default()
        };
        config.registries.insert(name.to_owned(), registry);
    }
    let agent = Agent::start(config, catalog.clone(), view.clone()).await?;
    let agency = Agency {
        catalog,
        view,
        handle: agent.handle(),
        departures: Arc::default(),
    };
    println!("{}", json!({"ready": true}));

    let (answers, mut answered) = mpsc::unbounded_channel::<Value>();
    tokio::spawn(async move {
        while let Some(answer) = answered.recv().await {
            println!("{answer}");
        }
    });
    let (typed, mut lines) = mpsc::unbounded_channel::<String>();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if typed.send(line).is_err() {
                return;
            }
        }
    });
    while let Some(line) = lines.recv().await {
        let request: Value = serde_json::from_str(&line)?;
        if request["op"] == "shutdown" {
            break;
        }
        let (agency, answers) = (agency.clone(), answers.clone());
        tokio::spawn(async move {
            let answer = match agency.serve(&request).await {
                Ok(answer) => json!({"n": request["n"], "ok": answer}),
                Err(error) => json!({"n": request["n"], "error": format!("{error:#}")}),
            };
            let _ = answers.send(answer);
        });
    }
    agent.shutdown().await;
    Ok(())
}

/// Has whoever connects to the abstract socket `kill-agent` of this network namespace kill this process, as
/// `fake-vmm` does. A second agent, which finds that name taken, is not killed by anybody.
fn die_when_asked() {
    let Ok(listener) = SocketAddr::from_abstract_name("kill-agent")
        .and_then(|address| UnixListener::bind_addr(&address))
    else {
        return;
    };
    std::thread::spawn(move || {
        // Held, so that the other end learns from its end that this process is gone.
        let _asked = listener.accept();
        kill(getpid(), Signal::SIGKILL)
    });
}

impl Agency {
    async fn serve(&self, request: &Value) -> Result<Value> {
        let id = || -> Result<MachineId> { Ok(request["id"].as_str().context("no id")?.parse()?) };
        let source = if request["source"] == "proxy" {
            Source::Proxy
        } else {
            Source::User
        };
        match request["op"].as_str().unwrap_or_default() {
            "put" => {
                let machine: Machine = serde_json::from_value(request["machine"].clone())?;
                self.catalog.put(&machine).await?;
                let known = |s: &tern_catalog::Snapshot| {
                    let found = s.machine_status.get(&machine.id)?;
                    (found.generation >= machine.desired.generation).then_some(())
                };
                self.view.wait_for(known).await;
                Ok(Value::Null)
            }
            "destroy" => {
                let wish = |machine: &mut Machine| {
                    if matches!(machine.desired.state, DesiredState::Destroyed { .. }) {
                        return Err(());
                    }
                    machine.desired.state = DesiredState::Destroyed { force: true };
                    machine.desired.generation += 1;
                    Ok(())
                };
                let written = self.catalog.update(id()?.as_str(), wish).await?;
                Ok(json!(matches!(written, Ok(Some(_)))))
            }
            "forget" => {
                let id = id()?;
                self.catalog.delete::<Machine>(id.as_str()).await?;
                self.catalog.delete::<MachineStatus>(id.as_str()).await?;
                Ok(Value::Null)
            }
            "start" => Ok(json!(self.handle.start(&id()?, source).await?)),
            "reachable" => Ok(json!(self.handle.reachable(&id()?).await)),
            "suspend" => Ok(json!(self.handle.suspend(&id()?, source).await?)),
            "stop" => {
                let millis = request["timeout_ms"].as_u64();
                let stop = StopRequest {
                    signal: None,
                    timeout: millis.map(Duration::from_millis),
                };
                Ok(json!(self.handle.stop(&id()?, source, stop).await?))
            }
            "prepare" => {
                let image = request["image"].as_str().context("no image")?;
                Ok(json!(self.handle.prepare(&id()?, image).await?))
            }
            "signal" => {
                let signo = i32::try_from(request["signo"].as_i64().context("no signo")?)?;
                Ok(json!(self.handle.signal(&id()?, signo).await?))
            }
            "exec" => self.exec(&id()?, request).await,
            "logs" => {
                let mut reader = self.handle.logs(&id()?, 0, false).await?;
                let mut lines = Vec::new();
                while let Some(LogItem::Line(line)) = reader.next().await {
                    lines.push(line.line);
                }
                Ok(json!(lines))
            }
            "status" => {
                let snapshot = self.view.snapshot();
                Ok(json!(
                    snapshot.machine_status.get(&id()?).map(|s| (**s).clone())
                ))
            }
            "wait" => {
                let (id, wanted) = (id()?, request["state"].clone());
                let seen = |s: &tern_catalog::Snapshot| match s.machine_status.get(&id) {
                    Some(status) if json!(status.state) == wanted => Some(json!(**status)),
                    None if wanted == json!(MachineState::Destroyed) => Some(Value::Null),
                    _ => None,
                };
                Ok(self.view.wait_for(seen).await)
            }
            "idle" => {
                let last = self.handle.last_use(&id()?).context("no such Machine")?;
                Ok(json!(u64::try_from(last.elapsed().as_millis())?))
            }
            "follow" => {
                self.departures.lock().await.told = Some(self.handle.departures());
                Ok(Value::Null)
            }
            "departure" => {
                let mut departures = self.departures.lock().await;
                let told = departures.told.as_mut().context("follow them first")?;
                let departure = told.recv().await.context("there will be none")?;
                let machine = json!(departure.machine);
                departures.last = Some(departure);
                Ok(machine)
            }
            "let_go" => {
                let departure = self.departures.lock().await.last.take();
                let departure = departure.context("there was none")?;
                let _ = departure.ready.send(()); // it may not have waited for so long
                Ok(json!(departure.suspended.await.is_ok()))
            }
            "records" => {
                let listing = self.catalog.store().list("").await?;
                Ok(json!(
                    listing.entries.iter().map(|e| &e.key).collect::<Vec<_>>()
                ))
            }
            "room" => Ok(json!(self.handle.room())),
            "metrics" => {
                let all = self.handle.metrics();
                let all = all
                    .all()
                    .into_iter()
                    .map(|(name, _, value)| (name.to_owned(), value.into()));
                Ok(Value::Object(all.collect()))
            }
            other => Err(anyhow!("no such operation: {other}")),
        }
    }

    async fn exec(&self, id: &MachineId, request: &Value) -> Result<Value> {
        let cmd = serde_json::from_value(request["cmd"].clone())?;
        let request = ExecRequest {
            cmd,
            ..ExecRequest::default()
        };
        let exec = self.handle.exec(id, request).await?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let said = |output| match output {
            ExecOutput::Stdout(bytes) => stdout.extend(bytes),
            ExecOutput::Stderr(bytes) => stderr.extend(bytes),
            ExecOutput::Exit(_) => {}
        };
        let ended = exec.run(&[], said).await?;
        let status = ended.context("the guest went away")?;
        Ok(json!({
            "code": status.code,
            "stdout": String::from_utf8_lossy(&stdout),
            "stderr": String::from_utf8_lossy(&stderr),
        }))
    }
}
