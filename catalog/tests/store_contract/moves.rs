//! Moving a catalog between stores.

use std::sync::Arc;

use std::time::Duration;

use async_trait::async_trait;
use tern_catalog::transfer::{TransferError, copy, refuse_moved};
use tern_catalog::{
    Entry, LeaseId, Listing, Op, Revision, SqliteStore, Store, StoreError, Transaction, Watch,
    limits,
};

use crate::{commit, etcd, put, sqlite};

/// A store that somebody else writes to just before each of our commits.
struct Shared(Arc<dyn Store>);

#[async_trait]
impl Store for Shared {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.0.get(key).await
    }
    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.0.list(prefix).await
    }
    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
        // One that is told to be moved has no effect.
        let _ = self.0.commit(Transaction::of(vec![put("late", "1")])).await;
        self.0.commit(transaction).await
    }
    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        self.0.watch(prefix, after).await
    }
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.0.grant(ttl).await
    }
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.0.keep_alive(lease).await
    }
    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.0.revoke(lease).await
    }
}

/// More than one transaction holds, by count and by bytes.
async fn fill(store: &Arc<dyn Store>) {
    for n in 0..300 {
        commit(store, vec![put(&format!("small/{n}"), &n.to_string())]).await;
    }
    for n in 0..5u8 {
        let large = Op::Put {
            key: format!("large/{n}"),
            value: vec![n; limits::MAX_VALUE_BYTES],
            lease: None,
        };
        store.commit(Transaction::of(vec![large])).await.unwrap();
    }
}

async fn records(store: &Arc<dyn Store>) -> Vec<(String, Vec<u8>)> {
    let entries = store.list("").await.unwrap().entries;
    let pair = |entry: Entry| (entry.key, entry.value);
    entries.into_iter().map(pair).collect()
}

#[tokio::test]
async fn all_records_go_to_etcd_and_back() {
    let (first, cluster, last) = (sqlite(1000), etcd().await, sqlite(1000));
    fill(&first.store).await;
    let expected = records(&first.store).await;
    let there = copy(&*first.store, &*cluster.store, None).await.unwrap();
    assert_eq!(there.records, 305);
    assert_eq!(records(&cluster.store).await, expected);
    refuse_moved(&*cluster.store).await.unwrap();
    let back = copy(&*cluster.store, &*last.store, Some("elsewhere"))
        .await
        .unwrap();
    assert_eq!(back.digest, there.digest);
    assert_eq!(records(&last.store).await, expected);
    assert_eq!(
        records(&first.store).await,
        expected,
        "the source is as it was"
    );
    // What is left says so, and what is not empty is not written to.
    let error = refuse_moved(&*cluster.store).await.unwrap_err();
    assert!(error.to_string().contains("moved to elsewhere"), "{error}");
    refuse_moved(&*last.store).await.unwrap();
    // Nor is it by who has it open still.
    let late = Transaction::of(vec![put("late", "1")]);
    let error = cluster.store.commit(late).await.unwrap_err();
    assert!(error.to_string().contains("moved to elsewhere"), "{error}");
    let refused = copy(&*last.store, &*cluster.store, None).await;
    assert!(
        matches!(refused, Err(TransferError::NotEmpty(306))),
        "{refused:?}"
    );
    let nothing = sqlite(1000);
    let refused = copy(&*nothing.store, &*last.store, None).await;
    assert!(matches!(refused, Err(TransferError::Empty)), "{refused:?}");
}

#[tokio::test]
async fn a_source_that_is_written_to_is_not_left_and_its_copy_not_served_from() {
    let (cluster, target) = (etcd().await, sqlite(1000));
    commit(&cluster.store, vec![put("small/1", "1")]).await;
    let source = Shared(Arc::clone(&cluster.store));
    let refused = copy(&source, &*target.store, Some("elsewhere")).await;
    assert!(matches!(refused, Err(TransferError::Busy)), "{refused:?}");
    refuse_moved(&*cluster.store).await.unwrap();
    assert_eq!(records(&cluster.store).await.len(), 2);
    commit(&cluster.store, vec![put("small/2", "1")]).await;
    let error = refuse_moved(&*target.store).await.unwrap_err();
    assert!(error.to_string().contains("did not end"), "{error}");
}

#[tokio::test]
async fn a_half_filled_target_is_not_served_from() {
    let fresh = sqlite(1000);
    commit(&fresh.store, vec![put("transfer/moving", "")]).await;
    let error = refuse_moved(&*fresh.store).await.unwrap_err();
    assert!(error.to_string().contains("did not end"), "{error}");
}

#[tokio::test]
async fn a_file_that_was_left_is_refused_and_keeps_its_records() {
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("catalog.db");
    {
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&path).unwrap());
        commit(&store, vec![put("k", "v")]).await;
        let error = SqliteStore::mark_moved(&path, "etcd").unwrap_err();
        assert!(error.to_string().contains("another process"), "{error}");
    }
    SqliteStore::mark_moved(&path, "etcd at https://a:2379").unwrap();
    let error = SqliteStore::open(&path).err().unwrap().to_string();
    assert!(error.contains("moved to etcd at https://a:2379"), "{error}");
    let file = rusqlite::Connection::open(&path).unwrap();
    // What a version that does not know of moves looks at.
    let layout: i64 = file
        .query_row("SELECT value FROM meta WHERE name = 'version'", [], |r| {
            r.get(0)
        })
        .unwrap();
    assert_ne!(layout, 1);
    let kept: i64 = file
        .query_row("SELECT count(*) FROM entries", [], |r| r.get(0))
        .unwrap();
    assert_eq!(kept, 1);
}
