//! A Machine's place in its host's network: everything that is derived from one small number.
//!
//! Slots are used again, and the next Machine in one may be another organization's. So a slot is given back
//! when nothing is left of its last Machine, and then taken again as late as can be. What holds for each thing that
//! follows from it:
//!
//! - IPv4 addresses: connection tracking forgets them before the slot is given back. A connection that the
//!   host itself has not closed yet (a request of the gate's) ends long before the slot's turn comes again.
//! - TAP and Ethernet addresses: the device is removed, with its routes and neighbours; there is nothing else on
//!   its wire that could have learnt them.
//! - The vsock context id: only its guest sees it. The host's end is a socket in the Machine's directory.
//! - The monitor's user: its process has been waited for, and all that it owns is in the directory, which
//!   is removed before.
//!
//! Not from the slot come the private address (a number that the API gives out once), the directory and the cgroup
//! (the Machine's id).

use std::collections::BTreeSet;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

/// The guests' gateway, on every TAP.
pub(crate) const GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// A Machine's place in its host's network. It is kept with the Machine and never changes, because
/// its snapshot knows the addresses that follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Slot(u16);

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mac(pub(crate) [u8; 6]);

/// Slots that are taken, and whose turn it is.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    taken: BTreeSet<Slot>,
    /// Where the search for a free one begins. Not kept across agents, which begin after the highest taken.
    next: u16,
}

impl Slot {
    /// How many there are: as many as 172.19.0.0/16 has blocks of four.
    pub(crate) const COUNT: u16 = 1 << 14;

    /// The slot with this number, if there is one.
    pub(crate) fn new(number: u16) -> Option<Self> {
        (number < Self::COUNT).then_some(Self(number))
    }

    pub(crate) fn number(self) -> u16 {
        self.0
    }

    /// The name of its TAP.
    pub(crate) fn tap(self) -> String {
        format!("{TAP_PREFIX}{}", self.0)
    }

    /// The slot whose TAP has this name.
    pub(crate) fn of_tap(name: &str) -> Option<Self> {
        let number = name.strip_prefix(TAP_PREFIX)?.parse().ok()?;
        Self::new(number).filter(|slot| slot.tap() == name)
    }

    /// The guest's context id: 0 to 2 mean others.
    pub(crate) fn cid(self) -> u32 {
        u32::from(self.0) + 3
    }

    /// The user and group that its monitor becomes, and nothing else on the host is.
    pub(crate) fn user(self) -> u32 {
        FIRST_USER + u32::from(self.0)
    }

    /// The guest's Ethernet address.
    pub(crate) fn guest_mac(self) -> Mac {
        let [high, low] = self.0.to_be_bytes();
        Mac([0x02, 0x74, 0x6e, 0x00, high, low])
    }

    /// The host's end of it. Fixed too: a guest that was suspended remembers its gateway's address.
    pub(crate) fn host_mac(self) -> Mac {
        let [high, low] = self.0.to_be_bytes();
        Mac([0x02, 0x74, 0x6e, 0x01, high, low])
    }

    /// The host's address for IPv4 to the outside.
    pub(crate) fn host_v4(self) -> Ipv4Addr {
        self.v4(1)
    }

    /// The guest's.
    pub(crate) fn guest_v4(self) -> Ipv4Addr {
        self.v4(2)
    }

    /// The slot whose guest has this address.
    pub(crate) fn of_guest_v4(address: Ipv4Addr) -> Option<Self> {
        Self::of_v4(address).filter(|slot| slot.guest_v4() == address)
    }

    /// The slot at which the host has this address.
    pub(crate) fn of_host_v4(address: Ipv4Addr) -> Option<Self> {
        Self::of_v4(address).filter(|slot| slot.host_v4() == address)
    }

    fn of_v4(address: Ipv4Addr) -> Option<Self> {
        let offset = u32::from(address).checked_sub(V4_BASE)?;
        Self::new(u16::try_from(offset / 4).ok()?)
    }

    fn v4(self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from(V4_BASE + u32::from(self.0) * 4 + offset)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Slots {
    /// Takes the next that is free, all around.
    pub(crate) fn take(&mut self) -> Option<Slot> {
        let free = (0..Slot::COUNT)
            .map(|step| Slot((self.next + step) % Slot::COUNT))
            .find(|s| !self.taken.contains(s))?;
        self.claim(free);
        Some(free)
    }

    /// Takes this one; `false` where it is taken.
    pub(crate) fn claim(&mut self, slot: Slot) -> bool {
        self.next = (slot.0 + 1) % Slot::COUNT;
        self.taken.insert(slot)
    }

    pub(crate) fn release(&mut self, slot: Slot) {
        self.taken.remove(&slot);
    }
}

/// The users of monitors: 1879048192 (0x70000000) and the 16383 after it. Above those that people and
/// services get, systemd's dynamic users (61184-65519) and the ranges that useradd hands out for user
/// namespaces (524288-600100000) and systemd for containers (524288-1879048191).
const FIRST_USER: u32 = 0x7000_0000;

/// All names that start so, and go on with a number, are ours.
pub(crate) const TAP_PREFIX: &str = "tn";
const V4_BASE: u32 = u32::from_be_bytes([172, 19, 0, 0]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_follows_from_the_number() {
        let slot = Slot::new(300).unwrap();
        assert_eq!(slot.tap(), "tn300");
        assert_eq!(slot.guest_mac().to_string(), "02:74:6e:00:01:2c");
        assert_eq!(slot.host_mac().to_string(), "02:74:6e:01:01:2c");
        assert_eq!(slot.host_v4().to_string(), "172.19.4.177");
        assert_eq!(slot.guest_v4().to_string(), "172.19.4.178");
        assert_eq!(slot.user(), 1_879_048_492);
        let last = Slot::new(Slot::COUNT - 1).unwrap();
        assert_eq!(last.guest_v4().to_string(), "172.19.255.254");
        assert_eq!(Slot::new(Slot::COUNT), None);
        assert_eq!(Slot::of_guest_v4(slot.guest_v4()), Some(slot));
        assert_eq!(Slot::of_host_v4(slot.host_v4()), Some(slot));
        assert_eq!(Slot::of_guest_v4(slot.host_v4()), None);
        for foreign in [
            "172.18.255.254",
            "172.20.0.2",
            "10.0.0.2",
            "255.255.255.254",
        ] {
            assert_eq!(
                Slot::of_guest_v4(foreign.parse().unwrap()),
                None,
                "{foreign}"
            );
        }
    }

    #[test]
    fn only_our_own_names_are_ours() {
        assert_eq!(Slot::of_tap("tn12"), Slot::new(12));
        for foreign in [
            "tn", "tn012", "tn16384", "tern0", "tnx", "eth0", "tn-1", "tn+1",
        ] {
            assert_eq!(Slot::of_tap(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn a_slot_is_taken_again_after_all_others() {
        let mut slots = Slots::default();
        assert!(slots.claim(Slot(1)) && !slots.claim(Slot(1)));
        assert_eq!(slots.take(), Some(Slot(2)));
        slots.release(Slot(2));
        for expected in (3..Slot::COUNT).chain([0, 2]) {
            assert_eq!(slots.take(), Some(Slot(expected)));
        }
        assert_eq!(slots.take(), None);
        slots.release(Slot(7));
        assert_eq!(slots.take(), Some(Slot(7)));
    }
}
