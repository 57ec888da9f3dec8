//! One thread of the edge: its own runtime, listeners, connections and connections to apps. Threads share the
//! gate, which counts, and nothing else that a request waits for.

use std::cell::{RefCell, RefMut};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::Version;
use rustls::ServerConfig;
use tern_catalog::View;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::LocalSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::entrance::Entrance;
use crate::gate::Gate;
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::relay::{Pool, tells_of_h3};
use crate::site::Sites;
use crate::{h1, h2, h3, quic, tls};

/// What all threads of an edge share.
#[derive(Clone)]
pub struct Shared {
    pub view: View,
    pub gate: Gate,
    pub metrics: Arc<Metrics>,
    pub region: Arc<str>,
    pub tls: Arc<ServerConfig>,
    pub quic: Arc<ServerConfig>,
    pub limits: Limits,
    /// Set when no more is accepted, and connections end with their current requests.
    pub ending: CancellationToken,
    /// Set when they are given up.
    pub ended: CancellationToken,
    /// What replies over TLS say of HTTP/3.
    pub alt_svc: Option<Arc<str>>,
}

/// A listening socket of one thread.
pub struct Door {
    pub entrance: Entrance,
    pub listener: std::net::TcpListener,
    /// Connections that this address may still have, over all threads.
    pub places: Arc<Semaphore>,
    /// Where HTTP/3 is served beside it.
    pub quic: Option<quic::Socket>,
}

/// One thread's state.
pub struct Worker {
    pub view: View,
    pub gate: Gate,
    pub metrics: Arc<Metrics>,
    pub region: Arc<str>,
    pub limits: Limits,
    pub ending: CancellationToken,
    alt_svc: Option<Arc<str>>,
    acceptor: TlsAcceptor,
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

/// Runs a thread's share until the edge ends.
pub fn run(doors: Vec<Door>, shared: Shared) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    LocalSet::new().block_on(&runtime, serve(doors, shared))
}

async fn serve(doors: Vec<Door>, shared: Shared) -> io::Result<()> {
    let worker = Rc::new(Worker {
        view: shared.view,
        gate: shared.gate,
        metrics: shared.metrics,
        region: shared.region,
        sites: RefCell::new(Sites::new(shared.limits.idle)),
        limits: shared.limits,
        ending: shared.ending,
        alt_svc: shared.alt_svc,
        acceptor: TlsAcceptor::from(shared.tls),
        pool: RefCell::default(),
    });
    let connections = TaskTracker::new();
    for door in doors {
        if let Some(quic::Socket { socket, share }) = door.quic {
            let tls = Arc::clone(&shared.quic);
            let endpoint = h3::endpoint(socket, tls, &worker.limits, share)?;
            let accepting = h3::accept(
                endpoint,
                door.entrance,
                Rc::clone(&worker),
                connections.clone(),
            );
            tokio::task::spawn_local(accepting);
        }
        let listener = TcpListener::from_std(door.listener)?;
        let accepting = accept(
            listener,
            door.entrance,
            door.places,
            Rc::clone(&worker),
            connections.clone(),
        );
        tokio::task::spawn_local(accepting);
    }
    let mut sweep = tokio::time::interval(SWEEP);
    loop {
        tokio::select! {
            _ = sweep.tick() => worker.pool().sweep(),
            () = worker.ending.cancelled() => break,
        }
    }
    connections.close();
    tokio::select! {
        () = connections.wait() => {}
        () = shared.ended.cancelled() => tracing::warn!(
            connections = connections.len(),
            "connections were still open at the end"
        ),
    }
    Ok(())
}

async fn accept(
    listener: TcpListener,
    entrance: Entrance,
    places: Arc<Semaphore>,
    worker: Rc<Worker>,
    connections: TaskTracker,
) {
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = worker.ending.cancelled() => return,
        };
        match accepted {
            Ok((stream, client)) => {
                worker.metrics.connections.add();
                let serving = Rc::clone(&worker).connection(stream, client, entrance);
                connections.spawn_local(async move {
                    serving.await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

impl Worker {
    async fn connection(self: Rc<Self>, stream: TcpStream, client: SocketAddr, entrance: Entrance) {
        let socket = socket2::SockRef::from(&stream);
        if let Err(error) = stream
            .set_nodelay(true)
            .and(socket.set_tcp_keepalive(&KEEPALIVE))
            .and(socket.set_tcp_notsent_lowat(UNSENT))
        {
            tracing::debug!(%error, "a connection has ended before it began");
            return;
        }
        if !entrance.is_tls() {
            return h1::client::serve(stream, client.ip(), entrance, self).await;
        }
        let stream = match timeout(self.limits.handshake, self.acceptor.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                self.metrics.tls_failures.add();
                tracing::debug!(%error, %client, "TLS handshake failed");
                return;
            }
            Err(_) => return self.metrics.tls_failures.add(),
        };
        match stream.get_ref().1.alpn_protocol() {
            // The certificate was the answer to an ACME challenge.
            Some(tls::ACME) => {}
            Some(tls::H2) => h2::serve(stream, client.ip(), entrance, self).await,
            _ => h1::client::serve(stream, client.ip(), entrance, self).await,
        }
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
