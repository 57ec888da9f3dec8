//! The file: its tables, its version and its lock.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, params};

use crate::store::{Revision, StoreError};

/// Revisions kept for watches that start in the past: a follower that was away for minutes goes on, one
/// that was away for longer lists anew.
pub(super) const HISTORY: Revision = 10_000;

/// The layout of the tables; raised with each change of it.
const VERSION: i64 = 1;
/// The layout's number of a file that was left for another store. No version of Tern reads it, those that do not
/// know of moves included.
const MOVED: i64 = 1_000_000;
/// Longest a connection waits for the other's lock.
const BUSY: Duration = Duration::from_secs(10);

const TABLES: &str = "
    BEGIN IMMEDIATE;
    CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS entries (
        key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL, lease INTEGER
    ) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS entries_by_lease ON entries (lease) WHERE lease IS NOT NULL;
    CREATE TABLE IF NOT EXISTS log (
        revision INTEGER NOT NULL, position INTEGER NOT NULL, key TEXT NOT NULL, value BLOB,
        PRIMARY KEY (revision, position)
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS leases (id INTEGER PRIMARY KEY, ttl_ms INTEGER NOT NULL);
    INSERT OR IGNORE INTO meta VALUES ('revision', 0), ('oldest', 0), ('version', 1);
    COMMIT;
";

/// Keeps a second process out for as long as it lives: two writers with caches of their own would each
/// feed only their own watches.
pub(super) fn lock(path: &Path) -> Result<File, StoreError> {
    let path = path.with_extension("lock");
    let failed = |e: &dyn std::fmt::Display| {
        StoreError::Unavailable(format!("{} cannot be locked: {e}", path.display()))
    };
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(|e| failed(&e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(failed(
            &"another process has this catalog open; is `tern serve` running already?",
        )),
        Err(std::fs::TryLockError::Error(e)) => Err(failed(&e)),
    }
}

/// Makes the file if there is none, readable by its owner alone: SQLite would make it readable by all.
///
/// Only under the [`lock`], for closing any descriptor of the file would end the locks that SQLite has
/// on it in this process.
pub(super) fn create(path: &Path) -> std::io::Result<()> {
    let mut options = File::options();
    match options.write(true).create_new(true).mode(0o600).open(path) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => Err(e),
        _ => Ok(()),
    }
}

/// A connection with our settings.
pub(super) fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // A commit is on disk before it is answered.
    connection.pragma_update(None, "synchronous", "FULL")?;
    Ok(connection)
}

/// Makes the tables, or checks that they are of this version.
pub(super) fn prepare(connection: &Connection, path: &Path) -> Result<(), StoreError> {
    let wrong = |e: &dyn std::fmt::Display| {
        StoreError::Unavailable(format!(
            "{} is not a catalog that this version reads: {e}",
            path.display()
        ))
    };
    // Looked at first: the file of a newer version is left exactly as it is.
    let sql = "SELECT count(*) FROM sqlite_schema WHERE name = 'meta'";
    let tables: i64 = connection
        .query_row(sql, [], |row| row.get(0))
        .map_err(|e| wrong(&e))?;
    if tables > 0 {
        let version = meta(connection, "version").map_err(|e| wrong(&e))?;
        if version == MOVED {
            let sql = "SELECT target FROM moved";
            let to: String = connection
                .query_row(sql, [], |row| row.get(0))
                .map_err(|e| wrong(&e))?;
            return Err(StoreError::Invalid(format!(
                "the catalog in {} was moved to {to}: serve from there",
                path.display()
            )));
        }
        if version != VERSION {
            return Err(wrong(&format!(
                "it has layout {version}, this version of tern reads layout {VERSION}"
            )));
        }
    }
    connection.execute_batch(TABLES).map_err(|e| wrong(&e))
}

/// Marks the file as left for another store: from now on it is refused, and its records stay.
pub(super) fn mark_moved(connection: &mut Connection, to: &str) -> rusqlite::Result<()> {
    let marking = connection.transaction()?;
    marking.execute_batch("CREATE TABLE moved (target TEXT NOT NULL)")?;
    marking.execute("INSERT INTO moved VALUES (?1)", params![to])?;
    set_meta(&marking, "version", MOVED.cast_unsigned())?;
    marking.commit()
}

/// The revision of the last commit.
pub(super) fn revision(connection: &Connection) -> rusqlite::Result<Revision> {
    meta(connection, "revision").map(i64::cast_unsigned)
}

/// The oldest revision that a watch can start after.
pub(super) fn oldest(connection: &Connection) -> rusqlite::Result<Revision> {
    meta(connection, "oldest").map(i64::cast_unsigned)
}

/// Sets one of the numbers above.
pub(super) fn set_meta(
    connection: &Connection,
    name: &str,
    value: Revision,
) -> rusqlite::Result<()> {
    let mut statement = connection.prepare_cached("UPDATE meta SET value = ?2 WHERE name = ?1")?;
    statement
        .execute(params![name, value.cast_signed()])
        .map(drop)
}

fn meta(connection: &Connection, name: &str) -> rusqlite::Result<i64> {
    let mut statement = connection.prepare_cached("SELECT value FROM meta WHERE name = ?1")?;
    statement.query_row(params![name], |row| row.get(0))
}
