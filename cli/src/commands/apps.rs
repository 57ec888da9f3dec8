//! `tern apps`.

use std::process::ExitCode;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::args::Apps;
use crate::client::Client;
use crate::output;

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
            println!("App {name} is being destroyed.");
        }
    }
    Ok(ExitCode::SUCCESS)
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
