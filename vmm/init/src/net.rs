//! Brings the guest's network up, as its host has planned it.

use std::fs;
use std::net::IpAddr;

use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;
use tern_guest::config::{InterfaceConfig, parse_mac};

use crate::netlink::Netlink;

/// Brings up the loopback and every interface that is configured.
pub fn bring_up(interfaces: &[InterfaceConfig]) -> Result<()> {
    for (name, value) in SETTINGS {
        set(name, value);
    }
    let mut netlink = Netlink::open().context("netlink")?;
    let lo = if_nametoindex("lo").context("interface lo")?;
    netlink.set_link(lo, None, None).context("interface lo")?;
    for interface in interfaces {
        bring_up_one(&mut netlink, interface)
            .with_context(|| format!("interface {}", interface.name))?;
    }
    Ok(())
}

fn bring_up_one(netlink: &mut Netlink, interface: &InterfaceConfig) -> Result<()> {
    let name = interface.name.as_str();
    let index = if_nametoindex(name).context("there is no such interface")?;
    // All is configured here: nothing that a neighbour advertises shall change it, and the second
    // that a search for duplicates takes would delay the first packet.
    set(&format!("ipv6/conf/{name}/accept_ra"), "0");
    set(&format!("ipv6/conf/{name}/accept_dad"), "0");
    netlink.set_link(
        index,
        Some(interface.mtu),
        interface.mac.as_deref().and_then(parse_mac),
    )?;
    for address in &interface.addresses {
        netlink
            .add_address(index, *address)
            .with_context(|| format!("address {address}"))?;
    }
    let gateways = [
        interface.gateway_v4.map(IpAddr::V4),
        interface.gateway_v6.map(IpAddr::V6),
    ];
    for gateway in gateways.into_iter().flatten() {
        let context = || format!("route through {gateway}");
        netlink
            .add_default_route(index, gateway)
            .with_context(context)?;
    }
    Ok(())
}

/// A kernel that lacks a setting needs it not.
fn set(name: &str, value: &str) {
    let _ = fs::write(format!("/proc/sys/net/{name}"), value);
}

/// What container engines set too: images that run as an ordinary user expect to listen on port 80
/// and to ping.
const SETTINGS: [(&str, &str); 2] = [
    ("ipv4/ip_unprivileged_port_start", "0"),
    ("ipv4/ping_group_range", "0 2147483647"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, OpenOptions};
    use std::net::UdpSocket;
    use std::os::fd::AsRawFd;

    /// A TAP device in the network namespace of this thread.
    fn tap(name: &str) -> File {
        let tun = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun");
        let tun = tun.expect("this test makes a TAP device: it needs /dev/net/tun");
        // `struct ifreq`: a name, then flags.
        let mut request = [0u8; 40];
        request[..name.len()].copy_from_slice(name.as_bytes());
        request[16..18].copy_from_slice(&(libc::IFF_TAP as u16).to_ne_bytes());
        // SAFETY: the kernel reads and writes no more than the 40 bytes of an `ifreq`.
        let made = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
        assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
        tun
    }

    #[test]
    fn the_kernel_takes_links_addresses_and_routes() {
        std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
                .expect("this test makes a network namespace: run it as root");
            let _tap = tap("eth0");
            let interface = InterfaceConfig {
                mac: Some("02:00:00:00:00:07".into()),
                addresses: vec![
                    "172.19.0.2/30".parse().unwrap(),
                    "fdaa:0:1::2/112".parse().unwrap(),
                ],
                gateway_v4: Some("172.19.0.1".parse().unwrap()),
                gateway_v6: Some("fe80::1".parse().unwrap()),
                ..Default::default()
            };
            for _ in 0..2 {
                bring_up(std::slice::from_ref(&interface)).unwrap();
            }
            // An address that was still looking for its twin could not be used.
            let socket = UdpSocket::bind("[fdaa:0:1::2]:0").unwrap();
            socket.connect("[2001:db8::1]:9").expect("there is a route");
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect("192.0.2.1:9").expect("there is a route");
            assert_eq!(socket.local_addr().unwrap().ip().to_string(), "172.19.0.2");
            UdpSocket::bind("[::1]:0").expect("lo is up");

            let link = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            assert!(link.contains("eth0:"), "{link}");
            let missing = InterfaceConfig {
                name: "eth9".into(),
                ..Default::default()
            };
            let error = format!("{:#}", bring_up(&[missing]).unwrap_err());
            assert!(
                error.starts_with("interface eth9: there is no such interface"),
                "{error}"
            );
            let unreachable = InterfaceConfig {
                gateway_v4: Some("127.0.0.1".parse().unwrap()),
                ..Default::default()
            };
            let error = format!("{:#}", bring_up(&[unreachable]).unwrap_err());
            assert!(
                error.starts_with("interface eth0: route through 127.0.0.1: "),
                "{error}"
            );
        })
        .join()
        .unwrap();
    }
}
