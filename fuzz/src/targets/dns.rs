//! Messages to the resolver, in a catalog with two organizations, and what upstreams answer.
//!
//! Promised: an answer can be read, answers the question's number, and is as long as may be sent; no
//! organization learns of another's Machines; an upstream's answer is passed on only to its question.

use std::net::{Ipv6Addr, SocketAddr};
use std::sync::{Arc, LazyLock};

use serde_json::json;
use tern_catalog::{
    App, Catalog, Host, HostId, Machine, MachineNumber, MachineStatus, NetworkId, Peer,
    PrivateAddress, Record, Snapshot, SqliteStore, Store, View,
};
use tern_dns::fuzzing::{Outcome, answer, ask};

use crate::input::{Input, Program};

/// Networks: ours, and another organization's.
const OURS: NetworkId = NetworkId(7);
const THEIRS: NetworkId = NetworkId(8);
/// The most that a UDP answer may have (RFC 9715 and the resolver's own word).
const MAX_UDP: usize = 1232;

static CATALOG: LazyLock<Arc<Snapshot>> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(furnished())
});

async fn furnished() -> Arc<Snapshot> {
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> =
        Arc::new(SqliteStore::open(&dir.path().join("catalog.db")).unwrap());
    let view = View::follow(Arc::clone(&store)).await.unwrap();
    let catalog = Catalog::new(store);
    let at = "2026-01-01T00:00:00Z";
    for (id, region) in [(1, "ams"), (2, "fra")] {
        put::<Host>(
            &catalog,
            json!({"id": id, "name": format!("host{id}"), "region": region, "public_key": "",
                "endpoint": "192.0.2.1:51820", "started_at": at}),
        )
        .await;
    }
    for (app, network, number, host) in [
        ("web", OURS, 9, 1),
        ("web", OURS, 10, 2),
        ("secret", THEIRS, 11, 1),
    ] {
        let organization = if network == OURS { "people" } else { "spies" };
        put::<App>(
            &catalog,
            json!({"name": app, "organization": organization, "network": network.0, "created_at": at}),
        )
        .await;
        let address = PrivateAddress::of_machine(network, HostId(host), MachineNumber(number));
        let id = format!("{number:014x}");
        let config =
            json!({"image": "registry.internal/x", "metadata": {"fly_process_group": "app"}});
        put::<Machine>(
            &catalog,
            json!({"id": id, "name": id, "app": app, "network": network.0, "host": host, "region": "ams",
                "number": number, "private_ip": address, "config": config, "instance_id": "01", "version": 1,
                "desired": {"state": "started", "generation": 1}, "cordoned": false,
                "created_at": at, "updated_at": at}),
        )
        .await;
        put::<MachineStatus>(
            &catalog,
            json!({"id": id, "state": "started", "reason": null, "generation": 1, "instance_id": "01",
                "image_digest": null, "checks": [], "events": [], "updated_at": at}),
        )
        .await;
    }
    let address = PrivateAddress::of_peer(OURS, HostId(1), MachineNumber(20));
    let revision = put::<Peer>(
        &catalog,
        json!({"name": "laptop", "organization": "people", "network": OURS.0, "host": 1, "number": 20,
            "address": address, "public_key": "", "created_at": at}),
    )
    .await;
    view.wait_for(|s| (s.revision >= revision).then_some(()))
        .await;
    view.snapshot()
}

async fn put<R: Record>(catalog: &Catalog, record: serde_json::Value) -> u64 {
    let record: R = serde_json::from_value(record).unwrap();
    catalog.put(&record).await.unwrap()
}

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (how, tcp) = (input.byte(), input.flag());
    let from = SocketAddr::new(asker(how).into(), 5353);
    let asked = input.u16();
    let message = input.bytes(asked.into());
    match ask(&CATALOG, from, tcp, message) {
        Outcome::Ignored => {}
        Outcome::Answered(reply) => {
            assert_eq!(reply[..2], message[..2], "the question's number");
            assert!(reply[2] & 0x80 != 0, "an answer says that it is one");
            assert!(reply.len() <= if tcp { 65535 } else { MAX_UDP });
            let theirs: Ipv6Addr = PrivateAddress::of_machine(THEIRS, HostId(1), MachineNumber(11));
            let hidden = !reply.windows(16).any(|part| part == theirs.octets());
            assert!(hidden, "another organization's address");
            let named = |text: &[u8]| text.windows(6).any(|part| part == b"secret");
            assert!(
                !named(&reply) || named(message),
                "another organization's app"
            );
        }
        Outcome::Forwarded(network, mut query) => {
            assert_eq!(network, OURS);
            let reply = input.rest().to_vec();
            if let (Some(id), Some(kept)) = (reply.get(..2), answer(&query, &reply)) {
                assert_eq!(kept[..2], query[..2]);
                assert_eq!(kept.len(), reply.len());
                query[..2].copy_from_slice(id);
            }
        }
    }
}

/// A Machine of ours, or our laptop; nobody the private network knows.
fn asker(how: u8) -> Ipv6Addr {
    match how % 4 {
        0 | 1 => PrivateAddress::of_machine(OURS, HostId(1), MachineNumber(9)),
        2 => PrivateAddress::of_peer(OURS, HostId(1), MachineNumber(20)),
        _ => Ipv6Addr::LOCALHOST,
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let question = |name: &str, kind: u16, edns: bool| {
        let mut message = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, u8::from(edns)];
        for label in name.split('.').filter(|label| !label.is_empty()) {
            message.push(label.len() as u8);
            message.extend(label.as_bytes());
        }
        message.push(0);
        message.extend(kind.to_be_bytes());
        message.extend([0, 1]);
        if edns {
            message.extend([0, 0, 41, 16, 0, 0, 0, 0, 0, 0, 0]);
        }
        message
    };
    let input = |message: &[u8], reply: &[u8]| {
        let program = Program::default().bytes(&[0, 0]).u16(message.len() as u16);
        program.bytes(message).bytes(reply).0
    };
    let names: [(&str, u16); 14] = [
        ("web.internal", 28),
        ("global.web.internal", 28),
        ("ams.web.internal", 255),
        ("00000000000009.vm.web.internal", 28),
        ("app.process.web.internal", 28),
        ("top2.nearest.of.web.internal", 28),
        ("app.fly_process_group.kv._metadata.web.internal", 28),
        ("laptop._peer.internal", 28),
        ("vms.web.internal", 16),
        ("all.regions.web.internal", 16),
        ("_apps.internal", 16),
        ("_instances.internal", 16),
        ("secret.internal", 28),
        ("internal", 6),
    ];
    let mut seeds: Vec<_> = names
        .iter()
        .map(|(name, kind)| input(&question(name, *kind, *kind != 28), b""))
        .collect();
    let nibbles = PrivateAddress::of_machine(OURS, HostId(1), MachineNumber(9)).octets();
    let reverse: String = nibbles
        .iter()
        .rev()
        .map(|byte| format!("{:x}.{:x}.", byte & 15, byte >> 4))
        .collect();
    seeds.push(input(
        &question(&format!("{reverse}ip6.arpa"), 12, false),
        b"",
    ));
    let asked = question("example.org", 1, false);
    let mut reply = asked.clone();
    reply[2..8].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1]);
    reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 1]);
    seeds.push(input(&asked, &reply));
    seeds
}
