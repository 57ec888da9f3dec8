//! One target under libFuzzer: `TERN_FUZZ_TARGET=<name> tern-fuzz [libFuzzer's flags] CORPUS [INPUT...]`.
//!
//! Built by `.ci/check-deep`, with the code generation flags that count which edges were taken. With
//! `TERN_FUZZ_SEEDS=<dir>` the target's seeds are put there first; without a target, all are listed.

#![no_main]
#![allow(clippy::unwrap_used)] // a harness that cannot begin says so and ends

use std::sync::OnceLock;

use tern_fuzz::{TARGETS, Target};

static TARGET: OnceLock<&'static Target> = OnceLock::new();

libfuzzer_sys::fuzz_target!(
    init: begin(),
    |data: &[u8]| {
        if let Some(target) = TARGET.get() {
            (target.run)(data);
        }
    }
);

fn begin() {
    // SAFETY: no other thread runs yet, and ignoring a signal installs no code. Rust's runtime, which
    // does this elsewhere, is not what starts this program.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let Ok(name) = std::env::var("TERN_FUZZ_TARGET") else {
        for target in TARGETS {
            println!("{} {} {}", target.name, target.max_len, target.about);
        }
        std::process::exit(0);
    };
    let Some(target) = tern_fuzz::target(&name) else {
        eprintln!("tern-fuzz: there is no target {name:?}");
        std::process::exit(2);
    };
    if let Ok(dir) = std::env::var("TERN_FUZZ_SEEDS") {
        for (number, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(format!("{dir}/seed-{number}"), seed).unwrap();
        }
    }
    TARGET.get_or_init(|| target);
}
