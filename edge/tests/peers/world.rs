//! An edge in this process before one app, whose Machine runs, or sleeps until it may wake.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use jiff::Timestamp;
use rustls::pki_types::PrivateKeyDer;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use tern_catalog::{
    Catalog, Desired, DesiredState, HostId, HostnameRoute, Machine, MachineId, MachineNumber,
    MachineState, MachineStatus, NetworkId, SqliteStore, Store, View,
};
use tern_edge::{Edge, EdgeConfig, Leaving, Limits, MachineControl, StartError};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

pub const HOST: &str = "shop.tern.test";

pub struct World {
    pub http: SocketAddr,
    pub https: SocketAddr,
    pub certificate: rustls::pki_types::CertificateDer<'static>,
    agent: Arc<Agent>,
    _edge: Edge,
    files: tempfile::TempDir,
}

/// What a world is like, where not as usual.
pub struct Options<'a> {
    /// `http_options` of the service's ports.
    pub http: &'a str,
    pub limits: Limits,
    /// The Machine sleeps, and wakes no sooner than by [`World::wake`].
    pub asleep: bool,
    /// More services, as JSON that ends with a comma.
    pub services: &'a str,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            http: "{}",
            limits: Limits::default(),
            asleep: false,
            services: "",
        }
    }
}

impl World {
    pub async fn new(app_port: u16) -> Self {
        Self::with(app_port, Options::default()).await
    }

    /// An app that speaks HTTP/2 without TLS.
    pub async fn h2(app_port: u16) -> Self {
        let http = r#"{"h2_backend": true}"#;
        let options = Options {
            http,
            ..Options::default()
        };
        Self::with(app_port, options).await
    }

    /// With limits of its own.
    pub async fn limited(app_port: u16, limits: Limits) -> Self {
        let options = Options {
            limits,
            ..Options::default()
        };
        Self::with(app_port, options).await
    }

    pub async fn with(app_port: u16, options: Options<'_>) -> Self {
        let files = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> =
            Arc::new(SqliteStore::open(&files.path().join("catalog.db")).unwrap());
        let catalog = Catalog::new(Arc::clone(&store));
        let view = View::follow(store).await.unwrap();
        let machine = machine(app_port, options.http, options.services);
        let route = HostnameRoute {
            hostname: HOST.parse().unwrap(),
            app: machine.app.clone(),
            created_at: Timestamp::now(),
        };
        let state = if options.asleep {
            MachineState::Suspended
        } else {
            MachineState::Started
        };
        catalog.create(&route).await.unwrap();
        catalog.create(&machine).await.unwrap();
        catalog.put(&status(&machine, state)).await.unwrap();
        view.wait_for(|s| s.machine_status.contains_key(&machine.id).then_some(()))
            .await;
        let agent = Arc::new(Agent {
            catalog,
            machine,
            starting: Notify::new(),
            may_wake: CancellationToken::new(),
        });

        let made = rcgen::generate_simple_self_signed(vec![HOST.to_owned()]).unwrap();
        std::fs::write(files.path().join("ca.pem"), made.cert.pem()).unwrap();
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let key = rustls::crypto::ring::sign::any_supported_type(&key).unwrap();
        let certificate = made.cert.der().clone();
        let resolver = SingleCertAndKey::from(CertifiedKey::new(vec![certificate.clone()], key));
        let config = EdgeConfig {
            http: vec!["127.0.0.1:0".parse().unwrap()],
            https: vec!["127.0.0.1:0".parse().unwrap()],
            service_addresses: vec![[127, 0, 0, 1].into()],
            service_ports: tern_catalog::PortRanges::default(),
            region: "ams".into(),
            host: HostId(1),
            autostop_after: Duration::from_secs(3600),
            wake_timeout: Duration::from_secs(60),
            // One, so that all clients share its connections to the app.
            http3: false,
            early_wake: true,
            threads: 1,
            access_log: None,
            limits: options.limits,
        };
        let edge = Edge::start(config, view, Arc::new(resolver), agent.clone())
            .await
            .unwrap();
        Self {
            http: edge.addresses()[0],
            https: edge.addresses()[1],
            certificate,
            agent,
            _edge: edge,
            files,
        }
    }

    /// The certificate, for tools.
    pub fn ca(&self) -> PathBuf {
        self.files.path().join("ca.pem")
    }

    /// Has the Machine another configuration, and the edge know it.
    pub async fn reconfigure(&self, change: impl FnOnce(&mut Machine)) {
        let mut machine = self.agent.machine.clone();
        change(&mut machine);
        self.agent.catalog.put(&machine).await.unwrap();
    }

    /// Another app's Machine.
    pub async fn add(&self, change: impl FnOnce(&mut Machine)) {
        let mut machine = self.agent.machine.clone();
        machine.id = MachineId::random();
        change(&mut machine);
        self.agent.catalog.create(&machine).await.unwrap();
    }

    /// Waits until a request has the Machine started.
    pub async fn until_starting(&self) {
        self.agent.starting.notified().await;
    }

    /// Lets it.
    pub fn wake(&self) {
        self.agent.may_wake.cancel();
    }

    /// `curl https://shop.tern.test<path>`, with something on its standard input.
    pub async fn curl(&self, path: &str, more: &[&str], input: &[u8]) -> String {
        let mut command = tokio::process::Command::new("curl");
        let port = self.https.port();
        command
            .args(["-sS", "-i", "--max-time", "60", "--cacert"])
            .arg(self.ca())
            .arg("--resolve")
            .arg(format!("{HOST}:{port}:127.0.0.1"))
            .args(more)
            .arg(format!("https://{HOST}:{port}{path}"));
        let output = piped(command, input).await;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "curl: {errors}, after {text:?}");
        text
    }
}

/// Runs a tool to its end, with something on its standard input.
pub async fn piped(mut command: tokio::process::Command, input: &[u8]) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; run .ci/setup test"));
    let mut stdin = child.stdin.take().unwrap();
    // A tool that has failed does not read.
    let _ = stdin.write_all(input).await;
    drop(stdin);
    child.wait_with_output().await.unwrap()
}

fn machine(port: u16, http_options: &str, services: &str) -> Machine {
    let config = format!(
        r#"{{"image": "x", "services": [{services} {{"internal_port": {port}, "autostop": "off",
            "concurrency": {{"type": "requests", "soft_limit": 1000}}, "ports": [
            {{"port": 80, "handlers": ["http"], "http_options": {http_options}}},
            {{"port": 443, "handlers": ["tls", "http"], "http_options": {http_options}}}]}}]}}"#
    );
    Machine {
        id: MachineId::random(),
        name: String::new(),
        app: "shop".parse().unwrap(),
        network: NetworkId(1),
        host: HostId(1),
        region: "ams".into(),
        number: MachineNumber(1),
        private_ip: Ipv6Addr::LOCALHOST,
        config: serde_json::from_str(&config).unwrap(),
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

fn status(machine: &Machine, state: MachineState) -> MachineStatus {
    MachineStatus {
        id: machine.id.clone(),
        state,
        reason: None,
        generation: 1,
        instance_id: machine.instance_id.clone(),
        image_digest: None,
        events: Vec::new(),
        checks: Vec::new(),
        updated_at: Timestamp::now(),
    }
}

/// Starts the Machine when it may.
struct Agent {
    catalog: Catalog,
    machine: Machine,
    starting: Notify,
    may_wake: CancellationToken,
}

#[async_trait]
impl MachineControl for Agent {
    async fn start(&self, _: &MachineId) -> Result<(), StartError> {
        self.starting.notify_one();
        self.may_wake.cancelled().await;
        let status = status(&self.machine, MachineState::Started);
        self.catalog.put(&status).await.unwrap();
        Ok(())
    }

    /// Its app listens all the time; nobody is to find that out before it wakes.
    async fn reachable(&self, _: &MachineId) {
        std::future::pending().await
    }

    fn ipv4(&self, _: &MachineId) -> Option<Ipv4Addr> {
        Some(Ipv4Addr::LOCALHOST)
    }

    async fn suspend(&self, _: &MachineId) -> Result<(), String> {
        Err("it always runs".into())
    }

    async fn stop(&self, _: &MachineId) -> Result<(), String> {
        Err("it always runs".into())
    }

    fn last_use(&self, _: &MachineId) -> Option<Instant> {
        None
    }

    async fn leaving(&self) -> Leaving {
        std::future::pending().await
    }
}
