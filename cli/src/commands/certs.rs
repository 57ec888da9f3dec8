//! `tern certs`.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::{Value, json};
use tern_catalog::AppName;

use super::app_of;
use crate::args::Certs;
use crate::client::Client;
use crate::output;

pub async fn run(client: &Client, args: Certs) -> Result<ExitCode> {
    match args {
        Certs::List(arg) => {
            let app = app_of(&arg)?;
            let answer: Value = client.get(&format!("/v1/apps/{app}/certificates")).await?;
            if arg.json {
                output::json(&answer)?;
                return Ok(ExitCode::SUCCESS);
            }
            let text = |v: &Value| v.as_str().unwrap_or("-").to_owned();
            let row = |c: &Value| {
                let status = if c["status"].is_string() {
                    &c["status"]
                } else {
                    &c["state"]
                };
                vec![
                    text(&c["hostname"]),
                    text(status),
                    text(&c["not_after"]),
                    text(&c["last_error"]),
                ]
            };
            let rows: Vec<_> = certificates(&answer).iter().map(row).collect();
            output::table(
                &["HOST NAME", "STATUS", "VALID UNTIL", "LAST ERROR"],
                &rows,
                "No host names yet; add one with `tern certs add`.",
            );
        }
        Certs::Add { hostname, app } => {
            let app = app_of(&app)?;
            let _: Value = client
                .post(
                    &format!("/v1/apps/{app}/certificates/acme"),
                    &json!({"hostname": hostname}),
                )
                .await?;
            println!(
                "{hostname} is served by {app}; its certificate is being got. See `tern certs list`."
            );
        }
        Certs::Remove { hostname, app } => {
            let app = app_of(&app)?;
            client
                .delete(&format!("/v1/apps/{app}/certificates/{hostname}"))
                .await?;
            println!("{hostname} is no longer served.");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// An app's host names.
pub async fn hostnames(client: &Client, app: &AppName) -> Result<Vec<String>> {
    let answer: Value = client.get(&format!("/v1/apps/{app}/certificates")).await?;
    let name = |c: &Value| c["hostname"].as_str().map(str::to_owned);
    Ok(certificates(&answer).iter().filter_map(name).collect())
}

fn certificates(answer: &Value) -> &[Value] {
    answer["certificates"]
        .as_array()
        .or(answer.as_array())
        .map_or(&[], Vec::as_slice)
}
