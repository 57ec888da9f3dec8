//! `[deploy] release_command`: runs once, in a Machine of its own, before any other is touched.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use tern_catalog::MachineConfig;
use tokio::time::Instant;

use super::health::{POLL, Standing, stand};
use super::rollout::Rollout;
use super::step;
use crate::appconfig::AppConfig;
use crate::client::{ApiError, Client};
use crate::commands::wire::Machine;

/// Longest that it may run, where fly.toml does not say.
const PATIENCE: Duration = Duration::from_secs(300);

/// Runs it to its end. Its Machine is destroyed whatever comes of it, also where the deploy is interrupted.
pub async fn run(rollout: &Rollout<'_>, app: &AppConfig, config: &MachineConfig) -> Result<()> {
    let command = config.init.cmd.as_deref().unwrap_or_default().join(" ");
    step(&format!("Running the release command `{command}`"));
    let name = rollout.new_name();
    let body = json!({"config": config, "name": name, "region": app.primary_region});
    let cleanup = rollout.unless_kept(&name);
    let machine: Machine = rollout.client.post(&rollout.machines_path(), &body).await?;
    let path = rollout.path_of(&machine);
    let patience = app.deploy.release_command_timeout.unwrap_or(PATIENCE);
    let outcome = ended(rollout.client, &path, patience).await;
    rollout.show_output(&machine).await;
    let destroyed = rollout.client.delete(&format!("{path}?force=true")).await;
    // Where that failed it is tried again.
    if destroyed.is_ok() {
        cleanup.forget();
    } else {
        cleanup.now().await;
    }
    outcome.context("the release command failed, and nothing was deployed")?;
    destroyed.with_context(|| format!("its Machine {} cannot be destroyed", machine.id))
}

async fn ended(client: &Client, path: &str, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        match client.get::<Machine>(path).await {
            Ok(machine) => match stand(&machine, "") {
                Standing::Done => return Ok(()),
                Standing::Ended(reason) => bail!("{reason}"),
                Standing::Coming | Standing::Starting | Standing::Running | Standing::Asleep => {}
            },
            // A server that restarts, a network that is gone for a moment: the command goes on.
            Err(error) if !error.is::<ApiError>() => {}
            Err(error) => return Err(error),
        }
        if Instant::now() >= deadline {
            bail!(
                "it has not ended after {} s; [deploy] release_command_timeout allows it more",
                patience.as_secs()
            );
        }
        tokio::time::sleep(POLL).await;
    }
}
