//! Where the time of a Machine's start goes, for guests side by side: kernels, command lines, or both.
//!
//! ```text
//! boot-times ROUNDS NAME=GUEST_DIR[,WORD...]...
//! ```
//!
//! Every round starts one Machine of each variant, in turn, so that whatever slows the host down slows all of
//! them; a table of medians follows. WORDs are added to the guest's kernel command line. Runs where there is
//! true KVM (`tern-metal run -- …`), and needs `tern-vmm` beside it (`<target>/debug`, as cargo leaves both),
//! busybox, `mkfs.erofs` and `mkfs.ext4`. `BOOT_TIMES_VCPUS`, `BOOT_TIMES_MEMORY_MIB` and
//! `BOOT_TIMES_LOG=1` (print each guest's kernel log once) change what is started.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tern_guest::config::InterfaceConfig;
use tern_guest::{
    Decoder, Encoder, Event, ExecRequest, Frame, FrameKind, GUEST_PORT, Reply, Request, RunConfig,
    run_archive,
};

/// A guest directory (`vmlinux`, `initramfs.cpio`) and what its kernel is told besides.
struct Variant {
    name: String,
    guest: PathBuf,
    cmdline: String,
}

/// The moments of one start, in milliseconds; the table has them in this order.
const MOMENTS: [&str; 11] = [
    "monitor locked",
    "kernel loaded",
    "first instruction",
    "kernel: init starts",
    "kernel: set up",
    "kernel: app's first act",
    "vsock answers",
    "app started",
    "kernel KiB",
    "free KiB",
    "monitor's resident KiB",
];

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: boot-times ROUNDS NAME=GUEST_DIR[,WORD...]...";
    let rounds: usize = arguments.next().context(usage)?.parse().context(usage)?;
    let variants = arguments
        .map(|argument| parse_variant(&argument))
        .collect::<Result<Vec<_>>>()?;
    ensure!(rounds > 0 && !variants.is_empty(), usage);
    let world = World::new(&variants)?;
    let mut times: BTreeMap<(usize, &str), Vec<f64>> = BTreeMap::new();
    for round in 0..rounds {
        for (index, variant) in variants.iter().enumerate() {
            let log = round == 0 && std::env::var("BOOT_TIMES_LOG").is_ok_and(|v| v == "1");
            let start = world
                .start(variant, log)
                .with_context(|| format!("{}, round {round}", variant.name))?;
            for (moment, value) in start {
                times.entry((index, moment)).or_default().push(value);
            }
        }
    }
    print!("| min/median/max of {rounds} |");
    variants.iter().for_each(|v| print!(" {} |", v.name));
    println!("\n|---|{}", "---|".repeat(variants.len()));
    for moment in MOMENTS {
        print!("| {moment} |");
        for index in 0..variants.len() {
            match times.get_mut(&(index, moment)) {
                Some(values) => {
                    values.sort_by(f64::total_cmp);
                    let (min, max) = (values[0], values[values.len() - 1]);
                    print!(" {min:.0}/{:.0}/{max:.0} |", values[values.len() / 2]);
                }
                None => print!(" |"),
            }
        }
        println!();
    }
    Ok(())
}

fn parse_variant(argument: &str) -> Result<Variant> {
    let (name, rest) = argument
        .split_once('=')
        .with_context(|| format!("{argument}: no NAME=GUEST_DIR"))?;
    let (guest, words) = rest.split_once(',').unwrap_or((rest, ""));
    Ok(Variant {
        name: name.into(),
        guest: guest.into(),
        cmdline: words.replace(',', " "),
    })
}

/// What all Machines share: a directory, an image, a TAP.
struct World {
    dir: TempDir,
    vmm: PathBuf,
}

impl World {
    fn new(variants: &[Variant]) -> Result<Self> {
        let own = std::env::current_exe()?;
        let target = own
            .ancestors()
            .nth(2)
            .context("not in <target>/debug/examples")?;
        let dir = TempDir::new()?;
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("bin"))?;
        fs::copy("/bin/busybox", root.join("bin/busybox")).context("/bin/busybox")?;
        let world = Self {
            vmm: dir.path().join("tern-vmm"),
            dir,
        };
        // In memory, as all others: the checkout may lie on a slow share.
        fs::copy(target.join("tern-vmm"), &world.vmm)
            .context("tern-vmm: cargo build -p tern-vmm")?;
        for variant in variants {
            for name in ["vmlinux", "initramfs.cpio"] {
                let from = variant.guest.join(name);
                fs::copy(&from, world.path(&format!("{}.{name}", variant.name)))
                    .with_context(|| from.display().to_string())?;
            }
        }
        run(Command::new("mkfs.erofs")
            .arg("--quiet")
            .arg(world.path("image.erofs"))
            .arg(&root))?;
        run(Command::new("ip").args(["tuntap", "add", TAP, "mode", "tap"]))?;
        run(Command::new("ip").args(["link", "set", TAP, "up"]))?;
        run(Command::new("truncate")
            .args(["-s", "256M"])
            .arg(world.path("empty.ext4")))?;
        run(Command::new("mkfs.ext4")
            .arg("-q")
            .arg(world.path("empty.ext4")))?;
        let mut config = RunConfig {
            hostname: "guest".into(),
            ..Default::default()
        };
        config.process.exec = ["/bin/busybox", "sh", "-c", APP].map(String::from).to_vec();
        config.interfaces = vec![InterfaceConfig {
            addresses: vec!["172.19.0.2/30".parse()?, "fdaa:0:1::2/112".parse()?],
            gateway_v4: Some("172.19.0.1".parse()?),
            gateway_v6: Some("fe80::1".parse()?),
            ..Default::default()
        }];
        fs::write(world.path("run.cpio"), run_archive(&config)?)?;
        Ok(world)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts one Machine, reads off the moments, and ends it.
    fn start(&self, variant: &Variant, print_log: bool) -> Result<Vec<(&'static str, f64)>> {
        // A disk as a new Machine has it: nothing that a former start has set up is left.
        run(Command::new("cp")
            .arg("--sparse=always")
            .arg(self.path("empty.ext4"))
            .arg(self.path("disk.ext4")))?;
        let number = |name: &str, default: u64| {
            std::env::var(name).map_or(Ok(default), |text| text.parse().context(name.to_owned()))
        };
        let config = json!({
            "id": "boot", "vcpus": number("BOOT_TIMES_VCPUS", 1)?,
            "memory_mib": number("BOOT_TIMES_MEMORY_MIB", 128)?,
            "kernel": self.path(&format!("{}.vmlinux", variant.name)),
            "initramfs": [
                self.path(&format!("{}.initramfs.cpio", variant.name)),
                self.path("run.cpio"),
            ],
            "cmdline": variant.cmdline,
            "disks": [
                {"path": self.path("image.erofs"), "read_only": true},
                {"path": self.path("disk.ext4")},
            ],
            "net": [{"tap": TAP, "mac": "02:00:00:00:00:01"}],
            "vsock": {"cid": 3, "path": self.path("vsock.sock")},
            "control": self.path("vmm.sock"), "pid_file": self.path("vmm.pid"),
            "serial_log": self.path("serial.log"), "snapshot_dir": self.path("snapshot"),
            "exit_file": self.path("exit.json"),
        });
        fs::write(self.path("vm.json"), config.to_string())?;
        let _ = fs::remove_file(self.path("serial.log"));
        let begin = Instant::now();
        let monitor = Command::new(&self.vmm)
            .args(["run", "--config"])
            .arg(self.path("vm.json"))
            .stdin(Stdio::null())
            .stderr(File::create(self.path("vmm.log"))?)
            .spawn()
            .with_context(|| self.vmm.display().to_string())?;
        let mut monitor = Monitor(monitor);
        let moments = self
            .watch(begin, &mut monitor, print_log)
            .with_context(|| {
                let serial = fs::read(self.path("serial.log")).unwrap_or_default();
                format!("serial console:\n{}", String::from_utf8_lossy(&serial))
            })?;
        Ok(moments)
    }

    fn watch(
        &self,
        begin: Instant,
        monitor: &mut Monitor,
        print_log: bool,
    ) -> Result<Vec<(&'static str, f64)>> {
        let ms = |since: Instant| since.elapsed().as_secs_f64() * 1000.0;
        let mut events = loop {
            if let Ok(connection) = Connection::open(&self.path("vsock.sock")) {
                break connection;
            }
            ensure!(begin.elapsed() < PATIENCE, "nobody answers on vsock");
            ensure!(monitor.0.try_wait()?.is_none(), "the monitor has ended");
            // There is nothing to await but the socket itself, and asking often would slow the guest.
            std::thread::sleep(Duration::from_millis(3));
        };
        let answers = ms(begin);
        events.send(&Request::Attach { from: 0 })?;
        loop {
            match events.frame()?.parse()? {
                Event::Started { .. } => break,
                Event::Exited(status) => bail!("the app has ended: {status:?}"),
                Event::Log { line, .. } => println!("{line}"),
            }
        }
        let started = ms(begin);
        let boot: Value = self.describe()?;
        if print_log {
            println!("{boot}");
        }
        let phase = |name: &str| boot["boot"][name].as_f64().unwrap_or(f64::NAN) / 1000.0;
        // Its first act may come after init says that it has started.
        let log = loop {
            let log = self.exec(&["/bin/busybox", "dmesg"])?;
            if log.contains(FIRST_ACT) {
                break log;
            }
            ensure!(begin.elapsed() < PATIENCE, "the app does nothing");
        };
        if print_log {
            println!("{log}");
        }
        let first = phase("first_vcpu_run_us");
        // Kernel time begins when its clock does, a moment after the first instruction.
        let kernel = |words: &str| -> Result<f64> {
            let line = log.lines().find(|line| line.contains(words));
            let stamp = line.and_then(|line| line.strip_prefix('[')?.split(']').next());
            let seconds: f64 = stamp
                .with_context(|| format!("no {words:?}"))?
                .trim()
                .parse()?;
            Ok(seconds * 1000.0)
        };
        let memory = self.exec(&["/bin/busybox", "cat", "/proc/meminfo"])?;
        let status = fs::read_to_string(format!("/proc/{}/status", monitor.0.id()))?;
        let both = format!("{memory}\n{status}");
        let kib = |name: &str| -> Result<f64> {
            let value = both.lines().find_map(|line| line.strip_prefix(name));
            let word = value.and_then(|line| line.split_whitespace().next());
            Ok(word.with_context(|| name.to_owned())?.parse()?)
        };
        let total = number_of_kib(&boot);
        let resident = kib("VmRSS:")?;
        Ok(vec![
            ("monitor locked", phase("locked_us")),
            ("kernel loaded", phase("kernel_loaded_us")),
            ("first instruction", first),
            ("kernel: init starts", kernel("Run /init as init process")?),
            ("kernel: set up", kernel("the Machine is set up")?),
            ("kernel: app's first act", kernel(FIRST_ACT)?),
            ("vsock answers", answers),
            ("app started", started),
            ("kernel KiB", total - kib("MemTotal:")?),
            ("free KiB", kib("MemFree:")?),
            ("monitor's resident KiB", resident),
        ])
    }

    fn describe(&self) -> Result<Value> {
        let mut stream = UnixStream::connect(self.path("vmm.sock"))?;
        stream.write_all(b"GET /v1/vm HTTP/1.1\r\nhost: vmm\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (_, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        Ok(serde_json::from_str(body)?)
    }

    fn exec(&self, command: &[&str]) -> Result<String> {
        let mut connection = Connection::open(&self.path("vsock.sock"))?;
        connection.send(&Request::Exec(ExecRequest {
            cmd: command.iter().map(ToString::to_string).collect(),
            ..Default::default()
        }))?;
        let mut output = Vec::new();
        loop {
            let frame = connection.frame()?;
            match frame.kind {
                FrameKind::Json => match frame.parse()? {
                    Reply::Exit(_) => return Ok(String::from_utf8_lossy(&output).into_owned()),
                    other => bail!("{command:?}: {other:?}"),
                },
                _ => output.extend(frame.payload),
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", TAP]).status();
    }
}

/// A monitor that does not outlive its measurement.
struct Monitor(Child);

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A connection to init.
struct Connection {
    stream: UnixStream,
    decoder: Decoder,
}

impl Connection {
    fn open(path: &Path) -> Result<Self> {
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(format!("CONNECT {GUEST_PORT}\n").as_bytes())?;
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            line.push(byte[0]);
        }
        ensure!(line.starts_with(b"OK "), "refused");
        Ok(Self {
            stream,
            decoder: Decoder::new(),
        })
    }

    fn send(&mut self, request: &Request) -> Result<()> {
        let mut wire = Encoder::new();
        wire.json(request)?;
        Ok(self.stream.write_all(wire.wire())?)
    }

    fn frame(&mut self) -> Result<Frame> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(frame);
            }
            let mut buffer = [0; 16 * 1024];
            match self.stream.read(&mut buffer)? {
                0 => bail!("the guest has closed the connection"),
                length => self.decoder.feed(&buffer[..length]),
            }
        }
    }
}

fn number_of_kib(description: &Value) -> f64 {
    description["memory_mib"].as_f64().unwrap_or(f64::NAN) * 1024.0
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {errors}");
    Ok(())
}

const TAP: &str = "boot-times0";
/// Written to the kernel's log, which has the guest's own clock.
const FIRST_ACT: &str = "the app runs";
const APP: &str = "echo 'the app runs' > /dev/kmsg; exec /bin/busybox sleep 100000";
/// A host may be busy; a guest that does not come up is an error all the same.
const PATIENCE: Duration = Duration::from_secs(60);
