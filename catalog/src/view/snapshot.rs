//! One consistent picture, and how a commit changes it.

use std::hash::Hash;
use std::net::Ipv6Addr;
use std::sync::Arc;

use imbl::{HashMap, OrdMap, OrdSet};

use crate::{
    AcmeChallenge, App, AppName, AppSecrets, Certificate, Change, Entry, Host, HostAlive,
    HostCordon, HostId, HostStatus, Hostname, HostnameRoute, Machine, MachineId, MachineStatus,
    Network, NetworkId, OrgSlug, Organization, Peer, Record, Revision, Token, Volume, VolumeId,
    VolumeStatus, WatchBatch,
};

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
    pub apps: OrdMap<AppName, Arc<App>>,
    /// Host names and the apps that answer to them.
    pub hostnames: HashMap<Hostname, Arc<HostnameRoute>>,
    /// Machines by id.
    pub machines: OrdMap<MachineId, Arc<Machine>>,
    /// What was seen of Machines, by id.
    pub machine_status: HashMap<MachineId, Arc<MachineStatus>>,
    /// Hosts by id.
    pub hosts: OrdMap<HostId, Arc<Host>>,
    /// The hosts whose `tern serve` runs.
    pub host_alive: OrdMap<HostId, Arc<HostAlive>>,
    /// What hosts last said of themselves.
    pub host_status: OrdMap<HostId, Arc<HostStatus>>,
    /// The hosts that get no new Machines.
    pub host_cordons: OrdMap<HostId, Arc<HostCordon>>,
    /// Peers by key (`<network>/<name>`).
    pub peers: OrdMap<String, Arc<Peer>>,
    /// Certificates by host name.
    pub certificates: HashMap<Hostname, Arc<Certificate>>,
    /// Pending ACME challenges by key (`<hostname>/<kind>`).
    pub challenges: HashMap<String, Arc<AcmeChallenge>>,
    /// Tokens by hash.
    pub tokens: HashMap<String, Arc<Token>>,
    /// Volumes by id.
    pub volumes: OrdMap<VolumeId, Arc<Volume>>,
    /// What was seen of volumes, by id.
    pub volume_status: HashMap<VolumeId, Arc<VolumeStatus>>,
    /// Secrets by app.
    pub secrets: HashMap<AppName, Arc<AppSecrets>>,
    /// Keys whose newest value cannot be read. What was readable before is shown still, above.
    pub unreadable: OrdMap<String, Arc<Unreadable>>,
    /// Index: the Machines of each app.
    by_app: HashMap<AppName, OrdSet<MachineId>>,
    /// Index: the Machine at each address.
    by_address: HashMap<Ipv6Addr, MachineId>,
}

/// A value that was refused: of a newer version of this program, or broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// The revision that wrote it.
    pub revision: Revision,
    /// What is wrong with it.
    pub error: String,
}

impl Snapshot {
    /// The Machines of an app with what was last seen of them, in order of id. Those of an earlier app of that name
    /// are another owner's: they are in another network.
    pub fn machines_of<'a>(
        &'a self,
        app: &AppName,
    ) -> impl Iterator<Item = (&'a Arc<Machine>, Option<&'a Arc<MachineStatus>>)> + use<'a> {
        let network = self.apps.get(app).map(|app| app.network);
        let ids = self.by_app.get(app).into_iter().flatten();
        let all = ids.filter_map(|id| Some((self.machines.get(id)?, self.machine_status.get(id))));
        all.filter(move |(machine, _)| network.is_none_or(|own| own == machine.network))
    }

    /// The Machine that has this address.
    pub fn machine_at(&self, address: Ipv6Addr) -> Option<&Arc<Machine>> {
        self.machines.get(self.by_address.get(&address)?)
    }

    /// The volumes of an app, in order of id; those that are being destroyed are nobody's.
    pub fn volumes_of(&self, app: &AppName) -> impl Iterator<Item = &Arc<Volume>> {
        self.volumes
            .values()
            .filter(move |v| v.app == *app && !v.destroyed)
    }

    /// The Machine that mounts this volume.
    pub fn holder_of(&self, volume: &Volume) -> Option<&Arc<Machine>> {
        let machine = self.machines.get(volume.machine.as_ref()?)?;
        let mounted = machine.config.mounts.iter().any(|m| m.volume == volume.id);
        mounted.then_some(machine)
    }

    /// The apps of a network, in order of name.
    pub fn apps_in(&self, network: NetworkId) -> impl Iterator<Item = &Arc<App>> {
        self.apps.values().filter(move |app| app.network == network)
    }

    /// The peers of a network, in order of name.
    pub fn peers_in(&self, network: NetworkId) -> impl Iterator<Item = &Arc<Peer>> {
        self.peers
            .values()
            .filter(move |peer| peer.network == network)
    }

    /// The picture after one more commit.
    pub(super) fn apply(&mut self, batch: &WatchBatch) {
        for change in &batch.changes {
            match change {
                Change::Put(entry) => self.put(entry),
                Change::Delete { key } => self.delete(key),
            }
        }
        self.revision = batch.revision;
    }

    /// Takes an entry in. One that cannot be read is refused: the last that could be stays, where there was one, and the
    /// rest serves in any case. It is told once, and in [`Snapshot::unreadable`] for as long as it is so.
    pub(super) fn put(&mut self, entry: &Entry) {
        let key = entry.key.as_str();
        let kept = if let Some(id) = key.strip_prefix(Machine::PREFIX) {
            self.put_machine(id, entry)
        } else if let Some(id) = key.strip_prefix(MachineStatus::PREFIX) {
            insert(&mut self.machine_status, id, entry)
        } else if let Some(id) = key.strip_prefix(Organization::PREFIX) {
            insert(&mut self.organizations, id, entry)
        } else if key.starts_with(Network::PREFIX) {
            read::<Network>(entry).map(|n| drop(self.networks.insert(n.id, n)))
        } else if key.starts_with(App::PREFIX) {
            read::<App>(entry).map(|a| drop(self.apps.insert(a.name.clone(), a)))
        } else if let Some(id) = key.strip_prefix(HostnameRoute::PREFIX) {
            insert(&mut self.hostnames, id, entry)
        } else if key.starts_with(Host::PREFIX) {
            read::<Host>(entry).map(|h| drop(self.hosts.insert(h.id, h)))
        } else if key.starts_with(HostAlive::PREFIX) {
            read::<HostAlive>(entry).map(|h| drop(self.host_alive.insert(h.id, h)))
        } else if key.starts_with(HostStatus::PREFIX) {
            read::<HostStatus>(entry).map(|h| drop(self.host_status.insert(h.id, h)))
        } else if key.starts_with(HostCordon::PREFIX) {
            read::<HostCordon>(entry).map(|h| drop(self.host_cordons.insert(h.id, h)))
        } else if let Some(id) = key.strip_prefix(Peer::PREFIX) {
            read::<Peer>(entry).map(|p| drop(self.peers.insert(id.to_owned(), p)))
        } else if let Some(id) = key.strip_prefix(Certificate::PREFIX) {
            insert(&mut self.certificates, id, entry)
        } else if let Some(id) = key.strip_prefix(AcmeChallenge::PREFIX) {
            read::<AcmeChallenge>(entry).map(|c| drop(self.challenges.insert(id.to_owned(), c)))
        } else if let Some(id) = key.strip_prefix(Token::PREFIX) {
            read::<Token>(entry).map(|t| drop(self.tokens.insert(id.to_owned(), t)))
        } else if key.starts_with(Volume::PREFIX) {
            read::<Volume>(entry).map(|v| drop(self.volumes.insert(v.id.clone(), v)))
        } else if let Some(id) = key.strip_prefix(VolumeStatus::PREFIX) {
            insert(&mut self.volume_status, id, entry)
        } else if let Some(id) = key.strip_prefix(AppSecrets::PREFIX) {
            insert(&mut self.secrets, id, entry)
        } else {
            // Kinds that only their own writer reads (leases, releases, ACME accounts).
            Ok(())
        };
        match kept {
            Ok(()) => drop(self.unreadable.remove(key)),
            Err(error) => self.refuse(entry, error),
        }
    }

    fn refuse(&mut self, entry: &Entry, error: String) {
        let key = entry.key.as_str();
        let refused = Unreadable {
            revision: entry.revision,
            error,
        };
        if self.unreadable.get(key).is_some_and(|r| **r == refused) {
            return;
        }
        tracing::error!(
            key,
            revision = refused.revision,
            error = refused.error,
            "a record of the catalog cannot be read; what could be read of it last is kept: write it anew, or run the \
             version of this program that wrote it"
        );
        self.unreadable.insert(key.to_owned(), Arc::new(refused));
    }

    fn put_machine(&mut self, id: &str, entry: &Entry) -> Result<(), String> {
        let machine = read::<Machine>(entry)?;
        if machine.id.as_str() != id {
            return Err(format!("it speaks of Machine {}", machine.id));
        }
        self.forget_machine(id);
        self.by_app
            .entry(machine.app.clone())
            .or_default()
            .insert(machine.id.clone());
        self.by_address
            .insert(machine.private_ip, machine.id.clone());
        self.machines.insert(machine.id.clone(), machine);
        Ok(())
    }

    fn forget_machine(&mut self, id: &str) {
        let Some(old) = self.machines.remove(id) else {
            return;
        };
        // Another may have taken its address since.
        if self.by_address.get(&old.private_ip) == Some(&old.id) {
            self.by_address.remove(&old.private_ip);
        }
        if let Some(ids) = self.by_app.get_mut(&old.app) {
            ids.remove(id);
            if ids.is_empty() {
                self.by_app.remove(&old.app);
            }
        }
    }

    pub(super) fn delete(&mut self, key: &str) {
        self.unreadable.remove(key);
        let number = |id: &str| id.parse::<u32>().ok();
        if let Some(id) = key.strip_prefix(Machine::PREFIX) {
            self.forget_machine(id);
        } else if let Some(id) = key.strip_prefix(MachineStatus::PREFIX) {
            self.machine_status.remove(id);
        } else if let Some(id) = key.strip_prefix(Organization::PREFIX) {
            self.organizations.remove(id);
        } else if let Some(id) = key.strip_prefix(Network::PREFIX).and_then(number) {
            self.networks.remove(&NetworkId(id));
        } else if let Some(id) = key.strip_prefix(App::PREFIX) {
            self.apps.remove(id);
        } else if let Some(id) = key.strip_prefix(HostnameRoute::PREFIX) {
            self.hostnames.remove(id);
        } else if let Some(id) = key.strip_prefix(Host::PREFIX).and_then(number) {
            self.hosts.remove(&HostId(id));
        } else if let Some(id) = key.strip_prefix(HostAlive::PREFIX).and_then(number) {
            self.host_alive.remove(&HostId(id));
        } else if let Some(id) = key.strip_prefix(HostStatus::PREFIX).and_then(number) {
            self.host_status.remove(&HostId(id));
        } else if let Some(id) = key.strip_prefix(HostCordon::PREFIX).and_then(number) {
            self.host_cordons.remove(&HostId(id));
        } else if let Some(id) = key.strip_prefix(Peer::PREFIX) {
            self.peers.remove(id);
        } else if let Some(id) = key.strip_prefix(Certificate::PREFIX) {
            self.certificates.remove(id);
        } else if let Some(id) = key.strip_prefix(AcmeChallenge::PREFIX) {
            self.challenges.remove(id);
        } else if let Some(id) = key.strip_prefix(Token::PREFIX) {
            self.tokens.remove(id);
        } else if let Some(id) = key.strip_prefix(Volume::PREFIX) {
            self.volumes.remove(id);
        } else if let Some(id) = key.strip_prefix(VolumeStatus::PREFIX) {
            self.volume_status.remove(id);
        } else if let Some(id) = key.strip_prefix(AppSecrets::PREFIX) {
            self.secrets.remove(id);
        }
    }
}

fn read<T: Record>(entry: &Entry) -> Result<Arc<T>, String> {
    serde_json::from_slice(&entry.value)
        .map(Arc::new)
        .map_err(|e| e.to_string())
}

fn insert<K, T>(map: &mut HashMap<K, Arc<T>>, id: &str, entry: &Entry) -> Result<(), String>
where
    K: std::str::FromStr<Err = crate::NameError> + Hash + Eq + Clone,
    T: Record,
{
    let key = id.parse::<K>().map_err(|e| e.to_string())?;
    map.insert(key, read::<T>(entry)?);
    Ok(())
}
