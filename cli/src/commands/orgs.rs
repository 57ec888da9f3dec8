//! `tern orgs`.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::{Value, json};

use crate::args::Orgs;
use crate::client::Client;
use crate::output;

pub async fn orgs(client: &Client, args: Orgs) -> Result<ExitCode> {
    match args {
        Orgs::List { json } => {
            let answer: Value = client.get("/v1/orgs").await?;
            list(
                &answer,
                "organizations",
                json,
                &["slug", "name"],
                "No organizations yet.",
            )?;
        }
        Orgs::Create { slug } => {
            let _: Value = client
                .post("/v1/orgs", &json!({"slug": slug, "name": slug}))
                .await?;
            println!("Organization {slug} is made.");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints the array `name` of an answer as a table of these fields.
pub fn list(answer: &Value, name: &str, json: bool, fields: &[&str], none: &str) -> Result<()> {
    if json {
        return output::json(answer);
    }
    let items = answer[name]
        .as_array()
        .or(answer.as_array())
        .map_or(&[][..], Vec::as_slice);
    let cell = |item: &Value, field: &&str| match &item[*field] {
        Value::String(s) => s.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    let rows: Vec<Vec<String>> = items
        .iter()
        .map(|i| fields.iter().map(|f| cell(i, f)).collect())
        .collect();
    let headers: Vec<String> = fields
        .iter()
        .map(|f| f.replace('_', " ").to_uppercase())
        .collect();
    output::table(
        &headers.iter().map(String::as_str).collect::<Vec<_>>(),
        &rows,
        none,
    );
    Ok(())
}
