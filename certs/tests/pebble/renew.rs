//! A certificate that ends soon.

use std::time::Duration;

use jiff::Timestamp;
use tern_catalog::{CertificateState, ChallengeKind, Hostname};

use crate::world::World;

/// A third of it is more than the CA's longest wait and our polling after it.
const SHORT: Duration = Duration::from_secs(90);

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_renewed_before_it_ends_and_no_visitor_notices() {
    let both = [ChallengeKind::TlsAlpn01, ChallengeKind::Http01];
    let world = World::new(&both, SHORT).await;
    let name: Hostname = "shop.tern.test".parse().unwrap();
    world.want(&name).await;
    let first = world.issued(&name).await;
    let (due, end) = (first.next_attempt.unwrap(), first.not_after.unwrap());
    assert!(Timestamp::now() < due && due < end, "{due} {end}");

    // A visitor comes all the time, and checks the validity each time.
    let old = world.browse(name.as_str()).await.unwrap();
    let new = loop {
        let leaf = world.browse(name.as_str()).await.unwrap();
        if leaf != old {
            break leaf;
        }
        let record = world.view.snapshot().certificates[&name].clone();
        assert_eq!(record.state, CertificateState::Issued);
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let now = Timestamp::now();
    assert!(due <= now && now < end, "{due} {now} {end}");

    let second = world.issued(&name).await;
    assert_ne!(
        second.key, first.key,
        "each certificate has a key of its own"
    );
    assert!(second.not_after.unwrap() > end && second.next_attempt.unwrap() > due);
    assert_eq!(second.failures, 0);
    assert_eq!(world.browse(name.as_str()).await.unwrap(), new);
    assert_eq!(world.pebble.accounts(), 1);
}
