use std::path::PathBuf;
use std::time::Duration;

use super::*;
use crate::args::Deploy;
use crate::commands::testing::{World, client_with};

fn create(scope: TokenScope, apps: &[&str]) -> CreateToken {
    CreateToken {
        kind: Some(scope),
        scope: None,
        name: None,
        app: apps.iter().map(|app| app.parse().unwrap()).collect(),
        config: PathBuf::from("fly.toml"),
        org: None,
        expiry: Some(Duration::from_secs(3600)),
        json: false,
    }
}

/// A client with a new token.
async fn made(world: &World, create: &CreateToken) -> Client {
    let body = wanted(&world.client, create).await.unwrap();
    let answer: Value = world.client.post(PATH, &body).await.unwrap();
    client_with(world.address, answer["token"].as_str().unwrap())
}

async fn listed(client: &Client) -> Vec<Value> {
    let answer: Value = client.get(PATH).await.unwrap();
    answer["tokens"].as_array().unwrap().clone()
}

fn revoke(id: &str, keep_made: bool) -> Tokens {
    Tokens::Revoke {
        ids: vec![id.to_owned()],
        keep_made,
        yes: true,
    }
}

#[tokio::test]
async fn a_deploy_token_is_all_that_a_pipeline_needs_for_its_app() {
    let world = World::new().await;
    let dir = world
        .app("shop", "[http_service]\ninternal_port = 8080\n")
        .await;
    let other = world.app("blog", "").await;
    let ci = made(&world, &create(TokenScope::Deploy, &["shop"])).await;
    let deploy = |directory: &PathBuf| Deploy {
        directory: directory.clone(),
        image: Some("example.com/good:1".to_owned()),
        wait_timeout: Some(Duration::from_secs(120)),
        ..Deploy::default()
    };
    let first = Box::pin(crate::commands::deploy::run(&ci, deploy(&dir))).await;
    first.unwrap();
    let second = Box::pin(crate::commands::deploy::run(&ci, deploy(&dir))).await;
    second.unwrap();
    assert_eq!(world.machine("shop").await["state"], "started");
    let elsewhere = Box::pin(crate::commands::deploy::run(&ci, deploy(&other))).await;
    let refused = output::chain(&elsewhere.unwrap_err());
    assert!(refused.contains("blog"), "{refused}");
    let readonly = made(&world, &create(TokenScope::Readonly, &[])).await;
    let read = Box::pin(crate::commands::deploy::run(&readonly, deploy(&dir))).await;
    let refused = output::chain(&read.unwrap_err());
    assert!(refused.contains("may deploy app shop"), "{refused}");
}

#[tokio::test]
async fn a_table_row_says_what_a_token_may_and_until_when() {
    let world = World::new().await;
    world.app("shop", "").await;
    let exec = made(&world, &create(TokenScope::MachineExec, &["shop"])).await;
    let all = listed(&exec).await;
    let now = Timestamp::now();
    let shown = row(&all[0], now);
    let (id, last) = (all[0]["id"].as_str().unwrap(), &all[0]["last_characters"]);
    let expires = all[0]["expires_at"].as_str().unwrap();
    assert_eq!(
        shown,
        [
            id,
            "machine-exec token",
            "personal",
            "machine-exec",
            "shop",
            &format!("{}Z", &expires[..19]),
            &format!("…{}", last.as_str().unwrap()),
        ]
    );
    let later = now + jiff::SignedDuration::from_hours(4);
    assert_eq!(row(&all[0], later)[5], "ended 3h ago");
    let admin = listed(&world.client).await;
    let admin = admin.iter().find(|t| t["name"] == "test").unwrap();
    assert_eq!(row(admin, now)[2..], ["-", "admin", "-", "never", "-"]);
}

#[tokio::test]
async fn what_is_revoked_takes_with_it_what_it_made_only_when_that_is_said() {
    let world = World::new().await;
    let org = made(&world, &create(TokenScope::Org, &[])).await;
    let mut child = create(TokenScope::Readonly, &[]);
    child.expiry = Some(Duration::from_secs(60));
    let body = wanted(&org, &child).await.unwrap();
    let _: Value = org.post(PATH, &body).await.unwrap();
    let all = listed(&world.client).await;
    let of = |scope: &str| all.iter().find(|t| t["name"] == scope).unwrap();
    let id = of("org token")["id"].as_str().unwrap();
    assert_eq!(made_with(&all, id), 1);
    run(&world.client, revoke(id, true)).await.unwrap();
    let left = listed(&world.client).await;
    let names: Vec<&str> = left.iter().map(|t| t["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["test", "readonly token"]);
    run(
        &world.client,
        revoke(left[1]["id"].as_str().unwrap(), false),
    )
    .await
    .unwrap();
    assert_eq!(listed(&world.client).await.len(), 1);
    let error = org.get::<Value>(PATH).await.unwrap_err().to_string();
    assert!(error.contains("tern auth login"), "{error}");
}
