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

/// The certificates of an app's host names.
pub async fn list(client: &Client, app: &AppName) -> Result<Vec<Value>> {
    let answer: Value = client.get(&format!("/v1/apps/{app}/certificates")).await?;
    Ok(certificates(&answer).to_vec())
}

/// The host names.
pub fn hostnames(certificates: &[Value]) -> Vec<String> {
    let name = |c: &Value| c["hostname"].as_str().map(str::to_owned);
    certificates.iter().filter_map(name).collect()
}

/// What to say of certificates that cannot be had: why, and when that is tried again.
pub fn troubles(certificates: &[Value]) -> Vec<String> {
    let told = |c: &Value| {
        let error = c["last_error"].as_str().filter(|e| !e.is_empty())?;
        let hostname = c["hostname"].as_str()?;
        let what = if c["status"] == "issued" {
            "cannot be renewed"
        } else {
            "cannot be had yet"
        };
        let next = c["next_attempt"].as_str();
        let next = next.map_or_else(String::new, |at| format!("; next try at {at}"));
        let error = error.trim_end_matches('.');
        Some(format!(
            "the certificate for {hostname} {what}: {error}{next}"
        ))
    };
    certificates.iter().filter_map(told).collect()
}

fn certificates(answer: &Value) -> &[Value] {
    answer["certificates"]
        .as_array()
        .or(answer.as_array())
        .map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_that_fails_is_told_with_its_reason_and_next_try() {
        let all = [
            json!({"hostname": "a.example", "status": "issued", "last_error": null}),
            json!({"hostname": "b.example", "status": "pending"}),
            json!({"hostname": "c.example", "status": "failed", "last_error": "no A record.", "next_attempt": "2026-11-28T03:00:00Z"}),
            json!({"hostname": "d.example", "status": "issued", "last_error": "rate limited"}),
        ];
        assert_eq!(
            troubles(&all),
            [
                "the certificate for c.example cannot be had yet: no A record; next try at 2026-11-28T03:00:00Z",
                "the certificate for d.example cannot be renewed: rate limited",
            ]
        );
        assert_eq!(hostnames(&all).len(), 4);
    }
}
