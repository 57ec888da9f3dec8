//! Who may speak to whom.
//!
//! A packet stays within its network. Two things stand beside the networks: the resolver, which
//! every network may ask at `fdaa::3` and at `<net>::3`, and network 0, in which hosts speak to hosts.
//! That the source belongs to the peer that sent it is the engine's to see, before it asks here.

use tern_catalog::{HostId, INFRASTRUCTURE, PrivateAddress, RESOLVER};

use crate::packet::{Header, ICMPV6, TCP, UDP};

/// Ports of a host that its networks may reach at the resolver's address: names, and the API.
/// Whatever else listens on that host is no business of a laptop's.
const RESOLVER_PORTS: [(u8, u16); 3] = [(UDP, 53), (TCP, 53), (TCP, 4280)];

/// Why a packet may not pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Not from and to `fdaa::/16`.
    Foreign,
    /// To another network.
    OtherNetwork,
    /// To a port that the resolver's address does not offer.
    Service,
    /// From elsewhere to elsewhere: this host carries only what its own Machines and laptops say or hear.
    Transit,
}

/// Judges what came out of the tunnel from a peer that owns the source.
pub(crate) fn incoming(header: &Header, sender_is_host: bool) -> Result<(), Refusal> {
    let source = PrivateAddress::parse(header.source).ok_or(Refusal::Foreign)?;
    let destination = PrivateAddress::parse(header.destination).ok_or(Refusal::Foreign)?;
    if source.network == INFRASTRUCTURE {
        let allowed = sender_is_host && destination.network == INFRASTRUCTURE;
        return allowed.then_some(()).ok_or(Refusal::OtherNetwork);
    }
    if header.destination == RESOLVER || header.destination == source.network.resolver() {
        return offered(header).then_some(()).ok_or(Refusal::Service);
    }
    (destination.network == source.network)
        .then_some(())
        .ok_or(Refusal::OtherNetwork)
}

/// Judges what this host is about to send to the peer that owns the destination.
pub(crate) fn outgoing(
    header: &Header,
    ours: HostId,
    receiver_is_host: bool,
) -> Result<(), Refusal> {
    let source = PrivateAddress::parse(header.source).ok_or(Refusal::Foreign)?;
    let destination = PrivateAddress::parse(header.destination).ok_or(Refusal::Foreign)?;
    if header.source == RESOLVER || header.source == source.network.resolver() {
        // An answer. Hosts do not ask each other's resolvers.
        let allowed = !receiver_is_host
            && (header.source == RESOLVER || source.network == destination.network);
        return allowed.then_some(()).ok_or(Refusal::OtherNetwork);
    }
    if source.host != ours && receiver_is_host {
        return Err(Refusal::Transit);
    }
    let allowed = source.network == destination.network
        && (source.network != INFRASTRUCTURE || receiver_is_host);
    allowed.then_some(()).ok_or(Refusal::OtherNetwork)
}

fn offered(header: &Header) -> bool {
    header.next == ICMPV6
        || (header.port).is_some_and(|port| RESOLVER_PORTS.contains(&(header.next, port)))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use tern_catalog::{MachineNumber, NetworkId};

    use super::*;

    const OURS: HostId = HostId(1);

    fn machine(network: u32, host: u32, number: u32) -> Ipv6Addr {
        PrivateAddress::of_machine(NetworkId(network), HostId(host), MachineNumber(number))
    }

    fn packet(source: Ipv6Addr, destination: Ipv6Addr) -> Header {
        to_port(source, destination, TCP, 8080)
    }

    fn to_port(source: Ipv6Addr, destination: Ipv6Addr, next: u8, port: u16) -> Header {
        let port = Some(port).filter(|_| next != ICMPV6);
        Header {
            source,
            destination,
            next,
            port,
        }
    }

    #[test]
    fn a_network_is_closed_both_ways() {
        let (a, b, other) = (machine(1, 1, 5), machine(1, 2, 6), machine(2, 1, 5));
        assert_eq!(incoming(&packet(b, a), true), Ok(()));
        assert_eq!(outgoing(&packet(a, b), OURS, true), Ok(()));
        assert_eq!(
            incoming(&packet(b, other), true),
            Err(Refusal::OtherNetwork)
        );
        assert_eq!(
            outgoing(&packet(other, b), OURS, true),
            Err(Refusal::OtherNetwork)
        );
    }

    #[test]
    fn infrastructure_is_for_hosts_alone() {
        let (us, them) = (HostId(1).address(), HostId(2).address());
        assert_eq!(incoming(&packet(them, us), true), Ok(()));
        assert_eq!(outgoing(&packet(us, them), OURS, true), Ok(()));
        let laptop = machine(1, 1, 5);
        assert_eq!(
            incoming(&packet(them, us), false),
            Err(Refusal::OtherNetwork)
        );
        assert_eq!(
            incoming(&packet(laptop, us), false),
            Err(Refusal::OtherNetwork)
        );
        assert_eq!(
            incoming(&packet(them, laptop), true),
            Err(Refusal::OtherNetwork)
        );
        assert_eq!(
            outgoing(&packet(us, laptop), OURS, false),
            Err(Refusal::OtherNetwork)
        );
    }

    #[test]
    fn the_resolver_may_be_asked_and_answers() {
        let laptop = machine(7, 1, 5);
        for resolver in [RESOLVER, NetworkId(7).resolver()] {
            for (next, port, expected) in [
                (UDP, 53, Ok(())),
                (TCP, 53, Ok(())),
                (TCP, 4280, Ok(())),
                (ICMPV6, 0, Ok(())),
                (TCP, 22, Err(Refusal::Service)),
                (UDP, 4280, Err(Refusal::Service)),
                (44, 53, Err(Refusal::Service)), // a fragment
            ] {
                let question = to_port(laptop, resolver, next, port);
                assert_eq!(incoming(&question, false), expected, "{question:?}");
            }
            let answer = to_port(resolver, laptop, UDP, 40000);
            assert_eq!(outgoing(&answer, OURS, false), Ok(()));
            assert_eq!(outgoing(&answer, OURS, true), Err(Refusal::OtherNetwork));
        }
        let other = to_port(laptop, NetworkId(8).resolver(), UDP, 53);
        assert_eq!(incoming(&other, false), Err(Refusal::OtherNetwork));
        let leak = to_port(NetworkId(8).resolver(), laptop, UDP, 40000);
        assert_eq!(outgoing(&leak, OURS, false), Err(Refusal::OtherNetwork));
    }

    #[test]
    fn this_host_carries_nothing_between_others() {
        let header = packet(machine(1, 2, 5), machine(1, 3, 6));
        assert_eq!(outgoing(&header, OURS, true), Err(Refusal::Transit));
        let to_our_laptop = packet(machine(1, 2, 5), machine(1, 1, 6));
        assert_eq!(outgoing(&to_our_laptop, OURS, false), Ok(()));
    }

    #[test]
    fn the_outside_stays_outside() {
        let outside: Ipv6Addr = "2001:db8::1".parse().unwrap();
        let inside = machine(1, 1, 5);
        for (s, d) in [
            (outside, inside),
            (inside, outside),
            ("ff02::1".parse().unwrap(), inside),
        ] {
            assert_eq!(incoming(&packet(s, d), true), Err(Refusal::Foreign));
            assert_eq!(outgoing(&packet(s, d), OURS, true), Err(Refusal::Foreign));
        }
    }
}
