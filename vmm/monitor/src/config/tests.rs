use super::*;
use serde_json::{Value, json};

fn sample() -> Value {
    json!({
        "id": "148e21ea7e7d89", "vcpus": 2, "memory_mib": 256, "cpu_template": "x86-64-v3",
        "kernel": "/k/vmlinux", "initramfs": ["/k/initramfs", "/m/run.cpio"],
        "cmdline": "tern.debug",
        "disks": [
            {"path": "/m/image.erofs", "read_only": true, "engine": "io_uring"},
            {"path": "/m/disk.ext4", "read_only": false, "rate_limit": {"operations_per_second": 1000}},
        ],
        "net": [{
            "tap": "tn0", "mac": "02:00:00:00:00:01",
            "receive_limit": {"bytes_per_second": 1_000_000, "burst_bytes": 5_000_000},
            "transmit_limit": {"bytes_per_second": 1_000_000},
        }],
        "vsock": {"cid": 3, "path": "/m/vsock.sock"},
        "control": "/m/vmm.sock", "pid_file": "/m/vmm.pid", "serial_log": "/m/serial.log",
        "snapshot_dir": "/m/snapshot", "exit_file": "/m/exit.json",
        "jail": {"root": "/m", "uid": 1_000_000, "gid": 1_000_000, "cgroup": "/sys/fs/cgroup/tern/1"}
    })
}

fn parse(value: &Value) -> Result<VmConfig, String> {
    let config: VmConfig = serde_json::from_value(value.clone()).map_err(|e| e.to_string())?;
    config.check().map_err(|e| e.to_string())?;
    Ok(config)
}

#[test]
fn reads_the_documented_sample() {
    let config = parse(&sample()).unwrap();
    assert_eq!(config.net[0].mac, MacAddr([2, 0, 0, 0, 0, 1]));
    assert_eq!(config.memory_bytes(), 256 << 20);
    let again = serde_json::to_value(&config).unwrap();
    assert_eq!(again, sample());
}

#[test]
fn vhost_is_for_a_card_without_limits() {
    let mut value = sample();
    let nic = value["net"][0].as_object_mut().unwrap();
    nic.retain(|key, _| !key.ends_with("_limit"));
    assert!(!parse(&value).unwrap().net[0].vhost);
    value["net"][0]["vhost"] = json!(true);
    let config = parse(&value).unwrap();
    assert!(config.net[0].vhost);
    assert_eq!(serde_json::to_value(&config).unwrap(), value);
    for limit in ["receive_limit", "transmit_limit"] {
        let mut limited = value.clone();
        limited["net"][0][limit] = json!({"bytes_per_second": 1});
        let error = parse(&limited).unwrap_err();
        assert!(error.contains("tn0") && error.contains("vhost"), "{error}");
    }
}

#[test]
fn nesting_is_asked_for() {
    let mut value = sample();
    assert!(!parse(&value).unwrap().nested);
    value["nested"] = json!(true);
    assert!(parse(&value).unwrap().nested);
}

#[test]
fn a_template_is_one_of_those_there_are() {
    let with = |name: &str| {
        let mut value = sample();
        value["cpu_template"] = json!(name);
        parse(&value)
    };
    for template in [
        CpuTemplate::Host,
        CpuTemplate::X86_64V2,
        CpuTemplate::X86_64V3,
    ] {
        let config = with(&template.to_string()).unwrap();
        assert_eq!(config.cpu_template, template);
    }
    let mut without = sample();
    without.as_object_mut().unwrap().remove("cpu_template");
    assert_eq!(parse(&without).unwrap().cpu_template, CpuTemplate::Host);
    for wrong in ["X86-64-v3", "x86-64-v4", ""] {
        assert!(with(wrong).unwrap_err().contains("x86-64-v2"), "{wrong}");
    }
}

#[test]
fn refuses_an_unknown_key_at_every_level() {
    for pointer in [
        "",
        "/disks/0",
        "/disks/1/rate_limit",
        "/net/0",
        "/vsock",
        "/jail",
    ] {
        let mut value = sample();
        let table = value.pointer_mut(pointer).unwrap().as_object_mut().unwrap();
        table.insert("colour".into(), json!("blue"));
        let error = parse(&value).unwrap_err();
        assert!(error.contains("colour"), "{pointer}: {error}");
    }
}

#[test]
fn refuses_values_outside_their_limits() {
    let cases = [
        ("/vcpus", json!(0), "vcpus"),
        ("/vcpus", json!(9), "vcpus"),
        ("/memory_mib", json!(1), "memory_mib"),
        ("/id", json!(""), "id"),
        ("/net/0/tap", json!("a-name-too-long-for-linux"), "name"),
        ("/net/0/tap", json!("tn%d"), "name"),
        ("/net/0/mac", json!("02:00:00:00:00"), "Ethernet"),
        ("/net/0/mac", json!("01:00:00:00:00:00"), "multicast"),
        ("/net/0/vhost", json!(true), "receive_limit"),
        ("/net/0/vhost", json!("yes"), "boolean"),
        ("/vsock/cid", json!(2), "cid"),
        ("/control", json!("x".repeat(200)), "control"),
        ("/disks/1/rate_limit", json!({}), "neither"),
        ("/disks/0/engine", json!("magic"), "io_uring"),
        (
            "/disks/1/rate_limit/operations_per_second",
            json!(0),
            "hangs",
        ),
        (
            "/net/0/receive_limit/bytes_per_second",
            json!(null),
            "neither",
        ),
        (
            "/net/0/transmit_limit",
            json!({"burst_bytes": 1, "operations_per_second": 1}),
            "burst",
        ),
        ("/jail/uid", json!(0), "root"),
        ("/jail/uid", json!(u32::MAX), "4294967295"),
        ("/jail/gid", json!(u32::MAX), "4294967295"),
        ("/jail/root", json!("/elsewhere"), "snapshot_dir"),
        ("/cmdline", json!("a\nb"), "ASCII"),
        ("/cmdline", json!("a".repeat(2000)), "cmdline"),
    ];
    for (pointer, bad, word) in cases {
        let mut value = sample();
        let (table, key) = pointer.rsplit_once('/').unwrap();
        value.pointer_mut(table).unwrap()[key] = bad.clone();
        let error = parse(&value).unwrap_err();
        assert!(error.contains(word), "{pointer} = {bad}: {error}");
    }
}
