//! The store of one host: SQLite in WAL mode with full synchronization.
//!
//! One thread owns the writing connection and serves a queue; whatever waits there when it comes round
//! is committed in one SQLite transaction, a savepoint each, so that many writers share one `fsync`.
//! Reads go to a second connection. Every commit's changes are kept in a bounded log, from which a watch
//! is fed before it goes live, so that it has no gaps.

mod schema;
mod watchers;
mod writer;

use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension as _, params};
use tokio::sync::{mpsc, oneshot};

use crate::store::{Entry, LeaseId, Listing, Revision, Store, StoreError, Transaction, Watch};
use writer::{Job, Writer};

/// A store in one SQLite file. Clones share it.
#[derive(Clone)]
pub struct SqliteStore {
    jobs: mpsc::Sender<Job>,
    reader: Arc<Mutex<Connection>>,
}

/// Transactions that may wait for the writer; more make their callers wait.
const QUEUE: usize = 1024;

impl SqliteStore {
    /// Opens the file, or makes it (mode 0600). Only one process may have it open.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_with(path, schema::HISTORY)
    }

    /// As [`SqliteStore::open`], keeping this many revisions for watches that start in the past.
    pub fn open_with(path: &Path, history: Revision) -> Result<Self, StoreError> {
        let failed = |e: &dyn std::fmt::Display| {
            StoreError::Unavailable(format!("{} cannot be opened: {e}", path.display()))
        };
        // SQLite would make it readable by all.
        std::fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path)
            .map_err(|e| failed(&e))?;
        let lock = schema::lock(path)?;
        let writing = schema::connect(path).map_err(|e| failed(&e))?;
        schema::prepare(&writing, path)?;
        let reader = schema::connect(path).map_err(|e| failed(&e))?;
        let (jobs, queue) = mpsc::channel(QUEUE);
        let writer = Writer::new(writing, lock, history).map_err(|e| failed(&e))?;
        std::thread::Builder::new()
            .name("catalog-writer".to_owned())
            .spawn(move || writer.run(queue))
            .map_err(|e| failed(&e))?;
        Ok(Self {
            jobs,
            reader: Arc::new(Mutex::new(reader)),
        })
    }

    async fn ask<T>(
        &self,
        job: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Job,
    ) -> Result<T, StoreError> {
        let gone = || StoreError::Unavailable("its writer has ended".to_owned());
        let (reply, answer) = oneshot::channel();
        self.jobs.send(job(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let reader = self.reader.lock();
        let sql = "SELECT key, value, revision FROM entries WHERE key = ?1";
        let mut statement = reader.prepare_cached(sql)?;
        Ok(statement.query_row(params![key], entry).optional()?)
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        let mut reader = self.reader.lock();
        // One read transaction: the revision and the entries are of one moment.
        let snapshot = reader.transaction()?;
        let revision = schema::revision(&snapshot)?;
        let entries = {
            let sql = "SELECT key, value, revision FROM entries WHERE key >= ?1 ORDER BY key";
            let mut statement = snapshot.prepare_cached(sql)?;
            let rows = statement.query_map(params![prefix], entry)?;
            // Keys are ordered by bytes, so those with the prefix are the first.
            rows.take_while(|row| row.as_ref().map_or(true, |e| e.key.starts_with(prefix)))
                .collect::<Result<_, _>>()?
        };
        Ok(Listing { entries, revision })
    }

    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
        schema::check(&transaction)?;
        self.ask(|reply| Job::Commit { transaction, reply }).await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        let prefix = prefix.to_owned();
        self.ask(|reply| Job::Watch {
            prefix,
            after,
            reply,
        })
        .await
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let lease = self.ask(|reply| Job::Grant { ttl, reply }).await?;
        self.expire_later(lease, ttl);
        Ok(lease)
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.ask(|reply| Job::KeepAlive { lease, reply }).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.ask(|reply| Job::Revoke { lease, reply }).await
    }
}

impl SqliteStore {
    /// Looks at a lease whenever it may have ended, until it has.
    fn expire_later(&self, lease: LeaseId, ttl: Duration) {
        // Weak: a lease must not keep the store open.
        let jobs = self.jobs.downgrade();
        tokio::spawn(async move {
            let mut wait = ttl;
            loop {
                tokio::time::sleep(wait).await;
                let Some(jobs) = jobs.upgrade() else { return };
                let (reply, answer) = oneshot::channel();
                if jobs.send(Job::Expire { lease, reply }).await.is_err() {
                    return;
                }
                drop(jobs);
                match answer.await {
                    Ok(Ok(Some(left))) => wait = left,
                    _ => return,
                }
            }
        });
    }
}

fn entry(row: &rusqlite::Row<'_>) -> rusqlite::Result<Entry> {
    Ok(Entry {
        key: row.get(0)?,
        value: row.get(1)?,
        revision: row.get::<_, i64>(2)?.cast_unsigned(),
    })
}

impl StoreError {
    fn from_sqlite(error: &rusqlite::Error) -> Self {
        Self::Unavailable(error.to_string())
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        Self::from_sqlite(&error)
    }
}
