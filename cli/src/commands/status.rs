//! `tern status`.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::{Value, json};

use super::wire::Machine;
use super::{app_of, certs};
use crate::args::AppArg;
use crate::client::Client;
use crate::output;

pub async fn run(client: &Client, args: &AppArg) -> Result<ExitCode> {
    let name = app_of(args)?;
    let app: Value = client.get(&format!("/v1/apps/{name}")).await?;
    let machines: Vec<Machine> = client.get(&format!("/v1/apps/{name}/machines")).await?;
    let certificates = certs::list(client, &name).await?;
    let hostnames = certs::hostnames(&certificates);
    if args.json {
        output::json(&json!({"app": app, "machines": machines, "hostnames": hostnames}))?;
        return Ok(ExitCode::SUCCESS);
    }
    println!("Name      {name}");
    println!(
        "Owner     {}",
        app["organization"]["slug"].as_str().unwrap_or("-")
    );
    println!("Status    {}", app["status"].as_str().unwrap_or("-"));
    for hostname in hostnames {
        println!("URL       https://{hostname}/");
    }
    for trouble in certs::troubles(&certificates) {
        println!("Trouble   {trouble}");
    }
    println!();
    table(&machines);
    Ok(ExitCode::SUCCESS)
}

/// Machines as a table.
pub fn table(machines: &[Machine]) {
    let now = jiff::Timestamp::now();
    let row = |m: &Machine| {
        let passing = m.checks.iter().filter(|c| c.status == "passing").count();
        let checks = if m.checks.is_empty() {
            "-".to_owned()
        } else {
            format!("{passing}/{} passing", m.checks.len())
        };
        vec![
            m.id.clone(),
            m.group().to_owned(),
            m.state.clone(),
            m.region.clone(),
            checks,
            m.private_ip.clone(),
            m.updated_at
                .map_or_else(|| "-".to_owned(), |t| output::ago(t, now)),
        ]
    };
    let rows: Vec<_> = machines.iter().map(row).collect();
    output::table(
        &[
            "ID", "PROCESS", "STATE", "REGION", "CHECKS", "ADDRESS", "UPDATED",
        ],
        &rows,
        "No Machines yet; make some with `tern deploy`.",
    );
}
