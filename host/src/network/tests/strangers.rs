//! What comes in by an uplink: private addresses, and what is for others.

use super::*;

const STRANGER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 66);
/// Behind another device of the host's.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 5);
const ELSEWHERE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

fn forge(uplink: &File, from: impl Into<IpAddr>, to: impl Into<IpAddr>, port: u16) {
    inject(
        uplink,
        UPLINK_MAC,
        &packet(from.into(), to.into(), port, "forged"),
    );
}

/// A device of the host's owner, with a network behind it.
fn owners_device(name: &str) -> File {
    let file = tap::open(name, false).unwrap();
    ip(&format!("link set {name} address 02:00:00:00:00:02 up"));
    wait_for_carrier(name);
    ip(&format!("addr add 203.0.113.1/24 dev {name}"));
    ip(&format!(
        "neigh add {ELSEWHERE} lladdr 02:00:00:00:00:05 dev {name}"
    ));
    ip(&format!("-6 addr add 2001:db8:2::1/64 dev {name} nodad"));
    ip(&format!(
        "-6 neigh add 2001:db8:2::5 lladdr 02:00:00:00:00:05 dev {name}"
    ));
    file
}

/// The switches as they are on a host that nobody has made a router. A new namespace has some of its
/// parent's.
fn no_router() {
    for switch in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{switch}"), "0").unwrap();
    }
}

fn mac_of(name: &str) -> [u8; 6] {
    let shown = std::process::Command::new("ip")
        .args(["-o", "link", "show", name])
        .output()
        .unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    let (_, mac) = shown.split_once("link/ether ").unwrap();
    let bytes: Vec<u8> = mac[..17]
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    bytes.try_into().unwrap()
}

#[test]
fn private_sources_from_outside_are_dropped() {
    in_namespace(|| async {
        let uplink = uplink();
        let (_network, [a1, a2, b]) = world(true).await;
        let resolver = socket(RESOLVER, 53);
        let own_resolver = socket(ORG_A.resolver(), 53);
        let host = socket(HOST.address(), 4280);
        let lies: [IpAddr; 7] = [
            a2.address(),
            a1.address(),
            HOST.address().into(),
            RESOLVER.into(),
            ORG_A.resolver().into(),
            PrivateAddress::of_peer(ORG_A, HostId(2), MachineNumber(7)).into(),
            // Nobody's lie, to an address that only the inside may name.
            "2001:db8:1::9".parse().unwrap(),
        ];
        for lie in lies {
            for (to, port) in [
                (a1.address(), 7),
                (b.address(), 7),
                (RESOLVER.into(), 53),
                (ORG_A.resolver().into(), 53),
                (HOST.address().into(), 4280),
            ] {
                forge(&uplink, lie, to, port);
            }
        }
        a1.send(RESOLVER, 53, "the truth");
        a1.send(ORG_A.resolver(), 53, "the truth");
        for listener in [&resolver, &own_resolver] {
            assert_eq!(
                heard(listener),
                ("the truth".into(), (a1.address(), 1000).into())
            );
        }
        let near = socket(HOST.address(), 0);
        near.send_to(b"the truth", (HOST.address(), 4280)).unwrap();
        assert_eq!(heard(&host).0, "the truth");
        for guest in [&a1, &b] {
            near.send_to(b"the truth", (guest.address(), 7)).unwrap();
            assert_eq!(guest.receive().text, "the truth");
        }
    });
}

#[test]
fn machines_ipv4_addresses_mean_nothing_outside() {
    in_namespace(|| async {
        let uplink = uplink();
        let (_network, [a1, a2, _b]) = world(true).await;
        let gateway = a1.port.slot.host_v4();
        let at_gateway = socket(gateway, 4280);
        let public = UdpSocket::bind((UPLINK, 4280)).unwrap();
        for (from, to) in [
            (a2.port.slot.guest_v4(), gateway),
            (STRANGER, gateway),
            (STRANGER, a1.port.slot.guest_v4()),
            (a2.port.slot.guest_v4(), a1.port.slot.guest_v4()),
        ] {
            forge(&uplink, from, to, 4280);
        }
        let IpAddr::V4(own) = UPLINK else { panic!() };
        forge(&uplink, a1.port.slot.guest_v4(), own, 4280);
        forge(&uplink, STRANGER, own, 4280);
        assert_eq!(
            heard(&public).1.ip(),
            STRANGER,
            "the only one that is no lie"
        );
        let near = socket(gateway, 0);
        near.send_to(b"the truth", (gateway, 4280)).unwrap();
        assert_eq!(heard(&at_gateway).0, "the truth");
        near.send_to(b"the truth", (a1.port.slot.guest_v4(), 7))
            .unwrap();
        assert_eq!(a1.receive().text, "the truth");
    });
}

#[test]
fn the_mesh_is_entered_by_machines_alone() {
    in_namespace(|| async {
        let uplink = uplink();
        let (_network, [a1, _a2, _b]) = world(true).await;
        let mesh = tap::open("tern0", false).unwrap();
        ip("link set tern0 up");
        ip("-6 route add fdaa::/16 dev tern0");
        let laptop = PrivateAddress::of_peer(ORG_A, HOST, MachineNumber(5));
        let public = "2001:db8:9::5".parse::<IpAddr>().unwrap();
        for behind in [laptop.into(), public] {
            ip(&format!(
                "-6 neigh add {behind} lladdr 02:00:00:00:00:05 dev tern0"
            ));
        }
        ip("-6 route add 2001:db8:9::/64 dev tern0");
        wait_for_carrier("tern0");
        for lie in [
            a1.address(),
            HOST.address().into(),
            "2001:db8:1::9".parse().unwrap(),
        ] {
            forge(&uplink, lie, laptop, 7);
            forge(&uplink, lie, public, 7);
        }
        a1.send(laptop, 7, "the truth");
        let got = receive(&mesh);
        assert_eq!(
            (got.text.as_str(), got.from.ip()),
            ("the truth", a1.address())
        );

        // And it is left by nobody to the outside.
        let mac = mac_of("tern0");
        let outside: IpAddr = "2001:db8:1::9".parse().unwrap();
        inject(&mesh, mac, &packet(laptop.into(), outside, 7, "outwards"));
        inject(
            &mesh,
            mac,
            &packet("2001:db8:9::5".parse().unwrap(), a1.address(), 7, "foreign"),
        );
        inject(
            &mesh,
            mac,
            &packet(laptop.into(), a1.address(), 7, "the truth"),
        );
        assert_eq!(a1.receive().text, "the truth");
        let host = UdpSocket::bind("[2001:db8:1::1]:0").unwrap();
        host.send_to(b"from the host", (outside, 7)).unwrap();
        assert_eq!(receive(&uplink).text, "from the host");
    });
}

#[test]
fn a_host_that_was_no_router_does_not_become_one() {
    in_namespace(|| async {
        no_router();
        let (uplink, own) = (uplink(), owners_device("own0"));
        let (_network, [_a1, _a2, _b]) = world(true).await;
        forge(&uplink, STRANGER, ELSEWHERE, 7);
        forge(
            &uplink,
            "2001:db8:1::66".parse::<IpAddr>().unwrap(),
            "2001:db8:2::5".parse::<IpAddr>().unwrap(),
            7,
        );
        // The owner's network goes out, and gets replies.
        for (inside, outside) in [
            (IpAddr::from(ELSEWHERE), IpAddr::from(OUTSIDE)),
            (
                "2001:db8:2::5".parse().unwrap(),
                "2001:db8:1::9".parse().unwrap(),
            ),
        ] {
            inject(
                &own,
                ELSEWHERE_MAC,
                &packet(inside, outside, 1000, "a question"),
            );
            assert_eq!(receive(&uplink).text, "a question");
            inject(
                &uplink,
                UPLINK_MAC,
                &packet(outside, inside, 1000, "an answer"),
            );
            assert_eq!(
                receive(&own).text,
                "an answer",
                "and nothing of a stranger's"
            );
        }
        // What the owner translates comes in.
        let rules = "add table ip owner; add chain ip owner in { type nat hook prerouting priority dstnat; }; \
             add rule ip owner in udp dport 8080 dnat to 203.0.113.5";
        rules::apply(NFT.as_ref(), rules).await.unwrap();
        let IpAddr::V4(public) = UPLINK else { panic!() };
        forge(&uplink, STRANGER, ELSEWHERE, 9);
        forge(&uplink, STRANGER, public, 8080);
        let got = receive(&own);
        assert_eq!(got.to, (ELSEWHERE, 8080).into());
    });
}

#[test]
fn a_host_that_was_a_router_stays_one() {
    in_namespace(|| async {
        no_router();
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        let (uplink, own) = (uplink(), owners_device("own0"));
        let data = tempfile::tempdir().unwrap();
        let network = Network::open(setup(data.path(), true), Vec::new())
            .await
            .unwrap();
        let to_elsewhere6 = || {
            let (from, to) = ("2001:db8:1::66", "2001:db8:2::5");
            forge(
                &uplink,
                from.parse::<IpAddr>().unwrap(),
                to.parse::<IpAddr>().unwrap(),
                7,
            );
        };
        to_elsewhere6();
        forge(&uplink, STRANGER, ELSEWHERE, 7);
        let got = receive(&own);
        assert_eq!(
            (got.from.ip(), got.to.ip()),
            (STRANGER.into(), ELSEWHERE.into())
        );
        // The next agent finds both switches on, and remembers who did it.
        drop(network);
        let _network = Network::open(setup(data.path(), true), Vec::new())
            .await
            .unwrap();
        to_elsewhere6();
        forge(&uplink, STRANGER, ELSEWHERE, 8);
        assert_eq!(receive(&own).to, (ELSEWHERE, 8).into());
    });
}

#[test]
fn an_uplink_that_comes_later_is_one_too() {
    in_namespace(|| async {
        no_router();
        let own = owners_device("own0");
        let (_network, [_a1, _a2, _b]) = world(true).await;
        let uplinks = || flushed::nft("list set inet tern uplinks");
        assert!(!uplinks().contains("up0"));
        let uplink = uplink();
        flushed::until("it is known", || uplinks().contains("\"up0\"")).await;
        forge(&uplink, STRANGER, ELSEWHERE, 7);
        inject(
            &own,
            ELSEWHERE_MAC,
            &packet(ELSEWHERE.into(), OUTSIDE.into(), 1000, "a question"),
        );
        assert_eq!(receive(&uplink).text, "a question");
        let answer = packet(OUTSIDE.into(), ELSEWHERE.into(), 1000, "an answer");
        inject(&uplink, UPLINK_MAC, &answer);
        assert_eq!(receive(&own).text, "an answer");
        drop(uplink);
        flushed::until("it is gone", || !uplinks().contains("up0")).await;
    });
}
