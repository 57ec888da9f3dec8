//! A server, laptops and the cables between them.

use std::fs::{self, File};
use std::future::Future;
use std::net::{Ipv6Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn6, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use tern_catalog::{
    Catalog, Host, HostId, MachineNumber, NetworkId, Peer, PrivateAddress, SqliteStore, Store, View,
};
use tern_mesh::{
    ClientConfig, Counters, Mesh, MeshConfig, MeshError, MeshKey, PrivateKey, PublicKey, Status,
};
use tokio::sync::RwLock;

/// Host 1 and what is around it. The test's own thread is inside its namespaces.
pub struct World {
    scratch: tempfile::TempDir,
    catalog: Catalog,
    view: View,
    config: MeshConfig,
    mesh: RwLock<Option<Mesh>>,
}

/// A namespace at the other end of a cable; it and what runs there end when this is dropped.
pub struct Laptop {
    name: String,
    interface: String,
    dir: PathBuf,
    /// The server's address on the cable.
    pub server: String,
    /// Its own.
    address: String,
}

impl World {
    /// Runs a test in a server's namespaces, with the mesh up.
    pub fn run<F: Future<Output = Result<()>>>(test: impl FnOnce(Rc<World>) -> F) -> Result<()> {
        for tool in ["ip", "wg", "wg-quick", "wireguard-go"] {
            ensure!(
                Command::new("which").arg(tool).output()?.status.success(),
                "this test needs `{tool}`: apt install iproute2 wireguard-tools wireguard-go"
            );
        }
        let scratch = tempfile::tempdir()?;
        isolate(scratch.path())
            .context("network namespaces take root; run `make test`, or the test with sudo")?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let world = Rc::new(Self::new(scratch).await?);
            let result = test(Rc::clone(&world)).await;
            if result.is_err() {
                eprintln!("{:#?}", world.status().await);
            }
            world.stop().await;
            result
        })
    }

    async fn new(scratch: tempfile::TempDir) -> Result<Self> {
        let store = SqliteStore::open(&scratch.path().join("catalog.db"))?;
        let store: Arc<dyn Store> = Arc::new(store);
        let view = View::follow(Arc::clone(&store)).await?;
        let key = MeshKey::load_or_create(&scratch.path().join("keys/wireguard.key"))?;
        let config = MeshConfig::new(HostId(1), key);
        let mesh = Mesh::start(config.clone(), view.clone()).await?;
        let catalog = Catalog::new(store);
        Ok(Self {
            scratch,
            catalog,
            view,
            config,
            mesh: RwLock::new(Some(mesh)),
        })
    }

    /// This server's public key.
    pub fn key(&self) -> String {
        self.config.key.public_key().to_string()
    }

    pub async fn status(&self) -> Result<Status> {
        let mesh = self.mesh.read().await;
        Ok(mesh
            .as_ref()
            .context("the mesh was stopped")?
            .status()
            .await?)
    }

    pub async fn counters(&self) -> Result<Counters> {
        Ok(self.status().await?.counters)
    }

    /// Stops the mesh.
    pub async fn stop(&self) {
        if let Some(mesh) = self.mesh.write().await.take() {
            mesh.shutdown().await;
        }
    }

    pub async fn start_again(&self) -> Result<Mesh, MeshError> {
        Mesh::start(self.config.clone(), self.view.clone()).await
    }

    /// Lets a key join a network, and waits until the mesh knows.
    pub async fn add_peer(
        &self,
        network: u32,
        name: &str,
        number: u32,
        key: &PublicKey,
    ) -> Result<()> {
        let (network, number) = (NetworkId(network), MachineNumber(number));
        let peer = Peer {
            name: name.parse()?,
            organization: "people".parse()?,
            network,
            host: HostId(1),
            number,
            address: PrivateAddress::of_peer(network, HostId(1), number),
            public_key: key.to_string(),
            created_at: jiff::Timestamp::now(),
        };
        self.catalog.put(&peer).await?;
        wait_for("the mesh to know the peer", || async {
            Ok(self.status().await?.peers.iter().any(|p| p.key == *key))
        })
        .await
    }

    pub async fn remove_peer(&self, network: u32, name: &str) -> Result<()> {
        self.catalog
            .delete::<Peer>(&format!("{network}/{name}"))
            .await?;
        Ok(())
    }

    /// What `tern wireguard create` prints.
    pub fn client_config(
        &self,
        network: u32,
        number: u32,
        private: &PrivateKey,
        at: &Laptop,
    ) -> String {
        let network = NetworkId(network);
        let config = ClientConfig {
            private_key: Some(private),
            address: PrivateAddress::of_peer(network, HostId(1), MachineNumber(number)),
            network,
            server_key: self.config.key.public_key(),
            endpoint: &format!("{}:51820", at.server),
        };
        config.to_string()
    }

    /// A namespace with a cable to this server.
    pub fn laptop(&self, n: u8) -> Result<Laptop> {
        Laptop::new(n, self.scratch.path())
    }

    /// Host 2, with a mesh of its own that sees the same catalog.
    pub async fn second_host(&self) -> Result<Laptop> {
        let cable = self.laptop(200)?;
        let own = MeshKey::load_or_create(&self.scratch.path().join("second.key"))?;
        for (id, key, address) in [
            (1, self.config.key.public_key(), &cable.server),
            (2, own.public_key(), &cable.address),
        ] {
            let host = Host {
                id: HostId(id),
                name: format!("host{id}"),
                region: "here".into(),
                public_key: key.to_string(),
                endpoint: format!("{address}:51820").parse()?,
                started_at: jiff::Timestamp::now(),
            };
            self.catalog.put(&host).await?;
        }
        let store = Arc::clone(self.catalog.store());
        let (ready, started) = std::sync::mpsc::channel();
        let namespace = cable.name.clone();
        // Its thread lives as long as the test's process.
        std::thread::spawn(move || -> Result<()> {
            enter(&namespace)?;
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async {
                let view = View::follow(store).await?;
                let mesh = Mesh::start(MeshConfig::new(HostId(2), own), view).await;
                let failed = mesh.as_ref().err().map(ToString::to_string);
                ready.send(failed)?;
                mesh?.ended().await;
                Ok(())
            })
        });
        match started.recv()? {
            None => Ok(cable),
            Some(error) => bail!("the second mesh does not start: {error}"),
        }
    }
}

impl Laptop {
    fn new(n: u8, scratch: &Path) -> Result<Self> {
        let (name, veth) = (format!("laptop{n}"), format!("lap{n}"));
        let (server, address) = (format!("198.51.{n}.1"), format!("198.51.{n}.2"));
        run("ip", &["netns", "add", &name])?;
        let laptop = Self {
            interface: format!("wgt{n}"),
            dir: scratch.join(&name),
            name,
            server,
            address,
        };
        let (name, server, address) = (&laptop.name, &laptop.server, &laptop.address);
        run(
            "ip",
            &[
                "link", "add", &veth, "type", "veth", "peer", "name", "eth0", "netns", name,
            ],
        )?;
        run(
            "ip",
            &["addr", "add", &format!("{server}/30"), "dev", &veth],
        )?;
        run("ip", &["link", "set", &veth, "up"])?;
        laptop.run("ip", &["link", "set", "lo", "up"])?;
        laptop.run(
            "ip",
            &["addr", "add", &format!("{address}/30"), "dev", "eth0"],
        )?;
        laptop.run("ip", &["link", "set", "eth0", "up"])?;
        fs::create_dir(&laptop.dir)?;
        Ok(laptop)
    }

    /// The name of its WireGuard interface.
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// Gives a configuration to `wg-quick`, as it is.
    pub fn join(&self, config: &str) -> Result<()> {
        // What wg-quick tells the system's resolver goes to a file.
        let resolvconf = self.dir.join("resolvconf");
        fs::write(
            &resolvconf,
            format!("#!/bin/sh\ncat > {}/dns\n", self.dir.display()),
        )?;
        fs::set_permissions(&resolvconf, fs::Permissions::from_mode(0o755))?;
        let file = self.dir.join(format!("{}.conf", self.interface));
        fs::write(&file, config)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
        let path = format!("{}:{}", self.dir.display(), std::env::var("PATH")?);
        let mut command = self.command("wg-quick", &["up", &file.display().to_string()]);
        checked(command.env("PATH", path)).map(drop)
    }

    /// What wg-quick made of the line `DNS`.
    pub fn dns(&self) -> Result<String> {
        Ok(fs::read_to_string(self.dir.join("dns"))?)
    }

    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        checked(&mut self.command(program, args))
    }

    /// Does something inside.
    pub fn inside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        let name = self.name.clone();
        let thread = std::thread::spawn(move || enter(&name).map(|()| work()));
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("a panic inside {}", self.name))?
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.name, program])
            .args(args);
        command
    }
}

impl Drop for Laptop {
    fn drop(&mut self) {
        // wireguard-go ends with its interface; where there is none there is nothing to end.
        let _ = self.run("ip", &["link", "del", &self.interface]);
        let _ = run("ip", &["netns", "del", &self.name]);
    }
}

/// Waits for a condition.
pub async fn wait_for<F>(what: &str, mut holds: impl FnMut() -> F) -> Result<()>
where
    F: Future<Output = Result<bool>>,
{
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds().await? {
        ensure!(Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Connects by TCP from an address of one's own choice.
pub fn connect_from(source: Ipv6Addr, to: SocketAddr, patience: Duration) -> Result<TcpStream> {
    let SocketAddr::V6(to) = to else {
        bail!("only IPv6")
    };
    let socket = socket(
        AddressFamily::Inet6,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let timeout = TimeVal::new(patience.as_secs() as i64, 0);
    setsockopt(&socket, sockopt::SendTimeout, &timeout)?;
    let source = std::net::SocketAddrV6::new(source, 0, 0, 0);
    let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
    bind(fd, &SockaddrIn6::from(source))?;
    connect(fd, &SockaddrIn6::from(to))?;
    Ok(TcpStream::from(socket))
}

/// Runs `converse` with a source address chosen by a route.
pub fn converse_from(
    source: Ipv6Addr,
    to: Ipv6Addr,
    converse: impl FnOnce(Ipv6Addr, Duration) -> Result<()>,
) -> Result<()> {
    run(
        "ip",
        &[
            "-6",
            "route",
            "add",
            &format!("{to}/128"),
            "dev",
            "tern0",
            "src",
            &source.to_string(),
        ],
    )?;
    converse(to, Duration::from_secs(20))
}

pub fn run(program: &str, args: &[&str]) -> Result<String> {
    checked(Command::new(program).args(args))
}

fn checked(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("start {command:?}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{command:?}: {}: {stderr}",
        output.status
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Moves this thread, and what it starts, into namespaces of its own.
fn isolate(scratch: &Path) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    // Names of namespaces and control sockets of wireguard-go are this test's own.
    for shared in ["/run/netns", "/run/wireguard"] {
        fs::create_dir_all(shared)?;
        mount(
            Some("tern-mesh"),
            shared,
            Some("tmpfs"),
            MsFlags::empty(),
            none,
        )?;
    }
    run("ip", &["link", "set", "lo", "up"])?;
    ensure!(scratch.exists());
    Ok(())
}

fn enter(namespace: &str) -> Result<()> {
    let file = File::open(Path::new("/run/netns").join(namespace))?;
    Ok(setns(file, CloneFlags::CLONE_NEWNET)?)
}
