//! From a wanted name to a certificate that a browser believes.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rustls::AlertDescription;
use tern_catalog::{
    AcmeAccount, Certificate, CertificateState, ChallengeKind, Hostname, HostnameRoute,
};
use tern_certs::Sealer;

use crate::world::{ACME_TLS, LONG, World, alert};

#[tokio::test(flavor = "multi_thread")]
async fn names_get_certificates_by_tls_alpn_01_and_lose_them_when_unwanted() {
    let world = World::new(&[ChallengeKind::TlsAlpn01], LONG).await;
    let names: [Hostname; 2] = ["shop.tern.test", "blog.tern.test"].map(|n| n.parse().unwrap());
    let begun = Timestamp::now();
    for name in &names {
        world.want(name).await;
    }
    for name in &names {
        let record = world.issued(name).await;
        assert_eq!((record.failures, &record.last_error), (0, &None));
        let leaf = world.browse(name.as_str()).await.unwrap();
        assert!(record.chain_pem.contains("BEGIN CERTIFICATE"));
        assert_eq!(names_of(&leaf), [name.as_str()]);
        // Renewal is due after two thirds, give or take the time this took.
        let due = record.next_attempt.unwrap().duration_since(begun);
        let expected = SignedDuration::try_from(LONG * 2 / 3).unwrap();
        assert!(
            (due - expected).abs() < SignedDuration::from_mins(5),
            "{due}"
        );
    }
    // Two orders at once and one account; it is kept, and not in clear.
    assert_eq!(world.pebble.accounts(), 1, "{}", world.pebble.log());
    let accounts = world.catalog.list::<AcmeAccount>().await.unwrap();
    assert_eq!(accounts.len(), 1);
    assert_eq!(accounts[0].directory, world.pebble.directory);

    // Nothing is left to be answered, and nothing is proved that nobody asked for.
    assert!(world.view.snapshot().challenges.is_empty());
    let refused = world.handshake(names[0].as_str(), &[ACME_TLS]).await;
    assert_eq!(
        alert(&refused.unwrap_err()),
        Some(AlertDescription::AccessDenied)
    );

    world
        .catalog
        .delete::<HostnameRoute>(names[0].as_str())
        .await
        .unwrap();
    let kept = world
        .wait_for("the unwanted certificate is put aside", |s| {
            let certificate = s.certificates.get(&names[0])?;
            certificate.unwanted_since?;
            Some(Arc::clone(certificate))
        })
        .await;
    let refused = world.browse(names[0].as_str()).await.unwrap_err();
    assert_eq!(alert(&refused), Some(AlertDescription::AccessDenied));
    world.browse(names[1].as_str()).await.unwrap();

    // Whoever deletes an app and makes it again pays no second order.
    world.want(&names[0]).await;
    let again = world
        .wait_for("the certificate is served again", |s| {
            let certificate = s.certificates.get(&names[0])?;
            (certificate.unwanted_since.is_none()).then(|| Arc::clone(certificate))
        })
        .await;
    assert_eq!(again.chain_pem, kept.chain_pem);
    let leaf = world.browse(names[0].as_str()).await.unwrap();
    assert_eq!(names_of(&leaf), [names[0].as_str()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_gets_its_certificate_by_http_01() {
    let world = World::new(&[ChallengeKind::Http01], LONG).await;
    let name: Hostname = "shop.tern.test".parse().unwrap();
    // As the first attempt leaves it, when nobody reaches the TLS port.
    let before = Certificate {
        state: CertificateState::Failed,
        next_attempt: Some(Timestamp::now()),
        failures: 1,
        last_error: Some("connection refused".to_owned()),
        ..Certificate::wanted(name.clone())
    };
    world.catalog.create(&before).await.unwrap();
    world.want(&name).await;
    world
        .wait_for("the challenge is published", |s| {
            let id = format!("{name}/http-01");
            s.challenges.contains_key(&id).then_some(())
        })
        .await;
    // A name that is known and has no certificate yet is refused, not answered with another's.
    let refused = world.browse(name.as_str()).await.unwrap_err();
    assert_eq!(alert(&refused), Some(AlertDescription::AccessDenied));

    let record = world.issued(&name).await;
    assert_eq!((record.failures, &record.last_error), (0, &None));
    assert!(world.view.snapshot().challenges.is_empty());
    let leaf = world.browse(name.as_str()).await.unwrap();
    assert_eq!(names_of(&leaf), [name.as_str()]);
    let unknown = world.browse("other.tern.test").await.unwrap_err();
    assert_eq!(alert(&unknown), Some(AlertDescription::AccessDenied));

    // The key opens for its own name alone, and is nowhere in the catalog's files.
    let sealer = Sealer::load_or_create(&world.config.seal_key).unwrap();
    let sealed = record.key.as_ref().unwrap();
    let key = sealer.open(name.as_str(), sealed).unwrap();
    assert!(sealer.open("other.tern.test", sealed).is_err());
    let (encoded, files) = (base64(&key), world.catalog_files());
    assert!(!files.is_empty());
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        let holds = |what: &[u8]| bytes.windows(what.len()).any(|w| w == what);
        assert!(!holds(&key) && !holds(encoded.as_bytes()), "{file:?}");
        assert!(!holds(b"PRIVATE KEY"), "{file:?}");
    }

    // Another start has nothing to do, and another account is not made.
    let world = world.restart(|_| {}).await;
    let mut changes = world.view.changes();
    changes.mark_unchanged();
    tokio::time::timeout(Duration::from_secs(2), changes.changed())
        .await
        .expect_err("a valid certificate is left alone");
    assert_eq!(world.browse(name.as_str()).await.unwrap(), leaf);
    assert_eq!(world.pebble.accounts(), 1);
}

/// The DNS names a certificate is for.
fn names_of(leaf: &[u8]) -> Vec<String> {
    let (_, leaf) = x509_parser::parse_x509_certificate(leaf).unwrap();
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    let names = names.value.general_names.iter();
    names
        .map(|name| match name {
            x509_parser::extensions::GeneralName::DNSName(name) => (*name).to_owned(),
            other => panic!("a certificate for {other:?}"),
        })
        .collect()
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}
