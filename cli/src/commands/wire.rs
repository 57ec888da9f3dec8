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
    /// As the server writes it: text, and a number from older ones.
    #[serde(default)]
    pub version: serde_json::Value,
    #[serde(default)]
    pub private_ip: String,
    #[serde(default)]
    pub cordoned: bool,
    /// Why it is in the state it is in, where that needs telling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub config: MachineConfig,
    #[serde(default)]
    pub events: Vec<Event>,
    #[serde(default)]
    pub checks: Vec<CheckResult>,
    #[serde(default)]
    pub created_at: Option<jiff::Timestamp>,
    #[serde(default)]
    pub updated_at: Option<jiff::Timestamp>,
    /// What of a configuration that was just given is not acted on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// An event of a Machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Event {
    /// Ordered by time.
    #[serde(default)]
    pub id: String,
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

    /// The id of its newest event: what happens after it has a greater one.
    pub fn newest_event(&self) -> String {
        let ids = self.events.iter().map(|event| event.id.as_str());
        ids.max().unwrap_or_default().to_owned()
    }

    /// Why it is in the state it is in, as its newest event with a reason tells.
    pub fn last_reason(&self) -> Option<String> {
        let newest = self.events.iter().max_by_key(|e| e.timestamp)?;
        // How an app or a start ended is one level deeper.
        let details = [&newest.request, &newest.request["exit_event"]];
        let names = ["reason", "error", "message"];
        let told = details
            .iter()
            .flat_map(|detail| names.map(|name| detail[name].as_str()))
            .flatten();
        let mut told = told.filter(|text| !text.is_empty());
        told.next().map(str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn machine(requests: &[Value]) -> Machine {
        let event = |(at, request): (usize, &Value)| json!({"type": "exit", "status": "failed", "timestamp": at, "request": request});
        let events: Vec<_> = requests.iter().enumerate().map(event).collect();
        serde_json::from_value(json!({
            "id": "1", "name": "m", "state": "failed", "region": "local", "config": {"image": "x"}, "events": events,
        }))
        .unwrap()
    }

    #[test]
    fn the_newest_reason_is_found_at_either_level() {
        let nested = json!({"exit_event": {"error": "no kernel", "restarting": false}});
        let top = json!({"reason": "asked to"});
        assert_eq!(machine(&[]).last_reason(), None);
        assert_eq!(machine(&[json!(null)]).last_reason(), None);
        let told = |requests: &[Value]| machine(requests).last_reason().unwrap();
        assert_eq!(told(&[top.clone(), nested.clone()]), "no kernel");
        assert_eq!(told(&[nested, top]), "asked to");
    }
}
