//! The running mesh of one host.

use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tern_catalog::{HostId, Snapshot, View};
use thiserror::Error;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::engine::Engine;
use crate::link::{Link, LinkError};
use crate::peers::networks_of;
use crate::tun::Tun;
use crate::udp::Udp;
use crate::worker::{Mailbox, Worker};
use crate::{Counters, MeshKey, PORT, PeerStatus, peers_of};

/// Wait before addresses that the kernel refused are tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What a mesh needs to know.
#[derive(Debug, Clone)]
pub struct MeshConfig {
    /// This host.
    pub host: HostId,
    /// Where WireGuard listens, IPv6 and IPv4 alike when the address is `[::]`.
    pub listen: SocketAddr,
    /// The TUN device's name.
    pub tun_name: String,
    /// This host's key.
    pub key: MeshKey,
}

/// Why the mesh does not run.
#[derive(Debug, Error)]
pub enum MeshError {
    /// No TUN device.
    #[error("cannot make the TUN device {name}: {hint}")]
    Tun {
        /// Its name.
        name: String,
        /// What to do about it.
        hint: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// No socket.
    #[error("cannot listen for WireGuard on UDP {listen}")]
    Listen {
        /// The address.
        listen: SocketAddr,
        /// Why it failed.
        source: io::Error,
    },
    /// The device could not be set up.
    #[error("the TUN device cannot be set up")]
    Link(#[from] LinkError),
    /// No thread, or nothing to wake it by.
    #[error("cannot start the mesh's thread")]
    Thread(#[source] io::Error),
    /// It ran, and does no more.
    #[error("the mesh has ended: {0}")]
    Ended(String),
}

/// What the mesh is doing.
#[derive(Debug, Clone)]
pub struct Status {
    /// Where WireGuard listens.
    pub listen: SocketAddr,
    /// The peers.
    pub peers: Vec<PeerStatus>,
    /// What was done and refused.
    pub counters: Counters,
    /// Datagrams that the kernel did not take.
    pub lost_datagrams: u64,
    /// Packets that the kernel did not take.
    pub lost_packets: u64,
}

/// A running mesh. Dropping it stops it too, without waiting.
pub struct Mesh {
    listen: SocketAddr,
    mailbox: Arc<Mailbox>,
    thread: Option<std::thread::JoinHandle<()>>,
    follower: JoinHandle<()>,
    ended: watch::Receiver<Option<String>>,
}

impl MeshConfig {
    /// The usual configuration of a host.
    pub fn new(host: HostId, key: MeshKey) -> Self {
        Self {
            host,
            listen: SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT)),
            tun_name: "tern0".into(),
            key,
        }
    }
}

impl Mesh {
    /// Makes the device with its addresses and the route, and starts to carry packets for the peers
    /// of the view, whoever they are at the time.
    pub async fn start(config: MeshConfig, view: View) -> Result<Self, MeshError> {
        let name = &config.tun_name;
        let tun = Tun::create(name).map_err(|source| MeshError::Tun {
            name: name.clone(),
            hint: hint(&source),
            source,
        })?;
        let listen = config.listen;
        let socket = |source| MeshError::Listen { listen, source };
        let udp = Udp::bind(listen).map_err(socket)?;
        let listen = udp.local_addr().map_err(socket)?;
        let link = Link::configure(name, config.host).await?;

        let mailbox = Arc::new(Mailbox::new().map_err(MeshError::Thread)?);
        let mut engine = Engine::new(&config.key, config.host, Instant::now());
        let snapshot = view.snapshot();
        engine.set_peers(Instant::now(), &peers_of(&snapshot, config.host));
        let worker = Worker::new(engine, tun, udp, Arc::clone(&mailbox));
        let (announce, ended) = watch::channel(None);
        let thread = std::thread::Builder::new()
            .name("tern-mesh".into())
            .spawn(move || {
                let how = match worker.run() {
                    Ok(()) => "it was stopped".to_owned(),
                    Err(error) => {
                        tracing::error!(%error, "the mesh carries no packets any more");
                        error.to_string()
                    }
                };
                announce.send_replace(Some(how));
            })
            .map_err(MeshError::Thread)?;
        let follower = Follower {
            host: config.host,
            view,
            link,
            mailbox: Arc::clone(&mailbox),
            shown: snapshot,
        };
        tracing::info!(%listen, tun = %name, key = %config.key.public_key(), "the mesh is up");
        Ok(Self {
            listen,
            mailbox,
            thread: Some(thread),
            follower: tokio::spawn(follower.run()),
            ended,
        })
    }

    /// What it is doing.
    pub async fn status(&self) -> Result<Status, MeshError> {
        let Ok(report) = self.mailbox.ask().await else {
            return Err(self.ended().await);
        };
        Ok(Status {
            listen: self.listen,
            peers: report.peers,
            counters: report.counters,
            lost_datagrams: report.lost_datagrams,
            lost_packets: report.lost_packets,
        })
    }

    /// Waits until it has ended, which it does by itself only when device or socket fail.
    pub async fn ended(&self) -> MeshError {
        let mut ended = self.ended.clone();
        let how = ended.wait_for(Option::is_some).await;
        let how = how.ok().and_then(|how| how.clone());
        MeshError::Ended(how.unwrap_or_else(|| "its thread panicked".into()))
    }

    /// Stops it. Afterwards the device is gone, with its addresses and routes.
    pub async fn shutdown(mut self) {
        self.follower.abort();
        self.mailbox.stop();
        if let Some(thread) = self.thread.take() {
            let joined = tokio::task::spawn_blocking(move || thread.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                tracing::error!("the mesh's thread panicked");
            }
        }
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.follower.abort();
        self.mailbox.stop();
    }
}

/// Carries what the catalog says to the thread and to the kernel.
struct Follower {
    host: HostId,
    view: View,
    link: Link,
    mailbox: Arc<Mailbox>,
    /// What the engine's peers were made of.
    shown: Arc<Snapshot>,
}

impl Follower {
    async fn run(mut self) {
        let mut changes = self.view.changes();
        loop {
            changes.mark_unchanged();
            let snapshot = self.view.snapshot();
            // Most changes are of Machines' states: unchanged maps are not read again.
            let same = snapshot.hosts.ptr_eq(&self.shown.hosts)
                && snapshot.peers.ptr_eq(&self.shown.peers);
            if !same {
                self.mailbox.set_peers(peers_of(&snapshot, self.host));
            }
            let networks = networks_of(&snapshot, self.host);
            self.shown = snapshot;
            let result = self.link.set_networks(&networks).await;
            let retry = async {
                match &result {
                    Ok(()) => std::future::pending().await,
                    Err(_) => tokio::time::sleep(RETRY).await,
                }
            };
            if let Err(error) = &result {
                let source = std::error::Error::source(error).map(ToString::to_string);
                tracing::warn!(%error, source, "a network's resolver has no address here");
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = retry => {}
            }
        }
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => "it takes root, or CAP_NET_ADMIN",
        Some(libc::ENOENT | libc::ENODEV) => "the kernel has no TUN: try `modprobe tun`",
        Some(libc::EBUSY) => "the name is taken; does another `tern serve` run here?",
        _ => "the kernel refuses it",
    }
}
