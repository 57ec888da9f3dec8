//! The command line where no guest is needed: configurations that cannot be run, and exit codes.

use std::fs;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

fn vmm(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tern-vmm"))
        .args(arguments)
        .output()
        .expect("it was built")
}

fn config(dir: &TempDir) -> Value {
    let path = |name: &str| dir.path().join(name);
    json!({
        "id": "m1", "vcpus": 1, "memory_mib": 64, "kernel": path("vmlinux"),
        "control": path("vmm.sock"), "pid_file": path("vmm.pid"),
        "serial_log": path("serial.log"), "snapshot_dir": path("snapshot"),
        "exit_file": path("exit.json"),
    })
}

fn run(dir: &TempDir, config: &Value, more: &[&str]) -> (Option<i32>, String) {
    let path = dir.path().join("vm.json");
    fs::write(&path, config.to_string()).expect("a writable directory");
    let path = path.to_str().expect("a plain name");
    let output = vmm(&[&["run", "--config", path], more].concat());
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[test]
fn an_unknown_key_is_named_and_nothing_is_touched() {
    let dir = TempDir::new().unwrap();
    let mut config = config(&dir);
    config["memory"] = json!(64);
    let (code, error) = run(&dir, &config, &[]);
    assert_eq!(code, Some(1));
    assert!(error.contains("`memory`"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only vm.json");
}

#[test]
fn a_missing_configuration_is_named() {
    let output = vmm(&["run", "--config", "/nowhere/vm.json"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nowhere/vm.json"));
}

#[test]
fn a_missing_snapshot_is_refused_with_its_own_code() {
    let dir = TempDir::new().unwrap();
    // Without KVM the reason would be KVM; with a real or an emulating one, it is the snapshot.
    let (code, error) = run(&dir, &config(&dir), &["--restore"]);
    let exit: Value =
        serde_json::from_slice(&fs::read(dir.path().join("exit.json")).unwrap()).unwrap();
    match exit["reason"].as_str() {
        Some("snapshot_refused") => assert_eq!(code, Some(4), "{error}"),
        Some("error") => {
            assert_eq!(code, Some(1));
            assert!(error.contains("tern-metal"), "{error}");
        }
        other => panic!("{other:?}: {error}"),
    }
    assert!(!dir.path().join("vmm.sock").exists());
}

#[test]
fn a_probe_says_what_to_do() {
    let output = vmm(&["probe", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    if report["ok"] == json!(true) {
        assert_eq!(output.status.code(), Some(0));
        assert!(report["mips"].as_f64().unwrap() > 0.0);
    } else {
        assert_eq!(output.status.code(), Some(3));
        assert!(
            report["error"].as_str().unwrap().contains("tern-metal"),
            "{report}"
        );
    }
}

#[test]
fn a_call_outside_its_filter_kills_the_monitor_whichever_thread_makes_it() {
    use std::os::unix::process::ExitStatusExt;
    for thread in [
        "main",
        "control",
        "vcpu",
        "net",
        "vhost-net",
        "block",
        "rng",
        "vsock",
        "balloon",
        "prefetch",
    ] {
        let output = vmm(&["forbidden", "--thread", thread]);
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{thread}");
        let log = String::from_utf8_lossy(&output.stderr);
        assert_eq!(log, "confined\n", "{thread}");
    }
}
