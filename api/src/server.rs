//! The listener, and what every call shares.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tern_catalog::{Catalog, Revision, View};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::gateway::HostGateway;
use crate::registry::{self, Grace, Registry};
use crate::routes;

/// How the API is run.
#[derive(Debug, Clone)]
pub struct ApiConfig {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Where the registry keeps images.
    pub registry_dir: PathBuf,
    /// The region of Machines that ask for none.
    pub region: String,
    /// Apps get the host name `<app>.<domain>`.
    pub domain: Option<String>,
    /// The token that hosts pull images with. Made anew at every start.
    pub internal_token: String,
}

/// A bound API.
pub struct ApiServer {
    listener: TcpListener,
    shared: Shared,
}

/// What every call shares.
#[derive(Clone)]
pub(crate) struct Shared {
    pub config: Arc<ApiConfig>,
    pub catalog: Catalog,
    pub view: View,
    pub gateway: Arc<dyn HostGateway>,
    pub registry: Arc<Registry>,
}

impl Shared {
    /// Waits until our own view shows this revision, so that a caller's next call sees what this one did.
    pub async fn seen(&self, revision: Revision) {
        self.view
            .wait_for(|snapshot| (snapshot.revision >= revision).then_some(()))
            .await;
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
        let registry = Arc::new(Registry::open(&config.registry_dir)?);
        let shared = Shared {
            config: Arc::new(config),
            catalog,
            view,
            gateway,
            registry,
        };
        Ok(Self { listener, shared })
    }

    /// The address it is bound to.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until told to end; calls under way are finished.
    pub async fn run(self, end: CancellationToken) -> std::io::Result<()> {
        let collector = collect_registry(self.shared.clone());
        let collector = tokio::spawn(end.clone().run_until_cancelled_owned(collector));
        let served = axum::serve(self.listener, routes::router(self.shared))
            .with_graceful_shutdown(end.cancelled_owned())
            .await;
        collector.abort();
        served
    }
}

/// Gives back the space of images that nobody refers to, from time to time, for ever.
async fn collect_registry(shared: Shared) {
    let mut times = tokio::time::interval(COLLECT_EVERY);
    times.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        times.tick().await;
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

/// How often the registry is collected; its graces are days.
const COLLECT_EVERY: Duration = Duration::from_secs(3600);
