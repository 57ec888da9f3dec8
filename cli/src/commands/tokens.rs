//! `tern tokens`.

use std::process::ExitCode;

use anyhow::{Result, bail};
use jiff::Timestamp;
use serde_json::{Value, json};
use tern_catalog::{AppName, GoDuration};

use super::app_of;
use crate::args::{AppArg, CreateToken, TokenScope, Tokens};
use crate::client::Client;
use crate::output;

const PATH: &str = "/v1/tokens";

pub async fn run(client: &Client, args: Tokens) -> Result<ExitCode> {
    match args {
        Tokens::Create(create) => {
            let answer: Value = client.post(PATH, &wanted(client, &create).await?).await?;
            if create.json {
                output::json(&answer)?;
            } else {
                println!("{}", answer["token"].as_str().unwrap_or_default());
            }
            eprintln!("Keep it: it is not shown again.");
        }
        Tokens::List { org, json } => {
            let mut answer: Value = client.get(PATH).await?;
            if let (Some(org), Some(all)) = (org, answer["tokens"].as_array_mut()) {
                all.retain(|token| token["org_slug"] == org.as_str());
            }
            if json {
                output::json(&answer["tokens"])?;
            } else {
                table(&answer["tokens"]);
            }
        }
        Tokens::Revoke {
            ids,
            keep_made,
            yes,
        } => {
            let all: Value = client.get(PATH).await?;
            let all = all["tokens"].as_array().map_or(&[][..], Vec::as_slice);
            let made: usize = ids.iter().map(|id| made_with(all, id)).sum();
            let asked = format!("{made} more were made with what you revoke, and end too. Go on?");
            if made > 0 && !keep_made && !yes && !output::confirm(&asked) {
                bail!(
                    "nothing was revoked: {made} other tokens were made with these, and would end too. \
                     Give --yes for that, or --keep-made to leave those good"
                );
            }
            for id in ids {
                let path = format!("{PATH}/{id}?keep_made={keep_made}");
                let answer: Value = client.remove(&path).await?;
                let revoked = answer["revoked"].as_array().map_or(&[][..], Vec::as_slice);
                for id in revoked.iter().filter_map(Value::as_str) {
                    println!("{id} is good no more.");
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What the API is asked for.
async fn wanted(client: &Client, create: &CreateToken) -> Result<Value> {
    let Some(kind) = create.scope.or(create.kind) else {
        bail!("say what the token may do, as in `tern tokens create deploy`");
    };
    let (scope, by_app, by_org) = match kind {
        TokenScope::Deploy => ("deploy", true, false),
        TokenScope::MachineExec => ("machine_exec", true, false),
        TokenScope::Readonly => ("read", false, true),
        TokenScope::Org => ("full", false, true),
        TokenScope::Admin => ("full", false, false),
    };
    let org = match &create.org {
        Some(_) if kind == TokenScope::Admin => {
            bail!(
                "an admin token is for every organization; leave --org out, or make one of scope org"
            );
        }
        Some(org) => Some(org.to_string()),
        None if by_org => Some(only_organization(client).await?),
        None => None,
    };
    Ok(json!({
        "name": create.name.clone().unwrap_or_else(|| format!("{} token", name_of(scope, org.is_some()))),
        "scope": scope,
        "org_slug": org,
        "apps": if by_app { apps(create)? } else { Vec::new() },
        "expiry": create.expiry.map(|expiry| GoDuration(expiry).to_string()),
    }))
}

fn apps(create: &CreateToken) -> Result<Vec<AppName>> {
    if !create.app.is_empty() {
        return Ok(create.app.clone());
    }
    let named = AppArg {
        app: None,
        config: create.config.clone(),
        json: false,
    };
    Ok(vec![app_of(&named)?])
}

async fn only_organization(client: &Client) -> Result<String> {
    let answer: Value = client.get("/v1/orgs").await?;
    let all = answer["organizations"].as_array();
    let all: Vec<&str> = all
        .into_iter()
        .flatten()
        .filter_map(|org| org["slug"].as_str())
        .collect();
    match all[..] {
        [only] => Ok(only.to_owned()),
        _ => bail!(
            "for which organization? Give --org, one of: {}",
            all.join(", ")
        ),
    }
}

/// How many tokens were made with this one, and with those.
fn made_with(all: &[Value], id: &str) -> usize {
    // Ids may be given by their first digits.
    let made = all.iter().filter(|token| {
        let maker = token["made_by"].as_str();
        maker.is_some_and(|maker| maker.starts_with(id) || id.starts_with(maker))
    });
    made.map(|token| 1 + token["id"].as_str().map_or(0, |id| made_with(all, id)))
        .sum()
}

/// Prints tokens as the API lists them.
pub fn table(tokens: &Value) {
    let now = Timestamp::now();
    let all = tokens.as_array().into_iter().flatten();
    let rows: Vec<Vec<String>> = all.map(|token| row(token, now)).collect();
    output::table(&HEADERS, &rows, "No tokens.");
}

const HEADERS: [&str; 7] = ["ID", "NAME", "ORG", "SCOPE", "APPS", "EXPIRES", "LAST"];

fn row(token: &Value, now: Timestamp) -> Vec<String> {
    let text = |field: &str| token[field].as_str().unwrap_or("-").to_owned();
    let apps: Vec<&str> = token["apps"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let end = token["expires_at"].as_str().map(str::parse::<Timestamp>);
    let expires = match end {
        Some(Ok(end)) if end <= now => format!("ended {}", output::ago(end, now)),
        Some(Ok(end)) => format!("{end:.0}"),
        Some(Err(_)) => text("expires_at"),
        None => "never".to_owned(),
    };
    vec![
        text("id"),
        text("name"),
        text("org_slug"),
        name_of(&text("scope"), token["org_slug"].is_string()),
        if apps.is_empty() {
            "-".to_owned()
        } else {
            apps.join(",")
        },
        expires,
        match token["last_characters"].as_str() {
            Some("") | None => "-".to_owned(),
            Some(last) => format!("…{last}"),
        },
    ]
}

/// A scope as `tern tokens create` takes it.
fn name_of(scope: &str, has_organization: bool) -> String {
    match (scope, has_organization) {
        ("full", true) => "org",
        ("full", false) => "admin",
        ("read", _) => "readonly",
        ("machine_exec", _) => "machine-exec",
        (other, _) => other,
    }
    .to_owned()
}

#[cfg(test)]
mod tests;
