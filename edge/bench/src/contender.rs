//! The processes: started, pinned, asked what they use, ended.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Who takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Nginx,
    Haproxy,
    Caddy,
    Tern,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Nginx, Self::Haproxy, Self::Caddy, Self::Tern];

    pub fn name(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Caddy => "caddy",
            Self::Tern => "tern",
        }
    }

    /// As in its configuration.
    pub fn address(self) -> SocketAddr {
        let port = match self {
            Self::Nginx => 18441,
            Self::Haproxy => 18442,
            Self::Caddy => 18443,
            Self::Tern => 18444,
        };
        (Ipv4Addr::LOCALHOST, port).into()
    }

    fn command(self) -> Result<Vec<String>> {
        let words = match self {
            Self::Nginx => "nginx -p . -c nginx.conf",
            Self::Haproxy => "haproxy -db -f haproxy.cfg",
            Self::Caddy => "caddy run --adapter caddyfile --config Caddyfile",
            Self::Tern => {
                let us = std::env::current_exe()?;
                return Ok(vec![us.display().to_string(), "serve".into()]);
            }
        };
        Ok(words.split(' ').map(str::to_owned).collect())
    }
}

impl FromStr for Kind {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|kind| kind.name() == text);
        found.with_context(|| format!("there is no contender {text:?}"))
    }
}

/// A proxy that runs.
pub struct Contender {
    pub kind: Kind,
    process: Process,
}

impl Contender {
    /// Starts it on one core and waits until it accepts.
    pub fn start(kind: Kind, core: usize, work: &Path) -> Result<Self> {
        let mut command = Command::new("taskset");
        command
            .args(["-c", &core.to_string()])
            .args(kind.command()?);
        let process = Process::start(kind.name(), command, kind.address(), work)?;
        Ok(Self { kind, process })
    }

    /// Processor time that all its processes have used.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100) as f64;
        let mut total = 0.0;
        for pid in family(self.process.child.id())? {
            let stat = stat(pid).with_context(|| format!("process {pid} has ended"))?;
            // utime and stime, fields 14 and 15; the first here is field 3.
            let used: Option<f64> = [stat.get(11), stat.get(12)]
                .into_iter()
                .map(|field| field?.parse::<f64>().ok())
                .sum();
            total += used.context("/proc/PID/stat has no times")? / ticks;
        }
        Ok(total)
    }

    /// Memory of all its processes, what they share counted once.
    pub fn resident_kib(&self) -> Result<f64> {
        let mut total = 0.0;
        for pid in family(self.process.child.id())? {
            let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
            let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
            let kib = line.and_then(|line| line.split_whitespace().next());
            total += kib.context("smaps_rollup has no Pss")?.parse::<f64>()?;
        }
        Ok(total)
    }
}

/// A child, ended with this value. Its output is in the working directory.
pub struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// The app that all contenders stand before.
    pub fn origin(work: &Path) -> Result<Self> {
        let mut command = Command::new("nginx");
        command.args(["-p", ".", "-c", "origin.conf"]);
        Self::start("origin", command, (Ipv4Addr::LOCALHOST, 18080).into(), work)
    }

    fn start(
        name: &'static str,
        mut command: Command,
        address: SocketAddr,
        work: &Path,
    ) -> Result<Self> {
        const PATIENCE: Duration = Duration::from_secs(30);
        let taken = std::net::TcpListener::bind(address);
        drop(taken.with_context(|| format!("{address}, where {name} is to listen, is taken"))?);
        let log = work.join(format!("{name}.log"));
        let output = std::fs::File::create(&log)?;
        let child = command
            .current_dir(work)
            .env("HOME", work) // Caddy keeps state
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("cannot start {name}; run .ci/setup bench"))?;
        let mut process = Self { name, child, log };
        let begun = Instant::now();
        while std::net::TcpStream::connect(address).is_err() {
            let ended = process.child.try_wait()?.is_some();
            if ended || begun.elapsed() > PATIENCE {
                let log = std::fs::read_to_string(&process.log).unwrap_or_default();
                bail!("{name} does not listen at {address}: {log}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(process)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let begun = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if begun.elapsed() > Duration::from_secs(5) {
                eprintln!("{} does not end; it is killed", self.name);
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A process and all below it.
fn family(root: u32) -> Result<Vec<u32>> {
    let mut parents = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // Processes may end while we look.
        let parent = stat(pid).and_then(|stat| stat.get(1)?.parse::<u32>().ok());
        parents.extend(parent.map(|parent| (pid, parent)));
    }
    let mut family = vec![root];
    let mut next = 0;
    while let Some(&above) = family.get(next) {
        let below = parents.iter().filter(|(_, parent)| *parent == above);
        family.extend(below.map(|(pid, _)| *pid));
        next += 1;
    }
    Ok(family)
}

/// The fields of `/proc/PID/stat` after the name, which may hold anything.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = text.rsplit_once(") ")?;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_of_the_family() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let family = family(std::process::id()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(family.contains(&child.id()));
        assert!(!family.contains(&1));
    }

    #[test]
    fn every_contender_is_found_by_its_name() {
        for kind in Kind::ALL {
            assert_eq!(kind.name().parse::<Kind>().unwrap(), kind);
        }
        assert!("apache".parse::<Kind>().is_err());
    }
}
