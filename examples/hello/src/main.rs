//! A small web server to deploy and to test with: each path shows one thing that a Machine promises.
//!
//! | path | reply |
//! |---|---|
//! | `/` | a greeting, with the app, the Machine and its region |
//! | `/healthz` | `ok` |
//! | `/counter` | `{"count": n}`: counts up with each request, in memory alone |
//! | `/write?k=key&v=value` | writes a file and waits until it is on disk |
//! | `/read?k=key` | what was written |
//! | `/time` | nanoseconds of Unix time by the Machine's clock |
//! | `/random` | 32 random bytes, as hex |
//! | `/headers` | the request's headers, as JSON |
//! | `/env` | the environment, as JSON |
//! | `/bytes?n=…` | so many bytes, streamed |
//! | `/burn?ms=…` | keeps a processor busy, then says `done` |
//! | `/sleep?ms=…` | waits, then says `done` |
//! | `/ws` | a WebSocket that says everything back |
//! | `/crash` | ends the program with code 1 |
//!
//! As a command, beside the server: `hello --version`, and `hello probe ADDRESS`, which succeeds when a
//! TCP connection to the address does.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Query, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

/// What the handlers share.
struct App {
    count: AtomicU64,
    data: PathBuf,
}

// A thread per processor of the smallest Machine, and one more for what blocks.
#[tokio::main(worker_threads = 2)]
async fn main() -> io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => serve().await,
        ["--version"] => {
            println!("hello {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        ["probe", address] => {
            let connection = tokio::net::TcpStream::connect(address);
            tokio::time::timeout(Duration::from_secs(5), connection).await?.map(drop)
        }
        _ => Err(io::Error::other("usage: hello [--version | probe ADDRESS]")),
    }
}

async fn serve() -> io::Result<()> {
    let data = PathBuf::from(env("DATA_DIR", "/data"));
    let port = env("PORT", "8080").parse().map_err(io::Error::other)?;
    let app = Arc::new(App {
        count: AtomicU64::new(0),
        data,
    });
    let routes = Router::new()
        .route("/", get(greeting))
        .route("/healthz", get(async || "ok\n"))
        .route("/counter", any(counter))
        .route("/write", any(write))
        .route("/read", get(read))
        .route("/time", get(time))
        .route("/random", get(random))
        .route("/headers", any(headers))
        .route("/env", get(environment))
        .route("/bytes", get(bytes))
        .route("/burn", get(burn))
        .route("/sleep", get(sleep))
        .route("/ws", any(web_socket))
        .route("/crash", any(crash))
        .layer(middleware::from_fn(log))
        .with_state(app);

    // On Linux this takes IPv4 as well: the private network speaks IPv6.
    let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let listener = tokio::net::TcpListener::bind(address).await?;
    println!("hello: listening on {address}");
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        served = axum::serve(listener, routes) => return served,
        _ = interrupt.recv() => println!("hello: interrupted"),
        _ = terminate.recv() => println!("hello: terminated"),
    }
    Ok(())
}

async fn log(request: Request, next: Next) -> Response {
    let line = format!("{} {}", request.method(), request.uri());
    let response = next.run(request).await;
    println!("{line} {}", response.status().as_u16());
    response
}

async fn greeting() -> String {
    format!(
        "Hello from {} on Machine {} in {}\n",
        env("FLY_APP_NAME", "hello"),
        env("FLY_MACHINE_ID", "(none)"),
        env("FLY_REGION", "(nowhere)"),
    )
}

async fn counter(State(app): State<Arc<App>>) -> impl IntoResponse {
    Json(json!({ "count": app.count.fetch_add(1, Ordering::Relaxed) + 1 }))
}

#[derive(Deserialize)]
struct Written {
    k: String,
    #[serde(default)]
    v: String,
}

async fn write(
    State(app): State<Arc<App>>,
    Query(q): Query<Written>,
    body: Bytes,
) -> Reply<String> {
    let content = if body.is_empty() {
        Bytes::from(q.v)
    } else {
        body
    };
    let path = app.file(&q.k)?;
    let length = content.len();
    tokio::task::spawn_blocking(move || store(&path, &content))
        .await
        .map_err(io::Error::other)??;
    Ok(format!("wrote {length} bytes\n"))
}

/// Replaces a file, so that after a power cut there is either the old one or the new one.
fn store(path: &Path, content: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory)?;
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(directory)?.sync_all()
}

#[derive(Deserialize)]
struct Wanted {
    k: String,
}

async fn read(State(app): State<Arc<App>>, Query(q): Query<Wanted>) -> Reply<Vec<u8>> {
    Ok(fs::read(app.file(&q.k)?)?)
}

impl App {
    /// The file of a key. A key is a plain word, so that no path leads anywhere else.
    fn file(&self, key: &str) -> Result<PathBuf, Failure> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        if key.is_empty() || key.len() > 64 || !key.bytes().all(plain) {
            return Err(Failure(
                StatusCode::BAD_REQUEST,
                "k must be a plain word".into(),
            ));
        }
        Ok(self.data.join(key))
    }
}

async fn time() -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    format!("{}\n", now.as_nanos())
}

async fn random() -> Reply<String> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("{hex}\n"))
}

async fn headers(headers: HeaderMap) -> impl IntoResponse {
    let mut map: BTreeMap<String, String> = BTreeMap::new();
    for (name, value) in &headers {
        let value = String::from_utf8_lossy(value.as_bytes());
        map.entry(name.to_string())
            .and_modify(|all| {
                all.push_str(", ");
                all.push_str(&value);
            })
            .or_insert_with(|| value.to_string());
    }
    Json(map)
}

async fn environment() -> impl IntoResponse {
    let text = |s: std::ffi::OsString| s.to_string_lossy().into_owned();
    Json(
        std::env::vars_os()
            .map(|(n, v)| (text(n), text(v)))
            .collect::<BTreeMap<_, _>>(),
    )
}

#[derive(Deserialize)]
struct Amount {
    n: u64,
}

async fn bytes(Query(q): Query<Amount>) -> Reply<Body> {
    if q.n > MAX_BYTES {
        return Err(Failure(
            StatusCode::BAD_REQUEST,
            format!("n may be {MAX_BYTES} at most"),
        ));
    }
    let chunk = Bytes::from_static(&[b'x'; CHUNK]);
    let chunks = futures_util::stream::iter((0..q.n).step_by(CHUNK).map(move |start| {
        let length = (q.n - start).min(CHUNK as u64) as usize;
        Ok::<_, io::Error>(chunk.slice(..length))
    }));
    Ok(Body::from_stream(chunks))
}

#[derive(Deserialize)]
struct Time {
    ms: u64,
}

impl Time {
    fn duration(&self) -> Duration {
        Duration::from_millis(self.ms).min(MAX_TIME)
    }
}

async fn burn(Query(q): Query<Time>) -> Reply<&'static str> {
    let spin = move || {
        let end = Instant::now() + q.duration();
        while Instant::now() < end {
            std::hint::spin_loop();
        }
    };
    tokio::task::spawn_blocking(spin)
        .await
        .map_err(io::Error::other)?;
    Ok("done\n")
}

async fn sleep(Query(q): Query<Time>) -> &'static str {
    tokio::time::sleep(q.duration()).await;
    "done\n"
}

async fn web_socket(upgrade: WebSocketUpgrade) -> Response {
    upgrade.max_message_size(MAX_MESSAGE).on_upgrade(echo)
}

async fn echo(mut socket: WebSocket) {
    while let Some(Ok(message)) = socket.recv().await {
        // Pings are answered and closing is done by the library.
        if matches!(message, Message::Text(_) | Message::Binary(_))
            && socket.send(message).await.is_err()
        {
            return;
        }
    }
}

async fn crash() -> &'static str {
    println!("hello: crashing as asked");
    std::process::exit(1)
}

type Reply<T> = Result<T, Failure>;

/// What went wrong, for the client.
struct Failure(StatusCode, String);

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let status = match error.kind() {
            io::ErrorKind::NotFound => StatusCode::NOT_FOUND,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, error.to_string())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, format!("{}\n", self.1)).into_response()
    }
}

fn env(name: &str, default: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| default.to_string())
}

/// One write's worth: what it takes is in flight once per client, not in memory as a whole.
const CHUNK: usize = 16 * 1024;
const MAX_BYTES: u64 = 1 << 30;
const MAX_TIME: Duration = Duration::from_secs(60);
const MAX_MESSAGE: usize = 1 << 20;
