//! Leases: keys that live as long as somebody says so.

use std::sync::Arc;
use std::time::Duration;

use tern_catalog::{Change, LeaseId, Op, SqliteStore, Store, StoreError, Transaction};

use crate::{Fresh, commit, put, value};

crate::battery!(
    keys_go_with_their_lease_and_watches_see_it,
    a_lease_that_is_kept_alive_stays,
    a_revoked_lease_is_gone_at_once,
    a_key_that_was_written_anew_outlives_the_old_lease,
    an_unknown_lease_is_refused,
);

const SHORT: Duration = Duration::from_millis(150);
const LIMIT: Duration = Duration::from_secs(20);

fn leased(key: &str, lease: LeaseId) -> Op {
    Op::Put {
        key: key.to_owned(),
        value: b"1".to_vec(),
        lease: Some(lease),
    }
}

async fn keys_go_with_their_lease_and_watches_see_it(fresh: Fresh) {
    let store = &fresh.store;
    let lease = store.grant(SHORT).await.unwrap();
    let at = commit(
        store,
        vec![leased("a", lease), leased("b", lease), put("c", "1")],
    )
    .await;
    let mut watch = store.watch("", at).await.unwrap();
    let batch = tokio::time::timeout(LIMIT, watch.next())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    let gone = |key: &str| Change::Delete {
        key: key.to_owned(),
    };
    assert_eq!(batch.changes, [gone("a"), gone("b")]);
    assert_eq!(store.list("").await.unwrap().entries.len(), 1);
    assert_eq!(
        store.keep_alive(lease).await,
        Err(StoreError::LeaseGone(lease))
    );
}

async fn a_lease_that_is_kept_alive_stays(fresh: Fresh) {
    let store = &fresh.store;
    let lease = store.grant(Duration::from_secs(2)).await.unwrap();
    commit(store, vec![leased("a", lease)]).await;
    // Over twice its time, in steps well below it.
    for _ in 0..22 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        store.keep_alive(lease).await.unwrap();
    }
    assert_eq!(value(store, "a").await.as_deref(), Some("1"));
}

async fn a_revoked_lease_is_gone_at_once(fresh: Fresh) {
    let store = &fresh.store;
    let lease = store.grant(Duration::from_secs(3600)).await.unwrap();
    commit(store, vec![leased("a", lease)]).await;
    store.revoke(lease).await.unwrap();
    assert_eq!(value(store, "a").await, None);
    assert_eq!(store.revoke(lease).await, Err(StoreError::LeaseGone(lease)));
}

async fn a_key_that_was_written_anew_outlives_the_old_lease(fresh: Fresh) {
    let store = &fresh.store;
    let lease = store.grant(Duration::from_secs(3600)).await.unwrap();
    commit(store, vec![leased("a", lease)]).await;
    commit(store, vec![put("a", "2")]).await;
    store.revoke(lease).await.unwrap();
    assert_eq!(value(store, "a").await.as_deref(), Some("2"));
}

async fn an_unknown_lease_is_refused(fresh: Fresh) {
    let store = &fresh.store;
    let unknown = LeaseId(4711);
    let outcome = store
        .commit(Transaction::of(vec![leased("a", unknown)]))
        .await;
    assert_eq!(outcome, Err(StoreError::LeaseGone(unknown)));
    assert!(store.grant(Duration::ZERO).await.is_err());
}

#[tokio::test]
async fn a_lease_outlives_a_restart_and_then_ends() {
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("catalog.db");
    let lease = {
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&path).unwrap());
        let lease = store.grant(SHORT).await.unwrap();
        commit(&store, vec![leased("a", lease)]).await;
        lease
    };
    let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&path).unwrap());
    let mut watch = store.watch("", 1).await.unwrap();
    let batch = tokio::time::timeout(LIMIT, watch.next()).await.unwrap();
    assert_eq!(batch.unwrap().unwrap().revision, 2);
    assert_eq!(value(&store, "a").await, None);
    let again = store.grant(LIMIT).await.unwrap();
    assert_ne!(again, lease, "an id is never used again");
}
