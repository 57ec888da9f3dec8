//! Connections to apps, kept by one thread and used again.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::{Future as _, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version};
use tokio::sync::OnceCell;
use tokio::time::timeout;

use super::sides::{App, Lost};
use crate::gate::Admission;
use crate::h1;
use crate::h1::head::MAX_HEAD_BYTES;
use crate::headers::{self, Facts};
use crate::message::{Fields, Length, Piece, ReplyHead, RequestHead};

/// An app that speaks HTTP/2 says so at once.
const HANDSHAKE: Duration = Duration::from_secs(2);
/// Idle connections to Machines are kept this long.
const KEEP: Duration = Duration::from_secs(30);
/// Idle connections kept to one address.
const KEPT: usize = 128;
/// Content of replies that an app may send ahead of its clients, per stream and per connection.
const H2_STREAM_WINDOW: u32 = 256 << 10;
const H2_CONNECTION_WINDOW: u32 = 4 << 20;

/// What `h2` charges an app's small frames that wait for slow clients, 256 bytes each, before it ends the connection for
/// all its requests: its default, half the window, is that of 8,000 events.
const SMALL_FRAMES: usize = 64 << 20;

/// Which connections are alike: those to one address, in one life of its Machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    pub address: SocketAddr,
    pub epoch: u64,
}

/// The connections of one thread.
#[derive(Default)]
pub struct Pool {
    idle: HashMap<Key, Vec<Idle>>,
    shared: HashMap<Key, (Shared, Instant)>,
}

/// A connection that many requests share, once the first of them has made it.
type Shared = Rc<OnceCell<SendRequest<Bytes>>>;

struct Idle {
    connection: Box<h1::app::Connection>,
    since: Instant,
}

impl Pool {
    /// An idle connection that is still good.
    pub fn take(&mut self, key: &Key) -> Option<Box<h1::app::Connection>> {
        let idle = self.idle.get_mut(key)?;
        // The one used last: it is the least likely to be closed by its app in this moment.
        while let Some(last) = idle.pop() {
            if last.since.elapsed() < KEEP && last.connection.is_quiet() {
                return Some(last.connection);
            }
        }
        None
    }

    /// Keeps a connection whose request is over, if it may be used again.
    pub fn put(&mut self, key: Key, connection: Box<h1::app::Connection>) {
        if connection.may_go_on() {
            let idle = self.idle.entry(key).or_default();
            if idle.len() < KEPT {
                let since = Instant::now();
                idle.push(Idle { connection, since });
            }
        }
    }

    /// Drops connections of which one was found to be dead.
    pub fn forget(&mut self, key: &Key) {
        self.idle.remove(key);
        self.shared.remove(key);
    }

    /// Drops what nobody used for a while, or what its app has closed.
    pub fn sweep(&mut self) {
        self.idle.retain(|_, idle| {
            idle.retain(|i| i.since.elapsed() < KEEP && i.connection.is_quiet());
            !idle.is_empty()
        });
        // One without its sender ends with its last request.
        self.shared
            .retain(|_, (shared, used)| used.elapsed() < KEEP || Rc::strong_count(shared) > 1);
    }

    /// The connection that requests to this app share.
    fn shared(&mut self, key: Key) -> Shared {
        let (shared, used) = self
            .shared
            .entry(key)
            .or_insert_with(|| (Shared::default(), Instant::now()));
        *used = Instant::now();
        Rc::clone(shared)
    }
}

/// A connection of its own for a request.
pub async fn h1(place: &mut Admission) -> io::Result<App> {
    let stream = place.connect().await?;
    Ok(App::H1(Box::new(h1::app::Connection::new(stream))))
}

/// A stream of an app's HTTP/2 connection, and whether that was there before. Who asks while it is being made waits
/// for it.
pub async fn h2(pool: &RefCell<Pool>, key: Key, place: &mut Admission) -> io::Result<(App, bool)> {
    let shared = pool.borrow_mut().shared(key);
    let reused = shared.initialized();
    let sender = shared.get_or_try_init(|| dial(place)).await?.clone();
    match H2App::new(sender).await {
        Ok(app) => Ok((App::H2(Box::new(app)), reused)),
        Err(error) => {
            pool.borrow_mut().forget(&key);
            Err(io::Error::other(error))
        }
    }
}

/// A connection with prior knowledge of HTTP/2, for many requests at once. It lives as long as somebody has its
/// sender, and requests on it.
async fn dial(place: &mut Admission) -> io::Result<SendRequest<Bytes>> {
    let stream = place.connect().await?;
    let address = place.address;
    let mut builder = h2::client::Builder::new();
    builder
        .enable_push(false)
        .initial_window_size(H2_STREAM_WINDOW)
        .initial_connection_window_size(H2_CONNECTION_WINDOW)
        .max_header_list_size(2 * MAX_HEAD_BYTES as u32)
        .data_frame_budget(SMALL_FRAMES);
    let handshake = timeout(HANDSHAKE, builder.handshake(stream)).await?;
    let (sender, connection) = handshake.map_err(io::Error::other)?;
    tokio::task::spawn_local(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, %address, "an HTTP/2 connection to an app ended");
        }
    });
    Ok(sender)
}

/// One stream of an app's HTTP/2 connection.
pub struct H2App {
    sender: Option<SendRequest<Bytes>>,
    send: Option<SendStream<Bytes>>,
    reply: Option<ResponseFuture>,
    receive: Option<RecvStream>,
    /// Content that waits for the app's window.
    waiting: Bytes,
    last: bool,
    is_head: bool,
    heard: bool,
}

impl H2App {
    /// Waits for a free stream.
    pub async fn new(mut sender: SendRequest<Bytes>) -> Result<Self, Lost> {
        poll_fn(|cx| sender.poll_ready(cx)).await.map_err(lost)?;
        Ok(Self {
            sender: Some(sender),
            send: None,
            reply: None,
            receive: None,
            waiting: Bytes::new(),
            last: false,
            is_head: false,
            heard: false,
        })
    }

    pub fn begin(&mut self, head: &RequestHead, facts: &Facts<'_>) -> Result<(), Lost> {
        let mut request = Request::new(());
        *request.method_mut() = head.method.clone();
        *request.version_mut() = Version::HTTP_2;
        let parts = Uri::builder()
            .scheme(facts.entrance.scheme())
            .authority(&head.authority[..])
            .path_and_query(&head.target[..]);
        let bad = |_| Lost::Reply("its address cannot be written in HTTP/2");
        *request.uri_mut() = parts.build().map_err(bad)?;
        let map = request.headers_mut();
        headers::for_app(head, facts, &mut |name, value| {
            // The authority is a pseudo-header.
            if name != b"Host" {
                append(map, name, value);
            }
        });
        if head
            .fields
            .members("te")
            .any(|t| t.eq_ignore_ascii_case(b"trailers"))
        {
            map.insert(http::header::TE, HeaderValue::from_static("trailers"));
        }
        if let Length::Exact(length) = head.length {
            map.insert(http::header::CONTENT_LENGTH, length.into());
        }
        self.is_head = head.method == Method::HEAD;
        let ends = matches!(head.length, Length::None | Length::Exact(0));
        let sender = self.sender.as_mut().ok_or(Lost::Reply("it has begun"))?;
        let (reply, send) = sender.send_request(request, ends).map_err(lost)?;
        self.reply = Some(reply);
        self.send = (!ends).then_some(send);
        Ok(())
    }

    pub fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Lost>> {
        let Some(send) = &mut self.send else {
            return Poll::Ready(Ok(()));
        };
        ready!(poll_send(send, &mut self.waiting, self.last, cx)).map_err(lost)?;
        if self.last {
            self.send = None;
        }
        Poll::Ready(Ok(()))
    }

    pub fn give(&mut self, data: Bytes, last: bool) -> Result<(), Lost> {
        if let Some(send) = &mut self.send {
            give(send, &mut self.waiting, data, last).map_err(lost)?;
            self.last = last;
        }
        Ok(())
    }

    pub fn finish(&mut self, trailers: Option<HeaderMap>) -> Result<(), Lost> {
        match self.send.take() {
            Some(mut send) => finish(&mut send, trailers).map_err(lost),
            None => Ok(()),
        }
    }

    pub fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ReplyHead, Lost>> {
        let Some(reply) = &mut self.reply else {
            return Poll::Ready(Err(Lost::Reply("it has a second head")));
        };
        if let Poll::Ready(Some(interim)) = reply.poll_informational(cx) {
            let (parts, ()) = interim.map_err(lost)?.into_parts();
            self.heard = true;
            return Poll::Ready(Ok(reply_head(parts.status, parts.headers, Length::None)));
        }
        let (parts, receive) = ready!(Pin::new(reply).poll(cx)).map_err(lost)?.into_parts();
        self.heard = true;
        self.reply = None;
        let told = parts.headers.get(http::header::CONTENT_LENGTH);
        let told = told.and_then(|v| v.to_str().ok()?.parse().ok());
        let length = match told {
            _ if self.is_head || matches!(parts.status.as_u16(), 204 | 304) => Length::None,
            Some(told) if told > 0 && receive.is_end_stream() => {
                return Poll::Ready(Err(Lost::Reply(
                    "it says that there is content, and there is none",
                )));
            }
            Some(told) => Length::Exact(told),
            None if receive.is_end_stream() => Length::Exact(0),
            None => Length::Unknown,
        };
        self.receive = Some(receive);
        Poll::Ready(Ok(reply_head(parts.status, parts.headers, length)))
    }

    pub fn poll_content(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, Lost>> {
        match &mut self.receive {
            Some(receive) => poll_receive(receive, cx).map_err(lost),
            None => Poll::Ready(Ok(Piece::End(None))),
        }
    }

    pub fn is_silent(&self) -> bool {
        !self.heard
    }
}

impl Drop for H2App {
    fn drop(&mut self) {
        // A request that its client has given up is given up here too.
        if let Some(send) = &mut self.send {
            send.send_reset(Reason::CANCEL);
        }
    }
}

fn reply_head(status: http::StatusCode, map: HeaderMap, length: Length) -> ReplyHead {
    ReplyHead {
        status: status.as_u16(),
        reason: Bytes::new(),
        version: Version::HTTP_2,
        fields: Fields::Map(map),
        length,
    }
}

fn lost(error: h2::Error) -> Lost {
    match error.reason() {
        Some(Reason::REFUSED_STREAM) => Lost::Refused,
        _ if error.is_reset() => Lost::Reset,
        _ => Lost::Connection(io::Error::other(error)),
    }
}

/// Appends a field, unless HTTP's own types do not take it.
pub fn append(map: &mut HeaderMap, name: &[u8], value: &[u8]) {
    if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
        map.append(name, value);
    }
}

/// Content up to this size may be handed to `h2` before its window is known: a stream's first, where it spares
/// a turn.
const AHEAD: usize = 16 << 10;

/// Hands content over as far as the other side's window goes, and keeps the rest in `waiting`.
pub fn give(
    send: &mut SendStream<Bytes>,
    waiting: &mut Bytes,
    data: Bytes,
    last: bool,
) -> Result<(), h2::Error> {
    debug_assert!(waiting.is_empty(), "content is given when there is room");
    if data.is_empty() {
        return if last {
            send.send_data(data, true)
        } else {
            Ok(())
        };
    }
    if data.len() <= send.capacity() || (last && data.len() <= AHEAD) {
        return send.send_data(data, last);
    }
    send.reserve_capacity(data.len());
    *waiting = data;
    Ok(())
}

/// Ready when nothing waits for the other side's window any more.
pub fn poll_send(
    send: &mut SendStream<Bytes>,
    waiting: &mut Bytes,
    last: bool,
    cx: &mut Context<'_>,
) -> Poll<Result<(), h2::Error>> {
    while !waiting.is_empty() {
        let mut room = send.capacity();
        if room == 0 {
            room = match ready!(send.poll_capacity(cx)) {
                Some(room) => room?,
                None => return Poll::Ready(Err(Reason::CANCEL.into())),
            };
        }
        let part = waiting.split_to(room.min(waiting.len()));
        if !part.is_empty() {
            send.send_data(part, last && waiting.is_empty())?;
        }
    }
    Poll::Ready(Ok(()))
}

/// Ends a stream's content.
pub fn finish(send: &mut SendStream<Bytes>, trailers: Option<HeaderMap>) -> Result<(), h2::Error> {
    match trailers {
        Some(mut trailers) => {
            let names: Vec<HeaderName> = trailers.keys().cloned().collect();
            for name in names.iter().filter(|n| !headers::may_trail(n.as_str())) {
                trailers.remove(name);
            }
            send.send_trailers(trailers)
        }
        None => send.send_data(Bytes::new(), true),
    }
}

/// The next piece that a stream receives. Its window is opened again at once: the pump takes no more than the
/// other side has room for.
pub fn poll_receive(
    receive: &mut RecvStream,
    cx: &mut Context<'_>,
) -> Poll<Result<Piece, h2::Error>> {
    match ready!(receive.poll_data(cx)) {
        Some(data) => {
            let data = data?;
            receive.flow_control().release_capacity(data.len())?;
            Poll::Ready(Ok(Piece::Data(data, receive.is_end_stream())))
        }
        None => receive.poll_trailers(cx).map_ok(Piece::End),
    }
}
