use std::path::Path;
use std::time::Duration;

use tern_catalog::{Autostop, Handler};

use super::*;

const SAMPLE: &str = r#"
app = "hello"
primary_region = "ams"
kill_timeout = 30

[build]
dockerfile = "Dockerfile"

[env]
PORT = 8080
DEBUG = true

[http_service]
internal_port = 8080
force_https = true
auto_stop_machines = "suspend"
auto_start_machines = true

[http_service.concurrency]
type = "requests"
hard_limit = 250

[[http_service.checks]]
interval = "10s"
timeout = 2000
path = "/"

[[vm]]
memory = "512mb"
cpus = 2
"#;

fn errors(text: &str) -> Vec<String> {
    AppConfig::parse(text)
        .unwrap_err()
        .iter()
        .map(ToString::to_string)
        .collect()
}

#[test]
fn a_sample_becomes_a_machine() {
    let (config, warnings) = AppConfig::parse(SAMPLE).unwrap();
    assert_eq!(warnings, []);
    assert_eq!(config.kill_timeout, Some(Duration::from_secs(30)));
    let machine = machine::machine_config(&config, "app", "img", Path::new(".")).unwrap();
    assert_eq!((machine.guest.cpus, machine.guest.memory_mb), (2, 512));
    assert_eq!(
        (machine.env["PORT"].as_str(), machine.env["DEBUG"].as_str()),
        ("8080", "true")
    );
    assert_eq!(machine.env["PRIMARY_REGION"], "ams");
    let service = &machine.services[0];
    assert_eq!(service.autostop, Autostop::Suspend);
    assert_eq!(service.concurrency.hard_limit, Some(250));
    assert!(service.ports[0].force_https);
    assert_eq!(service.ports[1].handlers, [Handler::Tls, Handler::Http]);
    assert_eq!(service.checks[0].timeout.unwrap().0, Duration::from_secs(2));
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_a_guess() {
    let text = "app = \"a\"\n\n[http_service]\ninternal_prot = 80\n";
    assert_eq!(
        errors(text),
        ["line 4: there is no key `http_service.internal_prot`; did you mean `internal_port`?"]
    );
}

#[test]
fn every_unknown_key_of_the_sample_would_be_found() {
    // A wrong key planted in each table of the sample is reported, with the line it was planted on.
    let headers = SAMPLE
        .lines()
        .enumerate()
        .filter(|(_, l)| l.starts_with('['))
        .map(|(n, _)| n);
    for header in headers.collect::<Vec<_>>() {
        let mut lines: Vec<&str> = SAMPLE.lines().collect();
        lines.insert(header + 1, "zzz_wrong = [1]");
        let found = errors(&lines.join("\n"));
        let env = SAMPLE.lines().nth(header) == Some("[env]");
        let expected = format!("line {}:", header + 2);
        assert!(found.len() == 1, "{found:?}");
        assert!(
            env || (found[0].starts_with(&expected) && found[0].contains("zzz_wrong")),
            "{found:?}"
        );
    }
}

#[test]
fn a_key_of_the_schema_that_is_not_acted_on_is_a_warning() {
    let (_, warnings) = AppConfig::parse("swap_size_mb = 512\n[metrics]\nport = 9\n").unwrap();
    let texts: Vec<String> = warnings.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "line 2: `metrics` is not acted on yet",
            "line 1: `swap_size_mb` is not acted on yet"
        ]
    );
}

#[test]
fn a_group_has_its_volume() {
    let text = "[processes]\nweb = \"w\"\ndb = \"d\"\n\
                [[mounts]]\nsource = \"data\"\ndestination = \"/data\"\ninitial_size = \"20gb\"\n\
                processes = [\"db\"]\nsnapshot_retention = 5\n";
    let (config, warnings) = AppConfig::parse(text).unwrap();
    let mount = config.mount_of("db").unwrap();
    assert_eq!(
        (mount.source.as_str(), mount.initial_size),
        ("data", Some(20))
    );
    assert!(config.mount_of("web").is_none());
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    let (config, _) =
        AppConfig::parse("[mounts]\nsource = \"d\"\ndestination = \"/d\"\ninitial_size = 3\n")
            .unwrap();
    assert_eq!(config.mount_of("app").unwrap().initial_size, Some(3));
}

#[test]
fn a_volume_that_cannot_be_mounted_is_an_error_with_its_line() {
    let root = errors("[mounts]\nsource = \"data\"\ndestination = \"/\"\n");
    assert!(
        root[0].starts_with("line ") && root[0].contains("absolute"),
        "{root:?}"
    );
    let one = "[[mounts]]\nsource = \"data\"\ndestination = \"/a\"\n";
    let two = errors(&format!("{one}{one}"));
    assert!(
        two[0].starts_with("line 4:") && two[0].contains("one at most"),
        "{two:?}"
    );
    let name = errors("[mounts]\nsource = \"My-Data\"\ndestination = \"/a\"\n");
    assert!(name[0].contains("volume name"), "{name:?}");
    let size = errors("[mounts]\nsource = \"d\"\ndestination = \"/a\"\ninitial_size = \"big\"\n");
    assert!(size[0].contains("10gb"), "{size:?}");
}

#[test]
fn malformed_files_say_where() {
    assert!(errors("app = \"a\"\n[http_service\n")[0].starts_with("line 2"));
    assert!(errors("[http_service]\ninternal_port = \"x\"\n")[0].starts_with("line 2"));
    assert!(errors("kill_timeout = \"soon\"\n")[0].contains("not a duration"));
    assert!(errors("[[vm]]\nmemory = \"lots\"\n")[0].contains("not a memory size"));
    assert!(errors("[http_service]\nauto_stop_machines = \"nap\"\n")[0].contains("suspend"));
    assert!(errors("[env]\nFLY_X = \"1\"\n")[0].contains("platform's own"));
    assert!(errors("[http_service]\nprocesses = [\"web\"]\n")[0].contains("no process group"));
}

#[test]
fn a_service_without_ports_is_private_and_says_so() {
    let text = "app = \"a\"\n\n[[services]]\n  internal_port = 6379\n";
    let (config, warnings) = AppConfig::parse(text).unwrap();
    assert_eq!(config.services[0].internal_port, 6379);
    assert_eq!((warnings.len(), warnings[0].line), (1, Some(3)));
    assert!(warnings[0].text.contains("private network"), "{warnings:?}");
}

#[test]
fn garbage_is_an_error_and_never_a_panic() {
    for garbage in [
        "\0",
        "= = =",
        "[[[[",
        "a.b.c.d.e = {",
        "\u{feff}app",
        "app = '\u{202e}'\n[x",
    ] {
        let _ = AppConfig::parse(garbage);
    }
    let deep = "[".repeat(100_000);
    assert!(AppConfig::parse(&format!("a = {deep}")).is_err());
}
