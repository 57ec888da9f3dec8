//! The WireGuard network between hosts and to laptops.
//!
//! Every server has one TUN device and one UDP port. Packets of the private network `fdaa::/16`
//! that are not for a Machine of this server are routed into the device; here they are checked,
//! encrypted for the one peer that owns the destination, and sent. What comes back is decrypted,
//! checked again, and handed to the kernel.
//!
//! - [`Engine`] decides: it is given packets and the time, and gives packets. It does no I/O.
//! - [`Mesh`] is the skin around it: device, socket, addresses, routes, and the peers of the [`View`].
//! - [`MeshKey`] is this server's key pair, which never leaves it.
//! - [`ClientConfig`] writes what a stock WireGuard client needs to join.
//!
//! What it promises: a packet passes only from the peer that owns its source, and only within one
//! network (`policy.rs`); strangers cost a bounded amount of work and no memory (`gate.rs`);
//! no datagram stops it.
//!
//! The protocol is <https://www.wireguard.com/papers/wireguard.pdf>, as `boringtun` implements it.
//!
//! [`View`]: tern_catalog::View

mod client;
mod counters;
mod engine;
mod gate;
mod icmp;
mod key;
mod link;
mod mesh;
mod packet;
mod peers;
mod policy;
mod prefix;
mod tun;
mod udp;
mod worker;

pub use client::ClientConfig;
pub use counters::Counters;
pub use engine::{Engine, Path, PeerStatus, Sink};
pub use key::{KeyError, MeshKey, PrivateKey, PublicKey};
pub use link::LinkError;
pub use mesh::{Mesh, MeshConfig, MeshError, Status};
pub use peers::{Grant, peers_of};

/// Bytes of an inner packet: 1500 of an ordinary path, less IPv6, UDP and WireGuard's own 32.
pub const MTU: u16 = 1420;

/// The port that WireGuard listens on unless told otherwise.
pub const PORT: u16 = 51820;
