//! The thread that writes.

use std::fs::File;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension as _, TransactionBehavior, params};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::leases::Leases;
use super::schema;
use crate::store::{LeaseId, Op, Revision, StoreError, Transaction, limits};

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

/// What the writer is asked.
pub(super) enum Job {
    Commit {
        transaction: Transaction,
        reply: Reply<Revision>,
    },
    Grant {
        ttl: Duration,
        reply: Reply<LeaseId>,
    },
    KeepAlive {
        lease: LeaseId,
        reply: Reply<()>,
    },
    Revoke {
        lease: LeaseId,
        reply: Reply<()>,
    },
}

/// Owns the writing connection.
pub(super) struct Writer {
    connection: Connection,
    leases: Leases,
    committed: watch::Sender<Revision>,
    history: Revision,
    _lock: File,
}

/// Transactions that share one `fsync` at most: the first must not wait for ever.
const GROUP: usize = 256;
/// Until a lease is tried again that could not be ended because the disk failed.
const RETRY: Duration = Duration::from_secs(1);

impl Writer {
    /// A writer, and where it tells the revision that is on disk.
    pub(super) fn new(
        connection: Connection,
        lock: File,
        history: Revision,
    ) -> rusqlite::Result<(Self, watch::Receiver<Revision>)> {
        let mut leases = Leases::default();
        let now = Instant::now();
        let mut statement = connection.prepare("SELECT id, ttl_ms FROM leases")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let ttl = Duration::from_millis(row.get::<_, i64>(1)?.unsigned_abs());
            leases.add(LeaseId(row.get(0)?), ttl, now);
        }
        drop(rows);
        drop(statement);
        let (committed, told) = watch::channel(schema::revision(&connection)?);
        let writer = Self {
            connection,
            leases,
            committed,
            history,
            _lock: lock,
        };
        Ok((writer, told))
    }

    /// Serves the queue, and ends leases in time, until the last store handle is gone.
    pub(super) async fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        loop {
            let first = match self.leases.next_end() {
                Some(end) => match tokio::time::timeout_at(end, queue.recv()).await {
                    Ok(job) => job,
                    Err(_) => {
                        self.end_leases();
                        continue;
                    }
                },
                None => queue.recv().await,
            };
            let Some(first) = first else { return };
            self.serve(first, &mut queue);
            // Also when the queue is never empty.
            self.end_leases();
        }
    }

    /// Does a job, and those that wait behind it, commits as one group.
    fn serve(&mut self, first: Job, queue: &mut mpsc::Receiver<Job>) {
        let mut commits = Vec::new();
        let mut next = Some(first);
        while let Some(job) = next.take() {
            match job {
                Job::Commit { transaction, reply } => commits.push((transaction, reply)),
                other => {
                    // Order is kept: what came before is done before.
                    self.commit_all(std::mem::take(&mut commits));
                    self.lease_job(other);
                }
            }
            if commits.len() < GROUP {
                next = queue.try_recv().ok();
            }
        }
        self.commit_all(commits);
    }

    fn lease_job(&mut self, job: Job) {
        // A caller that has gone needs no answer.
        match job {
            Job::Commit { transaction, reply } => self.commit_all(vec![(transaction, reply)]),
            Job::Grant { ttl, reply } => drop(reply.send(self.grant(ttl))),
            Job::KeepAlive { lease, reply } => drop(reply.send(self.keep_alive(lease))),
            Job::Revoke { lease, reply } => drop(reply.send(self.revoke(lease))),
        }
    }

    /// Commits transactions in one SQLite transaction, each in its savepoint, and answers them when all
    /// are on disk.
    fn commit_all(&mut self, commits: Vec<(Transaction, Reply<Revision>)>) {
        if commits.is_empty() {
            return;
        }
        let (transactions, replies): (Vec<_>, Vec<_>) = commits.into_iter().unzip();
        match self.group(&transactions) {
            Ok((outcomes, revision)) => {
                self.tell(revision);
                for (outcome, reply) in outcomes.into_iter().zip(replies) {
                    let _ = reply.send(outcome);
                }
            }
            // Nothing of the group happened, and each of it is told.
            Err(error) => {
                tracing::error!(%error, "commits failed");
                for reply in replies {
                    let _ = reply.send(Err(StoreError::Unavailable(error.to_string())));
                }
            }
        }
    }

    /// Each transaction's outcome, and the revision after all of them.
    fn group(
        &mut self,
        transactions: &[Transaction],
    ) -> rusqlite::Result<(Vec<Result<Revision, StoreError>>, Revision)> {
        let mut group = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut revision = schema::revision(&group)?;
        let mut outcomes = Vec::with_capacity(transactions.len());
        for transaction in transactions {
            // Dropped without a commit, a savepoint undoes just its own transaction.
            let savepoint = group.savepoint()?;
            let outcome = check(&savepoint, transaction, &self.leases)
                .and_then(|()| Ok(apply(&savepoint, &transaction.ops, revision + 1)?));
            if outcome.is_ok() {
                savepoint.commit()?;
            } else {
                drop(savepoint);
            }
            outcomes.push(outcome.map(|changed| {
                // What changes nothing is no commit: no watch would ever tell its revision.
                revision += Revision::from(changed);
                revision
            }));
        }
        schema::set_meta(&group, "revision", revision)?;
        compact(&group, revision, self.history)?;
        group.commit()?;
        Ok((outcomes, revision))
    }

    fn tell(&self, revision: Revision) {
        self.committed
            .send_if_modified(|told| std::mem::replace(told, revision) != revision);
    }

    fn grant(&mut self, ttl: Duration) -> Result<LeaseId, StoreError> {
        limits::check_lease(ttl)?;
        let millis = i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX);
        // Random: an id that is used again would let who held the old lease keep the new one alive.
        let lease = LeaseId(rand::random_range(1..=i64::MAX));
        self.connection.execute(
            "INSERT INTO leases (id, ttl_ms) VALUES (?1, ?2)",
            params![lease.0, millis],
        )?;
        self.leases.add(lease, ttl, Instant::now());
        Ok(lease)
    }

    fn keep_alive(&mut self, lease: LeaseId) -> Result<(), StoreError> {
        // One whose time is over has ended, though its keys may be there for another moment.
        self.end_leases();
        if self.leases.keep_alive(lease, Instant::now()) {
            Ok(())
        } else {
            Err(StoreError::LeaseGone(lease))
        }
    }

    fn revoke(&mut self, lease: LeaseId) -> Result<(), StoreError> {
        if !self.leases.contains(lease) {
            return Err(StoreError::LeaseGone(lease));
        }
        Ok(self.end(lease)?)
    }

    fn end_leases(&mut self) {
        let now = Instant::now();
        for lease in self.leases.over(now) {
            if let Err(error) = self.end(lease) {
                tracing::error!(lease = lease.0, %error, "a lease that is over cannot be ended");
                self.leases.postpone(lease, now + RETRY);
            }
        }
    }

    /// Deletes a lease and its keys in one commit.
    fn end(&mut self, lease: LeaseId) -> rusqlite::Result<()> {
        let ending = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        let keys = {
            let sql = "SELECT key FROM entries WHERE lease = ?1 ORDER BY key";
            let mut statement = ending.prepare_cached(sql)?;
            let keys = statement.query_map(params![lease.0], |row| row.get(0))?;
            keys.map(|key| Ok(Op::Delete { key: key? }))
                .collect::<rusqlite::Result<Vec<_>>>()?
        };
        let mut revision = schema::revision(&ending)?;
        revision += Revision::from(apply(&ending, &keys, revision + 1)?);
        ending.execute("DELETE FROM leases WHERE id = ?1", params![lease.0])?;
        schema::set_meta(&ending, "revision", revision)?;
        compact(&ending, revision, self.history)?;
        ending.commit()?;
        self.leases.remove(lease);
        self.tell(revision);
        Ok(())
    }
}

/// Whether a transaction may be done.
fn check(
    connection: &Connection,
    transaction: &Transaction,
    leases: &Leases,
) -> Result<(), StoreError> {
    for compare in &transaction.compares {
        let mut statement =
            connection.prepare_cached("SELECT revision FROM entries WHERE key = ?1")?;
        let found: Option<Revision> = statement
            .query_row(params![compare.key], |row| row.get::<_, i64>(0))
            .optional()?
            .map(i64::cast_unsigned);
        if found != compare.revision {
            return Err(StoreError::Conflict {
                key: compare.key.clone(),
            });
        }
    }
    for op in &transaction.ops {
        if let Op::Put {
            lease: Some(lease), ..
        } = op
            && !leases.contains(*lease)
        {
            return Err(StoreError::LeaseGone(*lease));
        }
    }
    Ok(())
}

/// Does the ops, as this revision; answers whether anything has changed.
fn apply(connection: &Connection, ops: &[Op], revision: Revision) -> rusqlite::Result<bool> {
    let mut changed = false;
    for (position, op) in ops.iter().enumerate() {
        let (key, value) = match op {
            Op::Put { key, value, lease } => {
                let sql =
                    "INSERT INTO entries (key, value, revision, lease) VALUES (?1, ?2, ?3, ?4)
                    ON CONFLICT (key) DO UPDATE SET value = ?2, revision = ?3, lease = ?4";
                let mut statement = connection.prepare_cached(sql)?;
                let lease = lease.map(|l| l.0);
                statement.execute(params![key, value, revision.cast_signed(), lease])?;
                (key, Some(value))
            }
            Op::Delete { key } => {
                let mut statement =
                    connection.prepare_cached("DELETE FROM entries WHERE key = ?1")?;
                if statement.execute(params![key])? == 0 {
                    continue;
                }
                (key, None)
            }
        };
        let sql = "INSERT INTO log (revision, position, key, value) VALUES (?1, ?2, ?3, ?4)";
        let mut statement = connection.prepare_cached(sql)?;
        statement.execute(params![revision.cast_signed(), position as i64, key, value])?;
        changed = true;
    }
    Ok(changed)
}

/// Forgets history beyond the bound, a quarter of it at a time so that not every commit pays.
fn compact(connection: &Connection, revision: Revision, history: Revision) -> rusqlite::Result<()> {
    let oldest = schema::oldest(connection)?;
    if revision - oldest <= history + history / 4 {
        return Ok(());
    }
    let oldest = revision - history;
    connection.execute(
        "DELETE FROM log WHERE revision <= ?1",
        params![oldest.cast_signed()],
    )?;
    schema::set_meta(connection, "oldest", oldest)
}
