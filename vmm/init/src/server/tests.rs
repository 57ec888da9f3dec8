//! A host on the other end of a socket pair, and real processes of this machine.

use super::*;
use crate::children::ONE_FAMILY_AT_A_TIME;
use nix::sys::socket::{setsockopt, sockopt};
use std::net::Shutdown;
use std::sync::MutexGuard;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use tern_guest::message::{AppState, MAX_LINE, Stream, TerminalSize};
use tern_guest::{Event, ExecInput, ExecRequest, ExitStatus, Frame, FrameKind, RunConfig};

/// A guest that has been set up, with a reaper.
struct Rig {
    guest: Arc<Guest>,
    over: Arc<AtomicBool>,
    reaper: Option<JoinHandle<()>>,
    _alone: MutexGuard<'static, ()>,
}

impl Rig {
    fn new() -> Self {
        let alone = ONE_FAMILY_AT_A_TIME
            .lock()
            .unwrap_or_else(|e| e.into_inner());
        let root = nix::unistd::geteuid().is_root();
        assert!(
            root,
            "this test starts programs as other users: run it as root"
        );
        // As in a guest, orphans come to us: nobody else on this machine need bury them in time.
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let guest = Arc::new(Guest::default());
        let mut config = RunConfig::default();
        config.process.env = vec![("GREETING".into(), "hello".into())];
        guest.set_ready(config);
        let over = Arc::new(AtomicBool::new(false));
        let reaper = std::thread::spawn({
            let (guest, over) = (Arc::clone(&guest), Arc::clone(&over));
            move || {
                // A process of its own would wait for SIGCHLD; a thread of a test cannot.
                while !over.load(Ordering::Relaxed) {
                    guest.children.reap();
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        });
        Self {
            guest,
            over,
            reaper: Some(reaper),
            _alone: alone,
        }
    }

    fn connect(&self, request: &Request) -> Host {
        let mut host = self.connect_raw();
        host.send(request);
        host
    }

    fn connect_raw(&self) -> Host {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.serve(ours, theirs)
    }

    fn serve(&self, ours: UnixStream, theirs: UnixStream) -> Host {
        ours.set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let guest = Arc::clone(&self.guest);
        let server = std::thread::spawn(move || serve(&guest, theirs));
        Host {
            conn: ours,
            decoder: Decoder::new(),
            server,
        }
    }

    fn sh(&self, script: &str, stdin: bool) -> Host {
        self.connect(&shell(script, stdin))
    }
}

fn shell(script: &str, stdin: bool) -> Request {
    Request::Exec(ExecRequest {
        cmd: ["sh", "-c", script].map(String::from).to_vec(),
        stdin,
        ..Default::default()
    })
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(reaper) = self.reaper.take() {
            reaper.join().unwrap();
        }
    }
}

struct Host {
    conn: UnixStream,
    decoder: Decoder,
    server: JoinHandle<()>,
}

impl Host {
    fn send(&mut self, message: &impl serde::Serialize) {
        let mut wire = Encoder::new();
        wire.json(message).unwrap();
        self.conn.write_all(wire.wire()).unwrap();
    }

    fn stdin(&mut self, bytes: &[u8]) {
        let mut wire = Encoder::new();
        wire.raw(FrameKind::Stdin, bytes);
        self.conn.write_all(wire.wire()).unwrap();
    }

    fn frame(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(frame);
            }
            let mut buffer = [0; 4096];
            match self.conn.read(&mut buffer).unwrap() {
                0 => return None,
                length => self.decoder.feed(&buffer[..length]),
            }
        }
    }

    fn reply(&mut self) -> Reply {
        self.frame().unwrap().parse().unwrap()
    }

    fn event(&mut self) -> Event {
        self.frame().unwrap().parse().unwrap()
    }

    /// All output and the end of a command.
    fn output(mut self) -> (String, String, ExitStatus) {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            let frame = self
                .frame()
                .expect("the connection ended before the command");
            match frame.kind {
                FrameKind::Stdout => stdout.extend(frame.payload),
                FrameKind::Stderr => stderr.extend(frame.payload),
                _ => match frame.parse().unwrap() {
                    Reply::Exit(status) => {
                        let text = |bytes| String::from_utf8(bytes).unwrap();
                        assert!(self.frame().is_none(), "the end is the last frame");
                        self.server.join().unwrap();
                        return (text(stdout), text(stderr), status);
                    }
                    other => panic!("{other:?}"),
                },
            }
        }
    }
}

#[test]
fn a_command_has_output_and_an_end() {
    let rig = Rig::new();
    let (stdout, stderr, status) = rig
        .sh("echo $GREETING; echo oops >&2; exit 3", false)
        .output();
    assert_eq!((stdout.as_str(), stderr.as_str()), ("hello\n", "oops\n"));
    assert_eq!(
        status,
        ExitStatus {
            code: 3,
            ..Default::default()
        }
    );
    let (.., status) = rig.sh("kill -9 $$", false).output();
    assert_eq!(
        status,
        ExitStatus {
            code: 137,
            signal: Some(9),
            oom_killed: false
        }
    );
}

#[test]
fn input_goes_in_until_its_end() {
    let rig = Rig::new();
    let mut host = rig.sh("cat; echo done", true);
    host.stdin(b"some ");
    host.stdin(b"words\n");
    host.stdin(b"");
    assert_eq!(host.output().0, "some words\ndone\n");
    assert_eq!(
        rig.sh("cat; echo done", false).output().0,
        "done\n",
        "no input is an empty one"
    );
}

#[test]
fn much_input_and_output_flow_without_being_kept() {
    let rig = Rig::new();
    let mut host = rig.sh("cat", true);
    let mut writer = host.conn.try_clone().unwrap();
    let text = "0123456789abcdef".repeat(256 * 1024);
    let sent = text.clone();
    let thread = std::thread::spawn(move || {
        let mut wire = Encoder::new();
        wire.raw(FrameKind::Stdin, sent.as_bytes());
        wire.raw(FrameKind::Stdin, b"");
        writer.write_all(wire.wire()).unwrap();
    });
    let mut got = Vec::new();
    loop {
        let frame = host.frame().unwrap();
        if frame.kind != FrameKind::Stdout {
            break;
        }
        got.extend(frame.payload);
    }
    thread.join().unwrap();
    assert!(
        got == text.as_bytes(),
        "{} bytes came back of {}",
        got.len(),
        text.len()
    );
}

/// What a host holds up may go out all at once in the end. Then nothing waits any more, but in the
/// command's pipe, which nobody has looked into for a while.
#[test]
fn the_last_output_is_not_lost_when_the_host_was_slow() {
    let rig = Rig::new();
    for _ in 0..20 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        setsockopt(&theirs, sockopt::SndBuf, &0).unwrap();
        let room = theirs.try_clone().unwrap();
        let mut host = rig.serve(ours, theirs);
        // More than a session holds for its host, and less than that and a pipe.
        let script = "echo; exec head -c 190000 /dev/zero";
        host.send(&shell(script, false));
        let first = host.frame().unwrap();
        assert_eq!(first.kind, FrameKind::Stdout);
        assert!(rig.guest.children.wait_none(Duration::from_secs(20)));
        setsockopt(&room, sockopt::SndBufForce, &(1 << 20)).unwrap();
        drop(room);
        let (rest, ..) = host.output();
        assert_eq!(first.payload.len() + rest.len(), "\n".len() + 190_000);
    }
}

#[test]
fn a_process_left_behind_does_not_hold_up_the_end() {
    let rig = Rig::new();
    let (stdout, _, status) = rig.sh("sleep 1000 & echo $!", false).output();
    assert_eq!(status.code, 0);
    // SAFETY: `kill` takes no pointers; the process is one that this test started.
    unsafe { libc::kill(stdout.trim().parse().unwrap(), libc::SIGKILL) };
}

#[test]
fn a_command_dies_with_its_connection() {
    let rig = Rig::new();
    let mut host = rig.sh("echo $$; sleep 1000 & sleep 1000", false);
    let pid: i32 = String::from_utf8(host.frame().unwrap().payload)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    drop(host.conn);
    host.server.join().unwrap();
    assert!(
        rig.guest.children.wait_none(Duration::from_secs(20)),
        "something of group {pid} is left"
    );
}

/// On Unix, too, a host that has only stopped sending is told by RDHUP alone, as any end is on vsock.
#[test]
fn a_command_that_reads_nothing_dies_with_its_connection() {
    let rig = Rig::new();
    let mut host = rig.sh("echo; exec sleep 1000", true);
    assert_eq!(host.frame().unwrap().payload, b"\n");
    host.conn
        .set_write_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let mut wire = Encoder::new();
    wire.raw(FrameKind::Stdin, &[0; 4 * 1024 * 1024]);
    // Until a whole second makes no room: init holds as much as it will.
    while let Ok(written) = host.conn.write(wire.wire())
        && written > 0
    {
        wire.consume(written);
    }
    assert!(!wire.wire().is_empty(), "init takes only so much");
    host.conn.shutdown(Shutdown::Write).unwrap();
    assert!(rig.guest.children.wait_none(Duration::from_secs(20)));
    host.server.join().unwrap();
}

#[test]
fn a_terminal_is_a_terminal() {
    let rig = Rig::new();
    let script = "test -t 0 && test -t 1 && stty size; read x; stty size; echo got $x";
    let mut host = rig.connect(&Request::Exec(ExecRequest {
        cmd: ["sh", "-c", script].map(String::from).to_vec(),
        tty: Some(TerminalSize {
            rows: 33,
            cols: 101,
        }),
        stdin: true,
        ..Default::default()
    }));
    // A terminal hands over what it has, which need not be a line.
    let mut first = Vec::new();
    while !first.ends_with(b"\n") {
        first.extend(host.frame().unwrap().payload);
    }
    assert_eq!(String::from_utf8(first).unwrap(), "33 101\r\n");
    host.send(&ExecInput::Resize(TerminalSize { rows: 5, cols: 6 }));
    host.stdin(b"it\n");
    let (output, _, status) = host.output();
    assert!(output.ends_with("5 6\r\ngot it\r\n"), "{output:?}");
    assert_eq!(status.code, 0);
}

#[test]
fn a_terminals_input_ends_within_a_line_too() {
    let rig = Rig::new();
    for (input, expected) in [("foo", "foofoo"), ("foo\n", "foo\r\nfoo\r\n"), ("", "")] {
        let mut host = rig.connect(&Request::Exec(ExecRequest {
            cmd: vec!["cat".into()],
            tty: Some(TerminalSize { rows: 24, cols: 80 }),
            stdin: true,
            ..Default::default()
        }));
        if !input.is_empty() {
            host.stdin(input.as_bytes());
        }
        host.stdin(b"");
        let (output, _, status) = host.output();
        assert_eq!((output.as_str(), status.code), (expected, 0), "{input:?}");
    }
}

#[test]
fn a_command_can_be_signalled() {
    let rig = Rig::new();
    let mut host = rig.sh(
        "trap 'echo caught; exit 4' TERM; echo ready; while :; do sleep 0.05; done",
        false,
    );
    assert_eq!(host.frame().unwrap().payload, b"ready\n");
    host.send(&ExecInput::Signal { signo: 15 });
    let (stdout, _, status) = host.output();
    assert!(stdout.ends_with("caught\n"), "{stdout}");
    assert_eq!(status.code, 4);
}

#[test]
fn what_cannot_run_says_why() {
    let rig = Rig::new();
    let run = |cmd: &str| {
        let cmd = vec![cmd.to_string()];
        rig.connect(&Request::Exec(ExecRequest {
            cmd,
            ..Default::default()
        }))
        .output()
    };
    let (_, stderr, status) = run("no-such-program");
    assert!(
        stderr.starts_with("no-such-program: not found in PATH=/usr/local/sbin:"),
        "{stderr}"
    );
    assert_eq!(status.code, 127);
    let (_, stderr, status) = run("/etc/passwd");
    assert_eq!(
        (stderr.as_str(), status.code),
        ("/etc/passwd: is not an executable file\n", 126)
    );

    let stranger = ExecRequest {
        cmd: vec!["id".into()],
        user: Some("no-such-user".into()),
        ..Default::default()
    };
    let reply = rig.connect(&Request::Exec(stranger)).reply();
    let message = "user \"no-such-user\" is not in the image's /etc/passwd".to_string();
    assert_eq!(reply, Reply::Error { message });
}

#[test]
fn nothing_starts_in_a_machine_that_ends() {
    let rig = Rig::new();
    rig.guest.children.close();
    let (stdout, stderr, status) = rig.sh("echo here", false).output();
    let reason = "/sh: the Machine is ending, nothing starts any more\n";
    assert!(stderr.ends_with(reason), "{stderr}");
    assert_eq!((stdout.as_str(), status.code), ("", 126));
}

#[test]
fn a_command_can_be_anybody_anywhere() {
    let rig = Rig::new();
    let (stdout, stderr, _) = rig
        .connect(&Request::Exec(ExecRequest {
            cmd: ["sh", "-c", "id -u; id -g; id -G; pwd; echo $GREETING $X"]
                .map(String::from)
                .to_vec(),
            user: Some("4242:4343".into()),
            working_dir: Some("/proc".into()),
            env: vec![("X".into(), "1".into())],
            ..Default::default()
        }))
        .output();
    assert_eq!(stdout, "4242\n4343\n4343\n/proc\nhello 1\n", "{stderr}");
}

#[test]
fn an_attached_host_hears_everything_to_the_end() {
    let rig = Rig::new();
    let journal = &rig.guest.journal;
    journal.line(Stream::Stdout, "one".into());
    let mut host = rig.connect(&Request::Attach { from: 0 });
    assert!(matches!(host.event(), Event::Log { seq: 0, .. }));
    journal.started(9);
    assert_eq!(host.event(), Event::Started { pid: 9 });
    journal.line(Stream::Stderr, "two".into());
    assert!(matches!(
        host.event(),
        Event::Log {
            seq: 1,
            stream: Stream::Stderr,
            ..
        }
    ));
    journal.exited(ExitStatus::default());
    assert_eq!(host.event(), Event::Exited(ExitStatus::default()));
    assert!(!journal.wait_delivered(Duration::ZERO));
    drop(host.conn);
    assert!(journal.wait_delivered(Duration::from_secs(30)));
    host.server.join().unwrap();
}

#[test]
fn a_line_of_any_length_does_not_keep_a_host_from_the_end() {
    let rig = Rig::new();
    let journal = &rig.guest.journal;
    journal.line(Stream::Init, "x".to_string() + &"é".repeat(35_000));
    journal.exited(ExitStatus::default());
    let mut host = rig.connect(&Request::Attach { from: 0 });
    let Event::Log { line, .. } = host.event() else {
        panic!("the line comes first")
    };
    assert_eq!(line.len(), MAX_LINE - 1, "cut between two characters");
    assert_eq!(host.event(), Event::Exited(ExitStatus::default()));
}

#[test]
fn a_host_that_leaves_early_has_not_heard_the_end() {
    let rig = Rig::new();
    let mut host = rig.connect(&Request::Attach { from: 0 });
    rig.guest.journal.started(9);
    assert_eq!(host.event(), Event::Started { pid: 9 });
    drop(host.conn);
    host.server.join().unwrap();
    rig.guest.journal.exited(ExitStatus::default());
    assert!(!rig.guest.journal.wait_delivered(Duration::ZERO));
}

#[test]
fn simple_questions_are_answered() {
    let rig = Rig::new();
    let Reply::Status(status) = rig.connect(&Request::Status).reply() else {
        panic!()
    };
    assert_eq!(status.state, AppState::Starting);
    let refused = |request| match rig.connect(&request).reply() {
        Reply::Error { message } => message,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        refused(Request::Signal { signo: 15 }),
        "the app does not run"
    );
    assert_eq!(
        refused(Request::Signal { signo: 99 }),
        "there is no signal 99"
    );
    let few = Request::Resumed {
        unix_nanos: 1,
        entropy: vec![1; 3],
    };
    assert_eq!(refused(few), "3 bytes of entropy are not from 32 to 512");
}

#[test]
fn stopping_is_asking_and_then_insisting() {
    let rig = Rig::new();
    let stubborn = [
        "sh",
        "-c",
        "trap 'echo no' INT; echo ready; while :; do sleep 0.05; done",
    ];
    let request = ExecRequest {
        cmd: stubborn.map(String::from).to_vec(),
        ..Default::default()
    };
    let program = rig.guest.program(&request).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let descriptors = crate::process::Descriptors {
        stdin: std::process::Stdio::null(),
        stdout: OwnedFd::from(theirs).into(),
        stderr: std::process::Stdio::null(),
        controlling_terminal: false,
    };
    let (app, exit) = program.start(&rig.guest.children, descriptors).unwrap();
    (&ours).read_exact(&mut [0; 6]).unwrap();
    rig.guest.set_app(app);
    let stop = |timeout_ms| Request::Stop {
        signo: None,
        timeout_ms: Some(timeout_ms),
    };
    assert_eq!(rig.connect(&stop(600_000)).reply(), Reply::Ok);
    let mut said = [0; 3];
    (&ours).read_exact(&mut said).unwrap();
    assert_eq!(said, *b"no\n", "it was asked, and has time");
    assert_eq!(rig.connect(&stop(0)).reply(), Reply::Ok);
    assert_eq!(exit.recv().unwrap().signal, Some(9));
}

#[test]
fn strangers_get_an_error_and_nothing_else() {
    let rig = Rig::new();
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"\x01\x02\x00\x00\x00{}",
        b"\x02\x00\x00\x00\x00",
    ] {
        let mut host = rig.connect_raw();
        host.conn.write_all(garbage).unwrap();
        assert!(matches!(host.reply(), Reply::Error { .. }));
        assert!(host.frame().is_none());
        host.server.join().unwrap();
    }
    let mut host = rig.sh("sleep 1000", true);
    host.conn.write_all(b"\x03\x00\x00\x00\x00").unwrap();
    assert!(host.frame().is_none(), "output does not go in");
    host.server.join().unwrap();
}
