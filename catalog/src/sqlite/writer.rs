//! The thread that writes.

use std::collections::HashMap;
use std::fs::File;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OptionalExtension as _, Savepoint, TransactionBehavior, params};
use tokio::sync::{mpsc, oneshot};

use super::schema;
use super::watchers::Watchers;
use crate::store::{
    Change, Entry, LeaseId, Op, Revision, StoreError, Transaction, Watch, WatchBatch,
};

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

/// What the writer is asked.
pub(super) enum Job {
    Commit {
        transaction: Transaction,
        reply: Reply<Revision>,
    },
    Watch {
        prefix: String,
        after: Revision,
        reply: Reply<Watch>,
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
    /// Ends the lease if its time is over; else answers how long it still has.
    Expire {
        lease: LeaseId,
        reply: Reply<Option<Duration>>,
    },
}

/// Owns the writing connection.
pub(super) struct Writer {
    connection: Connection,
    watchers: Watchers,
    /// When each lease ends. A lease of an earlier process has its whole time again, for nobody could
    /// keep it alive meanwhile.
    leases: HashMap<LeaseId, (Duration, Instant)>,
    history: Revision,
    _lock: File,
}

/// A commit that is done.
struct Done {
    revision: Revision,
    changes: Vec<Change>,
}

/// Transactions that share one `fsync` at most: the first must not wait for ever.
const GROUP: usize = 256;

impl Writer {
    pub(super) fn new(
        connection: Connection,
        lock: File,
        history: Revision,
    ) -> rusqlite::Result<Self> {
        let leases = {
            let mut statement = connection.prepare("SELECT id, ttl_ms FROM leases")?;
            let now = Instant::now();
            let row = |row: &rusqlite::Row<'_>| {
                let ttl = Duration::from_millis(row.get::<_, i64>(1)?.unsigned_abs());
                Ok((LeaseId(row.get(0)?), (ttl, now + ttl)))
            };
            statement.query_map([], row)?.collect::<Result<_, _>>()?
        };
        Ok(Self {
            connection,
            watchers: Watchers::default(),
            leases,
            history,
            _lock: lock,
        })
    }

    /// Serves the queue until the last store handle is gone.
    pub(super) fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        while let Some(first) = queue.blocking_recv() {
            let mut commits = Vec::new();
            let mut next = Some(first);
            while let Some(job) = next.take() {
                match job {
                    Job::Commit { transaction, reply } => commits.push((transaction, reply)),
                    other => {
                        // Order is kept: what came before is done before.
                        self.commit_all(std::mem::take(&mut commits));
                        self.other(other);
                    }
                }
                if commits.len() < GROUP {
                    next = queue.try_recv().ok();
                }
            }
            self.commit_all(commits);
        }
    }

    fn other(&mut self, job: Job) {
        // A caller that has gone needs no answer.
        match job {
            Job::Commit { transaction, reply } => self.commit_all(vec![(transaction, reply)]),
            Job::Watch {
                prefix,
                after,
                reply,
            } => drop(reply.send(self.watch(prefix, after))),
            Job::Grant { ttl, reply } => drop(reply.send(self.grant(ttl))),
            Job::KeepAlive { lease, reply } => drop(reply.send(self.keep_alive(lease))),
            Job::Revoke { lease, reply } => drop(reply.send(self.end(lease))),
            Job::Expire { lease, reply } => drop(reply.send(self.expire(lease))),
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
            Ok(outcomes) => {
                for (outcome, reply) in outcomes.into_iter().zip(replies) {
                    let answer = outcome.map(|done| {
                        self.watchers.tell(done.revision, &done.changes);
                        done.revision
                    });
                    let _ = reply.send(answer);
                }
            }
            // Nothing of the group happened, and each of it is told.
            Err(error) => {
                for reply in replies {
                    let _ = reply.send(Err(StoreError::from_sqlite(&error)));
                }
            }
        }
    }

    fn group(
        &mut self,
        transactions: &[Transaction],
    ) -> rusqlite::Result<Vec<Result<Done, StoreError>>> {
        let mut group = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut revision = schema::revision(&group)?;
        let mut outcomes = Vec::with_capacity(transactions.len());
        for transaction in transactions {
            // Dropped without a commit, a savepoint undoes just its own transaction.
            let savepoint = group.savepoint()?;
            let outcome = apply(&savepoint, transaction, revision + 1, &self.leases);
            if outcome.is_ok() {
                savepoint.commit()?;
                revision += 1;
            } else {
                drop(savepoint);
            }
            outcomes.push(outcome.map(|changes| Done { revision, changes }));
        }
        schema::set_meta(&group, "revision", revision)?;
        compact(&group, revision, self.history)?;
        group.commit()?;
        Ok(outcomes)
    }

    fn watch(&mut self, prefix: String, after: Revision) -> Result<Watch, StoreError> {
        let oldest = schema::oldest(&self.connection)?;
        if after < oldest {
            return Err(StoreError::Compacted {
                wanted: after,
                oldest,
            });
        }
        let mut past: Vec<WatchBatch> = Vec::new();
        let sql =
            "SELECT revision, key, value FROM log WHERE revision > ?1 ORDER BY revision, position";
        let mut statement = self.connection.prepare_cached(sql)?;
        let mut rows = statement.query(params![after.cast_signed()])?;
        while let Some(row) = rows.next()? {
            let (revision, key) = (
                row.get::<_, i64>(0)?.cast_unsigned(),
                row.get::<_, String>(1)?,
            );
            if !key.starts_with(&prefix) {
                continue;
            }
            let change = match row.get::<_, Option<Vec<u8>>>(2)? {
                Some(value) => Change::Put(Entry {
                    key,
                    value,
                    revision,
                }),
                None => Change::Delete { key },
            };
            match past.last_mut() {
                Some(batch) if batch.revision == revision => batch.changes.push(change),
                _ => past.push(WatchBatch {
                    revision,
                    changes: vec![change],
                }),
            }
        }
        drop(rows);
        drop(statement);
        Ok(self.watchers.add(prefix, past))
    }

    fn grant(&mut self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let millis = i64::try_from(ttl.as_millis()).ok().filter(|m| *m > 0);
        let millis =
            millis.ok_or_else(|| StoreError::Invalid("a lease lasts at least 1 ms".to_owned()))?;
        self.connection
            .execute("INSERT INTO leases (ttl_ms) VALUES (?1)", params![millis])?;
        let lease = LeaseId(self.connection.last_insert_rowid());
        self.leases.insert(lease, (ttl, Instant::now() + ttl));
        Ok(lease)
    }

    fn keep_alive(&mut self, lease: LeaseId) -> Result<(), StoreError> {
        let (ttl, end) = self
            .leases
            .get_mut(&lease)
            .ok_or(StoreError::LeaseGone(lease))?;
        *end = Instant::now() + *ttl;
        Ok(())
    }

    fn expire(&mut self, lease: LeaseId) -> Result<Option<Duration>, StoreError> {
        let Some((_, end)) = self.leases.get(&lease) else {
            return Ok(None);
        };
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            self.end(lease).map(|()| None)
        } else {
            Ok(Some(left))
        }
    }

    fn end(&mut self, lease: LeaseId) -> Result<(), StoreError> {
        if self.leases.remove(&lease).is_none() {
            return Err(StoreError::LeaseGone(lease));
        }
        let ops = {
            let mut statement = self
                .connection
                .prepare_cached("SELECT key FROM entries WHERE lease = ?1")?;
            let keys = statement.query_map(params![lease.0], |row| row.get(0))?;
            keys.map(|key| Ok(Op::Delete { key: key? }))
                .collect::<Result<Vec<_>, rusqlite::Error>>()?
        };
        self.connection
            .execute("DELETE FROM leases WHERE id = ?1", params![lease.0])?;
        if !ops.is_empty() {
            let (reply, _) = oneshot::channel();
            self.commit_all(vec![(Transaction::of(ops), reply)]);
        }
        Ok(())
    }
}

fn apply(
    connection: &Savepoint<'_>,
    transaction: &Transaction,
    revision: Revision,
    leases: &HashMap<LeaseId, (Duration, Instant)>,
) -> Result<Vec<Change>, StoreError> {
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
    let mut changes = Vec::with_capacity(transaction.ops.len());
    for (position, op) in transaction.ops.iter().enumerate() {
        let (key, value) = match op {
            Op::Put { key, value, lease } => {
                if let Some(lease) = lease.filter(|l| !leases.contains_key(l)) {
                    return Err(StoreError::LeaseGone(lease));
                }
                let sql =
                    "INSERT INTO entries (key, value, revision, lease) VALUES (?1, ?2, ?3, ?4)
                    ON CONFLICT (key) DO UPDATE SET value = ?2, revision = ?3, lease = ?4";
                let mut statement = connection.prepare_cached(sql)?;
                statement.execute(params![
                    key,
                    value,
                    revision.cast_signed(),
                    lease.map(|l| l.0)
                ])?;
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
        changes.push(match value {
            Some(value) => Change::Put(Entry {
                key: key.clone(),
                value: value.clone(),
                revision,
            }),
            None => Change::Delete { key: key.clone() },
        });
    }
    Ok(changes)
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
