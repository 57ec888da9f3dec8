//! Health checks of a started Machine.
//!
//! One task per check, from the start of the app until the Machine leaves the state `started`. A
//! check never wakes a Machine: while one sleeps, nobody looks at it, and what was last seen stays.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Empty;
use hyper::Request;
use hyper::header::{HeaderName, HeaderValue};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use tern_catalog::{Check, CheckKind, CheckState, CheckStatus, Machine};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::metrics::Metrics;

/// The health checks of one Machine.
pub(crate) struct Checks {
    ipv4: Ipv4Addr,
    metrics: Arc<Metrics>,
    /// The config that `results` speak of.
    instance: String,
    results: Vec<CheckStatus>,
    tasks: JoinSet<()>,
    tell: mpsc::UnboundedSender<News>,
    told: mpsc::UnboundedReceiver<News>,
}

/// Which check, and what it has seen.
type News = (usize, Outcome);

/// What one check has seen: whether it may be believed already, and what there was.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Outcome {
    status: CheckState,
    output: String,
}

/// One check, with all that was left open filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Plan {
    name: String,
    kind: CheckKind,
    place: Place,
    interval: Duration,
    timeout: Duration,
    grace: Duration,
    method: String,
    path: String,
    headers: Vec<(String, String)>,
}

/// A port of a Machine, as its host reaches it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    source: IpAddr,
    target: SocketAddr,
    /// For an app that listens on IPv4 alone.
    target_v4: SocketAddr,
}

impl Checks {
    /// Of the Machine that has this address for IPv4.
    pub(crate) fn new(ipv4: Ipv4Addr, metrics: Arc<Metrics>) -> Self {
        let (tell, told) = mpsc::unbounded_channel();
        Self {
            ipv4,
            metrics,
            instance: String::new(),
            results: Vec::new(),
            tasks: JoinSet::new(),
            tell,
            told,
        }
    }

    /// Begins to check a Machine that has started. Does nothing where that has begun already.
    pub(crate) fn run(&mut self, machine: &Machine) {
        if !self.tasks.is_empty() {
            return;
        }
        let plans = plans(machine, self.ipv4);
        let names = plans.iter().map(|p| &p.name);
        if self.instance != machine.instance_id || !names.eq(self.results.iter().map(|r| &r.name)) {
            self.instance.clone_from(&machine.instance_id);
            self.results = plans.iter().map(unknown).collect();
        }
        for (index, plan) in plans.into_iter().enumerate() {
            let (news, metrics) = (self.tell.clone(), Arc::clone(&self.metrics));
            let passed = self.results[index].status == CheckState::Passing;
            self.tasks
                .spawn(check_for_ever(plan, passed, index, news, metrics));
        }
    }

    /// Stops checking.
    pub(crate) fn stop(&mut self) {
        if !self.tasks.is_empty() {
            self.tasks = JoinSet::new();
            // What they have told since is of a Machine that is no more.
            (self.tell, self.told) = mpsc::unbounded_channel();
        }
    }

    /// Forgets what was seen: the app is a new process.
    pub(crate) fn reset(&mut self) {
        self.stop();
        self.instance.clear();
        self.results.clear();
    }

    /// What is to be shown.
    pub(crate) fn current(&self) -> &[CheckStatus] {
        &self.results
    }

    /// Waits until something is to be shown differently.
    pub(crate) async fn changed(&mut self) {
        loop {
            let Some((index, outcome)) = self.told.recv().await else {
                return std::future::pending().await;
            };
            let Some(result) = self.results.get_mut(index) else {
                continue;
            };
            if (result.status, &result.output) != (outcome.status, &outcome.output) {
                result.status = outcome.status;
                result.output = outcome.output;
                result.updated_at = Timestamp::now();
                return;
            }
        }
    }
}

fn unknown(plan: &Plan) -> CheckStatus {
    CheckStatus {
        name: plan.name.clone(),
        status: CheckState::Warning,
        output: "not checked yet".to_owned(),
        updated_at: Timestamp::now(),
    }
}

fn plans(machine: &Machine, ipv4: Ipv4Addr) -> Vec<Plan> {
    let config = &machine.config;
    let named = config
        .checks
        .iter()
        .map(|(name, check)| (name.clone(), check, None));
    let of_services = config.services.iter().enumerate().flat_map(|(n, service)| {
        service.checks.iter().map(move |check| {
            let port = check.port.unwrap_or(service.internal_port);
            let kind = match check.kind {
                CheckKind::Tcp => "tcp",
                CheckKind::Http => "http",
            };
            let name = format!("servicecheck-{n:02}-{kind}-{port}");
            (name, check, Some(service.internal_port))
        })
    });
    let mut plans: Vec<Plan> = named
        .chain(of_services)
        .filter_map(|(name, check, port)| plan(machine, ipv4, name, check, port))
        .collect();
    plans.sort_by(|a, b| a.name.cmp(&b.name));
    plans
}

fn plan(
    machine: &Machine,
    ipv4: Ipv4Addr,
    name: String,
    check: &Check,
    service: Option<u16>,
) -> Option<Plan> {
    // Without a port of its own a check looks at the app's first service.
    let first = || machine.config.services.first().map(|s| s.internal_port);
    let port = check.port.or(service).or_else(first)?;
    let time = |given: Option<tern_catalog::GoDuration>, default| given.map_or(default, |t| t.0);
    Some(Plan {
        name,
        kind: check.kind,
        place: Place::new(machine, ipv4, port),
        interval: time(check.interval, INTERVAL).max(SHORTEST),
        timeout: time(check.timeout, TIMEOUT).clamp(SHORTEST, LONGEST),
        grace: time(check.grace_period, GRACE),
        method: check.method.clone().unwrap_or_else(|| "GET".to_owned()),
        path: check.path.clone().unwrap_or_else(|| "/".to_owned()),
        headers: check
            .sent()
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
    })
}

async fn check_for_ever(
    plan: Plan,
    mut passed: bool,
    index: usize,
    news: mpsc::UnboundedSender<News>,
    metrics: Arc<Metrics>,
) {
    let began = Instant::now();
    if passed {
        // It has just been woken, for a request that must not share it with us.
        tokio::time::sleep(plan.interval).await;
    }
    loop {
        let seen = match tokio::time::timeout(plan.timeout, look(&plan)).await {
            Ok(seen) => seen,
            Err(_) => Err(format!("no answer within {} ms", plan.timeout.as_millis())),
        };
        metrics.checks.add(1);
        let (status, output) = match seen {
            Ok(output) => (CheckState::Passing, output),
            Err(output) if !passed && began.elapsed() < plan.grace => (CheckState::Warning, output),
            Err(output) => (CheckState::Critical, output),
        };
        if status == CheckState::Passing {
            passed = true;
        } else {
            metrics.failed_checks.add(1);
        }
        if news.send((index, Outcome { status, output })).is_err() {
            return;
        }
        // A deploy waits for the first success: it is not to wait for a long interval as well.
        let pause = if passed {
            plan.interval
        } else {
            plan.interval.min(EAGER)
        };
        tokio::time::sleep(pause).await;
    }
}

/// Whether a Machine takes connections on a port: one look, as a check of this port would take it.
pub(crate) async fn accepts(machine: &Machine, ipv4: Ipv4Addr, port: u16) -> bool {
    let place = Place::new(machine, ipv4, port);
    let looked = tokio::time::timeout(TIMEOUT, place.connect()).await;
    matches!(looked, Ok(Ok(_)))
}

impl Place {
    fn new(machine: &Machine, ipv4: Ipv4Addr, port: u16) -> Self {
        Self {
            source: IpAddr::V6(machine.host.address()),
            target: SocketAddr::new(IpAddr::V6(machine.private_ip), port),
            target_v4: SocketAddr::new(IpAddr::V4(ipv4), port),
        }
    }

    /// Speaks to Machines from the address that they know the host by, where it has that yet.
    async fn connect(&self) -> std::io::Result<TcpStream> {
        let socket = TcpSocket::new_v6()?;
        match socket.bind(SocketAddr::new(self.source, 0)) {
            Err(error) if error.kind() != std::io::ErrorKind::AddrNotAvailable => {
                return Err(error);
            }
            _ => {}
        }
        match socket.connect(self.target).await {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                // Both refuse: the first one's error is told.
                TcpStream::connect(self.target_v4).await.or(Err(error))
            }
            other => other,
        }
    }
}

/// The config's headers go before ours, all but the one that keeps connections from piling up.
fn request(plan: &Plan) -> hyper::http::Result<Request<Empty<Bytes>>> {
    let request = Request::builder()
        .method(plan.method.as_str())
        .uri(&plan.path);
    let mut request = request.body(Empty::new())?;
    let headers = request.headers_mut();
    for (name, value) in &plan.headers {
        let name: HeaderName = name.parse()?;
        headers.append(name, value.parse()?);
    }
    let host = plan.place.target.to_string();
    for (name, value) in [("host", host.as_str()), ("user-agent", "tern-health-check")] {
        if !headers.contains_key(name) {
            headers.insert(HeaderName::from_static(name), value.parse()?);
        }
    }
    headers.insert("connection", HeaderValue::from_static("close"));
    Ok(request)
}

async fn look(plan: &Plan) -> Result<String, String> {
    let stream = plan
        .place
        .connect()
        .await
        .map_err(|e| format!("port {}: {e}", plan.place.target.port()))?;
    if plan.kind == CheckKind::Tcp {
        return Ok("connected".to_owned());
    }
    let told = |e: &dyn std::fmt::Display| format!("port {}: {e}", plan.place.target.port());
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| told(&e))?;
    let request = request(plan).map_err(|e| told(&e))?;
    // The connection is driven by this same task. Its end is no news: the request then fails, or
    // has been answered.
    let driver = async {
        let _ = connection.await;
        std::future::pending::<std::convert::Infallible>().await
    };
    let status = tokio::select! {
        answer = sender.send_request(request) => answer.map_err(|e| told(&e))?.status(),
        never = driver => match never {},
    };
    if status.is_success() {
        Ok(status.to_string())
    } else {
        Err(status.to_string())
    }
}

/// Between two checks, where the config does not say: as on Fly.io.
const INTERVAL: Duration = Duration::from_secs(15);
/// For one check.
const TIMEOUT: Duration = Duration::from_secs(2);
/// After a start.
const GRACE: Duration = Duration::from_secs(5);
/// A Machine is not to be busied by being looked at.
const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(60);
/// Until the first success.
const EAGER: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::tests::machine;
    use std::net::Ipv6Addr;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    /// Answers every connection with this, and says where it listens.
    async fn server(answer: &'static str) -> u16 {
        let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = [0; 1024];
                let _ = stream.read(&mut request).await;
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        port
    }

    async fn until(checks: &mut Checks, status: CheckState) -> String {
        let wait = async {
            while checks.current()[0].status != status {
                checks.changed().await;
            }
        };
        let outcome = tokio::time::timeout(Duration::from_secs(60), wait).await;
        assert!(outcome.is_ok(), "{:?}", checks.current());
        checks.current()[0].output.clone()
    }

    fn checked(check: &str) -> Machine {
        let mut machine = machine(&format!(r#"{{"image":"x","checks":{{"up":{check}}}}}"#));
        machine.private_ip = Ipv6Addr::LOCALHOST;
        machine
    }

    #[tokio::test]
    async fn an_answer_passes_and_an_error_does_not() {
        let good = server("HTTP/1.1 204 No Content\r\n\r\n").await;
        let bad = server("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n").await;
        let mut checks = Checks::new(Ipv4Addr::LOCALHOST, Arc::default());
        checks.run(&checked(&format!(r#"{{"type":"http","port":{good}}}"#)));
        assert_eq!(checks.current()[0].status, CheckState::Warning);
        assert_eq!(
            until(&mut checks, CheckState::Passing).await,
            "204 No Content"
        );
        checks.reset();
        let config = format!(r#"{{"type":"http","port":{bad},"grace_period":"0s"}}"#);
        checks.run(&checked(&config));
        let output = until(&mut checks, CheckState::Critical).await;
        assert_eq!(output, "503 Service Unavailable");
    }

    #[test]
    fn a_check_sends_the_headers_of_its_config() {
        let headers = r#"[{"name":"X-Forwarded-Proto","values":["https"]},{"name":"Host","values":["shop.example"]},
            {"name":"Connection","values":["keep-alive"]}]"#;
        let machine = checked(&format!(
            r#"{{"type":"http","port":80,"headers":{headers}}}"#
        ));
        let request = request(&plans(&machine, Ipv4Addr::LOCALHOST)[0]).unwrap();
        let sent = |name| request.headers().get_all(name).iter().collect::<Vec<_>>();
        assert_eq!(sent("x-forwarded-proto"), ["https"]);
        assert_eq!(sent("host"), ["shop.example"]);
        assert_eq!(sent("connection"), ["close"]);
        assert_eq!(sent("user-agent"), ["tern-health-check"]);
    }

    #[tokio::test]
    async fn a_port_that_takes_connections_is_told_from_one_that_does_not() {
        let app = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = app.local_addr().unwrap().port();
        let machine = checked(r#"{"type":"tcp"}"#);
        assert!(accepts(&machine, Ipv4Addr::LOCALHOST, port).await);
        // Bound, so that nobody else gets it, and not listened at.
        let silent = TcpSocket::new_v6().unwrap();
        silent
            .bind(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), 0))
            .unwrap();
        let port = silent.local_addr().unwrap().port();
        assert!(!accepts(&machine, Ipv4Addr::LOCALHOST, port).await);
    }

    #[tokio::test]
    async fn an_app_that_listens_on_ipv4_alone_passes() {
        let app = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = app.local_addr().unwrap().port();
        let mut checks = Checks::new(Ipv4Addr::LOCALHOST, Arc::default());
        checks.run(&checked(&format!(r#"{{"type":"tcp","port":{port}}}"#)));
        until(&mut checks, CheckState::Passing).await;
    }

    #[tokio::test]
    async fn failures_do_not_count_in_the_grace_period() {
        // Bound, so that nobody else gets it, and not listened at.
        let socket = TcpSocket::new_v6().unwrap();
        socket
            .bind(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), 0))
            .unwrap();
        let port = socket.local_addr().unwrap().port();
        let check = |grace| {
            checked(&format!(
                r#"{{"type":"tcp","port":{port},"grace_period":"{grace}"}}"#
            ))
        };
        let mut checks = Checks::new(Ipv4Addr::LOCALHOST, Arc::default());
        checks.run(&check("1h"));
        checks.changed().await;
        let first = &checks.current()[0];
        assert!(first.output.contains("refused"), "{first:?}");
        assert_eq!(first.status, CheckState::Warning);
        checks.reset();
        checks.run(&check("1s"));
        until(&mut checks, CheckState::Critical).await;
    }

    #[tokio::test]
    async fn what_was_seen_outlasts_a_sleep_and_nobody_looks_meanwhile() {
        let port = server("x").await;
        let metrics = Arc::new(Metrics::default());
        let mut checks = Checks::new(Ipv4Addr::LOCALHOST, Arc::clone(&metrics));
        let machine = checked(&format!(
            r#"{{"type":"tcp","port":{port},"interval":"100ms"}}"#
        ));
        checks.run(&machine);
        until(&mut checks, CheckState::Passing).await;
        checks.stop();
        let counted = metrics.checks.get();
        let silence = tokio::time::timeout(Duration::from_millis(300), checks.changed()).await;
        assert!(silence.is_err());
        assert_eq!(metrics.checks.get(), counted);
        checks.run(&machine);
        assert_eq!(checks.current()[0].status, CheckState::Passing);
    }

    #[test]
    fn a_check_of_a_service_looks_at_its_port() {
        let machine = machine(
            r#"{"image":"x","checks":{"a":{"type":"tcp"}},
                "services":[{"internal_port":8080,"checks":[{"type":"http","path":"/up"}]}]}"#,
        );
        let plans = plans(&machine, Ipv4Addr::LOCALHOST);
        assert_eq!(plans[0].place.target.port(), 8080);
        assert_eq!(plans[1].name, "servicecheck-00-http-8080");
        assert_eq!(plans[1].path, "/up");
    }
}
