//! `[deploy] release_command`: runs once, in a Machine of its own, before any other is touched.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use tern_catalog::MachineConfig;
use tokio::time::Instant;

use super::health::{POLL, Standing, stand};
use super::{Deployment, step};
use crate::commands::wire::Machine;

/// Longest that it may run, where fly.toml does not say.
const PATIENCE: Duration = Duration::from_secs(300);

/// Runs it to its end. Its Machine is destroyed whatever comes of it.
pub async fn run(deployment: &Deployment<'_>, config: &MachineConfig) -> Result<()> {
    let command = config.init.cmd.as_deref().unwrap_or_default().join(" ");
    step(&format!("Running the release command `{command}`"));
    let body = json!({"config": config, "region": deployment.loaded.config.primary_region});
    let machines = deployment.machines_path();
    let machine: Machine = deployment.client.post(&machines, &body).await?;
    let path = format!("{machines}/{}", machine.id);
    let outcome = ended(deployment, &path).await;
    deployment.show_output(&machine).await;
    let destroyed = deployment
        .client
        .delete(&format!("{path}?force=true"))
        .await;
    outcome.context("the release command failed, and nothing was deployed")?;
    destroyed.with_context(|| format!("its Machine {} cannot be destroyed", machine.id))
}

async fn ended(deployment: &Deployment<'_>, path: &str) -> Result<()> {
    let patience = deployment.loaded.config.deploy.release_command_timeout;
    let patience = patience.unwrap_or(PATIENCE);
    let deadline = Instant::now() + patience;
    loop {
        let machine: Machine = deployment.client.get(path).await?;
        match stand(&machine, "") {
            Standing::Done => return Ok(()),
            Standing::Ended(reason) => bail!("{reason}"),
            Standing::Coming | Standing::Starting | Standing::Running | Standing::Asleep => {}
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
