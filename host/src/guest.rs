//! Speaks to the init of a guest, over the monitor's socket for vsock.
//!
//! The socket takes `CONNECT <port>` and answers `OK <n>` once the guest has accepted; from then on
//! the bytes are the guest's. A guest that does not listen yet refuses, by closing.

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tern_guest::frame::MAX_PAYLOAD;
use tern_guest::message::{Event, ExecRequest, ExitStatus, Reply, Request, Status};
use tern_guest::{Decoder, Encoder, Frame, FrameError, FrameKind, GUEST_PORT};
use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::activity::Session;

/// Why a guest could not be spoken to.
#[derive(Debug, Error)]
pub enum GuestError {
    /// There is no connection.
    #[error("the guest cannot be reached: {0}")]
    Connect(io::Error),
    /// It broke.
    #[error("the connection to the guest broke: {0}")]
    Broken(#[from] io::Error),
    /// The guest does not keep to the protocol.
    #[error("the guest does not make sense: {0}")]
    Nonsense(#[from] FrameError),
    /// It closed before it had answered.
    #[error("the guest closed the connection without an answer")]
    NoAnswer,
    /// It took too long.
    #[error("the guest did not answer within {} ms", .0.as_millis())]
    Late(Duration),
    /// It said no.
    #[error("the guest refused: {0}")]
    Refused(String),
}

/// The way to the init of one guest.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    socket: PathBuf,
}

/// A connection that reports what happens.
#[derive(Debug)]
pub(crate) struct Attached {
    incoming: Incoming,
    /// Kept: init takes its closing for a goodbye.
    _outgoing: OwnedWriteHalf,
}

/// A command that runs in a guest beside the app.
#[derive(Debug)]
pub struct Exec {
    /// The input side.
    pub inputs: ExecInputs,
    /// The output side.
    pub outputs: ExecOutputs,
}

/// The output side of an [`Exec`].
#[derive(Debug)]
pub struct ExecOutputs {
    incoming: Incoming,
    /// The Machine is of use until its output has been read.
    _session: Option<Session>,
}

/// The input side of an [`Exec`].
#[derive(Debug)]
pub struct ExecInputs {
    outgoing: OwnedWriteHalf,
}

/// What an [`Exec`] says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecOutput {
    /// Bytes of its standard output, or of its terminal.
    Stdout(Vec<u8>),
    /// Bytes of its standard error.
    Stderr(Vec<u8>),
    /// It has ended; nothing follows.
    Exit(ExitStatus),
}

#[derive(Debug)]
struct Incoming {
    half: OwnedReadHalf,
    decoder: Decoder,
    buffer: Vec<u8>,
}

impl Guest {
    pub(crate) fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// Asks something that has one answer.
    pub(crate) async fn ask(
        &self,
        request: &Request,
        limit: Duration,
    ) -> Result<Reply, GuestError> {
        self.ask_then(|| request.clone(), limit, || {}).await
    }

    /// Asks something that is only decided when the guest listens, such as what time it is.
    async fn ask_then(
        &self,
        request: impl FnOnce() -> Request,
        limit: Duration,
        connected: impl FnOnce(),
    ) -> Result<Reply, GuestError> {
        let exchange = async {
            let stream = self.connect().await?;
            connected();
            let (mut incoming, _outgoing) = open(stream, request, READ).await?;
            let frame = incoming.frame().await?.ok_or(GuestError::NoAnswer)?;
            match frame.parse()? {
                Reply::Error { message } => Err(GuestError::Refused(message)),
                reply => Ok(reply),
            }
        };
        tokio::time::timeout(limit, exchange)
            .await
            .unwrap_or(Err(GuestError::Late(limit)))
    }

    /// Asks again until there is an answer. Only being refused is final. What is asked is decided anew each
    /// time, when the guest listens. `monitor_is_up` is called once, as soon as the monitor takes connections for the
    /// guest, which it does when all its devices are open.
    pub(crate) async fn insist(
        &self,
        request: impl Fn() -> Request,
        limit: Duration,
        monitor_is_up: impl FnOnce(),
    ) -> Result<Reply, GuestError> {
        let mut monitor_is_up = Some(monitor_is_up);
        let until = tokio::time::Instant::now() + limit;
        let mut pause = FIRST_PAUSE;
        loop {
            let left = until.saturating_duration_since(tokio::time::Instant::now());
            let connected = || {
                if let Some(told) = monitor_is_up.take() {
                    told();
                }
            };
            match self.ask_then(&request, left, connected).await {
                Err(GuestError::Connect(_) | GuestError::Broken(_) | GuestError::NoAnswer)
                    if left > pause =>
                {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                outcome => return outcome,
            }
        }
    }

    /// How it is doing.
    pub(crate) async fn status(&self) -> Result<Status, GuestError> {
        match self.ask(&Request::Status, QUICK).await? {
            Reply::Status(status) => Ok(status),
            _ => Err(GuestError::NoAnswer),
        }
    }

    /// Reports what happens, and the app's output from this line on.
    pub(crate) async fn attach(&self, from: u64) -> Result<Attached, GuestError> {
        let request = Request::Attach { from };
        let open = async { open(self.connect().await?, || request, READ).await };
        let (incoming, outgoing) = tokio::time::timeout(QUICK, open)
            .await
            .unwrap_or(Err(GuestError::Late(QUICK)))?;
        Ok(Attached {
            incoming,
            _outgoing: outgoing,
        })
    }

    /// Runs a command beside the app.
    pub(crate) async fn exec(&self, request: ExecRequest) -> Result<Exec, GuestError> {
        let request = Request::Exec(request);
        let open = async { open(self.connect().await?, || request, READ_EXEC).await };
        let (incoming, outgoing) = tokio::time::timeout(QUICK, open)
            .await
            .unwrap_or(Err(GuestError::Late(QUICK)))?;
        Ok(Exec {
            inputs: ExecInputs { outgoing },
            outputs: ExecOutputs {
                incoming,
                _session: None,
            },
        })
    }

    async fn connect(&self) -> Result<UnixStream, GuestError> {
        let stream = UnixStream::connect(&self.socket).await;
        stream.map_err(GuestError::Connect)
    }
}

/// Goes through to the guest's init, and tells it what is wanted.
async fn open(
    mut stream: UnixStream,
    request: impl FnOnce() -> Request,
    read: usize,
) -> Result<(Incoming, OwnedWriteHalf), GuestError> {
    let hello = format!("CONNECT {GUEST_PORT}\n");
    stream
        .write_all(hello.as_bytes())
        .await
        .map_err(GuestError::Connect)?;
    accepted(&mut stream).await.map_err(GuestError::Connect)?;
    let mut wire = Encoder::new();
    wire.json(&request())?;
    stream.write_all(wire.wire()).await?;
    let (half, outgoing) = stream.into_split();
    let incoming = Incoming {
        half,
        decoder: Decoder::new(),
        buffer: vec![0; read],
    };
    Ok((incoming, outgoing))
}

/// Reads `OK <n>`, and not a byte more.
async fn accepted(stream: &mut UnixStream) -> io::Result<()> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        if line.len() == MAX_OK {
            return Err(io::Error::other("the monitor's answer is too long"));
        }
        line.push(stream.read_u8().await?);
    }
    if line.starts_with(b"OK ") {
        Ok(())
    } else {
        Err(io::Error::other("the guest does not listen"))
    }
}

impl Attached {
    /// The next event; `None` when the connection has ended.
    pub(crate) async fn next(&mut self) -> Result<Option<Event>, GuestError> {
        match self.incoming.frame().await? {
            Some(frame) => Ok(Some(frame.parse()?)),
            None => Ok(None),
        }
    }
}

impl Exec {
    /// Has a session last until this has ended.
    pub(crate) fn within(mut self, session: Session) -> Self {
        self.outputs._session = Some(session);
        self
    }

    /// Gives the command this input and its end, passes on what it says, and returns how it ended: `Ok(None)` when
    /// the guest went away before that.
    ///
    /// Both go on at once: a guest whose output nobody takes soon takes no more input. And only the output decides:
    /// a command may end without having read its input, which then cannot be written.
    pub async fn run(
        mut self,
        stdin: &[u8],
        mut said: impl FnMut(ExecOutput),
    ) -> Result<Option<ExitStatus>, GuestError> {
        let feed = async {
            let _ = self.inputs.all_stdin(stdin).await;
            // The input side stays open: init takes its closing for the wish to end the command.
            std::future::pending::<Infallible>().await
        };
        let listen = async {
            loop {
                match self.outputs.next().await? {
                    Some(ExecOutput::Exit(status)) => return Ok(Some(status)),
                    Some(output) => said(output),
                    None => return Ok(None),
                }
            }
        };
        tokio::select! {
            never = feed => match never {},
            ended = listen => ended,
        }
    }
}

impl ExecOutputs {
    /// What it says next. `Ok(None)` when the guest went away before the command ended.
    pub async fn next(&mut self) -> Result<Option<ExecOutput>, GuestError> {
        let Some(frame) = self.incoming.frame().await? else {
            return Ok(None);
        };
        match frame.kind {
            FrameKind::Stdout => Ok(Some(ExecOutput::Stdout(frame.payload))),
            FrameKind::Stderr => Ok(Some(ExecOutput::Stderr(frame.payload))),
            FrameKind::Json => match frame.parse()? {
                Reply::Exit(status) => Ok(Some(ExecOutput::Exit(status))),
                Reply::Error { message } => Err(GuestError::Refused(message)),
                Reply::Ok | Reply::Status(_) => Err(GuestError::NoAnswer),
            },
            FrameKind::Stdin => Err(GuestError::NoAnswer),
        }
    }
}

impl ExecInputs {
    async fn all_stdin(&mut self, bytes: &[u8]) -> Result<(), GuestError> {
        for frame in bytes.chunks(MAX_PAYLOAD) {
            self.stdin(frame).await?;
        }
        self.stdin(&[]).await
    }

    /// Bytes for its standard input; none at all close it.
    pub async fn stdin(&mut self, bytes: &[u8]) -> Result<(), GuestError> {
        let mut wire = Encoder::new();
        wire.raw(FrameKind::Stdin, bytes);
        Ok(self.outgoing.write_all(wire.wire()).await?)
    }

    /// A new window size, or a signal.
    pub async fn control(&mut self, input: &tern_guest::ExecInput) -> Result<(), GuestError> {
        let mut wire = Encoder::new();
        wire.json(input)?;
        Ok(self.outgoing.write_all(wire.wire()).await?)
    }
}

impl Incoming {
    async fn frame(&mut self) -> Result<Option<Frame>, GuestError> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(Some(frame));
            }
            match self.half.read(&mut self.buffer).await? {
                0 => return Ok(None),
                length => self.decoder.feed(&self.buffer[..length]),
            }
        }
    }
}

/// Read at once: some lines of output.
const READ: usize = 4 * 1024;
/// Read at once of a command, which may write a whole database.
const READ_EXEC: usize = MAX_PAYLOAD;
/// `OK ` and a number of 32 bits.
const MAX_OK: usize = 32;
/// What init answers at once, in a host that may be busy and emulated.
pub(crate) const QUICK: Duration = Duration::from_secs(10);
/// Between two attempts to reach a guest that does not listen yet: short, for one that resumes is there in
/// milliseconds, and whoever woke it waits.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests;
