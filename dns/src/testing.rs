//! A catalog for tests.

use std::sync::Arc;

use tern_catalog::{
    App, AppName, Catalog, Desired, DesiredState, Host, HostId, Machine, MachineId, MachineNumber,
    MachineState, MachineStatus, NetworkId, Peer, PrivateAddress, SqliteStore, Store, View,
};

/// A catalog in a temporary place.
pub(crate) struct World {
    _dir: tempfile::TempDir,
    pub(crate) catalog: Catalog,
    pub(crate) view: View,
}

impl World {
    pub(crate) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> =
            Arc::new(SqliteStore::open(&dir.path().join("catalog.db")).unwrap());
        let view = View::follow(Arc::clone(&store)).await.unwrap();
        let catalog = Catalog::new(store);
        Self {
            _dir: dir,
            catalog,
            view,
        }
    }

    /// Two organizations' apps: `web` in network 7 with Machines on two hosts, asleep and awake, and
    /// `secret` in network 8.
    pub(crate) async fn furnished() -> Self {
        let world = Self::new().await;
        for (id, region) in [(1, "ams"), (2, "fra"), (3, "fra")] {
            world.host(id, region).await;
        }
        world.app("web", 7).await;
        world.app("empty", 7).await;
        world.app("secret", 8).await;
        let started = MachineState::Started;
        world
            .machine("web", 7, 1, 9, started, &[("fly_process_group", "app")])
            .await;
        world
            .machine(
                "web",
                7,
                2,
                10,
                started,
                &[("fly_process_group", "worker"), ("Role", "db.primary")],
            )
            .await;
        world
            .machine(
                "web",
                7,
                3,
                11,
                MachineState::Suspended,
                &[("fly_process_group", "cron")],
            )
            .await;
        world.machine("secret", 8, 1, 12, started, &[]).await;
        world.peer("laptop", 7, 20).await;
        let revision = world.peer("spy", 8, 21).await;
        world
            .view
            .wait_for(|s| (s.revision >= revision).then_some(()))
            .await;
        world
    }

    pub(crate) async fn host(&self, id: u32, region: &str) {
        let host = Host {
            id: HostId(id),
            name: format!("host{id}"),
            region: region.into(),
            public_key: String::new(),
            endpoint: "192.0.2.1:51820".parse().unwrap(),
            started_at: jiff::Timestamp::now(),
        };
        self.catalog.put(&host).await.unwrap();
    }

    pub(crate) async fn app(&self, name: &str, network: u32) {
        let app = App {
            name: name.parse().unwrap(),
            organization: "people".parse().unwrap(),
            network: NetworkId(network),
            deleting: false,
            created_at: jiff::Timestamp::now(),
        };
        self.catalog.put(&app).await.unwrap();
    }

    /// Adds a Machine in its host's region, with an id made of its number.
    pub(crate) async fn machine(
        &self,
        app: &str,
        network: u32,
        host: u32,
        number: u32,
        state: MachineState,
        metadata: &[(&str, &str)],
    ) {
        let app: AppName = app.parse().unwrap();
        let (network, host, number) = (NetworkId(network), HostId(host), MachineNumber(number));
        let metadata: std::collections::BTreeMap<_, _> = metadata.iter().copied().collect();
        let config = serde_json::json!({ "image": "registry.internal/x", "metadata": metadata });
        let at = jiff::Timestamp::now();
        let machine = Machine {
            id: id(number.0),
            name: format!("machine-{}", number.0),
            app,
            network,
            host,
            region: if host.0 == 1 { "ams" } else { "fra" }.into(),
            number,
            private_ip: PrivateAddress::of_machine(network, host, number),
            config: serde_json::from_value(config).unwrap(),
            instance_id: "01".into(),
            version: 1,
            desired: Desired {
                state: DesiredState::Started,
                generation: 1,
            },
            cordoned: false,
            created_at: at,
            updated_at: at,
        };
        self.catalog.put(&machine).await.unwrap();
        self.state(number.0, state).await;
    }

    pub(crate) async fn state(&self, number: u32, state: MachineState) {
        let status = MachineStatus {
            id: id(number),
            state,
            reason: None,
            generation: 1,
            instance_id: "01".into(),
            image_digest: None,
            checks: Vec::new(),
            events: Vec::new(),
            updated_at: jiff::Timestamp::now(),
        };
        self.catalog.put(&status).await.unwrap();
    }

    pub(crate) async fn peer(&self, name: &str, network: u32, number: u32) -> u64 {
        let (network, number) = (NetworkId(network), MachineNumber(number));
        let peer = Peer {
            name: name.parse().unwrap(),
            organization: "people".parse().unwrap(),
            network,
            host: HostId(1),
            number,
            address: PrivateAddress::of_peer(network, HostId(1), number),
            public_key: String::new(),
            created_at: jiff::Timestamp::now(),
        };
        self.catalog.put(&peer).await.unwrap()
    }
}

pub(crate) fn id(number: u32) -> MachineId {
    format!("{number:014x}").parse().unwrap()
}
