//! The mesh on real devices, with stock WireGuard clients: `wg-quick` and Debian's `wireguard-go`
//! in network namespaces.
//!
//! Each test is a server in a namespace of its own, laptops in others, and veth cables between.
//! Addresses of "Machines" are put on the server's loopback: what the host agent routes to a TAP
//! ends there.
#![allow(missing_docs)]

mod world;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tern_catalog::{HostId, MachineNumber, NetworkId, PrivateAddress};
use tern_mesh::PrivateKey;
use world::{World, wait_for};

/// Time for what should not happen to happen.
const LONG_ENOUGH: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(20);

fn machine(network: u32, host: u32, number: u32) -> Ipv6Addr {
    PrivateAddress::of_machine(NetworkId(network), HostId(host), MachineNumber(number))
}

/// A "Machine" in this namespace that says what it is told, in capitals.
fn serve(address: Ipv6Addr) -> Result<()> {
    world::run(
        "ip",
        &[
            "-6",
            "addr",
            "add",
            &format!("{address}/128"),
            "dev",
            "lo",
            "nodad",
        ],
    )?;
    let listener = TcpListener::bind((address, 8080))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || shout(stream));
        }
    });
    Ok(())
}

fn shout(mut stream: TcpStream) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        buffer[..length].make_ascii_uppercase();
        stream.write_all(&buffer[..length])?;
    }
}

/// Sends a megabyte there and back.
fn converse(address: Ipv6Addr, patience: Duration) -> Result<()> {
    let to = SocketAddr::from((address, 8080));
    let mut stream = TcpStream::connect_timeout(&to, patience)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut writer = stream.try_clone()?;
    let sending = std::thread::spawn(move || {
        writer.write_all(&vec![b'a'; 1 << 20])?;
        writer.shutdown(std::net::Shutdown::Write)
    });
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    sending.join().expect("the sender does not panic")?;
    ensure!(
        all.len() == 1 << 20 && all.iter().all(|b| *b == b'A'),
        "{} bytes",
        all.len()
    );
    Ok(())
}

#[test]
fn netns_a_stock_client_takes_the_configuration_unchanged() -> Result<()> {
    World::run(|world| async move {
        serve(machine(7, 1, 9))?;
        let laptop = world.laptop(0)?;
        let private = PrivateKey::generate();
        world
            .add_peer(7, "laptop", 5, &private.public_key())
            .await?;
        laptop.join(&world.client_config(7, 5, &private, &laptop))?;
        laptop.inside(|| converse(machine(7, 1, 9), PATIENCE))??;
        // The resolver is there, and nothing else of the host is.
        let resolver = NetworkId(7).resolver();
        let _names = TcpListener::bind((resolver, 53))?;
        let names = SocketAddr::from((resolver, 53));
        laptop.inside(move || TcpStream::connect_timeout(&names, PATIENCE))??;
        let _sshd = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 2222))?;
        let to = SocketAddr::from((resolver, 2222));
        let refused = laptop.inside(move || TcpStream::connect_timeout(&to, LONG_ENOUGH))?;
        ensure!(refused.is_err_and(|e| e.kind() == ErrorKind::TimedOut));
        ensure!(world.counters().await?.service > 0);
        let dns = laptop.dns()?;
        ensure!(
            dns.contains("fdaa:0:7::3"),
            "wg-quick set {dns:?} as the resolver"
        );
        // The other way round: the host's side may call the laptop.
        let listener = laptop.inside(|| TcpListener::bind("[::]:9000"))??;
        let to = SocketAddr::from((
            PrivateAddress::of_peer(NetworkId(7), HostId(1), MachineNumber(5)),
            9000,
        ));
        let socket = UdpSocket::bind((machine(7, 1, 9), 0))?;
        socket.send_to(b"knock", to)?;
        world::connect_from(machine(7, 1, 9), to, PATIENCE).context("call the laptop")?;
        drop(listener);
        Ok(())
    })
}

#[test]
fn netns_a_wrong_key_gets_nothing() -> Result<()> {
    World::run(|world| async move {
        serve(machine(7, 1, 9))?;
        let laptop = world.laptop(0)?;
        let (registered, other) = (PrivateKey::generate(), PrivateKey::generate());
        world
            .add_peer(7, "laptop", 5, &registered.public_key())
            .await?;
        laptop.join(&world.client_config(7, 5, &other, &laptop))?;
        let answer = laptop.inside(|| converse(machine(7, 1, 9), LONG_ENOUGH))?;
        ensure!(answer.is_err());
        ensure!(world.counters().await?.unknown_peer > 0);
        ensure!(
            laptop
                .run("wg", &["show", "wgt0", "latest-handshakes"])?
                .trim()
                .ends_with("\t0")
        );
        Ok(())
    })
}

#[test]
fn netns_two_organizations_do_not_reach_each_other() -> Result<()> {
    World::run(|world| async move {
        serve(machine(7, 1, 9))?;
        serve(machine(8, 1, 9))?;
        let (ours, rival) = (world.laptop(0)?, world.laptop(1)?);
        for (laptop, network, number) in [(&ours, 7, 5), (&rival, 8, 6)] {
            let private = PrivateKey::generate();
            world
                .add_peer(network, "laptop", number, &private.public_key())
                .await?;
            laptop.join(&world.client_config(network, number, &private, laptop))?;
            laptop.inside(move || converse(machine(network, 1, 9), PATIENCE))??;
            // In earnest: their prefix routed, and allowed in this client's own rules.
            let both = "fdaa:0:7::/48,fdaa:0:8::/48";
            laptop.run(
                "wg",
                &[
                    "set",
                    laptop.interface(),
                    "peer",
                    &world.key(),
                    "allowed-ips",
                    both,
                ],
            )?;
            let other = format!("fdaa:0:{}::/48", 15 - network);
            laptop.run(
                "ip",
                &["-6", "route", "add", &other, "dev", laptop.interface()],
            )?;
        }
        ensure!(
            rival
                .inside(|| converse(machine(7, 1, 9), LONG_ENOUGH))?
                .is_err()
        );
        ensure!(world.counters().await?.other_network > 0);
        let laptops = SocketAddr::from((machine(7, 1, 5), 9000));
        let _listener = ours.inside(|| TcpListener::bind("[::]:9000"))??;
        let attempt = rival.inside(move || TcpStream::connect_timeout(&laptops, LONG_ENOUGH))?;
        ensure!(attempt.is_err(), "laptop to laptop");

        // By the other's address, and by a Machine's.
        let before = world.counters().await?;
        for (count, source) in (1..).zip([machine(7, 1, 5), machine(7, 1, 10), machine(7, 2, 3)]) {
            rival.run(
                "ip",
                &[
                    "-6",
                    "addr",
                    "add",
                    &format!("{source}/128"),
                    "dev",
                    rival.interface(),
                    "nodad",
                ],
            )?;
            let to = SocketAddr::from((machine(7, 1, 9), 8080));
            let attempt = rival.inside(move || world::connect_from(source, to, LONG_ENOUGH))?;
            ensure!(attempt.is_err(), "as {source}");
            ensure!(
                world.counters().await?.spoofed >= before.spoofed + count,
                "as {source}"
            );
        }
        // Nothing of this has hurt anyone.
        ours.inside(|| converse(machine(7, 1, 9), PATIENCE))??;
        rival.inside(|| converse(machine(8, 1, 9), PATIENCE))??;
        Ok(())
    })
}

#[test]
fn netns_peers_come_and_go_while_others_stay() -> Result<()> {
    World::run(|world| async move {
        serve(machine(7, 1, 9))?;
        let (first, second) = (world.laptop(0)?, world.laptop(1)?);
        let keys = [PrivateKey::generate(), PrivateKey::generate()];
        for (laptop, number, key) in [(&first, 5, &keys[0]), (&second, 6, &keys[1])] {
            world
                .add_peer(7, &format!("laptop{number}"), number, &key.public_key())
                .await?;
            laptop.join(&world.client_config(7, number, key, laptop))?;
            laptop.inside(|| converse(machine(7, 1, 9), PATIENCE))??;
        }
        let resolver = format!("{}/128", NetworkId(7).resolver());
        ensure!(world::run("ip", &["-6", "addr", "show", "dev", "tern0"])?.contains(&resolver));
        let handshake = first.run("wg", &["show", "wgt0", "latest-handshakes"])?;

        world.remove_peer(7, "laptop6").await?;
        wait_for("the peer to be gone", || async {
            Ok(world.status().await?.peers.len() == 1)
        })
        .await?;
        ensure!(
            second
                .inside(|| converse(machine(7, 1, 9), LONG_ENOUGH))?
                .is_err()
        );
        first.inside(|| converse(machine(7, 1, 9), PATIENCE))??;
        ensure!(first.run("wg", &["show", "wgt0", "latest-handshakes"])? == handshake);

        // With its last peer the network leaves this host.
        world.remove_peer(7, "laptop5").await?;
        wait_for("the network to be gone", || async {
            Ok(!world::run("ip", &["-6", "addr", "show", "dev", "tern0"])?.contains(&resolver))
        })
        .await?;
        world
            .add_peer(7, "laptop5", 5, &keys[0].public_key())
            .await?;
        wait_for("the network to be back", || async {
            Ok(world::run("ip", &["-6", "addr", "show", "dev", "tern0"])?.contains(&resolver))
        })
        .await?;
        wait_for("the first laptop to be back", || async {
            Ok(first
                .inside(|| converse(machine(7, 1, 9), Duration::from_secs(6)))?
                .is_ok())
        })
        .await
    })
}

#[test]
fn netns_garbage_hurts_nobody() -> Result<()> {
    World::run(|world| async move {
        serve(machine(7, 1, 9))?;
        let (laptop, flooder) = (world.laptop(0)?, world.laptop(1)?);
        let private = PrivateKey::generate();
        world
            .add_peer(7, "laptop", 5, &private.public_key())
            .await?;
        laptop.join(&world.client_config(7, 5, &private, &laptop))?;
        laptop.inside(|| converse(machine(7, 1, 9), PATIENCE))??;
        let to: SocketAddr = format!("{}:51820", flooder.server).parse()?;
        let flood = flooder.inside(move || -> Result<()> {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            let mut bytes = vec![0; 1400];
            for n in 0u32..50_000 {
                // A cheap generator is random enough for garbage.
                let mut x = n.wrapping_mul(2_654_435_761) | 1;
                for byte in &mut bytes {
                    x ^= x << 13;
                    x ^= x >> 17;
                    x ^= x << 5;
                    *byte = x as u8;
                }
                let length = match n % 6 {
                    kind @ 1..=4 => {
                        bytes[..4].copy_from_slice(&[kind as u8, 0, 0, 0]);
                        [148, 92, 64, 1400][kind as usize - 1]
                    }
                    _ => (x % 1400) as usize,
                };
                // A full queue on this side is no failure of the other.
                let _ = socket.send_to(&bytes[..length], to);
            }
            Ok(())
        });
        flood??;
        laptop.inside(|| converse(machine(7, 1, 9), PATIENCE))??;
        let status = world.status().await?;
        ensure!(status.counters.not_wireguard > 0 && status.counters.bad_mac > 0);
        ensure!(status.counters.unknown_peer > 0, "{:?}", status.counters);
        ensure!(status.peers.len() == 1);
        Ok(())
    })
}

#[test]
fn netns_hosts_carry_their_machines_to_each_other() -> Result<()> {
    World::run(|world| async move {
        serve(machine(7, 1, 9))?;
        let other = world.second_host().await?;
        other.inside(|| serve(machine(7, 2, 4)))??;
        wait_for("the hosts to meet", || async {
            let peers = world.status().await?.peers;
            Ok(peers.iter().any(|p| p.last_handshake.is_some()))
        })
        .await?;
        world::converse_from(machine(7, 1, 9), machine(7, 2, 4), converse)?;
        // Hosts speak to hosts in their own network, and only there.
        other.inside(|| TcpListener::bind((HostId(2).address(), 9000)).map(std::mem::forget))??;
        let infrastructure = SocketAddr::from((HostId(2).address(), 9000));
        world::connect_from(HostId(1).address(), infrastructure, PATIENCE)?;
        let machine_to_host = world::connect_from(machine(7, 1, 9), infrastructure, LONG_ENOUGH);
        ensure!(machine_to_host.is_err());
        // A laptop of the first host reaches Machines of the second.
        let laptop = world.laptop(0)?;
        let private = PrivateKey::generate();
        world
            .add_peer(7, "laptop", 5, &private.public_key())
            .await?;
        laptop.join(&world.client_config(7, 5, &private, &laptop))?;
        laptop.inside(|| converse(machine(7, 2, 4), PATIENCE))??;
        Ok(())
    })
}

#[test]
fn netns_who_calls_what_is_not_there_is_told_at_once() -> Result<()> {
    World::run(|world| async move {
        serve(machine(7, 1, 9))?;
        let laptop = world.laptop(0)?;
        let private = PrivateKey::generate();
        world
            .add_peer(7, "laptop", 5, &private.public_key())
            .await?;
        let absent = SocketAddr::from((machine(7, 1, 77), 8080));
        let asleep = SocketAddr::from((machine(7, 1, 5), 8080));
        for to in [absent, asleep] {
            let before = Instant::now();
            let called = world::connect_from(machine(7, 1, 9), to, PATIENCE);
            let why = called.err().context("nobody is there")?;
            ensure!(
                why.to_string().contains("EHOSTUNREACH") || why.to_string().contains("ENETUNREACH"),
                "{why}"
            );
            ensure!(before.elapsed() < LONG_ENOUGH);
        }
        // Through the tunnel, too.
        laptop.join(&world.client_config(7, 5, &private, &laptop))?;
        laptop.inside(|| converse(machine(7, 1, 9), PATIENCE))??;
        let called = laptop.inside(move || TcpStream::connect_timeout(&absent, PATIENCE))?;
        let why = called.err().context("nobody is there")?.kind();
        ensure!(
            matches!(
                why,
                ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable
            ),
            "{why}"
        );
        Ok(())
    })
}

#[test]
fn netns_nothing_stays_behind_and_a_second_start_says_why_not() -> Result<()> {
    World::run(|world| async move {
        let error = world
            .start_again()
            .await
            .err()
            .context("a second mesh must not start")?;
        ensure!(
            format!("{error}").contains("tern0: the name is taken"),
            "{error}"
        );
        ensure!(world::run("ip", &["-6", "route", "show", "fdaa::/16"])?.contains("dev tern0"));
        ensure!(std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/forwarding")?.trim() == "1");
        let spoken = world::run("ip", &["-6", "route", "get", &machine(7, 1, 9).to_string()])?;
        ensure!(
            spoken.contains(&format!("src {}", HostId(1).address())),
            "{spoken}"
        );
        world.stop().await;
        ensure!(!world::run("ip", &["link"])?.contains("tern0"));
        ensure!(world::run("ip", &["-6", "route", "show", "fdaa::/16"])?.is_empty());
        world.start_again().await?.shutdown().await;
        Ok(())
    })
}
