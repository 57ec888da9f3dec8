//! The KVM monitor of one Tern Machine.
//!
//! One process runs one guest. It boots a Linux kernel directly ([`boot`]), gives it a handful of virtio
//! devices ([`virtio`]), answers a small HTTP API on a Unix socket ([`control`]), and can put the whole
//! guest into two files and take it from there again ([`snapshot`]). It knows nothing of apps, images
//! or networks; the host's agent does.
//!
//! [`machine::Machine`] is the whole; [`run::run`] is its life. Threads:
//!
//! | thread | what |
//! |---|---|
//! | main | owns the [`machine::Machine`] and carries out one command after the other; takes stock when a guest has woken ([`wake`]) |
//! | `vcpu<n>` | runs the guest ([`vcpu`]) and answers its exits ([`bus`]) |
//! | `block`, `net`, `vsock`, `rng`, `balloon` | one per device, at work from its driver's "ready" on ([`virtio::worker`]) |
//! | `control` | the API and SIGTERM; hands commands to main |
//! | `vhost-net` | in place of `net` where the kernel moves a card's frames: sets it up, and sleeps ([`virtio::net::vhost`]) |
//! | `block-io` | four per disk that has no `io_uring` ([`virtio::block`]) |
//! | `prefetch` | maps the pages of the last wake, in a restored guest's first moments ([`snapshot`]) |
//!
//! All are made before the guest runs, and wait for their work: nobody may make one later ([`jail::threads`]). By then
//! the process has given up everything but what it has open: see [`jail`].

pub mod boot;
pub mod bus;
pub mod config;
pub mod control;
pub mod exit;
pub mod jail;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod probe;
pub mod run;
pub mod serial;
pub mod snapshot;
pub mod trace;
pub mod vcpu;
pub mod virtio;
pub mod wake;

/// Stack of each of the monitor's threads. Rust's default of 2 MiB is a huge page's size: where the host
/// hands those out unasked, a stack of which 20 KiB are used takes 2 MiB of its memory.
pub(crate) const THREAD_STACK_BYTES: usize = 512 << 10;
