//! Certificates for every host name that the catalog wants served.
//!
//! - [`Issuer`] gets them from an ACME directory (RFC 8555), renews them in time, stays within its limits, comes
//!   when it says (`Retry-After`), and backs off when that fails. An order is followed to its end, also over a
//!   restart. Challenges go into the catalog, so that every ingress can answer them.
//! - [`SniResolver`] gives them to rustls by server name, and answers tls-alpn-01 (RFC 8737).
//! - Private keys leave this crate only sealed ([`Sealer`]).

mod budget;
mod client;
mod issuer;
mod order;
mod plan;
mod resolver;
mod seal;

pub use issuer::{CertsConfig, CertsError, Issuer};
pub use resolver::SniResolver;
pub use seal::{SealError, Sealer};
