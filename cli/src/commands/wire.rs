//! The API's JSON, as far as commands read it.

use serde::{Deserialize, Serialize};
use tern_catalog::MachineConfig;

/// A Machine as the API shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    pub id: String,
    #[serde(default)]
    pub name: String,
    pub state: String,
    #[serde(default)]
    pub region: String,
    #[serde(default)]
    pub instance_id: String,
    #[serde(default)]
    pub version: Option<u64>,
    #[serde(default)]
    pub private_ip: String,
    pub config: MachineConfig,
    #[serde(default)]
    pub events: Vec<Event>,
    #[serde(default)]
    pub checks: Vec<CheckResult>,
    #[serde(default)]
    pub created_at: Option<jiff::Timestamp>,
    #[serde(default)]
    pub updated_at: Option<jiff::Timestamp>,
}

/// An event of a Machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Event {
    #[serde(rename = "type")]
    pub kind: String,
    pub status: String,
    #[serde(default)]
    pub source: String,
    pub timestamp: i64,
    #[serde(default)]
    pub request: serde_json::Value,
}

/// A health check's last result.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CheckResult {
    pub name: String,
    pub status: String,
    #[serde(default)]
    pub output: String,
}

/// A line of an app's output.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogLine {
    pub machine: String,
    pub unix_ms: i64,
    #[serde(default)]
    pub stream: String,
    pub line: String,
}

impl Machine {
    /// The process group it belongs to.
    pub fn group(&self) -> &str {
        let group = self
            .config
            .metadata
            .get(crate::appconfig::machine::GROUP_KEY);
        group.map_or(crate::appconfig::DEFAULT_GROUP, String::as_str)
    }

    /// Why it is in the state it is in, as its newest event with a reason tells.
    pub fn last_reason(&self) -> Option<String> {
        let newest = self.events.iter().max_by_key(|e| e.timestamp)?;
        let field = |name: &str| {
            newest
                .request
                .get(name)
                .and_then(|v| v.as_str())
                .map(str::to_owned)
        };
        field("reason")
            .or_else(|| field("error"))
            .or_else(|| field("message"))
    }
}
