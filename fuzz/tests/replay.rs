//! Every seed and every found case, through its target, without the engine.

#![allow(clippy::unwrap_used)] // test code outside a `#[test]` function

use std::fs;
use std::path::{Path, PathBuf};

use tern_fuzz::{TARGETS, Target};

/// Targets that have found something, with how many cases each keeps at least. A case that is lost
/// fails this test.
const FOUND: &[(&str, usize)] = &[("transport", 2)];

fn cases(target: &Target) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("cases")
        .join(target.name);
    let Ok(entries) = fs::read_dir(&dir) else {
        return Vec::new();
    };
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

#[test]
fn every_found_case_is_kept() {
    for (name, least) in FOUND {
        let target = tern_fuzz::target(name).expect("a target of this name");
        let found = cases(target).len();
        assert!(found >= *least, "{name}: {found} cases, {least} were found");
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases");
    for entry in fs::read_dir(root).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let listed = FOUND.iter().any(|(target, _)| *target == name);
        assert!(
            listed || name.starts_with('.'),
            "cases/{name} belongs to no target in FOUND"
        );
    }
}

macro_rules! replays {
    ($($target:ident)*) => {
        $(#[test]
        fn $target() {
            replay(stringify!($target));
        })*

        #[test]
        fn every_target_is_replayed() {
            let replayed = [$(stringify!($target)),*];
            assert_eq!(TARGETS.iter().map(|target| target.name).collect::<Vec<_>>(), replayed);
        }
    };
}

replays! {
    virtqueue transport block net balloon vsock snapshot config control frames dns mesh fly_toml image
}

fn replay(name: &str) {
    let target = tern_fuzz::target(name).unwrap();
    let seeds = (target.seeds)();
    assert!(!seeds.is_empty(), "an engine needs something to start from");
    (target.run)(&[]);
    for seed in seeds {
        // Inputs that end early are inputs too.
        for len in [seed.len() / 2, seed.len() - 1, seed.len()] {
            (target.run)(&seed[..len]);
        }
    }
    for case in cases(target) {
        println!("{}", case.display());
        (target.run)(&fs::read(case).unwrap());
    }
}
