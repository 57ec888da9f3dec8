//! Which of the host's devices lead outside.
//!
//! Strangers' packets come in by a wire, or by whatever a default route leads to. A container engine's
//! bridge or a VPN of the host's owner is neither, and its traffic is the owner's business.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt as _;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::NetworkError;
use super::slot::Slot;

/// Says whether frames that a bridge only passes on are shown to the packet filter as well.
const BRIDGED: &str = "/proc/sys/net/bridge/bridge-nf-call-iptables";

/// The devices that lead outside.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Uplinks {
    pub(super) names: BTreeSet<String>,
    /// Those of them that are bridges whose passing frames the packet filter sees: in at such a device and
    /// out of it again is no way through this host.
    pub(super) bridges: BTreeSet<String>,
}

/// A device, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Device {
    name: String,
    /// `None` is hardware.
    kind: Option<InfoKind>,
    loopback: bool,
    /// What it is stacked on.
    lower: Option<u32>,
    /// What it is a port of.
    master: Option<u32>,
}

/// Looks which devices there are.
pub(super) async fn find(netlink: &Handle) -> Result<Uplinks, NetworkError> {
    let failed = |what| {
        move |source| NetworkError::Netlink {
            name: "network devices".to_owned(),
            what,
            source,
        }
    };
    let links: Vec<_> = netlink
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(failed("list"))?;
    let devices = links
        .iter()
        .map(|link| (link.header.index, device(link)))
        .collect();
    let mut defaults = BTreeSet::new();
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    for family in [v4, v6] {
        let routes: Vec<_> = netlink
            .route()
            .get(family)
            .execute()
            .try_collect()
            .await
            .map_err(failed("list the routes of"))?;
        let default = routes
            .iter()
            .filter(|r| r.header.destination_prefix_length == 0);
        defaults.extend(default.flat_map(devices_of));
    }
    let bridged = std::fs::read_to_string(BRIDGED).is_ok_and(|on| on.trim() != "0");
    Ok(outside(&devices, &defaults, bridged))
}

fn outside(devices: &BTreeMap<u32, Device>, defaults: &BTreeSet<u32>, bridged: bool) -> Uplinks {
    let is_wire = |d: &Device| d.kind.is_none() && !d.loopback;
    let mut found: BTreeSet<u32> = devices
        .iter()
        .filter(|(index, device)| is_wire(device) || defaults.contains(index))
        .map(|(index, _)| *index)
        .collect();
    // What stands on a wire, or has one as its port, leads outside too.
    loop {
        let masters = found.iter().filter_map(|index| devices.get(index)?.master);
        let stacked = devices
            .iter()
            .filter(|(_, d)| d.lower.is_some_and(|lower| found.contains(&lower)))
            .map(|(index, _)| *index);
        let more: Vec<u32> = masters
            .chain(stacked)
            .filter(|i| !found.contains(i))
            .collect();
        if more.is_empty() {
            break;
        }
        found.extend(more);
    }
    let mut uplinks = Uplinks::default();
    let own = |name: &str| name == "tern0" || Slot::of_tap(name).is_some();
    // A name may hold almost anything, and goes into a text; no program gives such names.
    let plain = |name: &str| {
        name.bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-@".contains(&b))
    };
    let devices = found.iter().filter_map(|index| devices.get(index));
    for device in devices.filter(|d| plain(&d.name) && !own(&d.name)) {
        if bridged && device.kind == Some(InfoKind::Bridge) {
            uplinks.bridges.insert(device.name.clone());
        }
        uplinks.names.insert(device.name.clone());
    }
    uplinks
}

fn device(link: &LinkMessage) -> Device {
    let mut device = Device {
        name: String::new(),
        kind: None,
        loopback: link.header.flags.contains(LinkFlags::Loopback),
        lower: None,
        master: None,
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name.clone_from(name),
            LinkAttribute::Controller(index) => device.master = Some(*index),
            LinkAttribute::Link(index) => device.lower = Some(*index),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        device.kind = Some(kind.clone());
                    }
                }
            }
            _ => {}
        }
    }
    // Of other kinds this is a peer, or the way that a tunnel's packets take.
    let on_a_wire = [
        InfoKind::Vlan,
        InfoKind::MacVlan,
        InfoKind::IpVlan,
        InfoKind::MacSec,
    ];
    if !device
        .kind
        .as_ref()
        .is_some_and(|kind| on_a_wire.contains(kind))
    {
        device.lower = None;
    }
    device
}

fn devices_of(route: &RouteMessage) -> Vec<u32> {
    let of = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|h| h.interface_index).collect(),
        _ => Vec::new(),
    };
    route.attributes.iter().flat_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, kind: Option<InfoKind>) -> Device {
        Device {
            name: name.into(),
            kind,
            loopback: name == "lo",
            lower: None,
            master: None,
        }
    }

    #[test]
    fn wires_what_stands_on_them_and_default_routes_lead_outside() {
        let devices = BTreeMap::from([
            (1, device("lo", None)),
            (
                2,
                Device {
                    master: Some(5),
                    ..device("eth0", None)
                },
            ),
            (3, device("eth1", None)),
            (
                4,
                Device {
                    lower: Some(3),
                    ..device("eth1.20", Some(InfoKind::Vlan))
                },
            ),
            (5, device("br0", Some(InfoKind::Bridge))),
            (6, device("docker0", Some(InfoKind::Bridge))),
            (
                7,
                Device {
                    master: Some(6),
                    ..device("veth1", Some(InfoKind::Veth))
                },
            ),
            (8, device("wg0", Some(InfoKind::Wireguard))),
            (9, device("ppp0", Some(InfoKind::Other("ppp".into())))),
        ]);
        let found = outside(&devices, &BTreeSet::from([9]), true);
        let names: Vec<&str> = found.names.iter().map(String::as_str).collect();
        assert_eq!(names, ["br0", "eth0", "eth1", "eth1.20", "ppp0"]);
        assert_eq!(found.bridges, BTreeSet::from(["br0".into()]));
        assert_eq!(
            outside(&devices, &BTreeSet::new(), false).bridges,
            BTreeSet::new()
        );
    }
}
