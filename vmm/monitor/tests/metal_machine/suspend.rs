//! A guest stands still, sleeps in a snapshot, and goes on from it as if nothing had been, or is refused.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::support::{Guest, SHELL_PORT};

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
