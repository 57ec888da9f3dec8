//! The targets, and the table of them.

mod balloon;
mod block;
mod config;
mod control;
mod dns;
mod fly_toml;
mod frames;
mod image;
mod mesh;
mod net;
mod snapshot;
mod transport;
mod virtqueue;
mod vsock;

use crate::Target;

macro_rules! targets {
    ($($module:ident, $max_len:expr, $about:expr;)*) => {
        /// All targets.
        pub const TARGETS: &[Target] = &[$(Target {
            name: stringify!($module),
            about: $about,
            max_len: $max_len,
            run: $module::run,
            seeds: $module::seeds,
        }),*];
    };
}

targets! {
    virtqueue, 1024, "descriptors and rings of a guest, by the code all devices share";
    transport, 1024, "a guest's reads and writes of a device's registers, snapshots in between";
    block, 1024, "a guest's disk requests";
    net, 1024, "a guest's network rings, and frames from the host's side";
    balloon, 1024, "pages that a guest gives back";
    vsock, 2048, "a guest's vsock packets, and host programs on the other end";
    snapshot, 4096, "a snapshot's state file, with right and wrong checksums, and its memory file";
    config, 2048, "vm.json";
    control, 2048, "bytes at the monitor's control socket";
    frames, 2048, "frames, messages and run archives between host and guest";
    dns, 1024, "questions to the resolver, and upstream's answers";
    mesh, 2048, "datagrams from strangers and inner packets from peers with keys";
    fly_toml, 2048, "fly.toml";
    image, 4096, "an image's layers, to an EROFS disk";
}
