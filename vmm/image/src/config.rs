//! The part of an image that says how to run it.
//!
//! See the [OCI image configuration](https://github.com/opencontainers/image-spec/blob/main/config.md).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What an image says about running it. Every field may be absent from an image, and is then empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageConfig {
    /// The first words of the command line.
    #[serde(deserialize_with = "null_is_empty")]
    pub entrypoint: Vec<String>,
    /// The default arguments, or the whole command line where there is no entrypoint.
    #[serde(deserialize_with = "null_is_empty")]
    pub cmd: Vec<String>,
    /// `NAME=value` words.
    #[serde(deserialize_with = "null_is_empty")]
    pub env: Vec<String>,
    /// The directory to start in; empty means `/`.
    #[serde(deserialize_with = "null_is_empty")]
    pub working_dir: String,
    /// `user`, `uid`, `user:group`, …; empty means root.
    #[serde(deserialize_with = "null_is_empty")]
    pub user: String,
    /// The signal that asks the program to stop, like `SIGQUIT` or `3`.
    pub stop_signal: Option<String>,
    /// Ports the program listens on, like `8080/tcp`.
    #[serde(serialize_with = "keys_as_map", deserialize_with = "map_to_keys")]
    pub exposed_ports: BTreeSet<String>,
    /// Free-form labels.
    #[serde(deserialize_with = "null_is_empty")]
    pub labels: BTreeMap<String, String>,
}

impl ImageConfig {
    /// The command line of the image, before anyone overrides it: entrypoint, then arguments.
    #[must_use]
    pub fn argv(&self) -> Vec<String> {
        self.entrypoint.iter().chain(&self.cmd).cloned().collect()
    }
}

/// Builders write `null` for what is empty.
pub(crate) fn null_is_empty<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A Go set: a map from each member to an empty object.
fn map_to_keys<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeSet<String>, D::Error> {
    let map: Option<BTreeMap<String, serde::de::IgnoredAny>> = Option::deserialize(deserializer)?;
    Ok(map.unwrap_or_default().into_keys().collect())
}

fn keys_as_map<S: Serializer>(keys: &BTreeSet<String>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(keys.iter().map(|key| (key, BTreeMap::<String, ()>::new())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_docker_writes() {
        let config: ImageConfig = serde_json::from_str(
            r#"{"Hostname":"","User":"nginx","Env":["PATH=/bin"],"Cmd":["-g"],"Entrypoint":null,
                "Labels":null,"ExposedPorts":{"80/tcp":{}},"StopSignal":"SIGQUIT","Volumes":{}}"#,
        )
        .unwrap();
        assert_eq!(config.user, "nginx");
        assert_eq!(config.argv(), ["-g"]);
        assert_eq!(config.stop_signal.as_deref(), Some("SIGQUIT"));
        assert!(config.exposed_ports.contains("80/tcp"));

        let again = serde_json::to_string(&config).unwrap();
        assert!(again.contains(r#""ExposedPorts":{"80/tcp":{}}"#), "{again}");
        assert_eq!(serde_json::from_str::<ImageConfig>(&again).unwrap(), config);
    }
}
