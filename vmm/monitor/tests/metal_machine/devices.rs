//! What a guest sees of its devices, and does with them.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{ECHO_PORT, Guest};

#[test]
fn metal_boots_with_all_its_devices() {
    let guest = Guest::new().booted();
    assert_eq!(guest.sh("head -c 14 /dev/vda"), "read-only disk");
    assert_eq!(guest.sh("cat /sys/block/vda/ro /sys/block/vdb/ro"), "1\n0");
    assert_eq!(guest.sh("cat /sys/block/vdb/serial"), "tern-disk-1");
    assert_eq!(
        guest.sh("cat /sys/class/net/eth0/address"),
        "02:00:00:00:00:01"
    );
    assert_eq!(guest.sh("head -c 32 /dev/hwrng | wc -c"), "32");
    assert_eq!(
        guest.sh("cat /sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "kvm-clock"
    );
    let description = guest.describe();
    // What was read and sent above is counted.
    let counted = |device: usize, kind: &str, count: &str| {
        let device = &description["devices"][device];
        assert_eq!(device["kind"], kind, "{device}");
        assert!(device[count].as_u64().unwrap() > 0, "{count}: {device}");
    };
    counted(0, "block", "reads");
    counted(0, "block", "read_bytes");
    counted(2, "net", "sent_frames");
    counted(3, "vsock", "received_packets");
    counted(3, "vsock", "sent_packets");
    counted(4, "rng", "bytes");
    assert_eq!(description["devices"][5]["kind"], "balloon");
    assert_eq!(description["state"], "running");
    assert_eq!(description["pid"], guest.pid());
    assert!(
        description["boot"]["first_vcpu_run_us"].as_u64().unwrap() > 0,
        "{description}"
    );
    println!("{description}");
}

#[test]
fn metal_writes_reach_the_disk_file() {
    let guest = Guest::new().booted();
    guest.sh("printf written | dd of=/dev/vdb bs=512 seek=3 conv=sync,fsync 2>/dev/null");
    let disk = fs::read(guest.path("rw.img")).unwrap();
    assert_eq!(&disk[3 * 512..3 * 512 + 7], b"written");
    assert_eq!(rings(&guest), 2, "this kernel has io_uring");
    assert_ne!(guest.sh("echo x > /dev/vda 2>/dev/null; echo $?"), "0");
    // More than one request in flight, and more than fits one of them.
    guest.sh("dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null; dd if=/tmp/data of=/dev/vdb bs=1M conv=fsync 2>/dev/null");
    let sum = guest.sh("md5sum < /tmp/data");
    assert_eq!(
        guest.sh("echo 3 > /proc/sys/vm/drop_caches; head -c 4194304 /dev/vdb | md5sum"),
        sum
    );
}

/// What the guest's own `md5sum` would say of these bytes.
fn md5sum(guest: &Guest, bytes: &[u8]) -> String {
    fs::write(guest.path("got"), bytes).unwrap();
    let output = Command::new("md5sum")
        .stdin(fs::File::open(guest.path("got")).unwrap())
        .output();
    String::from_utf8(output.unwrap().stdout)
        .unwrap()
        .trim()
        .into()
}

/// How many of the monitor's descriptors are rings.
fn rings(guest: &Guest) -> usize {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", guest.pid())).unwrap();
    descriptors
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .filter(|target| target.to_string_lossy().contains("io_uring"))
        .count()
}

#[test]
fn metal_disks_work_by_threads_too_and_within_their_limit() {
    let mut guest = Guest::new();
    let mut disks = guest.set("disks", json!([]));
    for disk in disks.as_array_mut().unwrap() {
        disk["engine"] = json!("threads");
    }
    // A second's worth at once, and then as long as the rest takes.
    disks[1]["rate_limit"] = json!({"bytes_per_second": 1 << 20});
    guest.set("disks", disks);
    let guest = guest.booted();
    assert_eq!(rings(&guest), 0);
    let before = Instant::now();
    guest.sh("dd if=/dev/urandom of=/tmp/data bs=1M count=3 2>/dev/null; dd if=/tmp/data of=/dev/vdb bs=64k conv=fsync 2>/dev/null");
    assert!(before.elapsed() >= Duration::from_secs(1));
    let sum = guest.sh("md5sum < /tmp/data");
    assert_eq!(guest.sh("head -c 3145728 /dev/vdb | md5sum"), sum);
    let disk = fs::read(guest.path("rw.img")).unwrap();
    assert_eq!(md5sum(&guest, &disk[..3 << 20]), sum);
}

#[test]
fn metal_network_carries_packets_both_ways() {
    let guest = Guest::new().booted();
    assert_eq!(
        guest.sh("ping -c 3 -i 0.2 -W 5 192.0.2.1 > /tmp/ping && echo yes || cat /tmp/ping"),
        "yes"
    );
    // A stream long enough for segmentation offload, with its checksum compared at both ends.
    let listener = std::net::TcpListener::bind("192.0.2.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let host = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let sum = guest.sh(&format!(
        "dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null; nc 192.0.2.1 {port} < /tmp/data; md5sum < /tmp/data"
    ));
    let bytes = host.join().unwrap();
    assert_eq!(bytes.len(), 8 << 20);
    assert_eq!(md5sum(&guest, &bytes), sum);
}

#[test]
fn metal_vsock_streams_at_the_same_time_and_half_closed() {
    let guest = Guest::new().booted();
    thread::scope(|scope| {
        for number in 0..20_u8 {
            let guest = &guest;
            scope.spawn(move || {
                let bytes: Vec<u8> = (0..300_000_usize).map(|i| (i * 7) as u8 ^ number).collect();
                let mut stream = guest.connect(ECHO_PORT);
                let mut writer = stream.try_clone().unwrap();
                let sent = bytes.clone();
                let writing = thread::spawn(move || {
                    writer.write_all(&sent).unwrap();
                    writer.shutdown(Shutdown::Write).unwrap();
                });
                let mut back = Vec::new();
                stream.read_to_end(&mut back).unwrap();
                writing.join().unwrap();
                assert!(
                    back == bytes,
                    "stream {number}: {} of {}",
                    back.len(),
                    bytes.len()
                );
            });
        }
    });
    assert!(guest.try_connect(4242).is_none(), "nobody listens there");
}

#[test]
fn metal_guest_reaches_host_listeners_only() {
    let guest = Guest::new().booted();
    let listener = std::os::unix::net::UnixListener::bind(guest.path("vsock.sock_77")).unwrap();
    let host = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    });
    guest.sh("echo from the guest | socat -u - VSOCK-CONNECT:2:77");
    assert_eq!(host.join().unwrap(), "from the guest\n");
    let refused =
        guest.sh("socat -u /dev/null VSOCK-CONNECT:2:78 2>&1 | grep -o 'Connection reset'");
    assert_eq!(refused, "Connection reset");
}

#[test]
fn metal_a_guest_gives_back_what_it_does_not_use() {
    // Linux reports nothing while less than about 64 MiB are free.
    let mut guest = Guest::new().with("memory_mib", json!(256)).booted();
    guest.sh("dd if=/dev/zero of=/tmp/data bs=1M count=64 2>/dev/null");
    let full = own_mib(&guest);
    assert!(full >= 64, "{full} MiB");
    guest.sh("rm /tmp/data; echo 1 > /proc/sys/vm/compact_memory");
    guest.until("free pages to be reported", || {
        (own_mib(&guest) + 48 <= full).then_some(())
    });
    // What comes back is the guest's as before.
    guest.sh("dd if=/dev/urandom of=/tmp/data bs=1M count=16 2>/dev/null");
    let sum = guest.sh("md5sum < /tmp/data");

    for path in [
        "/v1/vm/memory",
        "/v1/vm/memory?limit_mib=257",
        "/v1/vm/memory?limit_mib=31",
    ] {
        assert_eq!(guest.api("POST", path).0, 400, "{path}");
    }
    assert_eq!(guest.api("GET", "/v1/vm/memory").0, 405);
    let limit = |guest: &Guest, mib: u32| {
        assert_eq!(
            guest
                .api("POST", &format!("/v1/vm/memory?limit_mib={mib}"))
                .0,
            204
        );
    };
    let held = |guest: &Guest, mib: u32| {
        guest.until(&format!("a balloon of {mib} MiB"), || {
            (guest.describe()["balloon_mib"] == mib).then_some(())
        });
    };
    let available = "awk '/^MemAvailable/ {print int($2 / 1024)}' /proc/meminfo";
    let before: u64 = guest.sh(available).parse().unwrap();
    limit(&guest, 232);
    held(&guest, 24);
    let limited: u64 = guest.sh(available).parse().unwrap();
    assert!(limited + 20 <= before, "{before} MiB, then {limited} MiB");

    // A suspended guest wakes with its balloon, and can be given its memory again.
    guest.suspend();
    guest.restore();
    assert_eq!(guest.sh("md5sum < /tmp/data"), sum);
    let description = guest.describe();
    assert_eq!(description["memory_limit_mib"], 232, "{description}");
    assert_eq!(description["balloon_mib"], 24, "{description}");
    limit(&guest, 256);
    held(&guest, 0);
    assert_eq!(guest.sh("md5sum < /tmp/data"), sum);
}

/// What the monitor has of its own in the host's memory, the guest's included.
fn own_mib(guest: &Guest) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", guest.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib: u64 = line
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    kib / 1024
}
