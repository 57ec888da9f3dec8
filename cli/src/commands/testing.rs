//! The true API on a fresh catalog, with a host whose apps do what their images' names say.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use futures::channel::mpsc;
use futures::stream::{self, BoxStream};
use futures::{SinkExt as _, StreamExt as _};
use jiff::Timestamp;
use serde_json::{Value, json};
use tern_api::{
    ApiConfig, ApiServer, ExecFeed, ExecOutput, ExecRequest, ExecSession, GatewayError,
    HostGateway, LogLine, LogQuery, MachineMemory, StartTrace, token_hash,
};
use tern_catalog::{
    Catalog, DesiredState, Host, HostAlive, HostId, HostStatus, Machine, MachineEvent, MachineId,
    MachineState, MachineStatus, Network, NetworkId, Organization, PortRanges, Resources,
    RestartPolicy, Scope, SqliteStore, Store, Token, View, VolumeState, VolumeStatus,
};
use tern_certs::Sealer;
use tern_guest::ExitStatus;
use tokio_util::sync::CancellationToken;

use crate::client::Client;
use crate::settings::Target;

const TOKEN: &str = "tern_test";
const ORG: &str = "personal";

/// An API and what is behind it; all ends with it.
pub struct World {
    pub client: Client,
    pub view: View,
    pub address: std::net::SocketAddr,
    catalog: Catalog,
    end: CancellationToken,
    agent: tokio::task::JoinHandle<()>,
    pub files: tempfile::TempDir,
}

#[derive(Debug)]
struct NoInvites;

#[async_trait]
impl tern_api::Inviter for NoInvites {
    async fn invite(
        &self,
        _: Option<String>,
        _: std::time::Duration,
    ) -> Result<tern_api::Invitation, String> {
        Err("this cloud's catalog is a file".to_owned())
    }
}

/// What its apps do.
pub struct FakeHost {
    view: View,
}

impl World {
    pub async fn new() -> Self {
        let files = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> =
            Arc::new(SqliteStore::open(&files.path().join("catalog.db")).unwrap());
        Self::on(store, files).await
    }

    /// The same on this store, which is empty.
    pub async fn on(store: Arc<dyn Store>, files: tempfile::TempDir) -> Self {
        let catalog = Catalog::new(Arc::clone(&store));
        let (network, now) = (NetworkId(1), Timestamp::now());
        catalog
            .create(&Network {
                id: network,
                organization: ORG.parse().unwrap(),
                name: "default".into(),
            })
            .await
            .unwrap();
        catalog
            .create(&Organization {
                slug: ORG.parse().unwrap(),
                name: ORG.into(),
                default_network: network,
                created_at: now,
            })
            .await
            .unwrap();
        catalog
            .create(&Token {
                hash: token_hash(TOKEN),
                name: "test".into(),
                organization: None,
                scope: Scope::Full,
                created_at: now,
                expires_at: None,
                parent: None,
                tail: String::new(),
            })
            .await
            .unwrap();
        catalog
            .create(&Host {
                id: HostId(1),
                name: "one".into(),
                region: "local".into(),
                public_key: "key".into(),
                endpoint: "192.0.2.1:51820".parse().unwrap(),
                started_at: now,
            })
            .await
            .unwrap();
        let all = Resources {
            memory_mib: 1 << 16,
            cpu_sixteenths: 1024,
        };
        catalog
            .create(&HostStatus {
                id: HostId(1),
                version: "0".into(),
                all,
                taken: Resources::default(),
                seen_at: now,
            })
            .await
            .unwrap();
        catalog
            .create(&HostAlive {
                id: HostId(1),
                session: "s".into(),
                boot: "b".into(),
                since: now,
            })
            .await
            .unwrap();
        let view = View::follow(store).await.unwrap();
        let host = Arc::new(FakeHost { view: view.clone() });
        let sealer = Sealer::load_or_create(&files.path().join("seal.key")).unwrap();
        let config = ApiConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            host: HostId(1),
            shared: false,
            registry_dir: files.path().join("registry"),
            region: "local".into(),
            domain: Some("tern.test".into()),
            service_ports: PortRanges::default(),
            internal_token: "internal".into(),
            sealer: Arc::new(crate::serve::adapters::SecretKey(sealer)),
            inviter: Arc::new(NoInvites),
        };
        let server = ApiServer::bind(config, catalog.clone(), view.clone(), host)
            .await
            .unwrap();
        let address = server.local_addr().unwrap();
        let end = CancellationToken::new();
        tokio::spawn(server.run(end.clone()));
        Self {
            client: client_of(address),
            view: view.clone(),
            address,
            agent: tokio::spawn(agent(catalog.clone(), view)),
            catalog,
            end,
            files,
        }
    }

    /// Makes an app, and a directory with this `fly.toml`, its name put first.
    pub async fn app(&self, name: &str, fly_toml: &str) -> std::path::PathBuf {
        super::apps::create(&self.client, name, ORG).await.unwrap();
        let dir = self.files.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        let text = format!("app = \"{name}\"\n{fly_toml}");
        std::fs::write(dir.join("fly.toml"), text).unwrap();
        dir
    }

    /// The host does nothing until it is [back](Self::host_is_back).
    pub async fn host_goes_away(&mut self) {
        self.agent.abort();
        let _ = (&mut self.agent).await;
    }

    pub fn host_is_back(&mut self) {
        self.agent = tokio::spawn(agent(self.catalog.clone(), self.view.clone()));
    }

    /// The only Machine of an app.
    pub async fn machine(&self, app: &str) -> Value {
        let path = format!("/v1/apps/{app}/machines");
        let mut all: Vec<Value> = self.client.get(&path).await.unwrap();
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }
}

/// A client of the API at this address, which may do everything.
pub fn client_of(address: std::net::SocketAddr) -> Client {
    client_with(address, TOKEN)
}

/// A client of the API at this address, with this token.
pub fn client_with(address: std::net::SocketAddr, token: &str) -> Client {
    let target = Target {
        url: format!("http://{address}"),
        token: token.into(),
    };
    Client::new(target).unwrap()
}

impl Drop for World {
    fn drop(&mut self) {
        self.end.cancel();
        self.agent.abort();
    }
}

/// Does at once what is wanted, and records it as an agent does.
async fn agent(catalog: Catalog, view: View) {
    let mut changes = view.changes();
    loop {
        let snapshot = view.snapshot();
        for machine in snapshot.machines.values() {
            let seen = snapshot.machine_status.get(&machine.id);
            if seen.map(|s| s.generation) < Some(machine.desired.generation) {
                // Another of the same image serves already.
                let others = snapshot.machines.values().any(|other| {
                    !other.cordoned
                        && other.id != machine.id
                        && other.config.image == machine.config.image
                });
                obey(&catalog, machine, seen.map(|s| &**s), others).await;
            }
        }
        for volume in snapshot.volumes.values() {
            if !snapshot.volume_status.contains_key(&volume.id) {
                let made = VolumeStatus {
                    id: volume.id.clone(),
                    state: VolumeState::Created,
                    reason: None,
                    size_gb: volume.size_gb,
                    snapshots: BTreeMap::default(),
                    updated_at: Timestamp::now(),
                };
                catalog.put(&made).await.unwrap();
            }
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

async fn obey(catalog: &Catalog, machine: &Machine, before: Option<&MachineStatus>, others: bool) {
    static EVENTS: AtomicU64 = AtomicU64::new(1);
    let mut events = before.map(|s| s.events.clone()).unwrap_or_default();
    let mut tell = |kind: &str, status, request| {
        events.push(MachineEvent {
            id: format!("{:026}", EVENTS.fetch_add(1, Ordering::Relaxed)),
            kind: kind.to_owned(),
            status,
            source: "user".into(),
            timestamp: Timestamp::now().as_millisecond(),
            request,
        });
    };
    let image = &machine.config.image;
    let code = ["exits-0", "exits-1"]
        .iter()
        .position(|name| image.contains(name))
        // A task that ends well, of an app that stays.
        .or(
            (image.contains("once") && machine.config.restart.policy == RestartPolicy::No)
                .then_some(0),
        )
        .or((image.contains("lonely") && others).then_some(1));
    let mut reason = None;
    let state = match machine.desired.state {
        DesiredState::Started if image.contains("absent") => {
            reason = Some(format!("the image {image} cannot be had: manifest unknown"));
            MachineState::Failed
        }
        DesiredState::Started | DesiredState::Restarted { .. } => {
            let first = before.is_none_or(|s| s.state == MachineState::Created);
            let kind = if first { "launch" } else { "update" };
            tell(kind, MachineState::Starting, Value::Null);
            tell("start", MachineState::Started, json!({"cold": true}));
            match code {
                Some(code) => {
                    let error = format!("the app exited with code {code}");
                    let exit = json!({"exit_code": code, "restarting": code > 0, "error": error});
                    let exit = json!({"exit_event": exit});
                    tell("exit", MachineState::Stopped, exit);
                    MachineState::Stopped
                }
                None => MachineState::Started,
            }
        }
        DesiredState::Created => MachineState::Created,
        DesiredState::Stopped { .. } => MachineState::Stopped,
        DesiredState::Suspended => {
            tell("suspend", MachineState::Suspended, json!({"took_ms": 1}));
            if image.contains("woken") {
                tell("start", MachineState::Started, json!({"cold": false}));
                MachineState::Started
            } else {
                MachineState::Suspended
            }
        }
        DesiredState::Destroyed { .. } => {
            let id = machine.id.as_str();
            catalog.delete::<MachineStatus>(id).await.unwrap();
            catalog.delete::<Machine>(id).await.unwrap();
            return;
        }
    };
    let status = MachineStatus {
        id: machine.id.clone(),
        state,
        reason,
        generation: machine.desired.generation,
        instance_id: machine.instance_id.clone(),
        image_digest: None,
        events,
        checks: Vec::new(),
        updated_at: Timestamp::now(),
    };
    catalog.put(&status).await.unwrap();
}

impl FakeHost {
    fn image(&self, id: &MachineId) -> String {
        let snapshot = self.view.snapshot();
        let machine = snapshot.machines.get(id);
        machine.map_or_else(String::new, |m| m.config.image.clone())
    }
}

#[async_trait]
impl HostGateway for FakeHost {
    async fn prepare(&self, _: &MachineId, image: &str) -> Result<(), GatewayError> {
        if image.contains("absent") {
            let text = format!("the image {image} cannot be had: manifest unknown");
            return Err(GatewayError::Failed(text));
        }
        Ok(())
    }

    async fn accepts(&self, id: &MachineId, port: u16) -> Result<bool, GatewayError> {
        Ok(port
            == if self.image(id).contains("elsewhere") {
                3000
            } else {
                8080
            })
    }

    async fn exec(
        &self,
        id: &MachineId,
        request: ExecRequest,
    ) -> Result<ExecSession, GatewayError> {
        if self.image(id).contains("scratch") {
            return Err(GatewayError::Failed("there is no program cat".into()));
        }
        let (to_command, input) = mpsc::unbounded::<ExecFeed>();
        let failed = |_| GatewayError::Failed("it has ended".into());
        let exit = |code: i32| {
            ExecOutput::Exit(ExitStatus {
                code,
                signal: (code > 128).then_some(code - 128),
                oom_killed: false,
            })
        };
        let words: Vec<&str> = request.command.iter().map(String::as_str).collect();
        let outputs = match words[..] {
            // Every byte there is, on either side, in the largest frames and the smallest.
            ["bytes", mib] => {
                let mib: usize = mib.parse().unwrap();
                let all: Vec<u8> = (0..=255).collect();
                let chunk = bytes::Bytes::from(all.repeat(256));
                let many = std::iter::repeat_n(ExecOutput::Stdout(chunk), mib * 16);
                let errors = all.into_iter().map(|b| ExecOutput::Stderr(vec![b].into()));
                stream::iter(many.chain(errors).chain([exit(0)])).boxed()
            }
            ["exit", code] => stream::iter([exit(code.parse().unwrap())]).boxed(),
            ["vanish", _] => stream::iter([ExecOutput::Stdout("half".into())]).boxed(),
            ["cat", _] => input
                .take_while(|fed| {
                    futures::future::ready(!matches!(fed, ExecFeed::Stdin(b) if b.is_empty()))
                })
                .map(|fed| match fed {
                    ExecFeed::Stdin(bytes) => ExecOutput::Stdout(bytes),
                    ExecFeed::Control(control) => ExecOutput::Stderr(format!("{control:?}").into()),
                })
                .chain(stream::iter([exit(0)]))
                .boxed(),
            // An app that listens on port 3000 of 0.0.0.0.
            _ => {
                let table =
                    "  sl  local_address rem_address   st\n   0: 00000000:0BB8 00000000:0000 0A\n";
                stream::iter([ExecOutput::Stdout(table.into()), exit(0)]).boxed()
            }
        };
        Ok(ExecSession {
            inputs: Box::pin(to_command.sink_map_err(failed)),
            outputs: outputs.map(Ok).boxed(),
        })
    }

    async fn signal(&self, _: &MachineId, _: i32) -> Result<(), GatewayError> {
        Ok(())
    }

    async fn start_trace(&self, _: &MachineId) -> Result<StartTrace, GatewayError> {
        Err(GatewayError::NotRunning("nobody looked".into()))
    }

    async fn memory(&self, _: &MachineId) -> Result<MachineMemory, GatewayError> {
        Err(GatewayError::NotRunning("nobody looked".into()))
    }

    async fn limit_memory(&self, _: &MachineId, _: u32) -> Result<(), GatewayError> {
        Ok(())
    }

    async fn logs(&self, query: LogQuery) -> Result<BoxStream<'static, LogLine>, GatewayError> {
        let line = |machine| LogLine {
            machine,
            unix_ms: Timestamp::now().as_millisecond(),
            stream: "stdout".into(),
            line: "last words".into(),
        };
        Ok(stream::iter(query.machines.into_iter().map(line)).boxed())
    }
}
