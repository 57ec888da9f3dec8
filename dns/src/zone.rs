//! The names under `internal.`, as one network sees them.
//!
//! | name | type | what |
//! |---|---|---|
//! | `<app>`, `global.<app>` | AAAA | its started Machines |
//! | `<region>.<app>` | AAAA | those in a region |
//! | `<id>.vm.<app>` | AAAA | one of them |
//! | `<group>.process.<app>` | AAAA | those of a process group |
//! | `<value>.<key>.kv._metadata.<app>` | AAAA | those with this metadata |
//! | `top<N>.nearest.of.<app>` | AAAA | the N nearest to who asks |
//! | `<peer>._peer` | AAAA | a WireGuard peer |
//! | `_api` | AAAA | the resolver's own address, where the API is too |
//! | `vms.<app>` | TXT | `<id> <region>,…` |
//! | `regions.<app>` | TXT | `<region>,…` |
//! | `_apps`, `_peer` | TXT | names, with commas |
//! | `_instances` | TXT | `instance=<id>,app=<app>,ip=<address>,region=<region>;…` |
//!
//! `all.` before `vms`, `regions` and `_instances` counts Machines that are not started, too. A name
//! exists as long as what it speaks of does, asleep or not. Where none of the Machines that an address is asked of
//! is started, those are given that a call over the private network wakes; a name without any is empty.

use std::collections::{BTreeSet, HashMap};
use std::net::Ipv6Addr;
use std::sync::Arc;

use parking_lot::Mutex;
use tern_catalog::{
    App, HostId, Machine, MachineState, MachineStatus, NetworkId, Revision, Snapshot,
};

/// Addresses in one answer. More would help nobody, and an answer over TCP ends at 64 KiB.
const MOST_ADDRESSES: usize = 1000;
/// Text in one answer, for the same reason. A list that is longer ends with its last whole entry.
const MOST_TEXT: usize = 60_000;
/// The process group of a Machine, in its metadata.
const PROCESS_GROUP: &str = "fly_process_group";

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Asker {
    pub(crate) network: NetworkId,
    /// The host it lives on, where it is known.
    pub(crate) host: Option<HostId>,
}

/// What is at a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    /// No such name.
    Nothing,
    /// A name that only has others below it, or the zone itself.
    Empty,
    /// Addresses, which may be none.
    Addresses(Vec<Ipv6Addr>),
    /// A text.
    Text(Arc<str>),
}

/// The zone, with what is expensive to list.
#[derive(Debug, Default)]
pub(crate) struct Zone {
    lists: Mutex<Lists>,
}

/// Lists over all Machines or apps, made at most once for each revision of the catalog: asking for
/// them again and again costs whoever asks more than us.
#[derive(Debug, Default)]
struct Lists {
    revision: Revision,
    by_network: HashMap<(NetworkId, List), Arc<str>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum List {
    Apps,
    Peers,
    Instances,
    AllInstances,
}

impl Zone {
    /// Looks a name up: its labels in lowercase, without `internal`.
    pub(crate) fn find(&self, snapshot: &Snapshot, asker: Asker, labels: &[&str]) -> Found {
        let network = asker.network;
        let list = |kind| Found::Text(self.list(snapshot, network, kind));
        match labels {
            [] => Found::Empty,
            ["_api"] => Found::Addresses(vec![network.resolver()]),
            ["_apps"] => list(List::Apps),
            ["_peer"] => list(List::Peers),
            ["_instances"] => list(List::Instances),
            ["all", "_instances"] => list(List::AllInstances),
            [name, "_peer"] => match snapshot.peers.get(&format!("{network}/{name}")) {
                Some(peer) => Found::Addresses(vec![peer.address]),
                None => Found::Nothing,
            },
            [below @ .., app] => match snapshot.apps.get(*app) {
                Some(app) if app.network == network => find_in_app(snapshot, asker, app, below),
                _ => Found::Nothing,
            },
        }
    }

    fn list(&self, snapshot: &Snapshot, network: NetworkId, list: List) -> Arc<str> {
        let mut lists = self.lists.lock();
        if lists.revision != snapshot.revision {
            lists.revision = snapshot.revision;
            lists.by_network.clear();
        }
        let made = lists.by_network.entry((network, list));
        Arc::clone(made.or_insert_with(|| make_list(snapshot, network, list).into()))
    }
}

fn make_list(snapshot: &Snapshot, network: NetworkId, list: List) -> String {
    match list {
        List::Apps => {
            let apps = snapshot.apps.values().filter(|app| app.network == network);
            join(apps.map(|app| app.name.to_string()), ',')
        }
        List::Peers => {
            // The character after the slash ends the range.
            let own = snapshot
                .peers
                .range(format!("{network}/")..format!("{network}0"));
            join(own.map(|(_, peer)| peer.name.to_string()), ',')
        }
        List::Instances | List::AllInstances => {
            let own = snapshot.machines.values().filter(|m| m.network == network);
            let own = own.filter(|m| {
                let status = snapshot.machine_status.get(&m.id);
                if list == List::Instances {
                    is_started(status)
                } else {
                    exists(status)
                }
            });
            let describe = |m: &Arc<Machine>| {
                let (id, app, ip, region) = (&m.id, &m.app, m.private_ip, &m.region);
                format!("instance={id},app={app},ip={ip},region={region}")
            };
            join(own.map(describe), ';')
        }
    }
}

fn find_in_app(snapshot: &Snapshot, asker: Asker, app: &App, below: &[&str]) -> Found {
    let machines = || {
        let all = snapshot.machines_of(&app.name);
        all.filter(|(m, status)| m.network == app.network && exists(*status))
    };
    let addresses = |named: &mut dyn Iterator<Item = _>| {
        let answering = answering(named).into_iter();
        Found::Addresses(rotate(answering.map(|m| m.private_ip).collect()))
    };
    // Those that a name speaks of and that answer; no name where there is none of them.
    let those = |speaks_of: &dyn Fn(&Machine) -> bool| {
        let mut named = machines().filter(|(m, _)| speaks_of(m)).peekable();
        match named.peek() {
            None => Found::Nothing,
            Some(_) => addresses(&mut named),
        }
    };
    match below {
        [] | ["global"] => addresses(&mut machines().filter(is_offered)),
        ["vm" | "process" | "_metadata" | "of"] | ["kv", "_metadata"] | ["nearest", "of"] => {
            Found::Empty
        }
        ["vms"] | ["all", "vms"] => {
            let listed = machines().filter(|(_, s)| below.len() == 2 || is_started(*s));
            let text = join(listed.map(|(m, _)| format!("{} {}", m.id, m.region)), ',');
            Found::Text(text.into())
        }
        ["regions"] | ["all", "regions"] => {
            let listed = machines().filter(|(_, s)| below.len() == 2 || is_started(*s));
            let regions: BTreeSet<_> = listed.map(|(m, _)| m.region.clone()).collect();
            Found::Text(join(regions.into_iter(), ',').into())
        }
        [id, "vm"] => those(&|m| m.id.as_str() == *id),
        [group, "process"] => those(&|m| {
            !m.cordoned
                && (m.config.metadata.get(PROCESS_GROUP))
                    .is_some_and(|g| g.eq_ignore_ascii_case(group))
        }),
        [pair @ .., "kv", "_metadata"] => {
            // Keys and values may hold dots: only together they are sure to be the same.
            let pair = pair.join(".");
            those(&|m| {
                let mut metadata = m.config.metadata.iter();
                !m.cordoned
                    && metadata
                        .any(|(key, value)| format!("{value}.{key}").eq_ignore_ascii_case(&pair))
            })
        }
        [top, "nearest", "of"] => match top.strip_prefix("top").map(str::parse::<usize>) {
            Some(Ok(count @ 1..)) => {
                let answering = answering(&mut machines().filter(is_offered));
                Found::Addresses(nearest(snapshot, asker, answering, count))
            }
            _ => Found::Nothing,
        },
        [region] => those(&|m| !m.cordoned && m.region.eq_ignore_ascii_case(region)),
        _ => Found::Nothing,
    }
}

/// Whether it may be found by names of more than itself: one that is cordoned gets nothing new.
fn is_offered((machine, _): &(&Arc<Machine>, Option<&Arc<MachineStatus>>)) -> bool {
    !machine.cordoned
}

/// The started ones of these Machines; where there is none, those that a call wakes.
fn answering<'a>(
    machines: &mut dyn Iterator<Item = (&'a Arc<Machine>, Option<&'a Arc<MachineStatus>>)>,
) -> Vec<&'a Arc<Machine>> {
    let (mut started, mut asleep) = (Vec::new(), Vec::new());
    for (machine, status) in machines {
        if is_started(status) {
            started.push(machine);
        } else if is_callable(machine, status) {
            asleep.push(machine);
        }
    }
    if started.is_empty() { asleep } else { started }
}

/// Whether it sleeps, or is on the way there or back, and a call to one of its services wakes it.
fn is_callable(machine: &Machine, status: Option<&Arc<MachineStatus>>) -> bool {
    use MachineState::{Starting, Suspended, Suspending};
    let sleeps = status.is_some_and(|s| matches!(s.state, Starting | Suspended | Suspending));
    sleeps && machine.config.services.iter().any(|s| s.autostart)
}

/// On the same host, then in the same region, then elsewhere.
fn nearest(
    snapshot: &Snapshot,
    asker: Asker,
    mut machines: Vec<&Arc<Machine>>,
    count: usize,
) -> Vec<Ipv6Addr> {
    let host = asker.host.and_then(|id| snapshot.hosts.get(&id));
    machines.sort_by_key(|m| {
        let same_host = asker.host == Some(m.host);
        let same_region = host.is_some_and(|h| h.region == m.region);
        (!same_host, !same_region)
    });
    let nearest = machines.into_iter().take(count.min(MOST_ADDRESSES));
    nearest.map(|m| m.private_ip).collect()
}

/// Starts the list anywhere: most clients take the first address, and should not all take the same.
fn rotate(mut addresses: Vec<Ipv6Addr>) -> Vec<Ipv6Addr> {
    if let 2.. = addresses.len() {
        let start = rand::random_range(0..addresses.len());
        addresses.rotate_left(start);
    }
    addresses.truncate(MOST_ADDRESSES);
    addresses
}

fn is_started(status: Option<&Arc<MachineStatus>>) -> bool {
    status.is_some_and(|s| s.state == MachineState::Started)
}

fn exists(status: Option<&Arc<MachineStatus>>) -> bool {
    status.is_none_or(|s| !matches!(s.state, MachineState::Destroying | MachineState::Destroyed))
}

fn join(entries: impl Iterator<Item = String>, separator: char) -> String {
    let mut text = String::new();
    for entry in entries {
        if text.len() + entry.len() >= MOST_TEXT {
            break;
        }
        if !text.is_empty() {
            text.push(separator);
        }
        text.push_str(&entry);
    }
    text
}
