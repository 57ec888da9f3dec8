//! The catalog in memory, read without locks.
//!
//! A [`View`] lists the store once and then follows its watch. A reader takes a [`Snapshot`], a
//! consistent picture that costs one atomic load; persistent maps make the next one cheap.

use std::sync::Arc;

use arc_swap::ArcSwap;
use imbl::{HashMap, OrdMap, OrdSet};
use tokio::sync::watch;

use crate::{
    AcmeChallenge, App, AppName, Certificate, Host, HostId, Hostname, HostnameRoute, Machine,
    MachineId, MachineStatus, Network, NetworkId, OrgSlug, Organization, Peer, Revision, Token,
};

/// The catalog in memory. Clones share it.
#[derive(Clone)]
pub struct View {
    current: Arc<ArcSwap<Snapshot>>,
    revision: watch::Receiver<Revision>,
}

/// One consistent picture of the catalog.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// The revision it shows.
    pub revision: Revision,
    /// Organizations by slug.
    pub organizations: HashMap<OrgSlug, Arc<Organization>>,
    /// Networks by id.
    pub networks: HashMap<NetworkId, Arc<Network>>,
    /// Apps by name.
    pub apps: HashMap<AppName, Arc<App>>,
    /// Host names and the apps that answer to them.
    pub hostnames: HashMap<Hostname, Arc<HostnameRoute>>,
    /// Machines by id.
    pub machines: OrdMap<MachineId, Arc<Machine>>,
    /// What was seen of Machines, by id.
    pub machine_status: HashMap<MachineId, Arc<MachineStatus>>,
    /// Hosts by id.
    pub hosts: OrdMap<HostId, Arc<Host>>,
    /// Peers by key (`<network>/<name>`).
    pub peers: OrdMap<String, Arc<Peer>>,
    /// Certificates by host name.
    pub certificates: HashMap<Hostname, Arc<Certificate>>,
    /// Pending ACME challenges by key (`<hostname>/<kind>`).
    pub challenges: HashMap<String, Arc<AcmeChallenge>>,
    /// Tokens by hash.
    pub tokens: HashMap<String, Arc<Token>>,
    /// Index: the Machines of each app.
    by_app: HashMap<AppName, OrdSet<MachineId>>,
}

impl View {
    /// The picture now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Changes when the picture does; holds its revision.
    pub fn changes(&self) -> watch::Receiver<Revision> {
        self.revision.clone()
    }
}

impl Snapshot {
    /// The Machines of an app with what was last seen of them, in order of id.
    pub fn machines_of<'a>(
        &'a self,
        app: &AppName,
    ) -> impl Iterator<Item = (&'a Arc<Machine>, Option<&'a Arc<MachineStatus>>)> + use<'a> {
        let ids = self.by_app.get(app).into_iter().flatten();
        ids.filter_map(|id| Some((self.machines.get(id)?, self.machine_status.get(id))))
    }
}
