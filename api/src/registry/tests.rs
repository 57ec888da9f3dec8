use axum::body::Body;
use http::{Method, Request, StatusCode};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::testing::{ADMIN, Answer, RIVAL, World};

fn digest(content: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(content)))
}

async fn put_blob(world: &World, token: &str, content: &'static [u8], digest: &str) -> Answer {
    let begun = world
        .call(
            token,
            Method::POST,
            "/v2/shop/blobs/uploads/",
            Body::empty(),
        )
        .await;
    if begun.status != StatusCode::ACCEPTED {
        return begun;
    }
    let location = begun.headers["location"].to_str().unwrap();
    world
        .call(
            token,
            Method::PUT,
            &format!("{location}?digest={digest}"),
            content,
        )
        .await
}

async fn put_image(world: &World) -> String {
    let (config, layer): (&[u8], &[u8]) = (b"{}", b"layer");
    for content in [config, layer] {
        assert_eq!(
            put_blob(world, ADMIN, content, &digest(content))
                .await
                .status,
            StatusCode::CREATED
        );
    }
    let manifest = json!({"schemaVersion": 2,
        "config": {"digest": digest(config), "size": 2, "mediaType": "application/vnd.oci.image.config.v1+json"},
        "layers": [{"digest": digest(layer), "size": 5, "mediaType": "application/vnd.oci.image.layer.v1.tar"}]});
    let answer = world
        .call(
            ADMIN,
            Method::PUT,
            "/v2/shop/manifests/v1",
            manifest.to_string(),
        )
        .await;
    assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
    digest(manifest.to_string().as_bytes())
}

#[tokio::test]
async fn what_is_pushed_can_be_pulled() {
    let world = World::new().await;
    world.app("shop").await;
    let manifest = put_image(&world).await;
    for reference in ["v1", &manifest] {
        let answer = world.get(&format!("/v2/shop/manifests/{reference}")).await;
        assert_eq!(
            (answer.status, digest(&answer.body)),
            (StatusCode::OK, manifest.clone())
        );
    }
    let layer = world
        .get(&format!("/v2/shop/blobs/{}", digest(b"layer")))
        .await;
    assert_eq!(&layer.body[..], b"layer");
    assert_eq!(
        world.get("/v2/shop/tags/list").await.json()["tags"],
        json!(["v1"])
    );
    let body = json!({"config": {"image": "registry.internal/shop:v1"}});
    let machine = world.post("/v1/apps/shop/machines", body).await.json();
    assert_eq!(
        machine["config"]["image"],
        format!("registry.internal/shop:v1@{manifest}")
    );
    assert_eq!(
        (
            &machine["image_ref"]["tag"],
            &machine["image_ref"]["digest"]
        ),
        (&json!("v1"), &json!(manifest))
    );
    let wrong = format!("registry.internal/shop:a b@{manifest}");
    let refused = world
        .post(
            "/v1/apps/shop/machines",
            json!({"config": {"image": wrong}}),
        )
        .await;
    assert_eq!(refused.status, StatusCode::UNPROCESSABLE_ENTITY);
}

#[tokio::test]
async fn content_that_is_not_its_digest_is_refused() {
    let world = World::new().await;
    world.app("shop").await;
    let wrong = digest(b"something else");
    let answer = put_blob(&world, ADMIN, b"content", &wrong).await;
    assert_eq!(
        (answer.status, &answer.json()["errors"][0]["code"]),
        (StatusCode::BAD_REQUEST, &json!("DIGEST_INVALID"))
    );
    assert_eq!(
        world.get(&format!("/v2/shop/blobs/{wrong}")).await.status,
        StatusCode::NOT_FOUND
    );
    for bad in ["sha256:../../../etc/passwd", "md5:00", ""] {
        assert_eq!(
            put_blob(&world, ADMIN, b"content", bad).await.status,
            StatusCode::BAD_REQUEST,
            "{bad}"
        );
    }
    let manifest = json!({"config": {"digest": wrong}, "layers": []}).to_string();
    let answer = world
        .call(ADMIN, Method::PUT, "/v2/shop/manifests/v1", manifest)
        .await;
    assert_eq!(answer.json()["errors"][0]["code"], "MANIFEST_BLOB_UNKNOWN");
    for tag in ["..", ".hidden", "-x", "a%2fb"] {
        let answer = world
            .call(
                ADMIN,
                Method::PUT,
                &format!("/v2/shop/manifests/{tag}"),
                "{}",
            )
            .await;
        assert!(answer.status.is_client_error(), "{tag}: {answer:?}");
    }
}

#[tokio::test]
async fn a_chunked_upload_goes_on_where_it_was() {
    let world = World::new().await;
    world.app("shop").await;
    let begun = world
        .call(
            ADMIN,
            Method::POST,
            "/v2/shop/blobs/uploads/",
            Body::empty(),
        )
        .await;
    let location = begun.headers["location"].to_str().unwrap().to_owned();
    let chunk = |range: &str, body: &'static str| {
        let request = Request::patch(&location).header("authorization", format!("Bearer {ADMIN}"));
        request
            .header("content-range", range)
            .body(Body::from(body))
            .unwrap()
    };
    assert_eq!(
        world.send(chunk("0-3", "abcd")).await.status,
        StatusCode::ACCEPTED
    );
    assert_eq!(
        world.send(chunk("9-12", "zzzz")).await.status,
        StatusCode::RANGE_NOT_SATISFIABLE
    );
    assert_eq!(world.send(chunk("4-5", "ef")).await.headers["range"], "0-5");
    let path = format!("{location}?digest={}", digest(b"abcdef"));
    assert_eq!(
        world
            .call(ADMIN, Method::PUT, &path, Body::empty())
            .await
            .status,
        StatusCode::CREATED
    );
    assert_eq!(
        world
            .call(ADMIN, Method::PUT, &path, Body::empty())
            .await
            .status,
        StatusCode::NOT_FOUND
    );
}

#[tokio::test]
async fn another_organization_neither_pushes_nor_pulls_nor_runs_it() {
    let world = World::new().await;
    world.app("shop").await;
    let manifest = put_image(&world).await;
    let blob = format!("/v2/shop/blobs/{}", digest(b"layer"));
    for path in [blob.as_str(), "/v2/shop/manifests/v1", "/v2/shop/tags/list"] {
        assert_eq!(
            world
                .call(RIVAL, Method::GET, path, Body::empty())
                .await
                .status,
            StatusCode::NOT_FOUND,
            "{path}"
        );
    }
    assert_eq!(
        put_blob(&world, RIVAL, b"x", &digest(b"x")).await.status,
        StatusCode::NOT_FOUND
    );
    let body = json!({"app_name": "rival-shop", "org_slug": "rivals"}).to_string();
    assert_eq!(
        world
            .call(RIVAL, Method::POST, "/v1/apps", body)
            .await
            .status,
        StatusCode::CREATED
    );
    let mount = format!(
        "/v2/rival-shop/blobs/uploads/?mount={}&from=shop",
        digest(b"layer")
    );
    assert_eq!(
        world
            .call(RIVAL, Method::POST, &mount, Body::empty())
            .await
            .status,
        StatusCode::ACCEPTED,
        "not mounted"
    );
    let config =
        json!({"config": {"image": format!("registry.internal/shop@{manifest}")}}).to_string();
    let answer = world
        .call(RIVAL, Method::POST, "/v1/apps/rival-shop/machines", config)
        .await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_client_without_a_token_is_told_how() {
    let world = World::new().await;
    let answer = world
        .send(Request::get("/v2/").body(Body::empty()).unwrap())
        .await;
    assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
    assert_eq!(answer.headers["www-authenticate"], "Basic realm=\"tern\"");
}
