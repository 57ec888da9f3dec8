//! The private network: a stock WireGuard client, names, and walls between organizations.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests fail by panicking")]

use anyhow::{Context as _, Result};
use tern_e2e::process::wait_for;
use tern_e2e::world::PATIENCE;
use tern_e2e::{Laptop, World};

fn resolve(laptop: &Laptop, network: &str, kind: &str, name: &str) -> Result<String> {
    let server = format!("@{network}::3");
    laptop.run(
        "dig",
        &[&server, "+tries=3", "+time=5", "+short", kind, name],
    )
}

/// `fdaa:a:b`, the /48 of an address.
fn network(address: &str) -> Result<String> {
    let parts: std::net::Ipv6Addr = address.parse()?;
    let s = parts.segments();
    Ok(format!("{:x}:{:x}:{:x}", s[0], s[1], s[2]))
}

#[test]
fn a_stock_wireguard_client_finds_the_app_by_name() -> Result<()> {
    let world = World::new("wireguard")?;
    let app = world.launch("hello", "personal")?;
    let laptop = world.joined_laptop(0, "personal")?;
    let address = app.address()?;
    let found = resolve(&laptop, &network(&address)?, "AAAA", "hello.internal")?;
    assert_eq!(found.trim(), address);
    let by_id = resolve(
        &laptop,
        &network(&address)?,
        "AAAA",
        &format!("{}.vm.hello.internal", app.machine),
    )?;
    assert_eq!(by_id.trim(), address);
    // By name, through the resolver that wg-quick set from the configuration's DNS line.
    let reply = laptop.run(
        "curl",
        &["-sf", "--max-time", "60", "http://hello.internal:8080/"],
    )?;
    assert!(reply.contains(&app.machine), "{reply}");
    Ok(())
}

#[test]
fn organizations_can_neither_reach_nor_resolve_each_other() -> Result<()> {
    let world = World::new("isolation")?;
    let ours = world.launch("ours", "personal")?;
    let theirs = world.launch("theirs", "rivals")?;
    let laptop = world.joined_laptop(0, "personal")?;
    let (our_address, their_address) = (ours.address()?, theirs.address()?);
    let (our_net, their_net) = (network(&our_address)?, network(&their_address)?);
    assert_ne!(our_net, their_net);

    let reach = |address: &str| {
        laptop.output(
            "curl",
            &[
                "-sf",
                "--max-time",
                "5",
                &format!("http://[{address}]:8080/"),
            ],
        )
    };
    wait_for("our own Machine answers", PATIENCE, || {
        Ok(reach(&our_address)?.status.success().then_some(()))
    })?;
    assert!(!reach(&their_address)?.status.success(), "over the mesh");
    // wg-quick routes only our own /48: make the laptop try in earnest, with their prefix routed and allowed.
    laptop.run(
        "ip",
        &[
            "-6",
            "route",
            "add",
            &format!("{their_net}::/48"),
            "dev",
            "wgt0",
        ],
    )?;
    let key = laptop.run("wg", &["show", "wgt0", "peers"])?;
    let both = format!("{our_net}::/48,{their_net}::/48");
    laptop.run(
        "wg",
        &["set", "wgt0", "peer", key.trim(), "allowed-ips", &both],
    )?;
    assert!(
        !reach(&their_address)?.status.success(),
        "over the mesh, with a route"
    );
    // With a source address of theirs, too.
    let spoofed = format!("{their_net}:0:1:0:77:2");
    laptop.run(
        "ip",
        &[
            "-6",
            "addr",
            "add",
            &format!("{spoofed}/128"),
            "dev",
            "wgt0",
            "nodad",
        ],
    )?;
    let url = format!("http://[{their_address}]:8080/");
    let attempt = laptop.output(
        "curl",
        &["-sf", "--max-time", "5", "--interface", &spoofed, &url],
    )?;
    assert!(!attempt.status.success(), "by a spoofed source");

    assert_eq!(
        resolve(&laptop, &our_net, "AAAA", "theirs.internal")?.trim(),
        ""
    );
    let server = format!("@{our_net}::3");
    let answer = laptop.run("dig", &[&server, "AAAA", "theirs.internal"])?;
    assert!(answer.contains("NXDOMAIN"), "{answer}");
    let apps = resolve(&laptop, &our_net, "TXT", "_apps.internal")?;
    assert!(apps.contains("ours") && !apps.contains("theirs"), "{apps}");

    // Between taps: from inside one Machine to the other, and to itself to see that the probe can succeed.
    let probe = |address: &str| {
        let target = format!("[{address}]:8080");
        let args = [
            "machine",
            "exec",
            &ours.machine,
            "--app",
            "ours",
            "--",
            "/hello",
            "probe",
            &target,
        ];
        world.server.tern_output(&args).context("exec")
    };
    assert!(probe(&our_address)?.status.success());
    assert!(!probe(&their_address)?.status.success(), "between taps");
    Ok(())
}
