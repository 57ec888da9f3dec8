//! A registry that can be made difficult.

mod provenance;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine;
use bytes::Bytes;
use futures::{StreamExt, stream};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_RANGE, LOCATION, RANGE, WWW_AUTHENTICATE};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tern_image::{
    Budget, Credentials, Digest, ImageError, ImageStore, Reference, RegistryOptions, Source,
};
use tokio::net::TcpListener;

use crate::support::{Layer, TestImage, Workshop};

#[derive(Clone, Copy, PartialEq)]
enum Auth {
    None,
    Basic,
    Token,
}

/// How the registry behaves.
struct Behaviour {
    auth: Auth,
    /// Where blobs are redirected to.
    elsewhere: Option<SocketAddr>,
    /// Blobs are redirected to themselves.
    circular: bool,
    /// Bodies break off after so many bytes.
    breaks_after: Option<usize>,
    ranges: bool,
    /// Says 503 so many times.
    unavailable: Mutex<u32>,
    /// Says yes to whoever asks whether it has something.
    boasts: bool,
    tags: BTreeMap<String, Digest>,
    blobs: BTreeMap<Digest, Vec<u8>>,
}

/// A server of test images; remembers what it was asked.
#[derive(Clone)]
struct Registry {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    accepting: tokio::task::AbortHandle,
}

#[derive(Debug, Clone)]
struct Asked {
    path: String,
    authorization: Option<String>,
    range: Option<String>,
    head: bool,
}

type Body = BoxBody<Bytes, std::io::Error>;
fn answer(
    address: SocketAddr,
    kept: &Mutex<Vec<Asked>>,
    behaviour: &Behaviour,
    request: &Request<Incoming>,
) -> Response<Body> {
    let header = |name| {
        request
            .headers()
            .get(name)
            .map(|value| value.to_str().unwrap().to_owned())
    };
    let asked = Asked {
        path: request.uri().to_string(),
        authorization: header(AUTHORIZATION),
        range: header(RANGE),
        head: request.method() == hyper::Method::HEAD,
    };
    kept.lock().unwrap().push(asked.clone());

    let path = request.uri().path();
    let basic = format!(
        "Basic {}",
        base64::prelude::BASE64_STANDARD.encode("me:secret")
    );
    if path == "/token" {
        return if asked.authorization == Some(basic) {
            text(StatusCode::OK, json!({"token": "t0ken"}).to_string())
        } else {
            text(StatusCode::UNAUTHORIZED, String::new())
        };
    }
    let (challenge, wanted) = match behaviour.auth {
        Auth::None => (String::new(), None),
        Auth::Basic => ("Basic realm=\"x\"".to_owned(), Some(basic)),
        Auth::Token => (
            format!(
                r#"Bearer realm="http://{}/token",service="here",scope="repository:a/b:pull""#,
                address
            ),
            Some("Bearer t0ken".to_owned()),
        ),
    };
    if wanted.is_some() && asked.authorization != wanted {
        let mut response = text(StatusCode::UNAUTHORIZED, String::new());
        response
            .headers_mut()
            .insert(WWW_AUTHENTICATE, challenge.parse().unwrap());
        return response;
    }
    {
        let mut unavailable = behaviour.unavailable.lock().unwrap();
        if *unavailable > 0 {
            *unavailable -= 1;
            return text(StatusCode::SERVICE_UNAVAILABLE, String::new());
        }
    }
    if behaviour.boasts && asked.head {
        return text(StatusCode::OK, String::new());
    }
    let elsewhere = behaviour
        .elsewhere
        .or(behaviour.circular.then_some(address));
    if let (Some(elsewhere), true) = (elsewhere, path.contains("/blobs/")) {
        let mut response = text(StatusCode::TEMPORARY_REDIRECT, String::new());
        let to = format!("http://{elsewhere}{path}");
        response.headers_mut().insert(LOCATION, to.parse().unwrap());
        return response;
    }
    let blob = path.strip_prefix("/v2/a/b/").and_then(|rest| {
        let name = rest.split('/').nth(1)?;
        let digest = behaviour
            .tags
            .get(name)
            .copied()
            .or_else(|| name.parse().ok())?;
        behaviour.blobs.get(&digest)
    });
    match blob {
        Some(blob) => send(behaviour, blob, asked.range.as_deref()),
        None => text(StatusCode::NOT_FOUND, json!({"errors": []}).to_string()),
    }
}

fn send(behaviour: &Behaviour, blob: &[u8], range: Option<&str>) -> Response<Body> {
    let from: usize = match range.filter(|_| behaviour.ranges) {
        Some(range) => range
            .strip_prefix("bytes=")
            .unwrap()
            .strip_suffix('-')
            .unwrap()
            .parse()
            .unwrap(),
        None => 0,
    };
    let rest = &blob[from..];
    let sent = behaviour.breaks_after.unwrap_or(usize::MAX).min(rest.len());
    let data = Frame::data(Bytes::copy_from_slice(&rest[..sent]));
    let breaks = sent < rest.len();
    let broken = stream::once(async {
        // The server sends what it has when there is nothing more to be had for now.
        for _ in 0..8 {
            tokio::task::yield_now().await;
        }
        Err(std::io::Error::other("broken on purpose"))
    });
    let frames = stream::iter([Ok(data)]).chain(broken.take(usize::from(breaks)));
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(frames)));
    let length = rest.len().to_string();
    response
        .headers_mut()
        .insert("content-length", length.parse().unwrap());
    if from > 0 {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        let range = format!("bytes {from}-{}/{}", blob.len() - 1, blob.len());
        response
            .headers_mut()
            .insert(CONTENT_RANGE, range.parse().unwrap());
    }
    response
}

impl Registry {
    async fn start(change: impl FnOnce(&mut Behaviour)) -> Self {
        let mut image = image();
        let manifest: Digest = serde_json::from_value(image.manifest()["digest"].clone()).unwrap();
        let mut behaviour = Behaviour {
            auth: Auth::None,
            elsewhere: None,
            circular: false,
            breaks_after: None,
            ranges: true,
            unavailable: Mutex::new(0),
            boasts: false,
            tags: BTreeMap::from([("v1".to_owned(), manifest)]),
            blobs: image.blobs,
        };
        change(&mut behaviour);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let behaviour = Arc::new(behaviour);
        let kept = Arc::clone(&asked);
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (behaviour, kept) = (Arc::clone(&behaviour), Arc::clone(&kept));
                tokio::spawn(async move {
                    let service = service_fn(|request| {
                        let response = answer(address, &kept, &behaviour, &request);
                        async { Ok::<_, Infallible>(response) }
                    });
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Self {
            address,
            asked,
            accepting: accepting.abort_handle(),
        }
    }

    /// Nobody reaches it any more.
    async fn goes_down(&self) {
        self.accepting.abort();
        while tokio::net::TcpStream::connect(self.address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    }
}

impl Registry {
    fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    fn source(&self, name: &str, credentials: Option<(&str, &str)>) -> Source {
        Source::Registry {
            reference: format!("{}/{name}", self.address).parse().unwrap(),
            options: RegistryOptions {
                insecure: true,
                anywhere: true,
                credentials: credentials.map(|(username, password)| Credentials {
                    username: username.to_owned(),
                    password: password.to_owned(),
                }),
                ..RegistryOptions::default()
            },
        }
    }
}

fn text(status: StatusCode, text: String) -> Response<Body> {
    let body = Full::new(Bytes::from(text))
        .map_err(|never| match never {})
        .boxed();
    Response::builder().status(status).body(body).unwrap()
}

fn image() -> TestImage {
    // Content that gzip cannot shrink: bodies are to be long.
    let mut state = 1u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
    .take(500_000)
    .collect();
    TestImage::new([
        Layer::new().file("a", "b"),
        Layer::new().file("noise", noise),
    ])
}

async fn ensure(workshop: &Workshop, source: &Source) -> Result<tern_image::Image, ImageError> {
    workshop.store().ensure(source, |_| ()).await
}

/// Checks that what came is the image.
async fn assert_comes_whole(source: &Source) {
    let (workshop, local) = (Workshop::new(), Workshop::new());
    let pulled = ensure(&workshop, source).await.unwrap();
    let expected = local.convert(image()).await.unwrap();
    assert_eq!(pulled.digest, expected.digest);
    assert!(std::fs::read(pulled.disk).unwrap() == std::fs::read(expected.disk).unwrap());
}

#[tokio::test]
async fn pulls_by_tag_and_by_digest() {
    let registry = Registry::start(|_| ()).await;
    let workshop = Workshop::new();
    let by_tag = ensure(&workshop, &registry.source("a/b:v1", None))
        .await
        .unwrap();
    let asked = registry.asked().len();
    assert_eq!(
        asked,
        4,
        "manifest, configuration, two layers: {:?}",
        registry.asked()
    );

    // By digest there is nothing to ask for.
    let pinned = registry.source(&format!("a/b@{}", by_tag.digest), None);
    assert_eq!(ensure(&workshop, &pinned).await.unwrap(), by_tag);
    assert_eq!(registry.asked().len(), asked);
    // By tag it is only looked up.
    assert_eq!(
        ensure(&workshop, &registry.source("a/b:v1", None))
            .await
            .unwrap(),
        by_tag
    );
    assert_eq!(registry.asked().len(), asked + 1);

    assert_comes_whole(&pinned).await;
}

#[tokio::test]
async fn what_does_not_exist_is_not_found() {
    let registry = Registry::start(|_| ()).await;
    for name in ["a/b:v2", "a/c:v1", &format!("a/b@{}", Digest::of(b"?"))] {
        let error = ensure(&Workshop::new(), &registry.source(name, None))
            .await
            .unwrap_err();
        assert!(
            matches!(error, ImageError::NotFound { .. }),
            "{name}: {error}"
        );
    }
}

#[tokio::test]
async fn logs_in_with_a_password_or_for_a_token() {
    for auth in [Auth::Basic, Auth::Token] {
        let registry = Registry::start(|registry| registry.auth = auth).await;
        assert_comes_whole(&registry.source("a/b:v1", Some(("me", "secret")))).await;
        let asked = registry.asked();
        if auth == Auth::Token {
            assert_eq!(
                asked[1].path,
                "/token?service=here&scope=repository%3Aa%2Fb%3Apull"
            );
            assert_eq!(
                asked
                    .iter()
                    .filter(|asked| asked.path.contains("/token"))
                    .count(),
                1
            );
        }
        for credentials in [None, Some(("me", "wrong"))] {
            let source = registry.source("a/b:v1", credentials);
            let error = ensure(&Workshop::new(), &source).await.unwrap_err();
            assert!(matches!(error, ImageError::Unauthorized { .. }), "{error}");
        }
    }
}

#[tokio::test]
async fn credentials_do_not_follow_a_redirect_to_another_server() {
    let elsewhere = Registry::start(|_| ()).await;
    let registry = Registry::start(|registry| {
        registry.auth = Auth::Token;
        registry.elsewhere = Some(elsewhere.address);
    })
    .await;
    assert_comes_whole(&registry.source("a/b:v1", Some(("me", "secret")))).await;
    assert_eq!(elsewhere.asked().len(), 3);
    assert!(
        elsewhere
            .asked()
            .iter()
            .all(|asked| asked.authorization.is_none())
    );
}

#[tokio::test]
async fn redirects_in_a_circle_end() {
    let registry = Registry::start(|registry| registry.circular = true).await;
    let workshop = Workshop::new();
    let message = workshop.refusal_of(&registry.source("a/b:v1", None)).await;
    assert!(message.contains("redirects too often"), "{message}");
}

#[tokio::test]
async fn a_download_that_breaks_off_goes_on_where_it_stopped() {
    for ranges in [true, false] {
        let registry = Registry::start(|registry| {
            registry.breaks_after = Some(200_000);
            registry.ranges = ranges;
        })
        .await;
        let source = registry.source("a/b:v1", None);
        if ranges {
            assert_comes_whole(&source).await;
            let ranges: Vec<String> = registry
                .asked()
                .into_iter()
                .filter_map(|asked| asked.range)
                .collect();
            assert_eq!(ranges, ["bytes=200000-", "bytes=400000-"]);
        } else {
            // Without ranges it never gets beyond the same point: that must end.
            let error = ensure(&Workshop::new(), &source).await.unwrap_err();
            assert!(error.to_string().contains("broke off"), "{error}");
        }
    }
}

#[tokio::test]
async fn a_registry_that_is_busy_is_asked_again() {
    let registry = Registry::start(|registry| registry.unavailable = Mutex::new(2)).await;
    assert_comes_whole(&registry.source("a/b:v1", None)).await;

    let registry = Registry::start(|registry| registry.unavailable = Mutex::new(1000)).await;
    let error = ensure(&Workshop::new(), &registry.source("a/b:v1", None))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("503"), "{error}");
    assert!(registry.asked().len() < 10);
}

#[tokio::test]
async fn wrong_content_is_refused() {
    fn spoil(blobs: &mut BTreeMap<Digest, Vec<u8>>, chosen: impl Fn(&[u8]) -> bool) {
        let blob = blobs.values_mut().find(|blob| chosen(blob)).unwrap();
        let middle = blob.len() / 2;
        blob[middle] ^= 1;
    }
    let is_layer = |blob: &[u8]| blob.len() > 100_000;
    let registry = Registry::start(|registry| spoil(&mut registry.blobs, is_layer)).await;
    let workshop = Workshop::new();
    let message = workshop.refusal_of(&registry.source("a/b:v1", None)).await;
    assert!(
        message.starts_with("layer 2 (") && message.contains("damaged"),
        "{message}"
    );

    // A manifest other than the one asked for.
    let mut other = TestImage::new([]);
    let wanted: Digest = serde_json::from_value(image().manifest()["digest"].clone()).unwrap();
    other.manifest();
    let registry = Registry::start(|registry| {
        let manifest: Value = serde_json::from_slice(&registry.blobs[&wanted]).unwrap();
        let text = serde_json::to_vec_pretty(&manifest).unwrap();
        registry.blobs.insert(wanted, text);
    })
    .await;
    let source = registry.source(&format!("a/b@{wanted}"), None);
    assert!(
        workshop
            .refusal_of(&source)
            .await
            .contains("the manifest is damaged")
    );

    // A blob without an end.
    let registry = Registry::start(|registry| {
        let layer = registry
            .blobs
            .values_mut()
            .find(|blob| is_layer(blob))
            .unwrap();
        layer.extend(vec![0; 1 << 20]);
    })
    .await;
    let message = workshop.refusal_of(&registry.source("a/b:v1", None)).await;
    assert!(message.contains("at least"), "{message}");
}

#[tokio::test]
async fn a_registry_that_is_not_there_or_speaks_no_tls_is_named() {
    let registry = Registry::start(|_| ()).await;
    let reference: Reference = format!("{}/a/b:v1", registry.address).parse().unwrap();
    let source = Source::Registry {
        reference,
        options: RegistryOptions {
            anywhere: true,
            ..RegistryOptions::default()
        },
    };
    let workshop = Workshop::new();
    let message = workshop.refusal_of(&source).await;
    assert!(message.contains(&registry.address.to_string()), "{message}");
    assert!(
        registry.asked().is_empty(),
        "plain http without being told to"
    );
}

#[tokio::test]
async fn a_dropped_store_leaves_no_download_behind() {
    let registry = Registry::start(|_| ()).await;
    let workshop = Workshop::new();
    let store: ImageStore = workshop.store();
    let source = registry.source("a/b:v1", None);
    let mut task = Box::pin(store.ensure(&source, |_| ()));
    // Let it get as far as its first request.
    while registry.asked().is_empty() {
        tokio::select! {
            done = &mut task => { done.unwrap(); }
            () = tokio::task::yield_now() => {}
        }
    }
    drop(task);
    assert!(ensure(&workshop, &source).await.is_ok());
}

#[tokio::test]
async fn a_reference_cannot_make_the_host_visit_its_own_network() {
    let inside = Registry::start(|_| ()).await;
    let port = inside.address.port();
    let workshop = Workshop::new();
    for host in ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]"] {
        let source = Source::Registry {
            reference: format!("{host}:{port}/a/b:v1").parse().unwrap(),
            options: RegistryOptions {
                insecure: true,
                ..RegistryOptions::default()
            },
        };
        let message = workshop.refusal_of(&source).await;
        assert!(message.contains("public Internet"), "{host}: {message}");
    }
    assert!(inside.asked().is_empty(), "{:?}", inside.asked());
}

/// Two images of one base, under `v1` and `v2`, and the base's digest.
fn two_of_a_base() -> (BTreeMap<Digest, Vec<u8>>, [Digest; 2], Digest) {
    let noise = |seed: u64| -> Vec<u8> {
        let mut state = seed;
        std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .take(300_000)
        .collect()
    };
    let base = || Layer::new().file("base", noise(7));
    let app = |seed: u64| {
        // Several layers more than come at once.
        let own = (0..6).map(|n| Layer::new().file(&format!("own{n}"), noise(seed + n)));
        TestImage::new(std::iter::once(base()).chain(own))
    };
    let (mut one, mut two) = (app(100), app(200));
    let shared: Digest = serde_json::from_value(one.layers[0]["digest"].clone()).unwrap();
    let digest = |manifest: Value| serde_json::from_value(manifest["digest"].clone()).unwrap();
    let manifests = [digest(one.manifest()), digest(two.manifest())];
    let mut blobs = one.blobs;
    blobs.append(&mut two.blobs);
    (blobs, manifests, shared)
}

async fn registry_of_two() -> (Registry, [Digest; 2], Digest) {
    let (blobs, manifests, shared) = two_of_a_base();
    let registry = Registry::start(|registry| {
        registry.blobs = blobs;
        for (tag, manifest) in ["v1", "v2"].into_iter().zip(manifests) {
            registry.tags.insert(tag.to_owned(), manifest);
        }
    })
    .await;
    (registry, manifests, shared)
}

impl Registry {
    fn sent(&self, digest: &Digest) -> usize {
        let asked = self.asked();
        let of = |asked: &&Asked| !asked.head && asked.path.ends_with(&digest.to_string());
        asked.iter().filter(of).count()
    }
}

#[tokio::test]
async fn a_base_is_fetched_once_whoever_asks_and_the_disks_are_right() {
    let (registry, manifests, shared) = registry_of_two().await;
    let workshop = Workshop::new();
    let store = workshop.store();
    let asking = (0..12).map(|n| {
        let (store, source) = (
            store.clone(),
            registry.source(["a/b:v1", "a/b:v2"][n % 2], None),
        );
        async move { store.ensure(&source, |_| ()).await.unwrap() }
    });
    let images = futures::future::join_all(asking).await;
    for (n, image) in images.iter().enumerate() {
        assert_eq!(image.digest, manifests[n % 2]);
        // One at a time, elsewhere: the same bytes.
        let alone = Workshop::new();
        if n < 2 {
            let source = registry.source(&format!("a/b@{}", image.digest), None);
            let other = alone.store().ensure(&source, |_| ()).await.unwrap();
            assert!(std::fs::read(&image.disk).unwrap() == std::fs::read(other.disk).unwrap());
        }
    }
    // Once for the store, once for each of the two others.
    assert_eq!(registry.sent(&shared), 3);
    assert_eq!(workshop.layers().len(), 13);
}

#[tokio::test]
async fn a_kept_layer_that_has_gone_bad_is_fetched_again() {
    let (registry, manifests, shared) = registry_of_two().await;
    let workshop = Workshop::new();
    ensure(&workshop, &registry.source("a/b:v1", None))
        .await
        .unwrap();
    let path = workshop.path("store/layers").join(shared.file_stem());
    let length = std::fs::metadata(&path).unwrap().len();
    std::fs::write(&path, vec![0; usize::try_from(length).unwrap()]).unwrap();
    let second = registry.source("a/b:v2", None);
    assert!(ensure(&workshop, &second).await.is_err());
    assert_eq!(
        ensure(&workshop, &second).await.unwrap().digest,
        manifests[1]
    );
    assert_eq!(registry.sent(&shared), 2);
}

#[tokio::test]
async fn a_kept_layer_is_used_only_for_those_whom_the_registry_would_give_it() {
    let (registry, manifests, shared) = registry_of_two().await;
    let workshop = Workshop::new();
    ensure(&workshop, &registry.source("a/b:v1", None))
        .await
        .unwrap();
    // Another registry, whose image names the layer without having it.
    let (mut blobs, _, _) = two_of_a_base();
    blobs.remove(&shared);
    let other = Registry::start(|registry| {
        registry.blobs = blobs;
        registry.tags.insert("v2".to_owned(), manifests[1]);
    })
    .await;
    let error = ensure(&workshop, &other.source("a/b:v2", None))
        .await
        .unwrap_err();
    assert!(matches!(error, ImageError::NotFound { .. }), "{error}");
}

#[tokio::test]
async fn an_image_pinned_by_its_index_is_found_without_asking() {
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
    let source = registry.source(&format!("a/b@{index}"), None);
    let first = ensure(&workshop, &source).await.unwrap();
    let asked = registry.asked().len();
    assert_eq!(ensure(&workshop, &source).await.unwrap(), first);
    assert_eq!(registry.asked().len(), asked);
    assert_eq!(workshop.store().given(&source), Some(first.digest));
}

#[tokio::test]
async fn collection_spares_what_is_used_held_or_just_handed_out() {
    let (registry, [one, two], _) = registry_of_two().await;
    let workshop = Workshop::new();
    let store = workshop.store();
    let nothing = Budget {
        bytes: 0,
        min_age: Duration::ZERO,
    };
    let fetch = async |tag: &str| {
        let source = registry.source(&format!("a/b:{tag}"), None);
        store.ensure(&source, |_| ()).await.unwrap()
    };
    let collect = |round, in_use: &[Digest], budget: &Budget| {
        let in_use = in_use.iter().copied().collect();
        store.collect(round, &in_use, budget).unwrap()
    };

    // Within the budget, or young: nothing happens.
    drop(fetch("v1").await);
    let held = fetch("v2").await;
    for budget in [
        Budget {
            bytes: u64::MAX,
            ..nothing.clone()
        },
        Budget {
            min_age: Duration::from_secs(600),
            ..nothing.clone()
        },
    ] {
        let done = collect(store.round(), &[], &budget);
        assert_eq!((done.images, done.layers, done.freed), (vec![], vec![], 0));
    }
    // One is referred to, the other held.
    let done = collect(store.round(), &[one], &nothing);
    assert_eq!(done.images, []);
    assert_eq!(done.layers.len(), 13);
    assert!(workshop.layers().is_empty());
    // Handed out after the references were looked up.
    let round = store.round();
    drop(held);
    drop(store.get(&two).unwrap());
    assert_eq!(collect(round, &[one], &nothing).images, []);
    // Now nobody has it.
    let done = collect(store.round(), &[one], &nothing);
    assert_eq!(done.images, [two]);
    assert!(done.freed > 0 && done.kept > 0);
    assert!(store.get(&two).unwrap().is_none() && store.get(&one).unwrap().is_some());
    // And it can be had again.
    assert_eq!(fetch("v2").await.digest, two);
}

#[tokio::test]
async fn what_a_crash_leaves_is_removed_at_the_next_start() {
    let (registry, [one, two], _) = registry_of_two().await;
    let workshop = Workshop::new();
    for tag in ["v1", "v2"] {
        let source = registry.source(&format!("a/b:{tag}"), None);
        ensure(&workshop, &source).await.unwrap();
    }
    let store = workshop.path("store");
    // A collection, killed in the middle; a conversion; a download.
    std::fs::remove_file(store.join(format!("{}.json", one.file_stem()))).unwrap();
    std::fs::write(store.join(".tmp-disk"), "x").unwrap();
    std::fs::write(store.join("layers/.tmp-layer"), "x").unwrap();
    let opened = workshop.store();
    let images: Vec<Digest> = opened.list().unwrap().iter().map(|i| i.digest).collect();
    assert_eq!(images, [two]);
    let mut left: Vec<String> = std::fs::read_dir(&store)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    let two = two.file_stem();
    assert_eq!(
        left,
        [
            "layers".to_owned(),
            "proofs".to_owned(),
            format!("{two}.erofs"),
            format!("{two}.json")
        ]
    );
    assert!(!store.join("layers/.tmp-layer").exists());
}
