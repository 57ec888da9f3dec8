//! What the members do that a real etcd does only when its disks hang, its network is cut or its clock is late.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::fake::{Call, Fake, Reply, header};
use super::messages::{
    AuthenticateResponse, Event, RangeResponse, WatchCommand, WatchRequest, WatchResponse,
};
use super::*;
use crate::{Change, WatchEvent};

/// Longest wait for what takes seconds on an idle machine.
const LIMIT: Duration = Duration::from_secs(60);

fn config(members: &[&Fake]) -> EtcdConfig {
    EtcdConfig {
        endpoints: members.iter().map(|m| m.address.clone()).collect(),
        ..EtcdConfig::default()
    }
}

async fn store(members: &[&Fake]) -> EtcdStore {
    EtcdStore::connect(config(members)).await.unwrap()
}

/// A store that logs in.
async fn store_with_login(members: &[&Fake]) -> EtcdStore {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("password");
    std::fs::write(&file, "x").unwrap();
    let config = EtcdConfig {
        user: Some("tern".to_owned()),
        password_file: Some(file),
        ..config(members)
    };
    let store = EtcdStore::connect(config).await.unwrap();
    // Later logins read it again.
    std::mem::forget(dir);
    store
}

async fn event(watch: &mut Watch) -> Result<WatchEvent, StoreError> {
    let event = tokio::time::timeout(LIMIT, watch.event()).await;
    event.expect("it is told").expect("the watch is open")
}

fn is_create(request: &WatchRequest) -> bool {
    matches!(request.command, Some(WatchCommand::Create(_)))
}

/// A member's answer to a message of a watch, while it is at this revision and nothing happens.
fn quiet(request: &WatchRequest, revision: i64) -> WatchResponse {
    WatchResponse {
        header: header(revision),
        created: is_create(request),
        ..WatchResponse::default()
    }
}

fn put(key: &str, revision: i64) -> Event {
    Event {
        kind: 0,
        kv: Some(KeyValue {
            key: etcd_key(key),
            mod_revision: revision,
            value: b"1".to_vec(),
        }),
    }
}

fn write(key: &str) -> Transaction {
    Transaction::of(vec![Op::Put {
        key: key.to_owned(),
        value: b"1".to_vec(),
        lease: None,
    }])
}

fn committed(revision: i64) -> Reply {
    Reply::answer(&TxnResponse {
        header: header(revision),
        succeeded: true,
        responses: Vec::new(),
    })
}

/// A member that is at revision 20, of which 20 is the last commit.
async fn current() -> Fake {
    Fake::start(
        |call| Reply::well(call, 20),
        |_, request| {
            let mut responses = vec![quiet(&request, 20)];
            if is_create(&request) {
                responses.push(WatchResponse {
                    events: vec![put("a", 20)],
                    ..quiet(&WatchRequest { command: None }, 20)
                });
            }
            responses
        },
    )
    .await
}

/// What a watch after 10 tells that speaks first to a member whose own store stays at 10.
async fn past_a_member_that_stands_still(range: fn(&Call) -> Reply) {
    let still = Fake::start(
        move |call| match call.method.as_str() {
            "KV/Range" => range(call),
            _ => Reply::well(call, 10),
        },
        |_, request| vec![quiet(&request, 10)],
    )
    .await;
    let current = current().await;
    let store = store(&[&still, &current]).await;
    let mut watch = store.watch("", 10).await.unwrap();
    // Nothing is called current before the cluster's last commit is told.
    let WatchEvent::Batch(batch) = event(&mut watch).await.unwrap() else {
        panic!("a member's own word is no proof");
    };
    assert_eq!(batch.revision, 20);
    let WatchEvent::Progress { revision, .. } = event(&mut watch).await.unwrap() else {
        panic!("nothing was written");
    };
    assert_eq!(revision, 20);
}

#[tokio::test]
async fn a_member_whose_disk_hangs_is_no_proof_and_is_left_by_its_watches() {
    past_a_member_that_stands_still(|_| Reply::Never).await;
}

#[tokio::test]
async fn a_member_that_is_behind_and_does_not_catch_up_is_left() {
    past_a_member_that_stands_still(|call| Reply::well(call, 20)).await;
}

#[tokio::test]
async fn a_watch_is_as_new_as_the_question_not_as_the_answer() {
    let late = Arc::new(parking_lot::Mutex::new(None));
    let seen = Arc::clone(&late);
    let member = Fake::start(
        move |call| {
            if call.method == "KV/Range" {
                seen.lock().get_or_insert_with(Instant::now);
                let Reply::Answer(message) = Reply::well(call, 10) else {
                    unreachable!()
                };
                return Reply::Slowly(message, usize::MAX, Duration::from_secs(1));
            }
            Reply::well(call, 10)
        },
        |_, request| vec![quiet(&request, 10)],
    )
    .await;
    let store = store(&[&member]).await;
    let mut watch = store.watch("", 10).await.unwrap();
    let WatchEvent::Progress { asked, .. } = event(&mut watch).await.unwrap() else {
        panic!("nothing was written");
    };
    assert!(asked <= late.lock().unwrap());
}

#[tokio::test]
async fn a_cluster_that_is_behind_what_was_told_has_another_history() {
    // As etcd 3.5.22 and 3.6 do, it says nothing to a watch of a revision that is to come.
    let restored = Fake::start(
        |call| Reply::well(call, 5),
        |_, request| match is_create(&request) {
            true => vec![quiet(&request, 5)],
            false => Vec::new(),
        },
    )
    .await;
    let store = store(&[&restored]).await;
    let mut watch = store.watch("", 10).await.unwrap();
    let (wanted, oldest) = (10, 5);
    let end = event(&mut watch).await.unwrap_err();
    assert_eq!(end, StoreError::Compacted { wanted, oldest });
}

#[tokio::test]
async fn another_cluster_has_another_history_whatever_its_revision() {
    let other = Fake::start(
        |call| Reply::well(call, 10),
        |_, request| {
            let mut response = quiet(&request, 10);
            if let Some(header) = response.header.as_mut().filter(|_| !response.created) {
                header.cluster = 2;
            }
            vec![response]
        },
    )
    .await;
    let store = store(&[&other]).await;
    let mut watch = store.watch("", 10).await.unwrap();
    loop {
        match event(&mut watch).await {
            Ok(WatchEvent::Progress { .. }) => {}
            Err(StoreError::Compacted { .. }) => break,
            other => panic!("{other:?}"),
        }
    }
}

/// A member that gives a new token at each login, and counts them.
fn logins(call: &Call, count: &AtomicUsize) -> Reply {
    match call.method.as_str() {
        "Auth/Authenticate" => Reply::answer(&AuthenticateResponse {
            token: format!("t{}", count.fetch_add(1, Ordering::SeqCst) + 1),
        }),
        _ => Reply::well(call, 10),
    }
}

async fn denying(first: &'static str) -> (Fake, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let member = Fake::start(
        move |call| logins(call, &counted),
        move |call, request| {
            let mut response = quiet(&request, 10);
            if call.token.as_deref() == Some(first) || first == "all" {
                response.canceled = true;
                response.cancel_reason = "etcdserver: permission denied".to_owned();
            }
            vec![response]
        },
    );
    (member.await, count)
}

#[tokio::test]
async fn a_watch_whose_login_has_ended_logs_in_again() {
    let (member, count) = denying("t1").await;
    let store = store_with_login(&[&member]).await;
    let mut watch = store.watch("", 10).await.unwrap();
    let told = event(&mut watch).await;
    assert!(
        matches!(told, Ok(WatchEvent::Progress { revision: 10, .. })),
        "{told:?}"
    );
    assert_eq!(count.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_watch_that_is_not_allowed_is_told_so() {
    let (member, _) = denying("all").await;
    let store = store_with_login(&[&member]).await;
    let mut watch = store.watch("", 10).await.unwrap();
    let end = event(&mut watch).await;
    assert!(
        matches!(&end, Err(StoreError::Unavailable(text)) if text.contains("permission denied")),
        "{end:?}"
    );
}

#[tokio::test]
async fn a_login_that_has_ended_is_made_again_with_the_same_member() {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let ended = AtomicUsize::new(0);
    let first = Fake::start(
        move |call| {
            // The second question finds that the first login has ended.
            if call.method == "KV/Range"
                && call.token.as_deref() == Some("t1")
                && ended.fetch_add(1, Ordering::SeqCst) > 0
            {
                return Reply::Refused(16, "etcdserver: invalid auth token");
            }
            logins(call, &counted)
        },
        |_, _| Vec::new(),
    )
    .await;
    let other = Fake::start(|call| panic!("{}", call.method), |_, _| Vec::new()).await;
    let store = store_with_login(&[&first, &other]).await;
    assert_eq!(store.get("a").await, Ok(None));
    assert_eq!(store.get("a").await, Ok(None));
    assert_eq!(count.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_slow_write_does_not_end_what_reads_live_on() {
    let opened = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&opened);
    let watches = Arc::new(AtomicUsize::new(0));
    let counted_watches = Arc::clone(&watches);
    let member = Fake::start(
        move |call| match call.method.as_str() {
            "KV/Txn" => Reply::Never,
            "Maintenance/Status" => {
                counted.fetch_add(1, Ordering::SeqCst);
                Reply::well(call, 10)
            }
            _ => Reply::well(call, 10),
        },
        move |_, request| {
            counted_watches.fetch_add(usize::from(is_create(&request)), Ordering::SeqCst);
            vec![quiet(&request, 10)]
        },
    )
    .await;
    let store = store(&[&member]).await;
    let mut watch = store.watch("", 10).await.unwrap();
    event(&mut watch).await.unwrap();
    let outcome = store.commit(write("a")).await;
    assert!(
        matches!(outcome, Err(StoreError::Unknown(_))),
        "{outcome:?}"
    );
    assert_eq!(store.get("a").await, Ok(None));
    for _ in 0..AHEAD_OF_THE_WRITE {
        event(&mut watch).await.unwrap();
    }
    let opened = opened.load(Ordering::SeqCst);
    assert_eq!((opened, watches.load(Ordering::SeqCst)), (1, 1));
}

/// More than was told while the write was waited for.
const AHEAD_OF_THE_WRITE: usize = 8;

#[tokio::test]
async fn a_connection_that_is_left_serves_until_another_stands() {
    let asked = AtomicUsize::new(0);
    let logins = AtomicUsize::new(0);
    let member = Fake::start(
        move |call| match call.method.as_str() {
            // A login is a write, and those do not go through.
            "Auth/Authenticate" if logins.fetch_add(1, Ordering::SeqCst) > 0 => {
                Reply::Refused(14, "etcdserver: request timed out")
            }
            "KV/Range" if asked.fetch_add(1, Ordering::SeqCst) == 0 => {
                Reply::Refused(14, "etcdserver: no leader")
            }
            _ => Reply::well(call, 10),
        },
        |_, _| Vec::new(),
    )
    .await;
    let store = store_with_login(&[&member]).await;
    assert_eq!(store.get("a").await, Ok(None));
}

#[tokio::test]
async fn a_write_that_was_not_begun_with_is_sent_again() {
    let asked = AtomicUsize::new(0);
    let member = Fake::start(
        move |call| match call.method.as_str() {
            "KV/Txn" if asked.fetch_add(1, Ordering::SeqCst) == 0 => Reply::NotBegun,
            "KV/Txn" => committed(11),
            _ => Reply::well(call, 10),
        },
        |_, _| Vec::new(),
    )
    .await;
    let store = store(&[&member]).await;
    assert_eq!(store.commit(write("a")).await, Ok(11));
}

#[tokio::test]
async fn no_attempt_is_begun_that_has_no_time_left() {
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let member = Fake::start(
        move |call| match call.method.as_str() {
            "KV/Range" => {
                counted.fetch_add(1, Ordering::SeqCst);
                Reply::Never
            }
            _ => Reply::well(call, 10),
        },
        |_, _| Vec::new(),
    )
    .await;
    let store = store(&[&member]).await;
    let outcome = store.get("a").await;
    assert!(
        matches!(outcome, Err(StoreError::Unavailable(_))),
        "{outcome:?}"
    );
    // Two of four seconds each fit into ten.
    assert!((1..=2).contains(&asked.load(Ordering::SeqCst)));
}

#[tokio::test]
async fn a_page_that_comes_slowly_comes() {
    let member = Fake::start(
        |call| match call.method.as_str() {
            "KV/Range" => {
                let answer = RangeResponse {
                    header: header(10),
                    kvs: vec![KeyValue {
                        key: etcd_key("a"),
                        mod_revision: 9,
                        value: vec![b'x'; 60_000],
                    }],
                    more: false,
                };
                let Reply::Answer(message) = Reply::answer(&answer) else {
                    unreachable!()
                };
                // Six seconds in all, where a member that says nothing is given four.
                Reply::Slowly(message, 10_100, Duration::from_secs(1))
            }
            _ => Reply::well(call, 10),
        },
        |_, _| Vec::new(),
    )
    .await;
    let store = store(&[&member]).await;
    let listing = store.list("").await.unwrap();
    assert_eq!((listing.entries.len(), listing.revision), (1, 10));
}

#[tokio::test]
async fn a_response_in_pieces_is_told_as_it_comes_and_no_commit_in_two() {
    let piece = |events: &[(&str, i64)], fragment: bool| WatchResponse {
        header: header(14),
        fragment,
        events: events.iter().map(|(key, at)| put(key, *at)).collect(),
        ..WatchResponse::default()
    };
    let end = Arc::new(AtomicUsize::new(0));
    let wanted = Arc::clone(&end);
    let member = Fake::start(
        |call| Reply::well(call, 14),
        move |_, request| {
            if is_create(&request) {
                let first = piece(&[("a", 11), ("a", 12)], true);
                let second = piece(&[("b", 12), ("a", 13)], true);
                return vec![quiet(&request, 14), first, second];
            }
            match wanted.load(Ordering::SeqCst) {
                // The rest only once what is whole was told.
                0 => Vec::new(),
                _ => vec![piece(&[("b", 13), ("a", 14)], false)],
            }
        },
    )
    .await;
    let store = store(&[&member]).await;
    let mut watch = store.watch("", 10).await.unwrap();
    for (revision, changes) in [(11, 1), (12, 2), (13, 2), (14, 1)] {
        let WatchEvent::Batch(batch) = event(&mut watch).await.unwrap() else {
            panic!("it is not current before all is told");
        };
        assert_eq!((batch.revision, batch.changes.len()), (revision, changes));
        assert!(matches!(&batch.changes[0], Change::Put(entry) if entry.key == "a"));
        end.fetch_add(usize::from(revision == 12), Ordering::SeqCst);
    }
}

#[test]
fn a_prefix_is_a_range_of_exactly_its_keys() {
    let keys = Keys::under("a/");
    let inside = |key: &str| (&keys.first..&keys.end).contains(&&etcd_key(key));
    assert!(inside("a/") && inside("a/b") && inside("a/\u{10ffff}"));
    assert!(!inside("a") && !inside("a0") && !inside("b"));
    let all = Keys::under("");
    assert_eq!(
        (&all.first[..], &all.end[..]),
        (&b"tern/"[..], &b"tern0"[..])
    );
}
