//! A Machine's configuration as clients write it, read into what Tern acts on.
//!
//! Clients send all of the documented schema, and more as it grows. What is written in another way here is
//! translated; what changes nothing that a client would count on is passed over, with a warning in the answer; what
//! would run as something else than was asked for is refused.

use serde_json::{Map, Value};
use tern_catalog::{Guest, Handler, MachineConfig};

use crate::error::ApiError;

/// Documented keys that are passed over, by their ends. Other keys are passed over as well, as ones that do not exist.
const DOCUMENTED: &[&str] = &[
    "auto_extend",
    "add_size_gb",
    "cache_drive",
    "compress",
    "default_self_signed",
    "disable_machine_autostart",
    "dns",
    "extend_threshold_percent",
    "force_instance_description",
    "force_instance_key",
    "headers_read_timeout",
    "host_dedication_id",
    "kernel_args",
    "kind",
    "max_memory_mb",
    "metrics",
    "persist_rootfs",
    "protocol",
    "replay_cache",
    "rootfs",
    "size_gb_limit",
    "spot",
    "standbys",
    "statics",
    "swap_size_mb",
    "tls_server_name",
    "tls_skip_verify",
    "volumes",
];

/// Reads a configuration; answers what of it is not acted on beside it.
pub(super) fn read(config: Value) -> Result<(MachineConfig, Vec<String>), ApiError> {
    let Value::Object(mut config) = config else {
        return Err(ApiError::invalid("config is not an object"));
    };
    let mut warnings = Vec::new();
    translate(&mut config, &mut warnings)?;
    let written = Value::Object(config);
    let mut ignored = Vec::new();
    let read: Result<MachineConfig, _> =
        serde_ignored::deserialize(&written, |path| ignored.push(path.to_string()));
    let config = read.map_err(|e| ApiError::invalid(format!("config: {e}")))?;
    for path in ignored {
        warnings.extend(judge(&written, &path));
    }
    for (n, service) in config.services.iter().enumerate() {
        for (m, port) in service.ports.iter().enumerate() {
            let unserved = port.unserved(service.protocol).into_iter();
            warnings.extend(unserved.map(|(key, text)| {
                let key = if key.is_empty() {
                    String::new()
                } else {
                    format!(".{key}")
                };
                format!("config.services[{n}].ports[{m}]{key}: {text}")
            }));
        }
    }
    Ok((config, warnings))
}

/// What to say of a key that was passed over; nothing where it asks for nothing.
fn judge(config: &Value, path: &str) -> Option<String> {
    // Where a key is optional, the reader's path has a step of its own.
    let steps: Vec<&str> = path.split('.').filter(|step| *step != "?").collect();
    let found = steps.iter().try_fold(config, |value, step| match value {
        Value::Array(items) => step.parse().ok().and_then(|n: usize| items.get(n)),
        other => other.get(step),
    });
    if found.is_none_or(is_empty) {
        return None;
    }
    let path = steps.join(".");
    let key = steps.last().copied().unwrap_or_default();
    Some(if DOCUMENTED.contains(&key) {
        format!("config.{path} is not acted on")
    } else {
        format!("there is no key config.{path}; it was passed over")
    })
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(switch) => !switch,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.iter().all(is_empty),
        Value::Object(map) => map.values().all(is_empty),
    }
}

type Config = Map<String, Value>;

fn translate(config: &mut Config, warnings: &mut Vec<String>) -> Result<(), ApiError> {
    refuse(config)?;
    size(config)?;
    process(config, warnings)?;
    let services = config.get_mut("services").and_then(Value::as_array_mut);
    for (n, service) in services.into_iter().flatten().enumerate() {
        let Some(ports) = service.get_mut("ports").and_then(Value::as_array_mut) else {
            continue;
        };
        let mut m = 0;
        ports.retain_mut(|port| {
            let at = format!("config.services[{n}].ports[{m}]");
            m += 1;
            match unserved(port) {
                Some(why) => {
                    warnings.push(format!("{at}: {why}; nothing is served there"));
                    false
                }
                None => true,
            }
        });
    }
    Ok(())
}

/// What would run as something else than was asked for.
fn refuse(config: &mut Config) -> Result<(), ApiError> {
    let asked = |config: &Config, key: &str| config.get(key).is_some_and(|v| !is_empty(v));
    if asked(config, "containers") {
        return Err(ApiError::invalid(
            "config.containers: a Machine runs one image; make a Machine for each container",
        ));
    }
    config.remove("containers");
    if asked(config, "schedule") {
        return Err(ApiError::invalid(
            "config.schedule: Machines are not started by the clock; have a timer of your own start it",
        ));
    }
    config.remove("schedule");
    let persist = |value: Option<&Value>| {
        let told = value.and_then(Value::as_str).unwrap_or_default();
        matches!(told, "always" | "restart")
    };
    let rootfs = config.get("rootfs").and_then(|r| r.get("persist"));
    let guest = config.get("guest");
    if persist(rootfs) || persist(guest.and_then(|g| g.get("persist_rootfs"))) {
        return Err(ApiError::invalid(
            "config: a root file system is begun anew by a start that follows a stop; keep data on a volume (config.mounts)",
        ));
    }
    for place in ["rootfs", "guest"] {
        let Some(Value::Object(inner)) = config.get_mut(place) else {
            continue;
        };
        inner.remove("persist");
        inner.remove("persist_rootfs");
    }
    let gpu = |key| guest_key(config, key).is_some_and(|v| !is_empty(v));
    if gpu("gpus") || gpu("gpu_kind") {
        return Err(ApiError::invalid("config.guest: Machines have no GPUs"));
    }
    Ok(())
}

fn guest_key<'a>(config: &'a Config, key: &str) -> Option<&'a Value> {
    config.get("guest").and_then(|guest| guest.get(key))
}

/// `size`, the older way to say `guest`, which goes before it.
fn size(config: &mut Config) -> Result<(), ApiError> {
    let Some(Value::String(size)) = config.remove("size") else {
        return Ok(());
    };
    if size.is_empty() {
        return Ok(());
    }
    let preset = Guest::preset(&size).ok_or_else(|| {
        ApiError::invalid(format!(
            "config.size: there is no size \"{size}\"; write shared-cpu-1x … 8x or performance-1x … 8x"
        ))
    })?;
    let guest = config
        .entry("guest")
        .or_insert_with(|| Value::Object(Map::new()));
    if let Value::Object(guest) = guest {
        guest.entry("cpu_kind").or_insert(preset.cpu_kind.into());
        guest.entry("cpus").or_insert(preset.cpus.into());
        guest.entry("memory_mb").or_insert(preset.memory_mb.into());
    }
    Ok(())
}

/// `processes`, of which a Machine runs one: the older way to say `init` and `env`.
fn process(config: &mut Config, warnings: &mut Vec<String>) -> Result<(), ApiError> {
    let processes = match config.remove("processes") {
        Some(Value::Array(processes)) => processes,
        _ => return Ok(()),
    };
    let mut processes = processes.into_iter().filter(|p| !is_empty(p));
    let Some(process) = processes.next() else {
        return Ok(());
    };
    let Value::Object(process) = process else {
        return Err(ApiError::invalid("config.processes: one is not an object"));
    };
    if processes.next().is_some() {
        return Err(ApiError::invalid(
            "config.processes: a Machine runs one process; make a Machine for each",
        ));
    }
    for (key, value) in process.into_iter().filter(|(_, value)| !is_empty(value)) {
        let target = match key.as_str() {
            "exec" | "entrypoint" | "cmd" => "init",
            "env" => "env",
            "ignore_app_secrets" => {
                warnings.push("config.processes: ignore_app_secrets is not acted on".to_owned());
                continue;
            }
            other => {
                return Err(ApiError::invalid(format!(
                    "config.processes: {other} cannot be had; give the process exec, entrypoint, cmd and env"
                )));
            }
        };
        let target = config
            .entry(target)
            .or_insert_with(|| Value::Object(Map::new()));
        match (target, value) {
            (Value::Object(target), Value::Object(more)) if key == "env" => target.extend(more),
            (Value::Object(target), value) => drop(target.insert(key, value)),
            _ => {}
        }
    }
    Ok(())
}

/// Why nothing is served on a port that the schema of a configuration cannot even hold.
fn unserved(port: &mut Value) -> Option<String> {
    let port = port.as_object_mut()?;
    let handlers = port.get_mut("handlers").and_then(Value::as_array_mut)?;
    let known =
        |handler: &&mut Value| serde_json::from_value::<Handler>((**handler).clone()).is_ok();
    let other = handlers.iter_mut().find(|handler| !known(handler))?;
    Some(format!("there is no handler {other}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn warned(config: Value) -> Vec<String> {
        read(config).unwrap().1
    }

    fn refused(config: Value) -> String {
        format!("{:?}", read(config).unwrap_err())
    }

    #[test]
    fn documented_keys_that_ask_for_nothing_are_taken_without_a_word() {
        let config = json!({
            "image": "x", "size": "", "rootfs": {"persist": "never"}, "schedule": "", "processes": [], "containers": [],
            "statics": [], "dns": {}, "standbys": [], "guest": {"gpus": 0, "gpu_kind": "", "kernel_args": []},
            "init": {"swap_size_mb": 0}, "disable_machine_autostart": false,
        });
        assert_eq!(warned(config), Vec::<String>::new());
    }

    #[test]
    fn what_is_not_acted_on_is_told_by_its_key() {
        let config = json!({
            "image": "x", "metrics": {"port": 9091, "path": "/metrics"}, "dns": {"skip_registration": true},
            "statics": [{"guest_path": "/a", "url_prefix": "/b"}], "standbys": ["1"], "init": {"swap_size_mb": 512},
            "rootfs": {"size_gb": 8}, "imgae": "y",
            "services": [{"internal_port": 8080, "ports": [
                {"port": 443, "handlers": ["tls", "http"], "http_options": {"compress": true}}]}],
            "checks": {"up": {"type": "http", "protocol": "https"}},
        });
        let told = warned(config).join("\n");
        for key in [
            "config.metrics is not",
            "config.dns is not",
            "config.statics is not",
            "config.standbys is not",
            "config.init.swap_size_mb is not",
            "config.rootfs is not",
            "there is no key config.imgae",
            "config.services.0.ports.0.http_options.compress is not",
            "config.checks.up.protocol is not",
        ] {
            assert!(told.contains(key), "{key}: {told}");
        }
    }

    #[test]
    fn what_would_run_as_something_else_is_refused() {
        let of = |key: &str, value: Value| refused(json!({"image": "x", key: value}));
        assert!(of("schedule", json!("daily")).contains("clock"));
        assert!(of("containers", json!([{"name": "a"}])).contains("one image"));
        assert!(of("processes", json!([{"cmd": ["a"]}, {"cmd": ["b"]}])).contains("for each"));
        assert!(of("processes", json!([{"user": "app"}])).contains("user"));
        assert!(of("rootfs", json!({"persist": "always"})).contains("volume"));
        assert!(of("guest", json!({"persist_rootfs": "restart"})).contains("volume"));
        assert!(of("guest", json!({"gpu_kind": "a10"})).contains("GPU"));
        assert!(of("size", json!("huge-1x")).contains("shared-cpu-1x"));
    }

    #[test]
    fn older_ways_to_say_it_are_translated() {
        let config = json!({
            "image": "x", "size": "shared-cpu-2x", "guest": {"memory_mb": 1024}, "env": {"A": "1"},
            "processes": [{"cmd": ["serve"], "entrypoint": ["sh"], "env": {"B": "2"}}],
            "services": [{"internal_port": 80, "ports": [{"start_port": 443, "end_port": 443, "handlers": ["tls", "http"]}]}],
        });
        let (config, warnings) = read(config).unwrap();
        assert_eq!(warnings, Vec::<String>::new());
        assert_eq!((config.guest.cpus, config.guest.memory_mb), (2, 1024));
        assert_eq!(config.init.cmd.unwrap(), ["serve"]);
        assert_eq!(config.init.entrypoint.unwrap(), ["sh"]);
        assert_eq!((&*config.env["A"], &*config.env["B"]), ("1", "2"));
        assert_eq!(config.services[0].ports[0].numbers(), Some(443..=443));
    }

    #[test]
    fn a_port_that_nothing_serves_is_told() {
        let ports = json!([
            {"port": 5432, "handlers": ["pg_tls"]}, {"start_port": 100, "end_port": 200}, {"port": 4222, "handlers": ["tls"]},
            {"port": 80, "handlers": ["http"]}, {"port": 25, "handlers": ["tcp"]}, {"port": 80}, {"port": 81, "handlers": ["http", "proxy_proto"]},
            {"port": 443, "handlers": ["quic"]},
        ]);
        let config = json!({"image": "x", "services": [{"internal_port": 80, "ports": ports}]});
        let (config, warnings) = read(config).unwrap();
        assert_eq!(warnings.len(), 3, "{warnings:?}");
        assert!(warnings[0].contains("no handler \"quic\""), "{warnings:?}");
        assert!(
            warnings[1].contains("all apps share port 80"),
            "{warnings:?}"
        );
        assert!(
            warnings[2].contains("ports[6].handlers: `proxy_proto`"),
            "{warnings:?}"
        );
        assert_eq!(config.services[0].ports.len(), 7);
    }
}
