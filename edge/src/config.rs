//! Starting and ending an edge.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::server::ResolvesServerCert;
use tern_catalog::{HostId, PortRanges, View};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::access::{AccessLog, AccessLogConfig};
use crate::connections::Places;
use crate::control::MachineControl;
use crate::door::{Door, Porter};
use crate::entrance;
use crate::gate::Gate;
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::quic::Share;
use crate::worker::{self, Shared};
use crate::{quic, sleep, socket, tls};

/// How an edge is run.
#[derive(Debug, Clone)]
pub struct EdgeConfig {
    /// Where HTTP is served: port 80 to apps, wherever it is bound.
    pub http: Vec<SocketAddr>,
    /// Where HTTPS is served: port 443 to apps.
    pub https: Vec<SocketAddr>,
    /// Where the other ports are served that services name.
    pub service_addresses: Vec<IpAddr>,
    /// Which of them may be.
    pub service_ports: PortRanges,
    /// Our region, told to apps.
    pub region: String,
    /// The host whose Machines the gate looks after.
    pub host: HostId,
    /// Time without requests after which a Machine is put to sleep.
    pub autostop_after: Duration,
    /// Longest a request waits for room or a start.
    pub wake_timeout: Duration,
    /// Whether HTTPS's addresses serve HTTP/3 too, by UDP, and replies say so.
    pub http3: bool,
    /// Whether a client's TLS handshake wakes a suspended Machine of the app that it names, before its request comes.
    pub early_wake: bool,
    /// Threads that serve; each takes its share of the connections.
    pub threads: usize,
    /// How long clients may take.
    pub limits: Limits,
    /// Where requests are written down, if they are.
    pub access_log: Option<AccessLogConfig>,
}

/// A running edge.
pub struct Edge {
    metrics: Arc<Metrics>,
    ending: CancellationToken,
    ended: CancellationToken,
    threads: Vec<JoinHandle<()>>,
    addresses: Vec<SocketAddr>,
    /// Open until all threads have ended: a socket that leaves its group early would move another to its place, where
    /// connection ids do not lead.
    #[expect(dead_code, reason = "held open")]
    quic_group: Vec<UdpSocket>,
}

/// A connection id's first byte tells its thread.
const MAX_THREADS: usize = 128;
/// How long a client may remember that HTTP/3 is to be had: a day, as is usual.
const ALT_SVC_SECONDS: u32 = 86_400;
/// Tries to find a port that is free for both TCP and UDP, where any will do.
const PORT_TRIES: u32 = 16;

impl EdgeConfig {
    /// One thread for each processor.
    pub fn threads_of_this_host() -> usize {
        thread::available_parallelism().map_or(1, usize::from)
    }
}

impl Edge {
    /// Binds every address and begins to serve. Certificates come from `resolver`. Starts of Machines run on the
    /// caller's runtime.
    pub async fn start(
        config: EdgeConfig,
        view: View,
        resolver: Arc<dyn ResolvesServerCert>,
        control: Arc<dyn MachineControl>,
    ) -> io::Result<Self> {
        let metrics = Arc::new(Metrics::default());
        let gate = Gate::new(
            config.host,
            view.clone(),
            control,
            Arc::clone(&metrics),
            config.wake_timeout,
        );
        let access = config
            .access_log
            .map(|log| AccessLog::open(log, Arc::clone(&metrics)))
            .transpose()?;
        let mut shared = Shared {
            view,
            gate: gate.clone(),
            metrics: Arc::clone(&metrics),
            region: config.region.as_str().into(),
            early_wake: config.early_wake,
            access,
            tls: Arc::new(tls::Configs::new(Arc::clone(&resolver)).map_err(io::Error::other)?),
            ports: Arc::new(ArcSwap::default()),
            quic: Arc::new(tls::quic(resolver).map_err(io::Error::other)?),
            places: Arc::new(Places::new(
                config.limits.connections,
                config.limits.connections_of_client,
            )),
            quic_places: Arc::new(Places::new(
                config.limits.connections,
                config.limits.connections_of_client,
            )),
            // Each has a socket of its own. Addresses of clients may be forged: what they take is not TCP's.
            udp_places: Arc::new(Places::new(
                config.limits.connections / 4,
                config.limits.connections_of_client / 4,
            )),
            limits: config.limits,
            ending: CancellationToken::new(),
            ended: CancellationToken::new(),
            alt_svc: None,
        };
        let mut edge = Self {
            metrics,
            ending: shared.ending.clone(),
            ended: shared.ended.clone(),
            threads: Vec::new(),
            addresses: Vec::new(),
            quic_group: Vec::new(),
        };
        let threads = config.threads.clamp(1, MAX_THREADS);
        let mut doors: Vec<Vec<Door>> = (0..threads).map(|_| Vec::new()).collect();
        for (port, addresses) in [
            (entrance::HTTP, &config.http),
            (entrance::HTTPS, &config.https),
        ] {
            for address in addresses {
                let http3 = config.http3 && port == entrance::HTTPS;
                let (listeners, quic) = bind(*address, threads, http3)?;
                let bound = listeners[0].local_addr()?;
                edge.addresses.push(bound);
                if http3 {
                    let told = format!("h3=\":{}\"; ma={ALT_SVC_SECONDS}", bound.port());
                    shared.alt_svc = Some(told.into());
                }
                let quic = quic
                    .into_iter()
                    .map(Some)
                    .chain(std::iter::repeat_with(|| None));
                for ((doors, listener), quic) in doors.iter_mut().zip(listeners).zip(quic) {
                    doors.push(Door {
                        port,
                        listener,
                        quic,
                        closed: CancellationToken::new(),
                    });
                }
            }
        }
        let mut opened = Vec::new();
        for (n, doors) in doors.into_iter().enumerate() {
            let shared = shared.clone();
            let (open, more) = mpsc::unbounded_channel();
            opened.push(open);
            let run = move || {
                if let Err(error) = worker::run(doors, more, shared) {
                    tracing::error!(%error, "a thread of the edge ended");
                }
            };
            let thread = thread::Builder::new()
                .name(format!("edge-{n}"))
                .spawn(run)?;
            edge.threads.push(thread);
        }
        let mut porter = Porter::new(
            config.service_addresses,
            config.service_ports,
            opened,
            Arc::clone(&shared.ports),
        );
        // What is known by now is open when this returns.
        porter.settle(&shared.view.snapshot());
        tokio::spawn(porter.run(shared.view.clone(), shared.ending.clone()));
        tokio::spawn(sleep::run(
            gate,
            config.host,
            config.autostop_after,
            shared.ending,
            shared.ended,
        ));
        Ok(edge)
    }

    /// The addresses it is bound to: HTTP's first, each in the order given.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// What it counts.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Accepts no more, lets requests under way end, and gives up on them after `limit`.
    pub async fn drain(mut self, limit: Duration) {
        self.ending.cancel();
        let threads = std::mem::take(&mut self.threads);
        let joined = tokio::task::spawn_blocking(|| {
            for thread in threads {
                if thread.join().is_err() {
                    tracing::error!("a thread of the edge panicked");
                }
            }
        });
        tokio::pin!(joined);
        if tokio::time::timeout(limit, joined.as_mut()).await.is_err() {
            self.ended.cancel();
            let _ = joined.await;
        }
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.ending.cancel();
        self.ended.cancel();
    }
}

/// The sockets of one address, one of each kind for each thread.
fn bind(
    address: SocketAddr,
    threads: usize,
    http3: bool,
) -> io::Result<(Vec<TcpListener>, Vec<quic::Socket>)> {
    let mut tries = if address.port() == 0 { PORT_TRIES } else { 1 };
    loop {
        tries -= 1;
        let listeners = socket::listeners(address, threads)?;
        if !http3 {
            return Ok((listeners, Vec::new()));
        }
        let count = threads as u8; // of at most MAX_THREADS
        match quic::sockets(listeners[0].local_addr()?, count) {
            Ok(sockets) => {
                let shares = (0..count).map(|thread| Share {
                    thread,
                    threads: count,
                });
                let sockets = sockets.into_iter().zip(shares);
                let all = sockets.map(|(socket, share)| quic::Socket { socket, share });
                return Ok((listeners, all.collect()));
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && tries > 0 => {}
            Err(error) => return Err(error),
        }
    }
}
