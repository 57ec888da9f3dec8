//! A host of its own for one test: a network namespace, a directory, an agent as a process, and
//! `fake-vmm` for a monitor.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::registry::{self, Registry};

/// How long anything may take on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(60);

/// A host with an agent.
pub struct World {
    dir: TempDir,
    agent: Option<Agent>,
    /// `registry.internal`.
    pub registry: Registry,
    arguments: Vec<String>,
}

struct Agent {
    child: Child,
    input: ChildStdin,
    answers: Receiver<Value>,
    waiting: Vec<Value>,
    next: u64,
}

/// A Machine's record, as the API would write it.
#[derive(Clone)]
pub struct Machine {
    pub id: String,
    record: Value,
}

impl World {
    pub fn new() -> Self {
        Self::with(&[])
    }

    /// With more arguments for the agent.
    pub fn with(arguments: &[&str]) -> Self {
        // The thread's own, and so its children's.
        unshare(CloneFlags::CLONE_NEWNET)
            .expect("these tests need root, for a network namespace of their own");
        let up = Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status();
        assert!(up.unwrap().success(), "the registry is on loopback");
        let registry = Registry::start();
        let mut world = Self {
            dir: tempfile::Builder::new().prefix("h").tempdir().unwrap(),
            agent: None,
            arguments: arguments.iter().map(|&a| a.to_owned()).collect(),
            registry,
        };
        world.up();
        world
    }

    /// Starts the agent.
    pub fn up(&mut self) {
        let mut child = Command::new(example("host-agent"))
            .arg("--data")
            .arg(self.dir.path())
            .arg("--vmm")
            .arg(example("fake-vmm"))
            .arg("--registry")
            .arg(format!("registry.internal={}", self.registry.address))
            .args(&self.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (told, answers) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if told.send(serde_json::from_str(&line).unwrap()).is_err() {
                    return;
                }
            }
        });
        let ready: Value = answers.recv_timeout(PATIENCE).expect("the agent starts");
        assert_eq!(ready["ready"], true);
        self.agent = Some(Agent {
            input: child.stdin.take().unwrap(),
            child,
            answers,
            waiting: Vec::new(),
            next: 0,
        });
    }

    /// Ends the agent as it wants to be ended.
    pub fn down(&mut self) {
        let mut agent = self.agent.take().unwrap();
        writeln!(agent.input, "{}", json!({"op": "shutdown"})).unwrap();
        assert!(agent.child.wait().unwrap().success());
    }

    /// Ends the agent as a crash would.
    pub fn kill(&mut self) {
        self.agent.as_mut().unwrap().child.kill().unwrap();
        self.wait_for_crash();
    }

    /// The agent's process id.
    pub fn agent(&self) -> Pid {
        let child = &self.agent.as_ref().unwrap().child;
        Pid::from_raw(i32::try_from(child.id()).unwrap())
    }

    /// The answer to what was asked before, or `None` if the agent dies first.
    pub fn answer_unless_it_dies(&mut self, n: u64) -> Option<Result<Value, String>> {
        let agent = self.agent.as_mut().unwrap();
        loop {
            match agent.answers.recv_timeout(PATIENCE) {
                Ok(answer) if answer["n"] == n => return Some(outcome(&answer)),
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => panic!("the agent neither answers nor dies"),
            }
        }
    }

    /// Waits until something else has killed the agent.
    pub fn wait_for_crash(&mut self) {
        let mut agent = self.agent.take().unwrap();
        let status = agent.child.wait().unwrap();
        assert_eq!(status.signal(), Some(9));
    }

    /// Asks the agent, and waits for its answer.
    pub fn ask(&mut self, op: &str, id: &str, more: Value) -> Result<Value, String> {
        let n = self.say(op, id, more);
        self.answer(n)
    }

    /// Asks the agent, and does not wait.
    pub fn say(&mut self, op: &str, id: &str, more: Value) -> u64 {
        let agent = self.agent.as_mut().unwrap();
        agent.next += 1;
        let mut request = json!({"n": agent.next, "op": op, "id": id});
        for (key, value) in more.as_object().into_iter().flatten() {
            request[key] = value.clone();
        }
        match writeln!(agent.input, "{request}") {
            // One that has just been killed gives no answer.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
            written => written.unwrap(),
        }
        agent.next
    }

    /// The answer to what was asked before.
    pub fn answer(&mut self, n: u64) -> Result<Value, String> {
        let agent = self.agent.as_mut().unwrap();
        loop {
            if let Some(at) = agent.waiting.iter().position(|a| a["n"] == n) {
                return outcome(&agent.waiting.swap_remove(at));
            }
            let answer = agent.answers.recv_timeout(PATIENCE);
            agent.waiting.push(answer.expect("the agent answers"));
        }
    }

    /// Writes the Machine's record with the next wish, and waits until it has been taken up.
    pub fn wish(&mut self, machine: &mut Machine, state: Value) {
        let generation = machine.record["desired"]["generation"].as_u64().unwrap() + 1;
        machine.record["desired"] = json!({"state": state, "generation": generation});
        self.ask("put", &machine.id, json!({"machine": machine.record}))
            .unwrap();
    }

    /// Writes the Machine's record with the next wish, and does not wait.
    pub fn begin(&mut self, machine: &mut Machine, state: Value) {
        let generation = machine.record["desired"]["generation"].as_u64().unwrap() + 1;
        machine.record["desired"] = json!({"state": state, "generation": generation});
        self.say("put", &machine.id, json!({"machine": machine.record}));
    }

    /// What another agent in the same directory says.
    pub fn second_agent(&self) -> String {
        let output = Command::new(example("host-agent"))
            .arg("--data")
            .arg(self.dir.path())
            .arg("--vmm")
            .arg(example("fake-vmm"))
            .arg("--catalog")
            .arg(self.dir.path().join("another.db"))
            .output()
            .unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// A Machine that runs.
    pub fn launch(&mut self, env: &[(&str, &str)]) -> Machine {
        let mut machine = Machine::new(env);
        self.wish(&mut machine, json!("started"));
        self.wait(&machine, "started");
        machine
    }

    pub fn wait(&mut self, machine: &Machine, state: &str) -> Value {
        self.ask("wait", &machine.id, json!({"state": state}))
            .unwrap()
    }

    pub fn start(&mut self, machine: &Machine) {
        self.ask("start", &machine.id, json!({"source": "proxy"}))
            .unwrap();
    }

    pub fn suspend(&mut self, machine: &Machine) {
        self.ask("suspend", &machine.id, json!({"source": "proxy"}))
            .unwrap();
    }

    pub fn stop(&mut self, machine: &Machine) {
        self.ask("stop", &machine.id, json!({})).unwrap();
    }

    pub fn status(&mut self, machine: &Machine) -> Value {
        self.ask("status", &machine.id, json!({})).unwrap()
    }

    /// What a command in the Machine prints.
    pub fn exec(&mut self, machine: &Machine, cmd: &[&str]) -> String {
        let answer = self.ask("exec", &machine.id, json!({"cmd": cmd})).unwrap();
        answer["stdout"].as_str().unwrap().to_owned()
    }

    pub fn count(&mut self, machine: &Machine) -> u64 {
        self.exec(machine, &["count"]).parse().unwrap()
    }

    pub fn metric(&mut self, name: &str) -> u64 {
        let metrics = self.ask("metrics", "", json!({})).unwrap();
        metrics[name].as_u64().unwrap()
    }

    pub fn logs(&mut self, machine: &Machine) -> Vec<String> {
        let lines = self.ask("logs", &machine.id, json!({})).unwrap();
        serde_json::from_value(lines).unwrap()
    }

    pub fn machine_dir(&self, machine: &Machine) -> PathBuf {
        self.dir.path().join("machines").join(&machine.id)
    }

    pub fn machines_dir(&self) -> PathBuf {
        self.dir.path().join("machines")
    }

    /// The Machines that the catalog was found not to know.
    pub fn quarantined(&self) -> Vec<String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let listed = runtime.block_on(tern_host::quarantined(self.dir.path()));
        listed.unwrap().iter().map(|q| q.id.to_string()).collect()
    }

    /// The process id of the Machine's monitor.
    pub fn monitor(&self, machine: &Machine) -> Pid {
        let text = std::fs::read_to_string(self.machine_dir(machine).join("vmm.pid")).unwrap();
        Pid::from_raw(text.trim().parse().unwrap())
    }

    /// Monitors that run in this world.
    pub fn monitors(&self) -> Vec<Pid> {
        let mark = self.dir.path().to_str().unwrap().to_owned();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
                continue;
            };
            let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).into_owned();
            if command.contains("fake-vmm\0run") && command.contains(&mark) {
                found.push(Pid::from_raw(pid));
            }
        }
        found
    }

    /// Every file in the agent's directory, but for the catalog's own.
    pub fn files(&self) -> BTreeSet<PathBuf> {
        let mut files = BTreeSet::new();
        list(self.dir.path(), &mut files);
        files.retain(|path| !path.to_string_lossy().contains("/catalog.db"));
        files
    }

    /// Everything of Machines that this world's kernel and disk hold.
    pub fn traces(&self) -> Vec<String> {
        let run = |command: &str, arguments: &[&str]| {
            let output = Command::new(command).args(arguments).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        let links = run("ip", &["-o", "link"]);
        let rules = run("nft", &["list", "table", "inet", "tern"]);
        let mut traces: Vec<String> = Vec::new();
        traces.extend(
            links
                .lines()
                .filter(|l| l.contains(": tn"))
                .map(str::to_owned),
        );
        traces.extend(
            rules
                .lines()
                .filter(|l| l.contains("\"tn") && !l.contains("\"tn*\""))
                .map(str::to_owned),
        );
        traces.extend(self.monitors().iter().map(|pid| format!("process {pid}")));
        let dirs = std::fs::read_dir(self.machines_dir()).unwrap();
        traces.extend(dirs.map(|d| d.unwrap().path().display().to_string()));
        traces
    }
}

/// Adds the files below `dir`.
fn list(dir: &Path, files: &mut BTreeSet<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => list(&entry.path(), files),
            _ => _ = files.insert(entry.path()),
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.child.kill();
            let _ = agent.child.wait();
        }
        for pid in self.monitors() {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

impl Machine {
    pub fn new(env: &[(&str, &str)]) -> Self {
        let id = tern_catalog::MachineId::random().to_string();
        let number: u32 = u32::from_str_radix(&id[..6], 16).unwrap();
        let address = tern_catalog::PrivateAddress::of_machine(
            tern_catalog::NetworkId(7),
            tern_catalog::HostId(1),
            tern_catalog::MachineNumber(number),
        );
        let env: serde_json::Map<String, Value> = env
            .iter()
            .map(|&(name, value)| (name.to_owned(), json!(value)))
            .collect();
        let record = json!({
            "id": id, "name": "calm-fox", "app": "hello", "network": 7, "host": 1, "region": "ams",
            "number": number, "private_ip": address,
            "config": {"image": format!("registry.internal/app@{}", registry::digest()), "env": env},
            "instance_id": "01A", "version": 1,
            "desired": {"state": "created", "generation": 0},
            "created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-01T00:00:00Z",
        });
        Self { id, record }
    }

    /// The same in another organization's network.
    pub fn in_network(mut self, network: u32) -> Self {
        let number = self.record["number"].as_u64().unwrap();
        self.record["network"] = json!(network);
        self.record["private_ip"] = json!(tern_catalog::PrivateAddress::of_machine(
            tern_catalog::NetworkId(network),
            tern_catalog::HostId(1),
            tern_catalog::MachineNumber(u32::try_from(number).unwrap()),
        ));
        self
    }

    /// Changes its config, as an update does.
    pub fn update(&mut self, change: impl FnOnce(&mut Value)) {
        change(&mut self.record["config"]);
        let instance = format!("{}x", self.record["instance_id"].as_str().unwrap());
        self.record["instance_id"] = json!(instance);
    }
}

fn outcome(answer: &Value) -> Result<Value, String> {
    match answer.get("ok") {
        Some(ok) => Ok(ok.clone()),
        None => Err(answer["error"].as_str().unwrap().to_owned()),
    }
}

/// Waits until something is so.
#[track_caller]
pub fn until(what: &str, mut so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Kinds of events, oldest first.
pub fn kinds(status: &Value) -> Vec<String> {
    let events = status["events"].as_array().unwrap();
    events
        .iter()
        .map(|e| e["type"].as_str().unwrap().to_owned())
        .collect()
}

/// The examples are built beside the tests.
fn example(name: &str) -> PathBuf {
    let this = std::env::current_exe().unwrap();
    let path = this
        .parent()
        .and_then(Path::parent)
        .unwrap()
        .join("examples")
        .join(name);
    assert!(
        path.exists(),
        "{} is missing: cargo build -p tern-host --examples",
        path.display()
    );
    path
}
