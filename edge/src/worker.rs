//! One thread of the edge: its own runtime, listeners, connections and connections to apps. Threads share the
//! gate, which counts, and nothing else that a request waits for.

use std::cell::{RefCell, RefMut};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::Version;
use rustls::ServerConfig;
use rustls::server::Acceptor;
use tern_catalog::{PortKind, PublicPorts, View};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::LocalSet;
use tokio::time::timeout;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::access::AccessLog;
use crate::connections::{Connections, Open, Place, Places};
use crate::door::{Door, Opened, Opening, opening};
use crate::entrance::Entrance;
use crate::gate::Gate;
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::relay::{Pool, tells_of_h3};
use crate::site::{Sites, Target};
use crate::tcp::{self, Ends};
use crate::{h1, h2, h3, quic, tls, udp};

/// What all threads of an edge share.
#[derive(Clone)]
pub struct Shared {
    pub view: View,
    pub gate: Gate,
    pub metrics: Arc<Metrics>,
    pub region: Arc<str>,
    pub early_wake: bool,
    pub access: Option<AccessLog>,
    pub tls: Arc<tls::Configs>,
    /// What services claim of the public ports.
    pub ports: Arc<ArcSwap<PublicPorts>>,
    pub quic: Arc<ServerConfig>,
    /// Room for connections, of all threads.
    pub places: Arc<Places>,
    pub quic_places: Arc<Places>,
    pub udp_places: Arc<Places>,
    pub limits: Limits,
    /// Set when no more is accepted, and connections end with their current requests.
    pub ending: CancellationToken,
    /// Set when they are given up.
    pub ended: CancellationToken,
    /// What replies over TLS say of HTTP/3.
    pub alt_svc: Option<Arc<str>>,
}

/// One thread's state.
pub struct Worker {
    pub view: View,
    pub gate: Gate,
    pub metrics: Arc<Metrics>,
    pub region: Arc<str>,
    /// Whether a handshake wakes the Machine that its request will need.
    pub early_wake: bool,
    pub access: Option<AccessLog>,
    pub limits: Limits,
    pub ending: CancellationToken,
    pub ended: CancellationToken,
    alt_svc: Option<Arc<str>>,
    ports: Arc<ArcSwap<PublicPorts>>,
    places: Arc<Places>,
    /// Room for QUIC's connections, and for sessions of UDP: nothing of those waits.
    pub quic_places: Arc<Places>,
    pub udp_places: Arc<Places>,
    connections: Rc<Connections>,
    pool: RefCell<Pool>,
    sites: RefCell<Sites>,
}

/// Bytes that the kernel takes beyond what a client has room for. It would hold megabytes, and say that there is
/// room again only after a third of them: a client that reads slowly would seem to stand still meanwhile.
const UNSENT: u32 = 128 << 10;

/// Pause after a failed accept: what it lacks (descriptors) comes back when connections end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Between two looks at idle connections to apps.
const SWEEP: Duration = Duration::from_secs(5);
/// A client that is gone without a word (its network, its power) is noticed after a minute and a half.
const KEEPALIVE: socket2::TcpKeepalive = socket2::TcpKeepalive::new()
    .with_time(Duration::from_secs(60))
    .with_interval(Duration::from_secs(10))
    .with_retries(3);

/// The first byte of a TLS record that holds a handshake message (RFC 8446 section 5.1).
const TLS_HANDSHAKE: u8 = 22;

/// How a connection has begun that says for whom it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begun {
    Tls,
    PgTls,
    Http,
}

/// The first byte, which stays to be read; nothing if none comes in time.
async fn first_byte(stream: &TcpStream, longest: Duration) -> Option<u8> {
    let mut first = [0];
    match timeout(longest, stream.peek(&mut first)).await {
        Ok(Ok(1..)) => Some(first[0]),
        _ => None,
    }
}

/// Both ends of a connection, as an app is told them.
fn ends(stream: &TcpStream, client: SocketAddr, port: u16) -> io::Result<Ends> {
    let local = stream.local_addr()?;
    Ok(Ends {
        client,
        local: SocketAddr::new(local.ip(), port),
    })
}

/// Runs a thread's share until the edge ends. `doors` are those that are always open, and `more` brings those that
/// services name.
pub fn run(
    doors: Vec<Door>,
    more: mpsc::UnboundedReceiver<Opened>,
    shared: Shared,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    LocalSet::new().block_on(&runtime, serve(doors, more, shared))
}

async fn serve(
    doors: Vec<Door>,
    mut more: mpsc::UnboundedReceiver<Opened>,
    shared: Shared,
) -> io::Result<()> {
    let ending = shared.ending;
    let connections = Rc::new(Connections::new(&ending, Arc::clone(&shared.places)));
    let worker = Rc::new(Worker {
        view: shared.view,
        gate: shared.gate,
        region: shared.region,
        sites: RefCell::new(Sites::new(
            shared.limits.idle,
            shared.tls,
            Arc::clone(&shared.metrics),
        )),
        metrics: shared.metrics,
        early_wake: shared.early_wake,
        access: shared.access,
        limits: shared.limits,
        ending,
        ended: shared.ended,
        alt_svc: shared.alt_svc,
        ports: shared.ports,
        places: shared.places,
        quic_places: shared.quic_places,
        udp_places: shared.udp_places,
        connections,
        pool: RefCell::default(),
    });
    let running = TaskTracker::new();
    for mut door in doors {
        if let Some(quic::Socket { socket, share }) = door.quic.take() {
            let tls = Arc::clone(&shared.quic);
            let endpoint = h3::endpoint(socket, tls, &worker.limits, share)?;
            let entrance = Entrance {
                port: door.port,
                tls: true,
            };
            let accepting = h3::accept(endpoint, entrance, Rc::clone(&worker), running.clone());
            tokio::task::spawn_local(accepting);
        }
        open(door, &worker, &running)?;
    }
    let mut sweep = tokio::time::interval(SWEEP);
    loop {
        tokio::select! {
            _ = sweep.tick() => worker.pool().sweep(),
            Some(opened) = more.recv() => match opened {
                Opened::Tcp(door) => {
                    let port = door.port;
                    if let Err(error) = open(door, &worker, &running) {
                        tracing::error!(%error, port, "a port cannot be listened on");
                    }
                }
                Opened::Udp(door) => {
                    let serving = udp::serve(door, Rc::clone(&worker), running.clone());
                    tokio::task::spawn_local(serving);
                }
            },
            () = worker.ending.cancelled() => break,
        }
    }
    running.close();
    tokio::select! {
        () = running.wait() => {}
        () = worker.ended.cancelled() => tracing::warn!(
            connections = running.len(),
            "connections were still open at the end"
        ),
    }
    Ok(())
}

fn open(door: Door, worker: &Rc<Worker>, connections: &TaskTracker) -> io::Result<()> {
    let listener = TcpListener::from_std(door.listener)?;
    let accepting = accept(
        listener,
        door.port,
        door.closed,
        Rc::clone(worker),
        connections.clone(),
    );
    tokio::task::spawn_local(accepting);
    Ok(())
}

async fn accept(
    listener: TcpListener,
    port: u16,
    closed: CancellationToken,
    worker: Rc<Worker>,
    connections: TaskTracker,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = worker.ending.cancelled() => return,
            () = closed.cancelled() => return,
        };
        let (stream, client) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        worker.metrics.connections.add();
        // What comes after it waits in the kernel meanwhile.
        let placed = tokio::select! {
            placed = worker.place(client.ip()) => placed,
            () = worker.ending.cancelled() => return,
            () = closed.cancelled() => return,
        };
        let Some(place) = placed else {
            worker.metrics.connections_refused.add();
            continue;
        };
        let counted = worker.metrics.open_connections.count();
        let serving = Rc::clone(&worker).connection(stream, client, port);
        connections.spawn_local(async move {
            serving.await;
            drop((place, counted));
        });
    }
}

impl Worker {
    /// Room for one more connection; nothing if this client has as many as one may.
    async fn place(&self, client: IpAddr) -> Option<Place> {
        let full = || {
            let shed = self.connections.shed();
            self.metrics.connections_shed.add_all(shed as u64);
        };
        self.places.take(client, full).await
    }

    async fn connection(self: Rc<Self>, stream: TcpStream, client: SocketAddr, port: u16) {
        let socket = socket2::SockRef::from(&stream);
        if let Err(error) = stream
            .set_nodelay(true)
            .and(socket.set_tcp_keepalive(&KEEPALIVE))
            .and(socket.set_tcp_notsent_lowat(UNSENT))
        {
            tracing::debug!(%error, "a connection has ended before it began");
            return;
        }
        let (tls, pg_tls, http) = match opening(&self.ports.load(), port) {
            Opening::Raw(target) => return self.raw(stream, client, port, &target).await,
            Opening::Told { tls, pg_tls, http } => (tls, pg_tls, http),
        };
        // One that says nothing may be ended where others need its room, as one that asks for nothing.
        let open = self.connections.open();
        open.is_idle();
        let begun = match (tls, pg_tls, http) {
            (true, false, false) => Some(Begun::Tls),
            (false, false, true) => Some(Begun::Http),
            _ => {
                let first = tokio::select! {
                    first = first_byte(&stream, self.limits.head) => first,
                    () = open.ending().cancelled() => None,
                };
                first.and_then(|first| {
                    Some(match first {
                        TLS_HANDSHAKE if tls || pg_tls => Begun::Tls,
                        first if pg_tls && tcp::postgres::begins(first) => Begun::PgTls,
                        _ if http => Begun::Http,
                        // It fails, and says so in TLS's own words.
                        _ if tls => Begun::Tls,
                        _ => return None,
                    })
                })
            }
        };
        match begun {
            None => {}
            Some(Begun::Http) => {
                let entrance = Entrance { port, tls: false };
                h1::client::serve(stream, client.ip(), entrance, open, self).await;
            }
            Some(begun) => self.secure(stream, client, port, begun, open).await,
        }
    }

    /// A connection whose bytes are all its app's.
    async fn raw(&self, stream: TcpStream, client: SocketAddr, port: u16, target: &Target) {
        let ends = match ends(&stream, client, port) {
            Ok(ends) => ends,
            Err(_) => return,
        };
        tcp::serve(stream, ends, target, self).await;
    }

    /// A connection that begins with a TLS handshake.
    async fn secure(
        self: Rc<Self>,
        stream: TcpStream,
        client: SocketAddr,
        port: u16,
        begun: Begun,
        open: Open,
    ) {
        let handshake = timeout(
            self.limits.handshake,
            self.handshake(stream, client.ip(), port, begun),
        );
        let outcome = tokio::select! {
            outcome = handshake => outcome,
            () = open.ending().cancelled() => return,
        };
        let (stream, target) = match outcome {
            Ok(Ok(both)) => both,
            Ok(Err(error)) => {
                self.metrics.tls_failures.add();
                tracing::debug!(%error, %client, "TLS handshake failed");
                return;
            }
            Err(_) => return self.metrics.tls_failures.add(),
        };
        let protocol = stream.get_ref().1.alpn_protocol();
        // The certificate was the answer to an ACME challenge.
        if protocol == Some(tls::ACME) {
            return;
        }
        if let Some(target) = target {
            // Nothing tells whether it is idle.
            drop(open);
            if let Ok(ends) = ends(stream.get_ref().0, client, port) {
                tcp::serve(stream, ends, &target, &self).await;
            }
            return;
        }
        let entrance = Entrance { port, tls: true };
        if protocol == Some(tls::H2) {
            h2::serve(stream, client.ip(), entrance, open, self).await;
        } else {
            h1::client::serve(stream, client.ip(), entrance, open, self).await;
        }
    }

    /// Ends TLS as the service asks for whose name the client says, and tells where the bytes go, if not to HTTP.
    async fn handshake(
        &self,
        mut stream: TcpStream,
        client: IpAddr,
        port: u16,
        begun: Begun,
    ) -> io::Result<(TlsStream<TcpStream>, Option<Rc<Target>>)> {
        if begun == Begun::PgTls {
            tcp::postgres::begin(&mut stream).await?;
        }
        let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
        let hello = start.client_hello();
        let challenge = hello
            .alpn()
            .is_some_and(|mut all| all.any(|p| p == tls::ACME));
        let name = hello.server_name().filter(|_| !challenge);
        let snapshot = self.view.snapshot();
        let secure = self.sites().secure(&snapshot, name, port);
        drop(snapshot);
        let target = match secure.stream {
            // Newer clients begin TLS at once, with PostgreSQL too.
            Some((target, kind)) if begun == Begun::Tls || kind == PortKind::PgTls => Some(target),
            None if begun == Begun::Tls => None,
            _ => {
                return Err(io::Error::other(
                    "no app of this name speaks PostgreSQL here",
                ));
            }
        };
        if let Some(likely) = secure.likely.filter(|_| self.early_wake) {
            self.gate.early(&likely.0, likely.1, client);
        }
        Ok((start.into_stream(secure.config).await?, target))
    }

    /// Where the datagrams of a UDP port go.
    pub fn datagrams(&self, port: u16) -> Option<Target> {
        self.ports.load().datagrams(port).map(Target::from)
    }

    /// A new request's name: 104 random bits, as hexadecimal digits.
    pub fn request_id(&self) -> String {
        hex::encode(rand::random::<[u8; 13]>())
    }

    /// What a reply says of HTTP/3.
    pub fn alt_svc(&self, entrance: Entrance, version: Version) -> Option<&str> {
        let told = self.alt_svc.as_deref();
        told.filter(|_| tells_of_h3(entrance, version))
    }

    /// This thread's connections to apps. Not to be held over an `await`.
    pub fn pool(&self) -> RefMut<'_, Pool> {
        self.pool.borrow_mut()
    }

    /// The same, for those that borrow it themselves.
    pub fn shared_pool(&self) -> &RefCell<Pool> {
        &self.pool
    }

    /// The sites that this thread knows. Not to be held over an `await`.
    pub fn sites(&self) -> RefMut<'_, Sites> {
        self.sites.borrow_mut()
    }
}
