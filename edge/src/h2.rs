//! A client's HTTP/2 connection (RFC 9113): the `h2` crate frames, each stream is one exchange. All of them
//! run in the connection's own task, and end with it.

use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{FuturesUnordered, Stream as _};
use h2::ext::Protocol;
use h2::server::{self, SendResponse};
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Method, Request, Response, StatusCode, Version, request};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use crate::connections::Open;
use crate::entrance::Entrance;
use crate::h1::head::{BadHead, MAX_FIELDS, MAX_HEAD_BYTES, is_token};
use crate::message::{Fields, Length, Piece, RequestHead, Upgrade};
use crate::pages::Page;
use crate::relay::{self, Client, Ended, Gone, Reply, pool};
use crate::timer::Timer;
use crate::worker::Worker;

/// Streams of one connection at once; nginx allows 128.
const MAX_STREAMS: u32 = 256;
/// A connection that was told to end has this long to do so.
const GOODBYE: Duration = Duration::from_secs(5);
/// Content of requests that a client may send ahead of the app, per stream and per connection.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Content of replies that waits for a slow reader, per stream.
const SEND_BUFFER: usize = 128 << 10;
/// Heads beyond our own limit are read to the end, so that our page can say what is wrong; beyond this one
/// `h2` answers by itself.
const MAX_HEADER_LIST: u32 = 4 * MAX_HEAD_BYTES as u32;

/// Serves a connection until it ends.
pub async fn serve<S>(io: S, client: IpAddr, entrance: Entrance, open: Open, worker: Rc<Worker>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut builder = server::Builder::new();
    builder
        .max_concurrent_streams(MAX_STREAMS)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEADER_LIST)
        .max_send_buffer_size(SEND_BUFFER)
        .enable_connect_protocol();
    let handshake = timeout(worker.limits.handshake, builder.handshake::<_, Bytes>(io));
    let Ok(Ok(mut connection)) = handshake.await else {
        return;
    };
    let facts = Rc::new(relay::Connection::new(client, entrance));
    let mut streams = FuturesUnordered::new();
    let mut timer = Timer::new(worker.limits.keep_alive);
    let mut told_to_end = false;
    open.is_idle();
    let ending = open.ending().cancelled();
    tokio::pin!(ending);
    poll_fn(|cx| {
        if !told_to_end && ending.as_mut().poll(cx).is_ready() {
            told_to_end = true;
            connection.graceful_shutdown();
            timer.set(GOODBYE);
        }
        loop {
            // Streams first: what they give is written by the connection's own turn below.
            while let Poll::Ready(Some(())) = Pin::new(&mut streams).poll_next(cx) {
                if streams.is_empty() {
                    open.is_idle();
                    timer.set(if told_to_end {
                        GOODBYE
                    } else {
                        worker.limits.keep_alive
                    });
                }
            }
            match connection.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, respond)))) => {
                    let (worker, facts) = (Rc::clone(&worker), Rc::clone(&facts));
                    open.is_busy();
                    streams.push(stream(request, respond, worker, facts));
                }
                Poll::Ready(Some(Err(error))) => {
                    tracing::debug!(%error, "an HTTP/2 connection ended");
                    return Poll::Ready(());
                }
                Poll::Ready(None) => return Poll::Ready(()),
                Poll::Pending => break,
            }
        }
        if streams.is_empty() {
            while timer.poll(cx).is_ready() {
                if told_to_end {
                    return Poll::Ready(());
                }
                told_to_end = true;
                connection.graceful_shutdown();
                cx.waker().wake_by_ref();
                timer.set(GOODBYE);
            }
        }
        Poll::Pending
    })
    .await;
}

/// One stream's exchange.
async fn stream(
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
    worker: Rc<Worker>,
    facts: Rc<relay::Connection>,
) {
    let (parts, receive) = request.into_parts();
    let mut client = Http2 {
        respond,
        send: None,
        receive,
        waiting: Bytes::new(),
        last: false,
    };
    let mut timer = Timer::new(worker.limits.idle);
    let no_content = client.receive.is_end_stream();
    let ended = match head(parts, no_content, Version::HTTP_2) {
        Ok(head) => relay::exchange(&worker, &facts, &mut client, &mut timer, &head).await,
        Err(bad) => {
            worker.metrics.refused.add();
            Page::from(bad).send(&mut client, &mut timer, None).await
        }
    };
    if ended == Ended::Broken {
        match &mut client.send {
            Some(send) => send.send_reset(Reason::INTERNAL_ERROR),
            None => client.respond.send_reset(Reason::INTERNAL_ERROR),
        }
    }
}

/// A request's head, of HTTP/2 or 3: what their own crates have not looked at is checked.
pub fn head(
    mut parts: request::Parts,
    no_content: bool,
    version: Version,
) -> Result<RequestHead, BadHead> {
    let protocol = parts.extensions.remove::<Protocol>();
    let connect = protocol.map(|p| Bytes::copy_from_slice(p.as_str().as_bytes()));
    if parts.method == Method::CONNECT && connect.is_none() {
        return Err(BadHead::Connect);
    }
    // It becomes a line of HTTP/1.1 at the app, and `h2` takes any text for it.
    if connect.as_ref().is_some_and(|p| !is_protocol(p)) {
        return Err(BadHead::Malformed);
    }
    let mut hosts = parts.headers.get_all(http::header::HOST).iter();
    let host = hosts.next().map(|h| Bytes::copy_from_slice(h.as_bytes()));
    if hosts.next().is_some() {
        return Err(BadHead::Ambiguous);
    }
    let authority = parts.uri.authority();
    let authority = authority.map(|a| Bytes::copy_from_slice(a.as_str().as_bytes()));
    let authority = match (authority, host) {
        // RFC 9113 section 8.3.1.
        (Some(authority), Some(host)) if !authority.eq_ignore_ascii_case(&host) => {
            return Err(BadHead::Ambiguous);
        }
        (Some(authority), _) => authority,
        (None, Some(host)) => host,
        (None, None) => return Err(BadHead::NoHost),
    };
    if authority.contains(&b'@') {
        return Err(BadHead::Malformed);
    }
    let target = match parts.uri.path_and_query() {
        Some(target) if target.as_str().starts_with(['/', '*']) => {
            Bytes::copy_from_slice(target.as_str().as_bytes())
        }
        _ => return Err(BadHead::Malformed),
    };
    if target.len() > MAX_HEAD_BYTES {
        return Err(BadHead::TargetTooLong);
    }
    let length = match parts.headers.get(http::header::CONTENT_LENGTH) {
        _ if connect.is_some() => Length::Tunnel,
        Some(told) => {
            let told = told.to_str().ok().and_then(|t| t.parse().ok());
            Length::Exact(told.ok_or(BadHead::Ambiguous)?)
        }
        None if no_content => Length::None,
        None => Length::Unknown,
    };
    let fields = Fields::Map(parts.headers);
    if fields.size() + target.len() > MAX_HEAD_BYTES || fields.iter().count() > MAX_FIELDS {
        return Err(BadHead::TooLarge);
    }
    let expects_continue = fields
        .all("expect")
        .any(|v| v.eq_ignore_ascii_case(b"100-continue"));
    Ok(RequestHead {
        method: parts.method,
        target,
        authority,
        version,
        length: if connect.is_some() {
            Length::None
        } else {
            length
        },
        fields,
        upgrade: connect.map(Upgrade::Connect),
        expects_continue,
    })
}

/// Whether apps may be asked to change to it: a token (RFC 8441 section 4), and not to HTTP/2, which would put
/// requests past the edge.
fn is_protocol(name: &[u8]) -> bool {
    !name.is_empty() && name.iter().all(|b| is_token(*b)) && !name.eq_ignore_ascii_case(b"h2c")
}

/// A stream, as the relay's client.
struct Http2 {
    respond: SendResponse<Bytes>,
    send: Option<SendStream<Bytes>>,
    receive: RecvStream,
    /// Content that waits for the client's window.
    waiting: Bytes,
    last: bool,
}

fn gone(_: h2::Error) -> Gone {
    Gone::Closed
}

/// The head of a reply in HTTP's own types.
pub fn response(reply: &Reply<'_>) -> Response<()> {
    let mut response = Response::new(());
    // A tunnel's 101 is HTTP/1.1's alone (RFC 8441 section 5).
    let status = if reply.status == 101 {
        200
    } else {
        reply.status
    };
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
    let map = response.headers_mut();
    map.reserve(16);
    reply.each(&mut |name, value| pool::append(map, name, value));
    if reply.status == 101 {
        // The answer to a key that HTTP/1.1 alone asked for.
        map.remove("sec-websocket-accept");
    }
    if let Length::Exact(length) = reply.length
        && !reply.is_interim()
    {
        map.insert(http::header::CONTENT_LENGTH, length.into());
    }
    response
}

impl Client for Http2 {
    fn poll_content(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, Gone>> {
        pool::poll_receive(&mut self.receive, cx).map_err(gone)
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        match &mut self.send {
            Some(send) => pool::poll_send(send, &mut self.waiting, self.last, cx).map_err(gone),
            None => Poll::Ready(Ok(())),
        }
    }

    fn takes_interim(&self) -> bool {
        true
    }

    fn begin(&mut self, reply: &Reply<'_>) -> Result<(), Gone> {
        let response = response(reply);
        if reply.is_interim() {
            return self.respond.send_informational(response).map_err(gone);
        }
        let ends = reply.ends_here() && reply.status != 101;
        let send = self.respond.send_response(response, ends).map_err(gone)?;
        self.send = (!ends).then_some(send);
        Ok(())
    }

    fn give(&mut self, data: Bytes, last: bool) -> Result<(), Gone> {
        self.last = last;
        match &mut self.send {
            Some(send) => pool::give(send, &mut self.waiting, data, last).map_err(gone),
            None => Ok(()),
        }
    }

    fn finish(&mut self, trailers: Option<HeaderMap>) -> Result<(), Gone> {
        match &mut self.send {
            Some(send) => pool::finish(send, trailers).map_err(gone),
            None => Ok(()),
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        self.poll_room(cx)
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Gone> {
        let reset = match &mut self.send {
            Some(send) => ready!(send.poll_reset(cx)),
            None => ready!(self.respond.poll_reset(cx)),
        };
        tracing::trace!(?reset, "the client gave its request up");
        Poll::Ready(Gone::Closed)
    }
}
