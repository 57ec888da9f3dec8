//! Real guests under true KVM: start, devices, end, suspend and resume.
//!
//! Run by `make test` inside metal; elsewhere each fails and says so.

#![allow(clippy::unwrap_used)] // helpers of tests are not in `#[test]` functions

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY;
use kvm_ioctls::Kvm;
use serde_json::json;
use support::{ECHO_PORT, Guest, PATIENCE, SHELL_PORT};

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

#[test]
fn metal_a_paused_guest_stands_still_and_keeps_its_connections() {
    let guest = Guest::new().booted();
    let mut stream = guest.connect(SHELL_PORT);
    stream
        .write_all(b"i=0; while :; do i=$((i+1)); echo $i > /tmp/i; read -t 0.01 x; done\n")
        .unwrap();
    guest.until("the counter", || (counter(&guest) > 5).then_some(()));
    let before = fs::metadata(guest.path("rw.img"))
        .unwrap()
        .modified()
        .unwrap();
    guest.post("pause");
    thread::sleep(Duration::from_millis(300)); // time for anything that still moves
    assert_eq!(
        fs::metadata(guest.path("rw.img"))
            .unwrap()
            .modified()
            .unwrap(),
        before
    );
    guest.post("resume");
    let one = counter(&guest);
    guest.until("more counting", || (counter(&guest) > one).then_some(()));
    stream.write_all(b"echo still here\n").unwrap();
}

/// What the guest has counted to; between its opening and writing the file there is nothing in it.
fn counter(guest: &Guest) -> u64 {
    guest.until("a number", || guest.sh("cat /tmp/i").parse().ok())
}

#[test]
fn metal_memory_disk_clock_and_network_survive_suspend() {
    let mut guest = Guest::new().with("vcpus", json!(2)).booted();
    guest.sh("dd if=/dev/urandom of=/tmp/data bs=1M count=16 2>/dev/null; printf before | dd of=/dev/vdb conv=sync 2>/dev/null; (i=0; while :; do i=$((i+1)); echo $i > /tmp/i; sleep 0.02; done) < /dev/null > /dev/null 2>&1 &");
    let sum = guest.sh("md5sum < /tmp/data");
    let booted = clock_offset(&guest);
    guest.until("some counting", || (counter(&guest) > 5).then_some(()));
    let mut counted = counter(&guest);
    for round in 0..3 {
        guest.suspend();
        thread::sleep(Duration::from_secs(2)); // asleep: the clock must have gone on
        guest.restore();
        assert_eq!(guest.sh("md5sum < /tmp/data"), sum, "round {round}");
        guest.until("more counting", || {
            (counter(&guest) > counted).then_some(())
        });
        let now = counter(&guest);
        // It went on where it was; from the start it would have to count for longer than this takes.
        assert!(now < counted + 2000, "round {round}: {counted} -> {now}");
        counted = now;
        // A guest that booted slowly may have lost time then; what matters is that no more is lost.
        let (offset, uncertainty) = clock_offset(&guest);
        let lost = booted.0 - offset;
        assert!(
            lost.abs() < 0.01 + booted.1 + uncertainty,
            "round {round}: the clock lost {lost} s (known to {} s)",
            booted.1 + uncertainty
        );
        assert_eq!(
            guest.sh("ping -c 2 -i 0.2 -W 5 192.0.2.1 > /tmp/ping && echo yes || cat /tmp/ping"),
            "yes"
        );
        assert_eq!(
            guest.sh("echo 3 > /proc/sys/vm/drop_caches; head -c 6 /dev/vdb"),
            "before"
        );
        assert_eq!(guest.sh("nproc; head -c 8 /dev/hwrng | wc -c"), "2\n8");
        println!(
            "round {round}: clock lost {lost:.3} s, {}",
            guest.describe()
        );
    }
    assert_eq!(guest.sh("dmesg | grep -ciE 'stall|lockup|BUG:|hung'"), "0");
}

/// How far the guest's clock is before the host's, and how well that is known, both in seconds.
fn clock_offset(guest: &Guest) -> (f64, f64) {
    const ASK: &[u8] =
        b"adjtimex | awk '/tv_sec/{s=$2} /tv_usec/{u=$2} END{printf \"%d.%06d\\n\", s, u}'\n";
    let host = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs_f64()
    };
    let mut shell = BufReader::new(guest.connect(SHELL_PORT));
    let mut best = (0.0, f64::INFINITY);
    for _ in 0..20 {
        let before = host();
        shell.get_mut().write_all(ASK).unwrap();
        let mut line = String::new();
        shell.read_line(&mut line).unwrap();
        let (after, then): (_, f64) = (host(), line.trim().parse().unwrap());
        let uncertainty = (after - before) / 2.0;
        if uncertainty < best.1 {
            best = (then - before - uncertainty, uncertainty);
        }
    }
    best
}

/// Bytes that the monitor has written and dirtied until now.
fn written(guest: &Guest) -> (u64, u64) {
    let io = fs::read_to_string(format!("/proc/{}/io", guest.pid())).unwrap();
    let field = |name: &str| {
        let line = io.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().parse().unwrap()
    };
    (field("wchar:"), field("write_bytes:"))
}

#[test]
fn metal_a_later_suspend_writes_what_has_changed() {
    use std::os::unix::fs::MetadataExt;
    let mut guest = Guest::new().with("memory_mib", json!(256)).booted();
    guest.sh("dd if=/dev/urandom of=/tmp/data bs=1M count=64 2>/dev/null");
    let sum = guest.sh("md5sum < /tmp/data");
    guest.suspend();
    let memory = guest.path("snapshot/memory");
    let first = fs::metadata(&memory).unwrap();
    for round in 0..4 {
        guest.restore();
        assert_eq!(
            guest.sh(&format!("echo {round} >> /tmp/rounds; echo up")),
            "up"
        );
        guest.post("pause");
        let before = written(&guest);
        let start = Instant::now();
        guest.post("snapshot");
        let took = start.elapsed();
        let after = written(&guest);
        let (wrote, dirtied) = (after.0 - before.0, after.1 - before.1);
        println!(
            "round {round}: {} KiB written, {} KiB dirtied, {took:.1?}; the first has {} KiB",
            wrote >> 10,
            dirtied >> 10,
            first.blocks() / 2
        );
        assert!(wrote < 16 << 20, "round {round}: {wrote} bytes");
        guest.post("stop");
        assert_eq!(guest.exit(), (0, "stopped".into()));
        assert_eq!(fs::metadata(&memory).unwrap().ino(), first.ino());
    }
    guest.restore();
    assert_eq!(guest.sh("cat /tmp/rounds"), "0\n1\n2\n3");
    assert_eq!(guest.sh("md5sum < /tmp/data"), sum);
}

#[test]
fn metal_a_wake_is_prefetched_and_a_damaged_working_set_is_ignored() {
    let mut guest = Guest::new().booted();
    guest.sh("dd if=/dev/urandom of=/tmp/data bs=1M count=16 2>/dev/null");
    let sum = guest.sh("md5sum < /tmp/data");
    let set = guest.path("snapshot/working_set");
    let marked = |guest: &Guest, phase: &str| guest.describe()["boot"][phase].is_u64();
    let prefetched = |guest: &Guest| marked(guest, "prefetched_us");
    let mapped = |guest: &Guest| marked(guest, "working_set_mapped_us");
    // Linux 6.11 and later.
    let can_map = Kvm::new()
        .unwrap()
        .check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into())
        > 0;
    guest.suspend();
    assert!(!set.exists(), "it has never woken");
    guest.restore();
    assert_eq!(guest.sh("echo awake"), "awake");
    assert!(!prefetched(&guest) && !mapped(&guest));
    guest.suspend();
    guest.restore();
    guest.until("the prefetch", || prefetched(&guest).then_some(()));
    assert_eq!(mapped(&guest), can_map);
    assert_eq!(guest.sh("md5sum < /tmp/data"), sum);
    guest.suspend();
    let mut bytes = fs::read(&set).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&set, bytes).unwrap();
    guest.restore();
    assert_eq!(guest.sh("md5sum < /tmp/data"), sum);
    assert!(!prefetched(&guest) && !mapped(&guest));
    assert!(
        guest.logs().contains("the working set is ignored"),
        "{}",
        guest.logs()
    );
}

/// A server in the guest that answers each line with what `script` says.
fn serve(guest: &Guest, port: u16, script: &str) {
    guest.sh(&format!(
        "(echo 'read -r line'; echo '{script}') > /tmp/{port}; \
         socat TCP-LISTEN:{port},reuseaddr,fork EXEC:'sh /tmp/{port}' </dev/null >/dev/null 2>&1 &"
    ));
}

/// Asks such a server as soon as the guest's card is plugged in, and waits for the whole answer.
fn ask(guest: &Guest, port: u16) -> String {
    let address = SocketAddr::from(([192, 0, 2, 2], port));
    // A segment that is lost because nobody has the TAP yet comes again after a second; this asks anew.
    let mut stream = guest.until("a connection", || {
        TcpStream::connect_timeout(&address, Duration::from_millis(250)).ok()
    });
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"please\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.trim_end().to_owned()
}

/// Phases of a guest's last wake, in milliseconds since it could go on, once its working set is known.
fn wake_phases<const N: usize>(guest: &Guest, names: [&str; N]) -> [Option<u64>; N] {
    let boot = guest.until("the working set", || {
        let boot = guest.describe()["boot"].take();
        boot["working_set_taken_us"].is_u64().then_some(boot)
    });
    println!("{boot}");
    let at = |name: &str| boot[format!("{name}_us")].as_u64();
    let began = at("vcpus").unwrap();
    names.map(|name| Some(at(name)?.saturating_sub(began) / 1000))
}

/// Pages in the working set that a snapshot has.
fn working_set_pages(guest: &Guest) -> u64 {
    let bytes = fs::read(guest.path("snapshot/working_set")).unwrap();
    let runs = bytes[40..].as_chunks::<8>().0;
    let pages = runs
        .iter()
        .map(|run| u32::from_le_bytes([run[4], run[5], run[6], run[7]]));
    pages.map(|pages| u64::from(pages & !(1 << 31))).sum()
}

#[test]
fn metal_a_wake_ends_with_its_first_reply() {
    const SIGNS: [&str; 3] = ["first_request_in", "first_reply_out", "working_set_taken"];
    let mut guest = Guest::new().booted();
    // As much as a guest with Debian's kernel has room for, beside what runs in it.
    guest.sh("dd if=/dev/urandom of=/tmp/data bs=1M count=16 2>/dev/null");
    let sum = guest.sh("md5sum < /tmp/data");
    serve(&guest, 8001, "echo quick");
    serve(&guest, 8002, "sleep 2; md5sum < /tmp/data");
    assert_eq!(ask(&guest, 8001), "quick");
    let booted = guest.describe();
    assert!(booted["boot"]["first_request_in_us"].is_null(), "{booted}");

    // Nobody asks: the first second.
    guest.suspend();
    guest.restore();
    let [None, None, Some(taken)] = wake_phases(&guest, SIGNS) else {
        panic!("a wake without a request");
    };
    assert!((1000..5000).contains(&taken), "{taken} ms");

    // A reply: sooner. An emulated host now and then needs a second for the reply alone.
    let mut quick = u64::MAX;
    for _ in 0..3 {
        guest.suspend();
        guest.restore();
        assert_eq!(ask(&guest, 8001), "quick");
        let [Some(request), Some(reply), Some(taken)] = wake_phases(&guest, SIGNS) else {
            panic!("a request and a reply have passed");
        };
        assert!(
            request <= reply && reply + 100 <= taken,
            "{request} {reply} {taken}"
        );
        quick = quick.min(taken);
    }
    assert!(quick < 1000, "{quick} ms");
    guest.suspend();
    let few = working_set_pages(&guest);

    // A slow one is waited for: the pages that it needed after two seconds are in the set.
    guest.restore();
    assert_eq!(ask(&guest, 8002), sum);
    let [Some(request), Some(reply), Some(taken)] = wake_phases(&guest, SIGNS) else {
        panic!("a request and a reply have passed");
    };
    assert!(
        request + 2000 <= reply && reply + 100 <= taken,
        "{request} {reply} {taken}"
    );
    guest.suspend();
    let many = working_set_pages(&guest);
    assert!(
        many >= few + 3500,
        "{few} pages, and {many} for a reply that takes 16 MiB"
    );
    println!("{few} pages for a quick reply, {many} for a slow one");
}

#[test]
fn metal_a_resume_ends_the_guests_old_connections() {
    let mut guest = Guest::new().booted();
    let mut stream = guest.connect(SHELL_PORT);
    stream.write_all(b"exec cat > /tmp/sink\n").unwrap();
    assert_eq!(
        guest.sh("sleep 0.2; pidof cat > /dev/null && echo runs"),
        "runs"
    );
    guest.suspend();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    guest.restore();
    guest.until("the end of the old stream", || {
        (guest.sh("pidof cat > /dev/null || echo gone") == "gone").then_some(())
    });
}

#[test]
fn metal_a_restored_guest_learns_that_its_generation_is_another() {
    let mut guest = Guest::new().booted();
    let devices = guest.sh("ls /sys/bus/acpi/devices");
    assert!(devices.contains("TERNVGID:00"), "{devices}");
    // Tern's kernel has the driver, Debian's for clouds has not; the event reaches both.
    let release = guest.sh("uname -r");
    let has_driver = release.ends_with("-tern");
    let driver = "basename \"$(readlink /sys/bus/acpi/devices/TERNVGID:00/driver)\"";
    let expected = if has_driver { "vmgenid" } else { "" };
    assert_eq!(guest.sh(driver), expected, "{release}");
    let mut seen = vec![[0; 16]];
    for restores in 0..3 {
        let count = |what: &str, script: &str| {
            guest.until(&format!("{what} number {restores}"), || {
                let count = guest.sh(script);
                (count == restores.to_string()).then_some(())
            });
        };
        count("event", "awk '/ACPI:Ged/ {print $2}' /proc/interrupts");
        if has_driver {
            count(
                "reseeding",
                "dmesg | grep -c 'crng reseeded due to virtual machine fork'",
            );
        }
        guest.suspend();
        let id = generation_id(&guest);
        assert!(!seen.contains(&id), "{id:x?} after {seen:x?}");
        seen.push(id);
        guest.restore();
    }
    println!("{release}: {seen:x?}");
}

/// The 16 bytes that a suspended guest's `VGEN` points to.
fn generation_id(guest: &Guest) -> [u8; 16] {
    use std::os::unix::fs::FileExt;
    let file = fs::File::open(guest.path("snapshot/memory")).unwrap();
    let mut id = [0; 16];
    file.read_exact_at(&mut id, tern_vmm::boot::layout::GENERATION_ID)
        .unwrap();
    id
}

#[test]
fn metal_a_template_hides_what_is_beyond_it_before_and_after_a_suspend() {
    for (template, shown, hidden) in [
        ("x86-64-v2", "sse4_2", ["avx", "aes", "xsave", "svm"]),
        (
            "x86-64-v3",
            "avx2",
            ["sha_ni", "clflushopt", "xsaves", "svm"],
        ),
    ] {
        let mut guest = Guest::new()
            .with("cpu_template", json!(template))
            .with("vcpus", json!(2))
            .booted();
        let flags = |guest: &Guest| guest.sh("grep -m1 '^flags' /proc/cpuinfo");
        let before = flags(&guest);
        let has = |name: &str| before.split(' ').any(|flag| flag == name);
        assert!(has(shown), "{template}: {before}");
        for name in hidden {
            assert!(!has(name), "{template}: {name} in {before}");
        }
        // Enough for whatever chooses its instructions by what it finds.
        guest.sh("dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null");
        let sum = guest.sh("sha256sum < /tmp/data");
        guest.suspend();
        guest.restore();
        assert_eq!(guest.sh("sha256sum < /tmp/data"), sum);
        assert_eq!(flags(&guest), before);
        // A snapshot knows what its guest sees; the template is for the next cold start.
        guest.suspend();
        guest.set("cpu_template", json!("host"));
        guest.restore();
        assert_eq!(flags(&guest), before);
        println!("{template}: {before}");
    }
}

#[test]
fn metal_damaged_and_foreign_snapshots_are_refused() {
    use std::os::unix::fs::FileExt;
    let mut guest = Guest::new().booted();
    guest.suspend();
    let state = fs::read(guest.path("snapshot/state")).unwrap();
    let memory = guest.path("snapshot/memory");
    let refused = |guest: &mut Guest, word: &str| {
        guest.restore();
        assert_eq!(guest.exit(), (4, "snapshot_refused".into()), "{word}");
        let message = guest.exit_message();
        assert!(message.contains(word), "{word}: {message}");
    };
    // The state file: truncated, and one bit flipped.
    fs::write(guest.path("snapshot/state"), &state[..state.len() / 2]).unwrap();
    refused(&mut guest, "truncated");
    let mut flipped = state.clone();
    flipped[state.len() / 2] ^= 4;
    fs::write(guest.path("snapshot/state"), flipped).unwrap();
    refused(&mut guest, "damaged");
    fs::write(guest.path("snapshot/state"), &state).unwrap();
    // The memory file.
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&memory)
        .unwrap();
    let len = file.metadata().unwrap().len();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0x120_0000).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 0x120_0000).unwrap();
    refused(&mut guest, "damaged");
    file.write_all_at(&byte, 0x120_0000).unwrap();
    let mut last_page = vec![0; 4096];
    file.read_exact_at(&mut last_page, len - 4096).unwrap();
    file.set_len(len - 4096).unwrap();
    refused(&mut guest, "truncated");
    file.write_all_at(&last_page, len - 4096).unwrap();
    // Another Machine, or this one with something else about it.
    for (key, value, word) in [
        ("id", json!("other"), "other"),
        ("vcpus", json!(2), "2 vCPUs"),
        ("memory_mib", json!(64), "64 MiB"),
        ("net", json!([]), "devices"),
    ] {
        let before = guest.set(key, value);
        refused(&mut guest, word);
        guest.set(key, before);
    }
    // Whole again, it runs.
    guest.restore();
    assert_eq!(guest.sh("echo back"), "back");
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
    for thread in [
        "vcpu0", "block", "net", "vsock", "rng", "control", "starter",
    ] {
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
