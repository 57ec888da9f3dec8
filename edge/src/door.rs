//! The public ports: which are open, and how a connection to one begins.
//!
//! 80 and 443 are open as long as the edge runs, at the addresses it was given. What services name beside them is
//! opened and closed as the catalog changes, by one task ([`Porter`]), which gives every thread its listener.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tern_catalog::{PortClaim, PortRanges, PublicPorts, Snapshot, View};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::entrance;
use crate::site::Target;
use crate::udp::UdpDoor;
use crate::{quic, socket};

/// A listening socket of one thread.
pub struct Door {
    /// The port, as apps name it.
    pub port: u16,
    pub listener: std::net::TcpListener,
    /// Where HTTP/3 is served beside it.
    pub quic: Option<quic::Socket>,
    /// Set when it is to be closed; its connections go on.
    pub closed: CancellationToken,
}

/// What a thread is given to serve.
pub enum Opened {
    Tcp(Door),
    Udp(UdpDoor),
}

/// How a connection begins.
pub enum Opening {
    /// With whatever its app speaks.
    Raw(Rc<Target>),
    /// With one of these; where there are several, its first byte tells.
    Told { tls: bool, pg_tls: bool, http: bool },
}

/// Between two tries to open what could not be opened.
const RETRY: Duration = Duration::from_secs(5);

/// How a connection to this port begins.
pub fn opening(ports: &PublicPorts, port: u16) -> Opening {
    let (mut tls, mut pg_tls, mut http) = (port == entrance::HTTPS, false, port == entrance::HTTP);
    match ports.claim(port) {
        Some(PortClaim::Exclusive(owner)) => return Opening::Raw(Rc::new(owner.into())),
        Some(PortClaim::Shared {
            tls: also_tls,
            pg_tls: also_pg,
            http: also_http,
        }) => {
            tls |= also_tls;
            pg_tls |= also_pg;
            http |= also_http;
        }
        None => {}
    }
    Opening::Told { tls, pg_tls, http }
}

/// What is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Place {
    ip: IpAddr,
    port: u16,
    udp: bool,
}

/// Ports opened at most: each is a socket per thread and address.
const MAX_PORTS: usize = 4096;

/// Opens and closes the ports that services name.
pub struct Porter {
    /// The addresses at which they are opened.
    pub addresses: Vec<IpAddr>,
    pub allowed: PortRanges,
    /// One for each thread.
    pub threads: Vec<mpsc::UnboundedSender<Opened>>,
    /// What is claimed, for the threads to read.
    pub ports: Arc<ArcSwap<PublicPorts>>,
    open: HashMap<Place, CancellationToken>,
    /// Those that could not be opened were told of.
    failed: HashMap<Place, io::ErrorKind>,
}

impl Porter {
    pub fn new(
        addresses: Vec<IpAddr>,
        allowed: PortRanges,
        threads: Vec<mpsc::UnboundedSender<Opened>>,
        ports: Arc<ArcSwap<PublicPorts>>,
    ) -> Self {
        Self {
            addresses,
            allowed,
            threads,
            ports,
            open: HashMap::new(),
            failed: HashMap::new(),
        }
    }

    /// Follows the catalog until told to end.
    pub async fn run(mut self, view: View, end: CancellationToken) {
        let mut changes = view.changes();
        let mut seen = None;
        loop {
            changes.mark_unchanged();
            let snapshot = view.snapshot();
            // Machines' states change often, and their ports seldom.
            let same = seen
                .as_ref()
                .is_some_and(|seen: &Arc<Snapshot>| seen.machines.ptr_eq(&snapshot.machines));
            if !same || !self.failed.is_empty() {
                self.settle(&snapshot);
            }
            seen = Some(snapshot);
            let retry = tokio::time::sleep(RETRY);
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = retry, if !self.failed.is_empty() => {}
                () = end.cancelled() => return,
            }
        }
    }

    /// Has just those ports open that are claimed.
    pub fn settle(&mut self, snapshot: &Snapshot) {
        let ports = PublicPorts::of(snapshot.machines.values().map(|machine| &**machine));
        let tcp = ports.tcp().map(|(number, _)| (number, false));
        let udp = ports.udp().map(|(number, _)| (number, true));
        let mut all: Vec<(u16, bool)> = tcp.chain(udp).collect();
        if all.len() > MAX_PORTS {
            // The API lets no app come near; many together may.
            tracing::error!(
                wanted = all.len(),
                "services name more ports than are opened: {MAX_PORTS}, the lowest first"
            );
            all.sort_unstable();
            all.truncate(MAX_PORTS);
        }
        // Known before the first connection comes.
        self.ports.store(Arc::new(ports));
        let always = [entrance::HTTP, entrance::HTTPS];
        let may = |(port, _): &&(u16, bool)| !always.contains(port) && self.allowed.contains(*port);
        let wanted: HashSet<Place> = all
            .iter()
            .filter(may)
            .flat_map(|&(port, udp)| {
                let addresses = self.addresses.iter();
                addresses.map(move |&ip| Place { ip, port, udp })
            })
            .collect();
        self.failed.retain(|at, _| wanted.contains(at));
        self.open.retain(|at, closed| {
            let kept = wanted.contains(at);
            if !kept {
                tracing::info!(address = %at.ip, port = at.port, udp = at.udp, "a service's port is closed");
                closed.cancel();
            }
            kept
        });
        for at in wanted {
            if self.open.contains_key(&at) {
                continue;
            }
            match self.open(at) {
                Ok(closed) => {
                    tracing::info!(address = %at.ip, port = at.port, udp = at.udp, "a service's port is open");
                    self.failed.remove(&at);
                    self.open.insert(at, closed);
                }
                Err(error) if self.failed.insert(at, error.kind()) != Some(error.kind()) => {
                    tracing::error!(%error, "a service's port cannot be opened; it is tried again");
                }
                Err(_) => {}
            }
        }
    }

    fn open(&self, Place { ip, port, udp }: Place) -> io::Result<CancellationToken> {
        let closed = CancellationToken::new();
        let (address, count) = (SocketAddr::new(ip, port), self.threads.len());
        let opened: Vec<Opened> = if udp {
            let sockets = socket::shared(address, count, socket2::Type::DGRAM)
                .map_err(|e| io::Error::new(e.kind(), format!("{address} (UDP): {e}")))?;
            let door = |socket: socket2::Socket| {
                Opened::Udp(UdpDoor {
                    port,
                    socket: socket.into(),
                    closed: closed.clone(),
                })
            };
            sockets.into_iter().map(door).collect()
        } else {
            let door = |listener| {
                Opened::Tcp(Door {
                    port,
                    listener,
                    quic: None,
                    closed: closed.clone(),
                })
            };
            let listeners = socket::listeners(address, count)?;
            listeners.into_iter().map(door).collect()
        };
        for (thread, opened) in self.threads.iter().zip(opened) {
            // A thread that has ended serves nothing any more.
            let _ = thread.send(opened);
        }
        Ok(closed)
    }
}
