//! Starting and ending an edge.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pingora_core::apps::{HttpServerApp as _, HttpServerOptions};
use pingora_core::protocols::http::v2::server::H2Options;
use pingora_core::server::configuration::ServerConf;
use pingora_proxy::{HttpProxy, http_proxy};
use rustls::server::ResolvesServerCert;
use tern_catalog::{HostId, View};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::control::MachineControl;
use crate::gate::Gate;
use crate::headers::MAX_HEAD_BYTES;
use crate::ingress::Ingress;
use crate::listen::{self, Entry};
use crate::metrics::Metrics;
use crate::route::Entrance;
use crate::sleep;

/// How an edge is run.
#[derive(Debug, Clone)]
pub struct EdgeConfig {
    /// Where HTTP is served: port 80 to apps, wherever it is bound.
    pub http: Vec<SocketAddr>,
    /// Where HTTPS is served: port 443 to apps.
    pub https: Vec<SocketAddr>,
    /// Our region, told to apps.
    pub region: String,
    /// The host whose Machines the gate looks after.
    pub host: HostId,
    /// Time without requests after which a Machine is put to sleep.
    pub autostop_after: Duration,
    /// Longest a request waits for room or a start.
    pub wake_timeout: Duration,
}

/// A running edge.
pub struct Edge {
    metrics: Arc<Metrics>,
    end: watch::Sender<bool>,
    sleeper: CancellationToken,
    proxies: Vec<Arc<HttpProxy<Ingress>>>,
    connections: TaskTracker,
    addresses: Vec<SocketAddr>,
}

/// Streams of one HTTP/2 connection at once.
const MAX_STREAMS: u32 = 256;
/// An HTTP/2 connection without a stream is closed after this time.
const H2_IDLE: Duration = Duration::from_secs(75);
/// Tries of one request; the ingress decides which failures are tried again.
const MAX_TRIES: usize = 5;

impl Edge {
    /// Binds every address and begins to serve. Certificates come from `resolver`.
    pub async fn start(
        config: EdgeConfig,
        view: View,
        resolver: Arc<dyn ResolvesServerCert>,
        control: Arc<dyn MachineControl>,
    ) -> std::io::Result<Self> {
        let metrics = Arc::new(Metrics::default());
        let gate = Gate::new(
            view.clone(),
            control,
            Arc::clone(&metrics),
            config.wake_timeout,
        );
        let (end, ending) = watch::channel(false);
        let connections = TaskTracker::new();
        let acceptor = Arc::new(listen::tls(resolver).map_err(std::io::Error::other)?);
        let conf = Arc::new(ServerConf {
            max_retries: MAX_TRIES,
            ..ServerConf::default()
        });

        let mut bound = Vec::new();
        for (entrance, addresses) in [
            (Entrance::Http, &config.http),
            (Entrance::Https, &config.https),
        ] {
            for address in addresses {
                let named =
                    |e: std::io::Error| std::io::Error::new(e.kind(), format!("{address}: {e}"));
                bound.push((entrance, TcpListener::bind(address).await.map_err(named)?));
            }
        }
        let mut edge = Self {
            metrics: Arc::clone(&metrics),
            end,
            sleeper: CancellationToken::new(),
            proxies: Vec::new(),
            connections: connections.clone(),
            addresses: Vec::new(),
        };
        for (entrance, listener) in bound {
            edge.addresses.push(listener.local_addr()?);
            let ingress = Ingress {
                view: view.clone(),
                gate: gate.clone(),
                metrics: Arc::clone(&metrics),
                region: config.region.clone(),
                entrance,
            };
            let mut proxy = http_proxy(&conf, ingress);
            proxy.h2_options = Some(h2_options());
            let mut options = HttpServerOptions::default();
            options.h2_idle_timeout = Some(H2_IDLE);
            proxy.server_options = Some(options);
            let proxy = Arc::new(proxy);
            edge.proxies.push(Arc::clone(&proxy));
            let tls = (entrance == Entrance::Https).then(|| Arc::clone(&acceptor));
            let entry = Entry {
                proxy,
                tls,
                metrics: Arc::clone(&metrics),
                connections: connections.clone(),
                ending: ending.clone(),
            };
            connections.spawn(listen::run(listener, entry));
        }
        tokio::spawn(sleep::run(
            gate,
            config.host,
            config.autostop_after,
            edge.sleeper.clone(),
        ));
        Ok(edge)
    }

    /// The addresses it is bound to: HTTP's first, each in the order given.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// What it counts.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Accepts no more, lets requests under way end, and gives up on them after `limit`.
    pub async fn drain(self, limit: Duration) {
        self.sleeper.cancel();
        self.end.send_replace(true);
        for proxy in &self.proxies {
            proxy.http_cleanup().await;
        }
        self.connections.close();
        if tokio::time::timeout(limit, self.connections.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                connections = self.connections.len(),
                "connections were still open at the end"
            );
        }
    }
}

fn h2_options() -> H2Options {
    let mut options = H2Options::new();
    options
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEAD_BYTES as u32);
    options
}
