//! Somebody else changes the packet filter.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use super::*;

pub(super) fn nft(arguments: &str) -> String {
    let output = Command::new("nft")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    assert!(output.status.success(), "nft {arguments}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn tables() -> String {
    nft("-a -s list ruleset")
}

/// What the table is known by, and no other was or will be; `None` while it is not there.
fn handle() -> Option<u64> {
    let all = tables();
    let line = all.lines().find(|l| l.starts_with("table inet tern "))?;
    line.rsplit(' ').next()?.parse().ok()
}

/// Lets the network's own task work until this holds.
pub(super) async fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Machines hear the host, and other networks do not hear them.
fn is_isolated(a: &Guest, b: &Guest) {
    a.send(b.address(), 7, "to another organization");
    b.send(a.address(), 7, "and back");
    let host = socket(HOST.address(), 0);
    for guest in [a, b] {
        host.send_to(b"from the host", (guest.address(), 7))
            .unwrap();
        assert_eq!(guest.receive().text, "from the host");
    }
}

#[test]
fn a_table_that_is_flushed_comes_back_by_itself() {
    in_namespace(|| async {
        let (_network, [a1, _a2, b]) = world(true).await;
        let first = handle().unwrap();
        nft("flush ruleset");
        until("the table is back", || handle().is_some_and(|h| h != first)).await;
        is_isolated(&a1, &b);
    });
}

#[test]
fn what_began_without_a_table_does_not_go_on() {
    in_namespace(|| async {
        let uplink = uplink();
        let (network, [a1, a2, b]) = world(true).await;
        let (gate, service) = (socket(HOST.address(), 0), socket(HOST.address(), 4280));
        gate.send_to(b"before", (a1.address(), 1000)).unwrap();
        assert_eq!(a1.receive().text, "before");
        a2.send(OUTSIDE, 1000, "a question");
        let asked = receive(&uplink).from;

        // Connections are tracked as long as any table asks for it.
        let owners = "add table inet owner; add chain inet owner in { type filter hook input priority 0; }; \
             add rule inet owner in ct state invalid counter";
        rules::apply(NFT.as_ref(), owners).await.unwrap();
        let first = handle().unwrap();
        nft("delete table inet tern");
        // The network's task has not had its turn yet.
        a1.send(HOST.address(), 4280, "to the host");
        let (text, from) = heard(&service);
        assert_eq!(text, "to the host");
        service.send_to(b"an answer", from).unwrap();
        assert_eq!(a1.receive().text, "an answer");
        a1.send(b.address(), 1000, "to another organization");
        assert_eq!(b.receive().text, "to another organization");
        b.send(a1.address(), 1000, "and back");
        assert_eq!(a1.receive().text, "and back");
        forge(&uplink, a1.address());
        assert_eq!(a1.receive().text, "from outside");
        a1.send(STRANGER, 1000, "a reply");

        until("the table is back", || handle().is_some_and(|h| h != first)).await;
        // Its owner has done what there is to do when a change of ours gets its turn.
        network.plug(port_of(9, ORG_A)).await.unwrap();
        a1.send(HOST.address(), 4280, "to the host");
        a1.send(b.address(), 1000, "to another organization");
        b.send(a1.address(), 1000, "and back");
        forge(&uplink, a1.address());
        let host = socket(HOST.address(), 0);
        for (listener, to) in [(&b, b.address()), (&a1, a1.address())] {
            host.send_to(b"from the host", (to, 7)).unwrap();
            assert_eq!(listener.receive().text, "from the host");
        }
        service.set_nonblocking(true).unwrap();
        assert!(service.recv(&mut [0; 9]).is_err());
        // What the host began, and what was translated, goes on.
        a1.send(HOST.address(), gate.local_addr().unwrap().port(), "a reply");
        assert_eq!(heard(&gate).0, "a reply");
        let mut answer = packet(OUTSIDE.into(), asked.ip(), asked.port(), "an answer");
        answer[2 + 20 + 6..2 + 20 + 8].fill(0);
        inject(&uplink, UPLINK_MAC, &answer);
        assert_eq!(a2.receive().text, "an answer");
    });
}

const STRANGER: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x66);

/// A stranger's packet to a Machine.
fn forge(uplink: &File, to: IpAddr) {
    inject(
        uplink,
        UPLINK_MAC,
        &packet(STRANGER.into(), to, 1000, "from outside"),
    );
}

#[test]
fn whatever_is_done_to_the_table_is_undone() {
    in_namespace(|| async {
        let (_network, [a1, _a2, b]) = world(true).await;
        for change in [
            "insert rule inet tern through accept",
            "flush chain inet tern from_any",
            "delete table inet tern",
            "flush set inet tern own6",
            "add chain inet tern through { policy drop; }",
        ] {
            let before = handle().unwrap();
            nft(change);
            until(change, || handle().is_some_and(|h| h != before)).await;
            is_isolated(&a1, &b);
        }
    });
}

#[test]
fn own_changes_and_those_of_other_tables_are_left_alone() {
    in_namespace(|| async {
        let (network, [a1, _a2, b]) = world(true).await;
        nft("add table ip owner");
        nft("add set ip owner bad { type ipv4_addr; }");
        let put_back_once = async || {
            let before = handle().unwrap();
            nft("insert rule inet tern through accept");
            until("the change is undone", || {
                handle().is_some_and(|h| h != before)
            })
            .await;
            handle().unwrap()
        };
        // Tables are numbered one after the other, the owner's too.
        let first = put_back_once().await;
        let second = put_back_once().await;
        for round in 0..10 {
            nft(&format!("add element ip owner bad {{ 192.0.2.{round} }}"));
            network.plug(port_of(10 + round, ORG_A)).await.unwrap();
            tokio::task::yield_now().await;
            // In the same place another.
            let slot = Slot::new(10 + round).unwrap();
            let other = PrivateAddress::of_machine(ORG_B, HOST, MachineNumber(500));
            network.plug(port(slot, other, ORG_B)).await.unwrap();
            nft(&format!(
                "delete element ip owner bad {{ 192.0.2.{round} }}"
            ));
            network.unplug(slot).await.unwrap();
        }
        // News comes in order: by the time that this is undone, all that came before has been judged.
        let third = put_back_once().await;
        assert_eq!(third - second, second - first, "put in place once");
        assert!(tables().contains("table ip owner"));
        is_isolated(&a1, &b);
    });
}

fn is_up(name: &str) -> bool {
    let output = Command::new("ip")
        .args(["-o", "link", "show", name])
        .output();
    let shown = String::from_utf8(output.unwrap().stdout).unwrap();
    shown.split(['<', '>', ',']).any(|flag| flag == "UP")
}

/// An `nft` that does not work while the other file is there.
fn breakable(dir: &Path) -> (PathBuf, PathBuf) {
    let (broken, program) = (dir.join("broken"), dir.join("nft"));
    let script = format!(
        "#!/bin/sh\nif [ -e {} ]; then echo out of order >&2; exit 1; fi\nexec nft \"$@\"\n",
        broken.display()
    );
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    (program, broken)
}

#[test]
fn a_device_comes_up_in_the_same_turn_as_its_rules() {
    in_namespace(|| async {
        let (network, _guests) = world(true).await;
        let new = port_of(7, ORG_A);
        let mut plug = std::pin::pin!(network.plug(new));
        // Whoever gets the table's turn, to stop the Machines' traffic perhaps, finds both or neither.
        while futures::poll!(&mut plug).is_pending() {
            if network.filter.has_turn_for(new.slot) {
                assert!(is_up("tn7"), "it comes up after its rules' turn");
            }
            tokio::task::yield_now().await;
        }
        assert!(is_up("tn7"));
    });
}

#[test]
fn a_device_that_does_not_come_back_up_is_tried_again() {
    in_namespace(|| async {
        let dir = tempfile::tempdir().unwrap();
        let (program, broken) = breakable(dir.path());
        let (network, guests) = world_with(|setup| setup.nft = program, true).await;
        std::fs::write(&broken, "").unwrap();
        nft("flush ruleset");
        let all_are = |up: bool| move || (0..3).all(|n| is_up(&format!("tn{n}")) == up);
        until("the devices are down", all_are(false)).await;
        // A device that is no Ethernet has no address for it to be set up with.
        drop(guests);
        ip("link del tn1");
        ip("tuntap add tn1 mode tun");
        std::fs::remove_file(&broken).unwrap();
        until("two are up", || is_up("tn0") && is_up("tn2")).await;
        assert!(!is_up("tn1"));
        ip("link del tn1");
        ip("tuntap add tn1 mode tap");
        until("the third is up", all_are(true)).await;
        // One that is down is not taken for plugged in.
        std::fs::write(&broken, "").unwrap();
        nft("flush ruleset");
        until("the devices are down", all_are(false)).await;
        network.plug(port_of(1, ORG_A)).await.unwrap_err();
    });
}

#[test]
fn switches_that_an_agent_may_have_turned_on_say_nothing() {
    in_namespace(|| async {
        for switch in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            std::fs::write(format!("/proc/sys/net/{switch}"), "1").unwrap();
        }
        let found = async || {
            let data = tempfile::tempdir().unwrap();
            let opened = Network::open(setup(data.path(), true), Vec::new()).await;
            drop(opened.unwrap());
            let memory = std::fs::read(data.path().join(FORWARDING)).unwrap();
            let memory: serde_json::Value = serde_json::from_slice(&memory).unwrap();
            (memory["ipv4"].clone(), memory["ipv6"].clone())
        };
        assert_eq!(found().await, (true.into(), true.into()), "a router");
        // What the first has left is the table, and no memory of what was before it.
        assert_eq!(found().await, (false.into(), false.into()));
    });
}

#[test]
fn without_a_table_machines_have_no_network() {
    in_namespace(|| async {
        let dir = tempfile::tempdir().unwrap();
        let (program, broken) = breakable(dir.path());
        let (network, [a1, a2, b]) = world_with(|setup| setup.nft = program.clone(), true).await;
        assert!(is_up("tn0") && is_up("tn2"));
        std::fs::write(&broken, "").unwrap();
        let refused = network.plug(port_of(7, ORG_B)).await.unwrap_err();
        assert!(refused.to_string().contains("out of order"), "{refused}");
        assert!(is_up("tn0") && is_up("tn2"), "the table is as it was");
        is_isolated(&a1, &b);
        nft("flush ruleset");
        until("the devices are down", || {
            (0..3).all(|n| !is_up(&format!("tn{n}")))
        })
        .await;
        let refused = network
            .plug(port_of(7, ORG_B))
            .await
            .unwrap_err()
            .to_string();
        assert!(refused.contains("out of order"), "{refused}");
        assert!(!is_up("tn7"));

        std::fs::remove_file(&broken).unwrap();
        until("the devices are up", || {
            (0..3).all(|n| is_up(&format!("tn{n}")))
        })
        .await;
        assert!(handle().is_some());
        // After the rest of what it takes to set the devices up.
        network.plug(port_of(7, ORG_B)).await.unwrap();
        assert!(is_up("tn7"));
        for guest in [&a1, &a2, &b] {
            wait_for_carrier(&guest.port.slot.tap());
        }
        is_isolated(&a1, &b);
        a1.send(a2.address(), 7, "to a neighbour");
        assert_eq!(a2.receive().text, "to a neighbour");
    });
}
