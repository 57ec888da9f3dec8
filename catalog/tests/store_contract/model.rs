//! Random transactions against a map that does the same.

use std::collections::BTreeMap;

use proptest::prelude::*;
use tern_catalog::{Change, Compare, Op, StoreError, Transaction};

use crate::{Fresh, sqlite};

/// Few keys, so that transactions meet.
const KEYS: [&str; 4] = ["a", "a/b", "b", "c"];

#[derive(Debug, Clone)]
struct Step {
    compare: Option<(usize, bool)>,
    ops: Vec<(usize, Option<u8>)>,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let op = (0..KEYS.len(), prop::option::of(any::<u8>()));
    let step = (
        prop::option::of((0..KEYS.len(), any::<bool>())),
        prop::collection::vec(op, 1..4),
    );
    prop::collection::vec(step.prop_map(|(compare, ops)| Step { compare, ops }), 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn sqlite_behaves_like_a_map(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { behaves_like_a_map(sqlite(1000), steps).await });
    }
}

/// One long walk, for each case would start an etcd of its own.
#[tokio::test]
async fn etcd_behaves_like_a_map() {
    use proptest::strategy::ValueTree as _;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let mut all = Vec::new();
    while all.len() < 200 {
        all.extend(steps().new_tree(&mut runner).unwrap().current());
    }
    behaves_like_a_map(crate::etcd().await, all).await;
}

/// Each step's outcome, the listing after it and what a watch tells in the end agree with a map.
async fn behaves_like_a_map(fresh: Fresh, steps: Vec<Step>) {
    let mut model: BTreeMap<String, (Vec<u8>, u64)> = BTreeMap::new();
    let mut revision = fresh.base;
    for step in steps {
        let mut ops: Vec<Op> = Vec::new();
        for (key, value) in &step.ops {
            let key = KEYS[*key].to_owned();
            if ops
                .iter()
                .any(|op| matches!(op, Op::Put { key: k, .. } | Op::Delete { key: k } if *k == key))
            {
                continue;
            }
            ops.push(match value {
                Some(v) => Op::Put {
                    key,
                    value: vec![*v],
                    lease: None,
                },
                None => Op::Delete { key },
            });
        }
        // Half of the comparisons are made to hold.
        let compares: Vec<Compare> = step
            .compare
            .iter()
            .map(|&(key, right)| {
                let found = model.get(KEYS[key]).map(|(_, r)| *r);
                Compare {
                    key: KEYS[key].to_owned(),
                    revision: if right {
                        found
                    } else {
                        Some(u64::from(u32::MAX))
                    },
                }
            })
            .collect();
        let holds = compares
            .iter()
            .all(|c| model.get(&c.key).map(|(_, r)| *r) == c.revision);
        let outcome = fresh
            .store
            .commit(Transaction {
                compares,
                ops: ops.clone(),
            })
            .await;
        if holds {
            let changes = |op: &Op| match op {
                Op::Put { .. } => true,
                Op::Delete { key } => model.contains_key(key),
            };
            revision += u64::from(ops.iter().any(changes));
            assert_eq!(outcome, Ok(revision));
            for op in ops {
                match op {
                    Op::Put { key, value, .. } => drop(model.insert(key, (value, revision))),
                    Op::Delete { key } => drop(model.remove(&key)),
                }
            }
        } else {
            assert!(matches!(outcome, Err(StoreError::Conflict { .. })));
        }
        let listing = fresh.store.list("").await.unwrap();
        let listed: BTreeMap<_, _> = listing
            .entries
            .into_iter()
            .map(|e| (e.key, (e.value, e.revision)))
            .collect();
        assert_eq!((listing.revision, &listed), (revision, &model));
    }
    let mut watch = fresh.store.watch("", fresh.base).await.unwrap();
    let mut told = BTreeMap::new();
    for expected in fresh.base + 1..=revision {
        let batch = watch.next().await.unwrap().unwrap();
        assert_eq!(batch.revision, expected);
        for change in batch.changes {
            match change {
                Change::Put(e) => drop(told.insert(e.key, (e.value, e.revision))),
                Change::Delete { key } => drop(told.remove(&key)),
            }
        }
    }
    assert_eq!(told, model);
}
