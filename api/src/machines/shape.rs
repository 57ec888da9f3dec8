//! A Machine as the API shows it.

use serde_json::{Value, json};
use tern_catalog::{DesiredState, Machine, MachineState, MachineStatus};

/// A Machine and what was seen of it, as one object.
pub fn machine(machine: &Machine, status: Option<&MachineStatus>) -> Value {
    json!({
        "id": machine.id,
        "name": machine.name,
        "state": state(machine, status),
        "region": machine.region,
        "instance_id": machine.instance_id,
        // Clients in Go declare a string; it is what `wait` takes for it.
        "version": machine.instance_id,
        "private_ip": machine.private_ip,
        "created_at": machine.created_at,
        "updated_at": status.map_or(machine.updated_at, |s| s.updated_at.max(machine.updated_at)),
        "config": machine.config,
        "image_ref": image_ref(&machine.config.image),
        "events": status.map(events).unwrap_or_default(),
        "checks": super::checks::shape(status),
        "host_status": "ok",
        "cordoned": machine.cordoned,
        "reason": status.and_then(|s| s.reason.as_deref()),
    })
}

/// Its events, newest first.
pub fn events(status: &MachineStatus) -> Vec<Value> {
    status.events.iter().rev().map(|e| json!(e)).collect()
}

/// The state of its current version. What its host has not looked at yet is on its way.
pub fn state(machine: &Machine, status: Option<&MachineStatus>) -> MachineState {
    let wished = || match machine.desired.state {
        DesiredState::Created => MachineState::Created,
        DesiredState::Started | DesiredState::Restarted { .. } => MachineState::Starting,
        DesiredState::Stopped { .. } => MachineState::Stopping,
        DesiredState::Suspended => MachineState::Suspending,
        DesiredState::Destroyed { .. } => MachineState::Destroying,
    };
    match status {
        None => wished(),
        Some(status) if status.generation < machine.desired.generation => wished(),
        Some(status) => status.state,
    }
}

/// Whether a Machine in this state has a process.
pub fn is_running(state: MachineState) -> bool {
    use MachineState::{Started, Starting, Stopping, Suspending};
    matches!(state, Starting | Started | Stopping | Suspending)
}

/// `registry/repository:tag@digest`, taken apart.
fn image_ref(image: &str) -> Value {
    let (rest, digest) = image
        .split_once('@')
        .map_or((image, None), |(r, d)| (r, Some(d)));
    let (registry, path) = match rest.split_once('/') {
        Some((first, path)) if first.contains(['.', ':']) || first == "localhost" => (first, path),
        _ => ("docker.io", rest),
    };
    let (repository, tag) = match path.rsplit_once(':') {
        Some((repository, tag)) => (repository, Some(tag)),
        None => (path, None),
    };
    json!({"registry": registry, "repository": repository, "tag": tag, "digest": digest, "labels": {}})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_taken_apart() {
        let r = image_ref("registry.internal/hello@sha256:ab");
        assert_eq!(
            (r["registry"].as_str(), r["repository"].as_str()),
            (Some("registry.internal"), Some("hello"))
        );
        assert_eq!(r["digest"], "sha256:ab");
        let r = image_ref("localhost:5000/a/b:v1");
        assert_eq!(
            (r["registry"].as_str(), r["repository"].as_str()),
            (Some("localhost:5000"), Some("a/b"))
        );
        assert_eq!(r["tag"], "v1");
        assert_eq!(image_ref("nginx")["registry"], "docker.io");
    }
}
