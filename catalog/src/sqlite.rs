//! The store of one host: SQLite in WAL mode with full synchronization.
//!
//! One thread owns the writing connection and serves a queue; whatever waits there when it comes round
//! is committed in one SQLite transaction, a savepoint each, so that many writers share one `fsync`.
//! Reads go to a second connection. Every commit's changes are kept in a bounded log; a watch reads
//! that log, past and present alike, so that it has no gaps and a slow one costs no memory.

mod feed;
mod leases;
mod reader;
mod schema;
mod writer;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot, watch};

use crate::store::{
    Entry, LeaseId, Listing, Revision, Store, StoreError, Transaction, Watch, limits,
};
use feed::Feed;
use reader::Reader;
use writer::{Job, Writer};

/// A store in one SQLite file. Clones share it; the last one closes the file.
#[derive(Clone)]
pub struct SqliteStore {
    reader: Reader,
    /// The revision on disk, told by the writer.
    committed: watch::Receiver<Revision>,
    writing: Arc<Writing>,
}

/// The way to the writer.
struct Writing {
    /// `None` only while it is being dropped.
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// Jobs that may wait for the writer; more make their callers wait.
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
        let lock = schema::lock(path)?;
        schema::create(path).map_err(|e| failed(&e))?;
        let connection = schema::connect(path).map_err(|e| failed(&e))?;
        schema::prepare(&connection, path)?;
        let reader = Reader::new(schema::connect(path).map_err(|e| failed(&e))?);
        let (jobs, queue) = mpsc::channel(QUEUE);
        let (writer, committed) = Writer::new(connection, lock, history).map_err(|e| failed(&e))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .map_err(|e| failed(&e))?;
        let thread = std::thread::Builder::new()
            .name("catalog-writer".to_owned())
            .spawn(move || runtime.block_on(writer.run(queue)))
            .map_err(|e| failed(&e))?;
        Ok(Self {
            reader,
            committed,
            writing: Arc::new(Writing {
                jobs: Some(jobs),
                thread: Some(thread),
            }),
        })
    }

    /// Marks a file that nobody has open as left for another store, which `to` names. It is refused by
    /// [`SqliteStore::open`] from then on, also by that of earlier versions; its records stay in it.
    pub fn mark_moved(path: &Path, to: &str) -> Result<(), StoreError> {
        let _lock = schema::lock(path)?;
        let mut connection = schema::connect(path)?;
        schema::prepare(&connection, path)?;
        Ok(schema::mark_moved(&mut connection, to)?)
    }

    async fn ask<T>(
        &self,
        job: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Job,
    ) -> Result<T, StoreError> {
        let gone = || StoreError::Unavailable("its writer has ended".to_owned());
        let (reply, answer) = oneshot::channel();
        let jobs = self.writing.jobs.as_ref().ok_or_else(gone)?;
        jobs.send(job(reply)).await.map_err(|_| gone())?;
        // It has the job, and ended with it.
        let lost = |_| StoreError::Unknown("its writer has ended".to_owned());
        answer.await.map_err(lost)?
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.reader.get(key.to_owned()).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.reader.list(prefix.to_owned()).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
        limits::check(&transaction)?;
        self.ask(|reply| Job::Commit { transaction, reply }).await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        self.reader.must_keep(after).await?;
        Ok(Feed::start(
            self.reader.clone(),
            self.committed.clone(),
            prefix,
            after,
        ))
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.ask(|reply| Job::Grant { ttl, reply }).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.ask(|reply| Job::KeepAlive { lease, reply }).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.ask(|reply| Job::Revoke { lease, reply }).await
    }
}

impl Drop for Writing {
    /// Waits for what is queued to be done and the file to be let go, so that whoever opens it next
    /// finds it free. That takes a few commits' time at most.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(Err(_)) = self.thread.take().map(std::thread::JoinHandle::join) {
            tracing::error!("the catalog's writer had panicked");
        }
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Unavailable(error.to_string())
    }
}
