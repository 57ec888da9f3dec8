use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;

use crate::{
    App, Catalog, Desired, DesiredState, Entry, HostId, LeaseId, Listing, Machine, MachineConfig,
    MachineId, MachineNumber, NetworkId, Op, PrivateAddress, Record as _, Revision, SqliteStore,
    Store, StoreError, Transaction, View, Watch,
};

async fn catalog(dir: &tempfile::TempDir, history: u64) -> (Catalog, View) {
    let store = SqliteStore::open_with(&dir.path().join("catalog.db"), history).unwrap();
    let store: Arc<dyn Store> = Arc::new(store);
    let view = View::follow(Arc::clone(&store)).await.unwrap();
    (Catalog::new(store), view)
}

fn app(name: &str) -> App {
    App {
        name: name.parse().unwrap(),
        organization: "personal".parse().unwrap(),
        network: NetworkId(1),
        deleting: false,
        created_at: jiff::Timestamp::UNIX_EPOCH,
    }
}

fn machine(app: &str, number: u32) -> Machine {
    let (network, host, number) = (NetworkId(1), HostId(1), MachineNumber(number));
    Machine {
        id: MachineId::random(),
        name: String::new(),
        app: app.parse().unwrap(),
        network,
        host,
        region: "local".to_owned(),
        number,
        private_ip: PrivateAddress::of_machine(network, host, number),
        config: serde_json::from_str::<MachineConfig>(r#"{"image":"x"}"#).unwrap(),
        instance_id: String::new(),
        version: 1,
        desired: Desired {
            state: DesiredState::Started,
            generation: 1,
        },
        cordoned: false,
        created_at: jiff::Timestamp::UNIX_EPOCH,
        updated_at: jiff::Timestamp::UNIX_EPOCH,
    }
}

async fn eventually<T>(view: &View, look: impl FnMut(&super::Snapshot) -> Option<T>) -> T {
    tokio::time::timeout(Duration::from_secs(120), view.wait_for(look))
        .await
        .expect("the view follows")
}

#[tokio::test]
async fn shows_what_was_there_and_what_comes() {
    let dir = tempfile::tempdir().unwrap();
    let (catalog, first) = catalog(&dir, 1000).await;
    catalog.create(&app("a")).await.unwrap();
    eventually(&first, |s| s.apps.get("a").cloned()).await;
    let second = View::follow(Arc::clone(catalog.store())).await.unwrap();
    assert!(second.snapshot().apps.contains_key("a"));
    catalog.delete::<App>("a").await.unwrap();
    eventually(&second, |s| s.apps.is_empty().then_some(())).await;
    assert_eq!(second.stale_for(), None);
}

#[tokio::test]
async fn indexes_follow_updates_and_deletes() {
    let dir = tempfile::tempdir().unwrap();
    let (catalog, view) = catalog(&dir, 1000).await;
    let mut m = machine("a", 7);
    catalog.create(&m).await.unwrap();
    eventually(&view, |s| s.machine_at(m.private_ip).cloned()).await;
    let old = m.private_ip;
    m.private_ip = PrivateAddress::of_machine(NetworkId(1), HostId(1), MachineNumber(8));
    catalog.put(&m).await.unwrap();
    eventually(&view, |s| s.machine_at(m.private_ip).cloned()).await;
    let snapshot = view.snapshot();
    assert!(snapshot.machine_at(old).is_none());
    assert_eq!(snapshot.machines_of(&m.app).count(), 1);
    catalog.delete::<Machine>(m.id.as_str()).await.unwrap();
    eventually(&view, |s| {
        (s.machines_of(&m.app).count() == 0).then_some(())
    })
    .await;
    assert!(view.snapshot().machine_at(m.private_ip).is_none());
}

#[tokio::test]
async fn a_record_that_cannot_be_read_does_not_stop_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let (catalog, view) = catalog(&dir, 1000).await;
    let put = |key: &str| Op::Put {
        key: key.to_owned(),
        value: b"{nonsense".to_vec(),
        lease: None,
    };
    for key in [
        "apps/x",
        "machines/../etc",
        "hosts/one",
        "hostnames/..",
        "unheard/of",
    ] {
        catalog
            .store()
            .commit(Transaction::of(vec![put(key)]))
            .await
            .unwrap();
    }
    catalog.create(&app("good")).await.unwrap();
    eventually(&view, |s| s.apps.get("good").cloned()).await;
    assert_eq!(view.snapshot().apps.len(), 1);
}

#[tokio::test]
async fn a_view_that_fell_behind_reads_everything_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (catalog, view) = catalog(&dir, 10).await;
    // In a single-threaded runtime the follower gets no turn while these commits are polled for only by
    // this task: more of them than a watch's queue and the history hold.
    for n in 0..6000u32 {
        let value = serde_json::to_vec(&app(&format!("app-{}", n % 50))).unwrap();
        let put = Op::Put {
            key: format!("apps/app-{}", n % 50),
            value,
            lease: None,
        };
        catalog
            .store()
            .commit(Transaction::of(vec![put]))
            .await
            .unwrap();
    }
    catalog.create(&app("last")).await.unwrap();
    eventually(&view, |s| s.apps.get("last").cloned()).await;
    assert_eq!(view.snapshot().apps.len(), 51);
}

fn put_raw(key: String, value: impl Into<Vec<u8>>) -> Transaction {
    let value = value.into();
    Transaction::of(vec![Op::Put {
        key,
        value,
        lease: None,
    }])
}

#[tokio::test]
async fn of_a_value_that_cannot_be_read_the_last_good_one_is_kept_and_that_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (catalog, view) = catalog(&dir, 10).await;
    let m = machine("a", 7);
    catalog.create(&m).await.unwrap();
    catalog.create(&app("gone")).await.unwrap();
    let poison = put_raw(m.key(), "{\"id\": 7}");
    let revision = catalog.store().commit(poison).await.unwrap();
    let told = eventually(&view, |s| s.unreadable.get(&m.key()).cloned()).await;
    assert_eq!(told.revision, revision);
    assert!(!told.error.is_empty());
    assert_eq!(view.snapshot().machines.get(&m.id).map(|m| &**m), Some(&m));

    // Who falls behind and reads everything anew still has it, and not what is gone.
    catalog.delete::<App>("gone").await.unwrap();
    let other = machine("b", 8);
    for n in 0..6000 {
        let value = serde_json::to_vec(&app("busy")).unwrap();
        let commit = match n {
            0 => Transaction::of(vec![Op::put(&other)]),
            _ => put_raw("apps/busy".into(), value),
        };
        catalog.store().commit(commit).await.unwrap();
    }
    catalog.create(&app("last")).await.unwrap();
    eventually(&view, |s| s.apps.get("last").cloned()).await;
    let snapshot = view.snapshot();
    assert_eq!(snapshot.unreadable.get(&m.key()), Some(&told));
    assert_eq!(snapshot.machine_at(m.private_ip).map(|m| &**m), Some(&m));
    assert_eq!(snapshot.machines_of(&m.app).count(), 1);
    assert!(snapshot.machines.contains_key(&other.id));
    let apps: Vec<_> = snapshot.apps.keys().map(|name| name.as_str()).collect();
    assert_eq!(apps, ["busy", "last"]);

    // What is mended, or removed, is forgotten.
    catalog.put(&m).await.unwrap();
    eventually(&view, |s| s.unreadable.is_empty().then_some(())).await;
    let poison = put_raw("apps/last".into(), "nonsense");
    catalog.store().commit(poison).await.unwrap();
    eventually(&view, |s| s.unreadable.get("apps/last").cloned()).await;
    catalog.delete::<App>("last").await.unwrap();
    eventually(&view, |s| s.unreadable.is_empty().then_some(())).await;
    assert!(!view.snapshot().apps.contains_key("last"));
}

/// A store whose first watch brings whoever asks for it down.
struct Deadly {
    store: Arc<dyn Store>,
    armed: AtomicBool,
}

#[async_trait]
impl Store for Deadly {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.store.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.store.list(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
        self.store.commit(transaction).await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        assert!(!self.armed.swap(false, Ordering::Relaxed), "on purpose");
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

#[tokio::test]
async fn a_follower_that_dies_has_a_successor() {
    let dir = tempfile::tempdir().unwrap();
    let (catalog, _) = catalog(&dir, 1000).await;
    let deadly = Deadly {
        store: Arc::clone(catalog.store()),
        armed: AtomicBool::new(true),
    };
    let view = View::follow(Arc::new(deadly)).await.unwrap();
    catalog.create(&app("a")).await.unwrap();
    eventually(&view, |s| s.apps.get("a").cloned()).await;
}
