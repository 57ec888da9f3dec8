//! The whole resolver in a network namespace, asked by `dig`.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::{A, TXT};
use hickory_proto::rr::{RData, Record};
use nix::sched::{CloneFlags, unshare};
use tern_catalog::{MachineNumber, Peer, PrivateAddress};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::process::Command;

use super::*;
use crate::testing::World;

fn machine(network: u32, host: u32, number: u32) -> Ipv6Addr {
    PrivateAddress::of_machine(NetworkId(network), HostId(host), MachineNumber(number))
}

/// Runs a test in a namespace with the addresses of Machines and of resolvers.
fn in_namespace<F: Future<Output = Result<()>>>(test: impl FnOnce() -> F) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)
        .context("network namespaces take root; run `make test`, or the test with sudo")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        run("ip", "link set lo up").await?;
        let hosts = [
            HostId(1).address(),
            RESOLVER,
            NetworkId(7).resolver(),
            NetworkId(8).resolver(),
        ];
        for address in hosts
            .into_iter()
            .chain([machine(7, 1, 9), machine(8, 1, 12)])
        {
            run("ip", &format!("addr add {address}/128 dev lo nodad")).await?;
        }
        test().await
    })
}

async fn run(program: &str, arguments: &str) -> Result<String> {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .await;
    let output = output
        .with_context(|| format!("this test needs `{program}`: apt install iproute2 dnsutils"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "{program} {arguments}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(text.into_owned())
}

/// Asks as the Machine of network 7.
async fn dig(arguments: &str) -> Result<String> {
    dig_as(machine(7, 1, 9), RESOLVER, arguments).await
}

async fn dig_as(from: Ipv6Addr, resolver: Ipv6Addr, arguments: &str) -> Result<String> {
    run(
        "dig",
        &format!("+tries=1 +time=5 -b {from} @{resolver} {arguments}"),
    )
    .await
}

async fn start(world: &World, upstreams: Vec<SocketAddr>) -> Result<Dns> {
    let config = DnsConfig {
        upstreams: Some(upstreams),
        ..DnsConfig::new(HostId(1))
    };
    Ok(Dns::start(config, world.view.clone()).await?)
}

/// Waits for a condition.
async fn wait_for<F: Future<Output = bool>>(
    what: &str,
    mut holds: impl FnMut() -> F,
) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds().await {
        ensure!(Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// A resolver of somebody else's, that counts.
struct Upstream {
    address: SocketAddr,
    asked: Arc<AtomicUsize>,
}

impl Upstream {
    async fn new() -> Result<Self> {
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = udp.local_addr()?;
        let tcp = TcpListener::bind(address).await?;
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        tokio::spawn(async move {
            let mut buffer = vec![0; 4096];
            while let Ok((length, from)) = udp.recv_from(&mut buffer).await {
                count.fetch_add(1, Relaxed);
                for answer in upstream_answers(&buffer[..length], false) {
                    let _ = udp.send_to(&answer, from).await;
                }
            }
        });
        let count = Arc::clone(&asked);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = tcp.accept().await {
                count.fetch_add(1, Relaxed);
                let Ok(length) = stream.read_u16().await else {
                    continue;
                };
                let mut question = vec![0; length.into()];
                if stream.read_exact(&mut question).await.is_ok() {
                    for answer in upstream_answers(&question, true) {
                        let _ = stream.write_u16(answer.len() as u16).await;
                        let _ = stream.write_all(&answer).await;
                    }
                }
            }
        });
        Ok(Self { address, asked })
    }

    fn asked(&self) -> usize {
        self.asked.load(Relaxed)
    }
}

/// What the other resolver says, by the name that is asked for.
fn upstream_answers(question: &[u8], over_tcp: bool) -> Vec<Vec<u8>> {
    let asked = Message::from_vec(question).unwrap();
    assert!(asked.recursion_desired);
    let query = &asked.queries[0];
    let name = query.name().to_lowercase().to_ascii();
    let mut answer = Message::response(asked.id, asked.op_code);
    answer.metadata.recursion_available = true;
    answer.add_query(query.clone());
    match name.split('.').next().unwrap_or_default() {
        "silent" => return Vec::new(),
        "big" if !over_tcp => answer.metadata.truncation = true,
        "big" => {
            let text = TXT::new(vec!["x".repeat(255); 20]);
            answer.add_answer(Record::from_rdata(
                query.name().clone(),
                60,
                RData::TXT(text),
            ));
        }
        "forged" => {
            // First somebody else's number, then another question, then the truth.
            let mut lies = [answer.clone(), answer.clone()];
            lies[0].metadata.id ^= 1;
            lies[1].queries[0]
                .set_name(hickory_proto::rr::Name::from_ascii("other.example.").unwrap());
            for lie in &mut lies {
                let lie_data = RData::A(A(Ipv4Addr::new(6, 6, 6, 6)));
                lie.add_answer(Record::from_rdata(query.name().clone(), 60, lie_data));
            }
            let truth = RData::A(A(Ipv4Addr::new(192, 0, 2, 1)));
            answer.add_answer(Record::from_rdata(query.name().clone(), 60, truth));
            return lies
                .iter()
                .chain([&answer])
                .map(|m| m.to_vec().unwrap())
                .collect();
        }
        "gone" => answer.metadata.response_code = ResponseCode::NXDomain,
        _ => {
            let data = RData::A(A(Ipv4Addr::new(192, 0, 2, 1)));
            answer.add_answer(Record::from_rdata(query.name().clone(), 60, data));
        }
    }
    vec![answer.to_vec().unwrap()]
}

#[test]
fn netns_dig_finds_machines_and_only_its_own() -> Result<()> {
    in_namespace(|| async {
        let world = World::furnished().await;
        let upstream = Upstream::new().await?;
        let dns = start(&world, vec![upstream.address]).await?;
        let both = [machine(7, 1, 9), machine(7, 2, 10)].map(|a| a.to_string());
        for how in [
            "",
            "+tcp",
            "+noedns",
            "+bufsize=512",
            "+dnssec",
            "+nocookie",
        ] {
            let short = dig(&format!("+short {how} AAAA wEb.internal")).await?;
            let mut found: Vec<_> = short.lines().collect();
            found.sort_unstable();
            ensure!(found == both, "{how}: {short}");
        }
        let full = dig("AAAA web.internal").await?;
        ensure!(
            full.contains("flags: qr aa rd ra;") && full.contains("\t5\tIN\tAAAA\t"),
            "{full}"
        );
        ensure!(!full.contains("WARNING"), "{full}");
        ensure!(dig("+short TXT regions.web.internal").await? == "\"ams,fra\"\n");
        let name = dig(&format!("+short -x {}", machine(7, 1, 9))).await?;
        ensure!(name == "00000000000009.vm.web.internal.\n", "{name}");

        for (from, resolver, name, status) in [
            (machine(7, 1, 9), RESOLVER, "web", "NOERROR"),
            (machine(7, 1, 9), NetworkId(7).resolver(), "web", "NOERROR"),
            (machine(7, 1, 9), RESOLVER, "secret", "NXDOMAIN"),
            (machine(8, 1, 12), RESOLVER, "web", "NXDOMAIN"),
            (
                machine(8, 1, 12),
                NetworkId(8).resolver(),
                "secret",
                "NOERROR",
            ),
            (HostId(1).address(), RESOLVER, "web", "REFUSED"),
        ] {
            // The network of a laptop is bound a moment after the start.
            wait_for(&format!("{resolver}"), || async {
                dig_as(from, resolver, "AAAA nothing.internal")
                    .await
                    .is_ok()
            })
            .await?;
            let answer = dig_as(from, resolver, &format!("AAAA {name}.internal")).await?;
            ensure!(
                answer.contains(&format!("status: {status}")),
                "{from} {name}: {answer}"
            );
            ensure!(
                status != "NXDOMAIN" || answer.contains("\tSOA\t_api.internal."),
                "{answer}"
            );
        }
        ensure!(
            upstream.asked() == 0,
            "no name of ours is ever asked for elsewhere"
        );
        dns.shutdown().await;
        ensure!(
            dig("AAAA web.internal").await.is_err(),
            "nobody answers any more"
        );
        Ok(())
    })
}

#[test]
fn netns_resolvers_come_and_go_with_their_networks() -> Result<()> {
    in_namespace(|| async {
        let world = World::furnished().await;
        let _dns = start(&world, Vec::new()).await?;
        // Not there yet when it is bound: the mesh may be later.
        let (nine, own) = (NetworkId(9).resolver(), machine(9, 1, 1));
        world.peer("late", 9, 1).await;
        let answers = || async {
            dig_as(own, nine, "TXT _peer.internal")
                .await
                .unwrap_or_default()
        };
        run("ip", &format!("addr add {own}/128 dev lo nodad")).await?;
        run("ip", &format!("addr add {nine}/128 dev lo nodad")).await?;
        wait_for("the network's resolver", || async {
            answers().await.contains("\"late\"")
        })
        .await?;
        world.catalog.delete::<Peer>("9/late").await?;
        wait_for("its end", || async { answers().await.is_empty() }).await?;
        world.peer("back", 9, 1).await;
        wait_for("its return", || async {
            answers().await.contains("\"back\"")
        })
        .await
    })
}

#[test]
fn netns_other_names_are_asked_for_upstream() -> Result<()> {
    in_namespace(|| async {
        let world = World::furnished().await;
        let upstream = Upstream::new().await?;
        // The first of the two is dead, and says so.
        let closed = UdpSocket::bind("127.0.0.1:0").await?.local_addr()?;
        let dns = start(&world, vec![closed, upstream.address]).await?;
        ensure!(dig("+short A known.example").await? == "192.0.2.1\n");
        let again = dig("A KNOWN.example").await?;
        ensure!(
            again.contains("192.0.2.1") && again.contains("KNOWN.example"),
            "{again}"
        );
        ensure!(upstream.asked() == 1, "the second answer was kept");
        ensure!(dig("+short +tcp A known.example").await? == "192.0.2.1\n");
        ensure!(dig("+short A forged.example").await? == "192.0.2.1\n");
        ensure!(dig("A gone.example").await?.contains("status: NXDOMAIN"));
        let big = dig("TXT big.example").await?;
        ensure!(
            big.matches("xxxx").count() > 100 && big.contains("(TCP)"),
            "{big}"
        );
        let truncated = dig("+ignore TXT big.example").await?;
        ensure!(truncated.contains(" tc "), "{truncated}");

        let before = Instant::now();
        let silent = dig("A silent.example").await?;
        ensure!(silent.contains("status: SERVFAIL"), "{silent}");
        ensure!(before.elapsed() < Duration::from_secs(4));
        ensure!(
            dig("+norecurse A other.example")
                .await?
                .contains("status: REFUSED")
        );
        dns.shutdown().await;

        let dns = start(&world, vec![closed]).await?;
        let before = Instant::now();
        ensure!(dig("A known.example").await?.contains("status: SERVFAIL"));
        ensure!(
            before.elapsed() < Duration::from_secs(1),
            "a refusal needs no waiting"
        );
        ensure!(dig("+short TXT _apps.internal").await? == "\"empty,web\"\n");
        dns.shutdown().await;
        Ok(())
    })
}

#[test]
fn netns_slow_names_of_one_network_stop_nobody() -> Result<()> {
    in_namespace(|| async {
        let world = World::furnished().await;
        let upstream = Upstream::new().await?;
        let _dns = start(&world, vec![upstream.address]).await?;
        let socket = UdpSocket::bind((machine(7, 1, 9), 0)).await?;
        let mut question = crate::wire::tests::asked("silent.example.");
        for n in 0..2000u16 {
            question[..2].copy_from_slice(&n.to_be_bytes());
            socket.send_to(&question, (RESOLVER, 53)).await?;
            // Answered at once, as it is one too many, or taken on.
            if n % 50 == 0 {
                tokio::task::yield_now().await;
            }
        }
        let other = dig_as(machine(8, 1, 12), RESOLVER, "+short A known.example").await?;
        ensure!(other == "192.0.2.1\n");
        ensure!(dig("+short TXT _apps.internal").await? == "\"empty,web\"\n");
        ensure!(
            upstream.asked() <= 2 * 128 + 1,
            "{} questions were passed on",
            upstream.asked()
        );
        Ok(())
    })
}

#[test]
fn netns_garbage_stops_nobody() -> Result<()> {
    in_namespace(|| async {
        let world = World::furnished().await;
        let upstream = Upstream::new().await?;
        let _dns = start(&world, vec![upstream.address]).await?;
        let socket = UdpSocket::bind((machine(7, 1, 9), 0)).await?;
        let real = crate::wire::tests::asked("a.kv._metadata.web.internal.");
        let mut state = 1u32;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state
        };
        for n in 0..20_000 {
            let mut bytes = real.clone();
            if n % 2 == 0 {
                bytes = (0..random() % 600).map(|_| random() as u8).collect();
            } else {
                let at = random() as usize % bytes.len();
                bytes[at] = random() as u8;
            }
            socket.send_to(&bytes, (RESOLVER, 53)).await?;
            if n % 100 == 0 {
                tokio::task::yield_now().await;
            }
        }
        // Connections that say nothing, nonsense, or half of something.
        let mut kept = Vec::new();
        for n in 0..200u16 {
            let mut stream = TcpStream::connect((RESOLVER, 53)).await?;
            let _ = stream
                .write_all(&vec![random() as u8; usize::from(n % 50)])
                .await;
            kept.push(stream);
        }
        ensure!(dig("+short TXT _apps.internal").await? == "\"empty,web\"\n");
        // Who took all of its share has no more; others do.
        let theirs = dig_as(
            machine(8, 1, 12),
            RESOLVER,
            "+tcp +short TXT _apps.internal",
        )
        .await?;
        ensure!(theirs == "\"secret\"\n");
        Ok(())
    })
}

#[test]
fn netns_pipelined_questions_are_not_held_up() -> Result<()> {
    in_namespace(|| async {
        let world = World::furnished().await;
        let upstream = Upstream::new().await?;
        let _dns = start(&world, vec![upstream.address]).await?;
        let socket = tokio::net::TcpSocket::new_v6()?;
        socket.bind((machine(7, 1, 9), 0).into())?;
        let mut stream = socket.connect((RESOLVER, 53).into()).await?;
        for (id, name) in [
            (1u16, "silent.example."),
            (2, "web.internal."),
            (3, "known.example."),
        ] {
            let mut question = crate::wire::tests::asked(name);
            question[..2].copy_from_slice(&id.to_be_bytes());
            stream.write_u16(question.len() as u16).await?;
            stream.write_all(&question).await?;
        }
        let mut order = Vec::new();
        for _ in 0..3 {
            let mut answer = vec![0; stream.read_u16().await?.into()];
            stream.read_exact(&mut answer).await?;
            order.push(answer[1]);
        }
        ensure!(order == [2, 3, 1], "{order:?}");
        Ok(())
    })
}

#[test]
fn netns_a_taken_address_is_named() -> Result<()> {
    in_namespace(|| async {
        let world = World::new().await;
        let _there = UdpSocket::bind((RESOLVER, 53)).await?;
        let error = start(&world, Vec::new())
            .await
            .err()
            .context("it must not start")?;
        ensure!(error.to_string().contains("[fdaa::3]:53"), "{error}");
        Ok(())
    })
}
