//! Starts and ends, what the monitor does when it is asked, and the jail that it is in meanwhile.

use std::fs;
use std::io::Write;
use std::net::Shutdown;
use std::process::Command;

use serde_json::json;

use crate::support::{self, Guest, SHELL_PORT};

#[test]
fn metal_several_processors_run() {
    let guest = Guest::new()
        .with("vcpus", json!(4))
        .with("memory_mib", json!(256))
        .booted();
    assert_eq!(guest.sh("nproc"), "4");
    assert_eq!(guest.sh("grep -c '^processor' /proc/cpuinfo"), "4");
}

#[test]
fn metal_a_bzimage_boots_too() {
    let kernel = support::guest_file("vmlinuz");
    let guest = Guest::new()
        .with("kernel", json!(kernel))
        .with("memory_mib", json!(256))
        .booted();
    assert_eq!(guest.sh("echo up"), "up");
}

#[test]
fn metal_every_end_has_its_reason() {
    for (script, reason) in [
        ("reboot -f", "guest_reset"),
        ("poweroff -f", "guest_shutdown"),
        ("echo c > /proc/sysrq-trigger", "guest_reset"),
    ] {
        let mut guest = Guest::new().booted();
        let mut stream = guest.connect(SHELL_PORT);
        stream.write_all(script.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(guest.exit(), (0, reason.into()), "{script}");
        assert!(!guest.path("vmm.sock").exists());
    }
    let mut guest = Guest::new().booted();
    guest.signal("-TERM");
    assert_eq!(guest.exit(), (0, "stopped".into()));
    let mut guest = Guest::new().with("kernel", json!("/dev/null"));
    guest.start(&[]);
    assert_eq!(guest.exit(), (1, "error".into()));
    assert!(
        guest.exit_message().contains("/dev/null"),
        "{}",
        guest.exit_message()
    );
}

#[test]
fn metal_a_second_monitor_changes_nothing() {
    let guest = Guest::new().booted();
    let output = Command::new(env!("CARGO_BIN_EXE_tern-vmm"))
        .args(["run", "--config"])
        .arg(guest.path("vm.json"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("another monitor"), "{error}");
    assert!(!guest.path("exit.json").exists());
    assert_eq!(guest.sh("echo alive"), "alive");
    assert_eq!(guest.describe()["state"], "running");
}

#[test]
fn metal_the_api_refuses_what_makes_no_sense() {
    let guest = Guest::new().booted();
    assert_eq!(guest.api("POST", "/v1/vm/snapshot").0, 409);
    assert_eq!(guest.api("GET", "/v1/vm/pause").0, 405);
    let (status, body) = guest.api("GET", "/v2");
    assert_eq!(
        (status, body.as_str()),
        (404, r#"{"error":"no such path"}"#)
    );
    guest.post("resume");
    guest.post("pause");
    guest.post("pause");
    assert_eq!(guest.describe()["state"], "paused");
    guest.post("resume");
    assert_eq!(guest.sh("echo on"), "on");
}

#[test]
fn metal_a_jailed_monitor_has_no_rights_no_files_and_no_network_and_does_all_the_same() {
    const USER: u32 = 0x7000_0123;
    let mut guest = Guest::new().jailed(USER).booted();
    for round in 0..2 {
        check_jail(&guest, USER);
        guest.sh(&format!("echo {round} >> /tmp/rounds"));
        guest.suspend();
        guest.restore();
    }
    assert_eq!(guest.sh("cat /tmp/rounds"), "0\n1");
    check_jail(&guest, USER);
    // The first process of a PID namespace gets only the signals that it cares for.
    guest.signal("-TERM");
    assert_eq!(guest.exit(), (0, "stopped".into()));
}

fn check_jail(guest: &Guest, user: u32) {
    guest.sh("true"); // once the guest runs, there is nothing left to give up
    let pid = guest.pid();
    let mut names = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let task = task.unwrap().path();
        names.push(fs::read_to_string(task.join("comm")).unwrap());
        let status = fs::read_to_string(task.join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_else(|| panic!("no {name}\n{status}"))
                .trim()
                .to_owned()
        };
        let ids = [user.to_string().as_str(); 4].join("\t");
        assert_eq!((field("Uid:"), field("Gid:")), (ids.clone(), ids));
        assert_eq!(field("Groups:"), "");
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(field(set), "0000000000000000", "{set}");
        }
        assert_eq!(field("NoNewPrivs:"), "1");
        assert_eq!(field("Seccomp:"), "2", "{names:?}");
    }
    for thread in ["vcpu0", "block", "net", "vsock", "rng", "control"] {
        assert!(names.iter().any(|n| n.trim() == thread), "{names:?}");
    }
    // Its own directory is all there is; a snapshot that has been resumed is still in it.
    for entry in fs::read_dir(format!("/proc/{pid}/root/")).unwrap() {
        let name = entry.unwrap().file_name();
        assert_eq!(name, "snapshot");
    }
    for namespace in ["mnt", "net", "ipc", "uts", "cgroup"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    // The first process of its PID namespace, and to others what the host calls it.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(
        status.contains(&format!("\nNSpid:\t{pid}\t1\n")),
        "{status}"
    );
    assert_eq!(guest.describe()["pid"], pid);
    let number = fs::read_to_string(guest.path("vmm.pid")).unwrap();
    assert_eq!(number.trim(), pid.to_string());
}
