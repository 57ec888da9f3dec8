//! What was deployed of an app, and what came of it. Written by the API.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{AppName, Record};

/// One deploy of an app.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Release {
    /// The app.
    pub app: AppName,
    /// Counts its deploys, from 1.
    pub version: u64,
    /// The image that it runs, with its digest where it has one.
    pub image: String,
    /// Machines' configurations by process group, as they were asked for: what a way back needs.
    pub config: Value,
    /// What it is for, for people.
    pub description: String,
    /// Who deployed it, by their own word.
    pub user: String,
    /// When it was begun.
    pub created_at: Timestamp,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// Where it stands.
    pub status: ReleaseStatus,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// SHA-256 of the nonce of the app's lease that it is done under, hexadecimal: one that runs without is over.
    pub lease: String,
}

/// Where a release stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseStatus {
    /// Its Machines are being made.
    Running,
    /// They all run.
    Succeeded,
    /// They do not, and what was before is back as far as its message says.
    Failed,
    /// Whoever deployed it went away: some Machines may be its, and some not.
    Interrupted,
}

impl Release {
    /// What the keys of an app's releases start with.
    pub fn prefix_of(app: &AppName) -> String {
        format!("{}{app}/", Self::PREFIX)
    }

    /// A release's id. In the order of keys they are in the order of versions.
    pub fn id_of(app: &AppName, version: u64) -> String {
        format!("{app}/{version:010}")
    }
}

impl Record for Release {
    const PREFIX: &'static str = "releases/";
    fn id(&self) -> String {
        Self::id_of(&self.app, self.version)
    }
}
