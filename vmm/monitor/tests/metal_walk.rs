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

#[test]
fn metal_a_snapshot_is_killed_at_every_step() {
    let mut guest = asleep();
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
    let (mut kills, mut old, mut new, mut none) = (0, 0, 0, 0);
    let stride = std::env::var_os("TERN_DEEP").map_or(STRIDE, |_| 1);
    for nth in (1..).step_by(stride) {
        // Each has a snapshot to replace, as one that the agent has not removed yet.
        copy(&good, &snapshot);
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
        if snapshot.join("state").exists() {
            guest.restore();
            match guest.sh("cat /word").as_str() {
                "kept" => old += 1,
                "newer" => new += 1,
                other => panic!("{fired:?}: the guest remembers {other:?}\n{}", guest.logs()),
            }
            guest.suspend();
        } else {
            none += 1;
        }
        let leftovers = guest.path("jail/snapshot.tmp");
        assert!(
            !leftovers.exists() || fired.is_some(),
            "what a snapshot leaves, the next removes"
        );
        if fired.is_none() {
            break;
        }
        kills += 1;
    }
    println!("{kills} kills: {old} left the old snapshot, {new} the new one, {none} none");
    assert!(
        old > 5 && new > 0 && none == 0,
        "{old} old, {new} new, {none} none"
    );
}
