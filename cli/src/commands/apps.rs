//! `tern apps`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use http::StatusCode;
use serde_json::{Value, json};

use crate::args::Apps;
use crate::client::{Client, is_status};
use crate::output;

/// How long the hosts of an app have to remove it. They kill its Machines, and delete files.
const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(500);

pub async fn run(client: &Client, args: Apps) -> Result<ExitCode> {
    match args {
        Apps::List { org, json } => {
            let query = org.map(|o| format!("?org_slug={o}")).unwrap_or_default();
            let answer: Value = client.get(&format!("/v1/apps{query}")).await?;
            if json {
                output::json(&answer)?;
                return Ok(ExitCode::SUCCESS);
            }
            let rows: Vec<_> = answer["apps"]
                .as_array()
                .into_iter()
                .flatten()
                .map(row)
                .collect();
            output::table(
                &["NAME", "ORG", "STATUS", "MACHINES"],
                &rows,
                "No apps yet; make one with `tern launch`.",
            );
        }
        Apps::Create { name, org } => {
            create(client, name.as_str(), org.as_str()).await?;
            println!("App {name} is made. Deploy to it with `tern deploy`.");
        }
        Apps::Destroy { name, yes } => {
            if !yes && !output::confirm(&format!("Destroy {name}, its Machines and their disks?")) {
                bail!("{name} is left as it is; give --yes to destroy it without asking");
            }
            client
                .delete(&format!("/v1/apps/{name}?force=true"))
                .await?;
            wait_until_free(client, name.as_str(), PATIENCE).await?;
            println!("App {name} is destroyed; its name is free.");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Tells what is still there of an app that is being destroyed, until nothing is.
async fn wait_until_free(client: &Client, name: &str, patience: Duration) -> Result<()> {
    let until = Instant::now() + patience;
    let mut told = String::new();
    loop {
        let left = match client.get::<Value>(&format!("/v1/apps/{name}")).await {
            Ok(app) if app["status"] == "deleting" => {
                app["deleting"].as_str().unwrap_or("something").to_owned()
            }
            // Somebody has made it anew already.
            Ok(_) => return Ok(()),
            Err(error) if is_status(&error, StatusCode::NOT_FOUND) => return Ok(()),
            Err(error) if is_status(&error, StatusCode::FORBIDDEN) => return Ok(()),
            Err(error) => return Err(error),
        };
        if left != told {
            eprintln!("Waiting for {left} of {name} to be removed");
            told = left;
        }
        if Instant::now() >= until {
            bail!(
                "app {name} is being destroyed; still there after {} s: {told}. Is its host up? What is left goes as soon as \
                 it is, and the name is free then; until that `tern apps list` shows it as deleting",
                patience.as_secs()
            );
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Makes an app.
pub async fn create(client: &Client, name: &str, org: &str) -> Result<()> {
    let _: Value = client
        .post("/v1/apps", &json!({"app_name": name, "org_slug": org}))
        .await?;
    Ok(())
}

fn row(app: &Value) -> Vec<String> {
    let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    vec![
        text(&app["name"]),
        app["organization"]["slug"]
            .as_str()
            .unwrap_or("-")
            .to_owned(),
        app["status"].as_str().unwrap_or("-").to_owned(),
        text(&app["machine_count"]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::testing::World;

    #[tokio::test]
    async fn a_destroyed_app_is_waited_for_and_what_keeps_it_is_told() {
        let mut world = World::new().await;
        world.app("shop", "").await;
        let config = json!({"config": {"image": "example.com/good:1"}});
        let made: Result<Value> = world.client.post("/v1/apps/shop/machines", &config).await;
        made.unwrap();
        world.host_goes_away().await;
        let path = "/v1/apps/shop?force=true";
        world.client.delete(path).await.unwrap();
        let error = wait_until_free(&world.client, "shop", Duration::ZERO).await;
        let told = error.unwrap_err().to_string();
        assert!(told.contains("1 Machine. Is its host up?"), "{told}");
        world.host_is_back();
        let freed = wait_until_free(&world.client, "shop", PATIENCE).await;
        freed.unwrap();
        create(&world.client, "shop", "personal").await.unwrap();
    }
}
