//! The listener, and what every call shares.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tern_catalog::{Catalog, HostId, PortRanges, Revision, Snapshot, View, keep_running};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::deletion;
use crate::forward::{self, Forwarder};
use crate::gateway::HostGateway;
use crate::invites::Inviter;
use crate::machines::lease::sweep_leases;
use crate::registry::{self, Grace, Registry};
use crate::routes;
use crate::secrets::SecretSealer;

/// How the API is run.
#[derive(Debug, Clone)]
pub struct ApiConfig {
    /// Where it listens.
    pub listen: SocketAddr,
    /// The host it is the API of. It listens at that host's address on the mesh too, for other hosts to send calls on.
    pub host: HostId,
    /// Whether there are other hosts, or may be.
    pub shared: bool,
    /// Where the registry keeps images.
    pub registry_dir: PathBuf,
    /// The region of Machines that ask for none.
    pub region: String,
    /// Apps get the host name `<app>.<domain>`.
    pub domain: Option<String>,
    /// The public ports that services may have, beside 80 and 443.
    pub service_ports: PortRanges,
    /// The token that hosts pull images with. Made anew at every start.
    pub internal_token: String,
    /// Encrypts apps' secrets.
    pub sealer: Arc<dyn SecretSealer>,
    /// Lets new hosts in.
    pub inviter: Arc<dyn Inviter>,
}

/// A bound API.
pub struct ApiServer {
    listener: TcpListener,
    /// For other hosts.
    mesh: Option<TcpListener>,
    shared: Shared,
    header_time: Duration,
}

/// What every call shares.
#[derive(Clone)]
pub(crate) struct Shared {
    pub config: Arc<ApiConfig>,
    pub catalog: Catalog,
    pub view: View,
    pub gateway: Arc<dyn HostGateway>,
    pub registry: Arc<Registry>,
    pub forwarder: Forwarder,
}

impl Shared {
    /// Waits until our own view shows this revision, so that a caller's next call sees what this one did. Not for
    /// ever: it is done, also where the view cannot be kept current.
    pub async fn seen(&self, revision: Revision) {
        let shown = |snapshot: &Snapshot| (snapshot.revision >= revision).then_some(());
        let seen = tokio::time::timeout(SEEN, self.view.wait_for(shown)).await;
        if seen.is_err() {
            tracing::warn!(
                revision,
                "a change is done and the view does not show it yet"
            );
        }
    }
}

impl ApiServer {
    /// Binds the address and opens the registry.
    pub async fn bind(
        config: ApiConfig,
        catalog: Catalog,
        view: View,
        gateway: Arc<dyn HostGateway>,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind(config.listen).await?;
        let mesh = match config.shared {
            true => listen_on_mesh(config.host).await?,
            false => None,
        };
        let registry = Arc::new(Registry::open(&config.registry_dir)?);
        let shared = Shared {
            config: Arc::new(config),
            catalog,
            view,
            gateway,
            registry,
            forwarder: Forwarder::new(forward::on_the_mesh),
        };
        Ok(Self {
            listener,
            mesh,
            shared,
            header_time: HEADER_TIME,
        })
    }

    /// The address it is bound to.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until told to end; calls under way get a while to finish.
    ///
    /// Tenants reach this too: a client that says nothing, or says it slowly, is hung up on, and no number
    /// of them takes more than its share of this process.
    pub async fn run(self, end: CancellationToken) {
        // Ends with `end`.
        tokio::spawn(
            end.clone()
                .run_until_cancelled_owned(keep_running("the API's cleaning", {
                    let shared = self.shared.clone();
                    move || clean_up(shared.clone())
                })),
        );
        tokio::spawn(
            end.clone()
                .run_until_cancelled_owned(keep_running("the removal of apps", {
                    let shared = self.shared.clone();
                    move || deletion::finish_all(shared.clone())
                })),
        );
        let service = TowerToHyperService::new(routes::router(self.shared));
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new())
            .header_read_timeout(self.header_time);
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let connections = TaskTracker::new();
        loop {
            let next = async {
                let place = Arc::clone(&places).acquire_owned().await;
                let accepted = match &self.mesh {
                    Some(mesh) => tokio::select! {
                        accepted = self.listener.accept() => accepted,
                        accepted = mesh.accept() => accepted,
                    },
                    None => self.listener.accept().await,
                };
                (place, accepted)
            };
            let Some((place, accepted)) = end.run_until_cancelled(next).await else {
                break;
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // One that hung up before it was accepted, or too many open files: that passes.
                    tracing::warn!(%error, "a connection cannot be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let connection = http.serve_connection(TokioIo::new(stream), service.clone());
            let end = end.clone();
            connections.spawn(async move {
                let _place = place;
                tokio::pin!(connection);
                let outcome = tokio::select! {
                    outcome = connection.as_mut() => outcome,
                    () = end.cancelled() => {
                        connection.as_mut().graceful_shutdown();
                        connection.await
                    }
                };
                if let Err(error) = outcome {
                    tracing::debug!(%error, "a connection ended early");
                }
            });
        }
        connections.close();
        // Who follows logs never ends by itself.
        let _ = tokio::time::timeout(GRACE, connections.wait()).await;
    }
}

/// The API for other hosts. Where the main one takes all addresses it takes this one's calls too.
async fn listen_on_mesh(host: HostId) -> std::io::Result<Option<TcpListener>> {
    match TcpListener::bind(forward::on_the_mesh(host)).await {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Ok(None),
        Err(error) => Err(error),
    }
}

/// Gives back the space of images that nobody refers to, and removes what the dead have left in the catalog, from time
/// to time, for ever.
async fn clean_up(shared: Shared) {
    let mut times = tokio::time::interval(COLLECT_EVERY);
    times.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        times.tick().await;
        if let Err(error) = sweep_leases(&shared).await {
            tracing::warn!(?error, "leases of Machines that are gone cannot be removed");
        }
        let shared = shared.clone();
        let collected = tokio::task::spawn_blocking(move || {
            let in_use = registry::in_use(&shared.view.snapshot());
            shared.registry.collect(&in_use, &Grace::default())
        });
        match collected.await {
            Ok(Ok(done)) if done.manifests + done.blobs > 0 => tracing::info!(
                manifests = done.manifests,
                blobs = done.blobs,
                freed = done.freed,
                "what nobody refers to was removed from the registry"
            ),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the registry cannot be collected"),
            Err(error) => tracing::error!(%error, "collecting the registry has failed"),
        }
    }
}

/// How often that is done; the registry's graces are days.
const COLLECT_EVERY: Duration = Duration::from_secs(3600);

/// Longest that an answer waits for the view to show what was done: as long as one that is followed may take.
const SEEN: Duration = Duration::from_secs(5);
/// Longest time from a connection, or the last answer, to the end of the next call's headers.
const HEADER_TIME: Duration = Duration::from_secs(30);
/// Connections at once; more wait.
const MAX_CONNECTIONS: usize = 1024;
/// How long calls may take to finish when the server ends.
const GRACE: Duration = Duration::from_secs(5);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::*;
    use crate::testing::World;

    async fn server() -> (
        World,
        SocketAddr,
        CancellationToken,
        tokio::task::JoinHandle<()>,
    ) {
        let world = World::new().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = ApiServer {
            listener,
            mesh: None,
            shared: world.shared.clone(),
            header_time: Duration::from_millis(100),
        };
        let end = CancellationToken::new();
        let task = tokio::spawn(server.run(end.clone()));
        (world, address, end, task)
    }

    #[tokio::test]
    async fn calls_are_answered_and_a_kept_connection_does_not_hold_up_the_end() {
        let (_world, address, end, task) = server().await;
        let mut client = TcpStream::connect(address).await.unwrap();
        client
            .write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        let mut answer = [0; 12];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
        end.cancel();
        tokio::time::timeout(GRACE / 2, task)
            .await
            .unwrap()
            .unwrap();
    }

    #[tokio::test]
    async fn what_is_done_is_answered_also_where_the_view_stands_still() {
        let world = World::new().await;
        let mut shared = world.shared.clone();
        // Follows a store that nobody writes to.
        let other = World::new().await;
        shared.view = other.shared.view.clone();
        let revision = shared.view.snapshot().revision + 1000;
        tokio::time::timeout(SEEN * 12, shared.seen(revision))
            .await
            .expect("it does not wait for ever");
        // And what is shown is not waited for.
        shared.seen(shared.view.snapshot().revision).await;
    }

    #[tokio::test]
    async fn whoever_says_nothing_is_hung_up_on() {
        let (_world, address, _end, _task) = server().await;
        let mut silent = TcpStream::connect(address).await.unwrap();
        silent.write_all(b"GET /healthz HT").await.unwrap();
        let mut rest = Vec::new();
        let ended = silent.read_to_end(&mut rest);
        tokio::time::timeout(HEADER_TIME, ended)
            .await
            .unwrap()
            .unwrap();
    }
}
