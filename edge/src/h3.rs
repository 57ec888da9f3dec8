//! Clients' HTTP/3 connections (RFC 9114): `quinn` carries, the `h3` crate frames, each stream is one exchange.
//! All of a connection's streams run in its own task, and end with it.
//!
//! 0-RTT is off: what comes early may have been sent before (RFC 8470). Extended CONNECT is not offered, for
//! `h3` 0.0.8 knows no WebSocket (RFC 9220).

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use ::h3::error::{Code, StreamError};
use ::h3::server::{RequestResolver, RequestStream};
use bytes::{Buf as _, Bytes};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use http::{HeaderMap, HeaderName, Method, Response, Version};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{
    Endpoint, EndpointConfig, Incoming, ServerConfig, TokioRuntime, TransportConfig, VarInt,
};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use crate::entrance::Entrance;
use crate::frames::{self, Guarded};
use crate::limits::Limits;
use crate::message::{Length, Piece};
use crate::pages::Page;
use crate::quic::{CidGenerator, Share};
use crate::relay::{self, Client, Ended, Gone, Reply};
use crate::timer::Timer;
use crate::worker::Worker;
use crate::{h2, headers};

/// Streams of one connection at once.
const MAX_STREAMS: u32 = 256;
/// Streams of one connection, one after the other.
const MAX_STREAMS_IN_ALL: u32 = 100_000;
/// A client's control and QPACK streams (RFC 9114 section 6.2), and a few that it may try us with.
const MAX_UNI_STREAMS: u32 = 16;
/// Content of requests that a client may send ahead of the app, per stream and per connection.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Content of replies that waits for a slow reader or an acknowledgement, per connection.
const SEND_WINDOW: u64 = 2 << 20;
/// Heads beyond our own limit are read to the end, so that our page can say what is wrong; beyond this one
/// `h3` answers by itself.
const MAX_FIELD_SECTION: u64 = frames::MAX_FRAME;
/// Content given before it is handed over.
const GATHERED: usize = 64 << 10;
/// Connections of one thread from which on a client has to show first that it is where it says it is (RFC 9000
/// section 8.1.2): its first packet alone then costs us no handshake.
const RETRY_FROM: usize = 1024;
/// Connections of one thread at once.
const MAX_CONNECTIONS: usize = 8192;
/// Content that nobody wants is read for so long, and so much of it.
const LINGER: Duration = Duration::from_secs(5);
const LINGER_BYTES: usize = 1 << 20;
/// A connection that was told to end has this long to fetch its last replies.
const LAST_REPLIES: Duration = Duration::from_secs(10);
/// A request that is silent for long is not to be taken for a client that is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
const GOODBYE: Duration = Duration::from_secs(5);

type Quic = Guarded<h3_quinn::Connection>;
type Http3Connection = ::h3::server::Connection<Quic, Bytes>;
type Resolver = RequestResolver<Quic, Bytes>;
type SendHalf = RequestStream<h3_quinn::SendStream<Bytes>, Bytes>;
type ReceiveHalf = RequestStream<Guarded<h3_quinn::RecvStream>, Bytes>;

/// One thread's end of an address.
pub fn endpoint(
    socket: std::net::UdpSocket,
    tls: Arc<rustls::ServerConfig>,
    limits: &Limits,
    share: Share,
) -> io::Result<Endpoint> {
    let crypto = QuicServerConfig::try_from(tls).map_err(io::Error::other)?;
    let mut transport = TransportConfig::default();
    // A request may be silent for its service's idle time; connections without one are ours to end.
    let longest = limits.idle.max(limits.keep_alive) + GOODBYE;
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(MAX_STREAMS))
        .max_concurrent_uni_streams(VarInt::from_u32(MAX_UNI_STREAMS))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(SEND_WINDOW)
        .datagram_receive_buffer_size(None)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(Some(longest.try_into().map_err(io::Error::other)?));
    let mut server = ServerConfig::with_crypto(Arc::new(crypto));
    server.transport_config(Arc::new(transport));
    let mut config = EndpointConfig::default();
    config.cid_generator(move || Box::new(CidGenerator::new(share)));
    Endpoint::new(config, Some(server), socket, Arc::new(TokioRuntime))
}

/// Accepts until the edge is to end.
pub async fn accept(
    endpoint: Endpoint,
    entrance: Entrance,
    worker: Rc<Worker>,
    connections: tokio_util::task::TaskTracker,
) {
    loop {
        let incoming = tokio::select! {
            incoming = endpoint.accept() => incoming,
            () = worker.ending.cancelled() => None,
        };
        let Some(incoming) = incoming else {
            break;
        };
        let open = endpoint.open_connections();
        if open >= MAX_CONNECTIONS {
            incoming.refuse();
        } else if open >= RETRY_FROM && !incoming.remote_address_validated() && incoming.may_retry()
        {
            if let Err(error) = incoming.retry() {
                tracing::debug!(%error, "a client could not be asked to try again");
            }
        } else {
            worker.metrics.connections.add();
            let open = worker.metrics.open_connections.count();
            let serving = serve(incoming, entrance, Rc::clone(&worker));
            connections.spawn_local(async move {
                serving.await;
                drop(open);
            });
        }
    }
    // Those that are open go on; new ones find nobody.
    endpoint.set_server_config(None);
}

async fn serve(incoming: Incoming, entrance: Entrance, worker: Rc<Worker>) {
    let client = incoming.remote_address().ip();
    let handshake = async {
        let connection = incoming.accept()?.await?;
        let http3 = ::h3::server::builder()
            .max_field_section_size(MAX_FIELD_SECTION)
            .build(Guarded::new(h3_quinn::Connection::new(connection.clone())))
            .await?;
        Ok::<_, Box<dyn std::error::Error>>((connection, http3))
    };
    let (connection, mut http3) = match timeout(worker.limits.handshake, handshake).await {
        Ok(Ok(both)) => both,
        Ok(Err(error)) => {
            worker.metrics.tls_failures.add();
            tracing::debug!(%error, %client, "QUIC handshake failed");
            return;
        }
        Err(_) => return worker.metrics.tls_failures.add(),
    };
    // The handshake has shown that the address is the client's.
    let Some(_place) = worker.quic_places.try_take(client) else {
        worker.metrics.connections_refused.add();
        connection.close(
            Code::H3_EXCESSIVE_LOAD
                .value()
                .try_into()
                .unwrap_or_default(),
            b"",
        );
        return;
    };
    let facts = Rc::new(relay::Connection::new(client, entrance));
    let last = streams(&mut http3, &worker, &facts).await;
    let wait = last.map_or(Duration::ZERO, |at| {
        LAST_REPLIES.saturating_sub(at.elapsed())
    });
    // A client that is done says so itself; closing sooner could take the last replies back.
    let closed = timeout(wait, connection.closed()).await;
    if closed.is_err() {
        connection.close(
            Code::H3_NO_ERROR.value().try_into().unwrap_or_default(),
            b"",
        );
    }
}

/// Serves a connection's streams until it ends, or was told to and has none. Tells when the last was over.
async fn streams(
    http3: &mut Http3Connection,
    worker: &Rc<Worker>,
    facts: &Rc<relay::Connection>,
) -> Option<Instant> {
    let mut streams = FuturesUnordered::new();
    let mut ending = false;
    let mut accepted_streams = 0_u32;
    let mut last = None;
    loop {
        tokio::select! {
            accepted = http3.accept() => match accepted {
                // One more than GOAWAY lets through.
                Ok(Some(_)) if ending => {}
                Ok(Some(resolver)) => {
                    accepted_streams += 1;
                    // `h3` remembers each that brings no head, for as long as the connection lives.
                    ending = accepted_streams >= MAX_STREAMS_IN_ALL;
                    streams.push(stream(resolver, Rc::clone(worker), Rc::clone(facts)));
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::debug!(%error, "an HTTP/3 connection ended");
                    break;
                }
            },
            Some(()) = streams.next(), if !streams.is_empty() => last = Some(Instant::now()),
            () = worker.ending.cancelled(), if !ending => ending = true,
            () = sleep(worker.limits.keep_alive), if streams.is_empty() => ending = true,
        }
        if ending {
            // GOAWAY names the first request that is not served (RFC 9114 section 5.2); said again, it costs nothing.
            if http3.shutdown(1).await.is_err() || streams.is_empty() {
                break;
            }
        }
    }
    last
}

/// One stream's exchange.
async fn stream(resolver: Resolver, worker: Rc<Worker>, facts: Rc<relay::Connection>) {
    let resolved = timeout(worker.limits.head, resolver.resolve_request()).await;
    let (parts, stream) = match resolved {
        Ok(Ok((request, stream))) => (request.into_parts().0, stream),
        Ok(Err(error)) => {
            worker.metrics.refused.add();
            tracing::debug!(%error, "an HTTP/3 request could not be read");
            return;
        }
        Err(_) => return,
    };
    let (send, receive) = stream.split();
    let mut client = Http3 {
        send: Sender::Idle(Box::new(send)),
        receive,
        first: None,
        over: false,
        unseen: None,
        given: VecDeque::new(),
        gathered: 0,
    };
    let mut timer = Timer::new(worker.limits.idle);
    // Whether there is content is told by the stream's end alone, which comes with the head as a rule.
    let usual = matches!(parts.method, Method::POST | Method::PUT | Method::PATCH);
    if !usual && client.peek(&mut timer).await.is_err() {
        return;
    }
    let ended = match h2::head(
        parts,
        client.over && client.first.is_none(),
        Version::HTTP_3,
    ) {
        Ok(head) => {
            if let Length::Exact(length) = head.length {
                client.unseen = Some(length);
            }
            relay::exchange(&worker, &facts, &mut client, &mut timer, &head).await
        }
        Err(bad) => {
            worker.metrics.refused.add();
            Page::from(bad).send(&mut client, &mut timer, None).await
        }
    };
    client.end(ended, &mut timer).await;
}

/// A stream, as the relay's client.
struct Http3 {
    send: Sender,
    receive: ReceiveHalf,
    /// A piece that was read to see whether there is one.
    first: Option<Bytes>,
    /// All of the request was read.
    over: bool,
    /// What has not been seen of the length that the head told. `h3` does not count (RFC 9114 section 4.1.2), and an
    /// app would take what is too much for its next request.
    unseen: Option<u64>,
    given: VecDeque<Given>,
    /// Bytes of content among what is given.
    gathered: usize,
}

/// What is to be sent.
enum Given {
    Head(Box<Response<()>>),
    Data(Bytes),
    Trailers(Box<HeaderMap>),
    End,
}

/// The sending half, which is lent to what is being sent.
enum Sender {
    Idle(Box<SendHalf>),
    Busy {
        sending: Pin<Box<dyn Future<Output = Result<Box<SendHalf>, StreamError>>>>,
        /// Has it reset the stream instead: dropping the half would end it as if all were sent.
        cancel: oneshot::Sender<()>,
    },
    Lost,
}

async fn send(
    mut stream: Box<SendHalf>,
    all: VecDeque<Given>,
    cancelled: oneshot::Receiver<()>,
) -> Result<Box<SendHalf>, StreamError> {
    let sent = async {
        for given in all {
            match given {
                Given::Head(head) => stream.send_response(*head).await?,
                Given::Data(data) => stream.send_data(data).await?,
                Given::Trailers(trailers) => stream.send_trailers(*trailers).await?,
                Given::End => stream.finish().await?,
            }
        }
        Ok(())
    };
    let sent = tokio::select! {
        biased;
        Ok(()) = cancelled => None,
        sent = sent => Some(sent),
    };
    match sent {
        Some(sent) => sent.map(|()| stream),
        None => {
            stream.stop_stream(Code::H3_INTERNAL_ERROR);
            Ok(stream)
        }
    }
}

fn gone(error: &StreamError) -> Gone {
    tracing::debug!(%error, "an HTTP/3 client is gone");
    Gone::Closed
}

impl Http3 {
    /// Waits until there is content, or will be none.
    async fn peek(&mut self, timer: &mut Timer) -> Result<(), Gone> {
        poll_fn(|cx| match self.poll_receive(cx) {
            Poll::Ready(received) => {
                self.first = received?;
                Poll::Ready(Ok(()))
            }
            Poll::Pending => timer.poll(cx).map(|()| Err(Gone::Closed)),
        })
        .await
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Gone>> {
        if self.over {
            return Poll::Ready(Ok(None));
        }
        let received = ready!(self.receive.poll_recv_data(cx)).map_err(|e| gone(&e))?;
        let data = received.map(|mut data| data.copy_to_bytes(data.remaining()));
        self.over = data.is_none();
        Poll::Ready(Ok(data))
    }

    /// Ends what is still open of the stream. Content that nobody wants is read for a while, for dropping it unread
    /// says STOP_SENDING with code 0, for which some clients give a whole reply up (hyperium/h3#321); a code of ours
    /// cannot be said, because `h3-quinn` 0.0.10 panics when a read is pending (hyperium/h3#361).
    async fn end(&mut self, ended: Ended, timer: &mut Timer) {
        if ended == Ended::Broken {
            match std::mem::replace(&mut self.send, Sender::Lost) {
                Sender::Idle(mut send) => send.stop_stream(Code::H3_INTERNAL_ERROR),
                Sender::Busy { sending, cancel } => {
                    // It may have ended with an error of its own.
                    let _ = cancel.send(());
                    let _ = sending.await;
                }
                Sender::Lost => {}
            }
            return;
        }
        timer.set(LINGER);
        let mut left = LINGER_BYTES;
        poll_fn(|cx| {
            while left > 0 {
                match self.poll_receive(cx) {
                    Poll::Ready(Ok(Some(data))) => left = left.saturating_sub(data.len()),
                    Poll::Ready(Ok(None) | Err(_)) => break,
                    Poll::Pending => return timer.poll(cx),
                }
            }
            Poll::Ready(())
        })
        .await;
    }

    fn give(&mut self, given: Given) {
        if let Given::Data(data) = &given {
            self.gathered += data.len();
        }
        self.given.push_back(given);
    }
}

impl Client for Http3 {
    fn poll_content(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, Gone>> {
        let data = match self.first.take() {
            Some(data) => Some(data),
            None => ready!(self.poll_receive(cx))?,
        };
        if let Some(data) = data {
            if let Some(unseen) = &mut self.unseen {
                *unseen = unseen
                    .checked_sub(data.len() as u64)
                    .ok_or(Gone::Malformed)?;
            }
            return Poll::Ready(Ok(Piece::Data(data, false)));
        }
        if self.unseen.is_some_and(|left| left > 0) {
            return Poll::Ready(Err(Gone::Malformed));
        }
        self.receive
            .poll_recv_trailers(cx)
            .map(|trailers| trailers.map(Piece::End).map_err(|e| gone(&e)))
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        let room = matches!(self.send, Sender::Idle(_)) && self.gathered < GATHERED;
        if room {
            Poll::Ready(Ok(()))
        } else {
            self.poll_flush(cx)
        }
    }

    fn takes_interim(&self) -> bool {
        true
    }

    fn begin(&mut self, reply: &Reply<'_>) -> Result<(), Gone> {
        self.give(Given::Head(Box::new(h2::response(reply))));
        if reply.ends_here() {
            self.give(Given::End);
        }
        Ok(())
    }

    fn give(&mut self, data: Bytes, last: bool) -> Result<(), Gone> {
        if !data.is_empty() {
            Self::give(self, Given::Data(data));
        }
        if last {
            Self::give(self, Given::End);
        }
        Ok(())
    }

    fn finish(&mut self, trailers: Option<HeaderMap>) -> Result<(), Gone> {
        if let Some(mut trailers) = trailers {
            let names: Vec<HeaderName> = trailers.keys().cloned().collect();
            for name in names.iter().filter(|n| !headers::may_trail(n.as_str())) {
                trailers.remove(name);
            }
            Self::give(self, Given::Trailers(Box::new(trailers)));
        }
        Self::give(self, Given::End);
        Ok(())
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        loop {
            match std::mem::replace(&mut self.send, Sender::Lost) {
                Sender::Idle(stream) if self.given.is_empty() => {
                    self.send = Sender::Idle(stream);
                    return Poll::Ready(Ok(()));
                }
                Sender::Idle(stream) => {
                    self.gathered = 0;
                    let all = std::mem::take(&mut self.given);
                    let (cancel, cancelled) = oneshot::channel();
                    let sending = Box::pin(send(stream, all, cancelled));
                    self.send = Sender::Busy { sending, cancel };
                }
                Sender::Busy {
                    mut sending,
                    cancel,
                } => match sending.as_mut().poll(cx) {
                    Poll::Ready(Ok(stream)) => self.send = Sender::Idle(stream),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(gone(&error))),
                    Poll::Pending => {
                        self.send = Sender::Busy { sending, cancel };
                        return Poll::Pending;
                    }
                },
                Sender::Lost => return Poll::Ready(Err(Gone::Closed)),
            }
        }
    }

    /// Learnt when writing, or from the connection's end: `h3` tells nothing of a stream that waits.
    fn poll_gone(&mut self, _: &mut Context<'_>) -> Poll<Gone> {
        Poll::Pending
    }
}
