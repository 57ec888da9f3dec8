//! A user's laptop: a network namespace behind a veth, with the kernel's WireGuard and `wg-quick`.

use std::fs::File;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use crate::process::{checked, output, run};

/// A laptop; removed when dropped.
#[derive(Debug)]
pub struct Laptop {
    name: String,
    interface: String,
    dir: PathBuf,
    /// Its address on the link to the server.
    pub address: String,
    /// The server's address on that link.
    pub server: String,
}

impl Laptop {
    /// Makes the `n`-th laptop (0 to 250).
    pub fn new(n: u8, dir: &Path) -> Result<Self> {
        let (name, veth) = (format!("laptop{n}"), format!("lap{n}"));
        let (server, address) = (
            format!("198.51.100.{}", n * 4 + 1),
            format!("198.51.100.{}", n * 4 + 2),
        );
        let dir = dir.join(&name);
        std::fs::create_dir_all(&dir)?;
        run("ip", ["netns", "add", &name])?;
        run(
            "ip",
            [
                "link", "add", &veth, "type", "veth", "peer", "name", "eth0", "netns", &name,
            ],
        )?;
        run("ip", ["addr", "add", &format!("{server}/30"), "dev", &veth])?;
        run("ip", ["link", "set", &veth, "up"])?;
        run("ip", ["-n", &name, "link", "set", "lo", "up"])?;
        run(
            "ip",
            [
                "-n",
                &name,
                "addr",
                "add",
                &format!("{address}/30"),
                "dev",
                "eth0",
            ],
        )?;
        run("ip", ["-n", &name, "link", "set", "eth0", "up"])?;
        // `ip netns exec` shows a namespace its own files under /etc/netns.
        let etc = Path::new("/etc/netns").join(&name);
        std::fs::create_dir_all(&etc)?;
        std::fs::write(etc.join("resolv.conf"), "")?;
        Ok(Self {
            interface: format!("wgt{n}"),
            name,
            dir,
            address,
            server,
        })
    }

    /// Brings WireGuard up from a configuration as `tern wireguard create` prints it, but for the server's
    /// address: that knows its public ones, not the one that this cable leads to. `resolv.conf` is set as
    /// `resolvconf` would from the `DNS` line.
    pub fn join(&self, config: &str) -> Result<()> {
        let path = self.dir.join(format!("{}.conf", self.interface));
        let lines = config
            .lines()
            .map(|line| match line.starts_with("Endpoint") {
                true => format!("Endpoint = {}:51820", self.server),
                false => line.to_owned(),
            });
        std::fs::write(&path, lines.collect::<Vec<_>>().join("\n"))?;
        let path = path.to_str().context("a path that is not UTF-8")?;
        checked(&mut self.command("wg-quick", &["up", path])).map(drop)
    }

    /// A connection from the laptop; a read that takes longer than `patience` fails.
    pub fn connect(&self, to: SocketAddr, patience: Duration) -> Result<TcpStream> {
        let namespace = File::open(Path::new("/run/netns").join(&self.name))?;
        // A socket stays in the namespace of the thread that made it.
        let connect = move || -> Result<TcpStream> {
            setns(namespace, CloneFlags::CLONE_NEWNET).context("setns")?;
            Ok(TcpStream::connect_timeout(&to, patience)?)
        };
        let stream = std::thread::spawn(connect)
            .join()
            .map_err(|_| anyhow!("the thread that connects has panicked"))?
            .with_context(|| format!("connect to {to}"))?;
        stream.set_read_timeout(Some(patience))?;
        Ok(stream)
    }

    /// A command to run on the laptop.
    pub fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.name, program])
            .args(args);
        command
    }

    /// Runs a command on the laptop; its failure is an error.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        checked(&mut self.command(program, args))
    }

    /// Runs a command on the laptop, whatever its end.
    pub fn output(&self, program: &str, args: &[&str]) -> Result<Output> {
        output(&mut self.command(program, args))
    }
}

impl Drop for Laptop {
    fn drop(&mut self) {
        let _ = run("ip", ["netns", "del", &self.name]);
        let _ = std::fs::remove_dir_all(Path::new("/etc/netns").join(&self.name));
    }
}
