use std::net::Ipv6Addr;

use hickory_proto::op::{MessageType, Metadata};
use proptest::prelude::*;
use tern_catalog::{HostId, MachineNumber, MachineState, RESOLVER};

use super::*;
use crate::testing::{World, id};

const ID: u16 = 4711;

fn address(network: u32, host: u32, number: u32) -> Ipv6Addr {
    PrivateAddress::of_machine(NetworkId(network), HostId(host), MachineNumber(number))
}

/// From a Machine of network 7 on host 1.
fn insider() -> SocketAddr {
    (address(7, 1, 9), 40000).into()
}

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(ID, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn ask(snapshot: &Snapshot, from: SocketAddr, message: &Message) -> Message {
    let bytes = message.to_vec().unwrap();
    match Responder::new(None).decide(snapshot, from, Transport::Udp, &bytes) {
        Decision::Answer(answer) => Message::from_vec(&answer).unwrap(),
        other => panic!("{other:?}"),
    }
}

/// What network 7 sees at a name: the answers as text, sorted, or the response code.
fn look(snapshot: &Snapshot, name: &str, kind: RecordType) -> Result<Vec<String>, ResponseCode> {
    let answer = ask(snapshot, insider(), &question(name, kind));
    let Metadata {
        id,
        message_type,
        authoritative,
        response_code,
        ..
    } = answer.metadata;
    assert_eq!(
        (id, message_type, authoritative),
        (ID, MessageType::Response, true)
    );
    if answer.answers.is_empty() {
        let [soa] = &answer.authorities[..] else {
            panic!("nothing without an SOA: {answer}")
        };
        assert!(matches!(&soa.data, RData::SOA(data) if soa.ttl == 5 && data.minimum == 5));
    }
    if response_code != ResponseCode::NoError {
        return Err(response_code);
    }
    assert!(
        answer
            .answers
            .iter()
            .all(|r| r.ttl == 5 && r.name.eq_case(answer.queries[0].name()))
    );
    let text = |r: &Record| match &r.data {
        RData::TXT(txt) => String::from_utf8(txt.txt_data.concat()).unwrap(),
        other => other.to_string(),
    };
    let mut all: Vec<_> = answer.answers.iter().map(text).collect();
    all.sort();
    Ok(all)
}

#[tokio::test]
async fn started_machines_have_addresses() {
    let world = World::furnished().await;
    let s = world.view.snapshot();
    let (nine, ten) = (address(7, 1, 9).to_string(), address(7, 2, 10).to_string());
    let aaaa = |name: &str| look(&s, &format!("{name}.internal."), RecordType::AAAA);
    let both = Ok(vec![nine.clone(), ten.clone()]);
    assert_eq!(aaaa("web"), both);
    assert_eq!(aaaa("global.web"), both);
    assert_eq!(aaaa("ams.web"), Ok(vec![nine.clone()]));
    assert_eq!(
        aaaa("fra.web"),
        Ok(vec![ten.clone()]),
        "a suspended one is not listed"
    );
    assert_eq!(aaaa(&format!("{}.vm.web", id(10))), Ok(vec![ten.clone()]));
    assert_eq!(aaaa("worker.process.web"), Ok(vec![ten.clone()]));
    assert_eq!(aaaa("db.primary.role.kv._metadata.web"), Ok(vec![ten]));
    assert_eq!(
        aaaa("app.fly_process_group.kv._metadata.web"),
        Ok(vec![nine.clone()])
    );
    assert_eq!(aaaa("top1.nearest.of.web"), Ok(vec![nine]));
    assert_eq!(aaaa("top9.nearest.of.web"), both);
    assert_eq!(
        aaaa("laptop._peer"),
        Ok(vec![address(7, 1, 20).to_string()])
    );
    assert_eq!(aaaa("_api"), Ok(vec!["fdaa:0:7::3".into()]));
}

#[tokio::test]
async fn nearest_is_seen_from_who_asks() {
    let world = World::furnished().await;
    let s = world.view.snapshot();
    let asked = question("top1.nearest.of.web.internal.", RecordType::AAAA);
    for (from, nearest) in [
        (address(7, 1, 50), address(7, 1, 9)),
        (address(7, 2, 50), address(7, 2, 10)),
        // Of its own region, where nothing runs on its own host.
        (address(7, 3, 50), address(7, 2, 10)),
    ] {
        let answer = ask(&s, (from, 40000).into(), &asked);
        assert_eq!(
            answer.answers[0].data,
            RData::AAAA(AAAA(nearest)),
            "from {from}"
        );
    }
}

#[tokio::test]
async fn texts_list_what_there_is() {
    let world = World::furnished().await;
    let s = world.view.snapshot();
    let txt = |name: &str| look(&s, &format!("{name}.internal."), RecordType::TXT);
    let one = |text: String| Ok(vec![text]);
    let (a, b, c) = (id(9), id(10), id(11));
    assert_eq!(txt("vms.web"), one(format!("{a} ams,{b} fra")));
    assert_eq!(txt("all.vms.web"), one(format!("{a} ams,{b} fra,{c} fra")));
    assert_eq!(txt("regions.web"), one("ams,fra".into()));
    assert_eq!(txt("_apps"), one("empty,web".into()));
    assert_eq!(txt("_peer"), one("laptop".into()));
    let instance = |id, host, number, region| {
        let ip = address(7, host, number);
        format!("instance={id},app=web,ip={ip},region={region}")
    };
    let started = format!(
        "{};{}",
        instance(&a, 1, 9, "ams"),
        instance(&b, 2, 10, "fra")
    );
    assert_eq!(txt("_instances"), one(started.clone()));
    let all = format!("{started};{}", instance(&c, 3, 11, "fra"));
    assert_eq!(txt("all._instances"), one(all));
    assert_eq!(txt("vms.empty"), Ok(vec![]));
}

#[tokio::test]
async fn names_that_exist_without_the_type_are_empty() {
    let world = World::furnished().await;
    let s = world.view.snapshot();
    for (name, kind) in [
        ("internal.", RecordType::AAAA),
        ("web.internal.", RecordType::A),
        ("web.internal.", RecordType::TXT),
        ("empty.internal.", RecordType::AAAA),
        ("cron.process.web.internal.", RecordType::AAAA), // asleep
        ("0000000000000b.vm.web.internal.", RecordType::AAAA), // asleep
        ("vm.web.internal.", RecordType::AAAA),
        ("_metadata.web.internal.", RecordType::TXT),
        ("nearest.of.web.internal.", RecordType::AAAA),
        ("vms.web.internal.", RecordType::AAAA),
        ("_apps.internal.", RecordType::AAAA),
    ] {
        assert_eq!(look(&s, name, kind), Ok(vec![]), "{name} {kind}");
    }
    let soa = look(&s, "internal.", RecordType::SOA).unwrap();
    assert!(soa[0].starts_with("_api.internal."), "{soa:?}");
}

#[tokio::test]
async fn what_is_not_ours_does_not_exist() {
    let world = World::furnished().await;
    let s = world.view.snapshot();
    for name in [
        "secret",
        "global.secret",
        "vms.secret",
        "0000000000000c.vm.secret",
        "0000000000000c.vm.web",
        "spy._peer",
        "nothing",
        "x.vm.web",
        "x.process.web",
        "syd.web",
        "a.b.kv._metadata.web",
        "kv._metadata.secret",
        "top0.nearest.of.web",
        "topx.nearest.of.web",
        "a.b.web",
        "x._api",
        "all.web",
        "_x",
        "web.web",
    ] {
        for kind in [RecordType::AAAA, RecordType::TXT, RecordType::ANY] {
            let found = look(&s, &format!("{name}.internal."), kind);
            assert_eq!(found, Err(ResponseCode::NXDomain), "{name}");
        }
    }
    // Another organization's name looks exactly like none.
    let bytes = |name: &str| {
        let mut answer = ask(&s, insider(), &question(name, RecordType::AAAA));
        answer.queries.clear();
        answer.to_vec().unwrap()
    };
    assert_eq!(bytes("secret.internal."), bytes("absent.internal."));
}

#[tokio::test]
async fn each_network_sees_its_own() {
    let world = World::furnished().await;
    let s = world.view.snapshot();
    let theirs = (address(8, 1, 50), 40000).into();
    let apps = ask(&s, theirs, &question("_apps.internal.", RecordType::TXT));
    assert!(matches!(&apps.answers[0].data, RData::TXT(t) if *t.txt_data[0] == *b"secret"));
    let web = ask(&s, theirs, &question("web.internal.", RecordType::AAAA));
    assert_eq!(web.response_code, ResponseCode::NXDomain);
}

#[tokio::test]
async fn a_name_leads_to_who_sleeps_where_nobody_is_awake_and_a_call_wakes() {
    let world = World::furnished().await;
    let now = |s: &Snapshot, name: &str| look(s, &format!("{name}.internal."), RecordType::AAAA);
    let own = format!("{}.vm.web", id(11));
    let sleeper = || Ok(vec![address(7, 3, 11).to_string()]);
    let s = world.view.snapshot();
    for name in [own.as_str(), "cron.process.web"] {
        assert_eq!(now(&s, name), Ok(vec![]), "{name}: nothing wakes it");
    }
    let mut machine = (*s.machines[&id(11)]).clone();
    machine.config.services =
        serde_json::from_value(serde_json::json!([{"internal_port": 80, "autostart": true}]))
            .unwrap();
    let revision = world.catalog.put(&machine).await.unwrap();
    let follow = |revision| async move {
        let seen = |s: &Snapshot| (s.revision >= revision).then_some(());
        world.view.wait_for(seen).await;
        world.view.snapshot()
    };
    let s = follow(revision).await;
    for name in [own.as_str(), "cron.process.web"] {
        assert_eq!(now(&s, name), sleeper(), "{name}");
    }
    // Who is awake is not passed over for one that sleeps.
    let awake = now(&s, "web").unwrap();
    assert!(awake.len() == 2 && !awake.contains(&sleeper().unwrap()[0]));
}

#[tokio::test]
async fn lists_follow_the_catalog() {
    let world = World::furnished().await;
    let responder = Responder::new(None);
    let bytes = question("_instances.internal.", RecordType::TXT)
        .to_vec()
        .unwrap();
    let listed =
        |snapshot: &Snapshot| match responder.decide(snapshot, insider(), Transport::Tcp, &bytes) {
            Decision::Answer(answer) => Message::from_vec(&answer).unwrap().answers[0]
                .data
                .to_string(),
            other => panic!("{other:?}"),
        };
    assert!(!listed(&world.view.snapshot()).contains(id(11).as_str()));
    world.state(11, MachineState::Started).await;
    let is_started = |s: &Snapshot| {
        let status = s.machine_status.get(&id(11))?;
        (status.state == MachineState::Started).then_some(())
    };
    world.view.wait_for(is_started).await;
    assert!(listed(&world.view.snapshot()).contains(id(11).as_str()));
}

#[tokio::test]
async fn addresses_have_names_inside_their_network() {
    let world = World::furnished().await;
    let s = world.view.snapshot();
    let reverse = |address: Ipv6Addr| {
        let nibbles = format!("{:032x}", u128::from(address));
        let name: String = nibbles.chars().rev().flat_map(|c| [c, '.']).collect();
        look(&s, &format!("{name}ip6.arpa."), RecordType::PTR)
    };
    assert_eq!(
        reverse(address(7, 1, 9)),
        Ok(vec!["00000000000009.vm.web.internal.".into()])
    );
    assert_eq!(
        reverse(address(7, 1, 20)),
        Ok(vec!["laptop._peer.internal.".into()])
    );
    assert_eq!(
        reverse(NetworkId(7).resolver()),
        Ok(vec!["_api.internal.".into()])
    );
    for hidden in [
        address(8, 1, 12),
        address(8, 1, 21),
        address(7, 1, 99),
        RESOLVER,
    ] {
        assert_eq!(reverse(hidden), Err(ResponseCode::NXDomain), "{hidden}");
    }
}

#[tokio::test]
async fn spelling_is_kept_and_does_not_matter() {
    let world = World::furnished().await;
    let s = world.view.snapshot();
    let answer = ask(&s, insider(), &question("WeB.InterNal.", RecordType::AAAA));
    assert_eq!(answer.answers.len(), 2);
    assert_eq!(answer.queries[0].name().to_ascii(), "WeB.InterNal.");
}

#[tokio::test]
async fn strangers_are_refused_unless_they_are_the_host_itself() {
    let world = World::furnished().await;
    let s = world.view.snapshot();
    let bytes = question("web.internal.", RecordType::AAAA)
        .to_vec()
        .unwrap();
    for from in [
        "127.0.0.1:1",
        "[::1]:1",
        "[2001:db8::1]:1",
        "[fdaa::1:0:0:1]:1",
        "[fdaa::3]:1",
    ] {
        let code = |responder: Responder| match responder.decide(
            &s,
            from.parse().unwrap(),
            Transport::Udp,
            &bytes,
        ) {
            Decision::Answer(answer) => Message::from_vec(&answer).unwrap().response_code,
            other => panic!("{other:?}"),
        };
        assert_eq!(code(Responder::new(None)), ResponseCode::Refused, "{from}");
        assert_eq!(
            code(Responder::new(Some(NetworkId(7)))),
            ResponseCode::NoError,
            "{from}"
        );
    }
}

#[tokio::test]
async fn only_other_names_are_for_upstream() {
    let world = World::new().await;
    let s = world.view.snapshot();
    let decide = |message: &Message| {
        Responder::new(None).decide(&s, insider(), Transport::Udp, &message.to_vec().unwrap())
    };
    for name in [
        "example.com.",
        "internal.example.",
        "notinternal.",
        ".",
        "1.0.0.127.in-addr.arpa.",
        "8.b.d.0.1.0.0.2.ip6.arpa.",
    ] {
        let decision = decide(&question(name, RecordType::AAAA));
        assert!(
            matches!(&decision, Decision::Forward(q) if q.network == NetworkId(7)),
            "{name}"
        );
    }
    for name in [
        "internal.",
        "a.internal.",
        "a.b.c.d.e.f.INTERNAL.",
        "a.a.d.f.ip6.arpa.",
        "1.2.3.a.a.d.f.ip6.arpa.",
    ] {
        let decision = decide(&question(name, RecordType::AAAA));
        assert!(matches!(decision, Decision::Answer(_)), "{name}");
    }
    let mut no_recursion = question("example.com.", RecordType::AAAA);
    no_recursion.metadata.recursion_desired = false;
    assert_eq!(
        ask(&s, insider(), &no_recursion).response_code,
        ResponseCode::Refused
    );
}

#[tokio::test]
async fn odd_questions_get_the_right_refusal() {
    let world = World::furnished().await;
    let s = world.view.snapshot();
    let good = question("web.internal.", RecordType::AAAA);
    let code =
        |bytes: &[u8]| match Responder::new(None).decide(&s, insider(), Transport::Udp, bytes) {
            Decision::Answer(answer) => {
                let answer = Message::from_vec(&answer).unwrap();
                assert_eq!(
                    (answer.id, answer.message_type),
                    (ID, MessageType::Response)
                );
                Some(answer.response_code)
            }
            Decision::Ignore => None,
            other => panic!("{other:?}"),
        };
    let bytes = good.to_vec().unwrap();
    assert_eq!(code(&bytes[..11]), None);
    assert_eq!(code(&bytes[..20]), Some(ResponseCode::FormErr));
    let mut response = bytes.clone();
    response[2] |= 0x80;
    assert_eq!(code(&response), None, "an answer is not answered");
    let mut update = bytes.clone();
    update[2] |= 5 << 3;
    assert_eq!(code(&update), Some(ResponseCode::NotImp));
    let mut many = bytes;
    many[4..6].copy_from_slice(&[0xff, 0xff]);
    assert_eq!(code(&many), Some(ResponseCode::FormErr));
    let mut chaos = good.clone();
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(code(&chaos.to_vec().unwrap()), Some(ResponseCode::Refused));
    let transfer = question("internal.", RecordType::AXFR).to_vec().unwrap();
    assert_eq!(code(&transfer), Some(ResponseCode::Refused));
    let mut future = good;
    future.set_edns(WireEdns::new().set_version(1).clone());
    // BADVERS shares its number with a code for signatures.
    assert_eq!(code(&future.to_vec().unwrap()).map(u16::from), Some(16));
}

#[tokio::test]
async fn an_answer_fits_or_says_that_it_does_not() {
    let world = World::new().await;
    world.app("big", 7).await;
    for number in 0..100 {
        world
            .machine("big", 7, 1, number, MachineState::Started, &[])
            .await;
    }
    world
        .view
        .wait_for(|s| s.machine_status.get(&id(99)).map(drop))
        .await;
    let s = world.view.snapshot();
    let mut asked = question("big.internal.", RecordType::AAAA);
    let mut decide = |size: Option<u16>, transport| {
        asked.edns = size.map(|size| WireEdns::new().set_max_payload(size).clone());
        match Responder::new(None).decide(&s, insider(), transport, &asked.to_vec().unwrap()) {
            Decision::Answer(bytes) => (bytes.len(), Message::from_vec(&bytes).unwrap()),
            other => panic!("{other:?}"),
        }
    };
    for (size, most) in [
        (None, 512),
        (Some(100), 512),
        (Some(1232), 1232),
        (Some(65535), 1232),
    ] {
        let (length, answer) = decide(size, Transport::Udp);
        assert!(length <= most && answer.truncation, "{size:?}: {length}");
        assert_eq!(answer.edns.is_some(), size.is_some());
    }
    let (_, whole) = decide(None, Transport::Tcp);
    assert_eq!((whole.answers.len(), whole.truncation), (100, false));
    let first = |_| decide(None, Transport::Tcp).1.answers[0].data.clone();
    let starts: Vec<_> = (0..20).map(first).collect();
    assert!(
        starts.iter().any(|s| *s != starts[0]),
        "not everybody calls the same one"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_bytes_panic(garbage in prop::collection::vec(any::<u8>(), 0..600), flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6)) {
        let snapshot = Snapshot::default();
        let responder = Responder::new(Some(NetworkId(7)));
        let mut real = question("a.kv._metadata.web.internal.", RecordType::AAAA);
        real.set_edns(WireEdns::new());
        let mut real = real.to_vec().unwrap();
        for (at, value) in flips {
            *at.get_mut(&mut real) = value;
        }
        for bytes in [garbage, real] {
            for transport in [Transport::Udp, Transport::Tcp] {
                if let Decision::Answer(answer) = responder.decide(&snapshot, insider(), transport, &bytes) {
                    prop_assert!(answer.len() >= 12 && answer[..2] == bytes[..2]);
                    prop_assert!(transport == Transport::Tcp || answer.len() <= 1232);
                }
            }
        }
    }
}

#[tokio::test]
async fn a_cordoned_machine_is_found_by_its_own_name_alone() {
    let world = World::furnished().await;
    let now = |s: &Snapshot, name: &str| look(s, &format!("{name}.internal."), RecordType::AAAA);
    let s = world.view.snapshot();
    let own = now(&s, &format!("{}.vm.web", id(10))).unwrap();
    let shared = ["web", "global.web", "ams.web", "top9.nearest.of.web"];
    let before = shared.map(|name| now(&s, name).unwrap().contains(&own[0]));
    assert!(before[0] && before[1], "{before:?}");
    let mut machine = (*s.machines[&id(10)]).clone();
    machine.cordoned = true;
    let revision = world.catalog.put(&machine).await.unwrap();
    let seen = |s: &Snapshot| (s.revision >= revision).then_some(());
    world.view.wait_for(seen).await;
    let s = world.view.snapshot();
    assert_eq!(now(&s, &format!("{}.vm.web", id(10))).unwrap(), own);
    for name in shared {
        assert!(!now(&s, name).unwrap().contains(&own[0]), "{name}");
    }
}
