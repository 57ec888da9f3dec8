//! `tern deploy`: image, Machines, health, in this order; back to what was when it goes wrong.
//!
//! | module | what it knows |
//! |---|---|
//! | `plan` | which steps lead from what there is to what is wanted |
//! | `rollout` | how each is done, and undone |
//! | `record` | the release that the server keeps of it; what `tern rollback` goes back to |
//! | `lock` | one deploy of an app at a time |
//! | `cleanup` | what is done also where a deploy is interrupted |
//! | `region` | where new Machines are made |
//! | `release` | the release command |
//! | `health`, `sockets` | whether a Machine has come up, and where its app listens instead |

mod cleanup;
mod health;
mod lock;
mod plan;
mod record;
mod region;
mod release;
mod rollout;
mod sockets;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use http::StatusCode;
use serde_json::{Value, json};
use tern_catalog::AppName;

use super::wire::Machine;
use super::{app_named_by, certs, config_path, load};
use crate::appconfig::machine::{has_vm, machine_config, release_config};
use crate::appconfig::{Loaded, MaxUnavailable, Strategy};
use crate::args::Deploy;
use crate::client::{Client, is_status};
use crate::image::{self, Layout, REGISTRY};
use crate::output;

/// Longest wait for a Machine to become healthy, where neither flag nor fly.toml says.
const WAIT: Duration = Duration::from_secs(300);
/// How many of a group's Machines are replaced at a time, where fly.toml does not say: Fly.io's share.
const AT_ONCE: AtOnce = AtOnce::Share(0.33);

pub use cleanup::done as cleaned_up;
pub use record::{releases, rollback};
pub use rollout::{Found, Source, machines, own_groups};

use plan::{AtOnce, How};
use record::Record;
use rollout::{Group, MountWish, Rollout, settled};

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
                "there is no app {app} that this token may see; make it with `tern apps create {app}`, or with `tern launch`"
            )
        }
        Err(e) => return Err(e),
    }
    region::settle(client, &mut loaded).await?;
    let deployment = Deployment {
        client,
        app,
        loaded,
        args,
    };
    if deployment.args.plan {
        return deployment.show_plan().await;
    }
    let lock = lock::Lock::take(client, &deployment.app).await?;
    let nonce = lock.nonce();
    lock.during(deployment.run(&nonce)).await
}

/// Changes Machines that there are, or how many, under the app's lease. Makes a release of it where it is described.
pub async fn change(
    client: &Client,
    app: &AppName,
    change: Change,
    groups: impl FnOnce(&[Found]) -> Result<Vec<Group>>,
) -> Result<()> {
    let lock = lock::Lock::take(client, app).await?;
    let nonce = lock.nonce();
    let work = async {
        let found = machines(client, app).await?;
        let groups = groups(&found)?;
        let mut rollout = Rollout {
            client,
            app: app.clone(),
            // Nobody waits until a successor is well: the old one would go for nothing.
            how: if change.detach {
                How::Immediate
            } else {
                How::Rolling(AT_ONCE)
            },
            patience: (!change.detach).then_some(WAIT),
            detach: false,
            secrets: change.secrets,
            release: None,
        };
        let Some(description) = &change.description else {
            return rollout.run(&found, &groups).await;
        };
        let kept = settled(&groups, &found);
        let record = Record::begin(client, app, &nonce, &kept, description).await?;
        rollout.release = Some(record.version);
        record.during(rollout.run(&found, &groups)).await
    };
    lock.during(work).await
}

/// What [`change`] is for.
#[derive(Debug, Clone, Default)]
pub struct Change {
    /// What its release is for; without it none is made.
    pub description: Option<String>,
    /// The version of the app's secrets that its Machines are to have.
    pub secrets: Option<u64>,
    /// Whether nobody waits until they are well.
    pub detach: bool,
}

struct Deployment<'a> {
    client: &'a Client,
    app: AppName,
    loaded: Loaded,
    args: Deploy,
}

impl Deployment<'_> {
    async fn run(self, nonce: &str) -> Result<ExitCode> {
        let started = Instant::now();
        let image = self.image().await?;
        step(&format!("Image {image}"));
        let groups = self.groups(&image)?;
        let record = Record::begin(self.client, &self.app, nonce, &groups, "Deploy").await?;
        let rollout = Rollout {
            release: Some(record.version),
            ..self.rollout()
        };
        let work = async {
            let base = self.loaded.path.parent().unwrap_or(Path::new("."));
            if let Some(config) = release_config(&self.loaded.config, &image, base)? {
                release::run(&rollout, &self.loaded.config, &config).await?;
            }
            let found = machines(self.client, &self.app).await?;
            rollout.run(&found, &groups).await
        };
        record.during(Box::pin(work)).await?;
        self.finish(started).await
    }

    /// `--plan`: what would be done, and nothing is.
    async fn show_plan(&self) -> Result<ExitCode> {
        let groups = self.groups("image")?;
        let found = machines(self.client, &self.app).await?;
        for step in self.rollout().plan(&found, &groups) {
            println!("{step}");
        }
        Ok(ExitCode::SUCCESS)
    }

    fn rollout(&self) -> Rollout<'_> {
        let deploy = &self.loaded.config.deploy;
        let at_once = match deploy.max_unavailable {
            None => AT_ONCE,
            Some(MaxUnavailable::Share(share)) => AtOnce::Share(share),
            Some(MaxUnavailable::Count(count)) => AtOnce::Count(count),
        };
        // What is left asleep cannot be seen to be well: the old one would go for nothing.
        let how = match deploy.strategy.unwrap_or(Strategy::Rolling) {
            _ if self.args.detach => How::Immediate,
            Strategy::Rolling => How::Rolling(at_once),
            Strategy::Canary => How::Canary(at_once),
            Strategy::Bluegreen => How::Bluegreen,
            Strategy::Immediate => How::Immediate,
        };
        let patience = self.args.wait_timeout.or(deploy.wait_timeout);
        Rollout {
            client: self.client,
            app: self.app.clone(),
            how,
            patience: (how != How::Immediate).then(|| patience.unwrap_or(WAIT)),
            detach: self.args.detach,
            secrets: None,
            release: None,
        }
    }

    /// What fly.toml wants of each process group.
    fn groups(&self, image: &str) -> Result<Vec<Group>> {
        let config = &self.loaded.config;
        let base = self.loaded.path.parent().unwrap_or(Path::new("."));
        let group = |name: &String| {
            let machine = machine_config(config, name, image, base)?;
            Ok(Group {
                name: name.clone(),
                source: Source::Config(serde_json::to_value(machine)?),
                mount: config.mount_of(name).map(|mount| MountWish {
                    source: mount.source.clone(),
                    destination: mount.destination.clone(),
                    size_gb: mount.initial_size,
                }),
                region: config.primary_region.clone(),
                own_guest: !has_vm(config, name),
                count: None,
                keep: false,
            })
        };
        config.groups().iter().map(group).collect()
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

    fn machines_path(&self) -> String {
        format!("/v1/apps/{}/machines", self.app)
    }
}

fn step(text: &str) {
    eprintln!("==> {text}");
}

#[cfg(test)]
mod tests;
