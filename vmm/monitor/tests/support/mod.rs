//! A guest that does what a test tells it, under the real monitor.
//!
//! The kernel and its modules are those of every Machine (`TERN_GUEST_DIR`, or `guest/` in the target
//! directory: `vmm/kernel/make-guest.sh` makes them). A second archive replaces `/init` by a shell that
//! runs scripts sent to it over vsock, so that a test reads like what a person would type.

#![allow(dead_code)] // each test file uses its own part
#![allow(clippy::unwrap_used)] // helpers of tests, but not in `#[test]` functions

mod archive;

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;
use tern_faults::Shot;

/// Boots are several times slower in the virtual host than on hardware, and so is everything else.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// Where the guest sends back what it gets.
pub const ECHO_PORT: u32 = 1001;
/// Where the guest's shell listens.
pub const SHELL_PORT: u32 = 1000;

/// A Machine's directory and, while it runs, its monitor.
pub struct Guest {
    dir: TempDir,
    config: Value,
    monitor: Option<Child>,
    taps: Vec<String>,
}

impl Guest {
    /// A Machine with a read-only and a writable disk, a TAP and vsock. Not started.
    pub fn new() -> Self {
        require_kvm();
        let dir = TempDir::new().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("init.cpio"), archive::shell_archive()).unwrap();
        for (disk, content) in [("ro.img", "read-only disk"), ("rw.img", "writable disk")] {
            let mut bytes = content.as_bytes().to_vec();
            bytes.resize(8 << 20, 0);
            fs::write(path(disk), bytes).unwrap();
        }
        let tap = make_tap();
        let config = json!({
            "id": "test", "vcpus": 1, "memory_mib": 128,
            "kernel": guest_file("vmlinux"),
            "initramfs": [guest_file("initramfs.cpio"), path("init.cpio")],
            "cmdline": "",
            "disks": [{"path": path("ro.img"), "read_only": true}, {"path": path("rw.img")}],
            "net": [{"tap": tap, "mac": "02:00:00:00:00:01"}],
            "vsock": {"cid": 3, "path": path("vsock.sock")},
            "control": path("vmm.sock"), "pid_file": path("vmm.pid"),
            "serial_log": path("serial.log"), "snapshot_dir": path("snapshot"),
            "exit_file": path("exit.json"),
        });
        Self {
            dir,
            config,
            monitor: None,
            taps: vec![tap],
        }
    }

    /// Has the monitor jailed, as user and group `user`; the test must run as root.
    pub fn jailed(self, user: u32) -> Self {
        let root = self.path("jail");
        fs::create_dir(&root).unwrap();
        std::os::unix::fs::chown(&root, Some(user), Some(user)).unwrap();
        let (snapshot, exit) = (root.join("snapshot"), root.join("exit.json"));
        self.with("snapshot_dir", json!(snapshot))
            .with("exit_file", json!(exit))
            .with("jail", json!({"root": root, "uid": user, "gid": user}))
    }

    /// Changes a value of `vm.json`.
    pub fn with(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    /// Changes a value of `vm.json` of a Machine that is not running; returns what it was.
    pub fn set(&mut self, key: &str, value: Value) -> Value {
        std::mem::replace(&mut self.config[key], value)
    }

    /// Boots, and returns when its shell answers.
    pub fn booted(mut self) -> Self {
        self.start(&[]);
        self.sh("true");
        self
    }

    /// A file of the Machine.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The host's TAP device of the first network card.
    pub fn tap(&self) -> &str {
        &self.taps[0]
    }

    /// Starts the monitor; a jailed one in a PID namespace of its own, as the host's agent does.
    pub fn start(&mut self, arguments: &[&str]) {
        let monitor = Command::new(env!("CARGO_BIN_EXE_tern-vmm"));
        if self.config.get("jail").is_none() {
            return self.spawn(monitor, arguments);
        }
        thread::scope(|scope| {
            scope.spawn(|| {
                // For this thread's next child, and no other's.
                unshare(CloneFlags::CLONE_NEWPID).unwrap();
                self.spawn(monitor, arguments);
            });
        });
    }

    /// Starts the monitor, to die before its `nth` step: see `tern_faults`.
    pub fn start_to_die(&mut self, arguments: &[&str], nth: u64) -> Shot {
        let mut shell = Command::new("sh");
        // It waits until somebody has taken aim; whatever it does before is not counted.
        shell.args(["-c", "kill -STOP $$; exec \"$0\" \"$@\""]);
        shell.arg(env!("CARGO_BIN_EXE_tern-vmm"));
        // In the host's PID namespace: as the first process of another it could not stop itself.
        self.spawn(shell, arguments);
        let stat = format!("/proc/{}/stat", self.pid());
        self.until("the shell's stop", || {
            fs::read_to_string(&stat)
                .unwrap()
                .contains(") T ")
                .then_some(())
        });
        let shot = self.aim(nth);
        self.signal("-CONT");
        shot
    }

    /// Has the running monitor die before the `nth` step from now.
    pub fn aim(&self, nth: u64) -> Shot {
        let pid = Pid::from_raw(i32::try_from(self.pid()).unwrap());
        Shot::at(pid, nth).expect("ptrace(2) must be allowed")
    }

    /// Whether the monitor is dead. Its parent is asked elsewhere: that would see its tracer's stops.
    pub fn is_dead(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        stat.contains(") Z ")
    }

    /// Reaps a dead monitor, or one that is no longer wanted.
    pub fn bury(&mut self) {
        let mut monitor = self.monitor.take().expect("there is one");
        monitor.kill().unwrap();
        monitor.wait().unwrap();
    }

    fn spawn(&mut self, mut command: Command, arguments: &[&str]) {
        assert!(self.monitor.is_none(), "it runs already");
        let config = self.path("vm.json");
        fs::write(&config, self.config.to_string()).unwrap();
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("vmm.log"))
            .unwrap();
        let monitor = command
            .args(["run", "--config"])
            .arg(config)
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.monitor = Some(monitor);
    }

    /// Resumes from the snapshot.
    pub fn restore(&mut self) {
        self.start(&["--restore"]);
    }

    /// Runs a script in the guest's shell and returns its output.
    pub fn sh(&self, script: &str) -> String {
        let mut stream = self.connect(SHELL_PORT);
        stream.write_all(script.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut output = String::new();
        stream.read_to_string(&mut output).unwrap_or_else(|error| {
            panic!(
                "`{script}` answered {output:?}, then {error}\n{}",
                self.logs()
            )
        });
        output.trim_end().to_owned()
    }

    /// Connects to a port of the guest, as soon as somebody listens there.
    pub fn connect(&self, port: u32) -> UnixStream {
        self.until("the guest's vsock", || self.try_connect(port))
    }

    /// Connects once.
    pub fn try_connect(&self, port: u32) -> Option<UnixStream> {
        let mut stream = UnixStream::connect(self.path("vsock.sock")).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .ok()?;
        let mut line = Vec::new();
        let mut byte = [0];
        while line.last() != Some(&b'\n') {
            match stream.read(&mut byte) {
                Ok(1) => line.push(byte[0]),
                _ => return None,
            }
        }
        assert!(
            line.starts_with(b"OK "),
            "{:?}",
            String::from_utf8_lossy(&line)
        );
        Some(stream)
    }

    /// Calls the control API, which must agree.
    pub fn post(&self, action: &str) {
        let (status, body) = self.api("POST", &format!("/v1/vm/{action}"));
        assert_eq!(status, 204, "{action}: {body}\n{}", self.logs());
    }

    /// The answer to `GET /v1/vm`.
    pub fn describe(&self) -> Value {
        let (status, body) = self.api("GET", "/v1/vm");
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    /// One request to the control API: status and body.
    pub fn api(&self, method: &str, path: &str) -> (u16, String) {
        self.until("the control socket", || {
            UnixStream::connect(self.path("vmm.sock")).ok()
        });
        self.try_api(method, path).unwrap()
    }

    /// One request to the control API of a monitor that may die over it.
    pub fn try_api(&self, method: &str, path: &str) -> std::io::Result<(u16, String)> {
        let mut stream = UnixStream::connect(self.path("vmm.sock"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let request = format!("{method} {path} HTTP/1.1\r\nhost: vmm\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let Some((head, body)) = answer.split_once("\r\n\r\n") else {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        };
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Ok((status, body.to_owned()))
    }

    /// Whether the control API answers that the Machine runs.
    pub fn answers(&self) -> bool {
        let answer = self.try_api("GET", "/v1/vm");
        answer.is_ok_and(|(_, body)| body.contains("\"running\""))
    }

    /// Pause, snapshot, stop: as the host's agent suspends a Machine.
    pub fn suspend(&mut self) {
        self.post("pause");
        self.post("snapshot");
        self.post("stop");
        assert_eq!(self.exit(), (0, "stopped".into()));
    }

    /// Waits for the monitor's end: its exit code, and the reason it left.
    pub fn exit(&mut self) -> (i32, String) {
        let mut monitor = self.monitor.take().expect("it runs");
        let status = self.until("the monitor's end", || monitor.try_wait().unwrap());
        let exit = fs::read_to_string(self.exit_file())
            .unwrap_or_else(|error| panic!("no exit.json ({error}), {status}\n{}", self.logs()));
        let exit: Value = serde_json::from_str(&exit).unwrap();
        (
            status.code().unwrap_or(-1),
            exit["reason"].as_str().unwrap().to_owned(),
        )
    }

    fn exit_file(&self) -> PathBuf {
        self.config["exit_file"].as_str().unwrap().into()
    }

    /// The message of the last end.
    pub fn exit_message(&self) -> String {
        let exit = fs::read_to_string(self.exit_file()).unwrap();
        let exit: Value = serde_json::from_str(&exit).unwrap();
        exit["message"].as_str().unwrap().to_owned()
    }

    /// The monitor's process id.
    pub fn pid(&self) -> u32 {
        self.monitor.as_ref().expect("it runs").id()
    }

    /// Sends the monitor a signal.
    pub fn signal(&self, signal: &str) {
        let done = Command::new("kill")
            .args([signal, &self.pid().to_string()])
            .status()
            .unwrap();
        assert!(done.success());
    }

    /// The guest's console and the monitor's log, for a failure's message.
    pub fn logs(&self) -> String {
        let read = |name: &str| fs::read_to_string(self.path(name)).unwrap_or_default();
        format!(
            "--- serial.log\n{}\n--- vmm.log\n{}",
            read("serial.log"),
            read("vmm.log")
        )
    }

    /// Tries until there is something, or patience ends.
    pub fn until<T>(&self, what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = attempt() {
                return value;
            }
            assert!(
                Instant::now() < deadline,
                "no {what} in time\n{}",
                self.logs()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(mut monitor) = self.monitor.take() {
            let _ = monitor.kill();
            let _ = monitor.wait();
        }
        for tap in &self.taps {
            let _ = Command::new("ip").args(["link", "del", tap]).status();
        }
    }
}

fn require_kvm() {
    static PROBED: OnceLock<Result<(), String>> = OnceLock::new();
    let probed = PROBED.get_or_init(|| {
        let output = Command::new(env!("CARGO_BIN_EXE_tern-vmm"))
            .arg("probe")
            .output()
            .unwrap();
        if output.status.success() {
            return Ok(());
        }
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    });
    if let Err(reason) = probed {
        panic!("this test needs true KVM; `make test` runs it inside metal. {reason}");
    }
}

/// A file of what every Machine boots.
pub fn guest_file(name: &str) -> PathBuf {
    let dir = std::env::var_os("TERN_GUEST_DIR").map_or_else(
        || {
            let exe = std::env::current_exe().unwrap();
            // target/<profile>/deps/<test>
            exe.ancestors().nth(3).unwrap().join("guest")
        },
        PathBuf::from,
    );
    let path = dir.join(name);
    assert!(
        path.exists(),
        "no {}: make it with `vmm/kernel/make-guest.sh {}`, or name another directory in \
         TERN_GUEST_DIR",
        path.display(),
        dir.display()
    );
    path
}

/// A TAP device with an address, whose other end is the guest's.
fn make_tap() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("vt{}-{number}", std::process::id() % 100_000);
    for arguments in [
        &["tuntap", "add", &name, "mode", "tap"][..],
        &["addr", "add", "192.0.2.1/24", "dev", &name],
        &["link", "set", &name, "up"],
    ] {
        let status = Command::new("ip")
            .args(arguments)
            .status()
            .expect("iproute2 is installed");
        assert!(status.success(), "ip {arguments:?}");
    }
    name
}

/// Where a program is, as a shell finds it.
pub fn which(program: &str) -> PathBuf {
    ["/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"]
        .iter()
        .map(|dir| Path::new(dir).join(program))
        .find(|path| path.exists())
        .unwrap_or_else(|| panic!("{program} is not installed: apt-get install {program}"))
}
