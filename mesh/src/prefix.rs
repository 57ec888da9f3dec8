//! Which peer an address belongs to: the longest prefix that holds it.
//!
//! In an address the network stands before the host. For routing the two are swapped, so that
//! everything that lives on one host, whatever its network, is one prefix:
//! `fdaa` (16) | host (32) | network (32) | machine (32) | free (16). A host is a /48, a laptop a /120.

use std::collections::HashMap;
use std::net::Ipv6Addr;

use tern_catalog::{HostId, MachineNumber, NetworkId, PrivateAddress};

/// A prefix of swapped addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Prefix {
    bits: u128,
    length: u8,
}

/// Values by prefix.
#[derive(Debug)]
pub(crate) struct Table<T> {
    /// Longest first; few lengths are in use, so a lookup is as many probes of a hash table.
    by_length: Vec<(u8, HashMap<u128, T>)>,
}

impl Prefix {
    /// All that lives on a host.
    pub(crate) fn host(id: HostId) -> Self {
        Self::new(HostId::address(id), 48)
    }

    /// A laptop's /120.
    pub(crate) fn laptop(network: NetworkId, host: HostId, number: MachineNumber) -> Self {
        Self::new(PrivateAddress::of_peer(network, host, number), 120)
    }

    fn new(address: Ipv6Addr, length: u8) -> Self {
        let bits = mask(swap(address), length);
        Self { bits, length }
    }
}

impl<T: Copy> Table<T> {
    pub(crate) fn new() -> Self {
        Self {
            by_length: Vec::new(),
        }
    }

    pub(crate) fn insert(&mut self, prefix: Prefix, value: T) {
        let place = (self.by_length).partition_point(|(length, _)| *length > prefix.length);
        match self.by_length.get_mut(place) {
            Some((length, values)) if *length == prefix.length => {
                values.insert(prefix.bits, value);
            }
            _ => {
                let values = HashMap::from([(prefix.bits, value)]);
                self.by_length.insert(place, (prefix.length, values));
            }
        }
    }

    /// The value at the longest prefix that holds this address.
    pub(crate) fn longest_match(&self, address: Ipv6Addr) -> Option<T> {
        let bits = swap(address);
        self.by_length
            .iter()
            .find_map(|(length, values)| values.get(&mask(bits, *length)))
            .copied()
    }
}

/// Puts the host before the network.
fn swap(address: Ipv6Addr) -> u128 {
    const HALF: u128 = u32::MAX as u128;
    let bits = u128::from(address);
    let (network, host) = (bits >> 80 & HALF, bits >> 48 & HALF);
    bits & !(HALF << 80 | HALF << 48) | host << 80 | network << 48
}

fn mask(bits: u128, length: u8) -> u128 {
    bits & u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_host_is_one_48_over_all_networks() {
        let address: Ipv6Addr = "fdaa:0:863:a7b:bea:1:2:3".parse().unwrap();
        assert_eq!(
            Ipv6Addr::from(swap(address)).to_string(),
            "fdaa:a7b:bea:0:863:1:2:3"
        );
        let mut table = Table::new();
        table.insert(Prefix::host(HostId(5)), 'a');
        for network in [0, 1, u32::MAX] {
            let m = MachineNumber(9);
            let on = |h| PrivateAddress::of_machine(NetworkId(network), HostId(h), m);
            assert_eq!(table.longest_match(on(5)), Some('a'));
            assert_eq!(table.longest_match(on(6)), None);
        }
        assert_eq!(
            table.longest_match("fdab:0:1:0:5::2".parse().unwrap()),
            None
        );
    }

    #[test]
    fn the_longer_prefix_wins_whatever_came_first() {
        let (n, h, m) = (NetworkId(1), HostId(5), MachineNumber(77));
        let laptop = PrivateAddress::of_peer(n, h, m);
        let other = PrivateAddress::of_peer(n, h, MachineNumber(78));
        for swap in [false, true] {
            let mut pairs = [(Prefix::host(h), 'h'), (Prefix::laptop(n, h, m), 'l')];
            if swap {
                pairs.reverse();
            }
            let mut table = Table::new();
            pairs.into_iter().for_each(|(p, v)| table.insert(p, v));
            assert_eq!(table.longest_match(laptop), Some('l'));
            assert_eq!(table.longest_match(other), Some('h'));
        }
    }

    #[test]
    fn a_laptop_owns_its_120_and_no_more() {
        let (n, h, m) = (NetworkId(1), HostId(5), MachineNumber(77));
        let mut table = Table::new();
        table.insert(Prefix::laptop(n, h, m), ());
        let bits = u128::from(PrivateAddress::of_peer(n, h, m)) & !0xffff;
        let at = |suffix: u128| table.longest_match(Ipv6Addr::from(bits | suffix)).is_some();
        assert!(at(0) && at(2) && at(0xff));
        assert!(!at(0x100) && !at(0xffff));
    }

    proptest! {
        #[test]
        fn swapping_twice_is_nothing(bits: u128) {
            prop_assert_eq!(swap(Ipv6Addr::from(swap(Ipv6Addr::from(bits)))), bits);
        }

        #[test]
        fn agrees_with_a_scan(hosts in prop::collection::vec(0u32..4, 0..6), laptops in prop::collection::vec((0u32..3, 0u32..4, 0u32..4), 0..12),
            network in 0u32..3, host in 0u32..4, number in 0u32..4, suffix: u16) {
            let mut all: Vec<Prefix> = hosts.into_iter().map(|h| Prefix::host(HostId(h))).collect();
            all.extend(laptops.into_iter().map(|(n, h, m)| Prefix::laptop(NetworkId(n), HostId(h), MachineNumber(m))));
            let mut table = Table::new();
            all.iter().for_each(|p| table.insert(*p, *p));
            let base = u128::from(PrivateAddress::of_peer(NetworkId(network), HostId(host), MachineNumber(number)));
            let address = Ipv6Addr::from(base & !0xffff | u128::from(suffix));
            let scan = all.iter().filter(|p| mask(swap(address), p.length) == p.bits).max_by_key(|p| p.length);
            prop_assert_eq!(table.longest_match(address), scan.copied());
        }
    }
}
