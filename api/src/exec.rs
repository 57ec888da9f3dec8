//! A command that runs in a Machine, as the API and its clients tell of it to each other.
//!
//! `POST …/exec/stream` is one HTTP exchange with a stream of [frames](tern_guest::frame) either way. The request's first
//! frame is an [`ExecStart`] as JSON; where it says `stdin`, `Stdin` frames follow, of which an empty one ends the input,
//! and [`ExecInput`](tern_guest::ExecInput)s. The answer has `Stdout` and `Stderr` frames, byte for byte and in order,
//! and one [`ExecEnd`], the last. An answer without one was broken off, and what it held is not all. Empty `Stdout` and
//! `Stderr` frames say that the connection lives, and nothing else.
//!
//! A client that goes away ends the command; one that does not read holds it up.

use serde::{Deserialize, Serialize};
use tern_guest::message::TerminalSize;

/// What an exchange is known by, in either direction.
pub const EXEC_MEDIA_TYPE: &str = "application/vnd.tern.exec";

/// What is to be run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecStart {
    /// The command and its arguments.
    pub command: Vec<String>,
    /// Or all of it in one text, split into words as a shell would.
    pub cmd: Option<String>,
    /// Whether input follows. Without, it is empty.
    pub stdin: bool,
    /// Give it a terminal of this size; all its output is then `Stdout`.
    pub tty: Option<TerminalSize>,
    /// Seconds that it may take.
    pub timeout: Option<u64>,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "end", rename_all = "snake_case")]
pub enum ExecEnd {
    /// By itself, or by a signal.
    Exited {
        /// Its exit code; 128 and the signal's number where one ended it.
        exit_code: i32,
        /// The signal that ended it, where one did.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        exit_signal: Option<i32>,
        /// Whether the guest's kernel killed it because memory had run out.
        #[serde(default)]
        oom_killed: bool,
    },
    /// It was ended, or what became of it is not known.
    Failed {
        /// Why.
        error: String,
    },
}
