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

/// As flyctl wrote it in 2021.
const LEGACY: &str = r#"
app = "old"
kill_signal = "SIGINT"
kill_timeout = 5
processes = []

[[env]]
A = "1"

[experimental]
allowed_public_ports = []
auto_rollback = true

[[services]]
http_checks = []
internal_port = "8080"
processes = ["app"]
protocol = "tcp"
script_checks = []
concurrency = "20,25"

[[services.ports]]
force_https = true
handlers = ["http"]
port = "80"

[[services.ports]]
handlers = ["tls", "http"]
port = 443

[[services.tcp_checks]]
grace_period = "1s"
interval = "15s"
restart_limit = 6
timeout = "2s"
"#;

#[test]
fn a_file_of_2021_is_read() {
    let (config, warnings) = AppConfig::parse(LEGACY).unwrap();
    let texts: Vec<String> = warnings.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "line 12: `experimental.auto_rollback` is not acted on yet",
            "line 34: `services.0.tcp_checks.0.restart_limit` is not acted on yet"
        ]
    );
    assert_eq!(
        (config.groups().as_slice(), &*config.env["A"]),
        (&["app".to_owned()][..], "1")
    );
    let service = &config.services[0];
    assert_eq!(
        (service.internal_port, service.ports[0].port),
        (8080, Some(80))
    );
    assert_eq!(service.concurrency.hard_limit, Some(25));
    let named = "[[processes]]\nname = \"web\"\ncommand = \"serve\"\n";
    let (config, _) = AppConfig::parse(named).unwrap();
    assert_eq!(config.processes["web"], "serve");
}

#[test]
fn quirks_of_older_files_are_read() {
    let text = "[mount]\nsource = \"d\"\ndestination = \"/d\"\nsnapshot_retention = 9\n\
                [[services]]\n\
                [checks.alive]\ntype = \"tcp\"\ngrace_period = \"\"\n\
                [checks.alive.headers]\na = 1\nb = true\n\
                [[vm]]\nmemory = 512\n[[compute]]\nmemory = 1024\nprocesses = [\"app\"]\n\
                [experimental]\nkill_timeout = 9\n";
    let (config, warnings) = AppConfig::parse(text).unwrap();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    let (_, one) = AppConfig::parse("[vm]\nkernel_args = [\"a\"]\n").unwrap();
    assert_eq!(one.len(), 1, "{one:?}");
    assert!(
        warnings[0].text.contains("mount.snapshot_retention"),
        "{warnings:?}"
    );
    let machine = machine::machine_config(&config, "app", "img", Path::new(".")).unwrap();
    assert!(machine.services.is_empty());
    let check = &machine.checks["alive"];
    assert_eq!((check.port, check.grace_period), (None, None));
    assert_eq!(
        check.sent().collect::<Vec<_>>(),
        [("a", "1"), ("b", "true")]
    );
    assert_eq!(machine.guest.memory_mb, 1024);
    assert_eq!(
        machine.stop_config.timeout.unwrap().0,
        Duration::from_secs(9)
    );
}

fn machine_of(text: &str, group: &str) -> tern_catalog::MachineConfig {
    let (config, _) = AppConfig::parse(text).unwrap();
    machine::machine_config(&config, group, "img", Path::new(".")).unwrap()
}

#[test]
fn what_the_image_runs_can_be_replaced() {
    let of = |text: &str| machine_of(text, "app").init;
    let init = of("[experimental]\ncmd = [\"serve\", \"-v\"]\nentrypoint = \"sh -c\"\n");
    assert_eq!(init.cmd.unwrap(), ["serve", "-v"]);
    assert_eq!(init.entrypoint.unwrap(), ["sh", "-c"]);
    assert_eq!(
        of("[experimental]\nexec = \"a 'b c'\"\n").exec.unwrap(),
        ["a", "b c"]
    );
    // What a process group runs goes before it.
    let both = "[experimental]\ncmd = [\"a\"]\n[processes]\napp = \"b\"\n";
    assert_eq!(of(both).cmd.unwrap(), ["b"]);
    assert!(errors("[experimental]\ncmd = \"a 'b\"\n")[0].contains("not closed"));
}

#[test]
fn a_checks_headers_are_sent() {
    let text = "[[http_service.checks]]\npath = \"/up\"\n\
                [http_service.checks.headers]\nX-Forwarded-Proto = \"https\"\nAccept = [\"a\", \"b\"]\n";
    let machine = machine_of(text, "app");
    let sent: Vec<_> = machine.services[0].checks[0].sent().collect();
    assert_eq!(
        sent,
        [
            ("Accept", "a"),
            ("Accept", "b"),
            ("X-Forwarded-Proto", "https")
        ]
    );
    let old = "[[services]]\n[[services.http_checks]]\n\
               [[services.http_checks.headers]]\nname = \"A\"\nvalue = \"1\"\n";
    let machine = machine_of(old, "app");
    assert_eq!(
        machine.services[0].checks[0].sent().collect::<Vec<_>>(),
        [("A", "1")]
    );
}

#[test]
fn checks_of_the_machine_are_for_their_groups() {
    let text = "[processes]\nweb = \"w\"\nworker = \"x\"\n\
                [checks.alive]\ntype = \"http\"\nport = 9000\npath = \"/up\"\nprocesses = [\"worker\"]\n";
    assert!(machine_of(text, "web").checks.is_empty());
    let check = &machine_of(text, "worker").checks["alive"];
    assert_eq!(
        (check.port, check.path.as_deref()),
        (Some(9000), Some("/up"))
    );
    let typo = errors("[checks.a]\ntype = \"tcp\"\nport = 1\nintervall = 3\n");
    assert!(typo[0].contains("did you mean `interval`"), "{typo:?}");
}

#[test]
fn the_most_specific_size_wins_in_any_order() {
    let vms = [
        "[[vm]]\nmemory = \"200mb\"\n",
        "[[vm]]\nmemory = \"300mb\"\nprocesses = [\"worker\"]\n",
    ];
    for order in [[0, 1], [1, 0]] {
        let groups = "[processes]\nweb = \"w\"\nworker = \"x\"\n";
        let text = format!("{groups}{}{}", vms[order[0]], vms[order[1]]);
        assert_eq!(machine_of(&text, "worker").guest.memory_mb, 300);
        assert_eq!(machine_of(&text, "web").guest.memory_mb, 200);
    }
}

#[test]
fn keys_that_no_schema_has_say_what_is_meant() {
    let text = "[http_service]\nmin_machines_running = 1\nmax_machines_running = 3\n";
    let (_, warnings) = AppConfig::parse(text).unwrap();
    assert_eq!(warnings[0].line, Some(3));
    assert!(
        warnings[0]
            .text
            .contains("is not acted on: no more Machines run"),
        "{warnings:?}"
    );
}

#[test]
fn what_the_edge_does_not_serve_is_refused_with_its_line() {
    let port = |port: &str| {
        let text = format!("[[services]]\ninternal_port = 8080\n[[services.ports]]\n{port}\n");
        AppConfig::parse(&text).err().unwrap_or_default()
    };
    let one = |text: &str| {
        let found = port(text);
        assert_eq!(found.len(), 1, "{text}: {found:?}");
        found[0].to_string()
    };
    for served in [
        "port = 80\nhandlers = [\"http\"]",
        "port = 4222\nhandlers = [\"tls\"]",
        "port = 4222\nhandlers = [\"tcp\"]",
        "port = 443\nhandlers = [\"tls\"]\ntls_options = { alpn = [\"imap\"], versions = [\"TLSv1.3\"] }",
        "port = \"5432\"\nhandlers = [\"pg_tls\", \"proxy_proto\"]\nproxy_proto_options = { version = \"v2\" }",
        "start_port = 2000\nend_port = 2010",
    ] {
        assert!(port(served).is_empty(), "{served}: {:?}", port(served));
    }
    let https = "port = 443\nhandlers = [\"tls\", \"http\"]\n";
    assert!(port(&format!("{https}http_options = {{ idle_timeout = 10 }}")).is_empty());
    assert!(
        one(&format!(
            "{https}tls_options = {{ versions = [\"TLSv1.0\"] }}"
        ))
        .starts_with("line 6")
    );
    assert!(one("port = 443").starts_with("line 4: all apps share port 443"));
    assert!(
        one("port = 81\nhandlers = [\"http\", \"proxy_proto\"]")
            .starts_with("line 5: `proxy_proto`")
    );
    assert!(one("start_port = 100\nend_port = 20").starts_with("line 4: a range has"));
    assert!(one("handlers = [\"http\"]").contains("`port` is missing"));
    let http = errors("[http_service]\n[http_service.tls_options]\nalpn = [\"smtp\"]\n");
    assert!(
        http[0].starts_with("line 3:") && http[0].contains("h2"),
        "{http:?}"
    );
    let zero = errors("[http_service]\ninternal_port = 0\n");
    assert!(
        zero[0].starts_with("line 2") && zero[0].contains("no port"),
        "{zero:?}"
    );
    let twice = errors(&format!(
        "[http_service]\n[[services]]\n[[services.ports]]\n{https}"
    ));
    assert!(
        twice[0].starts_with("line 4:") && twice[0].contains("already"),
        "{twice:?}"
    );
    // Each group's Machines have their own.
    let apart = format!(
        "[processes]\na = \"a\"\nb = \"b\"\n[http_service]\nprocesses = [\"a\"]\n\
         [[services]]\nprocesses = [\"b\"]\n[[services.ports]]\n{https}"
    );
    assert!(AppConfig::parse(&apart).is_ok());
}

#[test]
fn a_port_that_the_image_does_not_expose_is_told() {
    let (config, _) = AppConfig::parse("[http_service]\ninternal_port = 8080\n").unwrap();
    let told = config.unexposed(&[3000].into());
    assert_eq!(
        told,
        ["the image exposes 3000, fly.toml says internal_port = 8080"]
    );
    assert!(config.unexposed(&[3000, 8080].into()).is_empty());
    assert!(config.unexposed(&[].into()).is_empty());
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

#[test]
fn a_file_may_be_a_secret() {
    let text = "[[files]]\nguest_path = \"/key\"\nsecret_name = \"TLS_KEY\"\n";
    let (config, warnings) = AppConfig::parse(text).unwrap();
    assert_eq!(warnings, []);
    let machine = machine::machine_config(&config, "app", "img", Path::new(".")).unwrap();
    let name = machine.files[0].secret_name.as_ref().unwrap();
    assert_eq!(name.as_str(), "TLS_KEY");
    assert_eq!(machine.files[0].raw_value, "");
    let both = format!("{text}raw_value = \"aGk=\"\n");
    let refused = format!("{:?}", AppConfig::parse(&both).unwrap_err());
    assert!(refused.contains("exactly one of"), "{refused}");
}
