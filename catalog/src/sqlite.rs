//! The store of one host: SQLite in WAL mode.

/// A store in one SQLite file.
pub struct SqliteStore {}
