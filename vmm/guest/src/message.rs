//! Messages: what is asked of a guest's init, and what it answers.
//!
//! A connection carries one [`Request`], which is its first frame, and then:
//!
//! | request | answers |
//! |---|---|
//! | [`Request::Attach`] | [`Event`]s until either side closes |
//! | [`Request::Exec`] | `Stdout`/`Stderr` frames, then one [`Reply::Exit`]; meanwhile `Stdin` frames and [`ExecInput`] go in |
//! | the others | one [`Reply`] |
//!
//! A request that cannot be served is answered with [`Reply::Error`].
//!
//! Unknown fields are ignored on purpose: a guest restored from a snapshot may be older than the
//! host that talks to it.

use serde::{Deserialize, Serialize};

/// What a host asks of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Report what happens, and the app's output from the line numbered `from` on.
    Attach {
        /// The first sequence number wanted: one more than the last seen, or 0.
        #[serde(default)]
        from: u64,
    },
    /// Run another command beside the app.
    Exec(ExecRequest),
    /// Send a signal to the app.
    Signal {
        /// The signal's number.
        signo: i32,
    },
    /// Send the app its stop signal, and `SIGKILL` if it is still there after the time allowed.
    Stop {
        /// Instead of the signal in the run configuration.
        #[serde(default)]
        signo: Option<i32>,
        /// Instead of the time in the run configuration.
        #[serde(default)]
        timeout_ms: Option<u64>,
    },
    /// The Machine was asleep: set its clock and stir its random numbers.
    Resumed {
        /// Unix time now, in nanoseconds.
        unix_nanos: u64,
        /// At least [`MIN_ENTROPY`] fresh random bytes, as base64.
        #[serde(with = "crate::config::base64_bytes")]
        entropy: Vec<u8>,
    },
    /// How is it going?
    Status,
}

/// A command to run beside the app, with the app's user, environment and directory unless it says
/// otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecRequest {
    /// The program, looked up in the guest's `PATH`, and its arguments.
    pub cmd: Vec<String>,
    /// Added to the app's environment.
    pub env: Vec<(String, String)>,
    /// `user[:group]`, by name or number.
    pub user: Option<String>,
    /// The directory to run in.
    pub working_dir: Option<String>,
    /// Whether `Stdin` frames will follow. Without, the command's input is empty.
    pub stdin: bool,
    /// Give the command a terminal of this size; all its output is then `Stdout`.
    pub tty: Option<TerminalSize>,
}

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub cols: u16,
}

/// What a host may say, besides raw `Stdin`, while a command runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "input", rename_all = "snake_case")]
pub enum ExecInput {
    /// The terminal's window has a new size.
    Resize(TerminalSize),
    /// Send a signal to the command and what it started.
    Signal {
        /// The signal's number.
        signo: i32,
    },
}

/// What an attached host is told.
///
/// `started` and `exited` are told to every attach anew; the lines between them by their numbers.
/// After `exited` the host closes the connection, which tells init that the news has arrived.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// One line of output. A line of more than [`MAX_LINE`] bytes comes as several.
    Log {
        /// Counts lines from 0; a gap means that the ring was full and lines were lost.
        seq: u64,
        /// Whose line it is.
        stream: Stream,
        /// When it was read, in milliseconds of Unix time by the guest's clock.
        unix_ms: u64,
        /// The line, without its line feed; bytes that are not UTF-8 are replaced.
        line: String,
    },
    /// The app runs.
    Started {
        /// Its process id in the guest.
        pid: i32,
    },
    /// The app has ended, or could not be started; the last `init` lines say why.
    Exited(ExitStatus),
}

/// Where a line of output comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    /// The app's standard output.
    Stdout,
    /// The app's standard error.
    Stderr,
    /// Init itself.
    Init,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatus {
    /// What it returned. For a process that was killed, 128 and the signal's number; 126 if its
    /// program could not be run, 127 if it was not found, 125 if the guest could not be set up.
    pub code: i32,
    /// The signal that killed it.
    #[serde(default)]
    pub signal: Option<i32>,
    /// Whether the kernel killed it because memory had run out.
    #[serde(default)]
    pub oom_killed: bool,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// Done.
    Ok,
    /// Not done.
    Error {
        /// Why.
        message: String,
    },
    /// To [`Request::Status`].
    Status(Status),
    /// The command of an [`Request::Exec`] has ended.
    Exit(ExitStatus),
}

/// How a guest is doing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// How far the app has come.
    pub state: AppState,
    /// The app's process id, while it runs.
    #[serde(default)]
    pub pid: Option<i32>,
    /// How it ended, once it has.
    #[serde(default)]
    pub exit: Option<ExitStatus>,
    /// Milliseconds since the guest's kernel started (time asleep does not count).
    pub uptime_ms: u64,
    /// All the memory that the kernel manages, in KiB.
    pub memory_total_kib: u64,
    /// What could be had without swapping, in KiB.
    pub memory_available_kib: u64,
    /// Load averages over 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// The sequence number that the next line of output will get.
    pub next_seq: u64,
    /// How the guest booted, in the order of things.
    #[serde(default)]
    pub phases: Vec<GuestPhase>,
}

/// Something that was done between a guest's first instruction and its app's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestPhase {
    /// What.
    pub name: String,
    /// When it had ended: microseconds since the guest's kernel started.
    pub uptime_us: u64,
}

/// How far the app has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AppState {
    /// The guest is being set up.
    Starting,
    /// The app runs.
    Running,
    /// The app has ended; the Machine is about to reset.
    Exited,
}

/// The longest line in one [`Event::Log`]. JSON may write a byte as six (`\u0000`), and the whole
/// must fit into a frame of 64 KiB.
pub const MAX_LINE: usize = 8 * 1024;

/// What the kernel's generator needs to be unpredictable again: the size of its key.
pub const MIN_ENTROPY: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Decoder, Encoder, MAX_PAYLOAD};
    use proptest::prelude::*;

    #[test]
    fn requests_look_as_documented() {
        let text = serde_json::to_string(&Request::Attach { from: 7 }).unwrap();
        assert_eq!(text, r#"{"request":"attach","from":7}"#);
        let text = serde_json::to_string(&Request::Resumed {
            unix_nanos: 1,
            entropy: vec![0; 3],
        });
        assert_eq!(
            text.unwrap(),
            r#"{"request":"resumed","unix_nanos":1,"entropy":"AAAA"}"#
        );
        let exec: Request = serde_json::from_str(r#"{"request":"exec","cmd":["ls"]}"#).unwrap();
        let expected = ExecRequest {
            cmd: vec!["ls".into()],
            ..Default::default()
        };
        assert_eq!(exec, Request::Exec(expected));
    }

    #[test]
    fn answers_look_as_documented() {
        let exited = Event::Exited(ExitStatus {
            code: 137,
            signal: Some(9),
            oom_killed: true,
        });
        assert_eq!(
            serde_json::to_string(&exited).unwrap(),
            r#"{"event":"exited","code":137,"signal":9,"oom_killed":true}"#
        );
        assert_eq!(
            serde_json::to_string(&Reply::Ok).unwrap(),
            r#"{"reply":"ok"}"#
        );
    }

    #[test]
    fn a_newer_host_may_add_fields() {
        let request: Request =
            serde_json::from_str(r#"{"request":"signal","signo":15,"why":"because"}"#).unwrap();
        assert_eq!(request, Request::Signal { signo: 15 });
    }

    proptest! {
        #[test]
        fn the_longest_line_always_fits_into_a_frame(byte in any::<u8>(), seq in any::<u64>()) {
            let line = String::from_utf8_lossy(&[byte; MAX_LINE]).into_owned();
            let event = Event::Log { seq, stream: Stream::Stdout, unix_ms: u64::MAX, line };
            let mut encoder = Encoder::new();
            encoder.json(&event).unwrap();
            prop_assert!(encoder.wire().len() <= MAX_PAYLOAD);
            let mut decoder = Decoder::new();
            decoder.feed(encoder.wire());
            prop_assert_eq!(decoder.next_frame().unwrap().unwrap().parse::<Event>().unwrap(), event);
        }
    }
}
