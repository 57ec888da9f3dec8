//! Departures, without a clock: nothing looks by itself here.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use jiff::Timestamp;
use tern_catalog::{
    Catalog, Desired, DesiredState, HostId, Machine, MachineNumber, MachineStatus, NetworkId,
    ServiceProtocol, SqliteStore, Store, View,
};
use tokio::sync::{Notify, oneshot};

use super::*;
use crate::control::{MachineControl, StartError};
use crate::metrics::Metrics;

const PATIENCE: Duration = Duration::from_secs(60);

/// An agent that only hears that a start is wanted.
#[derive(Default)]
struct Agent {
    started: Notify,
}

#[async_trait]
impl MachineControl for Agent {
    async fn start(&self, _: &MachineId) -> Result<(), StartError> {
        self.started.notify_one();
        Ok(())
    }

    async fn reachable(&self, _: &MachineId) {
        std::future::pending().await
    }

    fn ipv4(&self, _: &MachineId) -> Option<Ipv4Addr> {
        None
    }

    async fn suspend(&self, _: &MachineId) -> Result<(), String> {
        Ok(())
    }

    async fn stop(&self, _: &MachineId) -> Result<(), String> {
        Ok(())
    }

    fn last_use(&self, _: &MachineId) -> Option<Instant> {
        None
    }

    async fn leaving(&self) -> Leaving {
        std::future::pending().await
    }
}

/// A gate, and a Machine that runs.
async fn world() -> (Gate, Arc<Agent>, Machine, tempfile::TempDir) {
    let files = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> =
        Arc::new(SqliteStore::open(&files.path().join("catalog.db")).unwrap());
    let catalog = Catalog::new(Arc::clone(&store));
    let view = View::follow(store).await.unwrap();
    let machine = Machine {
        id: MachineId::random(),
        name: String::new(),
        app: "shop".parse().unwrap(),
        network: NetworkId(1),
        host: HostId(1),
        region: "ams".into(),
        number: MachineNumber(1),
        private_ip: Ipv6Addr::LOCALHOST,
        config: serde_json::from_str(r#"{"image": "x", "services": [{"internal_port": 1}]}"#)
            .unwrap(),
        instance_id: "1".into(),
        version: 1,
        desired: Desired {
            state: DesiredState::Started,
            generation: 1,
        },
        cordoned: false,
        created_at: Timestamp::now(),
        updated_at: Timestamp::now(),
    };
    let status = MachineStatus {
        id: machine.id.clone(),
        state: MachineState::Started,
        reason: None,
        generation: 1,
        instance_id: "1".into(),
        image_digest: None,
        events: Vec::new(),
        checks: Vec::new(),
        updated_at: Timestamp::now(),
    };
    catalog.create(&machine).await.unwrap();
    catalog.put(&status).await.unwrap();
    view.wait_for(|s| s.machine_status.contains_key(&machine.id).then_some(()))
        .await;
    let agent = Arc::new(Agent::default());
    let gate = Gate::new(
        HostId(1),
        view,
        agent.clone(),
        Arc::new(Metrics::default()),
        PATIENCE,
    );
    (gate, agent, machine, files)
}

#[tokio::test]
async fn a_machine_that_was_put_to_sleep_with_a_request_is_woken_for_it_at_once() {
    let (gate, agent, machine, _files) = world().await;
    let request = gate
        .admit(&machine.app, 1, ServiceProtocol::Tcp)
        .await
        .unwrap();
    let (ready, is_ready) = oneshot::channel();
    let (suspended, is_suspended) = oneshot::channel();
    let leaving = Leaving {
        machine: machine.id.clone(),
        ready,
        suspended: is_suspended,
    };
    let seen_off = tokio::spawn(see_off(gate.clone(), leaving));
    // It takes too long to be waited for.
    drop(is_ready);
    suspended.send(()).unwrap();
    tokio::time::timeout(PATIENCE, agent.started.notified())
        .await
        .expect("it is woken");
    seen_off.await.unwrap();
    drop(request);
}

#[tokio::test]
async fn only_requests_that_a_machine_has_are_waited_for() {
    let (gate, _agent, machine, _files) = world().await;
    let requests = [
        gate.admit(&machine.app, 1, ServiceProtocol::Tcp)
            .await
            .unwrap(),
        gate.admit(&machine.app, 1, ServiceProtocol::Tcp)
            .await
            .unwrap(),
    ];
    let mut seen_off = Box::pin(gate.see_off(&machine.id));
    assert!(futures::poll!(&mut seen_off).is_pending());
    // One that comes now waits for a start, and is none of them.
    let app = machine.app.clone();
    let mut newcomer = Box::pin(gate.admit(&app, 1, ServiceProtocol::Tcp));
    assert!(futures::poll!(&mut newcomer).is_pending());
    let [one, other] = requests;
    drop(one);
    assert!(futures::poll!(&mut seen_off).is_pending());
    drop(other);
    tokio::time::timeout(PATIENCE, seen_off)
        .await
        .expect("none is left");
    // A second departure does not wait for who waits for a start.
    tokio::time::timeout(PATIENCE, gate.see_off(&machine.id))
        .await
        .expect("it is not there yet");
    drop(newcomer);
}
