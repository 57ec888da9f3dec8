//! What Machines reach beyond the private network.

use super::*;

const HTTPS: u16 = 443;
const UPLINK6: &str = "2001:db8:1::1";

/// Waits for the refusal of a packet to `to`: ICMP "administratively prohibited", with the packet's header.
fn is_refused(guest: &Guest, to: Ipv4Addr) {
    loop {
        let mut frame = [0; 2048];
        let length = read_frame(&guest.tap, &mut frame);
        let frame = &frame[VNET_HEADER..length];
        if frame[12..14] == [8, 0] && frame[23] == 1 && frame[34..36] == [3, 13] {
            assert_eq!(frame[42 + 16..42 + 20], to.octets());
            return;
        }
    }
}

#[test]
fn private_and_special_destinations_are_refused() {
    in_namespace(|| async {
        let (_network, [a1, _a2, _b]) = world(true).await;
        let uplink = uplink();
        std::fs::write("/proc/sys/net/ipv4/icmp_ratelimit", "0").unwrap();
        for special in [
            [10, 0, 0, 5],
            [192, 168, 1, 1],
            [172, 20, 0, 1],
            [100, 100, 100, 200],
            [169, 254, 169, 254],
            [168, 63, 129, 16],
            [198, 18, 0, 1],
            [192, 0, 0, 192],
            [240, 0, 0, 1],
        ] {
            let to = Ipv4Addr::from(special);
            a1.send(to, 80, "to somebody's inside");
            is_refused(&a1, to);
        }
        a1.send(Ipv4Addr::new(224, 0, 0, 251), 5353, "to a group");
        a1.send(Ipv4Addr::BROADCAST, 67, "to all");
        a1.send(OUTSIDE, 7, "to the outside");
        assert_eq!(receive(&uplink).text, "to the outside");
    });
}

#[test]
fn what_the_owner_allows_is_reached() {
    in_namespace(|| async {
        let allow = |setup: &mut Setup<'_>| {
            let prefixes = ["10.1.0.0/16", "10.1.2.0/24", "192.168.1.5", "0.0.0.0/32"];
            setup.outside.allowed = prefixes.map(|p| p.parse().unwrap()).to_vec();
        };
        let (_network, [a1, a2, _b]) = world_with(allow, true).await;
        let uplink = uplink();
        let closed = [[10, 2, 0, 1], [192, 168, 1, 6], [169, 254, 169, 254]];
        for to in closed.map(Ipv4Addr::from) {
            a1.send(to, 80, "to what is not allowed");
            is_refused(&a1, to);
        }
        a1.send(a2.port.slot.guest_v4(), 7, "to another Machine");
        for to in [[10, 1, 2, 3], [192, 168, 1, 5]].map(Ipv4Addr::from) {
            a1.send(to, 80, "to what is allowed");
            let got = receive(&uplink);
            assert_eq!((got.from.ip(), got.to), (UPLINK, (to, 80).into()));
        }
    });
}

#[test]
fn the_hosts_public_ports_are_open_to_machines_and_nothing_else_is() {
    in_namespace(|| async {
        let uplink = uplink();
        ip("addr add 10.9.9.9/32 dev lo");
        let listen = |setup: &mut Setup<'_>| {
            let listeners = ["[::]:443", "198.51.100.1:80", "127.0.0.1:4280"];
            setup.outside.public = listeners.map(|l| l.parse().unwrap()).to_vec();
        };
        let (_network, [a1, _a2, _b]) = world_with(listen, true).await;
        let (public, public6) = (UPLINK, UPLINK6.parse::<IpAddr>().unwrap());
        let gateway = IpAddr::from(a1.port.slot.host_v4());
        let closed = [
            (HOST.address().into(), HTTPS),
            (RESOLVER.into(), HTTPS),
            (ORG_A.resolver().into(), 80),
            (gateway, HTTPS),
            (gateway, 80),
            (public, 4280),
            (public6, 4280),
            // There the edge does not listen.
            (public6, 80),
            (Ipv4Addr::new(10, 9, 9, 9).into(), 80),
        ]
        .map(|(address, port)| socket(address, port));
        for to in closed.iter().map(|socket| socket.local_addr().unwrap()) {
            a1.send(to.ip(), to.port(), "to the inside");
        }
        a1.send(GATEWAY, HTTPS, "to the inside");
        for (to, port) in [(public, HTTPS), (public6, HTTPS), (public, 80)] {
            let edge = socket(to, port);
            a1.send(to, port, "to the edge");
            let (text, from) = heard(&edge);
            assert_eq!(text, "to the edge");
            edge.send_to(b"a reply", from).unwrap();
            let got = a1.receive();
            assert_eq!(
                (got.text.as_str(), got.from),
                ("a reply", (to, port).into())
            );
        }
        for silent in &closed {
            silent.set_nonblocking(true).unwrap();
            assert!(silent.recv(&mut [0; 9]).is_err(), "{silent:?}");
        }
        drop(uplink);
    });
}

#[test]
fn a_machine_leaves_room_for_the_connections_of_others() {
    in_namespace(|| async {
        let uplink = uplink();
        let (network, [a1, a2, _b]) = world(true).await;
        let first = 10_000;
        let last = first + rules::CONNECTIONS as u16;
        for port in first..last {
            a1.send(OUTSIDE, port, "one of many");
            assert_eq!(receive(&uplink).to.port(), port);
        }
        let next = || receive(&uplink);
        a1.send(OUTSIDE, last, "one too many");
        a1.send(RESOLVER, 53, "one too many");
        a1.send(OUTSIDE, first, "an old one");
        assert_eq!(next().text, "an old one");
        a2.send(OUTSIDE, last, "another Machine's");
        assert_eq!(next().text, "another Machine's");
        let host = socket(HOST.address(), 0);
        host.send_to(b"from the gate", (a1.address(), 7)).unwrap();
        assert_eq!(a1.receive().text, "from the gate");
        // Its successor begins anew.
        network.unplug(a1.port.slot).await.unwrap();
        let port = a1.port;
        drop(a1);
        network.plug(port).await.unwrap();
        let again = Guest::of(port);
        again.send(OUTSIDE, last, "anew");
        assert_eq!(next().text, "anew");
    });
}
