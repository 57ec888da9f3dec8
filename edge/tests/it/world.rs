//! A catalog with one app, an agent that "starts" it, and an edge with a certificate of its own making.

use std::convert::Infallible;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Output;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use base64::Engine as _;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use rcgen::PublicKeyData as _;
use rustls::pki_types::PrivateKeyDer;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use sha2::Digest as _;
use tern_catalog::{
    Catalog, Desired, DesiredState, HostId, HostnameRoute, Machine, MachineConfig, MachineId,
    MachineNumber, MachineState, MachineStatus, NetworkId, SqliteStore, Store, View,
};
use tern_edge::{AccessLogConfig, Edge, EdgeConfig, Leaving, Limits, MachineControl, StartError};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{mpsc, oneshot};

pub const HOST: &str = "shop.tern.test";

pub struct World {
    pub catalog: Catalog,
    pub view: View,
    pub agent: Arc<Agent>,
    pub edge: Edge,
    pub http: SocketAddr,
    pub https: SocketAddr,
    files: tempfile::TempDir,
    spki: String,
}

/// How long a start may take.
pub const WAKE_TIMEOUT: Duration = Duration::from_secs(20);

/// Starts and stops the one Machine: a server on loopback that is there or not.
pub struct Agent {
    catalog: Catalog,
    machine: Machine,
    pub starts: AtomicU32,
    pub sleeps: AtomicU32,
    /// Starts fail while this is set.
    pub broken: AtomicBool,
    /// Apps that start while this is set listen on IPv4 alone.
    pub on_ipv4: AtomicBool,
    /// Starts while this is set are told of as soon as the app listens, and are never done.
    pub early: AtomicBool,
    pub reached: tokio::sync::Notify,
    /// How often it was asked for a start, whatever came of it.
    pub asked: AtomicU32,
    /// Somebody else than the gate uses the Machine while this is set.
    pub in_use: AtomicBool,
    /// How often it was asked for that.
    pub looks: AtomicU32,
    departures: (
        mpsc::UnboundedSender<Leaving>,
        tokio::sync::Mutex<mpsc::UnboundedReceiver<Leaving>>,
    ),
    app: OnceLock<SocketAddr>,
    _place: [TcpSocket; 2],
    server: tokio::sync::Mutex<Option<tokio::task::JoinHandle<()>>>,
    pub hold: Arc<Hold>,
}

/// Once armed, the app keeps the next request until it is released, and says that it has it.
#[derive(Default)]
pub struct Hold {
    pub armed: AtomicBool,
    pub held: tokio::sync::Notify,
    pub released: tokio::sync::Notify,
}

struct OneCertificate(Arc<CertifiedKey>);

impl std::fmt::Debug for OneCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OneCertificate")
    }
}

impl ResolvesServerCert for OneCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

impl World {
    /// The app's Machine sleeps; its service is given as JSON beside the port.
    pub async fn new(service: &str, idle: Duration) -> Self {
        let files = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> =
            Arc::new(SqliteStore::open(&files.path().join("catalog.db")).unwrap());
        let catalog = Catalog::new(Arc::clone(&store));
        let view = View::follow(store).await.unwrap();
        let place = place();
        let free = place[0].local_addr().unwrap();
        let config = format!(
            r#"{{"image": "x", "services": [{{"internal_port": {port}, {service}
                "ports": [{{"port": 80, "handlers": ["http"]}}, {{"port": 443, "handlers": ["tls", "http"]}}]}}]}}"#,
            port = free.port()
        );
        let machine = machine(serde_json::from_str(&config).unwrap());
        let route = HostnameRoute {
            hostname: HOST.parse().unwrap(),
            app: machine.app.clone(),
            created_at: Timestamp::now(),
        };
        catalog.create(&route).await.unwrap();
        catalog.create(&machine).await.unwrap();
        let agent = Arc::new(Agent {
            catalog: catalog.clone(),
            machine: machine.clone(),
            starts: AtomicU32::new(0),
            sleeps: AtomicU32::new(0),
            broken: AtomicBool::new(false),
            on_ipv4: AtomicBool::new(false),
            early: AtomicBool::new(false),
            reached: tokio::sync::Notify::new(),
            asked: AtomicU32::new(0),
            in_use: AtomicBool::new(false),
            looks: AtomicU32::new(0),
            departures: {
                let (tell, told) = mpsc::unbounded_channel();
                (tell, tokio::sync::Mutex::new(told))
            },
            app: OnceLock::from(free),
            _place: place,
            server: tokio::sync::Mutex::new(None),
            hold: Arc::default(),
        });
        agent.tell(MachineState::Suspended).await;
        view.wait_for(|s| s.machine_status.contains_key(&machine.id).then_some(()))
            .await;

        let made = rcgen::generate_simple_self_signed(vec![HOST.to_owned()]).unwrap();
        std::fs::write(files.path().join("ca.pem"), made.cert.pem()).unwrap();
        let spki = base64::prelude::BASE64_STANDARD.encode(sha2::Sha256::digest(
            made.signing_key.subject_public_key_info(),
        ));
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let key = rustls::crypto::ring::sign::any_supported_type(&key).unwrap();
        let certificate = Arc::new(CertifiedKey::new(vec![made.cert.der().clone()], key));
        let config = EdgeConfig {
            http: vec!["127.0.0.1:0".parse().unwrap()],
            https: vec!["127.0.0.1:0".parse().unwrap()],
            service_addresses: vec![[127, 0, 0, 1].into()],
            service_ports: tern_catalog::PortRanges::default(),
            region: "ams".into(),
            host: HostId(1),
            autostop_after: idle,
            wake_timeout: WAKE_TIMEOUT,
            threads: 2,
            http3: true,
            early_wake: true,
            access_log: Some(AccessLogConfig {
                path: Some(files.path().join("access.log")),
                sample: 1.0,
            }),
            limits: Limits::default(),
        };
        let resolver = Arc::new(OneCertificate(certificate));
        let edge = Edge::start(config, view.clone(), resolver, agent.clone())
            .await
            .unwrap();
        let (http, https) = (edge.addresses()[0], edge.addresses()[1]);
        Self {
            catalog,
            view,
            agent,
            edge,
            http,
            https,
            files,
            spki,
        }
    }

    /// `curl https://shop.tern.test<path>` with more arguments.
    pub async fn curl(&self, path: &str, more: &[&str]) -> Output {
        self.curl_to(&format!("https://{HOST}:{}{path}", self.https.port()), more)
            .await
    }

    /// `curl` to an address of ours.
    pub async fn curl_to(&self, url: &str, more: &[&str]) -> Output {
        let mut command = tokio::process::Command::new("curl");
        command
            .args(["-sS", "-i", "--max-time", "30", "--cacert"])
            .arg(self.files.path().join("ca.pem"));
        for port in [self.http.port(), self.https.port()] {
            command
                .arg("--resolve")
                .arg(format!("{HOST}:{port}:127.0.0.1"));
        }
        command
            .args(more)
            .arg(url)
            .output()
            .await
            .expect("curl is needed: apt-get install curl")
    }

    pub async fn text(&self, path: &str, more: &[&str]) -> String {
        String::from_utf8_lossy(&self.curl(path, more).await.stdout).into_owned()
    }

    /// The file with the certificate, which is its own authority.
    pub fn certificate(&self) -> std::path::PathBuf {
        self.files.path().join("ca.pem")
    }

    /// The access log's lines, once there are so many.
    pub async fn access_log(&self, count: usize) -> Vec<serde_json::Value> {
        let path = self.files.path().join("access.log");
        loop {
            let text = std::fs::read_to_string(&path).unwrap();
            let whole = text.split_inclusive('\n').filter(|l| l.ends_with('\n'));
            let all: Vec<_> = whole.map(|l| serde_json::from_str(l).unwrap()).collect();
            if all.len() >= count {
                return all;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The hash of the certificate's public key, as browsers pin it.
    pub fn spki(&self) -> &str {
        &self.spki
    }

    pub fn plain(&self, path: &str) -> String {
        format!("http://{HOST}:{}{path}", self.http.port())
    }
}

impl Agent {
    async fn tell(&self, state: MachineState) {
        let status = MachineStatus {
            id: self.machine.id.clone(),
            state,
            reason: None,
            generation: 1,
            instance_id: self.machine.instance_id.clone(),
            image_digest: None,
            events: Vec::new(),
            checks: Vec::new(),
            updated_at: Timestamp::now(),
        };
        self.catalog.put(&status).await.unwrap();
    }

    /// Ends the app as a crash would: nobody is told.
    pub async fn crash(&self) {
        if let Some(server) = self.server.lock().await.take() {
            server.abort();
            let _ = server.await;
        }
    }

    /// Suspends it as its owner does: when its requests have ended. Who asks for a start meanwhile waits.
    pub async fn suspend_by_hand(&self) {
        let mut server = self.server.lock().await;
        let (ready, is_ready) = oneshot::channel();
        let (suspended, is_suspended) = oneshot::channel();
        let leaving = Leaving {
            machine: self.machine.id.clone(),
            ready,
            suspended: is_suspended,
        };
        self.departures.0.send(leaving).unwrap();
        is_ready.await.unwrap();
        let server = server.take().unwrap();
        server.abort();
        let _ = server.await;
        self.sleeps.fetch_add(1, Ordering::SeqCst);
        self.tell(MachineState::Suspended).await;
        suspended.send(()).unwrap();
    }
}

#[async_trait]
impl MachineControl for Agent {
    async fn start(&self, _: &MachineId) -> Result<(), StartError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let mut server = self.server.lock().await;
        if server.is_some() {
            return Ok(());
        }
        self.starts.fetch_add(1, Ordering::SeqCst);
        if self.broken.load(Ordering::SeqCst) {
            // Its frames were taken, and then its snapshot was not.
            self.reached.notify_one();
            tokio::task::yield_now().await;
            return Err(StartError {
                text: "out of order".into(),
            });
        }
        let mut address = *self.app.get().unwrap();
        if self.on_ipv4.load(Ordering::SeqCst) {
            address.set_ip(Ipv4Addr::LOCALHOST.into());
        }
        let hold = self.hold.clone();
        // The app listens a while after its process runs, as apps do.
        *server = Some(tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(150)).await;
            serve(TcpListener::bind(address).await.unwrap(), hold).await;
        }));
        drop(server);
        if self.early.load(Ordering::SeqCst) {
            self.reached.notify_one();
            return std::future::pending().await;
        }
        self.tell(MachineState::Started).await;
        Ok(())
    }

    async fn reachable(&self, _: &MachineId) {
        self.reached.notified().await;
    }

    fn ipv4(&self, _: &MachineId) -> Option<Ipv4Addr> {
        Some(Ipv4Addr::LOCALHOST)
    }

    async fn suspend(&self, _: &MachineId) -> Result<(), String> {
        self.crash().await;
        self.sleeps.fetch_add(1, Ordering::SeqCst);
        self.tell(MachineState::Suspended).await;
        Ok(())
    }

    async fn stop(&self, id: &MachineId) -> Result<(), String> {
        self.suspend(id).await
    }

    fn last_use(&self, _: &MachineId) -> Option<Instant> {
        self.looks.fetch_add(1, Ordering::SeqCst);
        self.in_use.load(Ordering::SeqCst).then(Instant::now)
    }

    async fn leaving(&self) -> Leaving {
        self.departures.1.lock().await.recv().await.unwrap()
    }
}

/// The port of an app that is not there yet, of both families: bound, and never listened at, so that no other test
/// listens there meanwhile, and not the edge itself.
fn place() -> [TcpSocket; 2] {
    loop {
        let place = [TcpSocket::new_v6().unwrap(), TcpSocket::new_v4().unwrap()];
        for socket in &place {
            socket.set_reuseaddr(true).unwrap();
        }
        place[0].bind("[::1]:0".parse().unwrap()).unwrap();
        let port = place[0].local_addr().unwrap().port();
        if place[1].bind((Ipv4Addr::LOCALHOST, port).into()).is_ok() {
            return place;
        }
    }
}

/// Answers with the request it got, headers a line each; under `/echo` with its body.
async fn serve(listener: TcpListener, hold: Arc<Hold>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let hold = hold.clone();
        let answer = service_fn(move |request: Request<Incoming>| {
            let hold = hold.clone();
            async move {
                if hold.armed.swap(false, Ordering::SeqCst) {
                    hold.held.notify_one();
                    hold.released.notified().await;
                }
                reply(request).await
            }
        });
        connections.spawn(async move {
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), answer)
                .await;
        });
    }
}

async fn reply(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    if let Some(millis) = request.uri().path().strip_prefix("/slow/") {
        tokio::time::sleep(Duration::from_millis(millis.parse().unwrap_or(0))).await;
    }
    if request.uri().path() == "/early" {
        return Ok(Response::new(Full::new(Bytes::from("early"))));
    }
    if request.uri().path() == "/echo" {
        let body = request.into_body().collect().await.unwrap();
        return Ok(Response::new(Full::new(body.to_bytes())));
    }
    let mut text = format!("{} {}\n", request.method(), request.uri());
    for (name, value) in request.headers() {
        text.push_str(&format!("got-{name}: {}\n", value.to_str().unwrap_or("?")));
    }
    Ok(Response::new(Full::new(Bytes::from(text))))
}

fn machine(config: MachineConfig) -> Machine {
    Machine {
        id: MachineId::random(),
        name: String::new(),
        app: "shop".parse().unwrap(),
        network: NetworkId(1),
        host: HostId(1),
        region: "ams".into(),
        number: MachineNumber(1),
        private_ip: Ipv6Addr::LOCALHOST,
        config,
        instance_id: "1".into(),
        version: 1,
        desired: Desired {
            state: DesiredState::Started,
            generation: 1,
        },
        cordoned: false,
        created_at: Timestamp::now(),
        updated_at: Timestamp::now(),
    }
}
