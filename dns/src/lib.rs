//! The `.internal` resolver.
//!
//! It listens on `fdaa::3` and on `<net>::3` of every network that has something on this host. Names
//! under `internal.` and the reverse names of the private network are answered from the catalog's
//! [`View`](tern_catalog::View), for the network that the asker's address belongs to: a name of
//! another organization's does not exist. Everything else goes to the host's own resolvers.
//!
//! - `zone.rs` knows the names, `reverse.rs` the addresses, `reply.rs` makes a question's bytes an
//!   answer's; none of them does I/O.
//! - `forward.rs` asks upstream, with a bounded number of questions on their way and a cache.
//! - `listener.rs` serves one address over UDP and TCP, `server.rs` keeps the set of them right.
//!
//! Only started Machines have addresses here: asking for a name wakes nobody.
//!
//! Messages are RFC 1035 with EDNS (RFC 6891), read and written by `hickory-proto`. The loops around
//! them are our own: hickory's server has no bound on its tasks, and drops replies when 32 wait.

mod cache;
mod forward;
#[doc(hidden)]
pub mod fuzzing;
mod listener;
mod quota;
mod reply;
mod reverse;
mod server;
#[cfg(test)]
mod testing;
mod upstream;
mod wire;
mod zone;

pub use server::{Dns, DnsConfig, DnsError};
