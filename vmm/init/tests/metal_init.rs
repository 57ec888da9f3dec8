//! Init in a real Machine: from boot to reset.

mod support;

use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use support::{Machine, idle, run, script};
use tern_guest::config::{FileConfig, HostsEntry, InterfaceConfig};
use tern_guest::message::{Stream, TerminalSize};
use tern_guest::{Event, ExecRequest, ExitStatus, Reply, Request, RunConfig, run_archive};

fn text(lines: &[(Stream, String)]) -> String {
    lines.iter().map(|(_, line)| format!("{line}\n")).collect()
}

#[test]
fn metal_an_app_runs_as_configured_and_its_end_resets_the_machine() {
    let mut config = script(
        "id; pwd; echo $GREETING $HOME; hostname; ulimit -n; echo to-stderr >&2; \
         cat /etc/resolv.conf /secret; stat -c %a /secret; cat /etc/hosts; test -d /run/lock && exit 7",
    );
    config.process.user = "app".into();
    config.process.working_dir = "/srv/new".into();
    config.process.env = vec![("GREETING".into(), "hello there".into())];
    config.dns.nameservers = vec!["fdaa::3".parse().unwrap()];
    config.hosts = vec![HostsEntry {
        ip: "::2".parse().unwrap(),
        names: vec!["other".into()],
    }];
    config.files = vec![FileConfig {
        guest_path: "/secret".into(),
        content: b"s3cret\n".into(),
        mode: 0o644,
    }];
    let mut machine = Machine::boot(&config);
    let (lines, status) = machine.attach(0).until_end();
    let said = text(&lines);
    assert_eq!(
        status,
        ExitStatus {
            code: 7,
            ..Default::default()
        },
        "{said}"
    );
    for expected in [
        "uid=1000(app) gid=1001(app) groups=50(extra)\n",
        "\n/srv/new\nhello there /home/app\nguest\n10240\n",
        "nameserver fdaa::3\n",
        "s3cret\n644\n",
        "\n127.0.0.1 localhost\n",
        "\n127.0.1.1 guest e784079b449483\n::2 other\n",
    ] {
        assert!(said.contains(expected), "{expected:?} is not in:\n{said}");
    }
    assert!(
        lines.contains(&(Stream::Stderr, "to-stderr".into())),
        "{lines:?}"
    );
    assert_eq!(machine.wait_end(), "guest_reset");
    assert!(
        machine
            .serial()
            .contains("tern-init: the app has ended with code 7")
    );

    let disk = machine.path("disk.ext4");
    run(Command::new("e2fsck").args(["-f", "-n"]).arg(&disk));
    let features = run(Command::new("dumpe2fs").arg("-h").arg(&disk));
    assert!(
        !features.contains("needs_recovery"),
        "the disk was left unclean"
    );
}

#[test]
fn metal_what_the_guest_deletes_the_host_has_back() {
    let machine = Machine::boot(&idle());
    machine.wait_running();
    let disk = machine.path("disk.ext4");
    let mib = || std::fs::metadata(&disk).unwrap().blocks() / 2048;
    let before = mib();
    machine.sh("head -c 33554432 /dev/urandom >/big && sync");
    let full = mib();
    assert!(full >= before + 32, "{before} MiB, then {full}");
    // The journal's commit, which `sync` asks for, sends the discards; it need not wait for them.
    machine.sh("rm /big && sync");
    let deadline = Instant::now() + Duration::from_secs(60);
    while mib() > full - 30 {
        assert!(
            Instant::now() < deadline,
            "{before} MiB, {full} MiB full, and still {} MiB",
            mib()
        );
        machine.sh("sync");
    }
}

#[test]
fn metal_an_image_of_a_single_file_is_enough() {
    let mut config = script("mount; ls -ld /tmp /etc/hosts /dev/fd /dev/shm");
    config.process.entrypoint = vec!["/busybox".into(), "sh".into(), "-c".into()];
    let mut machine = Machine::of_one_file();
    machine.start(&run_archive(&config).unwrap());
    let (lines, status) = machine.attach(0).until_end();
    let said = text(&lines);
    assert_eq!(status.code, 0, "{said}");
    for place in [
        "/dev/pts",
        "/dev/shm",
        "/dev/mqueue",
        "/proc",
        "/sys",
        "/sys/fs/cgroup",
        "/run",
    ] {
        assert!(
            said.contains(&format!(" on {place} type ")),
            "{place} is not in:\n{said}"
        );
    }
    assert!(
        said.contains("drwxrwxrwt") && said.contains("/dev/fd -> /proc/self/fd"),
        "{said}"
    );
}

#[test]
fn metal_what_cannot_start_is_an_end_with_a_reason() {
    let mut cases = Vec::new();
    let mut case = |code: i32, reason: &'static str, change: &dyn Fn(&mut RunConfig)| {
        let mut config = script("true");
        change(&mut config);
        cases.push((code, reason, run_archive(&config).unwrap()));
    };
    case(
        125,
        "user \"nobody\" is not in the image's /etc/passwd",
        &|c| {
            c.process.user = "nobody".into();
        },
    );
    case(
        127,
        "cannot start the app: serve: not found in PATH=",
        &|c| {
            c.process.exec = vec!["serve".into()];
        },
    );
    case(
        125,
        "the Machine's own disk: mount /dev/vda on /disk as ext4",
        &|c| {
            c.root.disk.as_mut().unwrap().device = "/dev/vda".into();
        },
    );
    let mut garbage = run_archive(&script("true")).unwrap();
    let at = garbage.windows(7).position(|w| w == b"\"files\"").unwrap();
    garbage[at + 1] = b'F';
    cases.push((125, "unknown field `Files`", garbage));

    let mut machine = Machine::new();
    for (code, reason, archive) in cases {
        machine.start(&archive);
        let (lines, status) = machine.attach(0).until_end();
        assert_eq!(status.code, code, "{lines:?}");
        let (stream, line) = lines.last().unwrap();
        assert_eq!(*stream, Stream::Init);
        assert!(line.contains(reason), "{reason:?} is not in {line:?}");
        assert_eq!(machine.wait_end(), "guest_reset");
        assert!(machine.serial().contains(reason), "{}", machine.serial());
    }
}

#[test]
fn metal_commands_run_beside_the_app() {
    let machine = Machine::boot(&idle());
    machine.wait_running();
    assert_eq!(machine.sh("echo $((6 * 7)); cat"), "42\n");
    let mut request = ExecRequest {
        cmd: ["/bin/sh", "-c", "tty && stty size && id -u; exit 3"]
            .map(String::from)
            .to_vec(),
        tty: Some(TerminalSize { rows: 33, cols: 44 }),
        user: Some("app".into()),
        ..Default::default()
    };
    let (output, status) = machine.exec(request.clone());
    assert_eq!(output, "/dev/pts/0\r\n33 44\r\n1000\r\n");
    assert_eq!(status.code, 3);
    for (program, code, reason) in [
        ("nonsense", 127, "nonsense: not found in PATH="),
        ("no-loader", 127, "interpreter in its `#!` line is missing"),
        ("/etc/passwd", 126, "/etc/passwd: is not an executable file"),
    ] {
        request.cmd = vec![program.into()];
        let (output, status) = machine.exec(request.clone());
        assert_eq!(status.code, code, "{output}");
        assert!(output.contains(reason), "{output}");
    }

    // One that reads nothing dies with its connection, whose end vsock tells by RDHUP alone.
    let mut conn = machine.connect();
    conn.send(&Request::Exec(ExecRequest {
        cmd: ["/bin/sleep", "1234"].map(String::from).to_vec(),
        stdin: true,
        ..Default::default()
    }));
    conn.fill_input();
    let there = "ps -o args | grep -q '[s]leep 1234'";
    machine.sh(there);
    drop(conn);
    machine.sh(&format!("while {there}; do sleep 0.1; done"));

    // Orphans become children of init, and go even while a command is running.
    let pids = machine.sh("for i in 1 2 3 4 5 6 7 8; do sh -c 'sleep 0.1 & echo $!'; done");
    assert_eq!(pids.lines().count(), 8);
    let left = machine.sh(
        "while :; do ps -o stat,comm | grep -E '^(Z|.* sleep$)' >/tmp/left; \
         test $(wc -l < /tmp/left) -le 1 && break; done; cat /tmp/left",
    );
    assert!(!left.contains('Z'), "{left}");

    let status = machine.status();
    assert!(
        status.memory_available_kib > 0 && status.uptime_ms > 0,
        "{status:?}"
    );
    assert_eq!(status.next_seq, 1, "one line: ready");
}

#[test]
fn metal_stopping_asks_first_and_insists_later() {
    let mut machine = Machine::boot(&idle());
    let mut host = machine.attach(0);
    host.wait_line("ready");
    assert_eq!(
        machine.ask(&Request::Stop {
            signo: None,
            timeout_ms: None
        }),
        Reply::Ok
    );
    assert_eq!(host.until_end().1, ExitStatus::default());
    assert_eq!(machine.wait_end(), "guest_reset");

    let stubborn = script("trap 'echo no' INT; echo ready; while :; do sleep 1000 & wait; done");
    machine.start(&run_archive(&stubborn).unwrap());
    let mut host = machine.attach(0);
    host.wait_line("ready");
    let stop = |timeout_ms| Request::Stop {
        signo: None,
        timeout_ms: Some(timeout_ms),
    };
    assert_eq!(machine.ask(&stop(600_000)), Reply::Ok);
    host.wait_line("no");
    assert_eq!(machine.ask(&stop(0)), Reply::Ok);
    let (_, status) = host.until_end();
    assert_eq!(
        status,
        ExitStatus {
            code: 137,
            signal: Some(9),
            oom_killed: false
        }
    );
    assert_eq!(machine.wait_end(), "guest_reset");
}

#[test]
fn metal_the_disk_keeps_what_was_written() {
    let count = "echo x >> /count; cat /count | wc -l; grep -c localhost /etc/hosts";
    let mut machine = Machine::new();
    for boot in 1..=2 {
        machine.start(&run_archive(&script(count)).unwrap());
        let (lines, _) = machine.attach(0).until_end();
        assert_eq!(text(&lines), format!("{boot}\n2\n"));
        assert_eq!(machine.wait_end(), "guest_reset");
    }
}

#[test]
fn metal_running_out_of_memory_is_told() {
    let machine = Machine::boot(&script("echo eating; exec tail /dev/zero"));
    let (lines, status) = machine.attach(0).until_end();
    assert_eq!(
        status,
        ExitStatus {
            code: 137,
            signal: Some(9),
            oom_killed: true
        },
        "{lines:?}"
    );
}

#[test]
fn metal_a_flood_of_output_costs_the_oldest_lines_only() {
    let mut machine = Machine::boot(&script("yes 0123456789 | head -n 300000; echo the last"));
    let mut host = machine.attach(0);
    let (mut last, mut total, mut gap) = (None, 0u64, 0);
    loop {
        match host.next().expect("the end") {
            Event::Log { seq, .. } => {
                let expected = last.map_or(0, |seq: u64| seq + 1);
                assert!(seq >= expected);
                gap += seq - expected;
                (last, total) = (Some(seq), total + 1);
            }
            Event::Started { .. } => {}
            Event::Exited(status) => {
                assert_eq!(status.code, 0);
                break;
            }
        }
    }
    assert_eq!(last, Some(300_000), "the last line always comes");
    assert_eq!(total + gap, 300_001);
    drop(host);
    assert_eq!(machine.wait_end(), "guest_reset");
}

#[test]
fn metal_the_network_is_up_before_the_app() {
    let mut config = script(
        "ping -c 1 -w 20 172.19.7.1 && ping6 -c 1 -w 20 fdaa:0:0:1::1 && \
         grep 'fdaa:0:5:1:7::2 guest e784079b449483 fly-local-6pn' /etc/hosts",
    );
    config.interfaces = vec![InterfaceConfig {
        addresses: vec![
            "172.19.7.2/30".parse().unwrap(),
            "fdaa:0:5:1:7::2/112".parse().unwrap(),
        ],
        gateway_v4: Some("172.19.7.1".parse().unwrap()),
        gateway_v6: Some("fe80::1".parse().unwrap()),
        ..Default::default()
    }];
    let mut machine = Machine::new().with_tap("tninit0");
    for address in ["172.19.7.1/30", "fe80::1/64", "fdaa:0:0:1::1/128"] {
        run(Command::new("ip").args(["addr", "add", address, "dev", "tninit0", "nodad"]));
    }
    run(Command::new("ip").args(["link", "set", "tninit0", "up"]));
    run(Command::new("ip").args(["route", "add", "fdaa:0:5:1:7::/112", "dev", "tninit0"]));
    machine.start(&run_archive(&config).unwrap());
    let (lines, status) = machine.attach(0).until_end();
    assert_eq!(status.code, 0, "{}", text(&lines));
}

#[test]
fn metal_after_a_sleep_the_guest_goes_on_with_a_right_clock() {
    let mut machine = Machine::boot(&idle());
    let mut host = machine.attach(0);
    let ready = host.wait_line("ready");
    let before = machine.status();
    machine.suspend_and_resume();
    assert_eq!(host.next(), None, "a restore ends all connections");

    let in_a_year = Duration::from_secs(365 * 24 * 3600);
    let then = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() + in_a_year;
    let unix_nanos = u64::try_from(then.as_nanos()).unwrap();
    let resumed = Request::Resumed {
        unix_nanos,
        entropy: vec![7; 32],
    };
    assert_eq!(machine.ask(&resumed), Reply::Ok);
    let now: u64 = machine.sh("date +%s").trim().parse().unwrap();
    assert!(
        (then.as_secs()..then.as_secs() + 60).contains(&now),
        "{now}"
    );

    let after = machine.status();
    assert_eq!(
        (after.pid, after.next_seq),
        (before.pid, before.next_seq),
        "the same app"
    );
    let mut host = machine.attach(ready + 1);
    assert!(matches!(host.next(), Some(Event::Started { .. })));
    assert_eq!(machine.ask(&Request::Signal { signo: 2 }), Reply::Ok);
    let (lines, status) = host.until_end();
    assert_eq!(
        (text(&lines).as_str(), status.code),
        ("", 0),
        "nothing is told twice"
    );
    assert_eq!(machine.wait_end(), "guest_reset");
}
