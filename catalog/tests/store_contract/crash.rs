//! `kill -9` in a loop under writes: nothing acknowledged is lost, nothing is half there.
//!
//! The writer is this test binary again, started as a child for one test with an environment variable
//! that says where the store is.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use tern_catalog::{SqliteStore, Store};

use crate::{commit, put};

const ROUNDS: u32 = 25;
const STORE: &str = "TERN_CRASH_TEST_STORE";

/// Not a test of its own: what the child does. Writes pairs and says each that is acknowledged.
#[test]
fn child_writes_until_killed() {
    let Ok(path) = std::env::var(STORE) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let store: std::sync::Arc<dyn Store> =
            std::sync::Arc::new(SqliteStore::open(path.as_ref()).unwrap());
        let first = store
            .get("left")
            .await
            .unwrap()
            .map_or(0, |e| number(&e.value));
        for n in first + 1.. {
            let text = n.to_string();
            commit(&store, vec![put("left", &text), put("right", &text)]).await;
            let mut out = std::io::stdout().lock();
            writeln!(out, "acknowledged {n}").unwrap();
            out.flush().unwrap();
        }
    });
}

#[tokio::test]
async fn a_crash_loses_no_acknowledged_write() {
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("catalog.db");
    let mut acknowledged = 0;
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash::child_writes_until_killed", "--nocapture"])
            .env(STORE, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (tell, told) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Some(n) = line
                    .strip_prefix("acknowledged ")
                    .and_then(|n| n.parse::<u64>().ok())
                {
                    let _ = tell.send(n);
                }
            }
        });
        // Killed after a different number of writes each time, at whatever point it is then.
        for _ in 0..=round * 3 {
            acknowledged = told.recv_timeout(Duration::from_secs(60)).unwrap();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        reader.join().unwrap();
        acknowledged = told.try_iter().last().unwrap_or(acknowledged);

        let store = SqliteStore::open(&path).unwrap();
        let read = async |key| number(&store.get(key).await.unwrap().unwrap().value);
        let (left, right) = (read("left").await, read("right").await);
        assert_eq!(left, right, "half a transaction in round {round}");
        assert!(
            left >= acknowledged,
            "round {round} lost {acknowledged}, it has {left}"
        );
        assert!(
            left <= acknowledged + 1,
            "round {round} has {left}, only {acknowledged} was acknowledged"
        );
        assert_eq!(store.list("").await.unwrap().revision, left);
    }
}

#[tokio::test]
async fn a_second_process_is_kept_out() {
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("catalog.db");
    let _first = SqliteStore::open(&path).unwrap();
    let error = SqliteStore::open(&path).err().unwrap().to_string();
    assert!(error.contains("another process"), "{error}");
}

#[tokio::test]
async fn the_last_handle_lets_go_of_the_file() {
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("catalog.db");
    for n in 1..=20 {
        let store: std::sync::Arc<dyn Store> =
            std::sync::Arc::new(SqliteStore::open(&path).unwrap());
        assert_eq!(commit(&store, vec![put("k", "v")]).await, n);
    }
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn the_file_of_a_newer_version_is_refused_and_left_alone() {
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("catalog.db");
    drop(SqliteStore::open(&path).unwrap());
    let newer = rusqlite::Connection::open(&path).unwrap();
    newer
        .execute("UPDATE meta SET value = 99 WHERE name = 'version'", [])
        .unwrap();
    let error = SqliteStore::open(&path).err().unwrap().to_string();
    assert!(error.contains("layout 99"), "{error}");
}

#[tokio::test]
async fn a_file_that_is_no_catalog_is_refused_and_left_alone() {
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("catalog.db");
    std::fs::write(&path, "not a database, but somebody's letter".repeat(100)).unwrap();
    assert!(SqliteStore::open(&path).is_err());
    assert!(
        std::fs::read_to_string(&path)
            .unwrap()
            .starts_with("not a database")
    );
}

fn number(value: &[u8]) -> u64 {
    std::str::from_utf8(value).unwrap().parse().unwrap()
}
