//! The packet filter: one nftables table, `inet tern`.
//!
//! What it promises, whatever a guest sends:
//!
//! - A packet that enters at a TAP has a source that is its Machine's own.
//! - It goes to its own network's /48, to the resolver's port 53, or, over IPv4 where that is
//!   allowed, to the outside; never to the host itself, to another Machine over IPv4, or to the link
//!   local addresses where clouds keep their instances' credentials.
//! - A packet reaches a TAP from the same network only, or from the host itself, or as a reply.
//!
//! A TAP without elements in the sets can send and receive nothing. Each text that is given to
//! `nft -f -` is one transaction: there is no moment with half a table.

use std::fmt::Write as _;
use std::io;
use std::net::Ipv6Addr;
use std::process::Stdio;

use ipnet::Ipv6Net;
use tern_catalog::{NetworkId, RESOLVER};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::slot::Slot;

/// A Machine as the rules know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Port {
    pub(crate) slot: Slot,
    pub(crate) address: Ipv6Addr,
    pub(crate) network: NetworkId,
}

/// The whole table, in place of what was there.
pub(crate) fn table<'a>(ports: impl Iterator<Item = &'a Port>, nat: bool) -> String {
    let outside = if nat {
        "oifname != \"tern0\" accept"
    } else {
        "drop"
    };
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

  # After connection tracking, before any choice of route.
  chain from_any {{
    type filter hook prerouting priority mangle; policy accept;
    iifname "tn*" jump from_machine
  }}
  chain from_machine {{
    iifname . ip6 saddr @own6 return
    iifname . ip saddr @own4 return
    # Neighbours, on the wire of this one Machine (RFC 4861: never forwarded).
    ip6 saddr {{ ::, fe80::/64 }} ip6 hoplimit 255 icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit }} return
    counter drop
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
    counter drop
  }}

  # Through the host.
  chain through {{
    type filter hook forward priority filter; policy accept;
    iifname "tn*" jump through_from_machine
    oifname "tn*" jump through_to_machine
  }}
  chain through_from_machine {{
    iifname . ip6 daddr @same6 oifname {{ "tn*", "tern0" }} return
    meta nfproto ipv6 counter drop
    oifname "tn*" counter drop
    ip daddr {{ 172.19.0.0/16, 169.254.0.0/16, 127.0.0.0/8, 224.0.0.0/4 }} counter drop
    {outside}
  }}
  chain through_to_machine {{
    ct state established,related accept
    oifname . ip6 saddr @same6 iifname {{ "tn*", "tern0" }} accept
    counter drop
  }}

  chain to_outside {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr 172.19.0.0/16 oifname != "tn*" masquerade
  }}
}}
"#
    );
    for port in ports {
        text.push_str(&elements("add", port));
    }
    text
}

/// Adds (`add`) or removes (`delete`) what the table holds of one Machine.
pub(crate) fn elements(verb: &str, port: &Port) -> String {
    let tap = port.slot.tap();
    let own = Ipv6Net::new_assert(port.address, 112).trunc();
    let same = port.network.prefix();
    let (v4, resolver) = (port.slot.guest_v4(), port.network.resolver());
    let mut text = String::new();
    for (set, element) in [
        ("own6", format!("\"{tap}\" . {own}")),
        ("own4", format!("\"{tap}\" . {v4}")),
        ("same6", format!("\"{tap}\" . {same}")),
        ("resolvers", format!("\"{tap}\" . {RESOLVER}")),
        ("resolvers", format!("\"{tap}\" . {resolver}")),
    ] {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{verb} element inet tern {set} {{ {element} }}");
    }
    text
}

/// Removes the table.
pub(crate) const NOTHING: &str = "add table inet tern\ndelete table inet tern\n";

/// Has `nft` do a text as one transaction.
pub(crate) async fn apply(text: &str) -> io::Result<()> {
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| io::Error::new(e.kind(), format!("nft (package nftables): {e}")))?;
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
