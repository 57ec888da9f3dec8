//! Watches: in order, without gaps, from any revision that is kept.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tern_catalog::{Change, Store, StoreError, Watch, WatchBatch, WatchEvent};

use crate::{Fresh, commit, delete, put, sqlite};

crate::battery!(
    a_watch_tells_the_past_and_then_the_present,
    a_watch_has_no_gaps_while_others_write,
    a_watch_sees_only_its_prefix,
    a_transaction_is_one_batch,
    a_watch_that_is_dropped_does_no_harm,
    a_watch_proves_that_it_is_current,
);

async fn next(watch: &mut Watch) -> WatchBatch {
    tokio::time::timeout(Duration::from_secs(20), watch.next())
        .await
        .unwrap()
        .unwrap()
        .unwrap()
}

fn key(change: &Change) -> &str {
    match change {
        Change::Put(entry) => &entry.key,
        Change::Delete { key } => key,
    }
}

async fn a_watch_tells_the_past_and_then_the_present(fresh: Fresh) {
    let store = &fresh.store;
    let first = commit(store, vec![put("a", "1")]).await;
    let second = commit(store, vec![delete("a")]).await;
    let mut watch = store.watch("", first).await.unwrap();
    let third = commit(store, vec![put("b", "1")]).await;
    let batch = next(&mut watch).await;
    assert_eq!(
        (batch.revision, &batch.changes[..]),
        (
            second,
            &[Change::Delete {
                key: "a".to_owned()
            }][..]
        )
    );
    assert_eq!(next(&mut watch).await.revision, third);
}

async fn a_watch_has_no_gaps_while_others_write(fresh: Fresh) {
    const WRITERS: usize = 8;
    const EACH: usize = 100;
    let store = Arc::clone(&fresh.store);
    let write = |store: Arc<dyn Store>, writer: usize| async move {
        for n in 0..EACH {
            commit(&store, vec![put(&format!("w{writer}"), &n.to_string())]).await;
        }
    };
    let writers: Vec<_> = (0..WRITERS)
        .map(|w| tokio::spawn(write(Arc::clone(&store), w)))
        .collect();
    // Started in the middle of it, from the very beginning.
    let mut watch = store.watch("", 0).await.unwrap();
    for expected in 1..=(WRITERS * EACH) as u64 {
        let expected = fresh.base + expected;
        assert_eq!(next(&mut watch).await.revision, expected);
    }
    for writer in writers {
        writer.await.unwrap();
    }
}

async fn a_watch_sees_only_its_prefix(fresh: Fresh) {
    let store = &fresh.store;
    let mut watch = store.watch("a/", 0).await.unwrap();
    commit(store, vec![put("b/1", ""), put("a/1", "")]).await;
    commit(store, vec![put("b/2", "")]).await;
    let last = commit(store, vec![delete("a/1")]).await;
    assert_eq!(
        next(&mut watch)
            .await
            .changes
            .iter()
            .map(key)
            .collect::<Vec<_>>(),
        ["a/1"]
    );
    assert_eq!(next(&mut watch).await.revision, last);
}

async fn a_transaction_is_one_batch(fresh: Fresh) {
    let store = &fresh.store;
    let mut watch = store.watch("", 0).await.unwrap();
    commit(store, vec![put("x", "1"), put("a", "1"), delete("nothing")]).await;
    assert_eq!(
        next(&mut watch)
            .await
            .changes
            .iter()
            .map(key)
            .collect::<Vec<_>>(),
        ["x", "a"]
    );
}

async fn a_watch_that_is_dropped_does_no_harm(fresh: Fresh) {
    let store = &fresh.store;
    drop(store.watch("", 0).await.unwrap());
    commit(store, vec![put("a", "1")]).await;
    commit(store, vec![put("a", "2")]).await;
}

async fn a_watch_proves_that_it_is_current(fresh: Fresh) {
    let store = &fresh.store;
    let mut watch = store.watch("", fresh.base).await.unwrap();
    let mut event = async || {
        let event = tokio::time::timeout(Duration::from_secs(20), watch.event()).await;
        event.unwrap().unwrap().unwrap()
    };
    // With nobody writing, and again after a write: never past what has been told.
    let first = event().await;
    let WatchEvent::Progress { revision, asked } = first else {
        panic!("{first:?}")
    };
    assert_eq!(revision, fresh.base);
    assert!(asked <= Instant::now());
    let last = commit(store, vec![put("a", "1")]).await;
    let mut told = fresh.base;
    loop {
        match event().await {
            WatchEvent::Batch(batch) => told = batch.revision,
            WatchEvent::Progress { revision, .. } => {
                assert_eq!(revision, told);
                if revision == last {
                    break;
                }
            }
        }
    }
}

#[tokio::test]
async fn history_that_is_gone_is_said_to_be() {
    let fresh = sqlite(10);
    for n in 0..100 {
        commit(&fresh.store, vec![put("k", &n.to_string())]).await;
    }
    let error = fresh.store.watch("", 1).await.unwrap_err();
    let StoreError::Compacted { wanted: 1, oldest } = error else {
        panic!("{error:?}")
    };
    let mut watch = fresh.store.watch("", oldest).await.unwrap();
    for expected in oldest + 1..=100 {
        assert_eq!(next(&mut watch).await.revision, expected);
    }
}

#[tokio::test]
async fn a_watcher_that_is_too_slow_is_told_so() {
    let fresh = sqlite(100);
    let mut watch = fresh.store.watch("", 0).await.unwrap();
    for n in 0..3000 {
        commit(&fresh.store, vec![put("k", &n.to_string())]).await;
    }
    let mut told = 0;
    let end = loop {
        match watch.next().await {
            Some(Ok(batch)) => {
                told += 1;
                assert_eq!(batch.revision, told, "no gap before the end");
            }
            other => break other,
        }
    };
    assert!(
        matches!(end, Some(Err(StoreError::Compacted { .. }))),
        "{end:?}"
    );
    assert!(told < 3000);
    assert!(watch.next().await.is_none());
}

#[tokio::test]
async fn a_long_past_is_told_in_order_and_whole() {
    let fresh = sqlite(1000);
    let large = "x".repeat(100_000);
    for _ in 0..60 {
        // Together several times as much as a page.
        commit(&fresh.store, vec![put("a", &large), put("b", &large)]).await;
    }
    let mut watch = fresh.store.watch("", 0).await.unwrap();
    for expected in 1..=60 {
        let batch = next(&mut watch).await;
        assert_eq!((batch.revision, batch.changes.len()), (expected, 2));
    }
}

#[tokio::test]
async fn a_watch_ends_with_its_store() {
    let fresh = sqlite(10);
    let mut watch = fresh.store.watch("", 0).await.unwrap();
    drop(fresh);
    assert!(watch.next().await.is_none());
}
