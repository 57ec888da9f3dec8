//! A monitor without a virtual machine, for tests of the agent: the real files, sockets, locks and
//! protocols of `tern-vmm` and `tern-init`, and an "app" that is a counter.
//!
//! What it does differently from a well-behaved Machine is told by the app's environment:
//! `FAKE_EXIT=<code>` ends the app at once; `FAKE_NEVER_START` never starts it; `FAKE_IGNORE_STOP`
//! does not stop; `FAKE_NO_SNAPSHOT` refuses to be suspended; `FAKE_RESUMED_WAITS=<named pipe>` answers that
//! it has resumed when somebody has written to that pipe; `FAKE_SNAPSHOT_WAITS=<named pipe>` writes its snapshot, and
//! answers nobody, when somebody has written to that pipe, if it is there; `FAKE_KILL_AGENT_AT=<step>` kills the agent, once, at `boot`, `pause`, `snapshot`, `stop`, `restore` or `resumed`.

// A stand-in that cannot go on may panic.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tern_guest::message::{AppState, Event, ExitStatus, Reply, Request, Status, Stream};
use tern_guest::{Decoder, Encoder, FrameKind, read_run_archive};

/// Where on its disk the app keeps what it was told to.
const PLACE: u64 = 8 << 20;

/// What a snapshot holds.
#[derive(Default, Serialize, Deserialize)]
struct Memory {
    counter: u64,
    lines: Vec<String>,
    started: bool,
    exited: Option<i32>,
    env: HashMap<String, String>,
}

struct Vmm {
    dir: PathBuf,
    config: Value,
    env: HashMap<String, String>,
    memory: Mutex<Memory>,
    paused: Mutex<bool>,
    news: Condvar,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, run, flag, config, rest @ ..] = arguments.as_slice() else {
        bail!("usage: fake-vmm run --config FILE [--restore]");
    };
    if run != "run" || flag != "--config" {
        bail!("not a command of a monitor: {arguments:?}");
    }
    let restore = rest == ["--restore"];
    let config: Value = serde_json::from_slice(&fs::read(config)?)?;
    let path = |key: &str| PathBuf::from(config[key].as_str().unwrap_or_default());
    let pid_file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path("pid_file"))?;
    let Ok(mut lock) = Flock::lock(pid_file, FlockArg::LockExclusiveNonblock) else {
        bail!("another monitor of this Machine runs");
    };
    lock.set_len(0)?;
    writeln!(lock, "{}", host_pid()?)?;

    let memory = if restore {
        let kept = fs::read(path("snapshot_dir").join("state"));
        match kept
            .map_err(|e| e.to_string())
            .and_then(|b| serde_json::from_slice(&b).map_err(|e| e.to_string()))
        {
            Ok(memory) => memory,
            Err(error) => end(&path("exit_file"), "snapshot_refused", &error, 4),
        }
    } else {
        // As `tern-vmm`: a restored guest has it in its memory.
        let archive = fs::read(config["initramfs"][1].as_str().context("no run.cpio")?)?;
        Memory {
            env: read_run_archive(&archive)?
                .process
                .merged_env()
                .into_iter()
                .collect(),
            ..Memory::default()
        }
    };
    let env = memory.env.clone();
    let vsock = UnixListener::bind(config["vsock"]["path"].as_str().context("no vsock")?)?;
    let control = UnixListener::bind(path("control"))?;
    let vmm = Arc::new(Vmm {
        dir: path("control").parent().context("no directory")?.to_owned(),
        env,
        memory: Mutex::new(memory),
        paused: Mutex::new(false),
        news: Condvar::new(),
        config,
    });
    vmm.kill_agent_at(if restore { "restore" } else { "boot" });
    if !restore {
        vmm.boot();
    }
    let guest = Arc::clone(&vmm);
    std::thread::spawn(move || {
        for stream in vsock.incoming().flatten() {
            let guest = Arc::clone(&guest);
            std::thread::spawn(move || {
                if let Err(error) = guest.serve(stream) {
                    eprintln!("vsock: {error:#}");
                }
            });
        }
    });
    for stream in control.incoming().flatten() {
        if let Err(error) = vmm.control(stream) {
            eprintln!("control: {error:#}");
        }
    }
    Ok(())
}

/// This process's number in the host: it may be in a PID namespace.
fn host_pid() -> Result<u32> {
    let link = fs::read_link("/proc/self")?;
    Ok(link.to_str().context("not a number")?.parse()?)
}

impl Vmm {
    fn boot(&self) {
        let mut memory = self.memory.lock().unwrap();
        memory.lines.push("booted".to_owned());
        if self.env.contains_key("FAKE_NEVER_START") {
            return;
        }
        memory.started = true;
        if let Some(code) = self.env.get("FAKE_EXIT") {
            memory.lines.push(format!("leaving with {code}"));
            memory.exited = code.parse().ok();
        }
        drop(memory);
        self.news.notify_all();
    }

    /// As init does: told first, then reset.
    fn exit_app(&self, code: i32) {
        self.memory.lock().unwrap().exited = Some(code);
        self.news.notify_all();
    }

    fn kill_agent_at(&self, step: &str) {
        let done = self.dir.join(format!("agent-killed-at-{step}"));
        if self
            .env
            .get("FAKE_KILL_AGENT_AT")
            .is_some_and(|s| s == step)
            && !done.exists()
        {
            File::create(done).unwrap();
            // A process in a PID namespace cannot kill one outside, so the agent is asked to do it itself.
            let agent = SocketAddr::from_abstract_name("kill-agent").unwrap();
            let mut agent = UnixStream::connect_addr(&agent).unwrap();
            // Until it is dead.
            let _ = agent.read(&mut [0]);
        }
    }

    fn end(&self, reason: &str) -> ! {
        end(&self.exit_file(), reason, "", 0)
    }

    fn exit_file(&self) -> PathBuf {
        PathBuf::from(self.config["exit_file"].as_str().unwrap())
    }

    fn control(&self, mut stream: UnixStream) -> Result<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let head = String::from_utf8(head)?;
        let call: Vec<&str> = head.split(' ').take(2).collect();
        let mut ends = false;
        let answer = match call.as_slice() {
            ["GET", "/v1/vm"] => {
                let paused = *self.paused.lock().unwrap();
                json!({"id": self.config["id"], "state": if paused { "paused" } else { "running" },
                       "pid": host_pid()?, "vcpus": 1, "memory_mib": 1, "boot": {}})
            }
            ["POST", "/v1/vm/pause"] => {
                self.kill_agent_at("pause");
                *self.paused.lock().unwrap() = true;
                Value::Null
            }
            ["POST", "/v1/vm/resume"] => {
                *self.paused.lock().unwrap() = false;
                self.news.notify_all();
                Value::Null
            }
            ["POST", "/v1/vm/snapshot"] => self.snapshot()?,
            ["POST", "/v1/vm/stop"] => {
                self.kill_agent_at("stop");
                ends = true;
                Value::Null
            }
            _ => json!({"error": "no such call"}),
        };
        let (status, body) = match &answer {
            Value::Null => ("204 No Content", String::new()),
            value if value.get("error").is_some() => ("409 Conflict", value.to_string()),
            value => ("200 OK", value.to_string()),
        };
        let length = body.len();
        write!(
            stream,
            "HTTP/1.1 {status}\r\ncontent-length: {length}\r\n\r\n{body}"
        )?;
        if ends {
            self.end("stopped");
        }
        Ok(())
    }

    fn snapshot(&self) -> Result<Value> {
        if !*self.paused.lock().unwrap() {
            return Ok(json!({"error": "only a paused machine has a snapshot"}));
        }
        if self.env.contains_key("FAKE_NO_SNAPSHOT") {
            return Ok(json!({"error": "the disk is full"}));
        }
        if let Some(pipe) = self.env.get("FAKE_SNAPSHOT_WAITS")
            && Path::new(pipe).exists()
        {
            fs::read(pipe)?;
        }
        let dir = PathBuf::from(
            self.config["snapshot_dir"]
                .as_str()
                .context("no snapshot_dir")?,
        );
        // As the monitor updates one: none, until the state is there.
        fs::create_dir_all(&dir)?;
        let _ = fs::remove_file(dir.join("state"));
        let memory = serde_json::to_vec(&*self.memory.lock().unwrap())?;
        fs::write(dir.join("memory"), vec![1; 4096])?;
        fs::write(dir.join("state.new"), memory)?;
        fs::rename(dir.join("state.new"), dir.join("state"))?;
        self.kill_agent_at("snapshot");
        Ok(Value::Null)
    }

    fn serve(&self, mut stream: UnixStream) -> Result<()> {
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            line.push(byte[0]);
        }
        if line != b"CONNECT 10000\n" {
            return Ok(());
        }
        stream.write_all(b"OK 1073741824\n")?;
        // A guest whose vCPUs stand still accepts nothing more than its buffers hold.
        let mut decoder = Decoder::new();
        let request: Request = loop {
            if let Some(frame) = decoder.next_frame()? {
                break frame.parse()?;
            }
            let mut buffer = [0; 4096];
            match stream.read(&mut buffer)? {
                0 => return Ok(()),
                length => decoder.feed(&buffer[..length]),
            }
        };
        self.wait_while_paused();
        let mut wire = Encoder::new();
        match request {
            Request::Attach { from } => return self.attach(stream, from),
            Request::Exec(exec) => {
                let (out, code) = self.app(&exec.cmd);
                wire.raw(FrameKind::Stdout, out.as_bytes());
                let status = ExitStatus {
                    code,
                    ..ExitStatus::default()
                };
                wire.json(&Reply::Exit(status))?;
            }
            Request::Signal { signo } => {
                wire.json(&Reply::Ok)?;
                self.exit_app(128 + signo);
            }
            Request::Stop { signo, .. } => {
                wire.json(&Reply::Ok)?;
                let line = format!("asked to stop by {signo:?}");
                self.memory.lock().unwrap().lines.push(line);
                self.news.notify_all();
                if !self.env.contains_key("FAKE_IGNORE_STOP") {
                    self.exit_app(0);
                }
            }
            Request::Resumed {
                unix_nanos,
                entropy,
            } => {
                self.kill_agent_at("resumed");
                if let Some(pipe) = self.env.get("FAKE_RESUMED_WAITS") {
                    fs::read(pipe)?;
                }
                let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
                let late = now.abs_diff(u128::from(unix_nanos)) / 1_000_000_000;
                let line = format!("resumed {late} s late with {} bytes", entropy.len());
                self.memory.lock().unwrap().lines.push(line);
                self.news.notify_all();
                wire.json(&Reply::Ok)?;
            }
            Request::Status => wire.json(&Reply::Status(self.status()))?,
        }
        stream.write_all(wire.wire())?;
        Ok(())
    }

    fn wait_while_paused(&self) {
        let paused = self.paused.lock().unwrap();
        drop(self.news.wait_while(paused, |paused| *paused).unwrap());
    }

    fn status(&self) -> Status {
        let memory = self.memory.lock().unwrap();
        Status {
            state: AppState::Running,
            pid: Some(7),
            exit: None,
            uptime_ms: 1,
            memory_total_kib: 2,
            memory_available_kib: 1,
            load: [0.0; 3],
            next_seq: memory.lines.len() as u64,
            phases: Vec::new(),
        }
    }

    /// The app's own words: `count`, `write TEXT`, `read`, `exit CODE`, `wait PIPE` (until somebody has written to it).
    fn app(&self, words: &[String]) -> (String, i32) {
        let disk = || {
            let path = self.config["disks"][1]["path"].as_str().unwrap();
            File::options().read(true).write(true).open(path).unwrap()
        };
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        match words.as_slice() {
            ["count"] => {
                let mut memory = self.memory.lock().unwrap();
                memory.counter += 1;
                (memory.counter.to_string(), 0)
            }
            ["write", text] => {
                disk().write_all_at(text.as_bytes(), PLACE).unwrap();
                (String::new(), 0)
            }
            ["read"] => {
                let mut bytes = [0; 64];
                disk().read_exact_at(&mut bytes, PLACE).unwrap();
                let text: Vec<u8> = bytes.into_iter().take_while(|&b| b != 0).collect();
                (String::from_utf8(text).unwrap(), 0)
            }
            ["wait", pipe] => (fs::read_to_string(pipe).unwrap(), 0),
            ["exit", code] => {
                self.exit_app(code.parse().unwrap());
                (String::new(), 0)
            }
            _ => ("what?".to_owned(), 127),
        }
    }

    fn attach(&self, mut stream: UnixStream, from: u64) -> Result<()> {
        let mut next = usize::try_from(from)?;
        let mut started = false;
        loop {
            let mut wire = Encoder::new();
            let exited = {
                let mut memory = self.memory.lock().unwrap();
                loop {
                    let quiet = memory.lines.len() <= next && started >= memory.started;
                    if !quiet || memory.exited.is_some() {
                        break;
                    }
                    memory = self.news.wait(memory).unwrap();
                }
                for (seq, line) in memory.lines.iter().enumerate().skip(next) {
                    let (stream, line) = (Stream::Stdout, line.clone());
                    wire.json(&Event::Log {
                        seq: seq as u64,
                        stream,
                        unix_ms: 1,
                        line,
                    })?;
                }
                next = next.max(memory.lines.len());
                if memory.started && !started {
                    started = true;
                    wire.json(&Event::Started { pid: 7 })?;
                }
                memory.exited
            };
            if let Some(code) = exited {
                wire.json(&Event::Exited(ExitStatus {
                    code,
                    ..ExitStatus::default()
                }))?;
            }
            stream.write_all(wire.wire())?;
            if exited.is_some() {
                // Its goodbye says that the news has arrived.
                let _ = stream.read(&mut [0]);
                self.end("guest_reset");
            }
        }
    }
}

fn end(exit_file: &Path, reason: &str, message: &str, code: i32) -> ! {
    fs::write(
        exit_file,
        json!({"reason": reason, "message": message}).to_string(),
    )
    .unwrap();
    std::process::exit(code)
}
