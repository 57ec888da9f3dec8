//! A Machine as a host agent would run it: the real monitor, kernel, initramfs, image and disk.
//!
//! Runs where there is true KVM: inside `tern-metal`. Programs are taken from the target directory of
//! the tests, as `make build` leaves them; the image is made from the virtual host's busybox.

#![allow(clippy::unwrap_used)] // test code, though in a module of its own

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use tern_guest::message::{AppState, Stream};
use tern_guest::{
    Decoder, Encoder, Event, ExecRequest, ExitStatus, Frame, FrameKind, GUEST_PORT, Reply, Request,
    RunConfig, Status, run_archive,
};

/// Everything is several times slower in the virtual host, and its own host may be busy.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A Machine's directory and, while it runs, its monitor.
pub struct Machine {
    dir: TempDir,
    monitor: Option<Child>,
    tap: Option<String>,
}

/// A shell script as an app.
pub fn script(text: &str) -> RunConfig {
    let mut config = RunConfig {
        machine_id: "e784079b449483".into(),
        hostname: "guest".into(),
        ..Default::default()
    };
    config.process.entrypoint = vec!["/bin/sh".into(), "-c".into()];
    config.process.cmd = vec![text.into()];
    config
}

/// An app that is there until it is told to go.
pub fn idle() -> RunConfig {
    script("trap 'exit 0' INT; echo ready; while :; do sleep 1000 & wait; done")
}

impl Machine {
    /// Boots a Machine that runs this.
    pub fn boot(config: &RunConfig) -> Self {
        let mut machine = Self::new();
        machine.start(&run_archive(config).unwrap());
        machine
    }

    /// A Machine with an image and an empty disk, which does not run yet.
    pub fn new() -> Self {
        Self::of(make_tree)
    }

    /// A Machine with nothing but `/busybox` in its image.
    pub fn of_one_file() -> Self {
        Self::of(|root| {
            fs::copy(BUSYBOX, root.join("busybox")).expect(BUSYBOX);
        })
    }

    fn of(make_tree: impl FnOnce(&Path)) -> Self {
        let (dir, root) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        make_tree(root.path());
        let image = dir.path().join("image.erofs");
        run(Command::new("mkfs.erofs")
            .arg("--quiet")
            .arg(image)
            .arg(root.path()));
        run(Command::new("truncate")
            .args(["-s", "256M"])
            .arg(dir.path().join("disk.ext4")));
        run(Command::new("mkfs.ext4")
            .arg("-q")
            .arg(dir.path().join("disk.ext4")));
        Self {
            dir,
            monitor: None,
            tap: None,
        }
    }

    /// Gives it a network device, whose other end is the TAP of this name.
    pub fn with_tap(mut self, name: &str) -> Self {
        run(Command::new("ip").args(["tuntap", "add", name, "mode", "tap"]));
        self.tap = Some(name.to_string());
        self
    }

    /// Boots it with this archive as the second initramfs.
    pub fn start(&mut self, run_archive: &[u8]) {
        fs::write(self.path("run.cpio"), run_archive).unwrap();
        let net = self
            .tap
            .iter()
            .map(|tap| json!({"tap": tap, "mac": "02:00:00:00:00:01"}));
        let guest = target().join("guest");
        let config = json!({
            "id": "test", "vcpus": 1, "memory_mib": 128,
            "kernel": guest.join("vmlinux"),
            "initramfs": [guest.join("initramfs.cpio"), self.path("run.cpio")],
            "disks": [
                {"path": self.path("image.erofs"), "read_only": true},
                {"path": self.path("disk.ext4")},
            ],
            "net": net.collect::<Vec<_>>(),
            "vsock": {"cid": 3, "path": self.path("vsock.sock")},
            "control": self.path("vmm.sock"), "pid_file": self.path("vmm.pid"),
            "serial_log": self.path("serial.log"), "snapshot_dir": self.path("snapshot"),
            "exit_file": self.path("exit.json"),
        });
        fs::write(self.path("vm.json"), config.to_string()).unwrap();
        self.spawn(&[]);
    }

    /// Writes a snapshot, ends the monitor, and starts another one from the snapshot.
    pub fn suspend_and_resume(&mut self) {
        for action in ["pause", "snapshot", "stop"] {
            self.control(action);
        }
        assert!(self.monitor.take().unwrap().wait().unwrap().success());
        self.spawn(&["--restore"]);
    }

    /// A file of the Machine's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Asks one question.
    pub fn ask(&self, request: &Request) -> Reply {
        let mut conn = self.connect();
        conn.send(request);
        conn.frame().expect("an answer").parse().unwrap()
    }

    /// How the guest is doing.
    pub fn status(&self) -> Status {
        match self.ask(&Request::Status) {
            Reply::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    /// Waits until the app runs.
    pub fn wait_running(&self) {
        let mut events = self.attach(0);
        while !matches!(
            events.next().expect("the app starts"),
            Event::Started { .. }
        ) {}
        assert_eq!(self.status().state, AppState::Running);
    }

    /// Listens to what happens.
    pub fn attach(&self, from: u64) -> Attached {
        let mut conn = self.connect();
        conn.send(&Request::Attach { from });
        Attached { conn }
    }

    /// Runs a script beside the app, and returns what it printed.
    pub fn sh(&self, script: &str) -> String {
        let cmd = ["/bin/sh", "-c", script].map(String::from).to_vec();
        let (output, status) = self.exec(ExecRequest {
            cmd,
            ..Default::default()
        });
        assert_eq!(status.code, 0, "{script}: {output}");
        output
    }

    /// Runs a command beside the app, and returns all that it printed, and its end.
    pub fn exec(&self, request: ExecRequest) -> (String, ExitStatus) {
        let mut conn = self.connect();
        conn.send(&Request::Exec(request));
        let mut output = Vec::new();
        loop {
            let frame = conn.frame().expect("the command's end");
            match frame.kind {
                FrameKind::Json => match frame.parse().unwrap() {
                    Reply::Exit(status) => {
                        return (String::from_utf8_lossy(&output).into_owned(), status);
                    }
                    other => panic!("{other:?}"),
                },
                _ => output.extend(frame.payload),
            }
        }
    }

    /// A connection to init, as soon as it listens.
    pub fn connect(&self) -> Connection {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.try_connect() {
                Ok(conn) => return conn,
                Err(error) => {
                    assert!(
                        Instant::now() < deadline,
                        "{error}; serial:\n{}",
                        self.serial()
                    );
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }

    fn try_connect(&self) -> io::Result<Connection> {
        let mut conn = UnixStream::connect(self.path("vsock.sock"))?;
        conn.set_read_timeout(Some(PATIENCE))?;
        conn.write_all(format!("CONNECT {GUEST_PORT}\n").as_bytes())?;
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            conn.read_exact(&mut byte)?;
            line.push(byte[0]);
        }
        assert!(
            line.starts_with(b"OK "),
            "{}",
            String::from_utf8_lossy(&line)
        );
        Ok(Connection {
            conn,
            decoder: Decoder::new(),
        })
    }

    /// Waits for the end of the monitor, and returns why it ended.
    pub fn wait_end(&mut self) -> String {
        let mut monitor = self.monitor.take().expect("it runs");
        let deadline = Instant::now() + PATIENCE;
        while monitor.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                let _ = monitor.kill();
                panic!("the Machine does not end; serial:\n{}", self.serial());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let text = fs::read_to_string(self.path("exit.json")).unwrap();
        let exit: Value = serde_json::from_str(&text).unwrap();
        exit["reason"].as_str().unwrap().to_string()
    }

    /// What the guest has written to its console.
    pub fn serial(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.path("serial.log")).unwrap_or_default()).into_owned()
    }

    fn control(&self, action: &str) {
        run(Command::new("curl")
            .args(["-sS", "--fail-with-body", "-X", "POST", "--unix-socket"])
            .arg(self.path("vmm.sock"))
            .arg(format!("http://monitor/v1/vm/{action}")));
    }

    fn spawn(&mut self, extra: &[&str]) {
        let log = File::create(self.path("vmm.log")).unwrap();
        let program = target().join("tern-vmm");
        let mut command = Command::new(&program);
        command
            .arg("run")
            .arg("--config")
            .arg(self.path("vm.json"))
            .args(extra);
        let spawned = command.stdin(Stdio::null()).stderr(log).spawn();
        let needs = "run `make build`, and this test in tern-metal";
        self.monitor =
            Some(spawned.unwrap_or_else(|error| panic!("{}: {error}: {needs}", program.display())));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(mut monitor) = self.monitor.take() {
            let _ = monitor.kill();
            let _ = monitor.wait();
        }
        if let Some(tap) = &self.tap {
            let _ = Command::new("ip").args(["link", "del", tap]).status();
        }
        if std::thread::panicking() {
            let log = fs::read_to_string(self.path("vmm.log")).unwrap_or_default();
            eprintln!("--- serial\n{}\n--- monitor\n{log}", self.serial());
        }
    }
}

/// A connection to init.
pub struct Connection {
    conn: UnixStream,
    decoder: Decoder,
}

impl Connection {
    /// Sends a message.
    pub fn send(&mut self, message: &impl serde::Serialize) {
        let mut wire = Encoder::new();
        wire.json(message).unwrap();
        self.conn.write_all(wire.wire()).unwrap();
    }

    /// Sends input for a command until a whole second makes no room for more.
    pub fn fill_input(&mut self) {
        let patience = Some(Duration::from_secs(1));
        self.conn.set_write_timeout(patience).unwrap();
        let mut wire = Encoder::new();
        wire.raw(FrameKind::Stdin, &[0; 4 * 1024 * 1024]);
        while let Ok(written) = self.conn.write(wire.wire())
            && written > 0
        {
            wire.consume(written);
        }
        assert!(!wire.wire().is_empty(), "all of it was taken");
    }

    /// The next frame; none at the end.
    pub fn frame(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(frame);
            }
            let mut buffer = [0; 16 * 1024];
            match self.conn.read(&mut buffer) {
                Ok(0) => return None,
                Ok(length) => self.decoder.feed(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// An attached host.
pub struct Attached {
    conn: Connection,
}

impl Attached {
    /// The next event; none when the guest has closed the connection.
    pub fn next(&mut self) -> Option<Event> {
        self.conn.frame().map(|frame| frame.parse().unwrap())
    }

    /// Waits for a line, and returns its number.
    pub fn wait_line(&mut self, wanted: &str) -> u64 {
        loop {
            match self.next().expect("the line") {
                Event::Log { seq, line, .. } if line == wanted => return seq,
                Event::Exited(status) => panic!("ended before {wanted:?}: {status:?}"),
                _ => {}
            }
        }
    }

    /// All lines to the end, with the end.
    pub fn until_end(mut self) -> (Vec<(Stream, String)>, ExitStatus) {
        let mut lines = Vec::new();
        loop {
            match self.next().expect("the app's end") {
                Event::Log { stream, line, .. } => lines.push((stream, line)),
                Event::Started { .. } => {}
                Event::Exited(status) => return (lines, status),
            }
        }
    }
}

/// Where `make build` leaves programs: two directories above a test.
fn target() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    own.ancestors()
        .nth(2)
        .expect("a test lies in <target>/debug/deps")
        .to_owned()
}

/// A small system: busybox, two users.
fn make_tree(root: &Path) {
    let path = |name: &str| root.join(name);
    for directory in ["bin", "etc", "home/app"] {
        fs::create_dir_all(path(directory)).unwrap();
    }
    fs::copy(BUSYBOX, path("bin/busybox")).expect(BUSYBOX);
    for applet in APPLETS.split_whitespace() {
        symlink("busybox", path("bin").join(applet)).unwrap();
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n";
    fs::write(path("etc/passwd"), passwd).unwrap();
    fs::write(
        path("etc/group"),
        "root:x:0:\napp:x:1001:\nextra:x:50:app\n",
    )
    .unwrap();
    symlink("../run/resolver/conf", path("etc/resolv.conf")).unwrap();
    symlink("/etc", path("run")).unwrap();
    fs::write(path("bin/no-loader"), "#!/no/such/interpreter\n").unwrap();
    run(Command::new("chmod").arg("755").arg(path("bin/no-loader")));
}

/// Runs a tool of the virtual host.
pub fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{command:?}: {stdout}{stderr}");
    stdout
}

/// Static: the virtual host has it from `busybox-static`.
const BUSYBOX: &str = "/bin/busybox";

const APPLETS: &str = "cat date dd df dmesg echo env grep head hostname id ip kill ls mkdir mount nc \
                       ping ping6 ps rm sh sleep stat stty sync tail test touch tty uname wc yes";
