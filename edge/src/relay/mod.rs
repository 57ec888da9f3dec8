//! A request, from its parsed head to the last byte of its reply: one future, whatever versions its client
//! and its app speak.
//!
//! ```text
//! exchange ─► table: which site ─► gate: a place at a Machine ─► pool: a connection ─► pump: both ways
//!    ▲                                     │ none                    │ fails              │ lost
//!    └── a page, or the next try ◄─────────┴─────────────────────────┴────────────────────┘
//! ```

mod exchange;
pub mod pool;
mod pump;
mod sides;

pub use exchange::{Connection, Ended, exchange, tells_of_h3};
pub use pool::Pool;
pub use sides::{Client, Gone, Lost, Reply, ReplyFields, write_trailers};
