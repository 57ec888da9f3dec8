//! `tern deploy`: image, Machines, health, in this order; back to what was when it goes wrong.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use http::StatusCode;
use serde_json::{Value, json};
use tern_catalog::{AppName, MachineConfig, Mount};

use super::wire::Machine;
use super::{app_named_by, certs, config_path, load, machine, volumes};
use crate::appconfig::{Loaded, Strategy, machine::machine_config};
use crate::args::Deploy;
use crate::client::{Client, is_status};
use crate::image::{self, Layout, REGISTRY};
use crate::output;

/// Longest wait for a Machine to become healthy, where neither flag nor fly.toml says.
const WAIT: Duration = Duration::from_secs(300);
/// Size of a volume where fly.toml asks for none, in GB.
const VOLUME_GB: u32 = 1;
/// Time between two looks at a Machine's checks.
const CHECK_POLL: Duration = Duration::from_millis(500);

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
    let loaded = load(&path)?;
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
    Deployment {
        client,
        app,
        loaded,
        args,
    }
    .run()
    .await
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
        let hostnames = certs::hostnames(self.client, &self.app).await?;
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
        let layout = match given.map(|g| (g, g.strip_prefix("oci:"))) {
            Some((reference, None)) => return Ok(reference.clone()),
            Some((_, Some(local))) => {
                let (dir, tag) = split_tag(local);
                Layout::open(&dir, tag)?
            }
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
        let digest = image::push(self.client, &layout, self.app.as_str(), &tag).await?;
        Ok(format!("{REGISTRY}/{}@{digest}", self.app))
    }

    async fn create(&self, group: &str, config: &MachineConfig) -> Result<()> {
        let body = json!({
            "config": config,
            "region": self.loaded.config.primary_region,
            "skip_launch": self.args.detach,
        });
        let machine: Machine = self.client.post(&self.machines_path(), &body).await?;
        step(&format!("Created Machine {} for \"{group}\"", machine.id));
        self.healthy(&machine).await
    }

    /// Puts a new configuration on a Machine; puts the old one back when it does not become healthy.
    async fn replace(&self, old: &Machine, config: &MachineConfig) -> Result<()> {
        step(&format!("Updating Machine {}", old.id));
        let Err(failure) = self.update(old, config).await else {
            return Ok(());
        };
        step(&format!(
            "Machine {} is not healthy; going back to its last configuration",
            old.id
        ));
        match self.update(old, &old.config).await {
            Ok(()) => Err(failure.context("the deploy was undone")),
            Err(again) => Err(failure.context(format!(
                "the deploy failed, and going back did too ({})",
                output::chain(&again)
            ))),
        }
    }

    async fn update(&self, machine: &Machine, config: &MachineConfig) -> Result<()> {
        let body = json!({"config": config, "skip_launch": self.args.detach});
        let path = format!("{}/{}", self.machines_path(), machine.id);
        let updated: Machine = self.client.post(&path, &body).await?;
        self.healthy(&updated).await
    }

    /// Waits until a Machine runs and its checks pass. Ends at once when it fails.
    async fn healthy(&self, machine: &Machine) -> Result<()> {
        let strategy = self
            .loaded
            .config
            .deploy
            .strategy
            .unwrap_or(Strategy::Rolling);
        if self.args.detach || strategy == Strategy::Immediate {
            return Ok(());
        }
        let patience = self
            .args
            .wait_timeout
            .or(self.loaded.config.deploy.wait_timeout)
            .unwrap_or(WAIT);
        let deadline = tokio::time::Instant::now() + patience;
        let path = format!("{}/{}", self.machines_path(), machine.id);
        let checks = machine.config.checks.len()
            + machine
                .config
                .services
                .iter()
                .map(|s| s.checks.len())
                .sum::<usize>();
        let outcome = async {
            machine::wait(
                self.client,
                &path,
                "started",
                &machine.instance_id,
                patience,
            )
            .await?;
            loop {
                let now: Machine = self.client.get(&path).await?;
                let passing = now.checks.iter().filter(|c| c.status == "passing").count();
                if passing >= checks {
                    return Ok(());
                }
                // An app that exits in its first seconds will not pass; say so now.
                if matches!(now.state.as_str(), "failed" | "stopped") {
                    let reason = now
                        .last_reason()
                        .unwrap_or_else(|| "its app exited".to_owned());
                    bail!("Machine {} {}: {reason}", now.id, now.state);
                }
                if tokio::time::Instant::now() >= deadline {
                    let failing: Vec<String> = now
                        .checks
                        .iter()
                        .filter(|c| c.status != "passing")
                        .map(|c| format!("{}: {}", c.name, c.output))
                        .collect();
                    bail!(
                        "after {} s its checks do not pass: {}",
                        patience.as_secs(),
                        failing.join("; ")
                    );
                }
                tokio::time::sleep(CHECK_POLL).await;
            }
        }
        .await;
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
        let lines: Vec<super::wire::LogLine> = text
            .lines()
            .filter_map(|l| serde_json::from_str(l).ok())
            .collect();
        for line in lines.iter().rev().take(20).rev() {
            eprintln!("    {}", line.line.escape_debug());
        }
    }

    fn machines_path(&self) -> String {
        format!("/v1/apps/{}/machines", self.app)
    }
}

fn step(text: &str) {
    eprintln!("==> {text}");
}

/// `DIRECTORY[:TAG]`; a colon inside a path component is not a tag.
fn split_tag(local: &str) -> (PathBuf, Option<&str>) {
    match local.rsplit_once(':') {
        Some((dir, tag)) if !tag.contains('/') && !Path::new(local).is_dir() => {
            (dir.into(), Some(tag))
        }
        _ => (local.into(), None),
    }
}
