use axum::body::Body;
use http::{Method, StatusCode};
use serde_json::{Value, json};
use tern_catalog::{Scope, Token};

use super::*;
use crate::testing::{ADMIN, Answer, RIVAL, World, token_of};

/// Asks for a token with this one.
async fn mint(world: &World, with: &str, body: Value) -> Answer {
    let mut whole = json!({"name": "made"});
    whole
        .as_object_mut()
        .unwrap()
        .extend(body.as_object().unwrap().clone());
    let body = whole.to_string();
    world.call(with, Method::POST, "/v1/tokens", body).await
}

/// The text of a token that was asked for.
async fn minted(world: &World, with: &str, body: Value) -> String {
    let answer = mint(world, with, body).await;
    assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
    answer.json()["token"].as_str().unwrap().to_owned()
}

async fn revoke(world: &World, with: &str, id: &str) -> Answer {
    let path = format!("/v1/tokens/{id}");
    world.call(with, Method::DELETE, &path, Body::empty()).await
}

async fn listed(world: &World, with: &str) -> Vec<Value> {
    let answer = world.call(with, Method::GET, "/v1/tokens", Body::empty());
    let listed = answer.await.json();
    listed["tokens"].as_array().unwrap().clone()
}

async fn is_good(world: &World, token: &str) -> bool {
    let answer = world.call(token, Method::GET, "/v2/", Body::empty()).await;
    answer.status == StatusCode::OK
}

#[tokio::test]
async fn a_token_works_until_it_is_revoked() {
    let world = World::new().await;
    let made = world
        .post("/v1/tokens", json!({"name": "ci", "org_slug": "personal"}))
        .await
        .json();
    let token = made["token"].as_str().unwrap();
    assert_eq!(
        world
            .call(token, Method::GET, "/v1/apps", Body::empty())
            .await
            .status,
        StatusCode::OK
    );
    let stored = serde_json::to_string(&world.catalog.list::<Token>().await.unwrap()).unwrap();
    assert!(!stored.contains(token), "only its hash is kept");
    let path = format!("/v1/tokens/{}", made["id"].as_str().unwrap());
    assert_eq!(
        world
            .call(ADMIN, Method::DELETE, &path, Body::empty())
            .await
            .status,
        StatusCode::OK
    );
    assert_eq!(
        world
            .call(token, Method::GET, "/v1/apps", Body::empty())
            .await
            .status,
        StatusCode::UNAUTHORIZED
    );
}

#[tokio::test]
async fn a_token_is_revoked_by_no_id_that_is_short_or_fits_several() {
    let world = World::new().await;
    let digits = "0123456789abcdef";
    for n in 0..2 {
        let token = Token {
            hash: format!("{digits}{n:048}"),
            ..token_of(&n.to_string(), None, Scope::Full)
        };
        let revision = world.catalog.create(&token).await.unwrap();
        world.shared.seen(revision).await;
    }
    let revoke = async |id: &str| {
        let path = format!("/v1/tokens/{id}");
        world
            .call(ADMIN, Method::DELETE, &path, Body::empty())
            .await
    };
    for id in ["", "0", &digits[..7], digits] {
        let answer = revoke(id).await;
        assert!(answer.status.is_client_error(), "{id}: {answer:?}");
    }
    let left = world.catalog.list::<Token>().await.unwrap();
    assert_eq!(left.len(), 4, "{left:?}");
}

#[tokio::test]
async fn a_token_makes_none_that_may_more_than_itself() {
    let world = World::new().await;
    for app in ["shop", "blog"] {
        world.app(app).await;
    }
    let org = json!({"org_slug": "personal"});
    let read = json!({"org_slug": "personal", "scope": "read"});
    let deploy = json!({"scope": "deploy", "apps": ["shop"]});
    let both = json!({"scope": "deploy", "apps": ["shop", "blog"]});
    let exec = json!({"scope": "machine_exec", "apps": ["shop"]});
    let blog = json!({"scope": "machine_exec", "apps": ["blog"]});
    let wanted = [&json!({}), &org, &read, &both, &deploy, &exec, &blog];
    // In the order of `wanted`: everything, the organization, and so on to exec in blog.
    for (asker, expected) in [
        (None, [201, 201, 201, 201, 201, 201, 201]),
        (Some(&org), [403, 201, 201, 201, 201, 201, 201]),
        (Some(&read), [403, 403, 201, 403, 403, 403, 403]),
        (Some(&both), [403, 403, 403, 201, 201, 201, 201]),
        (Some(&deploy), [403, 403, 403, 404, 201, 201, 404]),
        (Some(&exec), [403, 403, 403, 404, 403, 201, 404]),
    ] {
        let with = match asker {
            Some(body) => minted(&world, ADMIN, body.clone()).await,
            None => ADMIN.to_owned(),
        };
        let mut got = Vec::new();
        for body in wanted {
            got.push(mint(&world, &with, body.clone()).await.status.as_u16());
        }
        assert_eq!(got, expected, "{asker:?}");
    }
    // Another organization's app is not there, and neither is the organization.
    for body in [&org, &read, &deploy, &exec] {
        let answer = mint(&world, RIVAL, body.clone()).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{body} {answer:?}");
    }
    // What was made does what it may, and no more.
    let ci = minted(&world, ADMIN, deploy).await;
    let ask = async |path| {
        world
            .call(&ci, Method::GET, path, Body::empty())
            .await
            .status
    };
    assert_eq!(ask("/v1/apps/shop").await, StatusCode::OK);
    assert_eq!(ask("/v1/apps/blog").await, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_token_makes_none_that_lasts_longer_than_itself() {
    let world = World::new().await;
    let with = |expiry: Option<&str>| json!({"org_slug": "personal", "expiry": expiry});
    let day = minted(&world, ADMIN, with(Some("24h"))).await;
    for (expiry, status) in [
        (Some("23h"), StatusCode::CREATED),
        (Some("25h"), StatusCode::FORBIDDEN),
        (None, StatusCode::FORBIDDEN),
    ] {
        let answer = mint(&world, &day, with(expiry)).await;
        assert_eq!(answer.status, status, "{expiry:?} {answer:?}");
    }
    for never in ["0s", "soon", "-1h", "99999999999h"] {
        let answer = mint(&world, ADMIN, with(Some(never))).await;
        assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{never}");
    }
    let day = world
        .shared
        .view
        .snapshot()
        .tokens
        .get(&token_hash(&day))
        .cloned();
    let (made, end) = day.map(|t| (t.created_at, t.expires_at)).unwrap();
    assert_eq!(end, Some(made + SignedDuration::from_hours(24)));
}

#[tokio::test]
async fn a_deploy_token_is_had_as_from_fly_and_says_what_it_is() {
    let world = World::new().await;
    world.app("shop").await;
    let body = json!({"expiry": "1h"});
    let made = world.post("/v1/apps/shop/deploy_token", body).await;
    assert_eq!(made.status, StatusCode::OK, "{made:?}");
    let token = made.json()["token"].as_str().unwrap().to_owned();
    let path = "/v1/tokens/current";
    let own = world.call(&token, Method::GET, path, Body::empty()).await;
    let own = &own.json()["tokens"];
    assert_eq!(own.as_array().unwrap().len(), 1);
    assert_eq!(
        (&own[0]["scope"], &own[0]["apps"]),
        (&json!("deploy"), &json!(["shop"]))
    );
    assert!(own[0]["expires_at"].is_string());
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_with_its_field() {
    let world = World::new().await;
    world.app("shop").await;
    world
        .call(
            RIVAL,
            Method::POST,
            "/v1/apps",
            r#"{"app_name": "spy", "org_slug": "rivals"}"#,
        )
        .await;
    for (body, named) in [
        (json!({"name": ""}), "name"),
        (json!({"name": "a\u{1b}[2J"}), "name"),
        (json!({"scope": "read"}), "org_slug"),
        (json!({"scope": "deploy"}), "apps"),
        (json!({"scope": "machine_exec", "apps": []}), "apps"),
        (json!({"scope": "full", "apps": ["shop"]}), "apps"),
        (
            json!({"scope": "deploy", "apps": ["shop", "spy"]}),
            "one organization",
        ),
        (
            json!({"scope": "deploy", "apps": ["shop"], "org_slug": "rivals"}),
            "one organization",
        ),
        (json!({"scope": "all"}), "machine_exec"),
        (json!({"scopes": "read"}), "scopes"),
    ] {
        let answer = mint(&world, ADMIN, body.clone()).await;
        assert_eq!(answer.status, StatusCode::UNPROCESSABLE_ENTITY, "{body}");
        let said = answer.json()["error"].as_str().unwrap().to_owned();
        assert!(said.contains(named), "{body}: {said}");
    }
}

#[tokio::test]
async fn a_list_tells_what_each_token_may_and_never_the_token() {
    let world = World::new().await;
    world.app("shop").await;
    let body = json!({"name": "ci", "scope": "deploy", "apps": ["shop"], "expiry": "720h"});
    let ci = minted(&world, ADMIN, body).await;
    let all = listed(&world, ADMIN).await;
    assert_eq!(all.len(), 3);
    let shown = all.iter().find(|t| t["name"] == "ci").unwrap();
    assert_eq!(
        (&shown["scope"], &shown["apps"]),
        (&json!("deploy"), &json!(["shop"]))
    );
    assert_eq!(
        (&shown["org_slug"], &shown["expired"]),
        (&json!("personal"), &json!(false))
    );
    assert_eq!(shown["made_by"], json!(token_hash(ADMIN)[..16]));
    let last = shown["last_characters"].as_str().unwrap();
    assert!(last.len() == 4 && ci.ends_with(last), "{last}");
    assert!(!json!(all).to_string().contains(&ci));
    assert!(shown["expires_at"].is_string());

    // Each sees its own, and what is of an organization that it may see.
    let names = async |with: &str| -> Vec<String> {
        let all = listed(&world, with).await;
        all.iter()
            .map(|t| t["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let read = json!({"name": "eye", "org_slug": "personal", "scope": "read"});
    let read = minted(&world, ADMIN, read).await;
    let child = json!({"name": "job", "scope": "deploy", "apps": ["shop"], "expiry": "1h"});
    minted(&world, &ci, child).await;
    assert_eq!(names(&ci).await, ["ci", "job"]);
    assert_eq!(names(&read).await, ["ci", "eye", "job"]);
    assert_eq!(names(RIVAL).await, [RIVAL]);
}

#[tokio::test]
async fn with_a_token_goes_what_it_has_made_unless_that_is_kept() {
    let world = World::new().await;
    let org = json!({"org_slug": "personal"});
    let id = |token: &str| token_hash(token)[..16].to_owned();
    let stolen = minted(&world, ADMIN, org.clone()).await;
    let made = minted(&world, &stolen, org.clone()).await;
    let by_made = minted(&world, &made, org.clone()).await;
    let other = minted(&world, ADMIN, org.clone()).await;
    let gone = revoke(&world, ADMIN, &id(&stolen)).await;
    assert_eq!(gone.json()["revoked"].as_array().unwrap().len(), 3);
    for token in [&stolen, &made, &by_made] {
        assert!(!is_good(&world, token).await);
    }
    assert!(is_good(&world, &other).await);
    assert_eq!(world.catalog.list::<Token>().await.unwrap().len(), 3);

    // The first of all is replaced, and what it has made stays.
    let (below, next) = (minted(&world, &other, org).await, json!({}));
    let next = minted(&world, ADMIN, next).await;
    let kept = revoke(&world, &next, &format!("{}?keep_made=true", id(ADMIN))).await;
    assert_eq!(kept.json()["revoked"], json!([id(ADMIN)]));
    assert!(!is_good(&world, ADMIN).await);
    for token in [&other, &below, &next] {
        assert!(is_good(&world, token).await);
    }
    revoke(&world, &next, &id(&other)).await;
    assert!(!is_good(&world, &below).await);
}

#[tokio::test]
async fn who_revokes_itself_leaves_nothing_that_it_has_made() {
    let world = World::new().await;
    let org = json!({"org_slug": "personal"});
    let stolen = minted(&world, ADMIN, org.clone()).await;
    let made = minted(&world, &stolen, org.clone()).await;
    let id = token_hash(&stolen);
    // Neither by itself, nor by what it has made: its owner could not end that any more.
    for with in [&stolen, &made] {
        let refused = revoke(&world, with, &format!("{id}?keep_made=true")).await;
        assert_eq!(refused.status, StatusCode::FORBIDDEN, "{refused:?}");
    }
    assert!(is_good(&world, &stolen).await && is_good(&world, &made).await);
    // Another of the organization may.
    let other = minted(&world, ADMIN, org).await;
    let kept = revoke(&world, &other, &format!("{id}?keep_made=true")).await;
    assert_eq!(kept.status, StatusCode::OK, "{kept:?}");
    assert!(!is_good(&world, &stolen).await && is_good(&world, &made).await);
}

#[tokio::test]
async fn a_token_revokes_itself_and_no_other_but_by_its_organization() {
    let world = World::new().await;
    world.app("shop").await;
    let deploy = json!({"scope": "deploy", "apps": ["shop"]});
    let ci = minted(&world, ADMIN, deploy.clone()).await;
    let twin = minted(&world, ADMIN, deploy).await;
    let read = minted(
        &world,
        ADMIN,
        json!({"org_slug": "personal", "scope": "read"}),
    )
    .await;
    let id = token_hash(&twin);
    for with in [ci.as_str(), &read, RIVAL] {
        let answer = revoke(&world, with, &id).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{answer:?}");
    }
    for own in [&ci, &read] {
        let answer = revoke(&world, own, &token_hash(own)).await;
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        assert!(!is_good(&world, own).await);
    }
    assert!(is_good(&world, &twin).await);
}

#[tokio::test]
async fn what_is_good_for_nothing_is_swept_away_when_a_token_is_made() {
    let world = World::new().await;
    world.app("shop").await;
    let own = Some("personal".parse().unwrap());
    let with = |name: &str, change: &dyn Fn(&mut Token)| {
        let mut token = token_of(name, own.clone(), Scope::Full);
        change(&mut token);
        token
    };
    let now = Timestamp::now();
    let apps = |name: &str| TokenApps::from([(name.parse().unwrap(), now)]);
    for token in [
        with("long-ended", &|t| {
            t.expires_at = Some(now - SignedDuration::from_hours(31 * 24))
        }),
        with("just-ended", &|t| {
            t.expires_at = Some(now - SignedDuration::from_hours(1))
        }),
        with("orphan", &|t| t.parent = Some("gone".into())),
        with("appless", &|t| {
            t.scope = Scope::Deploy { apps: apps("gone") }
        }),
        with("of-a-former-app", &|t| {
            t.scope = Scope::Deploy { apps: apps("shop") }
        }),
    ] {
        let revision = world.catalog.create(&token).await.unwrap();
        world.shared.seen(revision).await;
    }
    minted(&world, ADMIN, json!({"org_slug": "personal"})).await;
    let left = world.catalog.list::<Token>().await.unwrap();
    let mut names: Vec<&str> = left.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["just-ended", "made", ADMIN, RIVAL]);
}
