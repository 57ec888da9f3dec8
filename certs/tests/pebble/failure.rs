//! What is refused, what is told of it, and when it is tried again.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use rcgen::generate_simple_self_signed;
use tern_catalog::{AcmeAccount, Certificate, CertificateState, ChallengeKind, Hostname};

use crate::world::{LONG, World};

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_waits_also_over_a_restart_and_then_another_challenge_is_tried() {
    let world = World::new(&[ChallengeKind::Http01], LONG).await;
    let name: Hostname = "shop.tern.test".parse().unwrap();
    world.want(&name).await;
    let failed = failure(&world, &name).await;
    assert_eq!((failed.failures, failed.key.clone()), (1, None));
    let text = failed.last_error.as_deref().unwrap();
    assert!(
        text.contains("tls-alpn-01") && text.contains("connect"),
        "an owner must learn what to repair: {text}"
    );
    let due = failed.next_attempt.unwrap();
    let wait = due.duration_since(Timestamp::now());
    assert!(
        wait > SignedDuration::from_secs(15) && wait <= SignedDuration::from_secs(25),
        "{wait}"
    );
    assert!(world.view.snapshot().challenges.is_empty());
    let accounts = world.catalog.list::<AcmeAccount>().await.unwrap();
    assert_eq!(accounts.len(), 1);

    // The new issuer waits as long as the old one would have.
    let world = world.restart(|_| {}).await;
    let challenge = world
        .wait_for("the name is tried again", |s| {
            s.challenges.values().next().cloned()
        })
        .await;
    assert!(Timestamp::now() >= due, "tried again too early");
    assert_eq!(challenge.kind, ChallengeKind::Http01);
    let issued = world.issued(&name).await;
    assert_eq!((issued.failures, &issued.last_error), (0, &None));
    world.browse(name.as_str()).await.unwrap();
    // By the account that the first issuer made.
    let now = world.catalog.list::<AcmeAccount>().await.unwrap();
    assert_eq!(now, accounts);
    assert_eq!(world.pebble.accounts(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_not_who_it_says_gets_no_account() {
    let world = World::new(&[ChallengeKind::TlsAlpn01], LONG).await;
    let other = generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let world = world
        .restart(|config| {
            let path = config.seal_key.with_file_name("other-ca.pem");
            std::fs::write(&path, other.cert.pem()).unwrap();
            config.root_ca = Some(path);
        })
        .await;
    let name: Hostname = "shop.tern.test".parse().unwrap();
    world.want(&name).await;
    let failed = failure(&world, &name).await;
    assert!(failed.next_attempt.unwrap() > Timestamp::now());
    let text = failed.last_error.as_deref().unwrap();
    assert!(text.starts_with("the directory: "), "{text}");
    assert_eq!(world.pebble.accounts(), 0);
    assert!(
        world
            .catalog
            .list::<AcmeAccount>()
            .await
            .unwrap()
            .is_empty()
    );
}

async fn failure(world: &World, name: &Hostname) -> Arc<Certificate> {
    world
        .wait_for("the attempt fails", |s| {
            let certificate = s.certificates.get(name)?;
            (certificate.state == CertificateState::Failed).then(|| Arc::clone(certificate))
        })
        .await
}
