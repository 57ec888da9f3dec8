//! What etcd does to its clients on a bad day: members die, hang and change their leader, history is
//! compacted under a watch, and a majority is lost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tern_catalog::{
    App, Catalog, CatalogError, EtcdConfig, EtcdStore, NetworkId, Revision, Store, StoreError,
    Transaction, View, Watch, WatchEvent,
};

use crate::cluster::{Cluster, LIMIT};
use crate::{commit_if, put, value};

async fn next(watch: &mut Watch) -> Result<(Revision, usize), StoreError> {
    let batch = tokio::time::timeout(LIMIT, watch.next()).await;
    let batch = batch.expect("the watch goes on").expect("it is open")?;
    Ok((batch.revision, batch.changes.len()))
}

/// Writes until it is certain that it is done, as a caller has to: an unknown outcome is looked at.
async fn write(store: &Arc<dyn Store>, key: &str, text: &str) -> Revision {
    let began = Instant::now();
    loop {
        let error = match store.commit(Transaction::of(vec![put(key, text)])).await {
            Ok(revision) => return revision,
            Err(error) => error,
        };
        assert!(
            matches!(error, StoreError::Unknown(_) | StoreError::Unavailable(_)),
            "{error:?}"
        );
        assert!(began.elapsed() < LIMIT, "{error}");
        let found = store.get(key).await;
        if let Ok(Some(entry)) = found
            && entry.value == text.as_bytes()
        {
            return entry.revision;
        }
    }
}

/// Reads the watch up to this revision; every commit must be there once, in order.
async fn told_up_to(watch: &mut Watch, mut from: Revision, to: Revision) {
    while from < to {
        let (revision, _) = next(watch).await.unwrap();
        assert_eq!(revision, from + 1, "no gap and nothing twice");
        from = revision;
    }
}

#[tokio::test]
async fn members_that_die_hang_or_hand_over_cost_nothing_but_time() {
    let mut cluster = Cluster::start(3).await;
    let (leader, ids) = cluster.leader();
    let follower = (leader + 1) % 3;
    let store: Arc<dyn Store> = Arc::new(cluster.store_at(follower).await);
    let mut told = store.list("").await.unwrap().revision;
    let mut watch = store.watch("", told).await.unwrap();

    // The leader moves.
    let written = write(&store, "a", "before").await;
    told_up_to(&mut watch, told, written).await;
    told = written;
    cluster.etcdctl(leader, &["move-leader", &ids[follower]]);
    let written = write(&store, "a", "moved").await;
    told_up_to(&mut watch, told, written).await;
    told = written;

    // The member that we speak to, the leader now, stops answering. Its sockets stay open.
    cluster.members[follower].signal(Signal::SIGSTOP);
    let written = write(&store, "a", "hung").await;
    told_up_to(&mut watch, told, written).await;
    told = written;
    // A new client gets past it too.
    let second = cluster.store_at(follower).await;
    assert_eq!(second.get("a").await.unwrap().unwrap().value, b"hung");
    cluster.members[follower].signal(Signal::SIGCONT);
    // What the hung one did not answer may be done only now; it can only be what was written.
    let after = store.list("").await.unwrap();
    assert_eq!(after.entries.len(), 1);
    told_up_to(&mut watch, told, after.revision).await;
    told = after.revision;

    // The member that we speak to now is killed.
    let third = (follower + 1) % 3;
    cluster.members[third].kill();
    let written = write(&store, "a", "killed").await;
    told_up_to(&mut watch, told, written).await;
    cluster.members[third].start();
}

#[tokio::test]
async fn a_lost_majority_refuses_writes_and_all_catches_up_after() {
    let mut cluster = Cluster::start(3).await;
    let store: Arc<dyn Store> = Arc::new(cluster.store().await);
    let catalog = Catalog::new(Arc::clone(&store));
    catalog.create(&app("first")).await.unwrap();
    let view = View::follow(Arc::clone(&store)).await.unwrap();
    assert_eq!(view.stale_for(), None);
    let lease = store.grant(Duration::from_secs(600)).await.unwrap();

    cluster.members[1].kill();
    cluster.members[2].kill();
    // Unknown at first, for the leader does not know yet that it is alone; then a clear refusal.
    let began = Instant::now();
    loop {
        let asked = Instant::now();
        let error = catalog.create(&app("second")).await.unwrap_err();
        assert!(asked.elapsed() < LIMIT / 2, "{error}");
        match error {
            CatalogError::Store(StoreError::Unavailable(text)) => {
                assert!(text.contains("no leader"), "{text}");
                break;
            }
            CatalogError::Store(StoreError::Unknown(_)) => {}
            other => panic!("{other:?}"),
        }
        assert!(began.elapsed() < LIMIT, "never refused");
    }
    assert!(store.get("apps/first").await.is_err());
    assert!(store.keep_alive(lease).await.is_err());
    // The picture stays, and says how old it is.
    assert!(view.snapshot().apps.contains_key("first"));
    while view.stale_for().is_none() {
        assert!(began.elapsed() < LIMIT, "the view never calls itself stale");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    cluster.members[1].start();
    cluster.members[2].start();
    let began = Instant::now();
    loop {
        match catalog.create(&app("third")).await {
            Ok(_) | Err(CatalogError::Exists(_)) => break,
            Err(error) => assert!(began.elapsed() < LIMIT, "{error}"),
        }
    }
    let seen = view.wait_for(|s| s.apps.get("third").cloned());
    tokio::time::timeout(LIMIT, seen)
        .await
        .expect("the view catches up");
    while view.stale_for().is_some() {
        assert!(began.elapsed() < LIMIT, "the view stays stale");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    store.keep_alive(lease).await.unwrap();
}

#[tokio::test]
async fn history_compacted_under_a_watch_is_told_and_a_view_reads_anew() {
    let mut cluster = Cluster::start(1).await;
    let store: Arc<dyn Store> = Arc::new(cluster.store().await);
    let catalog = Catalog::new(Arc::clone(&store));
    catalog.create(&app("kept")).await.unwrap();
    let base = catalog.create(&app("deleted")).await.unwrap();
    let view = View::follow(Arc::clone(&store)).await.unwrap();
    // A second client, which the view does not share its connection with.
    let other: Arc<dyn Store> = Arc::new(cluster.store().await);
    // All its followers are cut off and the history they would need is compacted before they come back.
    let other_catalog = Catalog::new(Arc::clone(&other));
    let last = other_catalog.delete::<App>("deleted").await.unwrap();
    cluster.etcdctl(0, &["compact", &last.to_string()]);
    // Below, and at, the compacted revision: the deletion must never be lost silently.
    let mut watch = other.watch("", base).await.unwrap();
    let StoreError::Compacted { wanted, oldest } = next(&mut watch).await.unwrap_err() else {
        panic!("not compacted")
    };
    assert_eq!((wanted, oldest), (base, last));
    let mut watch = other.watch("", oldest).await.unwrap();
    let after = other_catalog.create(&app("new")).await.unwrap();
    assert_eq!(next(&mut watch).await, Ok((after, 1)));
    let seen = view.wait_for(|s| s.apps.get("new").cloned());
    tokio::time::timeout(LIMIT, seen)
        .await
        .expect("the view follows");
    assert!(!view.snapshot().apps.contains_key("deleted"));

    // The same over a restart of the member: watches find it again, and go on.
    cluster.members[0].kill();
    cluster.members[0].start();
    let began = Instant::now();
    while let Err(error) = other_catalog.put(&app("restarted")).await {
        assert!(began.elapsed() < LIMIT, "{error}");
    }
    let seen = view.wait_for(|s| s.apps.get("restarted").cloned());
    tokio::time::timeout(LIMIT, seen)
        .await
        .expect("the view follows");
}

#[tokio::test]
async fn a_view_that_is_ahead_of_a_restored_etcd_reads_anew() {
    let mut cluster = Cluster::start(1).await;
    let store: Arc<dyn Store> = Arc::new(cluster.store().await);
    let catalog = Catalog::new(Arc::clone(&store));
    catalog.create(&app("kept")).await.unwrap();
    cluster.save();
    catalog.create(&app("lost")).await.unwrap();
    let view = View::follow(Arc::clone(&store)).await.unwrap();
    assert!(view.snapshot().apps.contains_key("lost"));
    let before = view.snapshot().revision;

    cluster.restore();
    let seen = view.wait_for(|s| (!s.apps.contains_key("lost")).then_some(s.revision));
    let after = tokio::time::timeout(LIMIT, seen)
        .await
        .expect("the view notices");
    assert!(after < before);
    assert!(view.snapshot().apps.contains_key("kept"));
    let began = Instant::now();
    while let Err(error) = catalog.put(&app("new")).await {
        assert!(began.elapsed() < LIMIT, "{error}");
    }
    let seen = view.wait_for(|s| s.apps.get("new").cloned());
    tokio::time::timeout(LIMIT, seen)
        .await
        .expect("the view follows");
}

#[tokio::test]
async fn who_is_not_let_in_is_told_why() {
    let cluster = Cluster::start(1).await;
    let good = cluster.config();
    let refusal = async |config: EtcdConfig| match EtcdStore::connect(config).await {
        Err(StoreError::Unavailable(text)) => text,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("let in"),
    };
    let other_ca = EtcdConfig {
        ca: Some(cluster.file("other-ca.pem")),
        ..good.clone()
    };
    let text = refusal(other_ca).await;
    assert!(
        text.contains("UnknownIssuer") || text.contains("BadSignature"),
        "{text}"
    );
    let no_certificate = EtcdConfig {
        certificate: None,
        key: None,
        ..good.clone()
    };
    refusal(no_certificate).await;
    let wrong = cluster.file("wrong");
    std::fs::write(&wrong, "guessed").unwrap();
    let wrong_password = EtcdConfig {
        password_file: Some(wrong),
        ..good.clone()
    };
    let text = refusal(wrong_password).await;
    assert!(text.contains("authentication failed"), "{text}");
    // Known, and then not allowed any more: told, and nothing of it called unknown.
    let store: Arc<dyn Store> = Arc::new(cluster.store().await);
    commit_if(&store, "k", None, vec![put("k", "1")])
        .await
        .unwrap();
    cluster.etcdctl(0, &["user", "revoke-role", "tern", "tern"]);
    let error = store
        .commit(Transaction::of(vec![put("k", "2")]))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, StoreError::Unavailable(text) if text.contains("permission denied")),
        "{error:?}"
    );
    cluster.etcdctl(0, &["user", "grant-role", "tern", "tern"]);
    assert_eq!(value(&store, "k").await.as_deref(), Some("1"));
}

#[tokio::test]
async fn progress_comes_again_from_another_member() {
    let mut cluster = Cluster::start(3).await;
    let (leader, _) = cluster.leader();
    let store = cluster.store_at((leader + 1) % 3).await;
    let base = store.list("").await.unwrap().revision;
    let mut watch = store.watch("", base).await.unwrap();
    let mut progress = async || {
        let event = tokio::time::timeout(LIMIT, watch.event()).await;
        match event.expect("it is told").unwrap().unwrap() {
            WatchEvent::Progress { revision, .. } => revision,
            WatchEvent::Batch(batch) => panic!("{batch:?}"),
        }
    };
    assert_eq!(progress().await, base);
    cluster.members[(leader + 1) % 3].kill();
    // What was sent before the member died may still be there; the rest is another's.
    for _ in 0..3 {
        assert_eq!(progress().await, base);
    }
}

fn app(name: &str) -> App {
    App {
        name: name.parse().unwrap(),
        organization: "personal".parse().unwrap(),
        network: NetworkId(1),
        deleting: false,
        created_at: Default::default(),
    }
}
