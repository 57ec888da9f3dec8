//! Does the steps of a [plan](super::plan), and undoes them all where one fails.
//!
//! A Machine beside another is made cordoned, and says in its metadata whose place it takes. Uncordoning it is the moment
//! in which it does: before it, it is what a broken-off deploy has left, and after it the other one is. The next deploy
//! removes either.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tern_catalog::{AppName, MachineConfig, VolumeId, VolumeName};

use super::cleanup::Cleanup;
use super::plan::{Has, How, Place, Step, Wants, plan};
use super::{health, step};
use crate::appconfig::DEFAULT_GROUP;
use crate::appconfig::machine::{GROUP_KEY, RELEASE_GROUP};
use crate::client::{ApiError, Client, is_status};
use crate::commands::volumes::{self, Volume};
use crate::commands::wire::{LogLine, Machine};
use crate::output;

/// Metadata of a Machine that takes another's place: that one's id, or `-` where there is none.
const REPLACES: &str = "tern_replaces";
/// Metadata: the release that made it.
const RELEASE: &str = "fly_release_version";
/// Size of a volume where nobody asks for one, in GB.
const VOLUME_GB: u32 = 1;
/// How often a call is made whose answer was lost.
const ATTEMPTS: u32 = 5;
/// Longest wait for a Machine that was asked to stop, in the API's words. Then it is destroyed in any case.
const STOP_WAIT: &str = "60s";

/// What is wanted of a process group; also what a release keeps of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Group {
    pub name: String,
    pub source: Source,
    /// The volume that each of its Machines holds.
    pub mount: Option<MountWish>,
    /// Where Machines are made that take nobody's place.
    pub region: Option<String>,
    /// Whether a Machine's successor is of its size, whatever the configuration says.
    #[serde(default)]
    pub own_guest: bool,
    /// How many; as many as there are where this is not said.
    #[serde(skip)]
    pub count: Option<usize>,
    /// Whether those that there are stay as they are.
    #[serde(skip)]
    pub keep: bool,
}

/// Where a group's Machines have their configuration from.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// This one.
    Config(Value),
    /// Each its own, with some keys put in.
    Own(Map<String, Value>),
}

/// A volume by its name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MountWish {
    pub source: VolumeName,
    pub destination: String,
    pub size_gb: Option<u32>,
}

/// A Machine that there is, and its configuration as the server told it: what this program does not know of it is kept.
#[derive(Debug, Clone)]
pub struct Found {
    pub machine: Machine,
    pub config: Value,
}

/// How Machines of an app are changed.
pub struct Rollout<'a> {
    pub client: &'a Client,
    pub app: AppName,
    pub how: How,
    /// Longest wait for a Machine to become well; `None` does not wait.
    pub patience: Option<Duration>,
    /// Whether Machines are left as they run until their next start.
    pub detach: bool,
    /// The version of the app's secrets that they are to have.
    pub secrets: Option<u64>,
    pub release: Option<u64>,
}

/// A Machine that was made, until it has taken its place.
struct Made {
    machine: Machine,
    config: Value,
    cleanup: Cleanup,
}

/// What a way back undoes.
enum Done {
    Swapped {
        new: Box<Machine>,
        old: Option<Box<Found>>,
    },
    Updated {
        old: Box<Found>,
        /// The version that it was given, where that is known.
        new: Option<String>,
    },
}

impl Found {
    pub fn read(told: Value) -> Result<Self> {
        let config = told["config"].clone();
        let machine = serde_json::from_value(told).context("the server's answer is no Machine")?;
        Ok(Self { machine, config })
    }

    fn group(&self) -> &str {
        self.machine.group()
    }

    fn metadata(&self, key: &str) -> Option<&str> {
        self.config["metadata"][key].as_str()
    }
}

/// The Machines of an app, but for those of release commands.
pub async fn machines(client: &Client, app: &AppName) -> Result<Vec<Found>> {
    let all: Vec<Value> = client.get(&format!("/v1/apps/{app}/machines")).await?;
    let all = all
        .into_iter()
        .map(Found::read)
        .collect::<Result<Vec<_>>>()?;
    Ok(all
        .into_iter()
        .filter(|m| m.group() != RELEASE_GROUP)
        .collect())
}

/// What is wanted of each group that there is, where each Machine keeps its own configuration but for these keys.
pub fn own_groups(found: &[Found], with: &Map<String, Value>) -> Vec<Group> {
    let mut groups: BTreeMap<&str, Group> = BTreeMap::new();
    for one in found {
        let group = groups.entry(one.group()).or_insert_with(|| Group {
            name: one.group().to_owned(),
            source: Source::Own(with.clone()),
            mount: None,
            region: Some(one.machine.region.clone()).filter(|region| !region.is_empty()),
            own_guest: false,
            count: None,
            keep: false,
        });
        // For more of them; those that there are keep what they hold.
        let mount = one.machine.config.mounts.first();
        group.mount = group.mount.take().or_else(|| {
            let mount = mount?;
            Some(MountWish {
                source: mount.name.as_deref()?.parse().ok()?,
                destination: mount.path.clone(),
                size_gb: None,
            })
        });
    }
    groups.into_values().collect()
}

/// The same as a release keeps it: with the configurations written out.
pub fn settled(groups: &[Group], found: &[Found]) -> Vec<Group> {
    let settle = |group: &Group| {
        let first = found.iter().find(|m| m.group() == group.name);
        let config = template(group, first);
        let own_guest = match &group.source {
            Source::Own(with) => !with.contains_key("guest"),
            Source::Config(_) => group.own_guest,
        };
        Group {
            source: Source::Config(config),
            own_guest,
            ..group.clone()
        }
    };
    groups.iter().map(settle).collect()
}

/// The volume that a Machine holds, if it is what is wanted of it. It is never left for another without a word: its data
/// may be all there is.
fn kept(
    machine: &Machine,
    mount: &MountWish,
    id: &VolumeId,
    volume: Option<Volume>,
) -> Result<Volume> {
    let Some(volume) = volume else {
        anyhow::bail!(
            "Machine {} holds volume {id}, which cannot be found; look at `tern volumes list`",
            machine.id
        );
    };
    if volume.name != mount.source {
        anyhow::bail!(
            "Machine {} holds volume {id} (\"{}\"), and fly.toml wants one named \"{}\". Name it as it is; or destroy the \
             Machine, which leaves the volume, and deploy again for one with a new volume",
            machine.id,
            volume.name,
            mount.source
        );
    }
    if volume.state != "created" {
        anyhow::bail!(
            "volume {id} of Machine {} is {}; look at `tern volumes show {id}` before anything is changed",
            machine.id,
            volume.state
        );
    }
    Ok(volume)
}

/// A configuration with the volume that a Machine holds.
fn with_mounts_of(old: &Found, mut config: Value) -> Value {
    if let Some(config) = config.as_object_mut() {
        match old.config.get("mounts") {
            Some(mounts) => config.insert("mounts".to_owned(), mounts.clone()),
            None => config.remove("mounts"),
        };
    }
    config
}

/// A group's configuration for the Machine that takes the place of `old`, but for its volume.
fn template(group: &Group, old: Option<&Found>) -> Value {
    let mut config = match &group.source {
        Source::Config(config) => config.clone(),
        Source::Own(with) => {
            let mut config = old.map_or(Value::Null, |old| old.config.clone());
            if let Some(config) = config.as_object_mut() {
                config.extend(with.clone());
                config.remove("mounts");
            }
            config
        }
    };
    if group.own_guest
        && let Some(guest) = old.map(|old| &old.config["guest"])
        && guest.is_object()
    {
        config["guest"] = guest.clone();
    }
    if let Some(metadata) = config["metadata"].as_object_mut() {
        metadata.remove(REPLACES);
    }
    config
}

impl Rollout<'_> {
    /// What it would do.
    pub fn plan(&self, found: &[Found], groups: &[Group]) -> Vec<Step> {
        let serving = found.iter().filter(|m| !m.machine.cordoned);
        let replaced: Vec<&str> = serving.filter_map(|m| m.metadata(REPLACES)).collect();
        // One whose other is gone has taken its place, and somebody else has cordoned it since.
        let waits = |old: &str| old == "-" || found.iter().any(|m| m.machine.id == old);
        let has: Vec<Has> = found
            .iter()
            .map(|m| Has {
                id: m.machine.id.clone(),
                group: m.group().to_owned(),
                volume: !m.machine.config.mounts.is_empty(),
                leftover: (m.machine.cordoned && m.metadata(REPLACES).is_some_and(waits))
                    || replaced.contains(&m.machine.id.as_str()),
            })
            .collect();
        let wants: Vec<Wants> = groups
            .iter()
            .map(|group| Wants {
                group: group.name.clone(),
                count: group.count,
                volume: group.mount.is_some(),
                own_volumes: matches!(group.source, Source::Own(_)),
                keep: group.keep,
            })
            .collect();
        plan(&has, &wants, self.how)
    }

    /// Does it. Where a step fails, all of them are undone.
    pub async fn run(&self, found: &[Found], groups: &[Group]) -> Result<()> {
        let mut done = Vec::new();
        let mut made = BTreeMap::new();
        let mut unremoved = Ok(());
        for next in self.plan(found, groups) {
            if let Step::Remove { .. } = &next {
                step(&next.to_string());
                let removed = self.step(next, found, groups, &mut made, &mut done).await;
                // What serves is as it is to be: there is nothing to go back from.
                unremoved = unremoved.and(removed);
                continue;
            }
            let outcome = Box::pin(self.step(next, found, groups, &mut made, &mut done)).await;
            let Err(failure) = outcome else {
                continue;
            };
            for (_, lost) in std::mem::take(&mut made) {
                lost.cleanup.now().await;
            }
            if done.is_empty() {
                return Err(failure.context("nothing was changed"));
            }
            step("Going back to what was before");
            return Err(match Box::pin(self.undo(done)).await {
                Ok(()) => failure.context("the deploy was undone"),
                Err(again) => failure.context(format!(
                    "the deploy failed, and going back did too ({})",
                    output::chain(&again)
                )),
            });
        }
        unremoved
    }

    async fn step(
        &self,
        next: Step,
        found: &[Found],
        groups: &[Group],
        made: &mut BTreeMap<Place, Made>,
        done: &mut Vec<Done>,
    ) -> Result<()> {
        let group = |name: &str| groups.iter().find(|g| g.name == name);
        let by_id = |id: &str| found.iter().find(|m| m.machine.id == id);
        match next {
            Step::Make(places) => {
                for place in &places {
                    let group = group(&place.group).context("a group that nobody wants")?;
                    let old = place.replaces.as_deref().and_then(by_id);
                    // Where it takes nobody's place it is as the others are.
                    let like = old.or_else(|| found.iter().find(|m| m.group() == group.name));
                    let config = self.mounted(group, template(group, like), None).await?;
                    made.insert(place.clone(), self.make(&config, group, old).await?);
                }
                for place in &places {
                    let new = made.get(place).context("a Machine that was not made")?;
                    self.healthy(&new.machine, &new.config, "").await?;
                }
            }
            Step::Swap(places) => {
                for place in &places {
                    let new = made.remove(place).context("a Machine that was not made")?;
                    let old = place.replaces.as_deref().and_then(by_id).cloned();
                    let machine = self.take_over(new).await?;
                    done.push(Done::Swapped {
                        new: Box::new(machine.clone()),
                        old: old.clone().map(Box::new),
                    });
                    self.relieve(&machine, old.as_ref()).await;
                }
            }
            Step::Update { group: name, id } => {
                let group = group(&name).context("a group that nobody wants")?;
                let old = by_id(&id).context("a Machine that nobody knows")?;
                let config = match &group.source {
                    Source::Own(_) => with_mounts_of(old, template(group, Some(old))),
                    Source::Config(_) => {
                        let config = template(group, Some(old));
                        self.mounted(group, config, Some(old)).await?
                    }
                };
                step(&format!(
                    "Updating Machine {id}, once its host has the image"
                ));
                // Before it is asked for: where no answer comes it may be done all the same.
                done.push(Done::Updated {
                    old: Box::new(old.clone()),
                    new: None,
                });
                let updated = self.update(&old.machine, &config).await?;
                if let Some(Done::Updated { new, .. }) = done.last_mut() {
                    *new = Some(updated.instance_id.clone());
                }
                let since = old.machine.newest_event();
                self.healthy(&updated, &config, &since).await?;
            }
            Step::Remove { id, .. } => {
                if let Some(old) = by_id(&id) {
                    self.retire(&old.machine).await?;
                }
            }
        }
        Ok(())
    }

    async fn undo(&self, done: Vec<Done>) -> Result<()> {
        for done in done.into_iter().rev() {
            match done {
                Done::Swapped { new, old: None } => self.retire(&new).await?,
                Done::Swapped {
                    new,
                    old: Some(old),
                } => {
                    let group = Group {
                        name: old.group().to_owned(),
                        source: Source::Own(Map::new()),
                        mount: None,
                        region: None,
                        own_guest: false,
                        count: None,
                        keep: false,
                    };
                    let told: Value = self.client.get(&self.path_of(&new)).await?;
                    let new = Found::read(told)?;
                    // Its volume, if it had one, is free since it has gone.
                    let config = with_mounts_of(&old, template(&group, Some(&old)));
                    let back = self.make(&config, &group, Some(&new)).await?;
                    if let Err(failure) = self.healthy(&back.machine, &config, "").await {
                        back.cleanup.now().await;
                        return Err(failure);
                    }
                    let back = self.take_over(back).await?;
                    self.relieve(&back, Some(&new)).await;
                }
                Done::Updated { old, new } => {
                    let before: Machine = self.client.get(&self.path_of(&old.machine)).await?;
                    // It was not done.
                    if before.instance_id == old.machine.instance_id {
                        continue;
                    }
                    // Somebody else has changed it since: that is not ours to undo.
                    if new.is_some_and(|new| new != before.instance_id) {
                        anyhow::bail!(
                            "Machine {} was changed by somebody else meanwhile, and is left as it is",
                            before.id
                        );
                    }
                    let back = self.update(&before, &old.config).await?;
                    self.healthy(&back, &old.config, &before.newest_event())
                        .await?;
                }
            }
        }
        Ok(())
    }

    /// Makes a Machine that gets no requests yet. It is destroyed again unless it takes its place.
    async fn make(&self, config: &Value, group: &Group, old: Option<&Found>) -> Result<Made> {
        let mut config = config.clone();
        config["metadata"][REPLACES] = json!(old.map_or("-", |old| &old.machine.id));
        self.mark(&mut config);
        let region = old.map(|old| &old.machine.region);
        let region = region.filter(|region| !region.is_empty());
        let name = self.new_name();
        let body = json!({
            "config": config,
            "name": name,
            "region": region.or(group.region.as_ref()),
            "skip_launch": self.detach,
            "skip_service_registration": true,
            "min_secrets_version": self.secrets,
        });
        let cleanup = self.unless_kept(&name);
        let created: Result<Machine> = self.client.post(&self.machines_path(), &body).await;
        let machine = match created {
            Err(error) if !error.is::<ApiError>() => {
                let all: Vec<Machine> = self.client.get(&self.machines_path()).await?;
                let own = all.into_iter().find(|m| m.name == name);
                own.ok_or(error)?
            }
            created => created?,
        };
        step(&match old {
            Some(old) => format!("Made Machine {} beside {}", machine.id, old.machine.id),
            None => format!("Made Machine {} for \"{}\"", machine.id, group.name),
        });
        Ok(Made {
            machine,
            config,
            cleanup,
        })
    }

    /// Destroys the Machine of this name, also where its making was broken off before it was answered. What stays even so
    /// is removed by the next deploy.
    pub fn unless_kept(&self, name: &str) -> Cleanup {
        let (client, path, name) = (self.client.clone(), self.machines_path(), name.to_owned());
        Cleanup::new(async move {
            let Ok(all) = client.get::<Vec<Machine>>(&path).await else {
                return;
            };
            for machine in all.iter().filter(|m| m.name == name) {
                let _ = client
                    .delete(&format!("{path}/{}?force=true", machine.id))
                    .await;
            }
        })
    }

    /// A name that no other Machine has: by it one is found where the answer to its making is lost.
    pub fn new_name(&self) -> String {
        format!("{}-{:08x}", self.app, rand::random::<u32>())
    }

    /// Lets a Machine that was made have requests.
    async fn take_over(&self, new: Made) -> Result<Machine> {
        self.tell(&format!("{}/uncordon", self.path_of(&new.machine)))
            .await?;
        new.cleanup.forget();
        Ok(new.machine)
    }

    /// Ends the Machine whose place `new` has taken.
    async fn relieve(&self, new: &Machine, old: Option<&Found>) {
        if let Some(old) = old {
            let id = &old.machine.id;
            step(&format!("Machine {} has taken over from {id}", new.id));
            if let Err(error) = self.retire(&old.machine).await {
                let error = output::chain(&error);
                eprintln!("Warning: {error}. The next deploy removes it");
                return;
            }
        }
        // Where this fails all the same it does no harm: nobody is left whose place it could take.
        let path = format!("{}/metadata/{REPLACES}", self.path_of(new));
        for _ in 0..ATTEMPTS {
            match self.client.delete(&path).await {
                Err(error) if !error.is::<ApiError>() => tokio::time::sleep(health::POLL).await,
                _ => return,
            }
        }
    }

    /// Ends a Machine: it gets no more requests, those under way end, then its app does.
    async fn retire(&self, machine: &Machine) -> Result<()> {
        let path = self.path_of(machine);
        let gone = |error: &anyhow::Error| is_status(error, StatusCode::NOT_FOUND);
        match self.tell(&format!("{path}/cordon")).await {
            Err(error) if gone(&error) => return Ok(()),
            told => told?,
        }
        let now: Machine = self.client.get(&path).await?;
        let runs = matches!(now.state.as_str(), "starting" | "started");
        if runs && self.tell(&format!("{path}/stop")).await.is_ok() {
            let wait = format!("{path}/wait?state=stopped&state=failed&timeout={STOP_WAIT}");
            let _: Result<Value> = self.client.get(&wait).await;
        }
        match self.client.delete(&format!("{path}?force=true")).await {
            Err(error) if !gone(&error) => {
                Err(error.context(format!("Machine {} cannot be destroyed", machine.id)))
            }
            _ => Ok(()),
        }
    }

    /// A call that may be made twice.
    async fn tell(&self, path: &str) -> Result<()> {
        for _ in 1..ATTEMPTS {
            match self.client.post::<Value>(path, &json!({})).await {
                Err(error) if !error.is::<ApiError>() => tokio::time::sleep(health::POLL).await,
                told => return told.map(drop),
            }
        }
        self.client.post::<Value>(path, &json!({})).await.map(drop)
    }

    /// Gives a Machine another configuration. Where an answer was lost, whether it has it is found out; an error that is
    /// not the server's own leaves that open.
    async fn update(&self, machine: &Machine, config: &Value) -> Result<Machine> {
        let mut config = config.clone();
        self.mark(&mut config);
        let body = json!({
            "config": config,
            "skip_launch": self.detach,
            "current_version": machine.instance_id,
            "min_secrets_version": self.secrets,
        });
        let path = self.path_of(machine);
        let mut lost = None;
        for _ in 0..ATTEMPTS {
            match self.client.post::<Machine>(&path, &body).await {
                Err(error) if !error.is::<ApiError>() => lost = Some(error),
                // Of a call before this one, whose answer was lost.
                Err(error) if lost.is_some() => {
                    let now: Machine = self.client.get(&path).await?;
                    let changed = now.instance_id != machine.instance_id;
                    return if changed { Ok(now) } else { Err(error) };
                }
                answered => return answered,
            }
            tokio::time::sleep(health::POLL).await;
        }
        Err(lost.unwrap_or_else(|| anyhow::anyhow!("the server does not answer")))
    }

    fn mark(&self, config: &mut Value) {
        if let Some(release) = self.release {
            config["metadata"][RELEASE] = json!(release.to_string());
        }
        if !config["metadata"][GROUP_KEY].is_string() {
            config["metadata"][GROUP_KEY] = json!(DEFAULT_GROUP);
        }
    }

    /// The configuration with the group's volume: the one that `old` has, else a free one of that name, else a new one.
    async fn mounted(
        &self,
        group: &Group,
        mut config: Value,
        old: Option<&Found>,
    ) -> Result<Value> {
        let Some(mount) = &group.mount else {
            return Ok(config);
        };
        let all = volumes::list(self.client, &self.app).await?;
        let region = old.map(|old| &old.machine.region).or(group.region.as_ref());
        let volume = match old.and_then(|old| Some((old, old.machine.config.mounts.first()?))) {
            Some((old, mounted)) => {
                let volume = all.into_iter().find(|v| v.id == mounted.volume);
                Some(kept(&old.machine, mount, &mounted.volume, volume)?)
            }
            None => all.into_iter().find(|v| {
                v.name == mount.source
                    && v.state == "created"
                    && v.attached_machine_id.is_none()
                    && region.is_none_or(|r| *r == v.region)
            }),
        };
        let volume = match volume {
            Some(volume) => volume,
            None => {
                let size = mount.size_gb.unwrap_or(VOLUME_GB);
                let body = json!({"name": mount.source, "size_gb": size, "region": region});
                let made = volumes::create(self.client, &self.app, &body).await?;
                step(&format!(
                    "Created volume {} ({}, {size} GB)",
                    made.id, made.name
                ));
                made
            }
        };
        config["mounts"] = json!([{
            "volume": volume.id, "path": mount.destination, "name": volume.name,
        }]);
        Ok(config)
    }

    /// Waits until a Machine that was just given this configuration is well, in what comes after the event `since`. Ends
    /// at once when it cannot become so.
    async fn healthy(&self, machine: &Machine, config: &Value, since: &str) -> Result<()> {
        for warning in &machine.warnings {
            eprintln!("Warning: {warning}");
        }
        let Some(patience) = self.patience else {
            return Ok(());
        };
        let config: MachineConfig = serde_json::from_value(config.clone())?;
        let path = self.path_of(machine);
        let outcome = health::wait(self.client, &path, &config, since, patience).await;
        if outcome.is_ok() {
            step(&format!("Machine {} is healthy", machine.id));
        } else {
            self.show_output(machine).await;
        }
        outcome
    }

    /// The last lines of a Machine that failed: what its developer looks for first.
    pub async fn show_output(&self, machine: &Machine) {
        let path = format!(
            "/v1/apps/{}/logs?follow=false&machine={}",
            self.app, machine.id
        );
        let request = self.client.request(http::Method::GET, &path);
        let Ok(request) = request.body(crate::client::empty()) else {
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
        let lines: Vec<LogLine> = text
            .lines()
            .filter_map(|l| serde_json::from_str(l).ok())
            .filter(|l: &LogLine| l.unix_ms >= since)
            .collect();
        for line in lines.iter().rev().take(20).rev() {
            eprintln!("    {}", line.line.escape_debug());
        }
    }

    pub fn path_of(&self, machine: &Machine) -> String {
        format!("{}/{}", self.machines_path(), machine.id)
    }

    pub fn machines_path(&self) -> String {
        format!("/v1/apps/{}/machines", self.app)
    }
}
