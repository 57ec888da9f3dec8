//! One battery for every store: what [`tern_catalog::Store`] promises, checked on each that we have.
//!
//! A new store adds itself to [`battery!`] and must pass everything. Each test has a store alone, so that
//! revisions count up by one.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests fail by panicking")]

mod cluster;
mod commits;
mod crash;
mod failover;
mod leases;
mod model;
mod moves;
mod watches;

use std::sync::Arc;

use tern_catalog::{Compare, Op, Revision, SqliteStore, Store, StoreError, Transaction};

/// A fresh store and what keeps its files.
pub struct Fresh {
    pub store: Arc<dyn Store>,
    /// Its revision before the first commit.
    pub base: Revision,
    _files: Box<dyn std::any::Any + Send>,
}

/// A fresh SQLite store that keeps this many revisions.
pub fn sqlite(history: Revision) -> Fresh {
    let files = tempfile::tempdir().unwrap();
    let store = SqliteStore::open_with(&files.path().join("catalog.db"), history).unwrap();
    Fresh {
        store: Arc::new(store),
        base: 0,
        _files: Box::new(files),
    }
}

/// A fresh etcd of one member, with TLS both ways and users.
pub async fn etcd() -> Fresh {
    let cluster = cluster::Cluster::start(1).await;
    let store: Arc<dyn Store> = Arc::new(cluster.store().await);
    let base = store.list("").await.unwrap().revision;
    Fresh {
        store,
        base,
        _files: Box::new(cluster),
    }
}

/// Makes a test of each battery function for each store.
#[macro_export]
macro_rules! battery {
    ($($name:ident),+ $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test]
                async fn $name() {
                    super::$name($crate::sqlite(1000)).await;
                }
            )+
        }
        mod etcd {
            $(
                #[tokio::test]
                async fn $name() {
                    super::$name($crate::etcd().await).await;
                }
            )+
        }
    };
}

pub fn put(key: &str, value: &str) -> Op {
    Op::Put {
        key: key.to_owned(),
        value: value.as_bytes().to_vec(),
        lease: None,
    }
}

pub fn delete(key: &str) -> Op {
    Op::Delete {
        key: key.to_owned(),
    }
}

pub async fn commit(store: &Arc<dyn Store>, ops: Vec<Op>) -> Revision {
    store.commit(Transaction::of(ops)).await.unwrap()
}

pub async fn commit_if(
    store: &Arc<dyn Store>,
    key: &str,
    revision: Option<Revision>,
    ops: Vec<Op>,
) -> Result<Revision, StoreError> {
    let compares = vec![Compare {
        key: key.to_owned(),
        revision,
    }];
    store.commit(Transaction { compares, ops }).await
}

pub async fn value(store: &Arc<dyn Store>, key: &str) -> Option<String> {
    store
        .get(key)
        .await
        .unwrap()
        .map(|e| String::from_utf8(e.value).unwrap())
}
