//! `tern scale`.

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use serde_json::{Map, Value, json};
use tern_catalog::Guest;

use super::app_of;
use super::deploy::{self, Change, Found, own_groups};
use crate::appconfig::DEFAULT_GROUP;
use crate::args::{AppArg, Scale};
use crate::client::Client;
use crate::output;

pub async fn run(client: &Client, args: Scale) -> Result<ExitCode> {
    match args {
        Scale::Show(arg) => show(client, &arg).await?,
        Scale::Count { counts, app } => {
            let app = app_of(&app)?;
            let counts: Vec<(String, usize)> =
                counts.iter().map(|c| count_of(c)).collect::<Result<_>>()?;
            let changed = deploy::change(client, &app, Change::default(), |found| {
                let mut groups = own_groups(found, &Map::new());
                for (name, _) in &counts {
                    if !groups.iter().any(|g| g.name == *name) {
                        bail!(
                            "app {app} has no Machine of process group \"{name}\" to make more of; `tern deploy` makes the first"
                        );
                    }
                }
                for group in &mut groups {
                    group.keep = true;
                    let wanted = counts.iter().find(|(name, _)| *name == group.name);
                    group.count = wanted.map(|(_, count)| *count);
                }
                Ok(groups)
            });
            Box::pin(changed).await?;
            let told: Vec<String> = counts
                .iter()
                .map(|(name, count)| format!("{count} of \"{name}\""))
                .collect();
            println!("{app} has {}.", told.join(", "));
        }
        Scale::Vm {
            size,
            memory,
            group,
            app,
        } => {
            let preset = Guest::preset(&size).with_context(|| {
                format!(
                    "there is no size \"{size}\"; write shared-cpu-1x … 8x or performance-1x … 8x"
                )
            })?;
            let guest = Guest {
                memory_mb: memory.unwrap_or(preset.memory_mb),
                ..preset
            };
            let told = format!("Scale to {size}");
            resize(client, &app, group.as_deref(), told, |_| guest.clone()).await?;
        }
        Scale::Memory { memory, group, app } => {
            let told = format!("Scale memory to {memory} MB");
            let sized = |guest: &Guest| Guest {
                memory_mb: memory,
                ..guest.clone()
            };
            resize(client, &app, group.as_deref(), told, sized).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Gives Machines of one group, or of all, another size.
async fn resize(
    client: &Client,
    arg: &AppArg,
    only: Option<&str>,
    description: String,
    sized: impl Fn(&Guest) -> Guest,
) -> Result<()> {
    let app = app_of(arg)?;
    let change = Change {
        description: Some(description),
        ..Change::default()
    };
    let changed = deploy::change(client, &app, change, |found| {
        let mut groups = own_groups(found, &Map::new());
        let named = |name: &str| only.is_none_or(|only| only == name);
        if !groups.iter().any(|g| named(&g.name)) {
            bail!("app {app} has no Machines of that kind; see `tern scale show`");
        }
        for group in &mut groups {
            let first = found.iter().find(|m| m.machine.group() == group.name);
            match first.filter(|_| named(&group.name)) {
                Some(first) => {
                    let guest = sized(&first.machine.config.guest);
                    let with = [("guest".to_owned(), serde_json::to_value(guest)?)];
                    group.source = deploy::Source::Own(with.into_iter().collect());
                }
                None => group.keep = true,
            }
        }
        Ok(groups)
    });
    Box::pin(changed).await?;
    show(client, arg).await
}

async fn show(client: &Client, arg: &AppArg) -> Result<()> {
    let app = app_of(arg)?;
    let found = deploy::machines(client, &app).await?;
    let rows = summary(&found);
    if arg.json {
        let rows: Vec<Value> = rows
            .iter()
            .map(|r| {
                json!({"process": r.group, "count": r.count, "cpu_kind": r.guest.cpu_kind, "cpus": r.guest.cpus,
                       "memory_mb": r.guest.memory_mb, "region": r.region})
            })
            .collect();
        return output::json(&rows);
    }
    let row = |r: &Row| {
        vec![
            r.group.clone(),
            r.count.to_string(),
            r.guest.cpu_kind.clone(),
            r.guest.cpus.to_string(),
            format!("{} MB", r.guest.memory_mb),
            r.region.clone(),
        ]
    };
    let rows: Vec<_> = rows.iter().map(row).collect();
    output::table(
        &["PROCESS", "COUNT", "KIND", "CPUS", "MEMORY", "REGION"],
        &rows,
        "No Machines yet; `tern deploy` makes the first.",
    );
    Ok(())
}

struct Row {
    group: String,
    region: String,
    guest: Guest,
    count: usize,
}

/// Machines that are alike, counted.
fn summary(found: &[Found]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for one in found {
        let (group, region) = (one.machine.group(), &one.machine.region);
        let guest = &one.machine.config.guest;
        let alike = |r: &&mut Row| r.group == group && r.region == *region && r.guest == *guest;
        match rows.iter_mut().find(alike) {
            Some(row) => row.count += 1,
            None => rows.push(Row {
                group: group.to_owned(),
                region: region.clone(),
                guest: guest.clone(),
                count: 1,
            }),
        }
    }
    rows
}

/// `3`, or `worker=3`.
fn count_of(text: &str) -> Result<(String, usize)> {
    let (group, count) = text.split_once('=').unwrap_or((DEFAULT_GROUP, text));
    let count = count.parse();
    let count = count.with_context(|| format!("\"{text}\" is no count; write 3, or worker=3"))?;
    Ok((group.to_owned(), count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_of_a_group() {
        assert_eq!(count_of("3").unwrap(), ("app".to_owned(), 3));
        assert_eq!(count_of("worker=0").unwrap(), ("worker".to_owned(), 0));
        assert!(count_of("worker=").is_err());
        assert!(count_of("many").is_err());
    }
}
