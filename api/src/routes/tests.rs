//! Every route of the table is walked with every kind of principal. A route whose right has no row here fails, and so
//! does one that `docs/security.md` does not list.

use http::Method;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use tern_catalog::{AppName, Record as _, Scope, Token, TokenApps};

use super::*;
use crate::auth::token_hash;
use crate::rights::OrganizationRight::{self, Write};
use crate::testing::{ADMIN, Answer, RIVAL, World, token_of};

/// Who calls, in the order of the columns of [`MATRIX`].
const WHO: [&str; 12] = [
    "",
    "garbage",
    "expired",
    RIVAL,
    "read",
    "deploy",
    "deploy-other",
    "deploy-former",
    "exec",
    "organization",
    ADMIN,
    "internal",
];

/// What each right's routes answer to each of [`WHO`]: `+` is let through, the others are 401, 403 and 404. They are
/// asked about app `shop` of organization `personal`.
#[rustfmt::skip]
const MATRIX: &[(Right, &str)] = &[
    // none, garbage, expired; rival; read; deploy: shop, blog, an earlier shop; exec; organization; admin; host
    (Public,                                       "+++ + + +++ + + + +"),
    (Known,                                        "111 + + +++ + + + +"),
    (Own,                                          "111 + + +++ + + + 3"),
    (Platform,                                     "111 3 3 333 3 3 + 3"),
    (Organization(OrganizationRight::Read),        "111 4 + 333 3 + + 4"),
    (Organization(Write),                          "111 4 3 333 3 + + 4"),
    (OrganizationInBody(Write),                    "111 4 3 333 3 + + 3"),
    (App(Pull),                                    "111 4 + +44 + + + +"),
    (App(Read),                                    "111 4 + +44 + + + 3"),
    (App(Exec),                                    "111 4 3 +44 + + + 3"),
    (App(Deploy),                                  "111 4 3 +44 3 + + 3"),
    (App(Manage),                                  "111 4 3 344 3 + + 3"),
];

/// A world with two apps, and a token of each kind whose text is its name in [`WHO`].
async fn world() -> (World, tern_catalog::App, Vec<Token>) {
    let world = World::new().await;
    world.app("shop").await;
    world.app("blog").await;
    let snapshot = world.shared.view.snapshot();
    let app = |name: &str| {
        snapshot
            .apps
            .get(&name.parse::<AppName>().unwrap())
            .unwrap()
    };
    let shop = tern_catalog::App::clone(app("shop"));
    let only = |name: &str, made: Timestamp| TokenApps::from([(name.parse().unwrap(), made)]);
    let deploy = |apps| Scope::Deploy { apps };
    let earlier = shop.created_at - SignedDuration::from_nanos(1);
    let own = Some(shop.organization.clone());
    let mut tokens = vec![
        token_of("expired", own.clone(), Scope::Full),
        token_of("read", own.clone(), Scope::Read),
        token_of("organization", own.clone(), Scope::Full),
    ];
    tokens[0].expires_at = Some(Timestamp::now());
    for (name, scope) in [
        ("deploy", deploy(only("shop", shop.created_at))),
        ("deploy-other", deploy(only("blog", app("blog").created_at))),
        ("deploy-former", deploy(only("shop", earlier))),
        (
            "exec",
            Scope::MachineExec {
                apps: only("shop", shop.created_at),
            },
        ),
    ] {
        tokens.push(token_of(name, own.clone(), scope));
    }
    let mut revision = 0;
    for token in &tokens {
        revision = world.catalog.create(token).await.unwrap();
    }
    world.shared.seen(revision).await;
    (world, shop, tokens)
}

/// Puts back what the call before may have destroyed, or swept away as good for nothing.
async fn restore(world: &World, shop: &tern_catalog::App, tokens: &[Token]) {
    let snapshot = world.shared.view.snapshot();
    let mut revision = 0;
    if !snapshot.apps.contains_key(&shop.name) {
        revision = world.catalog.put(shop).await.unwrap();
    }
    for token in tokens {
        if !snapshot.tokens.contains_key(&token.hash) {
            revision = world.catalog.put(token).await.unwrap();
        }
    }
    world.shared.seen(revision).await;
    let registry = &world.shared.registry;
    if registry.find_manifest(&shop.name, "v1").unwrap().is_none() {
        let kind = "application/json";
        registry
            .put_manifest(&shop.name, Some("v1"), kind, b"{}")
            .unwrap();
    }
}

/// Calls a route about this app and this organization.
async fn call(world: &World, route: &Route, token: &str, app: &str, org: &str) -> Answer {
    let path = route.path.replace("{app}", app).replace("{org}", org);
    let path = path.replace("{id}", "00000000000000");
    let path = path.replace("{reference}", "v1");
    let mut steps: Vec<&str> = path.split('/').collect();
    for step in &mut steps {
        if step.starts_with('{') {
            *step = "none";
        }
    }
    let path = steps.join("/");
    let body = json!({"org_slug": org, "app_name": "made", "slug": "made", "name": "made"});
    let method = Method::from_bytes(route.method.as_bytes()).unwrap();
    let mut request = Request::builder().method(method).uri(&path);
    if !token.is_empty() {
        request = request.header(AUTHORIZATION, format!("Bearer {token}"));
    }
    world
        .send(request.body(Body::from(body.to_string())).unwrap())
        .await
}

#[tokio::test]
async fn every_route_lets_through_whom_its_right_says_and_nobody_else() {
    let (world, shop, tokens) = world().await;
    for route in table() {
        let row = MATRIX.iter().find(|(right, _)| *right == route.right);
        let (_, row) = row.unwrap_or_else(|| panic!("{:?} has no row in MATRIX", route.right));
        let row: Vec<char> = row.chars().filter(|c| *c != ' ').collect();
        assert_eq!(row.len(), WHO.len(), "{:?}", route.right);
        for (who, expected) in WHO.iter().zip(row) {
            restore(&world, &shop, &tokens).await;
            let answer = call(&world, &route, who, "shop", "personal").await;
            let said = String::from_utf8_lossy(&answer.body).into_owned();
            let what = format!("{} {} by {who:?}: {answer:?}", route.method, route.path);
            let unseen = said.contains("app shop not found")
                || said.contains("no app shop")
                || said.contains("organization personal not found")
                || said.contains("page not found");
            let status = answer.status.as_u16();
            match expected {
                '+' => assert!(status != 401 && status != 403 && !unseen, "{what}"),
                '1' => {
                    assert_eq!(status, 401, "{what}");
                    let told = said.contains("has expired");
                    assert_eq!(told, *who == "expired" && route.method != "HEAD", "{what}");
                }
                '3' => assert_eq!(status, 403, "{what}"),
                _ => {
                    assert_eq!(status, 404, "{what}");
                    let absent = call(&world, &route, who, "none", "absent").await;
                    let absent_said = String::from_utf8_lossy(&absent.body);
                    let absent_said = absent_said.replace("none", "shop");
                    let absent_said = absent_said.replace("absent", "personal");
                    assert_eq!(
                        (absent.status, absent_said),
                        (answer.status, said),
                        "{what}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_route_that_names_an_app_or_an_organization_needs_a_right_on_it() {
    for route in table() {
        let what = format!("{} {}", route.method, route.path);
        let by_app = matches!(route.right, App(_));
        assert_eq!(route.path.contains("{app}"), by_app, "{what}");
        let by_org = matches!(route.right, Organization(_));
        assert_eq!(route.path.contains("{org}"), by_org, "{what}");
        // Who may only look changes nothing.
        if matches!(
            route.right,
            Public | Known | App(Pull | Read) | Organization(OrganizationRight::Read)
        ) {
            assert!(matches!(route.method, "GET" | "HEAD"), "{what}");
        }
    }
}

#[test]
fn the_documentation_lists_every_route_with_its_right() {
    let mut lines: Vec<String> = table()
        .iter()
        .map(|route| {
            let right = match route.right {
                App(right) => format!("app: {right:?}"),
                Organization(right) | OrganizationInBody(right) => {
                    format!("organization: {right:?}")
                }
                other => format!("{other:?}"),
            };
            let right = right.to_lowercase();
            format!("{:<7}{:<55}{right}", route.method, route.path)
        })
        .collect();
    lines.sort_by(|a, b| a[7..].cmp(&b[7..]));
    let listed = include_str!("../../../docs/security.md");
    let listed = listed.split("```text\n").nth(1).unwrap();
    let listed = listed.split("```").next().unwrap();
    let lines = lines.join("\n");
    assert_eq!(
        listed.trim_end(),
        lines,
        "docs/security.md must list:\n{lines}"
    );
}

#[tokio::test]
async fn who_has_several_tokens_may_what_any_of_them_may() {
    let (world, ..) = world().await;
    let ask = async |tokens: &str, path: &str| {
        let request = Request::post(path).header(AUTHORIZATION, format!("FlyV1 {tokens}"));
        let answer = world.send(request.body(Body::empty()).unwrap()).await;
        answer.status.as_u16()
    };
    let lease = "/v1/apps/shop/lease";
    assert_eq!(ask("read,garbage,deploy,expired", lease).await, 201);
    // What says most is told.
    assert_eq!(ask("garbage,deploy-other,read,expired", lease).await, 403);
    assert_eq!(ask("garbage,deploy-other,expired", lease).await, 404);
    assert_eq!(ask("garbage,expired", lease).await, 401);
}

#[tokio::test]
async fn an_ended_token_is_told_why_and_a_wrong_one_nothing() {
    let (world, ..) = world().await;
    for path in ["/v1/apps", "/v1/apps/shop", "/v2/", "/v2/shop/tags/list"] {
        let ask = async |token| world.call(token, Method::GET, path, Body::empty()).await;
        let ended = ask("expired").await;
        let said = String::from_utf8_lossy(&ended.body).into_owned();
        assert_eq!(ended.status, StatusCode::UNAUTHORIZED);
        assert!(said.contains("has expired at 20"), "{said}");
        assert!(said.contains("tern tokens create"), "{said}");
        let wrong = ask("garbage").await;
        assert!(!format!("{wrong:?}").contains("expired"), "{wrong:?}");
    }
}

#[tokio::test]
async fn an_app_that_changed_hands_while_a_body_was_on_its_way_is_not_touched() {
    let (world, shop, _) = world().await;
    let (send, receive) = tokio::sync::oneshot::channel::<&'static str>();
    let body = Body::from_stream(futures::stream::once(receive));
    let request = Request::post("/v1/apps/shop/secrets")
        .header(AUTHORIZATION, "Bearer deploy")
        .body(body)
        .unwrap();
    let call = world.send(request);
    tokio::pin!(call);
    assert!(futures::poll!(&mut call).is_pending(), "let in");
    let mut other = shop.clone();
    other.organization = "rivals".parse().unwrap();
    let revision = world.catalog.put(&other).await.unwrap();
    world.shared.seen(revision).await;
    send.send(r#"{"values": {"A": "b"}}"#).unwrap();
    let answer = call.await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND, "{answer:?}");
    let key = tern_catalog::AppSecrets::key_of("shop");
    let entry = world.catalog.store().get(&key).await.unwrap();
    assert!(entry.is_none(), "{entry:?}");
}

#[tokio::test]
async fn a_token_is_good_as_long_as_those_that_made_it() {
    let (world, ..) = world().await;
    let mut above = token_hash("organization");
    for n in 0..9 {
        let name = format!("made-{n}");
        let mut token: Token = token_of(&name, Some("personal".parse().unwrap()), Scope::Full);
        token.parent = Some(std::mem::replace(&mut above, token.hash.clone()));
        let revision = world.catalog.create(&token).await.unwrap();
        world.shared.seen(revision).await;
    }
    let ask = async |token: &str| {
        let answer = world.call(token, Method::GET, "/v1/apps", Body::empty());
        answer.await.status.as_u16()
    };
    assert_eq!((ask("made-0").await, ask("made-6").await), (200, 200));
    assert_eq!(ask("made-7").await, 401, "too many are above it");
    let gone = world.catalog.delete::<Token>(&token_hash("made-3")).await;
    world.shared.seen(gone.unwrap()).await;
    let after = (
        ask("made-2").await,
        ask("made-4").await,
        ask("made-6").await,
    );
    assert_eq!(after, (200, 401, 401));
}
