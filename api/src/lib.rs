//! The REST API, compatible with Fly.io's Machines API, and the image registry on the same port.
//!
//! A call that changes a Machine writes what is wanted ([`tern_catalog::Machine::desired`]) and answers;
//! the agent of the Machine's host makes it so, and `wait` tells when. What only that agent can do at
//! once (exec, logs, signals) goes through [`HostGateway`].
//!
//! Calls that Fly.io keeps elsewhere (GraphQL, NATS) are here: organizations, WireGuard peers, tokens and
//! logs. They are listed in `routes.rs`.

mod apps;
mod auth;
mod certificates;
mod deletion;
mod error;
mod exec;
mod extract;
mod forward;
mod gateway;
mod hosts;
mod invites;
mod lease;
mod logs;
mod machines;
mod number;
mod orgs;
mod peers;
mod platform;
mod registry;
mod releases;
mod rights;
mod routes;
mod secrets;
mod server;
mod tokens;
mod volumes;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use auth::token_hash;
pub use error::ApiError;
pub use exec::{EXEC_MEDIA_TYPE, ExecEnd, ExecStart};
pub use gateway::{
    ExecFeed, ExecOutput, ExecRequest, ExecSession, GatewayError, HostGateway, LogLine, LogQuery,
    MachineMemory, StartPhase, StartTrace,
};
pub use invites::{Invitation, Inviter};
pub use registry::REGISTRY_NAME;
pub use secrets::SecretSealer;
pub use server::{ApiConfig, ApiServer};
