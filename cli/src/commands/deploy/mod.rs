//! `tern deploy`: image, Machines, health, in this order; back to what was when it goes wrong.
//!
//! | module | what it knows |
//! |---|---|
//! | `lock` | one deploy of an app at a time |
//! | `region` | where new Machines are made |
//! | `release` | the release command |
//! | `health`, `sockets` | whether a Machine has come up, and where its app listens instead |

mod health;
mod lock;
mod region;
mod release;
mod sockets;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use http::StatusCode;
use serde_json::{Value, json};
use tern_catalog::{AppName, MachineConfig, Mount};

use super::wire::Machine;
use super::{app_named_by, certs, config_path, load, volumes};
use crate::appconfig::machine::{machine_config, release_config};
use crate::appconfig::{Loaded, Strategy};
use crate::args::Deploy;
use crate::client::{Client, is_status};
use crate::image::{self, Layout, REGISTRY};
use crate::output;

/// Longest wait for a Machine to become healthy, where neither flag nor fly.toml says.
const WAIT: Duration = Duration::from_secs(300);
/// Size of a volume where fly.toml asks for none, in GB.
const VOLUME_GB: u32 = 1;

pub use lock::released;

pub async fn run(client: &Client, args: Deploy) -> Result<ExitCode> {
    let path = args
        .config
        .clone()
        .unwrap_or_else(|| config_path(&args.directory));
    if !path.exists() {
        bail!(
            "there is no {}; make one with `tern launch`, or name one with --config",
            path.display()
        );
    }
    let mut loaded = load(&path)?;
    let app = match &args.app {
        Some(app) => app.clone(),
        None => app_named_by(&loaded)?,
    };
    match client.get::<Value>(&format!("/v1/apps/{app}")).await {
        Ok(_) => {}
        Err(e) if is_status(&e, StatusCode::NOT_FOUND) => {
            bail!(
                "there is no app {app}; make it with `tern apps create {app}`, or with `tern launch`"
            )
        }
        Err(e) => return Err(e),
    }
    region::settle(client, &mut loaded).await?;
    let lock = lock::Lock::take(client, &app).await?;
    let deployment = Deployment {
        client,
        app,
        loaded,
        args,
    };
    lock.during(deployment.run()).await
}

struct Deployment<'a> {
    client: &'a Client,
    app: AppName,
    loaded: Loaded,
    args: Deploy,
}

impl Deployment<'_> {
    async fn run(self) -> Result<ExitCode> {
        let started = Instant::now();
        let image = self.image().await?;
        step(&format!("Image {image}"));
        let base = self.loaded.path.parent().unwrap_or(Path::new("."));
        if let Some(config) = release_config(&self.loaded.config, &image, base)? {
            release::run(&self, &config).await?;
        }
        let machines: Vec<Machine> = self.client.get(&self.machines_path()).await?;
        let groups = self.loaded.config.groups();
        for group in &groups {
            let config = machine_config(&self.loaded.config, group, &image, base)?;
            let existing: Vec<&Machine> = machines.iter().filter(|m| m.group() == group).collect();
            if existing.is_empty() {
                let config = self.with_volume(group, config.clone(), None).await?;
                self.create(group, &config).await?;
            }
            for old in existing {
                let config = self.with_volume(group, config.clone(), Some(old)).await?;
                self.replace(old, &config).await?;
            }
        }
        for gone in machines
            .iter()
            .filter(|m| !groups.iter().any(|g| g == m.group()))
        {
            step(&format!(
                "Destroying Machine {}: there is no process group \"{}\" any more",
                gone.id,
                gone.group()
            ));
            self.client
                .delete(&format!("{}/{}?force=true", self.machines_path(), gone.id))
                .await?;
        }
        self.finish(started).await
    }

    /// The configuration with the group's volume: the one that `old` has, else a free one of that name,
    /// else a new one.
    async fn with_volume(
        &self,
        group: &str,
        mut config: MachineConfig,
        old: Option<&Machine>,
    ) -> Result<MachineConfig> {
        let Some(mount) = self.loaded.config.mount_of(group) else {
            return Ok(config);
        };
        let all = volumes::list(self.client, &self.app).await?;
        let mut named = all
            .into_iter()
            .filter(|v| v.name == mount.source && v.state == "created");
        let region = old
            .map(|m| &m.region)
            .or(self.loaded.config.primary_region.as_ref());
        let volume = match old.and_then(|m| m.config.mounts.first()) {
            Some(mounted) => named.find(|v| v.id == mounted.volume),
            None => named
                .find(|v| v.attached_machine_id.is_none() && region.is_none_or(|r| *r == v.region)),
        };
        let volume = match volume {
            Some(volume) => volume,
            None => {
                let size = mount.initial_size.unwrap_or(VOLUME_GB);
                let body = json!({"name": mount.source, "size_gb": size, "region": region});
                let made = volumes::create(self.client, &self.app, &body).await?;
                step(&format!(
                    "Created volume {} ({}, {size} GB)",
                    made.id, made.name
                ));
                made
            }
        };
        config.mounts = vec![Mount {
            volume: volume.id,
            path: mount.destination.clone(),
            name: Some(volume.name.to_string()),
            size_gb: None,
            encrypted: None,
        }];
        Ok(config)
    }

    async fn finish(&self, started: Instant) -> Result<ExitCode> {
        let certificates = certs::list(self.client, &self.app).await?;
        let hostnames = certs::hostnames(&certificates);
        if self.args.json {
            let machines: Vec<Machine> = self.client.get(&self.machines_path()).await?;
            output::json(&json!({"app": self.app, "machines": machines, "hostnames": hostnames}))?;
            return Ok(ExitCode::SUCCESS);
        }
        eprintln!(
            "Deployed {} in {:.1} s",
            self.app,
            started.elapsed().as_secs_f64()
        );
        for hostname in hostnames {
            println!("https://{hostname}/");
        }
        for trouble in certs::troubles(&certificates) {
            eprintln!("Warning: {trouble}");
        }
        Ok(ExitCode::SUCCESS)
    }

    /// The image reference to run: given, or built and uploaded.
    async fn image(&self) -> Result<String> {
        let tag = format!("deployment-{}", jiff::Timestamp::now().as_millisecond());
        let given = self
            .args
            .image
            .as_ref()
            .or(self.loaded.config.build.image.as_ref());
        let scratch = tempfile::tempdir().context("no temporary directory can be made")?;
        let layout = match given {
            Some(reference) => match Layout::named(reference)? {
                Some(layout) => layout,
                None => return Ok(reference.clone()),
            },
            None => {
                step("Building the image");
                let base = self.loaded.path.parent().unwrap_or(Path::new("."));
                let context = if self.args.config.is_some() {
                    &self.args.directory
                } else {
                    base
                };
                let context = if context.as_os_str().is_empty() {
                    Path::new(".")
                } else {
                    context
                };
                image::build(
                    context,
                    &self.loaded.config.build,
                    self.app.as_str(),
                    scratch.path(),
                )
                .await?
            }
        };
        for warning in self.loaded.config.unexposed(&layout.exposed) {
            eprintln!("Warning: {warning}");
        }
        let digest = image::push(self.client, &layout, self.app.as_str(), &tag).await?;
        // The tag is for people; what runs is what the digest says.
        Ok(format!("{REGISTRY}/{}:{tag}@{digest}", self.app))
    }

    async fn create(&self, group: &str, config: &MachineConfig) -> Result<()> {
        let body = json!({
            "config": config,
            "region": self.loaded.config.primary_region,
            "skip_launch": self.args.detach,
        });
        let machine: Machine = self.client.post(&self.machines_path(), &body).await?;
        step(&format!("Created Machine {} for \"{group}\"", machine.id));
        self.healthy(&machine, config, "").await
    }

    /// Puts a new configuration on a Machine; puts the old one back when it does not become healthy.
    async fn replace(&self, old: &Machine, config: &MachineConfig) -> Result<()> {
        step(&format!(
            "Updating Machine {}, once its host has the image",
            old.id
        ));
        let updated = self.update(old, config).await?;
        let Err(failure) = self.healthy(&updated, config, &old.newest_event()).await else {
            return Ok(());
        };
        step(&format!(
            "Machine {} is not healthy; going back to its last configuration",
            old.id
        ));
        let back = async {
            let before: Machine = self.client.get(&self.path_of(old)).await?;
            let back = self.update(old, &old.config).await?;
            self.healthy(&back, &old.config, &before.newest_event())
                .await
        };
        match back.await {
            Ok(()) => Err(failure.context("the deploy was undone")),
            Err(again) => Err(failure.context(format!(
                "the deploy failed, and going back did too ({})",
                output::chain(&again)
            ))),
        }
    }

    /// Gives a Machine another configuration; an error means that it has still the one before.
    async fn update(&self, machine: &Machine, config: &MachineConfig) -> Result<Machine> {
        let body = json!({"config": config, "skip_launch": self.args.detach});
        self.client.post(&self.path_of(machine), &body).await
    }

    /// Waits until a Machine that was just given this configuration is well, in what comes after the event
    /// `since`. Ends at once when it cannot become so.
    async fn healthy(&self, machine: &Machine, config: &MachineConfig, since: &str) -> Result<()> {
        for warning in &machine.warnings {
            eprintln!("Warning: {warning}");
        }
        let strategy = self.loaded.config.deploy.strategy;
        if self.args.detach || strategy == Some(Strategy::Immediate) {
            return Ok(());
        }
        let patience = self
            .args
            .wait_timeout
            .or(self.loaded.config.deploy.wait_timeout)
            .unwrap_or(WAIT);
        let path = self.path_of(machine);
        let outcome = health::wait(self.client, &path, config, since, patience).await;
        if outcome.is_ok() {
            step(&format!("Machine {} is healthy", machine.id));
        } else {
            self.show_output(machine).await;
        }
        outcome
    }

    /// The last lines of a Machine that failed: what its developer looks for first.
    async fn show_output(&self, machine: &Machine) {
        let path = format!(
            "/v1/apps/{}/logs?follow=false&machine={}",
            self.app, machine.id
        );
        let Ok(request) = self
            .client
            .request(http::Method::GET, &path)
            .body(crate::client::empty())
        else {
            return;
        };
        let Ok(answer) = self.client.call(request).await else {
            return;
        };
        let Ok(body) = http_body_util::BodyExt::collect(answer.into_body()).await else {
            return;
        };
        let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
        // What came before is of the last configuration. Both times are the server's.
        let since = machine
            .updated_at
            .map_or(0, jiff::Timestamp::as_millisecond);
        let lines: Vec<super::wire::LogLine> = text
            .lines()
            .filter_map(|l| serde_json::from_str(l).ok())
            .filter(|l: &super::wire::LogLine| l.unix_ms >= since)
            .collect();
        for line in lines.iter().rev().take(20).rev() {
            eprintln!("    {}", line.line.escape_debug());
        }
    }

    fn path_of(&self, machine: &Machine) -> String {
        format!("{}/{}", self.machines_path(), machine.id)
    }

    fn machines_path(&self) -> String {
        format!("/v1/apps/{}/machines", self.app)
    }
}

fn step(text: &str) {
    eprintln!("==> {text}");
}

#[cfg(test)]
mod tests;
