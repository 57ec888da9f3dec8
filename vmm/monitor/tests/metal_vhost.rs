//! Real guests whose frames the host's kernel moves.
//!
//! Run by `make test` inside metal; elsewhere each fails and says so.

#![allow(clippy::unwrap_used)] // helpers of tests are not in `#[test]` functions

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

use serde_json::json;
use support::{Guest, PATIENCE};

const USER: u32 = 0x7000_0124;

/// Has the first network card's frames moved by the kernel, or by the monitor, from its next start on.
fn by_kernel(guest: &mut Guest, vhost: bool) {
    require_vhost();
    let mut net = guest.set("net", json!([]));
    net[0]["vhost"] = json!(vhost);
    guest.set("net", net);
}

fn require_vhost() {
    let opened = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/vhost-net");
    if let Err(error) = opened {
        panic!("this test needs /dev/vhost-net ({error}): modprobe vhost_net as root");
    }
}

/// A guest with vhost, jailed as on a server.
fn booted() -> Guest {
    let mut guest = Guest::new().jailed(USER);
    by_kernel(&mut guest, true);
    guest.booted()
}

/// The threads of the monitor, as `(id, name)`.
fn threads(guest: &Guest) -> Vec<(u32, String)> {
    let tasks = fs::read_dir(format!("/proc/{}/task", guest.pid())).unwrap();
    tasks
        .map(|task| {
            let path = task.unwrap().path();
            let id = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
            let name = fs::read_to_string(path.join("comm")).unwrap();
            (id, name.trim().to_owned())
        })
        .collect()
}

/// The monitor's thread that looks after the card.
fn worker(guest: &Guest) -> Option<u32> {
    let of = |(id, name): (u32, String)| (name == "vhost-net").then_some(id);
    threads(guest).into_iter().find_map(of)
}

/// The kernel's thread that moves the frames, named after the monitor's that asked for it: one of the
/// monitor's own since Linux 6.4, a kernel thread before.
fn mover(guest: &Guest) -> Option<String> {
    let of = format!("vhost-{}", worker(guest)?);
    let everywhere = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let name = fs::read_to_string(entry.ok()?.path().join("comm")).ok()?;
        Some(name.trim().to_owned())
    });
    let own = threads(guest).into_iter().map(|(_, name)| name);
    own.chain(everywhere).find(|name| *name == of)
}

fn assert_by_kernel(guest: &Guest, vhost: bool) {
    let device = &guest.describe()["devices"][2];
    assert_eq!(device["kind"], "net");
    assert_eq!(device["vhost"] == json!(true), vhost, "{device}");
    assert_eq!(device.get("sent_frames").is_none(), vhost, "{device}");
    if vhost {
        guest.until("the kernel's thread", || mover(guest));
    } else {
        assert_eq!(worker(guest), None);
    }
}

/// How often a thread has gone to sleep: as often it was woken.
fn sleeps(guest: &Guest, thread: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/task/{thread}/status", guest.pid())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.unwrap().trim().parse().unwrap()
}

/// A ping from the guest to the host.
fn ping(guest: &Guest) {
    assert_eq!(
        guest.sh("ping -c 2 -i 0.2 -W 5 192.0.2.1 > /tmp/ping && echo yes || cat /tmp/ping"),
        "yes",
        "{}",
        guest.logs()
    );
}

#[test]
fn metal_vhost_carries_streams_both_ways_without_the_monitor() {
    let guest = booted();
    assert_by_kernel(&guest, true);
    let worker = worker(&guest).unwrap();
    let before = sleeps(&guest, worker);
    ping(&guest);
    // Long enough for segmentation offload and merged buffers in both directions.
    let listener = TcpListener::bind("192.0.2.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let echo = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
        bytes.len()
    });
    let sums = guest.sh(&format!(
        "dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null; nc 192.0.2.1 {port} < /tmp/data > /tmp/back; md5sum < /tmp/data; md5sum < /tmp/back"
    ));
    assert_eq!(echo.join().unwrap(), 8 << 20);
    let (data, back) = sums.split_once('\n').unwrap();
    assert_eq!(data, back);
    assert_eq!(sleeps(&guest, worker), before, "a frame woke the monitor");
}

#[test]
fn metal_a_connection_survives_suspends_with_vhost_and_without() {
    let mut guest = booted();
    let listener = TcpListener::bind("192.0.2.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    guest.sh(&format!(
        "(i=0; while :; do i=$((i+1)); echo $i; echo $i > /tmp/i; sleep 0.05; done | nc 192.0.2.1 {port}) < /dev/null > /dev/null 2>&1 &"
    ));
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut numbers = BufReader::new(stream);
    let mut last = count_on(&guest, &mut numbers, 0);
    for vhost in [true, false, true, true] {
        guest.post("pause");
        guest.post("resume");
        last = count_on(&guest, &mut numbers, last);
        guest.suspend();
        by_kernel(&mut guest, vhost);
        guest.restore();
        assert_by_kernel(&guest, vhost);
        last = count_on(&guest, &mut numbers, last);
        ping(&guest);
    }
    assert_eq!(guest.sh("dmesg | grep -ciE 'stall|lockup|BUG:|hung'"), "0");
}

/// Reads one number after the other until one has come that the guest has not sent before now.
fn count_on(guest: &Guest, numbers: &mut BufReader<TcpStream>, mut last: u64) -> u64 {
    // Between its opening and writing the file is empty.
    let sent: u64 = guest.until("a number", || guest.sh("cat /tmp/i").parse().ok());
    while last <= sent + 1 {
        let mut line = String::new();
        numbers.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), (last + 1).to_string());
        last += 1;
    }
    last
}

#[test]
fn metal_a_driver_may_reset_a_card_with_vhost() {
    let guest = booted();
    assert_by_kernel(&guest, true);
    ping(&guest);
    for _ in 0..3 {
        guest.sh(
            "cd /sys/bus/virtio/drivers/virtio_net; device=$(ls -d virtio*); echo $device > unbind; echo $device > bind; ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up",
        );
        ping(&guest);
    }
}
