//! The store, spoken to in nouns.

use std::sync::Arc;

use thiserror::Error;

use crate::{Compare, Op, Record, Revision, Store, StoreError, Transaction};

/// How often [`Catalog::update`] meets a conflict before it gives up: more would hide a livelock.
const MAX_CONFLICTS: u32 = 16;

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
            other => Ok(other?),
        }
    }

    /// Writes a record, whatever was there.
    pub async fn put<T: Record>(&self, record: &T) -> Result<Revision, CatalogError> {
        Ok(self
            .store
            .commit(Transaction::of(vec![put(record)]))
            .await?)
    }

    /// Removes a record.
    pub async fn delete<T: Record>(&self, id: &str) -> Result<Revision, CatalogError> {
        let key = T::key_of(id);
        Ok(self
            .store
            .commit(Transaction::of(vec![Op::Delete { key }]))
            .await?)
    }

    /// Reads, changes and writes a record, again when somebody else was faster. `change` answers
    /// `Err` to leave it as it is. `Ok(None)` where there is no such record.
    pub async fn update<T: Record, E>(
        &self,
        id: &str,
        mut change: impl FnMut(&mut T) -> Result<(), E>,
    ) -> Result<Result<Option<T>, E>, CatalogError> {
        let key = T::key_of(id);
        let mut conflicts = 0;
        loop {
            let Some((mut record, revision)) = self.get::<T>(id).await? else {
                return Ok(Ok(None));
            };
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
            match self.store.commit(transaction).await {
                Ok(_) => return Ok(Ok(Some(record))),
                Err(StoreError::Conflict { .. }) if conflicts < MAX_CONFLICTS => conflicts += 1,
                Err(other) => return Err(other.into()),
            }
        }
    }
}

/// The op that writes a record, for transactions over several.
pub(crate) fn put<T: Record>(record: &T) -> Op {
    let value = serde_json::to_vec(record).expect("nouns are plain data with text keys");
    Op::Put {
        key: record.key(),
        value,
        lease: None,
    }
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
