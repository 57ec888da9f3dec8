//! The start of a Machine.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use tern_catalog::ServiceProtocol;
use tokio::net::TcpStream;
use tokio::sync::Notify;

use super::ledger::Start;
use super::{AppGate, now, reach};
use crate::control::StartError;

/// A start under way. However it ends, the ledger hears of it.
pub struct Starting {
    pub app: Arc<AppGate>,
    pub start: Start,
    pub is_told: bool,
}

/// Where the app accepts connections, and the connection that showed it.
type Accepted = (SocketAddr, Option<TcpStream>);

impl Starting {
    pub async fn run(mut self) {
        let (machine, shared) = (&self.start.machine, &self.app.shared);
        shared.metrics.wakes.add();
        let begun = Instant::now();
        let outcome = tokio::time::timeout(shared.wake_timeout, self.accepted()).await;
        let outcome = outcome.unwrap_or_else(|_| {
            let text = format!(
                "its app did not accept connections on port {} within {} s; it must listen on :: \
                 or 0.0.0.0",
                self.start.port.number,
                shared.wake_timeout.as_secs()
            );
            Err(StartError { text })
        });
        match &outcome {
            Ok((at, _)) => {
                shared.metrics.wake_durations.add(begun.elapsed());
                let waiting = self.app.core.lock().ledger.waiting();
                let millis = begun.elapsed().as_millis();
                tracing::info!(%machine, app = %self.app.app, %at, millis, waiting, "woken");
            }
            Err(error) => {
                shared.metrics.wake_failures.add();
                tracing::warn!(%machine, app = %self.app.app, %error, "not woken");
            }
        }
        self.tell(outcome);
    }

    /// Starts the Machine, and waits until its app accepts connections. Whoever connects early need not wait until its
    /// host has heard from the guest: only the guest itself can accept. Should the start fail after that, the view
    /// tells, or a connection that fails.
    async fn accepted(&self) -> Result<Accepted, StartError> {
        let control = &self.app.shared.control;
        let Start {
            machine,
            address,
            port,
            ..
        } = &self.start;
        if port.protocol == ServiceProtocol::Udp {
            // Nothing says that somebody listens: it is ready when it runs.
            return control.start(machine).await.map(|()| (*address, None));
        }
        let done = Notify::new();
        let accepted = async {
            tokio::select! {
                () = control.reachable(machine) => {}
                () = done.notified() => {}
            }
            let ipv4 = control.ipv4(machine).map(IpAddr::V4);
            let ipv4 = ipv4.map(|ip| SocketAddr::new(ip, port.number));
            let addresses: Vec<_> = [*address].into_iter().chain(ipv4).collect();
            let (at, stream) = reach::accepts(&addresses).await;
            (at, Some(stream))
        };
        tokio::pin!(accepted);
        tokio::select! {
            at = &mut accepted => return Ok(at),
            started = control.start(machine) => started?,
        }
        done.notify_one(); // kept for it, should it not listen yet
        Ok(accepted.await)
    }

    fn tell(&mut self, outcome: Result<Accepted, StartError>) {
        self.is_told = true;
        let (outcome, first) = match outcome {
            // Who is served by it has a runtime of its own.
            Ok((at, stream)) => (Ok(at), stream.and_then(|s| s.into_std().ok())),
            Err(error) => (Err(error), None),
        };
        let mut acts = Vec::new();
        let mut core = self.app.core.lock();
        core.ledger.started(&self.start, outcome, now(), &mut acts);
        drop(core);
        let first = first.map(|stream| (stream, self.start.slot, self.start.port));
        self.app.perform(acts, first);
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if !self.is_told {
            let text = "the start was given up".to_owned();
            self.tell(Err(StartError { text }));
        }
    }
}
