//! The contender of ours: an edge, as `tern serve` starts one, before a Machine that is the origin.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use async_trait::async_trait;
use jiff::Timestamp;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use tern_catalog::{
    Catalog, Desired, DesiredState, HostId, HostnameRoute, Machine, MachineId, MachineNumber,
    MachineState, MachineStatus, NetworkId, SqliteStore, Store, View,
};
use tern_edge::{Edge, EdgeConfig, Leaving, Limits, MachineControl, StartError};

use crate::HOST;
use crate::contender::Kind;

/// Serves until it is killed; the certificate is in the working directory.
pub fn run() -> Result<()> {
    // As `tern serve` does; on one core that is one worker.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        // Each round's own, beside those of the rounds before.
        let catalog = format!("catalog-{}.db", std::process::id());
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(catalog.as_ref())?);
        let catalog = Catalog::new(Arc::clone(&store));
        let view = View::follow(store).await?;
        let machine = machine()?;
        let route = HostnameRoute {
            hostname: HOST.parse()?,
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
        catalog.create(&route).await?;
        catalog.create(&machine).await?;
        catalog.put(&status).await?;
        view.wait_for(|all| all.machine_status.contains_key(&machine.id).then_some(()))
            .await;

        let key = PrivateKeyDer::from_pem_file("key.pem")?;
        let key = rustls::crypto::ring::sign::any_supported_type(&key)?;
        let chain = vec![CertificateDer::from_pem_file("cert.pem")?];
        let resolver = Arc::new(SingleCertAndKey::from(CertifiedKey::new(chain, key)));
        let config = EdgeConfig {
            http: Vec::new(),
            https: vec![Kind::Tern.address()],
            service_addresses: vec![[127, 0, 0, 1].into()],
            service_ports: tern_catalog::PortRanges::default(),
            region: "ams".into(),
            host: HostId(1),
            autostop_after: Duration::from_secs(3600),
            wake_timeout: Duration::from_secs(20),
            threads: 1,
            http3: true,
            early_wake: true,
            access_log: None,
            limits: Limits::default(),
        };
        let _edge = Edge::start(config, view, resolver, Arc::new(Runs))
            .await
            .context("the edge does not start")?;
        std::future::pending().await
    })
}

fn machine() -> Result<Machine> {
    let config = serde_json::from_str(
        r#"{"image": "x", "services": [{"internal_port": 18080, "autostop": "off",
            "ports": [{"port": 443, "handlers": ["tls", "http"]}]}]}"#,
    )?;
    Ok(Machine {
        id: MachineId::random(),
        name: String::new(),
        app: "bench".parse()?,
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
    })
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

    fn last_use(&self, _: &MachineId) -> Option<Instant> {
        None
    }

    async fn leaving(&self) -> Leaving {
        std::future::pending().await
    }
}
