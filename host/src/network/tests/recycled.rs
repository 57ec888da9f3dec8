//! A place that another Machine has had.

use super::*;

/// A Machine of another organization in the place of the first.
fn successor() -> Port {
    port(
        Slot::new(0).unwrap(),
        PrivateAddress::of_machine(ORG_B, HOST, MachineNumber(900)),
        ORG_B,
    )
}

/// Has a guest ask the outside. Returns from where its question came.
fn ask(guest: &Guest, uplink: &File) -> SocketAddr {
    guest.send(OUTSIDE, 1000, "a question");
    let got = receive(uplink);
    assert_eq!(got.text, "a question");
    got.from
}

fn answer(uplink: &File, to: SocketAddr) {
    let mut answer = packet(OUTSIDE.into(), to.ip(), to.port(), "an answer");
    // From the port that was asked; without a checksum, which IPv4 allows.
    answer[2 + 20 + 6..2 + 20 + 8].fill(0);
    inject(uplink, UPLINK_MAC, &answer);
}

/// The successor hears nothing that is for its predecessor, and the others hear what is for them.
fn hears_nothing_of_its_predecessors(asked: [SocketAddr; 2], uplink: &File, other: &Guest) {
    let next = Guest::of(successor());
    for from in asked {
        answer(uplink, from);
    }
    assert_eq!(other.receive().text, "an answer");
    let host = socket(HOST.address(), 0);
    host.send_to(b"the truth", (next.address(), 7)).unwrap();
    assert_eq!(next.receive().text, "the truth");
    let own = ask(&next, uplink);
    answer(uplink, own);
    assert_eq!(next.receive().text, "an answer");
}

#[test]
fn a_machine_inherits_no_connections() {
    in_namespace(|| async {
        let (network, [a1, a2, _b]) = world(true).await;
        let uplink = uplink();
        let asked = [ask(&a1, &uplink), ask(&a2, &uplink)];
        let host = socket(HOST.address(), 0);
        host.send_to(b"before", (a1.address(), 7)).unwrap();
        network.unplug(a1.port.slot).await.unwrap();
        drop(a1);
        network.release(Slot::new(0).unwrap());
        network.plug(successor()).await.unwrap();
        hears_nothing_of_its_predecessors(asked, &uplink, &a2);
    });
}

#[test]
fn nor_those_of_a_machine_that_went_while_no_agent_looked() {
    in_namespace(|| async {
        let (network, [a1, a2, b]) = world(true).await;
        let uplink = uplink();
        let asked = [ask(&a1, &uplink), ask(&a2, &uplink)];
        drop((network, a1));
        let data = tempfile::tempdir().unwrap();
        let ports = vec![a2.port, b.port];
        let network = Network::open(setup(data.path(), true), ports)
            .await
            .unwrap();
        assert_eq!(network.sweep().await.unwrap(), 1);
        network.plug(successor()).await.unwrap();
        hears_nothing_of_its_predecessors(asked, &uplink, &a2);
    });
}

#[test]
fn a_place_that_is_not_given_back_stays_taken() {
    in_namespace(|| async {
        let data = tempfile::tempdir().unwrap();
        let network = Network::open(setup(data.path(), true), Vec::new())
            .await
            .unwrap();
        let all: Vec<Slot> = (0..Slot::COUNT)
            .map(|_| network.take_slot().unwrap())
            .collect();
        network.unplug(all[3]).await.unwrap();
        assert!(matches!(network.take_slot(), Err(NetworkError::Full)));
        network.release(all[3]);
        assert_eq!(network.take_slot().unwrap(), all[3]);
    });
}
