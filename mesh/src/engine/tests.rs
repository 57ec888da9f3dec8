//! Engines back to back, laptops, and somebody on the wire.

use std::collections::VecDeque;
use std::net::Ipv6Addr;

use blake2::digest::{FixedOutput as _, KeyInit as _, Update as _};
use blake2::{Blake2s256, Blake2sMac, Digest as _};
use boringtun::noise::Tunn;
use proptest::prelude::*;
use tern_catalog::{MachineNumber, NetworkId, RESOLVER};

use super::*;
use crate::packet::{HEADER, ICMPV6, TCP, UDP, build};

/// What an engine sent, in order.
#[derive(Default)]
struct Sent {
    datagrams: VecDeque<(Path, Vec<u8>)>,
    packets: Vec<Vec<u8>>,
}

impl Sink for Sent {
    fn send(&mut self, path: Path, datagram: &[u8]) {
        self.datagrams.push_back((path, datagram.to_vec()));
    }

    fn deliver(&mut self, packet: &[u8]) {
        self.packets.push(packet.to_vec());
    }
}

/// A host, its time, and what it sent.
struct Host {
    engine: Engine,
    key: PublicKey,
    now: Instant,
    sent: Sent,
    /// Its place in the outer network.
    place: SocketAddr,
}

/// A stock client: one tunnel, no policy of its own.
struct Laptop {
    tunn: Tunn,
    key: PublicKey,
    path: Path,
    received: Vec<Vec<u8>>,
    /// All it ever sent, as somebody on the wire would have it.
    seen: Vec<Vec<u8>>,
}

fn new_key() -> MeshKey {
    let dir = tempfile::tempdir().unwrap();
    MeshKey::load_or_create(&dir.path().join("key")).unwrap()
}

fn place(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 51820))
}

fn machine(network: u32, host: u32, number: u32) -> Ipv6Addr {
    PrivateAddress::of_machine(NetworkId(network), HostId(host), MachineNumber(number))
}

fn laptop_grant(network: u32, number: u32) -> Grant {
    let (network, number) = (NetworkId(network), MachineNumber(number));
    Grant::Laptop { network, number }
}

fn text(source: Ipv6Addr, destination: Ipv6Addr, content: &str) -> Vec<u8> {
    build(source, destination, TCP, content.as_bytes())
}

impl Host {
    fn new(id: u32) -> Self {
        let (key, now) = (new_key(), Instant::now());
        Self {
            engine: Engine::new(&key, HostId(id), now),
            key: key.public_key(),
            now,
            sent: Sent::default(),
            place: place(id as u8),
        }
    }

    /// Host 1 with these laptops as its peers.
    fn with(laptops: &[(&Laptop, Grant)]) -> Self {
        let mut host = Self::new(1);
        host.allow(laptops);
        host
    }

    fn allow(&mut self, laptops: &[(&Laptop, Grant)]) {
        let grants: Vec<_> = laptops.iter().map(|(l, g)| (l.key, *g)).collect();
        self.engine.set_peers(self.now, &grants);
    }

    fn grant(&self) -> (PublicKey, Grant) {
        let id = self.engine.host;
        let endpoint = self.place;
        (self.key, Grant::Host { id, endpoint })
    }

    fn receive(&mut self, path: Path, datagram: &[u8]) {
        (self.engine).handle_datagram(self.now, path, datagram, &mut self.sent);
    }

    /// The kernel sends a packet through the mesh.
    fn send(&mut self, packet: &[u8]) {
        self.engine.handle_packet(self.now, packet, &mut self.sent);
    }

    fn tick(&mut self) {
        self.now = self.engine.timeout().unwrap_or(self.now);
        self.engine.handle_timeout(self.now, &mut self.sent);
    }

    fn delivered(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.sent.packets)
    }

    fn sessions(&self) -> usize {
        self.engine.by_index.len()
    }
}

impl Laptop {
    fn new(n: u8) -> Self {
        // Connected to nobody yet: `meet` tells it its server.
        let key = PrivateKey::generate();
        Self {
            tunn: tunnel(&key, key.public_key()),
            key: key.public_key(),
            path: Path::to(place(n)),
            received: Vec::new(),
            seen: Vec::new(),
        }
    }

    /// A laptop that connects to a server with this key.
    fn of(n: u8, server: PublicKey) -> Self {
        let key = PrivateKey::generate();
        let tunn = tunnel(&key, server);
        Self {
            tunn,
            key: key.public_key(),
            ..Self::new(n)
        }
    }

    fn send(&mut self, host: &mut Host, packet: &[u8]) {
        let mut buffer = vec![0; 2048];
        if let TunnResult::WriteToNetwork(d) = self.tunn.encapsulate(packet, &mut buffer) {
            self.seen.push(d.to_vec());
            host.receive(self.path, d);
        }
        self.exchange(host);
    }

    /// Everything either has to say, until both are silent.
    fn exchange(&mut self, host: &mut Host) {
        let mut buffer = vec![0; 2048];
        while let Some((path, datagram)) = host.sent.datagrams.pop_front() {
            if path != self.path {
                continue;
            }
            match self.tunn.decapsulate(None, &datagram, &mut buffer) {
                TunnResult::WriteToNetwork(answer) => {
                    self.seen.push(answer.to_vec());
                    host.receive(self.path, answer);
                    while let TunnResult::WriteToNetwork(d) =
                        self.tunn.decapsulate(None, &[], &mut buffer)
                    {
                        self.seen.push(d.to_vec());
                        host.receive(self.path, d);
                    }
                }
                TunnResult::WriteToTunnelV6(packet, _) => self.received.push(packet.to_vec()),
                _ => {}
            }
        }
    }

    fn initiation(&mut self) -> Vec<u8> {
        let mut buffer = vec![0; 2048];
        match self.tunn.format_handshake_initiation(&mut buffer, true) {
            TunnResult::WriteToNetwork(d) => d.to_vec(),
            other => panic!("{other:?}"),
        }
    }
}

fn tunnel(key: &PrivateKey, server: PublicKey) -> Tunn {
    let server = x25519::PublicKey::from(*server.as_bytes());
    Tunn::new(
        key.secret().clone(),
        server,
        None,
        None,
        rand::random::<u32>() >> 8,
        None,
    )
}

/// A host and one connected laptop of network 7, number 5.
fn connected() -> (Host, Laptop) {
    let mut host = Host::new(1);
    let mut laptop = Laptop::of(77, host.key);
    host.allow(&[(&laptop, laptop_grant(7, 5))]);
    laptop.send(
        &mut host,
        &text(machine(7, 1, 5), machine(7, 1, 9), "hello"),
    );
    assert_eq!(host.delivered().len(), 1);
    (host, laptop)
}

/// Carries datagrams between hosts until all are silent.
fn settle(hosts: &mut [&mut Host]) {
    while let Some((from, (path, datagram))) = hosts
        .iter_mut()
        .find_map(|h| Some((h.place, h.sent.datagrams.pop_front()?)))
    {
        if let Some(to) = hosts.iter_mut().find(|h| h.place == path.remote) {
            to.receive(Path::to(from), &datagram);
        }
    }
}

#[test]
fn a_laptop_reaches_a_machine_and_is_reached() {
    let (mut host, mut laptop) = connected();
    let answer = text(machine(7, 1, 9), machine(7, 1, 5), "hello yourself");
    host.send(&answer);
    laptop.exchange(&mut host);
    assert_eq!(laptop.received, [answer]);
    let status = &host.engine.peers()[0];
    assert_eq!(status.endpoint, Some(laptop.path.remote));
    assert!(status.last_handshake.is_some() && status.received > 0 && status.sent > 0);
}

#[test]
fn a_first_packet_waits_for_the_handshake_between_hosts() {
    let (mut a, mut b) = (Host::new(1), Host::new(2));
    a.engine.set_peers(a.now, &[b.grant()]);
    b.engine.set_peers(b.now, &[a.grant()]);
    let packets: Vec<_> = (0..20)
        .map(|n| text(machine(7, 1, 5), machine(7, 2, 6), &format!("number {n}")))
        .collect();
    packets.iter().for_each(|p| a.send(p));
    settle(&mut [&mut a, &mut b]);
    assert_eq!(b.delivered(), packets);
    let back = text(machine(7, 2, 6), machine(7, 1, 5), "back");
    b.send(&back);
    settle(&mut [&mut a, &mut b]);
    assert_eq!(a.delivered(), [back]);
}

#[test]
fn hosts_meet_before_anybody_asks() {
    let (mut a, mut b) = (Host::new(1), Host::new(2));
    a.engine.set_peers(a.now, &[b.grant()]);
    b.engine.set_peers(b.now, &[a.grant()]);
    a.tick();
    settle(&mut [&mut a, &mut b]);
    for host in [&a, &b] {
        assert!(host.engine.peers()[0].last_handshake.is_some());
    }
    assert!(a.engine.timeout().is_some(), "its timers go on");
}

#[test]
fn inner_packets_are_padded() {
    let (mut host, _laptop) = connected();
    for length in [0, 1, 15, 16, 1380] {
        let packet = build(machine(7, 1, 9), machine(7, 1, 5), UDP, &vec![1; length]);
        host.send(&packet);
        let (_, datagram) = host.sent.datagrams.pop_back().unwrap();
        let inner = datagram.len() - 32;
        assert!(inner >= packet.len() && inner <= usize::from(MTU));
        assert!(inner % PADDING == 0 || inner == usize::from(MTU), "{inner}");
    }
}

#[test]
fn a_stranger_gets_no_answer_and_leaves_nothing() {
    let known = Laptop::new(1);
    let mut host = Host::with(&[(&known, laptop_grant(7, 5))]);
    let mut stranger = Laptop::of(66, host.key);
    stranger.send(
        &mut host,
        &text(machine(7, 1, 5), machine(7, 1, 9), "let me in"),
    );
    assert!(host.sent.packets.is_empty() && stranger.received.is_empty());
    assert_eq!(
        stranger.seen.len(),
        1,
        "only its own first message was ever said"
    );
    assert_eq!(
        (host.sessions(), host.engine.counters().unknown_peer),
        (0, 1)
    );

    // With our key wrong it is not even looked at.
    let mut lost = Laptop::of(66, stranger.key);
    lost.send(&mut host, &[]);
    assert_eq!(host.engine.counters().bad_mac, 1);
}

#[test]
fn naming_a_known_key_without_proof_leaves_nothing() {
    let mut host = Host::new(1);
    let mut laptop = Laptop::of(77, host.key);
    host.allow(&[(&laptop, laptop_grant(7, 5))]);
    let mut forged = laptop.initiation();
    forged[100] ^= 1; // in the timestamp, which is what proves the key
    let mut label = Blake2s256::new();
    blake2::Digest::update(&mut label, b"mac1----");
    blake2::Digest::update(&mut label, host.key.as_bytes());
    let mut mac: Blake2sMac<blake2::digest::consts::U16> =
        Blake2sMac::new_from_slice(&label.finalize()).unwrap();
    mac.update(&forged[..116]);
    forged[116..132].copy_from_slice(&mac.finalize_fixed());
    host.receive(laptop.path, &forged);
    assert!(host.sent.datagrams.is_empty());
    assert_eq!(
        (host.sessions(), host.engine.counters().not_authentic),
        (0, 1)
    );
    assert_eq!(host.engine.timeout(), None, "nothing keeps it awake");
}

#[test]
fn a_source_must_be_the_senders_own() {
    let (mut host, mut laptop) = connected();
    let target = machine(7, 1, 9);
    let mut other = Laptop::of(78, host.key);
    host.allow(&[(&laptop, laptop_grant(7, 5)), (&other, laptop_grant(7, 6))]);
    other.send(&mut host, &text(machine(7, 1, 6), target, "hello"));
    assert_eq!(host.delivered().len(), 1);
    let spoofs = [
        machine(7, 1, 6),        // another laptop of the same network
        machine(7, 1, 9),        // a Machine of this host
        machine(7, 2, 9),        // a Machine of another host
        machine(8, 1, 5),        // another network
        NetworkId(7).resolver(), // the resolver
        RESOLVER,
        HostId(1).address(), // this host
        HostId(2).address(),
        "2001:db8::1".parse().unwrap(),
        "fe80::1".parse().unwrap(),
        "::1".parse().unwrap(),
    ];
    for (count, source) in (1..).zip(spoofs) {
        laptop.send(&mut host, &text(source, target, "it is me"));
        assert_eq!(host.delivered(), Vec::<Vec<u8>>::new(), "{source}");
        assert_eq!(host.engine.counters().spoofed, count, "{source}");
    }
}

#[test]
fn a_host_speaks_only_for_what_lives_on_it() {
    let (mut a, mut b) = (Host::new(1), Host::new(2));
    let laptop = Laptop::new(77);
    a.engine
        .set_peers(a.now, &[b.grant(), (laptop.key, laptop_grant(7, 5))]);
    // The second host believes it is another one, or that everything is its own.
    b.engine = Engine::new(&new_key(), HostId(3), b.now);
    let key = MeshKey::load_or_create(&tempfile::tempdir().unwrap().path().join("k")).unwrap();
    b.engine = Engine::new(&key, HostId(3), b.now);
    b.key = key.public_key();
    let grant = Grant::Host {
        id: HostId(2),
        endpoint: b.place,
    };
    a.engine
        .set_peers(a.now, &[(b.key, grant), (laptop.key, laptop_grant(7, 5))]);
    b.engine.set_peers(b.now, &[a.grant()]);
    b.send(&text(machine(7, 3, 9), machine(7, 1, 9), "from host 3"));
    settle(&mut [&mut a, &mut b]);
    assert_eq!(a.delivered().len(), 0);
    assert_eq!(a.engine.counters().spoofed, 1);
    b.engine.host = HostId(1);
    b.send(&text(
        machine(7, 1, 5),
        machine(7, 1, 9),
        "from your own laptop",
    ));
    settle(&mut [&mut a, &mut b]);
    assert_eq!((a.delivered().len(), a.engine.counters().spoofed), (0, 2));
}

#[test]
fn networks_do_not_meet() {
    let (mut host, mut laptop) = connected();
    let mut rival = Laptop::of(78, host.key);
    host.allow(&[(&laptop, laptop_grant(7, 5)), (&rival, laptop_grant(8, 5))]);
    rival.send(
        &mut host,
        &text(machine(8, 1, 5), machine(8, 1, 9), "hello"),
    );
    assert_eq!(host.delivered().len(), 1);
    rival.send(
        &mut host,
        &text(machine(8, 1, 5), machine(7, 1, 5), "hello, neighbour"),
    );
    assert_eq!(host.engine.counters().other_network, 1);
    // Nor when the kernel was talked into it.
    host.send(&text(
        machine(8, 1, 5),
        machine(7, 1, 5),
        "hello, neighbour",
    ));
    laptop.exchange(&mut host);
    assert!(laptop.received.is_empty() && host.delivered().is_empty());
    assert_eq!(host.engine.counters().other_network, 2);
}

#[test]
fn only_ipv6_that_is_whole_comes_through() {
    let (mut host, mut laptop) = connected();
    let mut v4 = vec![0; 28];
    (v4[0], v4[3]) = (0x45, 28);
    laptop.send(&mut host, &v4);
    let good = text(machine(7, 1, 5), machine(7, 1, 9), "hello");
    laptop.send(&mut host, &good[..HEADER - 1]);
    laptop.send(&mut host, &good[..good.len() - 1]);
    laptop.send(&mut host, &[0xff; 64]);
    let counters = host.engine.counters();
    assert_eq!((counters.ipv4, counters.malformed), (1, 3));
    assert!(host.delivered().is_empty());
    laptop.send(&mut host, &good);
    assert_eq!(host.delivered(), [good]);
}

#[test]
fn a_replay_does_nothing_and_moves_nobody() {
    let (mut host, mut laptop) = connected();
    let eavesdropper = Path::to(place(66));
    for old in laptop.seen.clone() {
        host.receive(eavesdropper, &old);
    }
    assert!(host.delivered().is_empty() && host.sent.datagrams.is_empty());
    assert_eq!(
        host.engine.counters().not_authentic,
        laptop.seen.len() as u64
    );
    host.send(&text(
        machine(7, 1, 9),
        machine(7, 1, 5),
        "for your eyes only",
    ));
    assert_eq!(host.sent.datagrams[0].0, laptop.path);
    laptop.exchange(&mut host);
    assert_eq!(laptop.received.len(), 1);
}

#[test]
fn a_replayed_first_message_after_a_restart_moves_nobody() {
    let mut host = Host::new(1);
    let mut laptop = Laptop::of(77, host.key);
    host.allow(&[(&laptop, laptop_grant(7, 5))]);
    // The server has never heard it, so it is fresh, but the address is the eavesdropper's.
    host.receive(Path::to(place(66)), &laptop.initiation());
    assert_eq!(host.sent.datagrams.pop_front().unwrap().0.remote, place(66));
    host.send(&text(
        machine(7, 1, 9),
        machine(7, 1, 5),
        "for your eyes only",
    ));
    assert!(host.sent.datagrams.is_empty());
    assert_eq!(host.engine.counters().no_endpoint, 1);
}

#[test]
fn a_laptop_may_move() {
    let (mut host, mut laptop) = connected();
    laptop.path = Path::to("[2001:db8::7]:4242".parse().unwrap());
    laptop.send(
        &mut host,
        &text(machine(7, 1, 5), machine(7, 1, 9), "from the café"),
    );
    host.send(&text(machine(7, 1, 9), machine(7, 1, 5), "enjoy"));
    assert_eq!(host.sent.datagrams.back().unwrap().0, laptop.path);
}

#[test]
fn datagrams_from_inside_the_private_network_are_not_taken() {
    let mut host = Host::new(1);
    let mut laptop = Laptop::of(77, host.key);
    host.allow(&[(&laptop, laptop_grant(7, 5))]);
    let inside = Path::to(SocketAddr::new(machine(7, 1, 9).into(), 51820));
    host.receive(inside, &laptop.initiation());
    assert_eq!(
        (host.sessions(), host.engine.counters().not_wireguard),
        (0, 1)
    );
}

#[test]
fn removed_peers_are_gone_at_once_and_others_stay() {
    let (mut host, mut laptop) = connected();
    let mut other = Laptop::of(78, host.key);
    host.allow(&[(&laptop, laptop_grant(7, 5)), (&other, laptop_grant(7, 6))]);
    other.send(
        &mut host,
        &text(machine(7, 1, 6), machine(7, 1, 9), "hello"),
    );
    assert_eq!(host.delivered().len(), 1);
    let handshakes = laptop.seen.iter().filter(|d| d[0] == 1).count();

    host.allow(&[(&laptop, laptop_grant(7, 5))]);
    other.send(
        &mut host,
        &text(machine(7, 1, 6), machine(7, 1, 9), "still here?"),
    );
    assert!(host.delivered().is_empty());
    host.send(&text(machine(7, 1, 9), machine(7, 1, 6), "anyone?"));
    assert_eq!(host.engine.counters().no_route, 1);
    laptop.send(
        &mut host,
        &text(machine(7, 1, 5), machine(7, 1, 9), "still here"),
    );
    assert_eq!(host.sessions(), 1);
    let after = laptop.seen.iter().filter(|d| d[0] == 1).count();
    assert_eq!(after, handshakes, "the session was kept");
}

#[test]
fn naming_somebody_elses_key_takes_nothing_from_its_owner() {
    let (mut host, mut laptop) = connected();
    host.allow(&[(&laptop, laptop_grant(7, 5)), (&laptop, laptop_grant(8, 1))]);
    laptop.send(
        &mut host,
        &text(machine(7, 1, 5), machine(7, 1, 9), "as ever"),
    );
    assert_eq!(host.delivered().len(), 1);
    // Nor does our own key make us a peer of ourselves.
    let ours = (host.key, laptop_grant(8, 2));
    host.engine
        .set_peers(host.now, &[(laptop.key, laptop_grant(7, 5)), ours]);
    assert_eq!(host.engine.peers().len(), 1);
}

#[test]
fn a_host_that_moved_is_looked_for_at_its_new_place() {
    let (mut a, mut b) = (Host::new(1), Host::new(2));
    a.engine.set_peers(a.now, &[b.grant()]);
    b.engine.set_peers(b.now, &[a.grant()]);
    a.tick();
    settle(&mut [&mut a, &mut b]);
    b.place = place(22);
    a.engine.set_peers(a.now, &[b.grant()]);
    a.send(&text(machine(7, 1, 5), machine(7, 2, 6), "moved?"));
    assert_eq!(a.sent.datagrams.back().unwrap().0.remote, place(22));
    settle(&mut [&mut a, &mut b]);
    assert_eq!(b.delivered().len(), 1);
}

#[test]
fn endpoints_that_cannot_be_are_not_used() {
    let mut host = Host::new(1);
    for endpoint in ["0.0.0.0:51820", "192.0.2.1:0", "[fdaa::1:0:0:2]:51820"] {
        let grant = Grant::Host {
            id: HostId(2),
            endpoint: endpoint.parse().unwrap(),
        };
        host.engine
            .set_peers(host.now, &[(new_key().public_key(), grant)]);
        host.tick();
        host.send(&text(machine(7, 1, 5), machine(7, 2, 6), "hello"));
        assert!(host.sent.datagrams.is_empty(), "{endpoint}");
    }
}

#[test]
fn who_calls_what_is_not_there_is_told() {
    let mut host = Host::new(1);
    let laptop = Laptop::new(77);
    host.allow(&[(&laptop, laptop_grant(7, 5))]);
    let caller = machine(7, 1, 9);
    for (to, code) in [(machine(7, 1, 6), 0), (machine(7, 1, 5), 3)] {
        host.send(&text(caller, to, "hello?"));
        let answer = host.delivered().pop().unwrap();
        let header = Header::parse(&answer).unwrap();
        assert_eq!(
            (header.source, header.destination),
            (NetworkId(7).resolver(), caller)
        );
        assert_eq!(
            (header.next, &answer[HEADER..HEADER + 2]),
            (ICMPV6, &[1, code][..])
        );
    }
    (0..1000).for_each(|_| host.send(&text(caller, machine(7, 1, 6), "hello?")));
    assert!(
        host.delivered().len() <= 50,
        "a scan is not answered address by address"
    );
    host.send(&text(machine(8, 1, 9), machine(7, 1, 5), "hello?"));
    assert!(host.delivered().is_empty(), "other networks learn nothing");
}

#[test]
fn a_key_that_everybody_could_speak_for_gets_no_session() {
    let mut host = Host::new(1);
    let grant = Grant::Host {
        id: HostId(2),
        endpoint: place(2),
    };
    host.engine
        .set_peers(host.now, &[(PublicKey::from([0; 32]), grant)]);
    host.tick();
    assert_eq!((host.sessions(), host.sent.datagrams.len()), (0, 0));
}

#[test]
fn a_flood_of_handshakes_costs_little_and_shuts_nobody_out() {
    let (mut host, mut laptop) = connected();
    let mut flooder = Laptop::of(66, host.key);
    let first = flooder.initiation();
    for n in 0..2000u32 {
        let forged = SocketAddr::from((Ipv6Addr::from(u128::from(n) << 64 | 1 << 120), 1000));
        host.receive(Path::to(forged), &first);
    }
    let counters = host.engine.counters();
    assert!(counters.cookies > 1800, "{counters:?}");
    assert_eq!(host.sessions(), 1);
    host.sent.datagrams.clear();

    // A known laptop gets a cookie, and in with it.
    let mut second = Laptop::of(78, host.key);
    host.allow(&[(&laptop, laptop_grant(7, 5)), (&second, laptop_grant(7, 6))]);
    host.receive(second.path, &second.initiation());
    second.exchange(&mut host);
    host.receive(second.path, &second.initiation());
    second.exchange(&mut host);
    second.send(
        &mut host,
        &text(machine(7, 1, 6), machine(7, 1, 9), "hello"),
    );
    // Sessions that exist notice nothing.
    laptop.send(
        &mut host,
        &text(machine(7, 1, 5), machine(7, 1, 9), "hello"),
    );
    assert_eq!(host.delivered().len(), 2);

    // One address with a cookie is still one address.
    for _ in 0..200 {
        host.receive(second.path, &second.initiation());
    }
    assert!(host.engine.counters().too_many_handshakes > 150);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_datagram_stops_it(datagrams in prop::collection::vec((0u8..6, prop::collection::vec(any::<u8>(), 0..200)), 1..20)) {
        let (mut host, mut laptop) = connected();
        for (kind, mut bytes) in datagrams {
            // Mostly the right type and length, to reach further.
            let length = [0, 148, 92, 64, 96, bytes.len()][usize::from(kind)];
            bytes.resize(length, 0);
            if length >= 4 && kind < 5 {
                bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
            }
            host.receive(Path::to(place(66)), &bytes);
            host.send(&bytes);
        }
        laptop.send(&mut host, &text(machine(7, 1, 5), machine(7, 1, 9), "still there?"));
        prop_assert_eq!(host.delivered().len(), 1);
    }

    #[test]
    fn no_bit_of_a_real_message_can_be_changed(flips in prop::collection::vec((0usize..10, any::<prop::sample::Index>(), 1u8..), 1..40)) {
        let mut host = Host::new(1);
        let mut laptop = Laptop::of(77, host.key);
        host.allow(&[(&laptop, laptop_grant(7, 5))]);
        let (mut shadow, _) = (Host::new(1), ());
        shadow.allow(&[(&laptop, laptop_grant(7, 5))]);
        laptop.send(&mut host, &text(machine(7, 1, 5), machine(7, 1, 9), "hello"));
        host.delivered();
        for (which, at, flip) in flips {
            let mut message = laptop.seen[which % laptop.seen.len()].clone();
            *at.get_mut(&mut message) ^= flip;
            host.receive(Path::to(place(66)), &message);
        }
        prop_assert_eq!(host.delivered().len(), 0);
        prop_assert_eq!(host.engine.peers()[0].endpoint, Some(laptop.path.remote));
    }

    #[test]
    fn no_inner_packet_stops_it(packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..120), 1..20)) {
        let (mut host, mut laptop) = connected();
        for mut packet in packets {
            if let Some(first) = packet.first_mut() {
                *first = 0x60 | *first & 0xf;
            }
            laptop.send(&mut host, &packet);
        }
        prop_assert_eq!(host.delivered().len(), 0);
    }
}
