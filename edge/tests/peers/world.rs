//! An edge in this process before one app, whose Machine runs.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use rustls::pki_types::PrivateKeyDer;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use tern_catalog::{
    Catalog, Desired, DesiredState, HostId, HostnameRoute, Machine, MachineId, MachineNumber,
    MachineState, MachineStatus, NetworkId, SqliteStore, Store, View,
};
use tern_edge::{Edge, EdgeConfig, MachineControl, StartError};
use tokio::io::AsyncWriteExt as _;

pub const HOST: &str = "shop.tern.test";

pub struct World {
    pub http: SocketAddr,
    pub https: SocketAddr,
    pub certificate: rustls::pki_types::CertificateDer<'static>,
    _edge: Edge,
    files: tempfile::TempDir,
}

impl World {
    pub async fn new(app_port: u16) -> Self {
        Self::with(app_port, "{}").await
    }

    /// With `http_options` of its ports.
    pub async fn with(app_port: u16, http_options: &str) -> Self {
        let files = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> =
            Arc::new(SqliteStore::open(&files.path().join("catalog.db")).unwrap());
        let catalog = Catalog::new(Arc::clone(&store));
        let view = View::follow(store).await.unwrap();
        let machine = machine(app_port, http_options);
        let route = HostnameRoute {
            hostname: HOST.parse().unwrap(),
            app: machine.app.clone(),
            created_at: Timestamp::now(),
        };
        let status = MachineStatus {
            id: machine.id.clone(),
            state: MachineState::Started,
            reason: None,
            generation: 1,
            instance_id: machine.instance_id.clone(),
            image_digest: None,
            events: Vec::new(),
            checks: Vec::new(),
            updated_at: Timestamp::now(),
        };
        catalog.create(&route).await.unwrap();
        catalog.create(&machine).await.unwrap();
        catalog.put(&status).await.unwrap();
        view.wait_for(|s| s.machine_status.contains_key(&machine.id).then_some(()))
            .await;

        let made = rcgen::generate_simple_self_signed(vec![HOST.to_owned()]).unwrap();
        std::fs::write(files.path().join("ca.pem"), made.cert.pem()).unwrap();
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let key = rustls::crypto::ring::sign::any_supported_type(&key).unwrap();
        let certificate = made.cert.der().clone();
        let resolver = SingleCertAndKey::from(CertifiedKey::new(vec![certificate.clone()], key));
        let config = EdgeConfig {
            http: vec!["127.0.0.1:0".parse().unwrap()],
            https: vec!["127.0.0.1:0".parse().unwrap()],
            region: "ams".into(),
            host: HostId(1),
            autostop_after: Duration::from_secs(3600),
            wake_timeout: Duration::from_secs(20),
        };
        let edge = Edge::start(config, view, Arc::new(resolver), Arc::new(Runs))
            .await
            .unwrap();
        Self {
            http: edge.addresses()[0],
            https: edge.addresses()[1],
            certificate,
            _edge: edge,
            files,
        }
    }

    /// A file for a tool to read.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.files.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// `curl https://shop.tern.test<path>`, with something on its standard input.
    pub async fn curl(&self, path: &str, more: &[&str], input: &[u8]) -> String {
        let mut command = tokio::process::Command::new("curl");
        let port = self.https.port();
        command
            .args(["-sS", "-i", "--max-time", "60", "--cacert"])
            .arg(self.files.path().join("ca.pem"))
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

fn machine(port: u16, http_options: &str) -> Machine {
    let config = format!(
        r#"{{"image": "x", "services": [{{"internal_port": {port}, "autostop": "off",
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

/// A Machine that always runs.
struct Runs;

#[async_trait]
impl MachineControl for Runs {
    async fn start(&self, _: &MachineId) -> Result<(), StartError> {
        Ok(())
    }

    async fn reachable(&self, _: &MachineId) {}

    fn ipv4(&self, _: &MachineId) -> Option<Ipv4Addr> {
        Some(Ipv4Addr::LOCALHOST)
    }

    async fn suspend(&self, _: &MachineId) -> Result<(), String> {
        Err("it always runs".into())
    }

    async fn stop(&self, _: &MachineId) -> Result<(), String> {
        Err("it always runs".into())
    }
}
