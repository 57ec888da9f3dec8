//! The start of a Machine.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tern_catalog::ServiceProtocol;
use tokio::net::TcpStream;
use tokio::sync::Notify;

use super::ledger::{NotStarted, Port, Start};
use super::{AppGate, now, reach};
use crate::control::StartError;

/// A start under way. However it ends, the ledger hears of it.
pub struct Starting {
    pub app: Arc<AppGate>,
    pub start: Start,
    pub is_told: bool,
}

/// At which port the app accepts connections, where, and the connection that showed it.
type Accepted = (Port, SocketAddr, Option<TcpStream>);

/// A Machine that runs, and whose app does not listen at the port that is waited for, is served at its others after so
/// long: that they are well is more than that one is.
const OTHERS: Duration = Duration::from_secs(3);

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
            Err(of_itself(StartError { text }))
        });
        match &outcome {
            Ok((_, at, _)) => {
                shared.metrics.wake_durations.add(begun.elapsed());
                let waiting = self.app.core.lock().ledger.waiting();
                let millis = begun.elapsed().as_millis();
                tracing::info!(%machine, app = %self.app.app, %at, millis, waiting, "woken");
            }
            Err(failed) => {
                shared.metrics.wake_failures.add();
                tracing::warn!(%machine, app = %self.app.app, error = %failed.why, "not woken");
            }
        }
        self.tell(outcome);
    }

    /// Starts the Machine, and waits until its app accepts connections. Whoever connects early need not wait until its
    /// host has heard from the guest: only the guest itself can accept. Should the start fail after that, the view
    /// tells, or a connection that fails.
    async fn accepted(&self) -> Result<Accepted, NotStarted> {
        let control = &self.app.shared.control;
        let Start { machine, port, .. } = &self.start;
        if port.protocol == ServiceProtocol::Udp {
            // Nothing says that somebody listens: it is ready when it runs.
            let started = control.start(machine).await.map_err(of_itself);
            return started.map(|()| (*port, self.start.address, None));
        }
        let done = Notify::new();
        let accepted = async {
            tokio::select! {
                () = control.reachable(machine) => {}
                () = done.notified() => {}
            }
            self.accepts(*port).await
        };
        tokio::pin!(accepted);
        tokio::select! {
            at = &mut accepted => return at,
            started = control.start(machine) => started.map_err(of_itself)?,
        }
        self.app.core.lock().ledger.runs(&self.start, now());
        done.notify_one(); // kept for it, should it not listen yet
        let others = async {
            if self.start.others.is_empty() {
                return std::future::pending().await;
            }
            tokio::time::sleep(OTHERS).await;
            let others = self.start.others.iter();
            let all = others.map(|other| Box::pin(self.accepts(*other)));
            futures::future::select_ok(all)
                .await
                .map(|(first, _)| first)
        };
        tokio::select! {
            at = accepted => at,
            at = others => at,
        }
    }

    /// Waits until the app accepts connections at a port.
    async fn accepts(&self, port: Port) -> Result<Accepted, NotStarted> {
        let ipv4 = self.app.shared.control.ipv4(&self.start.machine);
        let ips = [Some(self.start.address.ip()), ipv4.map(IpAddr::V4)];
        let addresses = ips.into_iter().flatten();
        let addresses: Vec<_> = addresses
            .map(|ip| SocketAddr::new(ip, port.number))
            .collect();
        match reach::accepts(&addresses).await {
            Ok((at, stream)) => Ok((port, at, Some(stream))),
            Err(error) => Err(NotStarted {
                why: StartError {
                    text: format!("the edge has no connection left for it: {error}"),
                },
                by_itself: false,
            }),
        }
    }

    fn tell(&mut self, outcome: Result<Accepted, NotStarted>) {
        self.is_told = true;
        let (outcome, first) = match outcome {
            // Who is served by it has a runtime of its own.
            Ok((port, at, stream)) => {
                let stream = stream.and_then(|s| s.into_std().ok());
                let slot = self.start.slot;
                (Ok((port, at)), stream.map(|stream| (stream, slot, port)))
            }
            Err(failed) => (Err(failed), None),
        };
        let mut acts = Vec::new();
        let mut core = self.app.core.lock();
        core.ledger.started(&self.start, outcome, now(), &mut acts);
        drop(core);
        self.app.perform(acts, first);
    }
}

fn of_itself(why: StartError) -> NotStarted {
    NotStarted {
        why,
        by_itself: true,
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if !self.is_told {
            let text = "the start was given up".to_owned();
            self.tell(Err(NotStarted {
                why: StartError { text },
                by_itself: false,
            }));
        }
    }
}
