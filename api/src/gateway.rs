//! What the API asks of a Machine's host directly, because it must happen now and leaves no fact.

use std::pin::Pin;

use async_trait::async_trait;
use bytes::Bytes;
use futures::Sink;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use tern_catalog::MachineId;
use tern_guest::message::TerminalSize;
use tern_guest::{ExecInput, ExitStatus};
use thiserror::Error;

/// The way to the agents of hosts. `tern serve` implements it.
#[async_trait]
pub trait HostGateway: Send + Sync + 'static {
    /// Has the image on the Machine's host, ready to be booted, when it returns. Touches no Machine.
    async fn prepare(&self, machine: &MachineId, image: &str) -> Result<(), GatewayError>;

    /// Whether a running Machine takes connections on this TCP port from outside.
    async fn accepts(&self, machine: &MachineId, port: u16) -> Result<bool, GatewayError>;

    /// Begins a command in a running Machine.
    async fn exec(
        &self,
        machine: &MachineId,
        request: ExecRequest,
    ) -> Result<ExecSession, GatewayError>;

    /// Sends a signal to the app of a running Machine.
    async fn signal(&self, machine: &MachineId, signal: i32) -> Result<(), GatewayError>;

    /// Where the time of a running Machine's last start went.
    async fn start_trace(&self, machine: &MachineId) -> Result<StartTrace, GatewayError>;

    /// The memory that a running Machine may use.
    async fn memory(&self, machine: &MachineId) -> Result<MachineMemory, GatewayError>;

    /// Asks a running Machine to use no more than `mb` of its memory, until its next cold start.
    async fn limit_memory(&self, machine: &MachineId, mb: u32) -> Result<(), GatewayError>;

    /// The output of apps: what is kept, and with `follow` what comes, until the stream is dropped.
    async fn logs(&self, query: LogQuery) -> Result<BoxStream<'static, LogLine>, GatewayError>;
}

/// A command to run.
#[derive(Debug, Clone, Default)]
pub struct ExecRequest {
    /// The command and its arguments.
    pub command: Vec<String>,
    /// Whether input will follow. Without, it is empty.
    pub stdin: bool,
    /// Give it a terminal of this size.
    pub tty: Option<TerminalSize>,
}

/// A command that runs. Dropping either half of it ends the command.
pub struct ExecSession {
    /// What goes in. An error says that nothing more does; how it ended is told by `outputs`.
    pub inputs: ExecInputs,
    /// What comes out, as fast as it is taken. [`ExecOutput::Exit`] is the last; without it the Machine went away.
    pub outputs: ExecOutputs,
}

/// The input side of a command.
pub type ExecInputs = Pin<Box<dyn Sink<ExecFeed, Error = GatewayError> + Send>>;
/// The output side of a command.
pub type ExecOutputs = BoxStream<'static, Result<ExecOutput, GatewayError>>;

/// What a command gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecFeed {
    /// Bytes of its input; none at all end it.
    Stdin(Bytes),
    /// A window size, or a signal.
    Control(ExecInput),
}

/// What a command says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecOutput {
    /// Bytes of its output, or of its terminal.
    Stdout(Bytes),
    /// Bytes of its error output.
    Stderr(Bytes),
    /// It has ended.
    Exit(ExitStatus),
}

/// What memory a running Machine has, in MiB.
#[derive(Debug, Clone, Serialize)]
pub struct MachineMemory {
    /// How much it may use: what its config says, or less.
    pub limit_mb: u32,
    /// What of that programs could still have.
    pub available_mb: u64,
}

/// Where the time of a start went.
#[derive(Debug, Clone, Serialize)]
pub struct StartTrace {
    /// When it began, in microseconds since 1970.
    pub began_unix_us: u64,
    /// From the disk, and not from a snapshot; absent where the host's agent has not seen it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cold: Option<bool>,
    /// What ended when.
    pub phases: Vec<StartPhase>,
}

/// Something that was done in a start.
#[derive(Debug, Clone, Serialize)]
pub struct StartPhase {
    /// `agent`, `monitor` or `guest`.
    pub side: String,
    /// What was done.
    pub name: String,
    /// When it had ended, in microseconds since the start began.
    pub at_us: u64,
}

/// Whose output.
#[derive(Debug, Clone)]
pub struct LogQuery {
    /// These Machines'.
    pub machines: Vec<MachineId>,
    /// Go on as more comes.
    pub follow: bool,
}

/// A line of an app's output.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogLine {
    /// The Machine.
    pub machine: MachineId,
    /// Milliseconds since 1970.
    pub unix_ms: i64,
    /// `stdout`, `stderr`, or `tern` for the host's own words.
    pub stream: String,
    /// The line, without its end.
    pub line: String,
}

/// Why a host did not do it.
#[derive(Debug, Error)]
pub enum GatewayError {
    /// The Machine must run for that.
    #[error("{0}")]
    NotRunning(String),
    /// It took too long.
    #[error("{0}")]
    Timeout(String),
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}
