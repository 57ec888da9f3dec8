//! Keys of `fly.toml`: where they stand, and what to say of those that the schema does not take.

use std::fmt;
use std::ops::Range;

use toml::de::{DeTable, DeValue};

/// Something to tell the writer of a `fly.toml` or `tern.toml`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The line, from 1, where it is known.
    pub line: Option<usize>,
    /// What is wrong, and what to write instead.
    pub text: String,
}

/// What is to be said of a key that the schema does not take.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// No such key anywhere.
    Unknown(String),
    /// Known, and harmless to leave out.
    NotYet(String),
}

/// Documented keys that change nothing dangerous when they are left out, without indices; `*` stands for any name.
const NOT_YET: &[&str] = &[
    "console_command",
    "deploy.seed_command",
    "experimental",
    "host_dedication_id",
    "http_service.checks.protocol",
    "http_service.checks.restart_limit",
    "http_service.checks.tls_server_name",
    "http_service.checks.tls_skip_verify",
    "http_service.http_options.compress",
    "http_service.http_options.headers_read_timeout",
    "http_service.http_options.replay_cache",
    "http_service.machine_checks",
    "http_service.tls_options.default_self_signed",
    "services.http_checks.protocol",
    "services.http_checks.restart_limit",
    "services.http_checks.tls_server_name",
    "services.http_checks.tls_skip_verify",
    "services.machine_checks",
    "services.script_checks",
    "services.tcp_checks.restart_limit",
    "services.ports.http_options.compress",
    "services.ports.http_options.headers_read_timeout",
    "services.ports.http_options.replay_cache",
    "services.ports.tls_options.default_self_signed",
    "checks.*.kind",
    "checks.*.protocol",
    "checks.*.restart_limit",
    "checks.*.tls_server_name",
    "checks.*.tls_skip_verify",
    "metrics",
    "machine_config",
    "mounts.auto_extend_size_increment",
    "mounts.auto_extend_size_limit",
    "mounts.auto_extend_size_threshold",
    "mounts.scheduled_snapshots",
    "mounts.snapshot_retention",
    "swap_size_mb",
    "vm.gpu_kind",
    "vm.gpus",
    "vm.host_dedication_id",
    "vm.kernel_args",
    "vm.persist_rootfs",
    "build.builder",
    "build.buildpacks",
    "build.builtin",
    "build.settings",
    "build.compose",
    "build.compression",
    "build.compression_level",
    "statics",
];

/// Keys that files have and no schema does, with what was meant by them.
const MEANT: &[(&str, &str)] = &[
    (
        "max_machines_running",
        "is not acted on: no more Machines run than the app has; see `tern machine list`, and take one away with \
         `tern machine destroy`",
    ),
    (
        "min_machines",
        "is not acted on; min_machines_running keeps so many from being stopped",
    ),
    (
        "build.command",
        "is not acted on: what builds the app stands in its Dockerfile",
    ),
];

/// Keys that the schema takes, to guess what was meant.
const TAKEN: &[&str] = &[
    "app",
    "primary_region",
    "kill_signal",
    "kill_timeout",
    "build",
    "image",
    "dockerfile",
    "ignorefile",
    "build-target",
    "args",
    "deploy",
    "strategy",
    "wait_timeout",
    "env",
    "processes",
    "http_service",
    "internal_port",
    "force_https",
    "auto_stop_machines",
    "auto_start_machines",
    "min_machines_running",
    "concurrency",
    "type",
    "soft_limit",
    "hard_limit",
    "tls_options",
    "alpn",
    "versions",
    "http_options",
    "h2_backend",
    "idle_timeout",
    "response",
    "pristine",
    "headers",
    "checks",
    "grace_period",
    "interval",
    "timeout",
    "method",
    "path",
    "services",
    "protocol",
    "ports",
    "port",
    "handlers",
    "tcp_checks",
    "http_checks",
    "vm",
    "size",
    "memory",
    "memory_mb",
    "cpus",
    "cpu_kind",
    "restart",
    "policy",
    "retries",
    "mounts",
    "source",
    "destination",
    "initial_size",
    "files",
    "guest_path",
    "local_path",
    "raw_value",
    "secret_name",
];

/// A path as it stands in the file: `serde_ignored` writes a step of its own where a key is optional.
pub(super) fn written(path: &str) -> String {
    let steps: Vec<&str> = path.split('.').filter(|step| *step != "?").collect();
    steps.join(".")
}

/// What to say of an unknown key at this path (`http_service.checks.0.hedaers`).
pub(super) fn judge(path: &str) -> Verdict {
    // Indices do not matter to the lists above: what stands in an array of tables may stand in one table too.
    let is_index = |step: &str| step.bytes().all(|b| b.is_ascii_digit());
    let mut shape: Vec<&str> = path.split('.').filter(|step| !is_index(step)).collect();
    match shape.first_mut() {
        Some(first) if *first == "mount" => *first = "mounts",
        Some(first) if *first == "compute" || *first == "computes" => *first = "vm",
        _ => {}
    }
    let within = |known: &str| {
        let known: Vec<&str> = known.split('.').collect();
        let fits = |(known, is): (&&str, &&str)| *known == "*" || known == is;
        shape.len() >= known.len() && known.iter().zip(&shape).all(fits)
    };
    let meant = MEANT
        .iter()
        .find(|(key, _)| path == *key || path.ends_with(&format!(".{key}")));
    if let Some((_, text)) = meant {
        return Verdict::NotYet(format!("`{path}` {text}"));
    }
    if NOT_YET.iter().any(|known| within(known)) {
        return Verdict::NotYet(format!("`{path}` is not acted on yet"));
    }
    let key = shape.last().copied().unwrap_or(path);
    Verdict::Unknown(unknown(path, key, TAKEN.iter().copied()))
}

/// What to say of a key that is none: its path, and the nearest of those that there are.
pub(crate) fn unknown<'a>(path: &str, key: &str, taken: impl Iterator<Item = &'a str>) -> String {
    let guess = taken
        .map(|k| (distance(key, k), k))
        .min()
        .filter(|(d, k)| *d <= 1 + k.len() / 5);
    let hint = guess
        .map(|(_, k)| format!("; did you mean `{k}`?"))
        .unwrap_or_default();
    format!("there is no key `{path}`{hint}")
}

/// Whether the value at this path asks for nothing: an empty array or table, `false`, or no text.
pub(super) fn asks_nothing(table: &DeTable<'_>, path: &str) -> bool {
    match value_at(table, path) {
        Some(DeValue::Table(table)) => table.is_empty(),
        Some(DeValue::Array(items)) => items.is_empty(),
        Some(DeValue::Boolean(switch)) => !switch,
        Some(DeValue::String(text)) => text.is_empty(),
        _ => false,
    }
}

/// Whether there is a table at this path with nothing in it.
pub(super) fn is_empty_table(table: &DeTable<'_>, path: &str) -> bool {
    matches!(value_at(table, path), Some(DeValue::Table(table)) if table.is_empty())
}

fn value_at<'a, 'i>(table: &'a DeTable<'i>, path: &str) -> Option<&'a DeValue<'i>> {
    let mut parts = path.split('.');
    let mut value = table.get(parts.next()?)?.get_ref();
    for part in parts {
        value = match value {
            DeValue::Table(inner) => inner.get(part)?,
            DeValue::Array(items) => items.get(part.parse::<usize>().ok()?)?,
            _ => return None,
        }
        .get_ref();
    }
    Some(value)
}

/// The line on which the key at this path stands; that of its nearest parent where it has none.
pub(super) fn line_of(text: &str, table: &DeTable<'_>, path: &str) -> Option<usize> {
    let mut span: Option<Range<usize>> = None;
    let mut parts = path.split('.');
    let first = parts.next()?;
    let (key, mut value) = table.get_key_value(first)?;
    let _ = span.insert(key.span());
    for part in parts {
        match value.get_ref() {
            DeValue::Table(inner) => match inner.get_key_value(part) {
                Some((key, next)) => {
                    span = Some(key.span());
                    value = next;
                }
                None => break,
            },
            DeValue::Array(items) => match part.parse::<usize>().ok().and_then(|i| items.get(i)) {
                Some(next) => {
                    span = Some(next.span());
                    value = next;
                }
                None => break,
            },
            _ => break,
        }
    }
    span.map(|s| line_at(text, s.start))
}

impl Problem {
    /// A problem at a byte range of the text.
    pub(crate) fn at_span(text: &str, span: Option<Range<usize>>, message: &str) -> Self {
        Self {
            line: span.map(|s| line_at(text, s.start)),
            text: message.trim().to_owned(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.text),
            None => f.write_str(&self.text),
        }
    }
}

fn line_at(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|b| *b == b'\n').count() + 1
}

/// Levenshtein distance, bounded by the lengths of keys.
fn distance(a: &str, b: &str) -> usize {
    if a.len() > 64 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let next = (diagonal + usize::from(x != y))
                .min(row[j] + 1)
                .min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], next);
        }
    }
    row[b.len()]
}
