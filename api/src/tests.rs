use std::sync::atomic::Ordering;

use axum::body::Body;
use http::{Method, Request, StatusCode};
use serde_json::json;

use crate::testing::{ADMIN, RIVAL, World};

#[tokio::test]
async fn nothing_is_told_without_a_good_token() {
    let world = World::new().await;
    for token in ["", "wrong", "tern_"] {
        let answer = world
            .call(token, Method::GET, "/v1/apps", Body::empty())
            .await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
        assert!(
            answer.json()["error"]
                .as_str()
                .unwrap()
                .starts_with("Authenticate")
        );
    }
    let none = world
        .send(Request::get("/v1/apps").body(Body::empty()).unwrap())
        .await;
    assert_eq!(none.status, StatusCode::UNAUTHORIZED);
    assert!(none.headers.contains_key("fly-request-id"));
    let unknown = world
        .send(Request::get("/v1/nothing").body(Body::empty()).unwrap())
        .await;
    assert_eq!(
        (unknown.status, &unknown.body[..]),
        (StatusCode::NOT_FOUND, &b"404 page not found\n"[..])
    );
}

#[tokio::test]
async fn an_app_is_made_named_and_destroyed() {
    let world = World::new().await;
    world.app("shop").await;
    let again = world
        .post("/v1/apps", json!({"name": "shop", "org_slug": "personal"}))
        .await;
    assert_eq!(
        (again.status, &again.json()["status"]),
        (StatusCode::UNPROCESSABLE_ENTITY, &json!("name_taken"))
    );
    assert_eq!(world.get("/v1/apps").await.json()["total_apps"], 1);
    let certificates = world.get("/v1/apps/shop/certificates").await.json();
    assert_eq!(
        certificates["certificates"][0]["hostname"],
        "shop.tern.test"
    );
    let machine = world.machine("shop").await;
    let refused = world
        .call(ADMIN, Method::DELETE, "/v1/apps/shop", Body::empty())
        .await;
    assert_eq!(refused.status, StatusCode::CONFLICT);
    let gone = world
        .call(
            ADMIN,
            Method::DELETE,
            "/v1/apps/shop?force=true",
            Body::empty(),
        )
        .await;
    assert_eq!(gone.status, StatusCode::ACCEPTED);
    let is_gone = |s: &tern_catalog::Snapshot| (!s.apps.contains_key("shop")).then_some(());
    world.shared.view.wait_for(is_gone).await;
    assert_eq!(
        world.get("/v1/apps/shop").await.status,
        StatusCode::NOT_FOUND
    );
    let left = world
        .catalog
        .get::<tern_catalog::HostnameRoute>("shop.tern.test")
        .await
        .unwrap();
    assert!(left.is_none(), "{machine}");
}

#[tokio::test]
async fn names_that_are_paths_or_nonsense_are_refused() {
    let world = World::new().await;
    for name in ["../etc", "a/b", "", "UPPER", "a\u{0}b", &"x".repeat(5000)] {
        let answer = world
            .post(
                "/v1/apps",
                json!({"app_name": name, "org_slug": "personal"}),
            )
            .await;
        assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{name:?}");
    }
    for path in [
        "/v1/apps/..%2f..%2fetc",
        "/v1/apps/a%00b/machines",
        "/v1/apps/x/machines/..%2f1",
    ] {
        let answer = world.get(path).await;
        assert!(answer.status.is_client_error(), "{path}: {answer:?}");
    }
}

#[tokio::test]
async fn malformed_and_huge_bodies_are_refused() {
    let world = World::new().await;
    for body in ["", "{", "[]", "null", "{\"app_name\": 7}", "\u{feff}{}"] {
        let answer = world.call(ADMIN, Method::POST, "/v1/apps", body).await;
        assert!(answer.status.is_client_error(), "{body}: {answer:?}");
    }
    let huge = world
        .call(ADMIN, Method::POST, "/v1/apps", vec![b' '; 8 << 20])
        .await;
    assert_eq!(huge.status, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test]
async fn a_machine_goes_through_its_states() {
    let world = World::new().await;
    world.app("shop").await;
    let id = world.machine("shop").await;
    let at = format!("/v1/apps/shop/machines/{id}");
    let wait = |state: &str| format!("{at}/wait?state={state}&timeout=20");
    assert_eq!(world.get(&wait("started")).await.status, StatusCode::OK);
    for (verb, state) in [
        ("suspend", "suspended"),
        ("start", "started"),
        ("stop", "stopped"),
        ("restart", "started"),
    ] {
        assert_eq!(
            world.post(&format!("{at}/{verb}"), json!({})).await.status,
            StatusCode::OK,
            "{verb}"
        );
        assert_eq!(world.get(&wait(state)).await.json()["state"], state);
        assert_eq!(world.get(&at).await.json()["state"], state);
    }
    let never = world
        .get(&format!("{at}/wait?state=suspended&timeout=1"))
        .await;
    assert_eq!(never.status, StatusCode::REQUEST_TIMEOUT);
    let running = world.call(ADMIN, Method::DELETE, &at, Body::empty()).await;
    assert_eq!(running.status, StatusCode::PRECONDITION_FAILED);
    let gone = world
        .call(
            ADMIN,
            Method::DELETE,
            &format!("{at}?kill=true"),
            Body::empty(),
        )
        .await;
    assert_eq!(gone.status, StatusCode::OK, "{gone:?}");
    assert_eq!(world.get(&at).await.status, StatusCode::NOT_FOUND);
    assert_eq!(world.get(&wait("destroyed")).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_new_configuration_is_a_new_version() {
    let world = World::new().await;
    world.app("shop").await;
    let id = world.machine("shop").await;
    let at = format!("/v1/apps/shop/machines/{id}");
    let first = world.get(&at).await.json();
    let update = json!({"config": {"image": "example.com/x:2", "guest": {"memory_mb": 512}}});
    let second = world.post(&at, update).await.json();
    assert_ne!(first["instance_id"], second["instance_id"]);
    assert_eq!(second["config"]["guest"]["memory_mb"], 512);
    let stale = json!({"config": {"image": "x"}, "current_version": first["instance_id"]});
    assert_eq!(
        world.post(&at, stale).await.status,
        StatusCode::PRECONDITION_FAILED
    );
}

#[tokio::test]
async fn configurations_that_cannot_run_are_refused_with_the_key() {
    let world = World::new().await;
    world.app("shop").await;
    let wrong = [
        (json!({}), "image"),
        (json!({"image": "x", "schedule": "daily"}), "schedule"),
        (
            json!({"image": "x", "services": [{"internal_port": 0}]}),
            "internal_port",
        ),
        (
            json!({"image": "x", "checks": {"up": {"type": "http", "headers": [{"name": "a b", "values": ["c"]}]}}}),
            "a b",
        ),
        (json!({"image": "x", "guest": {"cpus": 9}}), "cpus"),
        (
            json!({"image": "x", "guest": {"memory_mb": 1}}),
            "memory_mb",
        ),
        (
            json!({"image": "x", "stop_config": {"signal": "SIGNONE"}}),
            "SIGNONE",
        ),
        (
            json!({"image": "x", "files": [{"guest_path": "etc/x", "raw_value": ""}]}),
            "absolute",
        ),
        (
            json!({"image": "x", "files": [{"guest_path": "/x", "raw_value": "%"}]}),
            "base64",
        ),
        (json!({"image": "x", "env": {"A=B": "c"}}), "A=B"),
        (json!({"image": "x", "env": {"A": "b\u{0}"}}), "NUL"),
        (json!({"image": "registry.internal/shop:none"}), "push"),
        (json!({"image": ""}), "image"),
    ];
    for (config, named) in wrong {
        let answer = world
            .post("/v1/apps/shop/machines", json!({"config": config}))
            .await;
        assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{config}");
        assert!(
            answer.json()["error"].as_str().unwrap().contains(named),
            "{answer:?}"
        );
    }
}

#[tokio::test]
async fn one_organization_does_not_see_or_touch_another() {
    let world = World::new().await;
    world.app("shop").await;
    let id = world.machine("shop").await;
    for (method, path) in [
        (Method::GET, "/v1/apps/shop".to_owned()),
        (Method::GET, "/v1/apps/shop/machines".to_owned()),
        (Method::GET, "/v1/apps/shop/logs".to_owned()),
        (Method::DELETE, "/v1/apps/shop?force=true".to_owned()),
        (Method::POST, format!("/v1/apps/shop/machines/{id}/stop")),
        (
            Method::DELETE,
            format!("/v1/apps/shop/machines/{id}?force=true"),
        ),
        (Method::GET, "/v1/orgs/personal/wireguard_peers".to_owned()),
        (Method::POST, "/v1/orgs".to_owned()),
    ] {
        let body = json!({"slug": "x", "name": "x"}).to_string();
        let answer = world.call(RIVAL, method.clone(), &path, body).await;
        assert!(
            matches!(answer.status, StatusCode::NOT_FOUND | StatusCode::FORBIDDEN),
            "{method} {path}: {answer:?}"
        );
    }
    assert_eq!(
        world
            .call(RIVAL, Method::GET, "/v1/apps", Body::empty())
            .await
            .json()["total_apps"],
        0
    );
    let orgs = world
        .call(RIVAL, Method::GET, "/v1/orgs", Body::empty())
        .await
        .json();
    assert_eq!(orgs["organizations"].as_array().unwrap().len(), 1);
    assert_eq!(
        world
            .get(&format!("/v1/apps/shop/machines/{id}"))
            .await
            .status,
        StatusCode::OK
    );
}

#[tokio::test]
async fn a_lease_keeps_others_out() {
    let world = World::new().await;
    world.app("shop").await;
    let at = format!("/v1/apps/shop/machines/{}", world.machine("shop").await);
    let taken = world.post(&format!("{at}/lease"), json!({"ttl": 60})).await;
    assert_eq!(taken.status, StatusCode::CREATED);
    let nonce = taken.json()["data"]["nonce"].as_str().unwrap().to_owned();
    assert_eq!(
        world.post(&format!("{at}/lease"), json!({})).await.status,
        StatusCode::CONFLICT
    );
    assert_eq!(
        world.post(&format!("{at}/stop"), json!({})).await.status,
        StatusCode::CONFLICT
    );
    assert!(world.get(&format!("{at}/lease")).await.json()["data"]["nonce"].is_null());
    let with = |method: Method, path: String| {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("authorization", format!("Bearer {ADMIN}"));
        request
            .header("fly-machine-lease-nonce", &nonce)
            .body(Body::empty())
            .unwrap()
    };
    assert_eq!(
        world
            .send(with(Method::POST, format!("{at}/stop")))
            .await
            .status,
        StatusCode::OK
    );
    assert_eq!(
        world
            .send(with(Method::DELETE, format!("{at}/lease")))
            .await
            .status,
        StatusCode::OK
    );
    assert_eq!(
        world.post(&format!("{at}/start"), json!({})).await.status,
        StatusCode::OK
    );
    assert_eq!(
        world.get(&format!("{at}/lease")).await.status,
        StatusCode::NOT_FOUND
    );
}

#[tokio::test]
async fn commands_signals_and_logs_reach_the_host() {
    let world = World::new().await;
    world.app("shop").await;
    let id = world.machine("shop").await;
    let at = format!("/v1/apps/shop/machines/{id}");
    let answer = world
        .post(&format!("{at}/exec"), json!({"cmd": "echo a b"}))
        .await
        .json();
    assert_eq!(
        (&answer["exit_code"], &answer["stdout"]),
        (&json!(3), &json!("echo|a|b"))
    );
    let trace = world.get(&format!("{at}/boot-trace")).await.json();
    assert_eq!(
        trace,
        json!({"began_unix_us": 7, "cold": true,
               "phases": [{"side": "monitor", "name": "kvm", "at_us": 5}]})
    );
    let memory = format!("{at}/memory");
    let limit = async |mb: u32| {
        let body = json!({"limit_mb": mb}).to_string();
        world.call(ADMIN, Method::PUT, &memory, body).await
    };
    for mb in [0, 31, 257] {
        assert_eq!(limit(mb).await.status, StatusCode::UNPROCESSABLE_ENTITY);
    }
    let limited = json!({"limit_mb": 64, "available_mb": 100});
    assert_eq!(limit(64).await.json(), limited);
    assert_eq!(world.get(&memory).await.json(), limited);
    let list = world
        .post(&format!("{at}/exec"), json!({"command": ["echo", "a b"]}))
        .await
        .json();
    assert_eq!(list["stdout"], "echo|a b");
    assert_eq!(
        world
            .post(&format!("{at}/exec"), json!({"command": []}))
            .await
            .status,
        StatusCode::BAD_REQUEST
    );
    let absent = world
        .post(&format!("{at}/exec"), json!({"command": ["absent"]}))
        .await;
    assert_eq!(absent.status, StatusCode::PRECONDITION_FAILED);
    for (given, number) in [(json!("SIGTERM"), 15), (json!("usr1"), 10), (json!(9), 9)] {
        assert_eq!(
            world
                .post(&format!("{at}/signal"), json!({"signal": given}))
                .await
                .status,
            StatusCode::OK
        );
        assert_eq!(world.gateway.signals.load(Ordering::Relaxed), number);
    }
    let logs = world.get("/v1/apps/shop/logs").await;
    assert_eq!(logs.json()["machine"], id.as_str());
}

#[tokio::test]
async fn numbers_in_a_network_are_never_the_same() {
    let world = World::new().await;
    world.app("shop").await;
    let key = "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=";
    let peer = world
        .post(
            "/v1/orgs/personal/wireguard_peers",
            json!({"name": "lap", "public_key": key}),
        )
        .await;
    assert_eq!(peer.status, StatusCode::CREATED, "{peer:?}");
    let peer = peer.json();
    assert_eq!(
        (&peer["dns"], &peer["allowed_ips"]),
        (&json!("fdaa:0:1::3"), &json!("fdaa:0:1::/48"))
    );
    let mut addresses = vec![
        peer["address"]
            .as_str()
            .unwrap()
            .split('/')
            .next()
            .unwrap()
            .to_owned(),
    ];
    for _ in 0..5 {
        let id = world.machine("shop").await;
        let machine = world
            .get(&format!("/v1/apps/shop/machines/{id}"))
            .await
            .json();
        addresses.push(machine["private_ip"].as_str().unwrap().to_owned());
    }
    let count = addresses.len();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), count, "{addresses:?}");
    for bad in ["", "short", "not base64!!"] {
        let answer = world
            .post(
                "/v1/orgs/personal/wireguard_peers",
                json!({"name": "x", "public_key": bad}),
            )
            .await;
        assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY);
    }
}

#[tokio::test]
async fn every_refusal_is_the_apis_json() {
    let world = World::new().await;
    world.app("shop").await;
    let id = world.machine("shop").await;
    let at = format!("/v1/apps/shop/machines/{id}");
    for (method, path, body, status) in [
        (Method::POST, "/v1/apps".to_owned(), "{", 400),
        (
            Method::POST,
            "/v1/apps".to_owned(),
            "{\"app_name\": 7}",
            422,
        ),
        (Method::POST, format!("{at}/stop"), "{\"timeout\": []}", 422),
        (Method::DELETE, format!("{at}?force=perhaps"), "", 400),
        (Method::GET, "/v1/apps/NO/machines".to_owned(), "", 400),
        (Method::GET, format!("{at}/events?limit=-1"), "", 400),
    ] {
        let answer = world.call(ADMIN, method.clone(), &path, body).await;
        assert_eq!(
            answer.status.as_u16(),
            status,
            "{method} {path}: {answer:?}"
        );
        assert!(answer.json()["error"].is_string(), "{answer:?}");
    }
    for path in ["/v1/apps".to_owned(), format!("{at}/lease"), at.clone()] {
        let answer = world.call(ADMIN, Method::PATCH, &path, "{}").await;
        assert_eq!(
            (answer.status.as_u16(), &answer.body[..]),
            (404, &b"404 page not found\n"[..]),
            "{path}"
        );
    }
    // A body is JSON whatever curl calls it.
    let form = Request::post("/v1/apps")
        .header("authorization", format!("Bearer {ADMIN}"))
        .header("content-type", "application/x-www-form-urlencoded")
        .body(Body::from(r#"{"app_name":"form","org_slug":"personal"}"#))
        .unwrap();
    assert_eq!(world.send(form).await.status, StatusCode::CREATED);
}

#[tokio::test]
async fn metadata_changes_without_a_new_version() {
    let world = World::new().await;
    world.app("shop").await;
    let id = world.machine("shop").await;
    let other = world.machine("shop").await;
    let at = format!("/v1/apps/shop/machines/{id}");
    let before = world.get(&at).await.json();
    let write = async |method: Method, path: &str, body: serde_json::Value| {
        let path = format!("{at}/metadata{path}");
        world
            .call(ADMIN, method, &path, body.to_string())
            .await
            .status
            .as_u16()
    };
    assert_eq!(
        write(Method::POST, "/role", json!({"value": "primary"})).await,
        204
    );
    assert_eq!(
        write(Method::PATCH, "", json!({"a": "1", "b": "2"})).await,
        204
    );
    assert_eq!(write(Method::PATCH, "", json!({"a": null})).await, 204);
    let map = world.get(&format!("{at}/metadata")).await.json();
    assert_eq!(map, json!({"role": "primary", "b": "2"}));
    assert_eq!(
        world.get(&format!("{at}/metadata/role")).await.json()["value"],
        "primary"
    );

    let found = |query: &str| format!("/v1/apps/shop/machines?metadata.role=primary{query}");
    let listed = world.get(&found("")).await.json();
    assert_eq!(
        (listed.as_array().unwrap().len(), &listed[0]["id"]),
        (1, &json!(id)),
        "{other}"
    );
    assert_eq!(world.get(&found("&metadata.b=3")).await.json(), json!([]));

    assert_eq!(write(Method::DELETE, "/role", json!({})).await, 204);
    assert_eq!(
        world.get(&format!("{at}/metadata/role")).await.status,
        StatusCode::NOT_FOUND
    );
    assert_eq!(write(Method::PUT, "", json!({"c": "3"})).await, 204);
    assert_eq!(
        world.get(&format!("{at}/metadata")).await.json(),
        json!({"c": "3"})
    );
    assert_eq!(
        write(Method::POST, "/big", json!({"value": "x".repeat(5000)})).await,
        422
    );
    let many: std::collections::BTreeMap<_, _> = (0..101).map(|n| (n.to_string(), "")).collect();
    assert_eq!(write(Method::PUT, "", json!(many)).await, 422);
    let after = world.get(&at).await.json();
    assert_eq!(
        (&after["instance_id"], &after["version"]),
        (&before["instance_id"], &before["version"])
    );
    assert_eq!(after["config"]["metadata"], json!({"c": "3"}));
}

#[tokio::test]
async fn a_lease_comes_with_the_machine_if_asked() {
    let world = World::new().await;
    world.app("shop").await;
    let config = json!({"image": "example.com/x:1"});
    let made = world
        .post(
            "/v1/apps/shop/machines",
            json!({"config": config, "lease_ttl": 60}),
        )
        .await
        .json();
    let (id, nonce) = (
        made["id"].as_str().unwrap(),
        made["nonce"].as_str().unwrap(),
    );
    let at = format!("/v1/apps/shop/machines/{id}");
    let update = json!({"config": config, "lease_ttl": 60}).to_string();
    let other = world.call(ADMIN, Method::POST, &at, update.clone()).await;
    assert_eq!(other.status, StatusCode::CONFLICT);
    assert_eq!(world.get(&at).await.json()["version"], made["instance_id"]);
    let holder = Request::post(&at)
        .header("authorization", format!("Bearer {ADMIN}"))
        .header("fly-machine-lease-nonce", nonce)
        .body(Body::from(update))
        .unwrap();
    let updated = world.send(holder).await.json();
    assert_eq!(updated["nonce"], json!(nonce));
    assert_ne!(updated["version"], made["version"]);

    // Who holds nothing may take it with a change, and holds it from then on.
    let free = world.machine("shop").await;
    let at = format!("/v1/apps/shop/machines/{free}");
    let taken = world
        .post(&at, json!({"config": config, "lease_ttl": 60}))
        .await
        .json();
    assert!(taken["nonce"].is_string(), "{taken}");
    assert_eq!(
        world.post(&format!("{at}/stop"), json!({})).await.status,
        StatusCode::CONFLICT
    );
}

#[tokio::test]
async fn a_command_in_one_text_is_split_as_a_shell_would() {
    let world = World::new().await;
    world.app("shop").await;
    let id = world.machine("shop").await;
    let path = format!("/v1/apps/shop/machines/{id}/exec");
    let answer = world
        .post(&path, json!({"cmd": r#"sh -c "echo 'a b'" c\ d"#}))
        .await
        .json();
    assert_eq!(answer["stdout"], "sh|-c|echo 'a b'|c d");
    let open = world.post(&path, json!({"cmd": "echo 'a"})).await;
    assert_eq!(open.status, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(
        world.post(&path, json!({"cmd": " "})).await.status,
        StatusCode::BAD_REQUEST
    );
}

#[tokio::test]
async fn any_good_token_of_several_opens() {
    let world = World::new().await;
    let call = async |header: &str| {
        let request = Request::get("/v1/apps").header("authorization", header);
        world
            .send(request.body(Body::empty()).unwrap())
            .await
            .status
    };
    assert_eq!(call(&format!("FlyV1 fm2_x,{ADMIN}")).await, StatusCode::OK);
    assert_eq!(call("FlyV1 fm2_x,fm2_y").await, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn the_hosts_own_token_pulls_images_and_nothing_else() {
    let world = World::new().await;
    world.app("shop").await;
    let status = async |method, path| {
        let answer = world.call("internal", method, path, Body::empty());
        answer.await.status
    };
    for path in ["/v1/apps", "/v1/apps/shop", "/v1/orgs", "/v1/tokens"] {
        assert_eq!(
            status(Method::GET, path).await,
            StatusCode::FORBIDDEN,
            "{path}"
        );
    }
    let upload = "/v2/shop/blobs/uploads/";
    assert_eq!(status(Method::POST, upload).await, StatusCode::FORBIDDEN);
    assert_eq!(status(Method::GET, "/v2/").await, StatusCode::OK);
    let tags = "/v2/shop/tags/list";
    assert_eq!(status(Method::GET, tags).await, StatusCode::OK);
}

#[tokio::test]
async fn anothers_app_is_answered_as_one_that_is_not_there() {
    let world = World::new().await;
    world.app("shop").await;
    for (method, rest) in [
        (Method::GET, ""),
        (Method::GET, "/machines"),
        (Method::POST, "/machines"),
        (Method::DELETE, "?force=true"),
        (Method::GET, "/logs"),
    ] {
        let ask = async |app: &str| {
            let path = format!("/v1/apps/{app}{rest}");
            let answer = world.call(RIVAL, method.clone(), &path, "{}").await;
            let said = String::from_utf8_lossy(&answer.body).replace(app, "APP");
            (answer.status, said)
        };
        let absent = ask("none").await;
        assert_eq!(absent.0, StatusCode::NOT_FOUND, "{method} {rest}");
        assert_eq!(ask("shop").await, absent, "{method} {rest}");
    }
}
