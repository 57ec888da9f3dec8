//! A directory that says when it wants to be asked again.

use std::time::Duration;

use http::StatusCode;
use jiff::{SignedDuration, Timestamp};
use tern_catalog::{Certificate, CertificateState, ChallengeKind, Hostname};

use crate::moody::Moody;
use crate::world::{LONG, PATIENCE, World};

async fn moody() -> (World, Moody) {
    let world = World::new(&[ChallengeKind::TlsAlpn01], LONG).await;
    let moody = world.moody().await;
    let (directory, ca) = (moody.directory.clone(), moody.ca.clone());
    let world = world
        .restart(|config| {
            config.directory = directory;
            config.root_ca = Some(ca);
        })
        .await;
    (world, moody)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_order_is_made_before_the_time_that_a_refusal_names() {
    let (world, moody) = moody().await;
    moody
        .mood
        .lock()
        .refusals
        .extend([(StatusCode::TOO_MANY_REQUESTS, "3600"); 2]);
    let name: Hostname = "shop.tern.test".parse().unwrap();
    let begun = Timestamp::now();
    world.want(&name).await;
    let held = world
        .wait_for("the refusal is noted", |s| {
            let certificate = s.certificates.get(&name)?;
            certificate
                .last_error
                .is_some()
                .then(|| certificate.clone())
        })
        .await;
    let text = held.last_error.as_deref().unwrap();
    assert!(text.contains("too many new orders"), "{text}");
    assert_eq!((held.state, held.failures), (CertificateState::Pending, 0));
    let next = held.next_attempt.unwrap().duration_since(begun);
    assert!(next >= SignedDuration::from_secs(3600), "{next}");

    // Its registered domain's other names are not tried meanwhile, also not by the next issuer.
    let world = world.restart(|_| {}).await;
    let other: Hostname = "blog.tern.test".parse().unwrap();
    world.want(&other).await;
    let other = world
        .wait_for("the other name is held", |s| {
            let certificate = s.certificates.get(&other)?;
            certificate
                .last_error
                .is_some()
                .then(|| certificate.clone())
        })
        .await;
    let text = other.last_error.as_deref().unwrap();
    assert!(text.contains("no orders for tern.test"), "{text}");
    let next = other.next_attempt.unwrap().duration_since(begun);
    assert!(next >= SignedDuration::from_secs(3600), "{next}");
    assert_eq!(moody.mood.lock().orders, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_is_long_in_the_making_is_followed_to_its_end() {
    let (world, moody) = moody().await;
    moody.mood.lock().processing = Some("120");
    let name: Hostname = "shop.tern.test".parse().unwrap();
    world.want(&name).await;
    let waits = world
        .wait_for("the wait is noted", |s| {
            let certificate = s.certificates.get(&name)?;
            certificate
                .last_error
                .is_some()
                .then(|| certificate.clone())
        })
        .await;
    let text = waits.last_error.as_deref().unwrap();
    assert!(text.contains("still working on the order"), "{text}");
    assert_eq!(
        (waits.state, waits.failures),
        (CertificateState::Pending, 0)
    );
    let order = waits.order.clone().unwrap();
    let wait = waits.next_attempt.unwrap().duration_since(order.created_at);
    assert!(wait >= SignedDuration::from_secs(120), "{wait}");

    // The wait is over: also for an issuer that did not make the order, and asks soon again when told so.
    moody.mood.lock().processing = Some("1");
    let over = Certificate {
        next_attempt: Some(Timestamp::now()),
        ..(*waits).clone()
    };
    world.catalog.put(&over).await.unwrap();
    let before = moody.mood.lock().looks;
    let world = world.restart(|_| {}).await;
    let looked = async {
        while moody.mood.lock().looks < before + 2 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, looked)
        .await
        .expect("the same order is looked at again");
    moody.mood.lock().processing = None;
    let issued = world.issued(&name).await;
    assert_eq!(
        (issued.key.as_ref(), &issued.order),
        (Some(&order.key), &None)
    );
    world.browse(name.as_str()).await.unwrap();
    assert_eq!(moody.mood.lock().orders, 1, "one order for one certificate");
}
