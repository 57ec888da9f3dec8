//! A Machine's TAP device: made, given addresses, a route and neighbours, and removed.
//!
//! The device is persistent: it stays while no monitor has it open, so that a suspended Machine
//! keeps its place and a wake has nothing to do here.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::AsRawFd as _;

use futures::TryStreamExt as _;
use ipnet::Ipv6Net;
use netlink_packet_route::address::AddressHeaderFlags;
use netlink_packet_route::link::LinkAttribute;
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

use super::NetworkError;
use super::slot::{GATEWAY, Slot};

/// `struct virtio_net_hdr` without what later versions added.
pub(crate) const VNET_HEADER: usize = 10;

nix::ioctl_write_ptr_bad!(
    tun_set_vnet_header_size,
    libc::TUNSETVNETHDRSZ as libc::Ioctl,
    libc::c_int
);
nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF as libc::Ioctl, libc::ifreq);
nix::ioctl_write_int_bad!(tun_set_persist, libc::TUNSETPERSIST as libc::Ioctl);

/// What fits, wrapped in WireGuard, into an Ethernet frame over IPv6.
const MTU: u32 = 1420;

/// Makes the device of a slot and sets it up for the Machine at `address`, whatever was there.
pub(crate) async fn create(
    netlink: &Handle,
    slot: Slot,
    address: Ipv6Addr,
) -> Result<(), NetworkError> {
    let name = slot.tap();
    // One that exists may be in use by its monitor, which had it open before this agent was there.
    if nix::net::if_::if_nametoindex(name.as_str()).is_err() {
        drop(open(&name, true).map_err(|e| NetworkError::Tap(name.clone(), e))?);
    }
    // Addresses are given, never made up or learnt; the guest is not to be believed a router.
    for (key, value) in [
        ("addr_gen_mode", "1"),
        ("accept_ra", "0"),
        ("accept_dad", "0"),
    ] {
        let path = format!("/proc/sys/net/ipv6/conf/{name}/{key}");
        std::fs::write(&path, value).map_err(|e| NetworkError::Sysctl(path, e))?;
    }
    let told = |what: &'static str| {
        let name = name.clone();
        move |source: rtnetlink::Error| NetworkError::Netlink { name, what, source }
    };
    let index = index_of(netlink, &name)
        .await
        .map_err(told("find"))?
        .ok_or_else(|| NetworkError::Tap(name.clone(), io::ErrorKind::NotFound.into()))?;
    let link = LinkUnspec::new_with_index(index)
        .address(slot.host_mac().0.to_vec())
        .mtu(MTU)
        .up()
        .build();
    netlink
        .link()
        .set(link)
        .execute()
        .await
        .map_err(told("set up"))?;

    let mut gateway = netlink
        .address()
        .add(index, IpAddr::V6(GATEWAY), 64)
        .replace();
    gateway.message_mut().header.flags |= AddressHeaderFlags::Nodad;
    gateway.execute().await.map_err(told("address"))?;
    netlink
        .address()
        .add(index, IpAddr::V4(slot.host_v4()), 30)
        .replace()
        .execute()
        .await
        .map_err(told("address"))?;

    let own = Ipv6Net::new_assert(address, 112).trunc();
    let route = RouteMessageBuilder::<Ipv6Addr>::new()
        .destination_prefix(own.addr(), own.prefix_len())
        .output_interface(index)
        .build();
    netlink
        .route()
        .add(route)
        .replace()
        .execute()
        .await
        .map_err(told("route"))?;
    for ip in [IpAddr::V6(address), IpAddr::V4(slot.guest_v4())] {
        netlink
            .neighbours()
            .add(index, ip)
            .link_layer_address(&slot.guest_mac().0)
            .replace()
            .execute()
            .await
            .map_err(told("neighbour"))?;
    }
    Ok(())
}

/// Removes the device of this name, and with it its addresses, routes and neighbours.
pub(crate) async fn remove(netlink: &Handle, name: &str) -> Result<(), NetworkError> {
    let told = |source| NetworkError::Netlink {
        name: name.to_owned(),
        what: "remove",
        source,
    };
    match index_of(netlink, name).await.map_err(told)? {
        Some(index) => match netlink.link().del(index).execute().await {
            Err(error) if !is_absent(&error) => Err(told(error)),
            _ => Ok(()),
        },
        None => Ok(()),
    }
}

/// Takes a slot's device down, if there is one: nothing comes out of it or goes into it. [`create`] undoes it.
pub(crate) async fn take_down(netlink: &Handle, slot: Slot) -> Result<(), NetworkError> {
    let name = slot.tap();
    let told = |source| NetworkError::Netlink {
        name: name.clone(),
        what: "take down",
        source,
    };
    let Some(index) = index_of(netlink, &name).await.map_err(told)? else {
        return Ok(());
    };
    let down = LinkUnspec::new_with_index(index).down().build();
    match netlink.link().set(down).execute().await {
        Err(error) if !is_absent(&error) => Err(told(error)),
        _ => Ok(()),
    }
}

/// The slots whose devices exist.
pub(crate) async fn existing(netlink: &Handle) -> Result<Vec<Slot>, NetworkError> {
    let links: Vec<_> = netlink
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(|source| NetworkError::Netlink {
            name: "network devices".to_owned(),
            what: "list",
            source,
        })?;
    let names = links.iter().flat_map(|link| &link.attributes);
    Ok(names
        .filter_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Slot::of_tap(name),
            _ => None,
        })
        .collect())
}

async fn index_of(netlink: &Handle, name: &str) -> Result<Option<u32>, rtnetlink::Error> {
    let mut links = netlink.link().get().match_name(name.to_owned()).execute();
    match links.try_next().await {
        Ok(link) => Ok(link.map(|l| l.header.index)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_absent(error: &rtnetlink::Error) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(message) if message.raw_code() == -libc::ENODEV)
}

/// Opens a TAP: whole Ethernet frames, each after a `virtio_net_hdr` of [`VNET_HEADER`] bytes.
pub(crate) fn open(name: &str, persist: bool) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: `ifreq` is plain data, of which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero: the kernel reads a C string.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the descriptor is open, and `request` lives and is initialized through the call.
    unsafe { tun_set_iff(file.as_raw_fd(), &raw const request) }?;
    // The device remembers the size that the last monitor set.
    let header = VNET_HEADER as libc::c_int;
    // SAFETY: the descriptor is open, and `header` lives through the call.
    unsafe { tun_set_vnet_header_size(file.as_raw_fd(), &raw const header) }?;
    if persist {
        // SAFETY: the descriptor is open; the argument is a plain number.
        unsafe { tun_set_persist(file.as_raw_fd(), 1) }?;
    }
    Ok(file)
}
