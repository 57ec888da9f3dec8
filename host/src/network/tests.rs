//! The packet filter against real packets: TAPs in a network namespace, frames written as guests
//! write them.
//!
//! That something does *not* arrive is told without waiting: after what is forbidden something
//! allowed is sent, and must be the first thing to arrive.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use tern_catalog::{HostId, MachineNumber, PrivateAddress, RESOLVER};

use super::tap::VNET_HEADER;
use super::*;

mod flushed;
mod outside;
mod recycled;
mod strangers;

const ORG_A: NetworkId = NetworkId(0xa);
const ORG_B: NetworkId = NetworkId(0xb);
const HOST: HostId = HostId(1);
/// How long anything may take on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a test in a network namespace of its own, which ends with it.
fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)
                .expect("this test needs root, for a network namespace of its own");
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(test());
        });
        if let Err(panic) = run.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn ip(arguments: &str) {
    let status = std::process::Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .expect("this test needs ip: apt-get install iproute2");
    assert!(status.success(), "ip {arguments}");
}

fn port_of(number: u16, network: NetworkId) -> Port {
    let slot = Slot::new(number).unwrap();
    let machine = MachineNumber(u32::from(number) + 100);
    port(
        slot,
        PrivateAddress::of_machine(network, HOST, machine),
        network,
    )
}

/// A guest's end of a TAP.
struct Guest {
    tap: File,
    port: Port,
}

/// With a TAP's other end comes its carrier, and a little later, from a task of the kernel's, its queue.
/// Until then it drops what it should carry.
fn wait_for_carrier(name: &str) {
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        let shown = std::process::Command::new("ip")
            .args(["-o", "link", "show", name])
            .output()
            .unwrap();
        let shown = String::from_utf8(shown.stdout).unwrap();
        if shown.contains("LOWER_UP") && !shown.contains("noop") {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("{name} gets no carrier");
}

/// What arrived.
#[derive(Debug, PartialEq, Eq)]
struct Datagram {
    from: SocketAddr,
    to: SocketAddr,
    text: String,
}

impl Guest {
    fn of(port: Port) -> Self {
        let name = port.slot.tap();
        let tap = tap::open(&name, false).unwrap();
        wait_for_carrier(&name);
        Self { tap, port }
    }

    fn address(&self) -> IpAddr {
        self.port.address.into()
    }

    /// Sends a datagram from port 1000 of its own address.
    fn send(&self, to: impl Into<IpAddr>, port: u16, text: &str) {
        let to = to.into();
        let from = match to {
            IpAddr::V4(_) => self.port.slot.guest_v4().into(),
            IpAddr::V6(_) => self.address(),
        };
        self.send_as(from, to, port, text);
    }

    fn send_as(&self, from: IpAddr, to: IpAddr, port: u16, text: &str) {
        let mac = self.port.slot.host_mac();
        inject(&self.tap, mac.0, &packet(from, to, port, text));
    }

    fn receive(&self) -> Datagram {
        receive(&self.tap)
    }
}

/// Has a TAP receive what [`packet`] made.
fn inject(tap: &File, mac: [u8; 6], packet: &[u8]) {
    let mut frame = vec![0; VNET_HEADER];
    frame.extend(mac);
    frame.extend([2, 0, 0, 0, 0, 9]);
    frame.extend(packet);
    (&*tap).write_all(&frame).unwrap();
}

/// The next datagram that comes out of a TAP.
fn receive(tap: &File) -> Datagram {
    loop {
        let mut frame = [0; 2048];
        let length = read_frame(tap, &mut frame);
        if let Some(datagram) = parse(&frame[VNET_HEADER..length]) {
            return datagram;
        }
    }
}

fn read_frame(mut tap: &File, frame: &mut [u8]) -> usize {
    let mut ready = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
    let count = poll(&mut ready, PollTimeout::try_from(PATIENCE).unwrap()).unwrap();
    assert!(count > 0, "nothing arrives");
    tap.read(frame).unwrap()
}

/// EtherType, IP header, UDP header, text.
fn packet(from: IpAddr, to: IpAddr, port: u16, text: &str) -> Vec<u8> {
    let length = (8 + text.len()) as u16;
    let mut udp = Vec::new();
    for word in [1000, port, length, 0] {
        udp.extend(word.to_be_bytes());
    }
    udp.extend(text.as_bytes());
    let (mut packet, pseudo) = match (from, to) {
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut packet = vec![0x86, 0xdd, 0x60, 0, 0, 0];
            packet.extend(length.to_be_bytes());
            packet.extend([17, 64]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            (packet, [from.octets(), to.octets()].concat())
        }
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut header = vec![0x45, 0];
            header.extend((20 + length).to_be_bytes());
            header.extend([0, 0, 0, 0, 64, 17, 0, 0]);
            header.extend(from.octets());
            header.extend(to.octets());
            let sum = checksum(&header);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            let packet = [vec![0x08, 0x00], header].concat();
            (packet, [from.octets(), to.octets()].concat())
        }
        _ => panic!("two families"),
    };
    let mut summed = pseudo;
    summed.extend([0, 17]);
    summed.extend(length.to_be_bytes());
    summed.extend(&udp);
    udp[6..8].copy_from_slice(&checksum(&summed).to_be_bytes());
    packet.extend(udp);
    packet
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2);
    let mut sum: u32 = words
        .map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

/// A UDP datagram in an Ethernet frame; everything else, such as neighbour discovery, is `None`.
fn parse(frame: &[u8]) -> Option<Datagram> {
    let array = |at: usize| <[u8; 16]>::try_from(frame.get(at..at + 16)?).ok();
    let (from, to, udp): (IpAddr, IpAddr, _) = match frame.get(12..14)? {
        [0x86, 0xdd] if frame[20] == 17 => (array(22)?.into(), array(38)?.into(), &frame[54..]),
        [0x08, 0x00] if frame[23] == 17 => {
            let v4 = |at: usize| <[u8; 4]>::try_from(&frame[at..at + 4]).unwrap();
            (
                Ipv4Addr::from(v4(26)).into(),
                Ipv4Addr::from(v4(30)).into(),
                &frame[34..],
            )
        }
        _ => return None,
    };
    let word = |at: usize| u16::from_be_bytes([udp[at], udp[at + 1]]);
    Some(Datagram {
        from: SocketAddr::new(from, word(0)),
        to: SocketAddr::new(to, word(2)),
        text: String::from_utf8_lossy(&udp[8..usize::from(word(4))]).into_owned(),
    })
}

/// What an agent is given that has never been on this host.
fn setup(data_dir: &Path, nat: bool) -> Setup<'_> {
    Setup {
        outside: Outside {
            nat,
            ..Outside::default()
        },
        data_dir,
        boot_id: "this boot",
        nft: NFT.into(),
    }
}

/// Two Machines of one network, one of another, and the host with its addresses.
async fn world(nat: bool) -> (Network, [Guest; 3]) {
    world_with(|_| {}, nat).await
}

async fn world_with(change: impl FnOnce(&mut Setup<'_>), nat: bool) -> (Network, [Guest; 3]) {
    ip("link set lo up");
    for address in [HOST.address(), RESOLVER, ORG_A.resolver(), ORG_B.resolver()] {
        ip(&format!("addr add {address}/128 dev lo"));
    }
    let data = tempfile::tempdir().unwrap();
    let mut setup = setup(data.path(), nat);
    change(&mut setup);
    let network = Network::open(setup, Vec::new()).await.unwrap();
    // A test that takes long finds the connections that it began.
    for kind in ["udp_timeout", "udp_timeout_stream"] {
        let path = format!("/proc/sys/net/netfilter/nf_conntrack_{kind}");
        std::fs::write(path, "3600").unwrap();
    }
    let ports = [port_of(0, ORG_A), port_of(1, ORG_A), port_of(2, ORG_B)];
    for port in ports {
        network.plug(port).await.unwrap();
    }
    (network, ports.map(Guest::of))
}

fn socket(address: impl Into<IpAddr>, port: u16) -> UdpSocket {
    let socket = UdpSocket::bind((address.into(), port)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn heard(socket: &UdpSocket) -> (String, SocketAddr) {
    let mut buffer = [0; 2048];
    let (length, from) = socket.recv_from(&mut buffer).expect("nothing arrives");
    (
        String::from_utf8_lossy(&buffer[..length]).into_owned(),
        from,
    )
}

#[test]
fn machines_of_one_network_reach_each_other_and_others_do_not() {
    in_namespace(|| async {
        let (_network, [a1, a2, b]) = world(true).await;
        a1.send(a2.address(), 7, "to a neighbour");
        let got = a2.receive();
        assert_eq!(
            (got.text.as_str(), got.from.ip()),
            ("to a neighbour", a1.address())
        );

        a1.send(b.address(), 7, "to another organization");
        b.send(a1.address(), 7, "and back");
        let host = socket(HOST.address(), 0);
        for guest in [&a1, &b] {
            host.send_to(b"from the gate", (guest.address(), 8080))
                .unwrap();
            let got = guest.receive();
            assert_eq!(
                (got.text.as_str(), got.from.ip()),
                ("from the gate", HOST.address().into())
            );
        }
    });
}

#[test]
fn spoofed_sources_are_dropped() {
    in_namespace(|| async {
        let (_network, [a1, a2, b]) = world(true).await;
        let lies: [IpAddr; 6] = [
            b.address(),
            a2.address(),
            HOST.address().into(),
            RESOLVER.into(),
            "fe80::1".parse().unwrap(),
            "2001:db8::1".parse().unwrap(),
        ];
        for lie in lies {
            a1.send_as(lie, a2.address(), 7, "a lie");
            a1.send_as(lie, b.address(), 7, "a lie");
            a1.send_as(lie, RESOLVER.into(), 53, "a lie");
        }
        let other_v4 = a2.port.slot.guest_v4().into();
        a1.send_as(other_v4, RESOLVER_V4.into(), 53, "a lie");
        let resolver = socket(RESOLVER, 53);
        for lie in lies {
            a1.send_as(lie, RESOLVER.into(), 53, "a lie");
        }
        a1.send(RESOLVER, 53, "the truth");
        assert_eq!(
            heard(&resolver),
            ("the truth".into(), (a1.address(), 1000).into())
        );
        a1.send(a2.address(), 7, "the truth");
        assert_eq!(a2.receive().text, "the truth");
        socket(HOST.address(), 0)
            .send_to(b"the truth", (b.address(), 7))
            .unwrap();
        assert_eq!(b.receive().text, "the truth");
    });
}

/// An address of the host's, for IPv4.
const RESOLVER_V4: Ipv4Addr = Ipv4Addr::new(172, 19, 0, 1);

#[test]
fn the_host_is_closed_but_for_the_resolver_and_replies() {
    in_namespace(|| async {
        let (_network, [a1, _a2, b]) = world(true).await;
        let service = socket(HOST.address(), 4280);
        let own_resolver = socket(ORG_A.resolver(), 53);
        let elsewhere = socket(ORG_A.resolver(), 54);
        let gateway = socket(a1.port.slot.host_v4(), 4280);
        a1.send(HOST.address(), 4280, "to the host");
        a1.send(ORG_A.resolver(), 54, "to another port");
        a1.send(a1.port.slot.host_v4(), 4280, "over IPv4");
        b.send(ORG_A.resolver(), 53, "of another network");
        a1.send(ORG_A.resolver(), 53, "a question");
        assert_eq!(heard(&own_resolver).0, "a question");
        // A reply may pass: the host has spoken first.
        service.send_to(b"hello", (a1.address(), 1000)).unwrap();
        assert_eq!(a1.receive().text, "hello");
        a1.send(HOST.address(), 4280, "a reply");
        assert_eq!(heard(&service).0, "a reply");
        for silent in [&elsewhere, &gateway] {
            silent.set_nonblocking(true).unwrap();
            assert!(silent.recv(&mut [0; 9]).is_err());
        }
    });
}

#[test]
fn the_outside_is_reached_under_the_hosts_address_and_nothing_else_over_ipv4() {
    in_namespace(|| async {
        let (_network, [a1, a2, _b]) = world(true).await;
        let uplink = uplink();
        a1.send(a2.port.slot.guest_v4(), 7, "to another Machine");
        a1.send(
            Ipv4Addr::new(169, 254, 169, 254),
            80,
            "to the cloud's secrets",
        );
        a1.send(
            "2001:db8::1".parse::<IpAddr>().unwrap(),
            7,
            "IPv6 is not masqueraded",
        );
        a1.send(OUTSIDE, 7, "to the outside");
        let got = receive(&uplink);
        assert_eq!(got.text, "to the outside");
        assert_eq!(got.from.ip(), UPLINK, "masqueraded");
        // The reply finds its way back.
        let mut reply = packet(OUTSIDE.into(), UPLINK, got.from.port(), "a reply");
        let ports = 2 + 20;
        reply[ports..ports + 2].copy_from_slice(&7u16.to_be_bytes());
        reply[ports + 6..ports + 8].fill(0);
        inject(&uplink, UPLINK_MAC, &reply);
        let got = a1.receive();
        assert_eq!(
            (got.text.as_str(), got.to.ip()),
            ("a reply", a1.port.slot.guest_v4().into())
        );
        socket(HOST.address(), 0)
            .send_to(b"first", (a2.address(), 7))
            .unwrap();
        assert_eq!(a2.receive().text, "first");
    });
}

#[test]
fn without_nat_there_is_no_outside() {
    in_namespace(|| async {
        let (_network, [a1, _a2, _b]) = world(false).await;
        let uplink = uplink();
        a1.send(OUTSIDE, 7, "to the outside");
        let host = UdpSocket::bind((UPLINK, 0)).unwrap();
        host.send_to(b"from the host", (OUTSIDE, 7)).unwrap();
        assert_eq!(receive(&uplink).text, "from the host");
    });
}

const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 9);
const UPLINK: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1));
const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// The host's way out, played by a TAP of another name.
fn uplink() -> File {
    let file = tap::open("up0", false).unwrap();
    ip("link set up0 address 02:00:00:00:00:01 up");
    wait_for_carrier("up0");
    ip("addr add 198.51.100.1/24 dev up0");
    ip("neigh add 198.51.100.9 lladdr 02:00:00:00:00:09 dev up0");
    ip("route add default via 198.51.100.9");
    ip("-6 addr add 2001:db8:1::1/64 dev up0 nodad");
    ip("-6 neigh add 2001:db8:1::9 lladdr 02:00:00:00:00:09 dev up0");
    ip("-6 route add default via 2001:db8:1::9");
    file
}

#[test]
fn what_a_machine_had_is_removed_with_it() {
    in_namespace(|| async {
        let (network, [a1, a2, b]) = world(true).await;
        let list = |what: &[&str]| {
            let output = std::process::Command::new(what[0])
                .args(&what[1..])
                .output()
                .unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        let rules = || list(&["nft", "list", "table", "inet", "tern"]);
        assert!(rules().contains("\"tn0\""), "{}", rules());
        let slot = a1.port.slot;
        network.unplug(slot).await.unwrap();
        assert!(
            !rules().contains("\"tn0\"") && rules().contains("\"tn1\""),
            "{}",
            rules()
        );
        assert!(!list(&["ip", "link"]).contains("tn0"));
        assert!(!list(&["ip", "-6", "route"]).contains("tn0"));
        network.unplug(slot).await.unwrap();

        // Somebody flushes the whole rule set: the next change puts everything back, if nothing else has.
        list(&["nft", "flush", "ruleset"]);
        network.plug(port_of(5, ORG_B)).await.unwrap();
        assert!(
            rules().contains("\"tn5\"") && rules().contains("\"tn1\""),
            "{}",
            rules()
        );
        a2.send(b.address(), 7, "to another organization");
        socket(HOST.address(), 0)
            .send_to(b"allowed", (b.address(), 7))
            .unwrap();
        assert_eq!(b.receive().text, "allowed");

        // A device of nobody's goes; what only looks like one stays.
        drop((a2, b));
        drop(tap::open("tn77", true).unwrap());
        drop(tap::open("tn077", true).unwrap());
        assert_eq!(network.sweep().await.unwrap(), 1);
        let links = list(&["ip", "link"]);
        assert!(!links.contains("tn77") && links.contains("tn077") && links.contains("tn5"));

        // Its owner would put the table back.
        drop(network);
        remove_all().await.unwrap();
        assert!(!list(&["nft", "list", "tables"]).contains("tern"));
        assert!(!list(&["ip", "link"]).contains("tn5"));
    });
}

#[test]
fn an_agent_that_comes_back_takes_devices_and_rules_up_again() {
    in_namespace(|| async {
        let (network, [a1, a2, _b]) = world(true).await;
        drop(network);
        let ports = [a1.port, a2.port];
        let data = tempfile::tempdir().unwrap();
        let opened = Network::open(setup(data.path(), true), ports.to_vec());
        let network = opened.await.unwrap();
        for port in ports {
            network.plug(port).await.unwrap();
        }
        assert_eq!(network.take_slot().unwrap(), Slot::new(2).unwrap());
        a1.send(a2.address(), 7, "still here");
        assert_eq!(a2.receive().text, "still here");
    });
}

#[test]
fn a_frame_that_calls_is_noticed_and_passed_on() {
    in_namespace(|| async {
        let (_network, [a1, a2, _b]) = world(true).await;
        // It sleeps: nobody has its TAP open.
        let port = a2.port;
        let monitors_header: libc::c_int = 12;
        // SAFETY: the descriptor is open, and the number lives through the call.
        unsafe { tap::tun_set_vnet_header_size(a2.tap.as_raw_fd(), &monitors_header) }.unwrap();
        drop(a2);
        let calls = bell::Calls {
            address: port.address,
            tcp: [80].into(),
            udp: [7].into(),
        };
        let listening = tokio::spawn(async move { bell::listen(port.slot, &calls).await });
        tokio::task::yield_now().await;
        wait_for_carrier(&port.slot.tap());
        a1.send(port.address, 9, "not a service");
        a1.send(port.address, 7, "a call");
        let frame = listening.await.unwrap().unwrap();
        let called = Datagram {
            from: (a1.address(), 1000).into(),
            to: (port.address, 7).into(),
            text: "a call".into(),
        };
        assert_eq!(parse(&frame), Some(called));
        // The TAP is free for a monitor, whose guest finds the frame.
        let awake = Guest::of(port);
        bell::deliver(port.slot, &frame).unwrap();
        assert_eq!(awake.receive().text, "a call");
    });
}

#[test]
fn calls_over_the_private_network_are_counted_and_what_the_host_says_is_not() {
    in_namespace(|| async {
        let (_network, [a1, a2, b]) = world(true).await;
        let services = |port: &Port, udp| meter::Services {
            address: port.address,
            tcp: BTreeSet::new(),
            udp: BTreeSet::from([udp]),
        };
        let metered =
            |guest: &Guest| meter::Meter::open(guest.port.slot, &services(&guest.port, 7)).unwrap();
        let (meter, other) = (metered(&a2), metered(&a1));
        let host = socket(HOST.address(), 0);
        host.send_to(b"a health check", (a2.address(), 7)).unwrap();
        assert_eq!(a2.receive().text, "a health check");
        a1.send(a2.address(), 8, "no service");
        assert_eq!(a2.receive().text, "no service");
        b.send(a2.address(), 7, "of another network");
        assert_eq!(meter.take().unwrap(), 0);
        // More than its buffer holds are counted all the same.
        for n in 0..100 {
            a1.send(a2.address(), 7, &format!("call {n}"));
            assert_eq!(a2.receive().text, format!("call {n}"));
        }
        assert_eq!(meter.take().unwrap(), 100);
        assert_eq!(meter.take().unwrap(), 0);
        a1.send(a2.address(), 7, "one more");
        assert_eq!(a2.receive().text, "one more");
        assert_eq!(meter.take().unwrap(), 1);
        assert_eq!(other.take().unwrap(), 0, "what it asks of others");
    });
}
