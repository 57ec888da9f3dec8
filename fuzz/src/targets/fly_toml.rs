//! `fly.toml`, by the very code of the command line tool, which is a program and no library.
//!
//! Promised: errors and warnings, never a panic; what is taken makes a Machine of every group, or says
//! why not.

use std::path::Path;

#[allow(dead_code, unused_imports, missing_docs, unreachable_pub)]
#[path = "../../../cli/src/appconfig/mod.rs"]
mod appconfig;

use appconfig::AppConfig;

pub fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let config = match AppConfig::parse(text) {
        Ok((config, warnings)) => {
            warnings
                .iter()
                .for_each(|problem| drop(problem.to_string()));
            config
        }
        Err(problems) => {
            assert!(!problems.is_empty(), "refused for no reason");
            return problems
                .iter()
                .for_each(|problem| drop(problem.to_string()));
        }
    };
    // The developer's own files are read, whichever they name: not here.
    if config.files.iter().any(|file| file.local_path.is_some()) {
        return;
    }
    for group in config.groups() {
        let _ = config.mount_of(&group);
        let made = appconfig::machine::machine_config(&config, &group, "image", Path::new("/"));
        if let Ok(machine) = made {
            serde_json::to_string(&machine).unwrap();
        }
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let full = r#"app = "hello"
primary_region = "ams"
kill_timeout = 30
kill_signal = "SIGTERM"
[build]
dockerfile = "Dockerfile"
[build.args]
A = 1
[deploy]
strategy = "rolling"
[env]
PORT = 8080
DEBUG = true
[processes]
web = "serve --port 80"
worker = "'a b' c"
[http_service]
internal_port = 8080
force_https = true
auto_stop_machines = "suspend"
auto_start_machines = true
min_machines_running = 1
processes = ["web"]
[http_service.concurrency]
type = "requests"
hard_limit = 250
[[http_service.checks]]
interval = "10s"
timeout = 2000
path = "/"
[[services]]
internal_port = 53
protocol = "tcp"
[[services.ports]]
port = 53
handlers = ["tls"]
[[vm]]
size = "shared-cpu-2x"
memory = "512mb"
cpus = 2
[[mounts]]
source = "data"
destination = "/data"
initial_size = "1gb"
[[files]]
guest_path = "/etc/x"
raw_value = "aGk="
[[restart]]
policy = "on-failure"
retries = 3
"#;
    let small = "app = \"a\"\n[http_service]\ninternal_port = 80\n";
    vec![
        full.into(),
        small.into(),
        b"[x]\ny.z = [1, {a = 2}]\n".into(),
    ]
}
