//! A snapshot moves between hosts whose processors differ: two virtual hosts, one after the other, with a
//! directory of this machine's between them.
//!
//! The halves are tests of their own, which `tern-metal` runs inside; alone they make no sense, and are
//! ignored. Needs what `tern-metal` needs, its program and a guest (`.ci/build`).

#![allow(clippy::unwrap_used)] // helpers of tests are not in `#[test]` functions

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use support::Guest;

/// The directory between the hosts.
const BETWEEN: &str = "TERN_MOVES_BETWEEN";
/// The guest's template.
const TEMPLATE: &str = "TERN_MOVES_TEMPLATE";
/// What the refusal must say, if the snapshot is to be refused.
const REFUSAL: &str = "TERN_MOVES_REFUSAL";

/// AMD's second generation, as QEMU emulates it.
const ROME: &str = "EPYC-Rome,+svm,+invtsc";
/// The first: without CLWB, RDPID, UMIP and more.
const NAPLES: &str = "EPYC,+svm,+invtsc";
/// How a refusal names it.
const CLWB: &str = "bit 24 of Ebx in CPUID leaf 0x7.0";
/// The second, less a part of x86-64-v3.
const ROME_WITHOUT_AVX2: &str = "EPYC-Rome,+svm,+invtsc,-avx2";

#[test]
fn a_snapshot_moves_to_a_lesser_host_that_has_all_of_its_template() {
    let between = tempfile::tempdir().unwrap();
    let guest_dir =
        std::env::var_os("TERN_GUEST_DIR").map_or_else(|| built("guest"), PathBuf::from);
    let in_host = |cpu: &str, half: &str, template: &str, refusal: &str| {
        let output = Command::new(built("tern-metal"))
            .args(["run", "--timeout", "5m", "--cpu", cpu, "--share"])
            .arg(between.path())
            .arg("--")
            .arg(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", half, "--nocapture"])
            .env("TERN_METAL", "qemu")
            .env("TERN_GUEST_DIR", &guest_dir)
            .env(BETWEEN, between.path())
            .env(TEMPLATE, template)
            .env(REFUSAL, refusal)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{half} on {cpu} with {template}:\n{text}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    in_host(ROME, "suspends", "x86-64-v3", "");
    in_host(NAPLES, "resumes", "x86-64-v3", "");
    in_host(ROME_WITHOUT_AVX2, "resumes", "x86-64-v3", "lacks avx2");
    in_host(
        ROME_WITHOUT_AVX2,
        "does_not_start",
        "x86-64-v3",
        "lack avx2",
    );
    // Without a template the same move is refused, for what the guest might have used.
    in_host(ROME, "suspends", "host", "");
    in_host(NAPLES, "resumes", "host", CLWB);
}

/// What `.ci/build` puts beside the monitor.
fn built(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_tern-vmm")).with_file_name(name);
    assert!(
        path.exists(),
        "no {}: make it with `.ci/build`",
        path.display()
    );
    path
}

fn told(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: this is half of a test"))
}

fn guest() -> Guest {
    Guest::new()
        .with("cpu_template", json!(told(TEMPLATE)))
        .with("vcpus", json!(2))
}

/// How often the guest has found its data as it was.
fn count(guest: &Guest) -> u64 {
    guest.until("a number", || guest.sh("cat /tmp/i").parse().ok())
}

fn counts_on(guest: &Guest, from: u64) {
    guest.until("more counting", || (count(guest) > from).then_some(()));
}

#[test]
#[ignore = "half of a test"]
fn suspends() {
    let mut guest = guest().booted();
    guest.sh("dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null; sha256sum < /tmp/data > /tmp/sum");
    // Something that is in the middle of its work, in registers of every kind.
    guest.sh("(i=0; while :; do [ \"$(sha256sum < /tmp/data)\" = \"$(cat /tmp/sum)\" ] || echo > /tmp/wrong; i=$((i+1)); echo $i > /tmp/i; done) < /dev/null > /dev/null 2>&1 &");
    counts_on(&guest, 0);
    guest.suspend();
    for file in ["state", "memory"] {
        let to = Path::new(&told(BETWEEN)).join(file);
        fs::copy(guest.path("snapshot").join(file), to).unwrap();
    }
}

#[test]
#[ignore = "half of a test"]
fn resumes() {
    let mut guest = guest();
    fs::create_dir(guest.path("snapshot")).unwrap();
    for file in ["state", "memory"] {
        let from = Path::new(&told(BETWEEN)).join(file);
        fs::copy(from, guest.path("snapshot").join(file)).unwrap();
    }
    guest.restore();
    let refusal = told(REFUSAL);
    if !refusal.is_empty() {
        assert_eq!(guest.exit(), (4, "snapshot_refused".into()));
        let message = guest.exit_message();
        println!("{message}");
        assert!(message.contains(&refusal), "{message}");
        return;
    }
    let counted = count(&guest);
    counts_on(&guest, counted + 5);
    assert_eq!(guest.sh("nproc; ls /tmp/wrong 2>/dev/null"), "2");
    assert_eq!(guest.sh("dmesg | grep -ciE 'BUG:|Oops|stall'"), "0");
    // Here it can be suspended and resumed as at home.
    guest.suspend();
    guest.restore();
    let counted = count(&guest);
    counts_on(&guest, counted + 5);
    assert_eq!(guest.sh("ls /tmp/wrong 2>/dev/null"), "");
}

#[test]
#[ignore = "half of a test"]
fn does_not_start() {
    let mut guest = guest();
    guest.start(&[]);
    assert_eq!(guest.exit(), (1, "error".into()));
    let message = guest.exit_message();
    assert!(message.contains(&told(REFUSAL)), "{message}");
    assert!(message.contains("cpu_template"), "{message}");
}
