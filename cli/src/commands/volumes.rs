//! `tern volumes`.

use std::process::ExitCode;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tern_catalog::{AppName, VolumeId, VolumeName};

use super::app_of;
use crate::args::{Snapshots, Volumes};
use crate::client::Client;
use crate::output;

/// A volume as the API shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Volume {
    pub id: VolumeId,
    pub name: VolumeName,
    pub state: String,
    #[serde(default)]
    pub reason: Option<String>,
    pub size_gb: u32,
    pub region: String,
    pub attached_machine_id: Option<String>,
    pub created_at: jiff::Timestamp,
}

pub async fn run(client: &Client, args: Volumes) -> Result<ExitCode> {
    match args {
        Volumes::List(arg) => {
            let volumes = list(client, &app_of(&arg)?).await?;
            if arg.json {
                output::json(&volumes)?;
                return Ok(ExitCode::SUCCESS);
            }
            let rows: Vec<_> = volumes.iter().map(row).collect();
            output::table(
                &[
                    "ID", "NAME", "STATE", "SIZE", "REGION", "MACHINE", "CREATED",
                ],
                &rows,
                "No volumes yet; name one under [mounts] in fly.toml, or make one with `tern volumes create`.",
            );
        }
        Volumes::Create {
            name,
            size,
            region,
            snapshot,
            app,
        } => {
            let body = json!({
                "name": name, "size_gb": size, "region": region, "snapshot_id": snapshot,
            });
            let volume = create(client, &app_of(&app)?, &body).await?;
            println!("Volume {} is made.", volume.id);
        }
        Volumes::Extend { id, size, app } => {
            let path = format!("{}/{id}/extend", path(&app_of(&app)?));
            let answer: Value = client.put(&path, &json!({"size_gb": size})).await?;
            if answer["needs_restart"] == true {
                println!(
                    "Volume {id} has {size} GB once its Machine starts cold; \
                     restart it with `tern machine restart`."
                );
            } else {
                println!("Volume {id} has {size} GB.");
            }
        }
        Volumes::Fork { id, name, app } => {
            let app = app_of(&app)?;
            let origin: Volume = client.get(&format!("{}/{id}", path(&app))).await?;
            let body = json!({"name": name.unwrap_or(origin.name), "source_volume_id": id});
            let volume = create(client, &app, &body).await?;
            println!("Volume {} is made of {id}.", volume.id);
        }
        Volumes::Destroy { id, yes, app } => {
            if !yes && !output::confirm(&format!("Destroy {id}, its data and its snapshots?")) {
                bail!("{id} is left as it is; give --yes to destroy it without asking");
            }
            client
                .delete(&format!("{}/{id}", path(&app_of(&app)?)))
                .await?;
            println!("Volume {id} is destroyed.");
        }
        Volumes::Snapshots(args) => snapshots(client, args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn snapshots(client: &Client, args: Snapshots) -> Result<()> {
    let text = |v: &Value| v.as_str().unwrap_or("-").to_owned();
    match args {
        Snapshots::List { id, app } => {
            let path = format!("{}/{id}/snapshots", path(&app_of(&app)?));
            let answer: Vec<Value> = client.get(&path).await?;
            if app.json {
                return output::json(&answer);
            }
            let row = |s: &Value| {
                let size = s["size"]
                    .as_u64()
                    .map_or("-".to_owned(), |b| format!("{} MB", b >> 20));
                vec![
                    text(&s["id"]),
                    text(&s["status"]),
                    size,
                    text(&s["created_at"]),
                ]
            };
            let rows: Vec<_> = answer.iter().map(row).collect();
            let none = "No snapshots yet; make one with `tern volumes snapshots create`.";
            output::table(&["ID", "STATUS", "SIZE", "CREATED"], &rows, none);
        }
        Snapshots::Create { id, app } => {
            let path = format!("{}/{id}/snapshots", path(&app_of(&app)?));
            let made: Value = client.post(&path, &json!({})).await?;
            match made["status"].as_str() {
                Some("failed") => bail!("there is no snapshot of {id}: {}", text(&made["reason"])),
                Some("running") => println!("Snapshot {} is being made.", text(&made["id"])),
                _ => println!("Snapshot {} is made.", text(&made["id"])),
            }
        }
        Snapshots::Destroy { id, snapshot, app } => {
            let path = format!("{}/{id}/snapshots/{snapshot}", path(&app_of(&app)?));
            client.delete(&path).await?;
            println!("Snapshot {snapshot} is removed.");
        }
    }
    Ok(())
}

/// An app's volumes.
pub async fn list(client: &Client, app: &AppName) -> Result<Vec<Volume>> {
    client.get(&path(app)).await
}

/// Makes a volume and waits for it as long as the API does.
pub async fn create(client: &Client, app: &AppName, body: &Value) -> Result<Volume> {
    let volume: Volume = client.post(&path(app), body).await?;
    if volume.state == "failed" {
        let reason = volume
            .reason
            .as_deref()
            .unwrap_or("the host does not say why");
        bail!("volume {} could not be made: {reason}", volume.id);
    }
    Ok(volume)
}

fn path(app: &AppName) -> String {
    format!("/v1/apps/{app}/volumes")
}

fn row(volume: &Volume) -> Vec<String> {
    let state = match &volume.reason {
        Some(reason) => format!("{}: {reason}", volume.state),
        None => volume.state.clone(),
    };
    vec![
        volume.id.to_string(),
        volume.name.to_string(),
        state,
        format!("{} GB", volume.size_gb),
        volume.region.clone(),
        volume
            .attached_machine_id
            .clone()
            .unwrap_or_else(|| "-".to_owned()),
        output::ago(volume.created_at, jiff::Timestamp::now()),
    ]
}
