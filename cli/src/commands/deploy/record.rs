//! The release that the server keeps of a deploy; `tern releases` and `tern rollback`.

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use http::{Method, header};
use serde::Deserialize;
use serde_json::{Value, json};
use tern_catalog::AppName;

use super::lock::{NONCE, who};
use super::plan::How;
use super::rollout::{self, Group, Rollout, Source};
use super::{AT_ONCE, WAIT, lock, step};
use crate::args::{AppArg, Rollback};
use crate::client::{Client, full};
use crate::commands::app_of;
use crate::output;

/// A release that is being deployed.
pub struct Record<'a> {
    client: &'a Client,
    path: String,
    nonce: &'a str,
    pub version: u64,
}

/// A release as the API shows it.
#[derive(Debug, Clone, Deserialize)]
struct Release {
    version: u64,
    status: String,
    #[serde(default)]
    description: String,
    #[serde(default)]
    user: String,
    #[serde(default)]
    image_ref: String,
    created_at: jiff::Timestamp,
    message: Option<String>,
    #[serde(default)]
    config: Value,
}

impl<'a> Record<'a> {
    /// Makes one, under the app's lease.
    pub async fn begin(
        client: &'a Client,
        app: &AppName,
        nonce: &'a str,
        groups: &[Group],
        description: &str,
    ) -> Result<Self> {
        let image = groups.iter().find_map(|group| match &group.source {
            Source::Config(config) => config["image"].as_str(),
            Source::Own(_) => None,
        });
        let body = json!({
            "image": image.unwrap_or_default(),
            "config": {"groups": groups},
            "description": description,
            "user": who(),
        });
        let path = format!("/v1/apps/{app}/releases");
        let made = call(client, Method::POST, &path, nonce, &body).await?;
        let version = made["version"].as_u64();
        let version = version.context("the server made a release without a version")?;
        step(&format!("Release {version}"));
        Ok(Self {
            client,
            path: format!("{path}/{version}"),
            nonce,
            version,
        })
    }

    /// Does the work, and tells what came of it. Where this program ends before, the server tells that it was interrupted.
    pub async fn during<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let outcome = work.await;
        let body = match &outcome {
            Ok(_) => json!({"status": "succeeded"}),
            Err(error) => json!({"status": "failed", "message": output::chain(error)}),
        };
        let told = call(self.client, Method::PUT, &self.path, self.nonce, &body).await;
        if let Err(error) = told {
            let error = output::chain(&error);
            eprintln!(
                "Warning: how release {} went is not recorded: {error}",
                self.version
            );
        }
        outcome
    }
}

async fn call(
    client: &Client,
    method: Method,
    path: &str,
    nonce: &str,
    body: &Value,
) -> Result<Value> {
    let request = client
        .request(method, path)
        .header(NONCE, nonce)
        .header(header::CONTENT_TYPE, "application/json")
        .body(full(serde_json::to_vec(body)?))?;
    let answer = client.call(request).await?;
    let body = http_body_util::BodyExt::collect(answer.into_body()).await?;
    Ok(serde_json::from_slice(&body.to_bytes())?)
}

async fn list(client: &Client, app: &AppName) -> Result<Value> {
    client.get(&format!("/v1/apps/{app}/releases")).await
}

/// `tern releases`.
pub async fn releases(client: &Client, arg: &AppArg) -> Result<ExitCode> {
    let answer = list(client, &app_of(arg)?).await?;
    if arg.json {
        output::json(&answer["releases"])?;
        return Ok(ExitCode::SUCCESS);
    }
    let all: Vec<Release> = serde_json::from_value(answer["releases"].clone())?;
    let row = |r: &Release| {
        let note = r.message.as_deref().unwrap_or_default();
        vec![
            format!("v{}", r.version),
            r.status.clone(),
            r.description.clone(),
            r.user.clone(),
            format!("{:.0}", r.created_at),
            r.image_ref.clone(),
            note.chars().take(80).collect(),
        ]
    };
    let rows: Vec<_> = all.iter().map(row).collect();
    output::table(
        &[
            "VERSION",
            "STATUS",
            "DESCRIPTION",
            "USER",
            "DATE",
            "IMAGE",
            "WHY",
        ],
        &rows,
        "No releases yet; `tern deploy` makes one.",
    );
    Ok(ExitCode::SUCCESS)
}

/// `tern rollback`: an earlier release's image and configuration, as a new release.
pub async fn rollback(client: &Client, args: &Rollback) -> Result<ExitCode> {
    let app = app_of(&args.app)?;
    let lock = lock::Lock::take(client, &app).await?;
    let nonce = lock.nonce();
    let work = async {
        let all: Vec<Release> =
            serde_json::from_value(list(client, &app).await?["releases"].clone())?;
        let version = match args.version {
            Some(version) => version,
            None => before(&all)?,
        };
        let path = format!("/v1/apps/{app}/releases/{version}");
        let release: Release = client.get(&path).await?;
        let groups: Vec<Group> = serde_json::from_value(release.config["groups"].clone())
            .with_context(|| format!("release {version} keeps nothing to go back to"))?;
        step(&format!(
            "Going back to release {version}, {}",
            release.image_ref
        ));
        let description = format!("Rollback to v{version}");
        let record = Record::begin(client, &app, &nonce, &groups, &description).await?;
        let rollout = Rollout {
            client,
            app: app.clone(),
            how: How::Rolling(AT_ONCE),
            patience: Some(args.wait_timeout.unwrap_or(WAIT)),
            detach: false,
            secrets: None,
            release: Some(record.version),
        };
        let found = rollout::machines(client, &app).await?;
        record.during(rollout.run(&found, &groups)).await?;
        Ok((version, record.version))
    };
    let (to, as_) = lock.during(work).await?;
    println!("{app} runs what release {to} was, as release {as_}.");
    Ok(ExitCode::SUCCESS)
}

/// The last release that went well before the one that serves now.
fn before(newest_first: &[Release]) -> Result<u64> {
    let mut well = newest_first.iter().filter(|r| r.status == "succeeded");
    // After one that was broken off, what went well last is not what serves: it is what to go back to.
    let broken_off = newest_first
        .first()
        .is_some_and(|r| r.status == "interrupted");
    if !broken_off {
        well.next();
    }
    match well.next() {
        Some(release) => Ok(release.version),
        None => bail!("there is no earlier release that went well; see `tern releases`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_is_to_what_went_well_before_what_serves() {
        let releases = |all: &[(u64, &str)]| -> Vec<Release> {
            let one = |(version, status): &(u64, &str)| {
                let told = json!({"version": version, "status": status, "created_at": "2026-11-28T00:00:00Z"});
                serde_json::from_value(told).unwrap()
            };
            all.iter().map(one).collect()
        };
        let all = [
            (4, "succeeded"),
            (3, "failed"),
            (2, "succeeded"),
            (1, "succeeded"),
        ];
        assert_eq!(before(&releases(&all)).unwrap(), 2);
        assert_eq!(before(&releases(&all[1..])).unwrap(), 1);
        let broken = [(3, "interrupted"), (2, "succeeded"), (1, "succeeded")];
        assert_eq!(before(&releases(&broken)).unwrap(), 2);
        assert!(before(&releases(&all[..1])).is_err());
        assert!(before(&[]).is_err());
    }
}
