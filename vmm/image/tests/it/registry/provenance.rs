//! One store, several organizations: an image that is here is given to those alone who were given it.

use std::collections::BTreeMap;

use tern_image::{Budget, Digest, Image, ImageError, RegistryOptions, Source};

use super::{Auth, Registry, image};
use crate::support::Workshop;

/// `source` for somebody, by a registry that is the operator's own or not.
fn on_behalf(of: &str, trusted: bool, source: Source) -> Source {
    let Source::Registry { reference, options } = source else {
        panic!("not of a registry");
    };
    let options = RegistryOptions {
        on_behalf_of: of.to_owned(),
        trusted,
        ..options
    };
    Source::Registry { reference, options }
}

async fn ensure(workshop: &Workshop, of: &str, source: Source) -> Result<Image, ImageError> {
    let source = on_behalf(of, false, source);
    workshop.store().ensure(&source, |_| ()).await
}

/// The manifest's bytes alone: a digest leads to them, and they name the layers.
fn manifest_alone(digest: Digest) -> BTreeMap<Digest, Vec<u8>> {
    let mut image = image();
    image.manifest();
    BTreeMap::from([(digest, image.blobs.remove(&digest).unwrap())])
}

/// A registry behind a password, and a store that has its image for organization `one`.
async fn private_image() -> (Registry, Workshop, Image) {
    let registry = Registry::start(|registry| registry.auth = Auth::Basic).await;
    let workshop = Workshop::new();
    let source = registry.source("a/b:v1", Some(("me", "secret")));
    let image = ensure(&workshop, "one", source).await.unwrap();
    (registry, workshop, image)
}

#[tokio::test]
async fn a_digest_alone_opens_nobody_s_private_image() {
    let (registry, workshop, private) = private_image().await;
    let pinned = format!("a/b@{}", private.digest);
    // Its own registry does not show it to them, and another does not have it.
    let elsewhere = Registry::start(|registry| registry.blobs.clear()).await;
    for source in [
        registry.source(&pinned, None),
        registry.source(&pinned, Some(("me", "wrong"))),
        elsewhere.source(&pinned, None),
    ] {
        let error = ensure(&workshop, "two", source).await.unwrap_err();
        let refused = matches!(
            error,
            ImageError::Unauthorized { .. } | ImageError::NotFound { .. }
        );
        assert!(refused, "{error}");
    }
    // Nor to its owner under a name that it does not have there.
    let error = ensure(&workshop, "one", elsewhere.source(&pinned, None)).await;
    assert!(matches!(error.unwrap_err(), ImageError::NotFound { .. }));
    // Whom it was given to has it without asking, and without the password.
    let asked = registry.asked().len();
    let own = registry.source(&pinned, Some(("me", "secret")));
    assert_eq!(ensure(&workshop, "one", own).await.unwrap(), private);
    assert_eq!(registry.asked().len(), asked);
}

#[tokio::test]
async fn a_registry_that_says_it_has_everything_is_asked_to_show_it() {
    let (_, workshop, private) = private_image().await;
    // Made by somebody who has seen the manifest: it names the layers, but does not hold them.
    let liar = Registry::start(|registry| {
        registry.boasts = true;
        registry.blobs = manifest_alone(private.digest);
    })
    .await;
    for name in ["a/b:v1".to_owned(), format!("a/b@{}", private.digest)] {
        let error = ensure(&workshop, "two", liar.source(&name, None)).await;
        let error = error.unwrap_err();
        assert!(
            matches!(error, ImageError::NotFound { .. }),
            "{name}: {error}"
        );
    }
}

#[tokio::test]
async fn a_layer_of_another_organization_is_not_had_by_naming_it() {
    let (_, workshop, _) = private_image().await;
    // An image of one's own that names the other's layer, from a registry that says it has that.
    let mut own = image();
    let stolen: Digest = serde_json::from_value(own.layers[1]["digest"].clone()).unwrap();
    own.config["config"]["Cmd"] = serde_json::json!(["/bin/cat"]);
    let manifest = serde_json::from_value(own.manifest()["digest"].clone()).unwrap();
    own.blobs.remove(&stolen);
    let liar = Registry::start(|registry| {
        registry.boasts = true;
        registry.blobs = own.blobs;
        registry.tags.insert("v1".to_owned(), manifest);
    })
    .await;
    let error = ensure(&workshop, "two", liar.source("a/b:v1", None)).await;
    assert!(matches!(error.unwrap_err(), ImageError::NotFound { .. }));
    // It was the word alone that did not count.
    let believed = on_behalf("two", true, liar.source("a/b:v1", None));
    assert!(workshop.store().ensure(&believed, |_| ()).await.is_ok());
}

#[tokio::test]
async fn an_index_opens_no_more_than_its_image() {
    let mut index = Digest::of(b"");
    let registry = Registry::start(|registry| {
        let mut image = image();
        let manifest = image.manifest();
        let entry = image.index(&[manifest]);
        index = serde_json::from_value(entry["digest"].clone()).unwrap();
        registry.blobs = image.blobs;
    })
    .await;
    let workshop = Workshop::new();
    let pinned = format!("a/b@{index}");
    let first = ensure(&workshop, "one", registry.source(&pinned, None)).await;
    let elsewhere = Registry::start(|registry| registry.blobs.clear()).await;
    let error = ensure(&workshop, "two", elsewhere.source(&pinned, None)).await;
    assert!(matches!(error.unwrap_err(), ImageError::NotFound { .. }));
    // Where it was shown by its index, neither name needs to be asked for again.
    let asked = registry.asked().len();
    let image = first.unwrap();
    for name in [pinned, format!("a/b@{}", image.digest)] {
        let source = registry.source(&name, None);
        assert_eq!(ensure(&workshop, "one", source).await.unwrap(), image);
    }
    assert_eq!(registry.asked().len(), asked);
}

#[tokio::test]
async fn what_was_given_once_is_had_while_the_registry_is_down() {
    let registry = Registry::start(|_| ()).await;
    let workshop = Workshop::new();
    let image = ensure(&workshop, "one", registry.source("a/b:v1", None)).await;
    let image = image.unwrap();
    registry.goes_down().await;
    // `ensure` opens the store anew each time, as an agent that is restarted does.
    let source = || registry.source(&format!("a/b@{}", image.digest), None);
    assert_eq!(ensure(&workshop, "one", source()).await.unwrap(), image);
    // Somebody else has no proof to stand on.
    let error = ensure(&workshop, "two", source()).await.unwrap_err();
    assert!(matches!(error, ImageError::Registry { .. }), "{error}");
}

#[tokio::test]
async fn the_operators_registry_is_taken_at_its_word_and_others_show_what_they_have() {
    for trusted in [true, false] {
        let registry = Registry::start(|_| ()).await;
        let workshop = Workshop::new();
        let store = workshop.store();
        let layers: Vec<Digest> = image()
            .layers
            .iter()
            .map(|layer| serde_json::from_value(layer["digest"].clone()).unwrap())
            .collect();
        let mut disks = Vec::new();
        for of in ["one", "two", "two"] {
            let source = on_behalf(of, trusted, registry.source("a/b:v1", None));
            let image = store.ensure(&source, |_| ()).await.unwrap();
            disks.push(std::fs::metadata(&image.disk).unwrap());
        }
        let sent = if trusted { 1 } else { 2 };
        for layer in &layers {
            assert_eq!(registry.sent(layer), sent, "trusted: {trusted}");
        }
        // And whichever way it is proven, it is converted once.
        use std::os::unix::fs::MetadataExt;
        assert!(disks.iter().all(|disk| disk.ino() == disks[0].ino()));
    }
}

#[tokio::test]
async fn proofs_go_with_what_they_are_of() {
    let registry = Registry::start(|_| ()).await;
    let workshop = Workshop::new();
    let image = ensure(&workshop, "one", registry.source("a/b:v1", None)).await;
    let digest = image.unwrap().digest;
    let proofs = || {
        let entries = std::fs::read_dir(workshop.path("store/proofs")).unwrap();
        entries.count()
    };
    assert_eq!(proofs(), 3, "the image's and two layers'");
    let store = workshop.store();
    let nothing = Budget {
        bytes: 0,
        min_age: std::time::Duration::ZERO,
    };
    let done = store.collect(store.round(), &[digest].into(), &nothing);
    assert_eq!(done.unwrap().layers.len(), 2);
    assert_eq!(proofs(), 1);
    store.collect(store.round(), &[].into(), &nothing).unwrap();
    assert_eq!(proofs(), 0);
}
