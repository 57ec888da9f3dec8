//! The monitor is killed at every step of a start, a snapshot and a restore, with true KVM; what it leaves
//! behind is in nobody's way.
//!
//! A step is a system call that changes something outside of the process (`tern-faults`). A snapshot has some
//! two hundred, most of which write memory: of those, `make test` takes each [`STRIDE`]th, and `TERN_DEEP=1`
//! (`make check-deep`) takes all.
#![cfg(target_arch = "x86_64")]
#![allow(missing_docs, clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use support::Guest;

const USER: u32 = 4242;
const STRIDE: usize = 19;

/// A jailed guest that remembers a word in its memory, asleep.
fn asleep() -> Guest {
    let mut guest = Guest::new().jailed(USER).booted();
    guest.sh("echo kept >/word");
    guest.suspend();
    guest
}

/// Names below the Machine's directory.
fn names(guest: &Guest) -> BTreeSet<String> {
    fn list(dir: &Path, root: &Path, names: &mut BTreeSet<String>) {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            names.insert(path.strip_prefix(root).unwrap().display().to_string());
            if path.is_dir() {
                list(&path, root, names);
            }
        }
    }
    let mut names = BTreeSet::new();
    let root = guest.path("");
    list(&root, &root, &mut names);
    names
}

/// Starts over and over, each time to die one step later, until it lives. Returns how often it died.
fn die_at_every_step(guest: &mut Guest, arguments: &[&str]) -> u64 {
    for nth in 1.. {
        let shot = guest.start_to_die(arguments, nth);
        let lives = guest.until("an end, or a guest that runs", || {
            if guest.is_dead() {
                return Some(false);
            }
            guest.answers().then_some(true)
        });
        match shot.stand_down() {
            None => {
                assert!(lives, "it died by itself\n{}", guest.logs());
                return nth - 1;
            }
            // Also where it answered once before.
            Some(_) => {
                guest.until("its death", || guest.is_dead().then_some(()));
                guest.bury();
            }
        }
    }
    unreachable!()
}

#[test]
fn metal_a_start_is_killed_at_every_step() {
    let mut guest = Guest::new().jailed(USER);
    let kills = die_at_every_step(&mut guest, &[]);
    assert!(kills > 5, "only {kills} steps");
    // The one that lived is as good as any.
    assert_eq!(guest.sh("echo up"), "up");
    guest.suspend();
}

#[test]
fn metal_a_restore_is_killed_at_every_step() {
    let mut guest = asleep();
    let before = names(&guest);
    let kills = die_at_every_step(&mut guest, &["--restore"]);
    assert!(kills > 5, "only {kills} steps");
    assert_eq!(guest.sh("cat /word"), "kept");
    guest.suspend();
    let after: Vec<_> = names(&guest).difference(&before).cloned().collect();
    assert!(
        after.iter().all(|name| name.contains("working_set")),
        "{after:?}"
    );
}

/// Kills the monitor at steps of a restored guest's snapshot. `prepare` is called with the snapshot's
/// directory before each restore. Returns after how many kills there was the old snapshot, the new one, none.
fn die_in_a_snapshot(guest: &mut Guest, prepare: impl Fn(&Path)) -> [usize; 3] {
    let good = guest.path("good");
    let snapshot = guest.path("jail/snapshot");
    let copy = |from: &Path, to: &Path| {
        let _ = fs::remove_dir_all(to);
        let done = Command::new("cp")
            .arg("-a")
            .args([from, to])
            .status()
            .unwrap();
        assert!(done.success());
    };
    copy(&snapshot, &good);
    let (mut kills, mut left) = (0, [0; 3]);
    let stride = std::env::var_os("TERN_DEEP").map_or(STRIDE, |_| 1);
    for nth in (1..).step_by(stride) {
        copy(&good, &snapshot);
        prepare(&snapshot);
        guest.restore();
        guest.sh("echo newer >/word");
        guest.post("pause");
        let shot = guest.aim(nth);
        let _ = guest.try_api("POST", "/v1/vm/snapshot");
        let fired = shot.stand_down().map(str::to_owned);
        if fired.is_some() {
            guest.until("its death", || guest.is_dead().then_some(()));
        }
        guest.bury();
        // There is none, or one that is whole.
        guest.restore();
        if snapshot.join("state").exists() {
            match guest.sh("cat /word").as_str() {
                "kept" => left[0] += 1,
                "newer" => left[1] += 1,
                other => panic!("{fired:?}: the guest remembers {other:?}\n{}", guest.logs()),
            }
            guest.suspend();
            assert_eq!(
                names(guest)
                    .iter()
                    .find(|name| name.contains(".tmp") || name.contains(".new")),
                None,
                "what a snapshot leaves, the next removes"
            );
        } else {
            assert_eq!(guest.exit(), (4, "snapshot_refused".into()), "{fired:?}");
            let message = guest.exit_message();
            assert!(message.contains("broken off"), "{fired:?}: {message}");
            left[2] += 1;
        }
        if fired.is_none() {
            break;
        }
        kills += 1;
    }
    println!("{kills} kills left [old, new, no] snapshots: {left:?}");
    left
}

#[test]
fn metal_a_snapshot_is_killed_at_every_step() {
    let [old, new, none] = die_in_a_snapshot(&mut asleep(), |_| ());
    // The first of all kills comes before anything has been done.
    assert!(
        old == 1 && new > 0 && none > 5,
        "{old} old, {new} new, {none} none"
    );
}

#[test]
fn metal_a_whole_snapshot_is_killed_at_every_step() {
    // With a second name the memory file is not written to: a new one takes its place.
    let second = |snapshot: &Path| {
        let name = snapshot.with_file_name("second");
        let _ = fs::remove_file(&name);
        fs::hard_link(snapshot.join("memory"), name).unwrap();
    };
    let [old, new, none] = die_in_a_snapshot(&mut asleep(), second);
    assert!(
        old > 5 && new > 0 && none == 0,
        "{old} old, {new} new, {none} none"
    );
}
