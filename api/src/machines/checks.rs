//! Results of health checks, as the API shows them.

use serde_json::{Value, json};
use tern_catalog::MachineStatus;

/// One object per check.
pub fn shape(status: Option<&MachineStatus>) -> Vec<Value> {
    let checks = status.map(|s| s.checks.as_slice()).unwrap_or_default();
    checks.iter().map(|c| json!(c)).collect()
}
