//! The public side: names, certificates, requests nobody should send.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests fail by panicking")]

use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use tern_e2e::process::{run, wait_for};
use tern_e2e::world::PATIENCE;
use tern_e2e::{Reply, World};

#[test]
fn an_unknown_host_name_gets_404_and_wakes_nothing() -> Result<()> {
    // A handshake that names the app is reason enough to wake it, whatever is asked for after it.
    let flags = ["--autostop-after", "1h", "--no-early-wake"];
    let world = World::with("unknown-host", Duration::from_secs(90 * 86_400), &flags)?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    app.machine("suspend")?;
    let reply =
        Reply::of(Command::new("curl").args(["-H", "Host: nobody.example", "http://127.0.0.1/"]))?;
    assert_eq!(reply.status, 404, "{reply:?}");
    let reply = app.curl("/", &["-H", "Host: nobody.example"])?;
    assert!(matches!(reply.status, 404 | 421), "{reply:?}");
    let redirect = Reply::of(Command::new("curl").arg(format!("http://{}/a?b=c", app.hostname)))?;
    assert_eq!(redirect.status, 301);
    assert_eq!(
        redirect.headers["location"],
        format!("https://{}/a?b=c", app.hostname)
    );
    assert_eq!(app.state()?, "suspended");
    Ok(())
}

#[test]
fn certificates_are_issued_and_renewed() -> Result<()> {
    // A life of 100 s makes a renewal due within the test.
    let world = World::with(
        "renewal",
        Duration::from_secs(100),
        &["--autostop-after", "1h"],
    )?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    let serial = || -> Result<String> {
        let name = &app.hostname;
        let script = format!(
            "openssl s_client -connect 127.0.0.1:443 -servername {name} </dev/null 2>/dev/null | openssl x509 -noout -serial"
        );
        run("sh", ["-c", &script])
    };
    let first = serial()?;
    wait_for("a new certificate is served", PATIENCE, || {
        Ok((serial()? != first).then_some(()))
    })?;
    app.wait_for_https()?;
    let listed = world.server.tern(&["certs", "list", "--app", "hello"])?;
    assert!(listed.contains(&app.hostname), "{listed}");
    Ok(())
}

#[test]
fn oversized_headers_are_refused_and_the_edge_goes_on() -> Result<()> {
    let world = World::new("headers")?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    let huge = format!("X-Huge: {}", "a".repeat(120_000));
    for version in ["--http1.1", "--http2"] {
        // A refusal may be a status, or an end of the connection; never an answer of the app.
        if let Ok(reply) = app.curl("/", &[version, "-H", &huge]) {
            assert!(matches!(reply.status, 400 | 431), "{reply:?}");
        }
        assert_eq!(app.get("/")?.status, 200);
    }
    Ok(())
}

#[test]
fn a_websocket_wakes_and_echoes() -> Result<()> {
    let world = World::new("websocket")?;
    let app = world.launch("hello", "personal")?;
    app.wait_for_https()?;
    app.machine("suspend")?;
    let reply = app.curl(
        "/ws",
        &[
            "--http1.1",
            "--max-time",
            "20",
            "-H",
            "Connection: Upgrade",
            "-H",
            "Upgrade: websocket",
            "-H",
            "Sec-WebSocket-Version: 13",
            "-H",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        ],
    );
    // curl waits for frames that nobody sends and gives up; the upgrade itself is what it saw first.
    match reply {
        Ok(reply) => assert_eq!(reply.status, 101),
        Err(error) => assert!(error.to_string().contains("timed out"), "{error}"),
    }
    // What a request has woken may answer before its host tells of it.
    app.wait_for_state("started")
}
