//! Commits: comparisons, atomicity, listings, bounds.

use std::sync::Arc;

use futures::future::join_all;
use tern_catalog::{Compare, Op, StoreError, Transaction, limits};

use crate::{Fresh, commit, commit_if, delete, put, value};

crate::battery!(
    revisions_count_commits,
    a_comparison_guards_against_a_lost_update,
    only_one_of_many_creators_wins,
    a_transaction_happens_whole_or_not_at_all,
    a_listing_has_exactly_what_is_under_the_prefix,
    deleting_what_is_not_there_is_no_error,
    what_no_noun_would_ask_for_is_refused,
    what_is_at_the_limit_is_taken_and_more_is_refused,
    a_listing_of_many_pages_is_of_one_revision,
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
    let never = Compare {
        key: "k".to_owned(),
        revision: Some(0),
    };
    let wrong = [
        Transaction::of(vec![]),
        Transaction::of(vec![put("", "1")]),
        Transaction::of(vec![put("a\0b", "1")]),
        Transaction::of(vec![put("k", "1"), delete("k")]),
        Transaction {
            compares: vec![never],
            ops: vec![put("k", "1")],
        },
    ];
    for transaction in wrong {
        let outcome = store.commit(transaction).await;
        assert!(
            matches!(outcome, Err(StoreError::Invalid(_))),
            "{outcome:?}"
        );
    }
    assert_eq!(store.list("").await.unwrap().revision, fresh.base);
}

async fn what_is_at_the_limit_is_taken_and_more_is_refused(fresh: Fresh) {
    let store = &fresh.store;
    let of_length = |key: &str, length: usize| Op::Put {
        key: key.to_owned(),
        value: vec![b'x'; length],
        lease: None,
    };
    let many = |count: usize| {
        let ops = (0..count).map(|n| put(&format!("many/{n:03}"), "1"));
        Transaction::of(ops.collect())
    };
    let compared = |count: usize| {
        let compare = |n: usize| Compare {
            key: format!("{n:0>width$}", width = limits::MAX_KEY_BYTES),
            revision: None,
        };
        Transaction {
            compares: (0..count).map(compare).collect(),
            ops: vec![put("compared", "1")],
        }
    };
    let long = |length: usize| Transaction::of(vec![put(&"k".repeat(length), "1")]);
    let value = |length: usize| Transaction::of(vec![of_length("value", length)]);
    // A whole transaction of the largest values and keys.
    let whole = |more: usize| {
        let longest = "w".repeat(limits::MAX_KEY_BYTES);
        let rest = limits::MAX_TRANSACTION_BYTES - limits::MAX_VALUE_BYTES - 2 * 128 - 2;
        let mut ops = vec![of_length("v", limits::MAX_VALUE_BYTES)];
        ops.push(of_length(&longest, rest - longest.len() + 1 + more));
        Transaction::of(ops)
    };
    let pairs = [
        (many(limits::MAX_OPS), many(limits::MAX_OPS + 1)),
        (
            compared(limits::MAX_COMPARES),
            compared(limits::MAX_COMPARES + 1),
        ),
        (long(limits::MAX_KEY_BYTES), long(limits::MAX_KEY_BYTES + 1)),
        (
            value(limits::MAX_VALUE_BYTES),
            value(limits::MAX_VALUE_BYTES + 1),
        ),
        (whole(0), whole(1)),
    ];
    for (good, bad) in pairs {
        let before = store.list("").await.unwrap().revision;
        assert_eq!(store.commit(good).await, Ok(before + 1));
        match store.commit(bad).await {
            Err(StoreError::TooLarge { found, limit, .. }) => assert!(found > limit),
            other => panic!("{other:?}"),
        }
        assert_eq!(store.list("").await.unwrap().revision, before + 1);
    }
}

async fn a_listing_of_many_pages_is_of_one_revision(fresh: Fresh) {
    const KEYS: usize = 600;
    let store = &fresh.store;
    let name = |n: usize| format!("p/{n:04}");
    for from in (0..KEYS).step_by(limits::MAX_OPS) {
        let ops = (from..KEYS.min(from + limits::MAX_OPS)).map(|n| put(&name(n), "0"));
        commit(store, ops.collect()).await;
    }
    // Writers change the first and the last key together; no listing may see one without the other.
    let writer = tokio::spawn({
        let store = Arc::clone(store);
        async move {
            for n in 1..=60 {
                let text = n.to_string();
                let ops = vec![put("p/0000", &text), put("p/0599", &text)];
                commit(&store, ops).await;
            }
        }
    });
    loop {
        let done = writer.is_finished();
        let listing = store.list("p/").await.unwrap();
        assert_eq!(listing.entries.len(), KEYS);
        assert!(
            listing
                .entries
                .iter()
                .map(|e| &e.key)
                .eq(&(0..KEYS).map(name).collect::<Vec<_>>())
        );
        assert_eq!(listing.entries[0].value, listing.entries[KEYS - 1].value);
        if done {
            break;
        }
    }
    writer.await.unwrap();
}
