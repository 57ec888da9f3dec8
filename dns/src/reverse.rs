//! Names of addresses: `….a.a.d.f.ip6.arpa.` (RFC 3596 section 2.5), as one network sees them.

use std::net::Ipv6Addr;

use tern_catalog::Snapshot;

use crate::zone::Asker;

/// Nibbles of `fdaa`, in the order of reverse names.
const PRIVATE: [&str; 4] = ["a", "a", "d", "f"];
const NIBBLES: usize = 32;

/// The labels below `ip6.arpa`, if they are inside the private network.
pub(crate) fn nibbles<'a, 'l>(labels: &'a [&'l str]) -> Option<&'a [&'l str]> {
    match labels {
        [nibbles @ .., "ip6", "arpa"] if nibbles.ends_with(&PRIVATE) => Some(nibbles),
        _ => None,
    }
}

/// What such a name points to, without the final dot.
pub(crate) fn find(snapshot: &Snapshot, asker: Asker, nibbles: &[&str]) -> Option<String> {
    let address = address(nibbles)?;
    if address == asker.network.resolver() {
        return Some("_api.internal".into());
    }
    if let Some(machine) = snapshot.machine_at(address) {
        let own = machine.network == asker.network;
        return own.then(|| format!("{}.vm.{}.internal", machine.id, machine.app));
    }
    let network = asker.network;
    let mut peers = snapshot
        .peers
        .range(format!("{network}/")..format!("{network}0"));
    let (_, peer) = peers.find(|(_, peer)| peer.address == address)?;
    Some(format!("{}._peer.internal", peer.name))
}

fn address(nibbles: &[&str]) -> Option<Ipv6Addr> {
    if nibbles.len() != NIBBLES {
        return None;
    }
    let bits = nibbles
        .iter()
        .rev()
        .try_fold(0u128, |bits, label| match label.as_bytes() {
            [digit] => Some(bits << 4 | u128::from(char::from(*digit).to_digit(16)?)),
            _ => None,
        })?;
    Some(Ipv6Addr::from(bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_addresses_backwards() {
        let name = "2.0.0.0.9.0.0.0.0.0.0.0.1.0.0.0.0.0.0.0.7.0.0.0.0.0.0.0.a.a.d.f.ip6.arpa";
        let labels: Vec<_> = name.split('.').collect();
        let found = address(nibbles(&labels).unwrap());
        assert_eq!(found, Some("fdaa:0:7:0:1:0:9:2".parse().unwrap()));
    }

    #[test]
    fn other_names_are_none() {
        let labels: Vec<_> = "1.0.0.127.in-addr.arpa".split('.').collect();
        assert!(nibbles(&labels).is_none());
        assert!(nibbles(&["b", "a", "d", "f", "ip6", "arpa"]).is_none());
        assert!(nibbles(&["a", "a", "d", "f", "ip6", "arpa"]).is_some());
        assert_eq!(address(&["a"; 31]), None);
        assert_eq!(address(&["ab"; 32]), None);
        assert_eq!(address(&["x"; 32]), None);
    }
}
