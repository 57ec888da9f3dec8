use std::path::PathBuf;
use std::time::Duration;

use super::*;
use crate::args::{Command as Which, CpuTemplate, Serve};

/// `tern serve` with these arguments beside this file.
fn serve_with(file: &str, arguments: &[&str]) -> Result<Serve, Refused> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tern.toml");
    std::fs::write(&path, file).unwrap();
    let argv = ["tern", "serve"].iter().chain(arguments);
    match parse_with(argv.map(OsString::from).collect(), &path)?.command {
        Which::Serve(serve) => Ok(*serve),
        other => panic!("{other:?}"),
    }
}

fn problems(file: &str) -> Vec<String> {
    let problems = read(file).unwrap_err();
    problems.iter().map(ToString::to_string).collect()
}

#[test]
fn every_flag_is_a_key_of_the_printed_file_in_its_order() {
    let printed = print();
    let is_key = |line: &&str| line.starts_with('#') && !line.starts_with("# ") && *line != "#";
    let found = printed.lines().filter(is_key);
    let found: Vec<&str> = found
        .filter_map(|line| line[1..].split(" = ").next())
        .collect();
    let root = Args::command();
    let serve = root.find_subcommand("serve").unwrap();
    let flags = serve.get_arguments().map(|a| a.get_id().as_str());
    let flags: Vec<&str> = flags.filter(|id| !NOT_KEYS.contains(id)).collect();
    assert_eq!(found, flags);
    // A key and its flag differ in nothing but the dashes.
    for arg in keys() {
        assert_eq!(
            arg.get_long().unwrap().replace('-', "_"),
            arg.get_id().as_str()
        );
    }
    assert!(
        printed.lines().all(|line| line.chars().count() <= 130),
        "{printed}"
    );
}

#[test]
fn the_printed_file_says_the_defaults() {
    let printed = print();
    let defaults = format!("{:?}", serve_with("", &[]).unwrap());
    assert_eq!(
        format!("{:?}", serve_with(&printed, &[]).unwrap()),
        defaults
    );
    // And with each default taken for a setting. A sample needs an access log.
    let set = printed.lines().filter_map(|line| {
        let key = line.strip_prefix('#').filter(|l| !l.starts_with(' '))?;
        (!key.contains('<') && !key.starts_with("access_log_sample")).then_some(key)
    });
    let set: Vec<&str> = set.collect();
    assert!(set.len() > 20, "{set:?}");
    assert_eq!(
        format!("{:?}", serve_with(&set.join("\n"), &[]).unwrap()),
        defaults
    );
    assert!(set.contains(&"data_dir = \"/var/lib/tern\""), "{set:?}");
    assert!(set.contains(&"autostop_after = \"5m\""), "{set:?}");
    assert!(set.contains(&"cpu_overcommit = 4"), "{set:?}");
    assert!(set.contains(&"http = [\"[::]:80\"]"), "{set:?}");
}

#[test]
fn every_kind_of_value_is_taken() {
    let file = "
        http = [\"192.0.2.1:80\", \"[2001:db8::1]:80\"]
        https = \"192.0.2.1:443\"
        image_budget = \"512MiB\"
        machine_disk_bandwidth = 1048576
        wake_timeout = \"30s\"
        memory_overcommit = 1.5
        max_client_connections = 7
        no_http3 = true
        log_json = false
        cpu_template = \"x86-64-v2\"
        machine_allow = [\"10.1.0.0/16\"]
        service_ports = \"none\"
        etcd = [\"https://a:2379\", \"https://b:2379\"]
    ";
    let serve = serve_with(file, &[]).unwrap();
    assert_eq!(serve.http.len(), 2);
    assert_eq!(serve.https, ["192.0.2.1:443".parse().unwrap()]);
    assert_eq!(serve.image_budget, Some(512 << 20));
    assert_eq!(serve.machine_disk_bandwidth, Some(1 << 20));
    assert_eq!(serve.wake_timeout, Duration::from_secs(30));
    assert!((serve.memory_overcommit - 1.5).abs() < f64::EPSILON);
    assert_eq!(
        (serve.max_client_connections, serve.no_http3, serve.log_json),
        (7, true, false)
    );
    assert_eq!(serve.cpu_template, CpuTemplate::X86_64V2);
    assert_eq!(serve.machine_allow.len(), 1);
    assert_eq!(serve.etcd.members, ["https://a:2379", "https://b:2379"]);
}

#[test]
fn every_problem_is_told_with_its_line_and_what_to_write() {
    let file = "\
max_client_connections = 1
regoin = \"fra\"
autostop-after = \"1m\"
wake_timeout = \"30 parsecs\"
image_budget = \"20GB\"
no_http3 = \"yes\"
region = [\"a\", \"b\"]
cpu_template = \"z80\"
domain = \"\"
print_config = true
api = \"localhost\"

[etcd]
members = 3
";
    let told = problems(file);
    let starts = [
        "line 2: there is no key `regoin`; did you mean `region`?",
        "line 3: there is no key `autostop-after`; did you mean `autostop_after`?",
        "line 4: `wake_timeout` cannot be \"30 parsecs\": ",
        "line 5: `image_budget` cannot be \"20GB\": a size is a number and B, KiB",
        "line 6: `no_http3` is either true or false",
        "line 7: `region` has one value, not a list",
        "line 8: `cpu_template` cannot be \"z80\": it is one of host, x86-64-v2, x86-64-v3",
        "line 9: `domain` is empty; leave the key out",
        "line 10: there is no key `print_config`",
        "line 11: `api` cannot be \"localhost\": ",
        "line 13: `etcd` is not a table",
    ];
    assert_eq!(told.len(), starts.len(), "{told:#?}");
    for (told, start) in told.iter().zip(starts) {
        assert!(told.starts_with(start), "{told}\n{start}");
    }
    assert!(problems("region = \"a\"\nregion = \"b\"\n")[0].starts_with("line 2"));
    assert!(problems("\nregion = \n")[0].starts_with("line 2"));
    // And by the whole command, with the file's name.
    match serve_with("zzz = 1", &[]).unwrap_err() {
        Refused::File(error) => {
            let told = error.to_string();
            assert!(
                told.contains("tern.toml is not right:\n  line 1: there is no key `zzz`"),
                "{told}"
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_flag_goes_before_the_file() {
    let file =
        "region = \"file\"\nhttp = [\"127.0.0.1:81\"]\nmax_client_connections = 2\nno_http3 = true";
    let serve = serve_with(file, &["--region", "flag", "--http", "127.0.0.1:82"]).unwrap();
    assert_eq!(serve.region.as_deref(), Some("flag"));
    assert_eq!(serve.max_client_connections, 2);
    // Not added to the file's list: instead of it.
    assert_eq!(serve.http, ["127.0.0.1:82".parse().unwrap()]);
    assert!(serve.no_http3);
    let serve = serve_with(file, &["--"]).unwrap();
    assert_eq!(serve.region.as_deref(), Some("file"));
}

#[test]
fn the_environment_goes_before_the_file_and_a_flag_before_both() {
    const OWN: &str = "config::tests::the_environment_goes_before_the_file_and_a_flag_before_both";
    if std::env::var_os("TERN_REGION").is_none() {
        // The environment of a process of its own.
        let own = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", OWN])
            .env("TERN_REGION", "environment")
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&own.stdout);
        assert!(own.status.success() && told.contains("1 passed"), "{told}");
        return;
    }
    let file = "region = \"file\"";
    let serve = serve_with(file, &[]).unwrap();
    assert_eq!(serve.region.as_deref(), Some("environment"));
    let flag = serve_with(file, &["--region", "flag"]).unwrap();
    assert_eq!(flag.region.as_deref(), Some("flag"));
}

#[test]
fn flag_and_file_are_judged_together() {
    let told = |file, arguments: &[&str]| match serve_with(file, arguments).unwrap_err() {
        Refused::Flags(error, note) => (error.kind(), note.unwrap_or_default()),
        other => panic!("{other:?}"),
    };
    let (kind, note) = told(
        "# 1\nmachine_vhost_net = true",
        &["--machine-net-bandwidth", "1MiB"],
    );
    assert_eq!(kind, ErrorKind::ArgumentConflict);
    assert!(
        note.ends_with("tern.toml has machine_vhost_net (line 2)"),
        "{note}"
    );
    let (kind, _) = told("etcd_user = \"u\"", &[]);
    assert_eq!(kind, ErrorKind::MissingRequiredArgument);
    // What a flag requires may be in the file.
    let serve = serve_with("access_log = \"stdout\"", &["--access-log-sample", "0.5"]).unwrap();
    assert_eq!(serve.access_log.as_deref(), Some("stdout"));
}

#[test]
fn a_file_that_is_named_must_be_there_and_the_default_need_not() {
    let nowhere = Path::new("/nowhere/tern.toml");
    let argv = |extra: &[&str]| -> Vec<OsString> {
        let all = ["tern", "serve"].iter().chain(extra);
        all.map(OsString::from).collect()
    };
    assert!(parse_with(argv(&[]), nowhere).is_ok());
    let named = parse_with(argv(&["--config", "/nowhere/tern.toml"]), nowhere);
    match named.unwrap_err() {
        Refused::File(LoadError::Io { path, .. }) => assert_eq!(path, nowhere),
        other => panic!("{other:?}"),
    }
    // The way out of a wrong file.
    assert!(
        serve_with("zzz = 1", &["--print-config"])
            .unwrap()
            .print_config
    );
    // What is wrong with the flags is told as ever.
    match serve_with("", &["--no-such-flag"]).unwrap_err() {
        Refused::Flags(error, None) => assert_eq!(error.kind(), ErrorKind::UnknownArgument),
        other => panic!("{other:?}"),
    }
}

#[test]
fn commands_about_the_same_server_read_the_same_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tern.toml");
    std::fs::write(
        &path,
        "data_dir = \"/srv/tern\"\nmax_client_connections = 3\n",
    )
    .unwrap();
    let said = data_dir_of(&load(&path).unwrap());
    assert_eq!(said.as_deref(), Some("/srv/tern"));
    let parse = |line: &str| {
        let argv = line.split(' ').map(OsString::from).collect();
        parse_with(argv, &path).unwrap().command
    };
    let Which::Doctor(doctor) = parse("tern doctor --json") else {
        panic!("not doctor");
    };
    assert_eq!(doctor.at.data_dir, PathBuf::from("/srv/tern"));
    let Which::Host(crate::args::Host::Quarantine(crate::args::Quarantine::List { at, .. })) =
        parse("tern host quarantine list")
    else {
        panic!("not the list");
    };
    assert_eq!(at.data_dir, PathBuf::from("/srv/tern"));
    // A fly.toml's `--config` is another.
    assert!(matches!(
        parse("tern status --config x.toml"),
        Which::Status(_)
    ));
}
