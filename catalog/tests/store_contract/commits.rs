//! Commits: comparisons, atomicity, listings, bounds.

use futures::future::join_all;
use tern_catalog::{Compare, Op, StoreError, Transaction};

use crate::{Fresh, commit, commit_if, delete, put, value};

crate::battery!(
    revisions_count_commits,
    a_comparison_guards_against_a_lost_update,
    only_one_of_many_creators_wins,
    a_transaction_happens_whole_or_not_at_all,
    a_listing_has_exactly_what_is_under_the_prefix,
    deleting_what_is_not_there_is_no_error,
    what_no_noun_would_ask_for_is_refused,
);

async fn revisions_count_commits(fresh: Fresh) {
    let store = &fresh.store;
    let first = commit(store, vec![put("a", "1"), put("b", "1")]).await;
    assert_eq!(commit(store, vec![put("a", "2")]).await, first + 1);
    let (a, b) = (
        store.get("a").await.unwrap().unwrap(),
        store.get("b").await.unwrap().unwrap(),
    );
    assert_eq!((a.revision, b.revision), (first + 1, first));
    assert_eq!(store.get("c").await.unwrap(), None);
}

async fn a_comparison_guards_against_a_lost_update(fresh: Fresh) {
    let store = &fresh.store;
    let read = commit(store, vec![put("k", "1")]).await;
    commit(store, vec![put("k", "2")]).await;
    let lost = commit_if(store, "k", Some(read), vec![put("k", "3")]).await;
    assert_eq!(
        lost,
        Err(StoreError::Conflict {
            key: "k".to_owned()
        })
    );
    assert_eq!(value(store, "k").await.as_deref(), Some("2"));
    commit(store, vec![delete("k")]).await;
    commit_if(store, "k", None, vec![put("k", "4")])
        .await
        .unwrap();
}

async fn only_one_of_many_creators_wins(fresh: Fresh) {
    let store = &fresh.store;
    let all = (0..50).map(|n| async move {
        let text = n.to_string();
        commit_if(store, "k", None, vec![put("k", &text)])
            .await
            .map(|_| text)
    });
    let winners: Vec<String> = join_all(all).await.into_iter().flatten().collect();
    assert_eq!(winners.len(), 1);
    assert_eq!(value(store, "k").await.as_ref(), winners.first());
}

async fn a_transaction_happens_whole_or_not_at_all(fresh: Fresh) {
    let store = &fresh.store;
    commit(store, vec![put("exists", "1")]).await;
    let before = store.list("").await.unwrap();
    let compares = vec![
        Compare {
            key: "exists".to_owned(),
            revision: Some(before.revision),
        },
        Compare {
            key: "missing".to_owned(),
            revision: Some(7),
        },
    ];
    let ops = vec![put("x", "1"), delete("exists")];
    let refused = store.commit(Transaction { compares, ops }).await;
    assert_eq!(
        refused,
        Err(StoreError::Conflict {
            key: "missing".to_owned()
        })
    );
    assert_eq!(store.list("").await.unwrap(), before);
}

async fn a_listing_has_exactly_what_is_under_the_prefix(fresh: Fresh) {
    let store = &fresh.store;
    for key in ["a", "a/", "a/b", "a/b/c", "a0", "b", "a/\u{10ffff}", "é"] {
        commit(store, vec![put(key, key)]).await;
    }
    let keys = |listing: tern_catalog::Listing| {
        listing
            .entries
            .into_iter()
            .map(|e| e.key)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        keys(store.list("a/").await.unwrap()),
        ["a/", "a/b", "a/b/c", "a/\u{10ffff}"]
    );
    assert_eq!(keys(store.list("").await.unwrap()).len(), 8);
    assert_eq!(keys(store.list("zzz").await.unwrap()), [""; 0]);
    // A prefix is text, never a pattern.
    assert_eq!(keys(store.list("%").await.unwrap()), [""; 0]);
}

async fn deleting_what_is_not_there_is_no_error(fresh: Fresh) {
    let store = &fresh.store;
    let last = commit(store, vec![put("k", "1")]).await;
    // And no commit: a watch would never tell its revision, and who waits for that waits for ever.
    assert_eq!(commit(store, vec![delete("nothing")]).await, last);
    assert_eq!(store.list("").await.unwrap().revision, last);
    assert_eq!(commit(store, vec![put("k", "2")]).await, last + 1);
}

async fn what_no_noun_would_ask_for_is_refused(fresh: Fresh) {
    let store = &fresh.store;
    let long = "k".repeat(5000);
    let huge = Op::Put {
        key: "k".to_owned(),
        value: vec![0; 2 << 20],
        lease: None,
    };
    let many = (0..2000).map(|n| put(&n.to_string(), "")).collect();
    let wrong = [
        vec![],
        vec![put("", "1")],
        vec![put(&long, "1")],
        vec![put("a\0b", "1")],
        vec![huge],
        many,
        vec![put("k", "1"), delete("k")],
    ];
    for ops in wrong {
        let outcome = store.commit(Transaction::of(ops)).await;
        assert!(
            matches!(outcome, Err(StoreError::Invalid(_))),
            "{outcome:?}"
        );
    }
    assert_eq!(store.list("").await.unwrap().revision, 0);
}
