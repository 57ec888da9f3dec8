//! The agent, as the gate and the API know it.

use std::net::Ipv4Addr;
use std::time::Instant;

use async_trait::async_trait;
use futures::StreamExt as _;
use futures::sink;
use futures::stream::{self, BoxStream};
use tern_api::{
    ExecFeed, ExecOutput, ExecRequest, ExecSession, GatewayError, HostGateway, LogLine, LogQuery,
    MachineMemory, SecretSealer, StartPhase, StartTrace,
};
use tern_catalog::{MachineId, SealedKey};
use tern_certs::Sealer;
use tern_edge::{Leaving, MachineControl, StartError};
use tern_host::{AgentHandle, CommandError, Departure, LogItem, SecretOpener, Source, StopRequest};
use tokio::sync::Mutex;
use tokio::sync::mpsc::UnboundedReceiver;

/// The agent of this host.
pub struct HostAdapter {
    agent: AgentHandle,
    departures: Mutex<UnboundedReceiver<Departure>>,
}

/// The deployment's key, as the API and the agent know it: the one encrypts secrets, the other decrypts them.
#[derive(Debug)]
pub struct SecretKey(pub Sealer);

impl SecretSealer for SecretKey {
    fn seal(&self, purpose: &str, value: &[u8]) -> Result<SealedKey, String> {
        self.0.seal(purpose, value).map_err(|e| e.to_string())
    }

    fn digest(&self, purpose: &str, value: &[u8]) -> String {
        self.0.digest(purpose, value)
    }
}

impl SecretOpener for SecretKey {
    fn open(&self, purpose: &str, sealed: &SealedKey) -> Result<Vec<u8>, String> {
        let opened = self.0.open(purpose, sealed).map_err(|e| e.to_string())?;
        Ok(opened.to_vec())
    }
}

impl HostAdapter {
    pub fn new(agent: AgentHandle) -> Self {
        let departures = Mutex::new(agent.departures());
        Self { agent, departures }
    }
}

#[async_trait]
impl MachineControl for HostAdapter {
    async fn start(&self, id: &MachineId) -> Result<(), StartError> {
        self.agent
            .start(id, Source::Proxy)
            .await
            .map_err(|e| StartError {
                text: e.to_string(),
            })
    }

    async fn reachable(&self, id: &MachineId) {
        self.agent.reachable(id).await
    }

    fn ipv4(&self, id: &MachineId) -> Option<Ipv4Addr> {
        self.agent.ipv4(id).ok()
    }

    async fn suspend(&self, id: &MachineId) -> Result<(), String> {
        self.agent
            .suspend(id, Source::Proxy)
            .await
            .map_err(|e| e.to_string())
    }

    async fn stop(&self, id: &MachineId) -> Result<(), String> {
        self.agent
            .stop(id, Source::Proxy, StopRequest::default())
            .await
            .map_err(|e| e.to_string())
    }

    fn last_use(&self, id: &MachineId) -> Option<Instant> {
        self.agent.last_use(id)
    }

    async fn leaving(&self) -> Leaving {
        match self.departures.lock().await.recv().await {
            Some(departure) => Leaving {
                machine: departure.machine,
                ready: departure.ready,
                suspended: departure.suspended,
            },
            // The agent has ended.
            None => std::future::pending().await,
        }
    }
}

#[async_trait]
impl HostGateway for HostAdapter {
    async fn prepare(&self, id: &MachineId, image: &str) -> Result<(), GatewayError> {
        // Another host's Machine is asked of that host's API (`tern_api`, `forward`).
        self.agent.prepare(id, image).await.map_err(gateway_error)
    }

    async fn accepts(&self, id: &MachineId, port: u16) -> Result<bool, GatewayError> {
        self.agent.accepts(id, port).await.map_err(gateway_error)
    }

    async fn exec(
        &self,
        id: &MachineId,
        request: ExecRequest,
    ) -> Result<ExecSession, GatewayError> {
        let guest = tern_guest::ExecRequest {
            cmd: request.command,
            env: Vec::new(),
            user: None,
            working_dir: None,
            stdin: request.stdin,
            tty: request.tty,
        };
        let exec = self.agent.exec(id, guest).await.map_err(gateway_error)?;
        Ok(session(exec))
    }

    async fn signal(&self, id: &MachineId, signal: i32) -> Result<(), GatewayError> {
        self.agent.signal(id, signal).await.map_err(gateway_error)
    }

    async fn start_trace(&self, id: &MachineId) -> Result<StartTrace, GatewayError> {
        let trace = self.agent.start_trace(id).await.map_err(gateway_error)?;
        let phase = |phase: tern_host::Phase| StartPhase {
            side: phase.side.to_string(),
            name: phase.name,
            at_us: phase.at_us,
        };
        Ok(StartTrace {
            began_unix_us: trace.began_unix_us,
            cold: trace.cold,
            phases: trace.phases.into_iter().map(phase).collect(),
        })
    }

    async fn memory(&self, id: &MachineId) -> Result<MachineMemory, GatewayError> {
        let memory = self.agent.memory(id).await.map_err(gateway_error)?;
        Ok(MachineMemory {
            limit_mb: memory.limit_mib,
            available_mb: memory.available_mib,
        })
    }

    async fn limit_memory(&self, id: &MachineId, mb: u32) -> Result<(), GatewayError> {
        let limited = self.agent.limit_memory(id, mb).await;
        limited.map_err(gateway_error)
    }

    async fn logs(&self, query: LogQuery) -> Result<BoxStream<'static, LogLine>, GatewayError> {
        let mut streams = Vec::new();
        for id in query.machines {
            match self.agent.logs(&id, 0, query.follow).await {
                Ok(reader) => streams.push(lines(id, reader)),
                // Its host has not looked at it yet, so it has said nothing.
                Err(CommandError::Unknown(_)) => {}
                Err(error) => return Err(gateway_error(error)),
            }
        }
        Ok(stream::select_all(streams).boxed())
    }
}

/// A command in a guest as the API knows it.
fn session(exec: tern_host::Exec) -> ExecSession {
    let inputs = sink::unfold(
        exec.inputs,
        async |mut inputs: tern_host::ExecInputs, feed| {
            // Whether it arrives does not matter: how the command ended is told by what it says. And the input side stays
            // open in any case, for the guest takes its closing for the wish to end the command.
            let _ = match feed {
                ExecFeed::Stdin(bytes) => inputs.stdin(&bytes).await,
                ExecFeed::Control(control) => inputs.control(&control).await,
            };
            Ok(inputs)
        },
    );
    let outputs = stream::unfold(exec.outputs, async |mut outputs| {
        let output = match outputs.next().await {
            Ok(Some(tern_host::ExecOutput::Stdout(bytes))) => Ok(ExecOutput::Stdout(bytes.into())),
            Ok(Some(tern_host::ExecOutput::Stderr(bytes))) => Ok(ExecOutput::Stderr(bytes.into())),
            Ok(Some(tern_host::ExecOutput::Exit(status))) => Ok(ExecOutput::Exit(status)),
            Ok(None) => return None,
            Err(error) => Err(GatewayError::Failed(error.to_string())),
        };
        Some((output, outputs))
    });
    ExecSession {
        inputs: Box::pin(inputs),
        outputs: outputs.boxed(),
    }
}

/// One Machine's output as the API tells it.
fn lines(id: MachineId, reader: tern_host::LogReader) -> BoxStream<'static, LogLine> {
    let next = |(id, mut reader): (MachineId, tern_host::LogReader)| async move {
        let line = match reader.next().await? {
            LogItem::Line(line) => LogLine {
                machine: id.clone(),
                unix_ms: i64::try_from(line.unix_ms).unwrap_or(i64::MAX),
                stream: stream_name(line.stream).to_owned(),
                line: line.line,
            },
            LogItem::Dropped(count) => LogLine {
                machine: id.clone(),
                unix_ms: jiff::Timestamp::now().as_millisecond(),
                stream: "tern".to_owned(),
                line: format!("{count} lines were left out: they came faster than they were read"),
            },
        };
        Some((line, (id, reader)))
    };
    stream::unfold((id, reader), next).boxed()
}

fn stream_name(stream: tern_guest::message::Stream) -> &'static str {
    match stream {
        tern_guest::message::Stream::Stdout => "stdout",
        tern_guest::message::Stream::Stderr => "stderr",
        tern_guest::message::Stream::Init => "tern",
    }
}

fn gateway_error(error: CommandError) -> GatewayError {
    match error {
        CommandError::Refused(text) => GatewayError::NotRunning(text),
        other => GatewayError::Failed(other.to_string()),
    }
}
