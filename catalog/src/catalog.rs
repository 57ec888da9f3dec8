//! The store, spoken to in nouns.

use std::sync::Arc;

use thiserror::Error;

use crate::{Compare, Op, Record, Revision, Store, StoreError, Transaction};

/// How often [`Catalog::update`] meets a conflict before it gives up: more would hide a livelock.
const MAX_CONFLICTS: u32 = 16;
/// How many unanswered writes [`Catalog::update`] looks after: the store is ill, and each took seconds.
const MAX_UNKNOWN: usize = 2;

/// The store, spoken to in nouns. Clones share it.
#[derive(Clone)]
pub struct Catalog {
    store: Arc<dyn Store>,
}

/// What can go wrong.
#[derive(Debug, Error)]
pub enum CatalogError {
    /// The store's own answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A value that is not what its key says.
    #[error("{key} cannot be read: {source}")]
    Malformed {
        /// The key.
        key: String,
        /// Why.
        source: serde_json::Error,
    },
    /// It exists already.
    #[error("{0} exists already")]
    Exists(String),
}

impl Catalog {
    /// Speaks to this store.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store }
    }

    /// The store itself, for leases, watches and transactions over several nouns.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// The record with this id, and the revision that wrote it.
    pub async fn get<T: Record>(&self, id: &str) -> Result<Option<(T, Revision)>, CatalogError> {
        let key = T::key_of(id);
        match self.store.get(&key).await? {
            Some(entry) => Ok(Some((decode(&key, &entry.value)?, entry.revision))),
            None => Ok(None),
        }
    }

    /// All records of one kind.
    pub async fn list<T: Record>(&self) -> Result<Vec<T>, CatalogError> {
        let listing = self.store.list(T::PREFIX).await?;
        listing
            .entries
            .iter()
            .map(|e| decode(&e.key, &e.value))
            .collect()
    }

    /// Writes a record that must not exist yet.
    pub async fn create<T: Record>(&self, record: &T) -> Result<Revision, CatalogError> {
        match self
            .store
            .commit(Transaction {
                compares: vec![absent(record)],
                ops: vec![put(record)],
            })
            .await
        {
            Err(StoreError::Conflict { key }) => Err(CatalogError::Exists(key)),
            Err(StoreError::Unknown(text)) => {
                // Ours is there or it is not known: it may still be on its way.
                match self.store.get(&record.key()).await {
                    Ok(Some(entry)) if put_value(record) == entry.value => Ok(entry.revision),
                    _ => Err(StoreError::Unknown(text).into()),
                }
            }
            other => Ok(other?),
        }
    }

    /// Writes a record, whatever was there.
    pub async fn put<T: Record>(&self, record: &T) -> Result<Revision, CatalogError> {
        self.replace(&record.key(), put(record)).await
    }

    /// Removes a record.
    pub async fn delete<T: Record>(&self, id: &str) -> Result<Revision, CatalogError> {
        let key = T::key_of(id);
        self.replace(&key, Op::Delete { key: key.clone() }).await
    }

    /// Does this to a key, whatever is there. It names what it replaces all the same: a write that was not answered
    /// and lands later must not undo what was written meanwhile.
    async fn replace(&self, key: &str, op: Op) -> Result<Revision, CatalogError> {
        let mut conflicts = 0;
        loop {
            let compare = Compare {
                key: key.to_owned(),
                revision: self.store.get(key).await?.map(|entry| entry.revision),
            };
            let transaction = Transaction {
                compares: vec![compare],
                ops: vec![op.clone()],
            };
            match self.store.commit(transaction).await {
                Err(StoreError::Conflict { .. }) if conflicts < MAX_CONFLICTS => conflicts += 1,
                other => return Ok(other?),
            }
        }
    }

    /// Reads, changes and writes a record, again when somebody else was faster. `change` answers
    /// `Err` to leave it as it is. `Ok(None)` where there is no such record.
    ///
    /// Where a write's answer was lost, the record is read again: what was to be written is there, or
    /// the change is made anew on what is. No write is done twice, for each names the revision it was made from.
    pub async fn update<T: Record, E>(
        &self,
        id: &str,
        change: impl FnMut(&mut T) -> Result<(), E>,
    ) -> Result<Result<Option<T>, E>, CatalogError> {
        let mut unanswered = Vec::new();
        let outcome = self.try_update(id, change, &mut unanswered).await;
        // What is unknown stays so: any other outcome would deny it.
        let why = match &outcome {
            Ok(Ok(Some(_))) | Err(CatalogError::Store(StoreError::Unknown(_))) => return outcome,
            _ if unanswered.is_empty() => return outcome,
            Ok(Ok(None)) => "the record is gone now".to_owned(),
            Ok(Err(_)) => "it cannot be made again on what is there now".to_owned(),
            Err(error) => error.to_string(),
        };
        Err(StoreError::Unknown(why).into())
    }

    /// Updates; `unanswered` are the writes whose outcome is not known: the value, and the revision it was to
    /// replace.
    async fn try_update<T: Record, E>(
        &self,
        id: &str,
        mut change: impl FnMut(&mut T) -> Result<(), E>,
        unanswered: &mut Vec<(Vec<u8>, Revision)>,
    ) -> Result<Result<Option<T>, E>, CatalogError> {
        let key = T::key_of(id);
        let mut conflicts = 0;
        loop {
            let Some(entry) = self.store.get(&key).await? else {
                return Ok(Ok(None));
            };
            let (mut record, revision): (T, _) = (decode(&key, &entry.value)?, entry.revision);
            let done = |(value, replaced): &(Vec<u8>, Revision)| {
                *value == entry.value && *replaced != revision
            };
            if unanswered.iter().any(done) {
                return Ok(Ok(Some(record)));
            }
            if let Err(refused) = change(&mut record) {
                return Ok(Err(refused));
            }
            let compare = Compare {
                key: key.clone(),
                revision: Some(revision),
            };
            let transaction = Transaction {
                compares: vec![compare],
                ops: vec![put(&record)],
            };
            let value = put_value(&record);
            match self.store.commit(transaction).await {
                Ok(_) => return Ok(Ok(Some(record))),
                Err(StoreError::Conflict { .. }) if conflicts < MAX_CONFLICTS => conflicts += 1,
                Err(StoreError::Unknown(_)) if unanswered.len() < MAX_UNKNOWN => {
                    unanswered.push((value, revision));
                }
                Err(other) => return Err(other.into()),
            }
        }
    }
}

/// The op that writes a record, for transactions over several.
pub(crate) fn put<T: Record>(record: &T) -> Op {
    Op::Put {
        key: record.key(),
        value: put_value(record),
        lease: None,
    }
}

fn put_value<T: Record>(record: &T) -> Vec<u8> {
    serde_json::to_vec(record).expect("nouns are plain data with text keys")
}

fn absent<T: Record>(record: &T) -> Compare {
    Compare {
        key: record.key(),
        revision: None,
    }
}

fn decode<T: Record>(key: &str, value: &[u8]) -> Result<T, CatalogError> {
    serde_json::from_slice(value).map_err(|source| CatalogError::Malformed {
        key: key.to_owned(),
        source,
    })
}

impl Op {
    /// The op that writes this record.
    pub fn put<T: Record>(record: &T) -> Self {
        put(record)
    }
}

impl Compare {
    /// Holds while this record does not exist.
    pub fn absent<T: Record>(record: &T) -> Self {
        absent(record)
    }
}

#[cfg(test)]
mod tests;
