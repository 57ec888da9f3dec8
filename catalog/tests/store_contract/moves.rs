//! Moving a catalog between stores.

use std::sync::Arc;

use tern_catalog::transfer::{TransferError, copy, mark_moved, refuse_moved};
use tern_catalog::{Entry, Op, SqliteStore, Store, Transaction, limits};

use crate::{commit, etcd, put, sqlite};

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
    let there = copy(&*first.store, &*cluster.store).await.unwrap();
    assert_eq!(there.records, 305);
    assert_eq!(records(&cluster.store).await, expected);
    refuse_moved(&*cluster.store).await.unwrap();
    let back = copy(&*cluster.store, &*last.store).await.unwrap();
    assert_eq!(back.digest, there.digest);
    assert_eq!(records(&last.store).await, expected);
    assert_eq!(
        records(&first.store).await,
        expected,
        "the source is as it was"
    );
    // What is left says so, and what is not empty is not written to.
    mark_moved(&*cluster.store, "elsewhere").await.unwrap();
    let error = refuse_moved(&*cluster.store).await.unwrap_err();
    assert!(error.to_string().contains("moved to elsewhere"), "{error}");
    let refused = copy(&*last.store, &*cluster.store).await;
    assert!(
        matches!(refused, Err(TransferError::NotEmpty(306))),
        "{refused:?}"
    );
    let nothing = sqlite(1000);
    let refused = copy(&*nothing.store, &*last.store).await;
    assert!(matches!(refused, Err(TransferError::Empty)), "{refused:?}");
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
