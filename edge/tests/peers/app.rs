//! Apps that read and write raw bytes, each with a temper, and all that each connection brought.
//!
//! An answer echoes the request's `X-Nonce`, so that an answer which reaches another client is known by it. What an
//! app does beyond that, the path says (`Act`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::strict::{self, Got};

/// How an app takes what it did not expect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Temper {
    /// Takes anything that ends with an empty line for a request, and answers it.
    Lenient,
    /// Answers 400 and closes.
    Strict,
    /// Lenient, after a while.
    Slow,
    /// Answers 413 as soon as a head is there, and closes without a look at what follows.
    Hasty,
    /// Reads a head, and nothing ever after.
    Deaf,
}

pub struct App {
    pub port: u16,
    state: Arc<State>,
    _server: JoinSet<()>,
}

#[derive(Default)]
struct State {
    /// What each connection brought.
    connections: Mutex<Vec<Vec<u8>>>,
    /// Connections that the edge has closed.
    closed: AtomicU32,
    /// Lets `/late` and `/held` go on.
    release: Notify,
    /// Requests that `/held` holds.
    held: AtomicU32,
    /// Those of them that the edge did not wait for.
    given_up: AtomicU32,
    /// Bytes that `/sink` had when its connection ended.
    sunk: AtomicU32,
    /// Answers that `/late` gave unasked, and the edge's kernel has.
    late: AtomicU32,
}

/// What an app never was asked for.
pub const STRAY: &str = "STRAY";

impl App {
    pub async fn new(temper: Temper) -> Self {
        // The edge knows one address of a Machine, and tries both families.
        let listener = TcpListener::bind("[::1]:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(State::default());
        let serving = Arc::clone(&state);
        let mut server = JoinSet::new();
        server.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(serve(stream, temper, Arc::clone(&serving)));
            }
        });
        Self {
            port,
            state,
            _server: server,
        }
    }

    /// The requests of all connections, each of which must have brought whole, well-formed ones and nothing else.
    pub fn requests(&self) -> Vec<Got> {
        let (whole, begun) = self.judged();
        assert!(begun.is_empty(), "half a request: {begun:?}");
        whole
    }

    /// The whole requests of all connections, and those that may still become one. Nothing else may have come.
    pub fn judged(&self) -> (Vec<Got>, Vec<String>) {
        let (mut whole, mut begun) = (Vec::new(), Vec::new());
        for bytes in self.state.connections.lock().iter() {
            let text = String::from_utf8_lossy(bytes);
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                match strict::request(rest) {
                    Ok(Some((got, end))) => {
                        whole.push(got);
                        rest = &rest[end..];
                    }
                    Ok(None) => {
                        begun.push(String::from_utf8_lossy(rest).into_owned());
                        break;
                    }
                    Err(why) => panic!("{why}, in {text:?}"),
                }
            }
        }
        (whole, begun)
    }

    /// The first request for a path, whatever follows it.
    pub fn judged_head(&self, path: &str) -> Got {
        let connections = self.state.connections.lock();
        let mut first = connections
            .iter()
            .filter_map(|bytes| strict::request(bytes).unwrap());
        first.find(|(got, _)| got.path() == path).unwrap().0
    }

    /// The one whole request with this nonce.
    #[track_caller]
    pub fn request(&self, nonce: &str) -> Got {
        let mut all = self.judged().0;
        all.retain(|got| got.one("x-nonce") == Some(nonce));
        assert_eq!(all.len(), 1, "{nonce}: {all:?}");
        all.remove(0)
    }

    /// Waits until it has so many bytes that this is found in them.
    pub async fn until_it_has(&self, what: &str) {
        let has = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).contains(what);
        until(what, || self.state.connections.lock().iter().any(has)).await;
    }

    pub async fn until_closed(&self, connections: u32) {
        until("the edge closes connections", || {
            self.state.closed.load(Ordering::SeqCst) >= connections
        })
        .await;
    }

    pub async fn until_held(&self, requests: u32) {
        until("the app holds requests", || {
            self.state.held.load(Ordering::SeqCst) >= requests
        })
        .await;
    }

    pub async fn until_given_up(&self, requests: u32) {
        until("the edge gives held requests up", || {
            self.state.given_up.load(Ordering::SeqCst) >= requests
        })
        .await;
    }

    pub async fn until_late(&self, answers: u32) {
        until("the edge's kernel has what the app sent late", || {
            self.state.late.load(Ordering::SeqCst) >= answers
        })
        .await;
    }

    pub fn sunk(&self) -> u32 {
        self.state.sunk.load(Ordering::SeqCst)
    }

    pub async fn until_sunk(&self, bytes: usize) {
        until("the app has all of a tunnel's bytes", || {
            self.sunk() as usize == bytes
        })
        .await;
    }

    pub fn closed(&self) -> u32 {
        self.state.closed.load(Ordering::SeqCst)
    }

    pub fn connections(&self) -> usize {
        self.state.connections.lock().len()
    }

    /// Lets one that waits go on.
    pub fn release(&self) {
        self.state.release.notify_one();
    }
}

/// Waits for a condition; a machine may be slow.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..12_000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("a minute has passed: {what}");
}

async fn serve(mut stream: TcpStream, temper: Temper, state: Arc<State>) {
    let _ = stream.set_nodelay(true);
    let number = {
        let mut connections = state.connections.lock();
        connections.push(Vec::new());
        connections.len() - 1
    };
    let mut buffer = Vec::new();
    loop {
        let request = match temper {
            Temper::Strict => match strict::request(&buffer) {
                Ok(found) => found.map(|(got, end)| (head_of(&buffer), got.body, end)),
                Err(_) => {
                    let _ = stream
                        .write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                        .await;
                    return;
                }
            },
            Temper::Lenient | Temper::Slow => loosely(&buffer),
            Temper::Hasty | Temper::Deaf if find(&buffer, b"\r\n\r\n").is_none() => None,
            Temper::Hasty => {
                let _ = stream
                    .write_all(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\nmuch")
                    .await;
                return;
            }
            Temper::Deaf => std::future::pending().await,
        };
        if let Some((head, body, end)) = request {
            buffer.drain(..end);
            if temper == Temper::Slow {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            if !answer(&mut stream, &state, &head, &body).await {
                return;
            }
            continue;
        }
        let mut chunk = vec![0; 64 << 10];
        match stream.read(&mut chunk).await {
            Ok(n) if n > 0 => {
                buffer.extend_from_slice(&chunk[..n]);
                state.connections.lock()[number].extend_from_slice(&chunk[..n]);
            }
            _ => {
                state.closed.fetch_add(1, Ordering::SeqCst);
                return;
            }
        }
    }
}

fn head_of(bytes: &[u8]) -> String {
    let end = find(bytes, b"\r\n\r\n").unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

pub fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|w| w == what)
}

/// As sloppy servers read: head, body and end of whatever comes first.
fn loosely(bytes: &[u8]) -> Option<(String, Vec<u8>, usize)> {
    if let Ok(Some((got, end))) = strict::request(bytes) {
        return Some((head_of(bytes), got.body, end));
    }
    let at = find(bytes, b"\r\n\r\n")? + 4;
    let head = head_of(bytes);
    let coding = field(&head, "transfer-encoding").unwrap_or_default();
    if coding.to_ascii_lowercase().contains("chunked") {
        let end = at + find(&bytes[at..], b"0\r\n\r\n")? + 5;
        return Some((head, bytes[at..end].to_vec(), end));
    }
    let length = field(&head, "content-length").and_then(|value| value.parse().ok());
    let end = at + length.unwrap_or(0);
    (bytes.len() >= end).then(|| (head, bytes[at..end].to_vec(), end))
}

/// The first value of a header, by its name in lower case.
pub fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().skip(1).find_map(|line| {
        let (its, value) = line.split_once(':')?;
        its.eq_ignore_ascii_case(name).then_some(value.trim())
    })
}

/// Whether the connection goes on.
async fn answer(stream: &mut TcpStream, state: &State, head: &str, body: &[u8]) -> bool {
    let nonce = field(head, "x-nonce").unwrap_or("none").to_owned();
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let ok = |body: &str| {
        let length = body.len();
        format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nX-Echo: {nonce}\r\n\r\n{body}")
    };
    let plain = ok(&format!("nonce={nonce};"));
    let said = match path.as_str() {
        // More than was asked for, at once.
        "/extra" => format!("{plain}{STRAY}"),
        "/second" => format!("{plain}{}", ok(STRAY)),
        "/long" => format!("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello{STRAY}"),
        "/extra-after-chunks" => format!(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n{STRAY}"
        ),
        "/body-of-none" => format!("HTTP/1.1 204 No Content\r\n\r\n{STRAY}"),
        // Once the connection waits for its next request.
        "/late" => {
            if stream.write_all(plain.as_bytes()).await.is_err() {
                return false;
            }
            state.release.notified().await;
            if stream.write_all(ok(STRAY).as_bytes()).await.is_err() {
                return false;
            }
            taken(stream).await;
            state.late.fetch_add(1, Ordering::SeqCst);
            return true;
        }
        "/cut" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello").await;
            return false;
        }
        "/cut-chunks" => {
            let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";
            let _ = stream.write_all(head.as_bytes()).await;
            return false;
        }
        "/held" => {
            let released = state.release.notified();
            tokio::pin!(released);
            released.as_mut().enable();
            state.held.fetch_add(1, Ordering::SeqCst);
            let mut byte = [0];
            tokio::select! {
                () = released => plain,
                // The edge sends nothing before it has the answer.
                _ = stream.peek(&mut byte) => {
                    state.given_up.fetch_add(1, Ordering::SeqCst);
                    return false;
                }
            }
        }
        "/chunked" => {
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nhello \r\n5\r\nworld\r\n0\r\n\r\n".into()
        }
        "/trailers" => "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Checksum\r\n\r\n\
             5\r\nhello\r\n0\r\nX-Checksum: abc\r\n\r\n"
            .into(),
        "/hints" => {
            format!("HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n{plain}")
        }
        "/without-length" => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nhello world").await;
            return false;
        }
        "/drip" => return drip(stream).await,
        "/big" => {
            let whole = big(stream).await;
            if !whole {
                state.closed.fetch_add(1, Ordering::SeqCst);
            }
            return whole;
        }
        "/websocket" => return websocket(stream, state).await,
        "/sink" => {
            let mut bytes = Vec::new();
            if stream.write_all(SWITCHING.as_bytes()).await.is_ok() {
                let _ = stream.read_to_end(&mut bytes).await;
            }
            state.sunk.fetch_add(bytes.len() as u32, Ordering::SeqCst);
            return false;
        }
        "/ticks" => {
            let _ = stream.write_all(SWITCHING.as_bytes()).await.is_ok() && ticks(stream).await;
            return false;
        }
        "/echo" => {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nX-Echo: {nonce}\r\n\r\n", body.len());
            return stream.write_all(&[head.as_bytes(), body].concat()).await.is_ok();
        }
        _ => plain,
    };
    stream.write_all(said.as_bytes()).await.is_ok()
}

/// How long `/drip` and `/ticks` take: longer than the idle limit of who asks for them, in much shorter pauses.
pub const DRIPS: usize = 45;
pub const DRIP: Duration = Duration::from_millis(100);
/// The idle limit of those.
pub const IDLE: Duration = Duration::from_secs(3);

async fn drip(stream: &mut TcpStream) -> bool {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {DRIPS}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.is_ok() && ticks(stream).await
}

async fn ticks(stream: &mut TcpStream) -> bool {
    for _ in 0..DRIPS {
        tokio::time::sleep(DRIP).await;
        if stream.write_all(b".").await.is_err() {
            return false;
        }
    }
    true
}

/// More than all buffers on the way to a client take.
pub const BIG: usize = 24 << 20;

async fn big(stream: &mut TcpStream) -> bool {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {BIG}\r\n\r\n");
    if stream.write_all(head.as_bytes()).await.is_err() {
        return false;
    }
    let part = vec![b'b'; 1 << 20];
    for _ in 0..BIG / part.len() {
        if stream.write_all(&part).await.is_err() {
            return false;
        }
    }
    true
}

/// Waits until the other end's kernel has all that was written.
async fn taken(stream: &TcpStream) {
    let ports = (
        stream.local_addr().unwrap().port(),
        stream.peer_addr().unwrap().port(),
    );
    let port = |address: &str| u16::from_str_radix(address.rsplit(':').next()?, 16).ok();
    until("what the app wrote is acknowledged", || {
        let table = std::fs::read_to_string("/proc/self/net/tcp6").unwrap();
        table.lines().skip(1).all(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            (port(words[1]), port(words[2])) != (Some(ports.0), Some(ports.1))
                || words[4].starts_with("00000000:")
        })
    })
    .await;
}

/// A handshake's answer that says no more than it must; the key is of RFC 6455 section 1.3.
const SWITCHING: &str = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
     Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/// After the handshake the connection's bytes come back; it ends with them.
async fn websocket(stream: &mut TcpStream, state: &State) -> bool {
    if stream.write_all(SWITCHING.as_bytes()).await.is_err() {
        return false;
    }
    let mut chunk = vec![0; 64 << 10];
    while let Ok(n) = stream.read(&mut chunk).await {
        if n == 0 {
            state.closed.fetch_add(1, Ordering::SeqCst);
            break;
        }
        if stream.write_all(&chunk[..n]).await.is_err() {
            break;
        }
    }
    false
}
