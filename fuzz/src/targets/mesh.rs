//! The mesh's engine between strangers on the wire and peers with keys of their own, who encrypt
//! whatever they like.
//!
//! Promised: what is handed to the kernel came from the peer that owns its source and stays in its
//! network; nothing that was changed or sent again on the way is; strangers get no packet in.

use std::net::{Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use tern_catalog::{HostId, MachineNumber, NetworkId, PrivateAddress, RESOLVER};
use tern_mesh::{Engine, Grant, MeshKey, Path, Sink};

use crate::input::{Input, Program};

const OURS: HostId = HostId(1);
const OTHER: HostId = HostId(2);
const NETWORK: NetworkId = NetworkId(7);

thread_local! {
    static KEY: MeshKey = {
        let dir = tempfile::tempdir().unwrap();
        MeshKey::load_or_create(&dir.path().join("key")).unwrap()
    };
}

#[derive(Default)]
struct Out {
    datagrams: Vec<(Path, Vec<u8>)>,
    packets: Vec<Vec<u8>>,
}

impl Sink for Out {
    fn send(&mut self, path: Path, datagram: &[u8]) {
        self.datagrams.push((path, datagram.to_vec()));
    }

    fn deliver(&mut self, packet: &[u8]) {
        self.packets.push(packet.to_vec());
    }
}

/// Somebody with a key that the engine knows.
struct Peer {
    tunn: Tunn,
    path: Path,
    is_host: bool,
}

struct World {
    engine: Engine,
    out: Out,
    now: Instant,
    peers: [Peer; 2],
    /// The last message with content that was given to the engine.
    last: Vec<u8>,
}

fn path(n: u8) -> Path {
    Path {
        remote: SocketAddr::from(([192, 0, 2, n], 51820)),
        local: None,
    }
}

impl World {
    fn new() -> Self {
        KEY.with(|key| {
            let now = Instant::now();
            let server = PublicKey::from(*key.public_key().as_bytes());
            let mut engine = Engine::new(key, OURS, now);
            let mut grants = Vec::new();
            let peers = [false, true].map(|is_host| {
                let index = 1 + u8::from(is_host);
                let secret = StaticSecret::from([index; 32]);
                let public = tern_mesh::PublicKey::from(PublicKey::from(&secret));
                let endpoint = path(index).remote;
                grants.push((
                    public,
                    match is_host {
                        true => Grant::Host {
                            id: OTHER,
                            endpoint,
                        },
                        false => Grant::Laptop {
                            network: NETWORK,
                            number: MachineNumber(5),
                        },
                    },
                ));
                Peer {
                    tunn: Tunn::new(secret, server, None, None, index.into(), None),
                    path: path(index),
                    is_host,
                }
            });
            engine.set_peers(now, &grants);
            Self {
                engine,
                out: Out::default(),
                now,
                peers,
                last: Vec::new(),
            }
        })
    }

    /// A peer sends an inner packet, after a handshake if it has none.
    fn send(&mut self, peer: usize, packet: &[u8]) {
        let mut buffer = vec![0; packet.len() + 256];
        let Peer {
            tunn,
            path,
            is_host,
        } = &mut self.peers[peer];
        let (path, is_host) = (*path, *is_host);
        let mut sent = match tunn.encapsulate(packet, &mut buffer) {
            TunnResult::WriteToNetwork(datagram) => datagram.to_vec(),
            _ => return,
        };
        // A handshake takes one round, and what waits for it another.
        for _ in 0..4 {
            self.engine
                .handle_datagram(self.now, path, &sent, &mut self.out);
            if sent.first() == Some(&4) {
                self.last.clone_from(&sent);
            }
            self.check(Some(is_host));
            let answers = std::mem::take(&mut self.out.datagrams);
            let mut next = None;
            for (to, datagram) in answers {
                if to == path
                    && let TunnResult::WriteToNetwork(more) =
                        self.peers[peer]
                            .tunn
                            .decapsulate(None, &datagram, &mut buffer)
                {
                    next = Some(more.to_vec());
                }
            }
            let queued = match self.peers[peer].tunn.decapsulate(None, &[], &mut buffer) {
                TunnResult::WriteToNetwork(datagram) => Some(datagram.to_vec()),
                _ => None,
            };
            match queued.or(next) {
                Some(datagram) => sent = datagram,
                None => break,
            }
        }
    }

    /// Somebody on the wire sends this.
    fn strange(&mut self, from: u8, datagram: &[u8]) {
        self.engine
            .handle_datagram(self.now, path(from), datagram, &mut self.out);
        self.check(None);
    }

    /// Looks at what reached the kernel; `sender` is the one whose authentic message came last.
    fn check(&mut self, sender: Option<bool>) {
        for packet in self.out.packets.drain(..) {
            let address = |at: usize| {
                let octets: [u8; 16] = packet[at..at + 16].try_into().unwrap();
                Ipv6Addr::from(octets)
            };
            assert_eq!(packet[0] >> 4, 6);
            let length = u16::from_be_bytes([packet[4], packet[5]]);
            assert_eq!(packet.len(), 40 + usize::from(length));
            let (source, destination) = (address(8), address(24));
            let from = PrivateAddress::parse(source).expect("from outside");
            let to = PrivateAddress::parse(destination).expect("to the outside");
            assert!(
                from.network == to.network || destination == RESOLVER,
                "{source} to {destination}"
            );
            match sender.expect("a stranger's packet") {
                true => assert_eq!(from.host, OTHER, "{source} is not of that host"),
                false => {
                    let own = PrivateAddress::peer_prefix(NETWORK, OURS, MachineNumber(5));
                    assert!(own.contains(&source), "{source} is not that laptop's");
                }
            }
        }
    }
}

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut world = World::new();
    // Cryptography is what costs time here, so an input is short.
    for _ in 0..24 {
        let Some(step) = input.step() else { break };
        match step % 8 {
            0 => {
                let (from, count) = (input.byte(), input.byte());
                let datagram = input.bytes(count.into()).to_vec();
                world.strange(from % 4, &datagram);
            }
            1 | 2 => {
                let packet = packet(&mut input);
                world.send(usize::from(step % 8 - 1), &packet);
            }
            3 => {
                let packet = packet(&mut input);
                world
                    .engine
                    .handle_packet(world.now, &packet, &mut world.out);
                // Errors to senders here are the engine's own words.
                world.out.packets.clear();
            }
            4 => {
                let mut changed = world.last.clone();
                let at = usize::from(input.u16());
                if let Some(at) = at.checked_rem(changed.len()) {
                    changed[at] ^= input.byte().max(1);
                    world.strange(1, &changed);
                }
            }
            5 => {
                let again = world.last.clone();
                world.strange(input.byte() % 4, &again);
            }
            6 => {
                world.now += Duration::from_millis(input.u16().into());
                world.engine.handle_timeout(world.now, &mut world.out);
                world.check(None);
            }
            _ => {
                // A message of the right shape for a session that may be there.
                let count = 32 + usize::from(input.byte());
                let mut datagram = vec![0; count];
                datagram[0] = 1 + input.byte() % 4;
                let fill = input.bytes(count - 4);
                datagram[4..4 + fill.len()].copy_from_slice(fill);
                world.strange(2, &datagram);
            }
        }
        if step % 8 != 1 && step % 8 != 2 {
            world.out.datagrams.clear();
        }
    }
    let _ = (world.engine.counters(), world.engine.peers());
}

fn packet(input: &mut Input<'_>) -> Vec<u8> {
    let addresses = input.byte();
    if addresses == 0xff {
        let count = input.byte();
        return input.bytes(count.into()).to_vec();
    }
    let address = |which: u8| match which % 8 {
        0 => PrivateAddress::of_peer(NETWORK, OURS, MachineNumber(5)),
        1 => PrivateAddress::of_machine(NETWORK, OURS, MachineNumber(9)),
        2 => PrivateAddress::of_machine(NETWORK, OTHER, MachineNumber(9)),
        3 => PrivateAddress::of_machine(NetworkId(8), OTHER, MachineNumber(9)),
        4 => OTHER.address(),
        5 => RESOLVER,
        6 => NETWORK.resolver(),
        _ => Ipv6Addr::LOCALHOST,
    };
    let (next, count) = (input.byte(), input.byte());
    let payload = input.bytes(count.into());
    let mut packet = vec![0x60, 0, 0, 0, 0, payload.len() as u8, next, 64];
    packet.extend(address(addresses).octets());
    packet.extend(address(addresses >> 4).octets());
    packet.extend(payload);
    packet
}

pub fn seeds() -> Vec<Vec<u8>> {
    let say =
        |peer: u8, addresses: u8| Program::default().bytes(&[peer, addresses, 17, 4, 1, 2, 0, 53]);
    vec![
        say(1, 0x10).bytes(&[4, 9, 0, 1, 5, 1]).0,
        say(1, 0x50).0,
        say(2, 0x12).bytes(&[6, 0xff, 0xff, 5, 2]).0,
        say(2, 0x13).0,
        say(3, 0x21).bytes(&[6, 0, 4]).0,
        Program::default()
            .bytes(&[0, 3, 4, 1, 0, 0, 0, 7, 60, 0, 1, 2, 3])
            .0,
    ]
}
