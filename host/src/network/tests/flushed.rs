//! Somebody else changes the packet filter.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

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
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "waited in vain until {what}"
        );
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

#[test]
fn without_a_table_machines_have_no_network() {
    in_namespace(|| async {
        let dir = tempfile::tempdir().unwrap();
        let (broken, program) = (dir.path().join("broken"), dir.path().join("nft"));
        let script = format!(
            "#!/bin/sh\nif [ -e {} ]; then echo out of order >&2; exit 1; fi\nexec nft \"$@\"\n",
            broken.display()
        );
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        let (network, [a1, a2, b]) = world_with(|setup| setup.nft = program.clone(), true).await;
        let is_up = |name: &str| {
            let output = Command::new("ip")
                .args(["-o", "link", "show", name])
                .output();
            let shown = String::from_utf8(output.unwrap().stdout).unwrap();
            shown.split(['<', '>', ',']).any(|flag| flag == "UP")
        };
        assert!(is_up("tn0") && is_up("tn2"));
        std::fs::write(&broken, "").unwrap();
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
