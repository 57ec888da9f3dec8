//! `tern secrets`.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use serde_json::{Map, Value, json};
use tern_catalog::{AppName, SecretName};

use super::deploy::{self, Change};
use super::{app_of, deploy::own_groups};
use crate::args::Secrets;
use crate::client::Client;
use crate::output;

/// Most that is read of standard input.
const MAX_INPUT: u64 = 4 << 20;

type Values = BTreeMap<SecretName, Option<String>>;

pub async fn run(client: &Client, args: Secrets) -> Result<ExitCode> {
    match args {
        Secrets::Set {
            pairs,
            stage,
            detach,
            app,
        } => {
            let values = pairs.iter().map(|pair| pair_of(pair));
            let values = values.collect::<Result<Values>>()?;
            set(client, &app_of(&app)?, &values, stage, detach).await?;
        }
        Secrets::Import { stage, detach, app } => {
            let app = app_of(&app)?;
            let mut text = String::new();
            let read = std::io::stdin().take(MAX_INPUT).read_to_string(&mut text);
            read.context("standard input cannot be read as text")?;
            let values = imported(&text)?;
            if values.is_empty() {
                bail!("standard input holds no NAME=VALUE; as in `tern secrets import < .env`");
            }
            set(client, &app, &values, stage, detach).await?;
        }
        Secrets::Unset {
            names,
            stage,
            detach,
            app,
        } => {
            let values: Values = names.into_iter().map(|name| (name, None)).collect();
            set(client, &app_of(&app)?, &values, stage, detach).await?;
        }
        Secrets::List(arg) => {
            let app = app_of(&arg)?;
            let answer: Value = client.get(&format!("/v1/apps/{app}/secrets")).await?;
            if arg.json {
                output::json(&answer["secrets"])?;
                return Ok(ExitCode::SUCCESS);
            }
            let text = |v: &Value| v.as_str().unwrap_or("-").to_owned();
            let row =
                |s: &Value| vec![text(&s["name"]), text(&s["digest"]), text(&s["updated_at"])];
            let secrets = answer["secrets"].as_array();
            let rows: Vec<_> = secrets.into_iter().flatten().map(row).collect();
            output::table(
                &["NAME", "DIGEST", "SET AT"],
                &rows,
                "No secrets yet; set one with `tern secrets set NAME=VALUE`.",
            );
        }
        Secrets::Deploy { detach, app } => {
            let app = app_of(&app)?;
            let answer: Value = client.get(&format!("/v1/apps/{app}/secrets")).await?;
            deploy(client, &app, &answer["version"], detach).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn set(
    client: &Client,
    app: &AppName,
    values: &Values,
    stage: bool,
    detach: bool,
) -> Result<()> {
    let path = format!("/v1/apps/{app}/secrets");
    let before: Value = client.get(&path).await?;
    let after: Value = client.post(&path, &json!({"values": values})).await?;
    if before["version"] == after["version"] {
        println!("The secrets of {app} are so already; nothing was changed.");
        return Ok(());
    }
    if stage {
        println!(
            "The secrets of {app} are changed. Its Machines get them at their next start, or by `tern secrets deploy`."
        );
        return Ok(());
    }
    deploy(client, app, &after["version"], detach).await
}

/// Gives them to the Machines that there are, as a deploy of what they run.
async fn deploy(client: &Client, app: &AppName, version: &Value, detach: bool) -> Result<()> {
    let machines: Vec<Value> = client.get(&format!("/v1/apps/{app}/machines")).await?;
    if machines.is_empty() {
        println!("{app} has no Machines yet; its first deploy gets these secrets.");
        return Ok(());
    }
    let change = Change {
        description: Some("Secrets".to_owned()),
        secrets: version.as_u64(),
        detach,
    };
    let changed = deploy::change(client, app, change, |found| {
        Ok(own_groups(found, &Map::new()))
    });
    Box::pin(changed).await.context(
        "the secrets are set, but not all Machines have them; `tern secrets deploy` tries again",
    )?;
    println!("The Machines of {app} have its secrets.");
    Ok(())
}

/// An error never repeats a value.
fn pair_of(pair: &str) -> Result<(SecretName, Option<String>)> {
    let Some((name, value)) = pair.split_once('=') else {
        bail!("a secret is set as NAME=VALUE; one of those given has no `=`");
    };
    Ok((name.trim().parse()?, Some(value.to_owned())))
}

/// As flyctl reads it: a `NAME=VALUE` a line, `#` before a comment, and values of several lines between `"""`. One pair of
/// quotes around a value is not part of it.
fn imported(text: &str) -> Result<Values> {
    const LONG: &str = "\"\"\"";
    let mut values = Values::new();
    let mut lines = text.lines().enumerate();
    while let Some((n, line)) = lines.next() {
        let line = line.trim_start();
        if line.trim_end().is_empty() || line.starts_with('#') {
            continue;
        }
        let (name, value) = pair_of(line.strip_prefix("export ").unwrap_or(line))
            .with_context(|| format!("line {} of standard input", n + 1))?;
        let value = value.unwrap_or_default();
        let value = match value.trim_end().strip_prefix(LONG) {
            Some(first) => match first.strip_suffix(LONG) {
                Some(whole) => whole.to_owned(),
                None => {
                    let mut parts: Vec<&str> =
                        Some(first).filter(|f| !f.is_empty()).into_iter().collect();
                    loop {
                        let Some((_, line)) = lines.next() else {
                            bail!("line {} of standard input: {LONG} is not closed", n + 1);
                        };
                        match line.trim_end().strip_suffix(LONG) {
                            Some("") => break,
                            Some(last) => {
                                parts.push(last);
                                break;
                            }
                            None => parts.push(line),
                        }
                    }
                    parts.join("\n")
                }
            },
            None => {
                let trimmed = value.trim();
                let quoted = ['"', '\'']
                    .iter()
                    .find_map(|quote| trimmed.strip_prefix(*quote)?.strip_suffix(*quote));
                quoted.unwrap_or(trimmed).to_owned()
            }
        };
        values.insert(name, Some(value));
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<(String, String)> {
        let values = imported(text).unwrap().into_iter();
        values.map(|(n, v)| (n.to_string(), v.unwrap())).collect()
    }

    #[test]
    fn files_of_secrets_are_read_as_people_write_them() {
        let text = "# a comment\n\nA=1\nexport B=\"two words\"\nC='it''s'\nD=x=y#z \nE=\n\
                    KEY=\"\"\"\n-----BEGIN\n  a\n-----END\n\"\"\"\nF=\"\"\"one\"\"\"\nG=\"open\n";
        let expected = [
            ("A", "1"),
            ("B", "two words"),
            ("C", "it''s"),
            ("D", "x=y#z"),
            ("E", ""),
            ("F", "one"),
            ("G", "\"open"),
            ("KEY", "-----BEGIN\n  a\n-----END"),
        ];
        let expected: Vec<_> = expected
            .iter()
            .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
            .collect();
        assert_eq!(read(text), expected);
    }

    #[test]
    fn an_error_says_where_and_never_what() {
        for bad in ["A=1\nhunter2", "A=\"\"\"\nhunter2", "B-C=hunter2"] {
            let error = output::chain(&imported(bad).unwrap_err());
            assert!(error.contains("line"), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
