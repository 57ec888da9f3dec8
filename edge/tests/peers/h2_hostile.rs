//! Requests over HTTP/2 that keep to no rule, by Debian's python3-h2: what reaches the app is one well-formed
//! request, or none.

use std::process::Output;
use std::time::Duration;

use tern_edge::Limits;
use tokio::process::Command;

use crate::app::{App, Temper};
use crate::client::plain;
use crate::h2_client::H2;
use crate::world::{World, piped};

/// What came back.
async fn hostile(world: &World, case: &str) -> String {
    // The system's: no other has Debian's modules.
    let mut command = Command::new("/usr/bin/python3");
    command
        .arg(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/peers/h2_hostile.py"
        ))
        .arg(world.ca())
        .args([&world.https.port().to_string(), case]);
    let Output {
        status,
        stdout,
        stderr,
    } = piped(command, b"").await;
    let errors = String::from_utf8_lossy(&stderr);
    assert!(
        status.success(),
        "{case}: {errors}\nIs python3-h2 there? Run .ci/setup test"
    );
    String::from_utf8(stdout).unwrap()
}

#[tokio::test]
async fn probe() {
    let app = App::new(Temper::Strict).await;
    let world = World::new(app.port).await;
    let cases = hostile(&world, "list").await;
    for case in cases.lines().chain([
        "trailers-pseudo",
        "trailers-framing",
        "trailers-crlf",
        "data-after-end",
        "data-before-headers",
        "even-stream",
        "padding-too-long",
        "settings-on-stream",
        "window-overflow",
        "push",
        "bad-hpack",
        "hpack-bomb",
        "rapid-reset",
        "continuation-flood",
        "continuation-empty-flood",
        "ping-flood",
        "settings-flood",
        "empty-data-flood",
    ]) {
        let started = std::time::Instant::now();
        let said = hostile(&world, case).await;
        println!(
            "{case}: {} [{:?}]",
            said.replace('\n', "; "),
            started.elapsed()
        );
        let mut next = plain(&world).await;
        next.get("/", "next", "").await;
        next.answer().await.is_for("next");
        H2::new(&world).await.get("/", "next").await.is_for("next");
        let (whole, begun) = app.judged();
        for got in whole.iter().filter(|g| g.one("x-nonce") != Some("next")) {
            println!("    {got:?}");
        }
        println!("    begun {begun:?}");
    }
    let _ = (Limits::default(), Duration::ZERO);
}
