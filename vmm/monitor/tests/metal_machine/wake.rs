//! What a wake touches until its first reply is made ready for the next one.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY;
use kvm_ioctls::Kvm;

use crate::support::{Guest, PATIENCE};

#[test]
fn metal_a_wake_is_prefetched_and_a_damaged_working_set_is_ignored() {
    let mut guest = Guest::new().booted();
    guest.sh("dd if=/dev/urandom of=/tmp/data bs=1M count=16 2>/dev/null");
    let sum = guest.sh("md5sum < /tmp/data");
    let set = guest.path("snapshot/working_set");
    let marked = |guest: &Guest, phase: &str| guest.describe()["boot"][phase].is_u64();
    let prefetched = |guest: &Guest| marked(guest, "prefetched_us");
    let mapped = |guest: &Guest| marked(guest, "working_set_mapped_us");
    guest.suspend();
    assert!(!set.exists(), "it has never woken");
    guest.restore();
    assert_eq!(guest.sh("echo awake"), "awake");
    assert!(!prefetched(&guest) && !mapped(&guest));
    guest.suspend();
    guest.restore();
    guest.until("the prefetch", || prefetched(&guest).then_some(()));
    assert_eq!(mapped(&guest), can_map_ahead());
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

/// Linux 6.11 and later.
fn can_map_ahead() -> bool {
    let kvm = Kvm::new().unwrap();
    kvm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) > 0
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

    // A slow one is waited for: the pages that it needed after two seconds are in the set, where that is taken.
    if can_map_ahead() {
        guest.restore();
        assert_eq!(ask(&guest, 8001), "quick");
        wake_phases(&guest, SIGNS);
        guest.suspend();
        assert_eq!(working_set_pages(&guest), few, "a set is kept");
        fs::remove_file(guest.path("snapshot/working_set")).unwrap();
    }
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
