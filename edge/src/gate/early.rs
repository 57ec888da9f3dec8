//! Wakes before the request: a client's TLS handshake names the app, and its resume goes on beside the handshake.
//!
//! Not everybody who knocks has something to ask, so it is bounded: only a Machine that lies in memory, never a cold start;
//! only while no other runs or wakes; a few of an app that have brought no request; and not for a client whose last one
//! brought none.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tern_catalog::{AppName, ServiceProtocol};

use super::Gate;
use super::ledger::Port;
use crate::connections::Client;

/// A request follows its handshake at once; a slow client, or one that opens connections ahead of need, has this long.
const GRACE: Duration = Duration::from_secs(10);
/// A client that asked for nothing is not expected to for so long.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// As many such clients are remembered.
const MAX_SILENT: usize = 4096;
/// An app's early wakes that brought no request count so long.
const PENANCE: Duration = Duration::from_secs(60);
/// So many of them may count at once.
const MAX_WASTED: u32 = 4;

/// Clients that were expected to ask for something and did not, and since when.
#[derive(Default)]
pub struct Silent(Mutex<HashMap<Client, Instant>>);

impl Silent {
    fn has(&self, client: Client) -> bool {
        let silent = self.0.lock();
        silent
            .get(&client)
            .is_some_and(|at| at.elapsed() < REMEMBERED)
    }

    fn add(&self, client: Client) {
        let mut silent = self.0.lock();
        if silent.len() >= MAX_SILENT {
            silent.retain(|_, at| at.elapsed() < REMEMBERED);
        }
        if silent.len() < MAX_SILENT {
            silent.insert(client, Instant::now());
        }
    }
}

impl Gate {
    /// A client may ask for something of an app's service soon. Whether a Machine is woken for it.
    pub fn early(&self, app: &AppName, port: u16, client: IpAddr) -> bool {
        let (shared, client) = (&self.0.shared, Client::of(client));
        if shared.silent.has(client) {
            return false;
        }
        let app = self.app(app);
        if app.early.fetch_add(1, Ordering::SeqCst) >= MAX_WASTED {
            app.early.fetch_sub(1, Ordering::SeqCst);
            return false;
        }
        let port = Port {
            number: port,
            protocol: ServiceProtocol::Tcp,
        };
        let Some(machine) = app.with(|core, now, acts| core.ledger.early(port, now, acts)) else {
            app.early.fetch_sub(1, Ordering::SeqCst);
            return false;
        };
        shared.metrics.early_wakes.add();
        let judged = async move {
            tokio::time::sleep(GRACE).await;
            if app.core.lock().ledger.is_wasted(&machine) {
                app.shared.metrics.early_wakes_wasted.add();
                app.shared.silent.add(client);
                tokio::time::sleep(PENANCE).await;
            }
            app.early.fetch_sub(1, Ordering::SeqCst);
        };
        shared.runtime.spawn(judged);
        true
    }
}
