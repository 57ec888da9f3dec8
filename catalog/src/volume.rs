//! Volumes: disks that outlive the Machines they are mounted in.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{AppName, HostId, MachineId, Record, SnapshotId, VolumeId, VolumeName};

/// A disk of an app's, on one host. Written by the API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its id.
    pub id: VolumeId,
    /// Its name. Several volumes of an app may share one: `fly.toml` mounts any free one of them.
    pub name: VolumeName,
    /// Its app.
    pub app: AppName,
    /// The host that has it, and so the host of any Machine that mounts it.
    pub host: HostId,
    /// That host's region.
    pub region: String,
    /// Its size in GiB. It only grows; a Machine sees it when it next starts cold.
    pub size_gb: u32,
    /// What it is made of, if not of nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<VolumeSource>,
    /// The Machine that mounts it. One that does not exist any more holds nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineId>,
    /// The snapshots that are wanted, by when they were.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub snapshots: BTreeMap<SnapshotId, Timestamp>,
    /// It is to be removed with all its data and snapshots. Nothing takes that back.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub destroyed: bool,
    /// When it was asked for.
    pub created_at: Timestamp,
}

/// What a new volume starts with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub struct VolumeSource {
    /// The volume whose data it is.
    pub volume: VolumeId,
    /// A snapshot of it; without one, the volume as it is now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotId>,
}

/// What was seen of a volume. Written by its host's agent alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// The volume.
    pub id: VolumeId,
    /// Where it is in its life.
    pub state: VolumeState,
    /// Why it is so, where it is not well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The size of its disk in GiB; smaller than what is wanted until a Machine next starts cold.
    pub size_gb: u32,
    /// Its snapshots.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub snapshots: BTreeMap<SnapshotId, SnapshotStatus>,
    /// When this was written.
    pub updated_at: Timestamp,
}

/// Where a volume is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeState {
    /// Its disk is there.
    Created,
    /// It could not be made, or is not where it was. Never made anew: its data may still be found.
    Failed,
}

/// A snapshot: made, or why not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotStatus {
    /// When it was made.
    pub created_at: Timestamp,
    /// What it takes on the host's disk, in bytes.
    pub bytes: u64,
    /// Why there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Volume {
    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        u64::from(self.size_gb) << 30
    }
}

impl Record for Volume {
    const PREFIX: &'static str = "volumes/";
    fn id(&self) -> String {
        self.id.to_string()
    }
}

impl Record for VolumeStatus {
    const PREFIX: &'static str = "volume_status/";
    fn id(&self) -> String {
        self.id.to_string()
    }
}
