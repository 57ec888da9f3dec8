//! What a host and the init of its guest say to each other.
//!
//! Two things cross the border between a Machine and its host:
//!
//! - before boot, a [`RunConfig`], which travels as `/tern/run.json` in a small initramfs archive of
//!   its own ([`archive`]);
//! - while the Machine runs, [frames](frame) over vsock port [`GUEST_PORT`], which carry the
//!   [messages](message): one [`Request`] per connection, then its answers.
//!
//! Nothing here does I/O or knows the time, so that the synchronous init and the asynchronous host
//! agent share it, and every parser can be fed garbage in a unit test.

pub mod archive;
pub mod config;
pub mod frame;
pub mod message;
pub mod signal;

pub use archive::{RUN_JSON, read_run_archive, run_archive};
pub use config::RunConfig;
pub use frame::{Decoder, Encoder, Frame, FrameError, FrameKind};
pub use message::{Event, ExecInput, ExecRequest, ExitStatus, Reply, Request, Status};

/// The vsock port on which init listens.
pub const GUEST_PORT: u32 = 10_000;
