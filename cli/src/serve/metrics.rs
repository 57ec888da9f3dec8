//! `/metrics`: what this server counts, in Prometheus' text format (version 0.0.4). `docs/metrics.md` lists all of it.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tern_catalog::{MachineStatus, View};
use tern_edge::{BOUNDS, Histogram};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// What is read at each call.
#[derive(Clone)]
pub struct Sources {
    pub edge: Arc<tern_edge::Metrics>,
    pub agent: Arc<tern_host::Metrics>,
    pub view: View,
}

/// Calls at once.
const CALLS: usize = 8;
/// Longest that one may take, from its connection to its end.
const LONGEST: Duration = Duration::from_secs(10);

/// Serves until told to end.
pub async fn serve(listener: TcpListener, sources: Sources, end: CancellationToken) {
    let places = Arc::new(Semaphore::new(CALLS));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = end.cancelled() => return,
        };
        let Ok((stream, _)) = accepted else {
            // What it lacks (descriptors) comes back when others end.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        // Who finds no place is closed, and asks again.
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            continue;
        };
        let sources = sources.clone();
        tokio::spawn(async move {
            let _ = timeout(LONGEST, connection(stream, sources)).await;
            drop(place);
        });
    }
}

/// A listener, told with its address where there is none.
pub async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address).await;
    listener.map_err(|e| io::Error::new(e.kind(), format!("{address}: {e}")))
}

async fn connection(stream: TcpStream, sources: Sources) {
    let answer = service_fn(move |request| {
        let answer = answer(&request, &sources);
        async move { Ok::<_, Infallible>(answer) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(LONGEST)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    if let Err(error) = served.await {
        tracing::debug!(%error, "a call for metrics ended badly");
    }
}

fn answer(request: &Request<Incoming>, sources: &Sources) -> Response<Full<Bytes>> {
    let known = request.uri().path() == "/metrics";
    let (status, text) = match *request.method() {
        Method::GET if known => (StatusCode::OK, exposition(sources)),
        _ if known => (StatusCode::METHOD_NOT_ALLOWED, "GET it.\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "There is /metrics.\n".to_owned()),
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    let kind = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// All of it, as text.
fn exposition(sources: &Sources) -> String {
    let mut text = Text::default();
    for (name, help, value) in sources.edge.counters() {
        text.one(
            &format!("tern_edge_{name}_total"),
            help,
            "counter",
            value as f64,
        );
    }
    text.one(
        "tern_edge_open_connections",
        "Connections that are open.",
        "gauge",
        sources.edge.open_connections.get() as f64,
    );
    text.head(
        "tern_edge_wake_duration_seconds",
        "From the wish for a start until the app accepts connections.",
        "histogram",
    );
    text.histogram(
        "tern_edge_wake_duration_seconds",
        "",
        &sources.edge.wake_durations,
    );
    text.head(
        "tern_edge_wait_duration_seconds",
        "Of requests that found no place at once: until they had one, or were refused.",
        "histogram",
    );
    text.histogram("tern_edge_wait_duration_seconds", "", &sources.edge.waits);
    let snapshot = sources.view.snapshot();
    apps(
        &mut text,
        &sources.edge.apps(|app| snapshot.apps.contains_key(app)),
    );
    for (name, help, value) in sources.agent.all() {
        // Prometheus' unit of time is the second.
        let (name, value) = match name.strip_suffix("_micros") {
            Some(name) => (format!("{name}_seconds"), value as f64 / 1e6),
            None => (name.to_owned(), value as f64),
        };
        let help = help.replace("Microseconds", "Seconds");
        text.one(&format!("tern_agent_{name}_total"), &help, "counter", value);
    }
    machines(&mut text, snapshot.machine_status.values().map(|s| &**s));
    text.one(
        "tern_catalog_stale_seconds",
        "How long the catalog has not been followed; 0 while it is.",
        "gauge",
        sources.view.stale_for().unwrap_or_default().as_secs_f64(),
    );
    text.one(
        "tern_catalog_unreadable_records",
        "Records whose newest value cannot be read; the last that could be is acted on.",
        "gauge",
        snapshot.unreadable.len() as f64,
    );
    text.one(
        "tern_restarted_loops_total",
        "Loops of this process that had failed, and were begun anew.",
        "counter",
        tern_catalog::restarts() as f64,
    );
    process(&mut text);
    text.0
}

fn apps(text: &mut Text, all: &[(tern_catalog::AppName, Arc<tern_edge::AppMetrics>)]) {
    let name = "tern_app_requests_total";
    text.head(
        name,
        "Requests of an app that are over, by the class of their status.",
        "counter",
    );
    for (app, metrics) in all {
        for (class, count) in metrics.classes() {
            let labels = format!("app=\"{app}\",class=\"{class}\"");
            text.sample(name, &labels, count as f64);
        }
    }
    let name = "tern_app_received_bytes_total";
    text.head(name, "Bytes of content of an app's requests.", "counter");
    for (app, metrics) in all {
        text.sample(
            name,
            &format!("app=\"{app}\""),
            metrics.received.get() as f64,
        );
    }
    let name = "tern_app_sent_bytes_total";
    text.head(name, "Bytes of content of an app's replies.", "counter");
    for (app, metrics) in all {
        text.sample(name, &format!("app=\"{app}\""), metrics.sent.get() as f64);
    }
    let name = "tern_app_request_duration_seconds";
    text.head(
        name,
        "From a request's head to the end of its reply.",
        "histogram",
    );
    for (app, metrics) in all {
        text.histogram(name, &format!("app=\"{app}\""), &metrics.durations);
    }
}

fn machines<'a>(text: &mut Text, all: impl Iterator<Item = &'a MachineStatus>) {
    let mut states: BTreeMap<String, u64> = BTreeMap::new();
    for status in all {
        let state = format!("{:?}", status.state).to_lowercase();
        *states.entry(state).or_default() += 1;
    }
    let name = "tern_machines";
    text.head(name, "Machines by the state last seen of them.", "gauge");
    for (state, count) in states {
        text.sample(name, &format!("state=\"{state}\""), count as f64);
    }
}

/// As Prometheus' own client libraries tell of a process.
fn process(text: &mut Text) {
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    text.one(
        "process_open_fds",
        "Open file descriptors.",
        "gauge",
        open as f64,
    );
    if let Ok((most, _)) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
    {
        text.one(
            "process_max_fds",
            "File descriptors that may be open.",
            "gauge",
            most as f64,
        );
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: Option<u64> = resident.and_then(|r| r.split_whitespace().next()?.parse().ok());
    if let Some(kib) = kib {
        text.one(
            "process_resident_memory_bytes",
            "Memory of this process, without that of Machines.",
            "gauge",
            (kib * 1024) as f64,
        );
    }
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn head(&mut self, name: &str, help: &str, kind: &str) {
        // Into memory: there is room.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: f64) {
        let _ = if labels.is_empty() {
            writeln!(self.0, "{name} {value}")
        } else {
            writeln!(self.0, "{name}{{{labels}}} {value}")
        };
    }

    fn one(&mut self, name: &str, help: &str, kind: &str, value: f64) {
        self.head(name, help, kind);
        self.sample(name, "", value);
    }

    fn histogram(&mut self, name: &str, labels: &str, histogram: &Histogram) {
        let (within, all, seconds) = histogram.get();
        let comma = if labels.is_empty() { "" } else { "," };
        let bucket = format!("{name}_bucket");
        for (bound, count) in BOUNDS.iter().zip(within) {
            self.sample(
                &bucket,
                &format!("{labels}{comma}le=\"{bound}\""),
                count as f64,
            );
        }
        self.sample(&bucket, &format!("{labels}{comma}le=\"+Inf\""), all as f64);
        self.sample(&format!("{name}_sum"), labels, seconds);
        self.sample(&format!("{name}_count"), labels, all as f64);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tern_catalog::{SqliteStore, Store};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn sources(dir: &std::path::Path) -> Sources {
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&dir.join("catalog.db")).unwrap());
        Sources {
            edge: Arc::default(),
            agent: Arc::default(),
            view: View::follow(store).await.unwrap(),
        }
    }

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        reply
    }

    #[tokio::test]
    async fn what_is_counted_is_served() {
        let dir = tempfile::tempdir().unwrap();
        let sources = sources(dir.path()).await;
        sources.edge.connections.add_all(3);
        sources.edge.wake_durations.add(Duration::from_millis(20));
        sources.agent.wake_micros.add(1_500_000);
        let listener = listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let end = CancellationToken::new();
        let serving = tokio::spawn(serve(listener, sources, end.clone()));
        let reply = ask(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
        for line in [
            "# HELP tern_edge_connections_total Connections accepted.",
            "# TYPE tern_edge_connections_total counter",
            "tern_edge_connections_total 3",
            "tern_edge_wake_duration_seconds_bucket{le=\"0.01\"} 0",
            "tern_edge_wake_duration_seconds_bucket{le=\"0.025\"} 1",
            "tern_edge_wake_duration_seconds_bucket{le=\"+Inf\"} 1",
            "tern_edge_wake_duration_seconds_sum 0.02",
            "tern_agent_wake_seconds_total 1.5",
        ] {
            assert!(reply.lines().any(|l| l == line), "{line}: {reply}");
        }
        let other = ask(address, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(other.starts_with("HTTP/1.1 404"), "{other}");
        end.cancel();
        serving.await.unwrap();
    }

    #[tokio::test]
    async fn all_of_it_is_documented() {
        let dir = tempfile::tempdir().unwrap();
        let text = exposition(&sources(dir.path()).await);
        let told = text.lines().filter_map(|line| line.strip_prefix("# HELP "));
        let told: BTreeSet<&str> = told.filter_map(|line| line.split(' ').next()).collect();
        let page = include_str!("../../../docs/metrics.md");
        let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
        let documented: BTreeSet<&str> = rows
            .filter_map(|row| row.split(['`', '{']).next())
            .collect();
        assert_eq!(told, documented);
    }

    /// A number that nothing counts tells that nothing happens.
    #[test]
    fn each_counter_is_counted_somewhere() {
        let source = |dir: &str| {
            let mut text = String::new();
            let mut dirs = vec![std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(dir)];
            while let Some(dir) = dirs.pop() {
                for entry in std::fs::read_dir(dir).unwrap() {
                    let path = entry.unwrap().path();
                    if path.is_dir() {
                        dirs.push(path);
                    } else if path.file_name().is_some_and(|n| n != "metrics.rs") {
                        text += &std::fs::read_to_string(path).unwrap();
                    }
                }
            }
            // Formatting may break a line before the call.
            text.split_whitespace().collect::<String>()
        };
        let (edge, agent) = (source("../edge/src"), source("../host/src"));
        let counters = tern_edge::Metrics::default().counters();
        let all = counters.iter().map(|(name, ..)| (*name, &edge));
        let more = tern_host::Metrics::default().all();
        let all = all.chain(more.iter().map(|(name, ..)| (*name, &agent)));
        for (name, source) in all {
            assert!(source.contains(&format!(".{name}.add")), "{name}");
        }
    }
}
