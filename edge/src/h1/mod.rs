//! HTTP/1 framing (RFC 9112), of both sides of a request.
//!
//! `scan`, `head` and `body` read, without I/O; `out` gathers what is to be written; `client` and `app` are
//! the two ends of a relay.

pub mod app;
pub mod body;
pub mod buffer;
pub mod client;
pub mod head;
pub mod out;
pub mod scan;
