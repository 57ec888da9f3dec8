//! The running resolver of one host: the right listeners, as networks come and go.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tern_catalog::{HostId, INFRASTRUCTURE, NetworkId, RESOLVER, Snapshot, View, keep_running};
use thiserror::Error;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::forward::{Forwarder, Source};
use crate::listener::{Context, Listener};
use crate::reply::Responder;

const PORT: u16 = 53;
/// How often listeners that could not be bound are tried again, and the host's resolvers looked up.
const REVIEW: Duration = Duration::from_secs(5);

/// What a resolver needs to know.
#[derive(Debug, Clone)]
pub struct DnsConfig {
    /// This host.
    pub host: HostId,
    /// Where other names are asked for; `None` takes the resolvers of `/etc/resolv.conf`, also when
    /// they change.
    pub upstreams: Option<Vec<SocketAddr>>,
    /// Addresses to listen on besides the private network's.
    pub extra_binds: Vec<SocketAddr>,
    /// The network in whose name the host itself asks, and whoever is outside the private network.
    /// `None` refuses them.
    pub local_network: Option<NetworkId>,
}

/// Why there is no resolver.
#[derive(Debug, Error)]
pub enum DnsError {
    /// An address that must be served cannot be.
    #[error("cannot answer names on {address}, port and all: is another resolver there?")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why it failed.
        source: io::Error,
    },
}

/// A running resolver. Dropping it stops it too.
pub struct Dns {
    addresses: Vec<SocketAddr>,
    stop: CancellationToken,
    keeper: JoinHandle<Option<()>>,
    _stop_when_dropped: DropGuard,
}

impl DnsConfig {
    /// The usual configuration of a host.
    pub fn new(host: HostId) -> Self {
        Self {
            host,
            upstreams: None,
            extra_binds: Vec::new(),
            local_network: None,
        }
    }
}

impl Dns {
    /// Starts to answer on `fdaa::3` and on the extra addresses; the networks' follow.
    pub async fn start(config: DnsConfig, view: View) -> Result<Self, DnsError> {
        let source = match config.upstreams {
            Some(addresses) => Source::Fixed(addresses),
            None => Source::File("/etc/resolv.conf".into()),
        };
        let responder = Responder::new(config.local_network);
        let context = Arc::new(Context::new(
            view.clone(),
            responder,
            Forwarder::new(source),
        ));
        let stop = CancellationToken::new();
        let guard = stop.clone().drop_guard();
        let mut addresses = Vec::new();
        for address in [(RESOLVER, PORT).into()]
            .into_iter()
            .chain(config.extra_binds)
        {
            let bind = |source| DnsError::Bind { address, source };
            let listener = Listener::bind(address).map_err(bind)?;
            addresses.push(listener.local_addr().map_err(bind)?);
            listener.serve(&context, &stop);
        }
        tracing::info!(?addresses, "names are answered");
        let (host, stopping) = (config.host, stop.clone());
        let keep = move || {
            let keeper = Keeper {
                host,
                view: view.clone(),
                context: Arc::clone(&context),
                stop: stopping.clone(),
                serving: BTreeMap::new(),
            };
            keeper.run()
        };
        let keeper =
            async move { keep_running("the keeper of the resolver's listeners", keep).await };
        Ok(Self {
            addresses,
            keeper: tokio::spawn(stop.clone().run_until_cancelled_owned(keeper)),
            stop,
            _stop_when_dropped: guard,
        })
    }

    /// The fixed addresses that are served, `fdaa::3` first, then the extra ones in order.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Stops it. Questions on their way stay unanswered.
    pub async fn shutdown(self) {
        self.stop.cancel();
        if let Err(error) = self.keeper.await {
            tracing::error!(%error, "the resolver ended badly");
        }
    }
}

/// Keeps a listener for each network that has something on this host.
struct Keeper {
    host: HostId,
    view: View,
    context: Arc<Context>,
    stop: CancellationToken,
    serving: BTreeMap<NetworkId, DropGuard>,
}

impl Keeper {
    async fn run(mut self) {
        let mut changes = self.view.changes();
        let mut review = tokio::time::interval(REVIEW);
        review.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut snapshot = self.view.snapshot();
        let mut wanted = networks(&snapshot, self.host);
        loop {
            changes.mark_unchanged();
            let before = std::mem::replace(&mut snapshot, self.view.snapshot());
            // Most changes are of Machines' states: unchanged maps are not read again.
            let same =
                snapshot.machines.ptr_eq(&before.machines) && snapshot.peers.ptr_eq(&before.peers);
            if !same {
                wanted = networks(&snapshot, self.host);
            }
            self.serving.retain(|network, _| wanted.contains(network));
            for network in &wanted {
                self.serve(*network);
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                _ = review.tick() => self.context.forwarder().reload(),
            }
        }
    }

    fn serve(&mut self, network: NetworkId) {
        if self.serving.contains_key(&network) {
            return;
        }
        let address = SocketAddr::from((network.resolver(), PORT));
        match Listener::bind(address) {
            Ok(listener) => {
                let stop = self.stop.child_token();
                listener.serve(&self.context, &stop);
                self.serving.insert(network, stop.drop_guard());
            }
            Err(error) => tracing::warn!(%error, %address, "a network's resolver cannot listen"),
        }
    }
}

fn networks(snapshot: &Snapshot, host: HostId) -> BTreeSet<NetworkId> {
    let machines = snapshot.machines.values().filter(|m| m.host == host);
    let laptops = snapshot.peers.values().filter(|p| p.host == host);
    machines
        .map(|m| m.network)
        .chain(laptops.map(|p| p.network))
        .filter(|network| *network != INFRASTRUCTURE)
        .collect()
}

#[cfg(test)]
mod tests;
