//! An API on a fresh catalog, with an agent that does at once what is wanted.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{SinkExt as _, StreamExt as _};
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt as _;
use jiff::Timestamp;
use parking_lot::Mutex;
use serde_json::Value;
use tern_catalog::{
    Catalog, DesiredState, Entry, Host, HostAlive, HostId, HostStatus, LeaseId, Listing, Machine,
    MachineId, MachineState, MachineStatus, Network, NetworkId, OrgSlug, Organization, PortRanges,
    Resources, Revision, Scope, SealedKey, SnapshotStatus, SqliteStore, Store, StoreError, Token,
    Transaction, View, Volume, VolumeState, VolumeStatus, Watch,
};
use tern_guest::ExitStatus;
use tower::ServiceExt as _;

use crate::auth::token_hash;
use crate::forward::Forwarder;
use crate::gateway::{
    ExecOutput, ExecRequest, ExecSession, GatewayError, HostGateway, LogLine, LogQuery,
    MachineMemory, StartPhase, StartTrace,
};
use crate::registry::Registry;
use crate::server::{ApiConfig, Shared};

pub const ADMIN: &str = "tern_admin";
pub const RIVAL: &str = "tern_rival";

pub struct World {
    router: Router,
    pub shared: Shared,
    pub catalog: Catalog,
    pub gateway: Arc<FakeGateway>,
    /// The store as the API has it; `catalog` is beside it, as others are.
    pub crossed: Arc<Crossed>,
    agent: tokio::task::JoinHandle<()>,
    deletions: tokio::task::JoinHandle<()>,
    _files: tempfile::TempDir,
}

/// A store in which somebody else is faster, where a test says so.
pub struct Crossed {
    store: Arc<dyn Store>,
    /// Done just before the next commit.
    pub first: Mutex<Option<Transaction>>,
}

#[async_trait]
impl Store for Crossed {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.store.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.store.list(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<Revision, StoreError> {
        let first = self.first.lock().take();
        if let Some(first) = first {
            self.store.commit(first).await?;
        }
        self.store.commit(transaction).await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        self.store.watch(prefix, after).await
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.store.grant(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.store.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.store.revoke(lease).await
    }
}

/// Remembers what it was asked.
#[derive(Default)]
pub struct FakeGateway {
    pub signals: AtomicU32,
    pub memory_limit: AtomicU32,
    /// What commands do, in the order they are asked for; others say what they are.
    pub sessions: Mutex<VecDeque<ExecSession>>,
    commands: AtomicU32,
    /// Images that hosts were to have, in order.
    pub prepared: Mutex<Vec<String>>,
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl World {
    pub async fn new() -> Self {
        let files = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> =
            Arc::new(SqliteStore::open(&files.path().join("catalog.db")).unwrap());
        let catalog = Catalog::new(Arc::clone(&store));
        for (n, slug) in [(1, "personal"), (2, "rivals")] {
            let network = Network {
                id: NetworkId(n),
                organization: slug.parse().unwrap(),
                name: "default".into(),
            };
            catalog.create(&network).await.unwrap();
            let organization = Organization {
                slug: slug.parse().unwrap(),
                name: slug.into(),
                default_network: NetworkId(n),
                created_at: Timestamp::now(),
            };
            catalog.create(&organization).await.unwrap();
        }
        for (token, org) in [(ADMIN, None), (RIVAL, Some("rivals"))] {
            let organization = org.map(|o: &str| o.parse().unwrap());
            let record = token_of(token, organization, Scope::Full);
            catalog.create(&record).await.unwrap();
        }
        host(&catalog, 1, "one", "local", 1 << 15).await;
        let crossed = Arc::new(Crossed {
            store: Arc::clone(&store),
            first: Mutex::new(None),
        });
        let view = View::follow(store).await.unwrap();
        let agent = tokio::spawn(agent(catalog.clone(), view.clone()));
        let gateway = Arc::new(FakeGateway::default());
        let registry_dir = files.path().join("registry");
        let config = ApiConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            host: HostId(1),
            shared: false,
            registry_dir: registry_dir.clone(),
            region: "local".into(),
            domain: Some("tern.test".into()),
            service_ports: PortRanges::default(),
            internal_token: "internal".into(),
            sealer: Arc::new(FakeSealer),
            inviter: Arc::new(FakeInviter),
        };
        let shared = Shared {
            config: Arc::new(config),
            catalog: Catalog::new(crossed.clone()),
            view,
            gateway: gateway.clone(),
            registry: Arc::new(Registry::open(&registry_dir).unwrap()),
            forwarder: Forwarder::new(|_| "127.0.0.1:9".parse().unwrap()),
        };
        Self {
            deletions: tokio::spawn(crate::deletion::finish_all(shared.clone())),
            router: crate::routes::router(shared.clone()),
            shared,
            catalog,
            gateway,
            crossed,
            agent,
            _files: files,
        }
    }

    /// As [`World::send`], with the answer's body as it comes.
    pub async fn open(&self, request: Request<Body>) -> http::Response<Body> {
        self.router.clone().oneshot(request).await.unwrap()
    }

    pub async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.open(request).await;
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Answer {
            status: parts.status,
            headers: parts.headers,
            body,
        }
    }

    pub async fn call(
        &self,
        token: &str,
        method: Method,
        path: &str,
        body: impl Into<Body>,
    ) -> Answer {
        let request = Request::builder().method(method).uri(path);
        let request = request.header("authorization", format!("Bearer {token}"));
        self.send(
            request
                .header("content-type", "application/json")
                .body(body.into())
                .unwrap(),
        )
        .await
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.call(ADMIN, Method::GET, path, Body::empty()).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.call(ADMIN, Method::POST, path, body.to_string()).await
    }

    /// The host does nothing until it is [back](Self::host_is_back).
    pub async fn host_goes_away(&mut self) {
        self.agent.abort();
        let _ = (&mut self.agent).await;
    }

    pub fn host_is_back(&mut self) {
        self.agent = tokio::spawn(agent(self.catalog.clone(), self.shared.view.clone()));
    }

    pub async fn app(&self, name: &str) {
        let answer = self
            .post(
                "/v1/apps",
                serde_json::json!({"app_name": name, "org_slug": "personal"}),
            )
            .await;
        assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
    }

    /// One more host, that is alive and has so much memory.
    pub async fn host(&self, id: u32, region: &str, memory_mib: u64) {
        let revision = host(&self.catalog, id, &format!("h{id}"), region, memory_mib).await;
        self.shared.seen(revision).await;
    }

    /// A Machine of an image that is not ours.
    pub async fn machine(&self, app: &str) -> String {
        let body = serde_json::json!({"config": {"image": "example.com/x:1"}});
        let answer = self.post(&format!("/v1/apps/{app}/machines"), body).await;
        answer.json()["id"].as_str().unwrap().to_owned()
    }
}

/// Another host's API on the same catalog; ends with this.
pub struct SecondHost {
    pub gateway: Arc<FakeGateway>,
    _end: tokio_util::sync::DropGuard,
}

/// Where the only other host of a test is.
static SECOND: std::sync::OnceLock<std::net::SocketAddr> = std::sync::OnceLock::new();

impl World {
    /// Starts the API of another host, and has this one know where it is.
    pub async fn as_host(&mut self, host: HostId) -> SecondHost {
        let gateway = Arc::new(FakeGateway::default());
        let config = ApiConfig {
            host,
            ..ApiConfig::clone(&self.shared.config)
        };
        let server = crate::ApiServer::bind(
            config,
            self.catalog.clone(),
            self.shared.view.clone(),
            gateway.clone(),
        );
        let server = server.await.unwrap();
        // nextest runs each test in a process of its own.
        SECOND.set(server.local_addr().unwrap()).unwrap();
        let end = tokio_util::sync::CancellationToken::new();
        tokio::spawn(server.run(end.clone()));
        self.shared.forwarder = Forwarder::new(|_| *SECOND.get().unwrap());
        self.router = crate::routes::router(self.shared.clone());
        SecondHost {
            gateway,
            _end: end.drop_guard(),
        }
    }
}

impl FakeGateway {
    pub fn commands(&self) -> u32 {
        self.commands.load(Ordering::Relaxed)
    }
}

/// The record of a token that never ends.
pub fn token_of(token: &str, organization: Option<OrgSlug>, scope: Scope) -> Token {
    Token {
        hash: token_hash(token),
        name: token.into(),
        organization,
        scope,
        created_at: Timestamp::now(),
        expires_at: None,
        parent: None,
        tail: String::new(),
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.agent.abort();
        self.deletions.abort();
    }
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} {:?}",
            self.status,
            String::from_utf8_lossy(&self.body)
        )
    }
}

#[derive(Debug)]
struct FakeInviter;

#[async_trait]
impl crate::Inviter for FakeInviter {
    async fn invite(
        &self,
        region: Option<String>,
        time: Duration,
    ) -> Result<crate::Invitation, String> {
        let region = region.ok_or("no region")?;
        Ok(crate::Invitation {
            join: "address/fingerprint/secret".into(),
            region,
            expires_at: Timestamp::now() + time,
        })
    }
}

/// Hides values as far as a look at the catalog shows.
#[derive(Debug)]
struct FakeSealer;

impl crate::secrets::SecretSealer for FakeSealer {
    fn seal(&self, purpose: &str, value: &[u8]) -> Result<SealedKey, String> {
        let hidden: Vec<u8> = value.iter().map(|byte| byte ^ 0x55).collect();
        Ok(SealedKey {
            algorithm: "xor".into(),
            nonce: purpose.into(),
            ciphertext: hex::encode(hidden),
        })
    }

    fn digest(&self, purpose: &str, value: &[u8]) -> String {
        let mut all = purpose.as_bytes().to_vec();
        all.extend_from_slice(value);
        token_hash(&String::from_utf8_lossy(&all))[..16].to_owned()
    }
}

async fn host(catalog: &Catalog, id: u32, name: &str, region: &str, memory_mib: u64) -> Revision {
    let (id, now) = (HostId(id), Timestamp::now());
    let host = Host {
        id,
        name: name.into(),
        region: region.into(),
        public_key: format!("key {id}"),
        endpoint: "192.0.2.1:51820".parse().unwrap(),
        started_at: now,
    };
    catalog.create(&host).await.unwrap();
    let all = Resources {
        memory_mib,
        cpu_sixteenths: 1024,
    };
    let status = HostStatus {
        id,
        version: "0".into(),
        all,
        taken: Resources::default(),
        seen_at: now,
    };
    catalog.create(&status).await.unwrap();
    let alive = HostAlive {
        id,
        session: "s".into(),
        boot: "b".into(),
        since: now,
    };
    catalog.create(&alive).await.unwrap()
}

/// What a host's agent does, as far as the catalog shows it.
async fn agent(catalog: Catalog, view: View) {
    let mut changes = view.changes();
    loop {
        let snapshot = view.snapshot();
        for machine in snapshot.machines.values() {
            let seen = snapshot
                .machine_status
                .get(&machine.id)
                .map(|s| s.generation);
            if seen < Some(machine.desired.generation) {
                obey(&catalog, machine).await;
            }
        }
        for volume in snapshot.volumes.values() {
            tend(&catalog, volume, snapshot.volume_status.get(&volume.id)).await;
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

async fn obey(catalog: &Catalog, machine: &Machine) {
    let state = match machine.desired.state {
        DesiredState::Created => MachineState::Created,
        DesiredState::Started | DesiredState::Restarted { .. } => MachineState::Started,
        DesiredState::Stopped { .. } => MachineState::Stopped,
        DesiredState::Suspended => MachineState::Suspended,
        DesiredState::Destroyed { .. } => {
            catalog
                .delete::<MachineStatus>(machine.id.as_str())
                .await
                .unwrap();
            catalog
                .delete::<Machine>(machine.id.as_str())
                .await
                .unwrap();
            return;
        }
    };
    let status = MachineStatus {
        id: machine.id.clone(),
        state,
        reason: None,
        generation: machine.desired.generation,
        instance_id: machine.instance_id.clone(),
        image_digest: None,
        events: Vec::new(),
        checks: Vec::new(),
        updated_at: Timestamp::now(),
    };
    catalog.put(&status).await.unwrap();
}

async fn tend(catalog: &Catalog, volume: &Volume, seen: Option<&Arc<VolumeStatus>>) {
    if volume.destroyed {
        catalog
            .delete::<VolumeStatus>(volume.id.as_str())
            .await
            .unwrap();
        catalog.delete::<Volume>(volume.id.as_str()).await.unwrap();
        return;
    }
    let snapshots = volume.snapshots.keys().map(|id| {
        let made = SnapshotStatus {
            created_at: Timestamp::UNIX_EPOCH,
            bytes: 4096,
            reason: None,
        };
        (id.clone(), made)
    });
    let status = VolumeStatus {
        id: volume.id.clone(),
        state: VolumeState::Created,
        reason: None,
        size_gb: volume.size_gb,
        snapshots: snapshots.collect(),
        updated_at: Timestamp::UNIX_EPOCH,
    };
    if seen.is_none_or(|seen| **seen != status) {
        catalog.put(&status).await.unwrap();
    }
}

#[async_trait]
impl HostGateway for FakeGateway {
    async fn prepare(&self, _: &MachineId, image: &str) -> Result<(), GatewayError> {
        if image.contains("absent") {
            let text = format!("the image {image} cannot be had: manifest unknown");
            return Err(GatewayError::Failed(text));
        }
        self.prepared.lock().push(image.to_owned());
        Ok(())
    }

    async fn accepts(&self, _: &MachineId, port: u16) -> Result<bool, GatewayError> {
        Ok(port == 3000)
    }

    async fn exec(&self, _: &MachineId, request: ExecRequest) -> Result<ExecSession, GatewayError> {
        self.commands.fetch_add(1, Ordering::Relaxed);
        if request.command[0] == "absent" {
            return Err(GatewayError::NotRunning("it is not running".into()));
        }
        if let Some(session) = self.sessions.lock().pop_front() {
            return Ok(session);
        }
        let exit = ExitStatus {
            code: 3,
            ..ExitStatus::default()
        };
        let said = [
            ExecOutput::Stdout(request.command.join("|").into()),
            ExecOutput::Exit(exit),
        ];
        Ok(ExecSession {
            inputs: Box::pin(futures::sink::drain().sink_map_err(|never| match never {})),
            outputs: stream::iter(said).map(Ok).boxed(),
        })
    }

    async fn signal(&self, _: &MachineId, signal: i32) -> Result<(), GatewayError> {
        self.signals.store(signal.unsigned_abs(), Ordering::Relaxed);
        Ok(())
    }

    async fn start_trace(&self, _: &MachineId) -> Result<StartTrace, GatewayError> {
        Ok(StartTrace {
            began_unix_us: 7,
            cold: Some(true),
            phases: vec![StartPhase {
                side: "monitor".into(),
                name: "kvm".into(),
                at_us: 5,
            }],
        })
    }

    async fn memory(&self, _: &MachineId) -> Result<MachineMemory, GatewayError> {
        Ok(MachineMemory {
            limit_mb: self.memory_limit.load(Ordering::Relaxed),
            available_mb: 100,
        })
    }

    async fn limit_memory(&self, _: &MachineId, mb: u32) -> Result<(), GatewayError> {
        self.memory_limit.store(mb, Ordering::Relaxed);
        Ok(())
    }

    async fn logs(&self, query: LogQuery) -> Result<BoxStream<'static, LogLine>, GatewayError> {
        let line = |machine| LogLine {
            machine,
            unix_ms: 1,
            stream: "stdout".into(),
            line: "hello".into(),
        };
        Ok(stream::iter(query.machines.into_iter().map(line)).boxed())
    }
}
