//! The two monitors, each told to run the same guest.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::proc::{now_ms, settle};
use crate::told::Told;

/// The guest's memory: that of the Machine in the goal.
pub const GUEST_MIB: u64 = 256;
/// What the guest's init writes first of all.
pub const FIRST_LINE: &str = "bench: init";
/// Kernel words of both; `tern-vmm` has them built in (`vmm/monitor/src/boot/mod.rs`).
const CMDLINE: &str = "console=ttyS0 quiet loglevel=3 reboot=k panic=-1 pci=off 8250.nr_uarts=1 \
    8250.skip_txen_test=1 i8042.noaux i8042.nomux i8042.dumbkbd tsc=reliable no_timer_check noreplace-smp random.trust_cpu=on";
/// The guest's end of each TAP is `.2`.
const MAC: &str = "02:00:00:00:00:01";
/// Between two attempts at what nothing tells of.
const PAUSE: Duration = Duration::from_millis(1);
/// How long one connection may take until the next is tried.
const ANEW: Duration = Duration::from_millis(100);
/// Whether what is waited for is there already is looked at this often, news or not.
const NEWS_PATIENCE: Duration = Duration::from_secs(1);
/// Emulated hosts on busy machines are slow.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Which monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `tern-vmm`.
    Tern,
    /// QEMU's `microvm` machine.
    Qemu,
}

/// What the guest is made of: the same files for both.
#[derive(Debug, Clone)]
pub struct Files {
    /// `tern-vmm`, an optimized build.
    pub vmm: PathBuf,
    /// QEMU with its libraries (`lib`) and firmware (`share`).
    pub qemu: PathBuf,
    /// ELF kernel with a PVH entry.
    pub kernel: PathBuf,
    /// Initramfs with the HTTP server.
    pub initramfs: PathBuf,
}

/// What the guest does once it is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// Serves HTTP.
    Serves,
    /// The same, and writes to its serial line all the time.
    Talks,
}

/// One monitor with its directory, disk and TAP.
#[derive(Debug)]
pub struct Contender {
    /// Which.
    pub kind: Kind,
    guest: Guest,
    net: u8,
    files: Files,
    dir: PathBuf,
    tap: String,
}

/// A monitor that runs; killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    /// When it was started, by [`now_ms`].
    pub started_ms: f64,
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Contender {
    /// Makes its directory, disk and TAP.
    pub fn new(kind: Kind, guest: Guest, files: &Files, root: &Path) -> Result<Self> {
        let (name, net) = match (kind, guest) {
            (Kind::Tern, Guest::Serves) => ("tern", 1),
            (Kind::Qemu, Guest::Serves) => ("qemu", 2),
            (Kind::Tern, Guest::Talks) => ("tern-talks", 3),
            (Kind::Qemu, Guest::Talks) => ("qemu-talks", 4),
        };
        let dir = root.join(name);
        fs::create_dir_all(dir.join("snapshot"))?;
        File::create(dir.join("disk.img"))?.set_len(64 << 20)?;
        let tap = format!("mb-{name}");
        for arguments in [
            format!("tuntap add {tap} mode tap"),
            format!("addr add 198.51.{net}.1/24 dev {tap}"),
            format!("link set {tap} up"),
            // No address resolution on the measured path, of either.
            format!("neigh replace 198.51.{net}.2 lladdr {MAC} dev {tap} nud permanent"),
        ] {
            let done = Command::new("ip")
                .args(arguments.split(' '))
                .status()
                .context("cannot run ip")?;
            ensure!(done.success(), "ip {arguments} failed");
        }
        Ok(Self {
            kind,
            guest,
            net,
            files: files.clone(),
            dir,
            tap,
        })
    }

    /// The name in tables.
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Tern => "tern",
            Kind::Qemu => "qemu",
        }
    }

    /// Starts it on a host at rest, from its snapshot if `restore`.
    pub fn start(&self, restore: bool) -> Result<Running> {
        let _ = fs::remove_file(self.serial());
        let mut command = match self.kind {
            Kind::Tern => self.tern(restore)?,
            Kind::Qemu => self.qemu(restore),
        };
        let log = File::create(self.dir.join("log"))?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        settle()?;
        let started_ms = now_ms()?;
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", self.name()))?;
        Ok(Running { child, started_ms })
    }

    /// The guest's own words on the kernel command line.
    fn words(&self) -> String {
        let talks = if self.guest == Guest::Talks {
            "talk "
        } else {
            ""
        };
        format!("{talks}net={}", self.net)
    }

    fn serial(&self) -> PathBuf {
        self.dir.join("serial.log")
    }

    fn control(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    fn tern(&self, restore: bool) -> Result<Command> {
        let path = |name: &str| self.dir.join(name);
        let config = json!({
            "id": "bench", "vcpus": 1, "memory_mib": GUEST_MIB,
            "kernel": self.files.kernel, "initramfs": [self.files.initramfs],
            "cmdline": self.words(),
            "disks": [{"path": path("disk.img")}], "net": [{"tap": self.tap, "mac": MAC}],
            "control": self.control(), "pid_file": path("pid"), "serial_log": self.serial(),
            "snapshot_dir": path("snapshot"), "exit_file": path("exit.json"),
        });
        fs::write(path("vm.json"), config.to_string())?;
        let mut command = Command::new(&self.files.vmm);
        command.arg("run").arg("--config").arg(path("vm.json"));
        if restore {
            command.arg("--restore");
        }
        Ok(command)
    }

    /// As QEMU's documentation of `microvm` advises for speed: no legacy devices, no option ROMs, qboot
    /// instead of SeaBIOS, the ELF kernel by its PVH entry. ACPI stays: the kernel finds its devices by it.
    fn qemu(&self, restore: bool) -> Command {
        let show = |path: PathBuf| path.display().to_string();
        let share = self.files.qemu.join("share");
        let mut command = Command::new(self.files.qemu.join("qemu-system-x86_64"));
        command
            .env("LD_LIBRARY_PATH", self.files.qemu.join("lib"))
            .arg("-L")
            .arg(&share);
        let machine =
            "microvm,accel=kvm,acpi=on,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off";
        command.args([
            "-M",
            machine,
            "-cpu",
            "host",
            "-smp",
            "1",
            "-m",
            &format!("{GUEST_MIB}M"),
        ]);
        command.arg("-bios").arg(share.join("qboot.rom"));
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        command
            .arg("-kernel")
            .arg(&self.files.kernel)
            .arg("-initrd")
            .arg(&self.files.initramfs);
        command.args(["-append", &format!("{CMDLINE} {}", self.words())]);
        command.args(["-serial", &format!("file:{}", show(self.serial()))]);
        let disk = show(self.dir.join("disk.img"));
        command.args(["-drive", &format!("id=disk,file={disk},format=raw,if=none")]);
        command.args(["-device", "virtio-blk-device,drive=disk"]);
        let tap = format!("tap,id=net,ifname={},script=no,downscript=no", self.tap);
        command.args([
            "-netdev",
            &tap,
            "-device",
            &format!("virtio-net-device,netdev=net,mac={MAC}"),
        ]);
        command.args([
            "-monitor",
            &format!("unix:{},server=on,wait=off", show(self.control())),
        ]);
        command.args(["-global", "migration.mapped-ram=on"]);
        if restore {
            command.args([
                "-incoming",
                &format!("file:{}", show(self.dir.join("snapshot/state"))),
            ]);
        }
        command
    }

    /// Waits for the first line of the guest's init: when it was there.
    pub fn first_line(&self) -> Result<f64> {
        self.until_told(&Told::of_files(&self.dir)?, "first line of init", || {
            let text = fs::read(self.serial()).unwrap_or_default();
            let line = FIRST_LINE.as_bytes();
            Ok(text
                .windows(line.len())
                .any(|window| window == line)
                .then_some(()))
        })?;
        now_ms()
    }

    /// Waits for the first byte on the serial line since the start: when it was there.
    pub fn first_serial_byte(&self) -> Result<f64> {
        self.until_told(
            &Told::of_files(&self.dir)?,
            "byte on the serial line",
            || {
                let there = fs::metadata(self.serial()).is_ok_and(|file| file.len() > 0);
                Ok(there.then_some(()))
            },
        )?;
        now_ms()
    }

    /// Waits for the first byte of a reply of the guest's HTTP server: when it was there.
    ///
    /// A packet sent before the monitor has opened the TAP is lost, so this waits for the carrier, which the
    /// opening brings; after that the TAP keeps packets, and Tern hands them to the guest when it runs. Those of a
    /// guest that boots are refused, and QEMU drops those that come before it has restored its guest:
    /// the next attempt follows soon, not after the second that TCP would take, in favour of QEMU.
    pub fn first_http_byte(&self) -> Result<f64> {
        let carrier = format!("/sys/class/net/{}/carrier", self.tap);
        self.until_told(&Told::of_links()?, "carrier", || {
            Ok(fs::read_to_string(&carrier)
                .is_ok_and(|text| text.trim() == "1")
                .then_some(()))
        })?;
        let address = SocketAddr::from(([198, 51, self.net, 2], 80));
        self.until("HTTP reply", || {
            let Ok(mut stream) = TcpStream::connect_timeout(&address, ANEW) else {
                return Ok(None);
            };
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut byte = [0];
            match stream.read_exact(&mut byte) {
                Ok(()) => Ok(Some(())),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(None),
                Err(error) => Err(error.into()),
            }
        })?;
        now_ms()
    }

    /// Leaves a snapshot of the running guest and ends the monitor.
    pub fn suspend(&self, running: Running) -> Result<()> {
        match self.kind {
            Kind::Tern => {
                for action in ["pause", "snapshot"] {
                    self.call("POST", &format!("/v1/vm/{action}"))?;
                }
            }
            Kind::Qemu => {
                let file = self.dir.join("snapshot/state");
                let mut monitor = UnixStream::connect(self.control())?;
                monitor.set_read_timeout(Some(Duration::from_millis(200)))?;
                // Not stopped first: a guest that was would come back stopped.
                writeln!(monitor, "migrate -d file:{}", file.display())?;
                let mut said = String::new();
                self.until("end of the migration", || {
                    writeln!(monitor, "info migrate")?;
                    let mut chunk = [0; 4096];
                    if let Ok(count) = monitor.read(&mut chunk) {
                        said.push_str(&String::from_utf8_lossy(&chunk[..count]));
                    }
                    ensure!(!said.contains("failed"), "QEMU does not migrate: {said}");
                    Ok(said.contains("completed").then_some(()))
                })?;
            }
        }
        drop(running);
        Ok(())
    }

    /// The monitor's own account of its start.
    pub fn phases(&self) -> Result<Value> {
        let answer = self.call("GET", "/v1/vm")?;
        let (_, body) = answer.split_once("\r\n\r\n").context("no body")?;
        let description: Value = serde_json::from_str(body)?;
        Ok(description["boot"].clone())
    }

    fn call(&self, method: &str, path: &str) -> Result<String> {
        let mut stream = UnixStream::connect(self.control())?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: vmm\r\nconnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(
            answer.starts_with("HTTP/1.1 20"),
            "{method} {path}: {answer}"
        );
        Ok(answer)
    }

    /// Attempts whenever `told` has news.
    fn until_told<T>(
        &self,
        told: &Told,
        what: &str,
        attempt: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        self.attempt(what, attempt, || told.wait(NEWS_PATIENCE))
    }

    /// Attempts all the time.
    fn until<T>(&self, what: &str, attempt: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        self.attempt(what, attempt, || {
            thread::sleep(PAUSE);
            Ok(())
        })
    }

    fn attempt<T>(
        &self,
        what: &str,
        mut attempt: impl FnMut() -> Result<Option<T>>,
        pause: impl Fn() -> Result<()>,
    ) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = attempt()? {
                return Ok(value);
            }
            if Instant::now() > deadline {
                let read = |path| {
                    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
                };
                let (serial, log) = (read(self.serial()), read(self.dir.join("log")));
                bail!(
                    "{}: no {what} in time\n--- serial\n{serial}\n--- log\n{log}",
                    self.name()
                );
            }
            pause()?;
        }
    }
}
