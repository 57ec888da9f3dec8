//! The packet filter: one nftables table, `inet tern`.
//!
//! What it promises, whatever a guest or a stranger sends:
//!
//! - A packet that enters at a TAP has a source that is its Machine's own.
//! - It goes to its own network's /48, to the resolver's port 53, to the edge's ports at the host's public
//!   addresses, or, over IPv4 where that is allowed, to the outside; never to anything else of the host's, to another
//!   Machine over IPv4, or, unless the owner allows it, to private networks and other special addresses ([`Outside`]).
//! - A Machine has a bounded number of connections open: the kernel's memory for them is everybody's.
//! - A packet reaches a TAP from the same network only, or from the host itself, or as a reply.
//! - A private address is only believed, and only reached, at a TAP, at the mesh's device and within the
//!   host: what comes in anywhere else with one is dropped before anybody, connection tracking included, has
//!   seen it, and none goes out anywhere else.
//! - What comes in by an uplink goes through this host only as a reply, or to where the host's owner
//!   translates it ([`Guard`]). Other traffic of theirs is not judged.
//!
//! A TAP without elements in the sets can send and receive nothing. Each text that is given to
//! `nft -f -` is one transaction: there is no moment with half a table.
//!
//! Over IPv4 "private" means the addresses that Machines have at the time, not all of 172.19.0.0/16: the rest
//! may be a container engine's or a company's network, and is nothing to protect as long as it is nobody's.

use std::fmt::Write as _;
use std::io;
use std::net::Ipv6Addr;
use std::path::Path;
use std::process::Stdio;

use ipnet::Ipv6Net;
use tern_catalog::{NetworkId, RESOLVER};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::outside::Outside;
use super::slot::Slot;
use super::uplinks::Uplinks;

/// A Machine as the rules know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Port {
    pub(crate) slot: Slot,
    pub(crate) address: Ipv6Addr,
    pub(crate) network: NetworkId,
}

impl Port {
    /// The addresses that are the Machine's own.
    pub(super) fn prefix(&self) -> Ipv6Net {
        Ipv6Net::new_assert(self.address, 112).trunc()
    }
}

/// What the table says beside the Machines.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Policy {
    pub(crate) outside: Outside,
    pub(crate) guard: Guard,
    pub(crate) uplinks: Uplinks,
}

/// The families in which strangers may not pass through this host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Guard {
    pub(crate) ipv4: bool,
    pub(crate) ipv6: bool,
}

/// The whole table, in place of what was there.
pub(crate) fn table<'a>(ports: impl Iterator<Item = &'a Port>, policy: &Policy) -> String {
    let (outside, to_edge) = (policy.outside.through(), policy.outside.to_edge());
    let inner = Outside::inner();
    let guarded = |is: bool, family| match is {
        true => format!("meta nfproto {family} counter drop"),
        false => String::new(),
    };
    let (strangers4, strangers6) = (
        guarded(policy.guard.ipv4, "ipv4"),
        guarded(policy.guard.ipv6, "ipv6"),
    );
    let mut text = format!(
        r#"add table inet tern
delete table inet tern
table inet tern {{
  # Sources: a TAP and the prefix, or address, of its Machine.
  set own6 {{ type ifname . ipv6_addr; flags interval; }}
  set own4 {{ type ifname . ipv4_addr; }}
  # A TAP and the network that its Machine is in, for both directions.
  set same6 {{ type ifname . ipv6_addr; flags interval; }}
  # A TAP and the addresses of the resolver there.
  set resolvers {{ type ifname . ipv6_addr; }}

  # The addresses of Machines and their gateways over IPv4, whatever their TAP.
  set ours4 {{ type ipv4_addr; }}
  # Devices that lead outside, and those that pass frames on without routing them, with themselves.
  set uplinks {{ type ifname; }}
  set bridges {{ type ifname . ifname; }}

  # A TAP and the chain that counts the connections of its Machine.
  map bounds {{ type ifname : verdict; }}

  # After fragments are put together, before connection tracking.
  chain from_any {{
    type filter hook prerouting priority raw; policy accept;
    iifname "tn*" jump from_machine
    iifname {{ "tn*", "lo" }} accept
    iifname "tern0" ip6 saddr fdaa::/16 ip6 daddr fdaa::/16 accept
    iifname "tern0" counter drop
    ip6 saddr fdaa::/16 counter drop
    ip6 daddr fdaa::/16 counter drop
    ip saddr @ours4 counter drop
    ip daddr @ours4 counter drop
  }}
  chain from_machine {{
    iifname . ip6 saddr @own6 return
    iifname . ip saddr @own4 return
    # Neighbours, on the wire of this one Machine (RFC 4861: never forwarded).
    ip6 saddr {{ ::, fe80::/64 }} ip6 hoplimit 255 icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit }} return
    counter drop
  }}

  # The first packet of a connection, before it is remembered.
  chain bounded {{
    type filter hook prerouting priority mangle; policy accept;
    iifname "tn*" ct state new ct status & confirmed != confirmed iifname vmap @bounds
  }}

  # To the host itself.
  chain to_host {{
    type filter hook input priority filter; policy accept;
    iifname "tn*" jump host_from_machine
  }}
  chain host_from_machine {{
    ct state established,related accept
    ip6 hoplimit 255 icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
    iifname . ip6 daddr @resolvers udp dport 53 accept
    iifname . ip6 daddr @resolvers tcp dport 53 accept
    iifname . ip6 daddr @resolvers icmpv6 type echo-request accept
    {inner}
{to_edge}
    counter drop
  }}

  # Through the host.
  chain through {{
    type filter hook forward priority filter; policy accept;
    iifname "tn*" jump through_from_machine
    oifname "tn*" jump through_to_machine
    iifname "tern0" oifname != "tern0" counter drop
    oifname "tern0" iifname != {{ "tn*", "tern0" }} counter drop
    iifname @uplinks jump through_from_strangers
  }}
  chain through_from_machine {{
    iifname . ip6 daddr @same6 oifname {{ "tn*", "tern0" }} return
    # Told of, so that who has a name with both kinds of addresses goes on with the other.
    meta nfproto ipv6 counter reject with icmpv6 admin-prohibited
    oifname {{ "tn*", "tern0" }} counter drop
    {outside}
  }}
  chain through_to_machine {{
    ct state established,related accept
    oifname . ip6 saddr @same6 iifname {{ "tn*", "tern0" }} accept
    counter drop
  }}

  # Replies, and what the host's owner translates: a container's published port, for example.
  chain through_from_strangers {{
    ct state established,related return
    ct status dnat return
    iifname . oifname @bridges return
    {strangers4}
    {strangers6}
  }}

  chain to_outside {{
    type nat hook postrouting priority srcnat; policy accept;
    iifname "tn*" oifname != "tn*" ip saddr @ours4 masquerade
  }}
  # After translation.
  chain leaving {{
    type filter hook postrouting priority srcnat + 1; policy accept;
    oifname {{ "tn*", "tern0", "lo" }} accept
    ip6 saddr fdaa::/16 counter drop
    ip6 daddr fdaa::/16 counter drop
    ip saddr @ours4 counter drop
    ip daddr @ours4 counter drop
  }}
}}
"#
    );
    text.push_str(&uplink_elements("add", &policy.uplinks));
    for port in ports {
        text.push_str(&elements("add", port));
    }
    text
}

/// Adds (`add`) or removes (`delete`) what the table holds of the devices that lead outside.
fn uplink_elements(verb: &str, uplinks: &Uplinks) -> String {
    let mut text = String::new();
    for name in &uplinks.names {
        let _ = writeln!(text, "{verb} element inet tern uplinks {{ \"{name}\" }}");
    }
    for name in &uplinks.bridges {
        let _ = writeln!(
            text,
            "{verb} element inet tern bridges {{ \"{name}\" . \"{name}\" }}"
        );
    }
    text
}

/// Adds (`add`) or removes (`delete`) what the table holds of one Machine.
pub(crate) fn elements(verb: &str, port: &Port) -> String {
    let tap = port.slot.tap();
    let own = port.prefix();
    let same = port.network.prefix();
    let (v4, resolver) = (port.slot.guest_v4(), port.network.resolver());
    let mut text = String::new();
    for (set, element) in [
        ("own6", format!("\"{tap}\" . {own}")),
        ("own4", format!("\"{tap}\" . {v4}")),
        ("ours4", format!("{v4}, {}", port.slot.host_v4())),
        ("same6", format!("\"{tap}\" . {same}")),
        ("resolvers", format!("\"{tap}\" . {RESOLVER}")),
        ("resolvers", format!("\"{tap}\" . {resolver}")),
    ] {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{verb} element inet tern {set} {{ {element} }}");
    }
    // A chain of its own, because an element that counts vanishes from a set with what it counts. A chain goes
    // after whatever names it.
    let chain = format!("{verb} chain inet tern bound_{tap}\n");
    let bound = format!("{verb} element inet tern bounds {{ \"{tap}\" : jump bound_{tap} }}\n");
    let rule = format!("add rule inet tern bound_{tap} ct count over {CONNECTIONS} counter drop\n");
    text + &match verb {
        "add" => chain + &rule + &bound,
        _ => bound + &chain,
    }
}

/// The rules for these devices in place of those.
pub(super) fn other_uplinks(old: &Uplinks, new: &Uplinks) -> String {
    uplink_elements("delete", old) + &uplink_elements("add", new)
}

/// Connections of a Machine's own that may be open at once; those that have ended do not count. It takes 32 Machines
/// that use them up to fill a table of the usual 262,144.
pub(super) const CONNECTIONS: u32 = 8192;

/// The table's name, in the family `inet`.
pub(super) const TABLE: &str = "tern";

/// Removes the table.
pub(crate) const NOTHING: &str = "add table inet tern\ndelete table inet tern\n";

/// Has `nft` do a text as one transaction.
pub(crate) async fn apply(nft: &Path, text: &str) -> io::Result<()> {
    let mut nft = Command::new(nft)
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| {
            io::Error::new(e.kind(), format!("nft (install the package nftables): {e}"))
        })?;
    let mut input = nft.stdin.take();
    let text = text.as_bytes().to_owned();
    // Beside waiting: neither side can fill the other's pipe then.
    let write = async move {
        match &mut input {
            Some(input) => input.write_all(&text).await,
            None => Ok(()),
        }
    };
    let (written, output) = tokio::join!(write, nft.wait_with_output());
    let output = output?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        let first: Vec<&str> = why.lines().take(3).collect();
        return Err(io::Error::other(format!("nft: {}", first.join(" "))));
    }
    written
}
