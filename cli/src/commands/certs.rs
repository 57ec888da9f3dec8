//! `tern certs`.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::{Value, json};
use tern_catalog::{AppName, Hostname};

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
            let rows: Vec<_> = certificates(&answer).iter().map(row).collect();
            output::table(
                &COLUMNS,
                &rows,
                "No host names yet; add one with `tern certs add`.",
            );
        }
        Certs::Show { hostname, app } => {
            let json = app.json;
            let app = app_of(&app)?;
            let path = format!("/v1/apps/{app}/certificates/{hostname}");
            let answer: Value = client.get(&path).await?;
            if json {
                output::json(&answer)?;
                return Ok(ExitCode::SUCCESS);
            }
            for (what, value) in COLUMNS.iter().zip(row(&answer)) {
                println!("{what:12} {value}");
            }
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
                "{} is served by {app}; its certificate is being got. See `tern certs list`.",
                hostname.shown()
            );
        }
        Certs::Remove {
            hostname,
            force,
            app,
        } => {
            let app = app_of(&app)?;
            let force = if force { "?force=true" } else { "" };
            client
                .delete(&format!("/v1/apps/{app}/certificates/{hostname}{force}"))
                .await?;
            println!("{} is no longer served.", hostname.shown());
        }
    }
    Ok(ExitCode::SUCCESS)
}

const COLUMNS: [&str; 5] = ["HOST NAME", "STATUS", "VALID UNTIL", "NEXT", "REASON"];

/// What is shown of a certificate, in the order of [`COLUMNS`].
fn row(certificate: &Value) -> Vec<String> {
    let text = |v: &Value| v.as_str().unwrap_or("-").to_owned();
    let name = text(&certificate["hostname"]);
    let shown = name.parse().map_or(name, |n: Hostname| n.shown());
    let status = if certificate["status"].is_string() {
        &certificate["status"]
    } else {
        &certificate["state"]
    };
    let next = match certificate["next_attempt"].as_str() {
        Some(at) if status == "issued" && certificate["last_error"].is_null() => {
            format!("renewal at {at}")
        }
        Some(at) => format!("tried at {at}"),
        None => "-".to_owned(),
    };
    vec![
        shown,
        text(status),
        text(&certificate["not_after"]),
        next,
        text(&certificate["last_error"]),
    ]
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

    #[test]
    fn a_name_is_shown_in_its_script_with_what_comes_next() {
        let shown = row(&json!({
            "hostname": "xn--bcher-kva.example", "status": "pending",
            "last_error": "the directory takes no order yet", "next_attempt": "2026-11-28T03:00:00Z",
        }));
        assert_eq!(
            shown,
            [
                "bücher.example",
                "pending",
                "-",
                "tried at 2026-11-28T03:00:00Z",
                "the directory takes no order yet"
            ]
        );
        let issued = row(&json!({
            "hostname": "a.example", "status": "issued", "not_after": "2027-01-01T00:00:00Z",
            "last_error": null, "next_attempt": "2026-12-01T00:00:00Z",
        }));
        assert_eq!(issued[3], "renewal at 2026-12-01T00:00:00Z");
    }
}
