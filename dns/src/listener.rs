//! One address, served over UDP and TCP (RFC 7766).
//!
//! What the catalog answers is answered on the spot. Only questions to upstream take time, and their
//! number is bounded; so are connections, how long they may be silent, and what waits on each.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tern_catalog::{INFRASTRUCTURE, NetworkId, View};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::forward::{Forwarder, Start};
use crate::quota::{Quota, Share};
use crate::reply::{Decision, Responder, Transport};

/// Questions are a few hundred bytes at most; a longer one is cut, and refused as malformed.
const LONGEST_QUESTION: usize = 4096;
/// Connections at once, in all and from one network.
const CONNECTIONS: (usize, usize) = (512, 64);
/// A connection that is silent for so long is closed.
const SILENCE: Duration = Duration::from_secs(10);
/// Answers that may wait for a client to read.
const WAITING: usize = 16;
/// Pause after the kernel would not accept a connection, for lack of descriptors mostly.
const BREATH: Duration = Duration::from_millis(100);
const BACKLOG: i32 = 128;

/// What all listeners share.
pub(crate) struct Context {
    view: View,
    responder: Responder,
    forwarder: Forwarder,
    connections: Arc<Quota>,
}

/// Both sockets of one address.
pub(crate) struct Listener {
    udp: UdpSocket,
    tcp: TcpListener,
}

impl Context {
    pub(crate) fn new(view: View, responder: Responder, forwarder: Forwarder) -> Self {
        Self {
            view,
            responder,
            forwarder,
            connections: Quota::new(CONNECTIONS.0, CONNECTIONS.1),
        }
    }

    pub(crate) fn forwarder(&self) -> &Forwarder {
        &self.forwarder
    }

    fn decide(&self, from: SocketAddr, transport: Transport, message: &[u8]) -> Decision {
        (self.responder).decide(&self.view.snapshot(), from, transport, message)
    }
}

impl Listener {
    /// Binds an address, which need not be there yet. With port 0 both get the same free one.
    pub(crate) fn bind(address: SocketAddr) -> io::Result<Self> {
        let udp = socket(address, Type::DGRAM, Protocol::UDP)?;
        let udp = UdpSocket::from_std(udp.into())?;
        let tcp = socket(udp.local_addr()?, Type::STREAM, Protocol::TCP)?;
        tcp.listen(BACKLOG)?;
        let tcp = TcpListener::from_std(tcp.into())?;
        Ok(Self { udp, tcp })
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.udp.local_addr()
    }

    /// Serves until cancelled.
    pub(crate) fn serve(self, context: &Arc<Context>, stop: &CancellationToken) {
        let udp = serve_udp(Arc::new(self.udp), Arc::clone(context), stop.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(udp));
        let tcp = serve_tcp(self.tcp, Arc::clone(context), stop.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(tcp));
    }
}

async fn serve_udp(socket: Arc<UdpSocket>, context: Arc<Context>, stop: CancellationToken) {
    let mut buffer = vec![0; LONGEST_QUESTION];
    loop {
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!(%error, "receiving a question failed");
                tokio::time::sleep(BREATH).await;
                continue;
            }
        };
        let answer = match context.decide(from, Transport::Udp, &buffer[..length]) {
            Decision::Ignore => continue,
            Decision::Answer(answer) => answer,
            Decision::Forward(question) => match context.forwarder.start(question) {
                Start::Answer(answer) => answer,
                Start::Ask(pending) => {
                    let (socket, context) = (Arc::clone(&socket), Arc::clone(&context));
                    let asking = async move {
                        let answer = context.forwarder.finish(pending).await;
                        send(&socket, &answer, from).await;
                    };
                    tokio::spawn(stop.clone().run_until_cancelled_owned(asking));
                    continue;
                }
            },
        };
        send(&socket, &answer, from).await;
    }
}

async fn send(socket: &UdpSocket, answer: &[u8], to: SocketAddr) {
    // A lost answer is asked for again.
    if let Err(error) = socket.send_to(answer, to).await {
        tracing::debug!(%error, %to, "an answer was not sent");
    }
}

async fn serve_tcp(listener: TcpListener, context: Arc<Context>, stop: CancellationToken) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                // Who has too many is closed: a share for each network leaves room for others.
                if let Some(share) = context.connections.take(network(from)) {
                    let connection = connection(stream, from, Arc::clone(&context), share);
                    tokio::spawn(stop.clone().run_until_cancelled_owned(connection));
                }
            }
            Err(error) => {
                tracing::debug!(%error, "accepting a connection failed");
                tokio::time::sleep(BREATH).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, from: SocketAddr, context: Arc<Context>, _share: Share) {
    let (reader, writer) = stream.into_split();
    let (answers, waiting) = mpsc::channel(WAITING);
    tokio::join!(
        read(reader, from, &context, answers),
        write(writer, waiting)
    );
}

/// Reads questions and answers them, in whatever order answers come.
async fn read(
    mut reader: OwnedReadHalf,
    from: SocketAddr,
    context: &Arc<Context>,
    answers: mpsc::Sender<Vec<u8>>,
) {
    let mut buffer = vec![0; LONGEST_QUESTION];
    while let Ok(Ok(length)) = timeout(SILENCE, read_question(&mut reader, &mut buffer)).await {
        let answer = match context.decide(from, Transport::Tcp, &buffer[..length]) {
            Decision::Ignore => return,
            Decision::Answer(answer) => answer,
            Decision::Forward(question) => match context.forwarder.start(question) {
                Start::Answer(answer) => answer,
                Start::Ask(pending) => {
                    let (context, answers) = (Arc::clone(context), answers.clone());
                    tokio::spawn(async move {
                        let answer = context.forwarder.finish(pending).await;
                        // The client may have gone.
                        let _ = answers.send(answer).await;
                    });
                    continue;
                }
            },
        };
        if answers.send(answer).await.is_err() {
            return;
        }
    }
}

async fn read_question(reader: &mut OwnedReadHalf, buffer: &mut [u8]) -> io::Result<usize> {
    let length = usize::from(reader.read_u16().await?);
    let Some(place) = buffer.get_mut(..length) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    reader.read_exact(place).await
}

async fn write(mut writer: OwnedWriteHalf, mut answers: mpsc::Receiver<Vec<u8>>) {
    while let Some(answer) = answers.recv().await {
        let Ok(length) = u16::try_from(answer.len()) else {
            return;
        };
        let framed = [&length.to_be_bytes()[..], &answer].concat();
        if !matches!(
            timeout(SILENCE, writer.write_all(&framed)).await,
            Ok(Ok(()))
        ) {
            return;
        }
    }
}

fn socket(address: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(address),
        kind.nonblocking(),
        Some(protocol),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        // The mesh gives the address to its device, before or after.
        socket.set_freebind_v6(true)?;
    }
    if kind == Type::STREAM {
        // Connections of a run before linger for a minute.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

fn network(from: SocketAddr) -> NetworkId {
    match from.ip() {
        IpAddr::V6(v6) => NetworkId::of(v6).unwrap_or(INFRASTRUCTURE),
        IpAddr::V4(_) => INFRASTRUCTURE,
    }
}
