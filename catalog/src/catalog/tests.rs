//! Writes whose answers are lost.

use std::collections::VecDeque;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;

use super::*;
use crate::{App, Entry, LeaseId, Listing, NetworkId, SqliteStore, Watch};

/// A store that answers commits as its script says, and then well.
struct Lossy {
    store: SqliteStore,
    script: Mutex<VecDeque<Fate>>,
    /// Commits that are on their way still.
    held: Mutex<Vec<Transaction>>,
}

/// What becomes of a commit.
enum Fate {
    /// It is done now, and its answer is lost.
    Done,
    /// It is done only when it is let go, and its answer is lost.
    Held,
    /// It is lost, and the record is deleted.
    Deleted,
    /// Somebody else was faster.
    Conflict,
}

impl Lossy {
    fn new(script: impl IntoIterator<Item = Fate>) -> (Arc<Self>, Catalog, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Self {
            store: SqliteStore::open(&dir.path().join("catalog.db")).unwrap(),
            script: Mutex::new(script.into_iter().collect()),
            held: Mutex::default(),
        });
        let catalog = Catalog::new(Arc::clone(&store) as Arc<dyn Store>);
        (store, catalog, dir)
    }
}

#[async_trait]
impl Store for Lossy {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.store.get(key).await
    }
    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.store.list(prefix).await
    }
    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
        let fate = self.script.lock().pop_front();
        match fate {
            None => return self.store.commit(transaction).await,
            Some(Fate::Done) => drop(self.store.commit(transaction).await?),
            Some(Fate::Held) => self.held.lock().push(transaction),
            Some(Fate::Deleted) => {
                let Some(Op::Put { key, .. }) = transaction.ops.into_iter().next() else {
                    panic!("a put")
                };
                let delete = Transaction::of(vec![Op::Delete { key }]);
                self.store.commit(delete).await?;
            }
            Some(Fate::Conflict) => {
                let key = "k".to_owned();
                return Err(StoreError::Conflict { key });
            }
        }
        Err(StoreError::Unknown("the answer is lost".to_owned()))
    }
    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        self.store.watch(prefix, after).await
    }
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.store.grant(ttl).await
    }
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.store.keep_alive(lease).await
    }
    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.store.revoke(lease).await
    }
}

fn app(network: u32) -> App {
    App {
        name: "shop".parse().unwrap(),
        organization: "personal".parse().unwrap(),
        network: NetworkId(network),
        deleting: false,
        created_at: jiff::Timestamp::UNIX_EPOCH,
    }
}

fn is_unknown<T: std::fmt::Debug>(outcome: &Result<T, CatalogError>) -> bool {
    matches!(outcome, Err(CatalogError::Store(StoreError::Unknown(_))))
}

#[tokio::test]
async fn a_write_that_lands_late_undoes_nothing_newer() {
    let (store, catalog, _dir) = Lossy::new([Fate::Held]);
    store
        .store
        .commit(Transaction::of(vec![put(&app(1))]))
        .await
        .unwrap();
    let outcome = catalog.put(&app(2)).await;
    assert!(is_unknown(&outcome), "{outcome:?}");
    catalog.put(&app(3)).await.unwrap();
    let late = store.held.lock().pop().unwrap();
    let outcome = store.store.commit(late).await;
    assert!(
        matches!(outcome, Err(StoreError::Conflict { .. })),
        "{outcome:?}"
    );
    let (found, _) = catalog.get::<App>("shop").await.unwrap().unwrap();
    assert_eq!(found.network, NetworkId(3));

    // A removal neither; and one of nothing is no error and no commit.
    store.script.lock().push_back(Fate::Held);
    let outcome = catalog.delete::<App>("shop").await;
    assert!(is_unknown(&outcome), "{outcome:?}");
    let last = catalog.put(&app(4)).await.unwrap();
    let late = store.held.lock().pop().unwrap();
    let outcome = store.store.commit(late).await;
    assert!(
        matches!(outcome, Err(StoreError::Conflict { .. })),
        "{outcome:?}"
    );
    assert_eq!(catalog.delete::<App>("other").await.unwrap(), last);
}

#[tokio::test]
async fn whatever_was_there_is_overwritten() {
    let (_store, catalog, _dir) = Lossy::new([Fate::Conflict, Fate::Conflict]);
    catalog.put(&app(1)).await.unwrap();
    catalog.put(&app(2)).await.unwrap();
    let (found, _) = catalog.get::<App>("shop").await.unwrap().unwrap();
    assert_eq!(found.network, NetworkId(2));
}

#[tokio::test]
async fn an_update_that_may_be_done_is_never_told_as_not_done() {
    let change = |to: u32| {
        let mut refuse = false;
        move |app: &mut App| {
            // Once done it cannot be done again.
            if std::mem::replace(&mut refuse, true) {
                return Err("refused");
            }
            app.network = NetworkId(to);
            Ok(())
        }
    };
    // Gone by the time it is looked for.
    let (store, catalog, _dir) = Lossy::new([Fate::Deleted]);
    store
        .store
        .commit(Transaction::of(vec![put(&app(1))]))
        .await
        .unwrap();
    let outcome = catalog.update("shop", change(2)).await;
    assert!(is_unknown(&outcome), "{outcome:?}");
    // What is there now does not allow it: it may be there because of it.
    let (store, catalog, _dir) = Lossy::new([Fate::Held]);
    store
        .store
        .commit(Transaction::of(vec![put(&app(1))]))
        .await
        .unwrap();
    let outcome = catalog.update("shop", change(2)).await;
    assert!(is_unknown(&outcome), "{outcome:?}");
    // Others were faster too often.
    let conflicts = std::iter::repeat_with(|| Fate::Conflict).take(50);
    let (store, catalog, _dir) = Lossy::new(std::iter::once(Fate::Held).chain(conflicts));
    store
        .store
        .commit(Transaction::of(vec![put(&app(1))]))
        .await
        .unwrap();
    let change_always = |app: &mut App| {
        app.network = NetworkId(2);
        Ok::<_, ()>(())
    };
    let outcome = catalog.update("shop", change_always).await;
    assert!(is_unknown(&outcome), "{outcome:?}");
    // And what is found done is told as done; what was never sent keeps its own outcome.
    let (store, catalog, _dir) = Lossy::new([Fate::Done]);
    store
        .store
        .commit(Transaction::of(vec![put(&app(1))]))
        .await
        .unwrap();
    let outcome = catalog.update("shop", change(2)).await.unwrap();
    assert_eq!(outcome.unwrap().unwrap().network, NetworkId(2));
    let (_store, catalog, _dir) = Lossy::new([]);
    assert_eq!(catalog.update("shop", change(2)).await.unwrap(), Ok(None));
}
