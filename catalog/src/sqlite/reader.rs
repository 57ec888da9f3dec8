//! Reading: one connection of its own, off the runtime's threads, for a page may come from disk.

use std::sync::Arc;

use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::schema;
use crate::store::{Change, Entry, Listing, Revision, StoreError, WatchBatch};

/// The reading connection. Clones share it.
#[derive(Clone)]
pub(super) struct Reader(Arc<Mutex<Connection>>);

/// A stretch of history.
pub(super) struct Page {
    /// Its commits, as far as they are under the prefix.
    pub(super) batches: Vec<WatchBatch>,
    /// The revision it goes up to.
    pub(super) through: Revision,
}

/// A page ends with the commit that makes it longer than this: what one watch holds in memory.
const PAGE_BYTES: usize = 1 << 20;

impl Reader {
    pub(super) fn new(connection: Connection) -> Self {
        Self(Arc::new(Mutex::new(connection)))
    }

    pub(super) async fn get(&self, key: String) -> Result<Option<Entry>, StoreError> {
        self.with(move |connection| {
            let sql = "SELECT key, value, revision FROM entries WHERE key = ?1";
            let mut statement = connection.prepare_cached(sql)?;
            Ok(statement.query_row(params![key], entry).optional()?)
        })
        .await
    }

    pub(super) async fn list(&self, prefix: String) -> Result<Listing, StoreError> {
        self.with(move |connection| {
            // One read transaction: the revision and the entries are of one moment.
            let snapshot = connection.transaction()?;
            let revision = schema::revision(&snapshot)?;
            let sql = "SELECT key, value, revision FROM entries WHERE key >= ?1 ORDER BY key";
            let mut statement = snapshot.prepare_cached(sql)?;
            let rows = statement.query_map(params![prefix], entry)?;
            // Keys are ordered by bytes, so those with the prefix are the first.
            let entries = rows
                .take_while(|row| row.as_ref().map_or(true, |e| e.key.starts_with(&prefix)))
                .collect::<Result<_, _>>()?;
            Ok(Listing { entries, revision })
        })
        .await
    }

    /// An error when the commits after this revision are no longer all there.
    pub(super) async fn must_keep(&self, after: Revision) -> Result<(), StoreError> {
        self.with(move |connection| kept(connection, after)).await
    }

    /// The commits after one revision and up to another, or the first of them when they are many.
    pub(super) async fn page(
        &self,
        prefix: Arc<str>,
        after: Revision,
        up_to: Revision,
    ) -> Result<Page, StoreError> {
        self.with(move |connection| {
            // One read transaction: what is found to be kept is still there when it is read.
            let snapshot = connection.transaction()?;
            kept(&snapshot, after)?;
            page(&snapshot, &prefix, after, up_to)
        })
        .await
    }

    async fn with<T: Send + 'static>(
        &self,
        read: impl FnOnce(&mut Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let connection = Arc::clone(&self.0);
        tokio::task::spawn_blocking(move || read(&mut connection.lock()))
            .await
            .map_err(|e| StoreError::Unavailable(e.to_string()))?
    }
}

fn kept(connection: &Connection, after: Revision) -> Result<(), StoreError> {
    let oldest = schema::oldest(connection)?;
    if after < oldest {
        return Err(StoreError::Compacted {
            wanted: after,
            oldest,
        });
    }
    Ok(())
}

fn page(
    connection: &Connection,
    prefix: &str,
    after: Revision,
    up_to: Revision,
) -> Result<Page, StoreError> {
    let sql = "SELECT key, value, revision FROM log
        WHERE revision > ?1 AND revision <= ?2 ORDER BY revision, position";
    let mut statement = connection.prepare_cached(sql)?;
    let mut rows = statement.query(params![after.cast_signed(), up_to.cast_signed()])?;
    let mut batches: Vec<WatchBatch> = Vec::new();
    let mut bytes = 0;
    while let Some(row) = rows.next()? {
        let (key, revision) = (row.get::<_, String>(0)?, revision_of(row)?);
        if !key.starts_with(prefix) {
            continue;
        }
        let begins = batches.last().is_none_or(|b| b.revision != revision);
        if begins && bytes > PAGE_BYTES {
            // Up to the last whole commit; the next page goes on from there.
            let through = batches.last().map_or(after, |b| b.revision);
            return Ok(Page { batches, through });
        }
        if begins {
            batches.push(WatchBatch {
                revision,
                changes: Vec::new(),
            });
        }
        let change = match row.get::<_, Option<Vec<u8>>>(1)? {
            Some(value) => {
                bytes += value.len();
                Change::Put(Entry {
                    key,
                    value,
                    revision,
                })
            }
            None => Change::Delete { key },
        };
        if let Some(batch) = batches.last_mut() {
            batch.changes.push(change);
        }
        bytes += size_of::<Change>();
    }
    Ok(Page {
        batches,
        through: up_to,
    })
}

fn entry(row: &Row<'_>) -> rusqlite::Result<Entry> {
    Ok(Entry {
        key: row.get(0)?,
        value: row.get(1)?,
        revision: revision_of(row)?,
    })
}

fn revision_of(row: &Row<'_>) -> rusqlite::Result<Revision> {
    row.get::<_, i64>(2).map(i64::cast_unsigned)
}
