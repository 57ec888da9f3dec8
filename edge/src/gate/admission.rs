//! A place at a Machine.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tern_catalog::MachineId;
use tokio::net::TcpStream;

use super::ledger::{Grant, Port, Slot};
use super::{AppGate, is_shortage, reach};

/// A place at a Machine; given back when dropped.
pub struct Admission {
    app: Arc<AppGate>,
    slot: Slot,
    port: Port,
    /// The Machine.
    pub machine: Arc<MachineId>,
    /// Where its app listens.
    pub address: SocketAddr,
    /// Connections are only used again within one epoch.
    pub epoch: u64,
    proven: bool,
    /// A connection that is there already: the one that showed that the app accepts any.
    first: Option<std::net::TcpStream>,
}

impl Admission {
    pub(super) fn new(
        app: &Arc<AppGate>,
        grant: Grant,
        first: Option<std::net::TcpStream>,
    ) -> Self {
        Self {
            app: Arc::clone(app),
            slot: grant.slot,
            port: grant.port,
            machine: grant.machine,
            address: grant.address,
            epoch: grant.epoch,
            proven: grant.proven,
            first,
        }
    }

    /// A new connection to the app. What becomes of it is evidence for whether the Machine runs.
    pub async fn connect(&mut self) -> io::Result<TcpStream> {
        if let Some(first) = self.first.take()
            && let Ok(first) = TcpStream::from_std(first)
        {
            return Ok(first);
        }
        let error = match reach::connect(self.address).await {
            Ok(stream) => {
                self.reached();
                return Ok(stream);
            }
            Err(error) => error,
        };
        if is_shortage(&error) {
            return Err(error);
        }
        // The guest runs, and nobody listens there: perhaps the app does so on IPv4 alone.
        if error.kind() == io::ErrorKind::ConnectionRefused
            && !self.proven
            && let Some(ipv4) = self.app.shared.control.ipv4(&self.machine)
        {
            let other = SocketAddr::new(ipv4.into(), self.port.number);
            if let Ok(stream) = reach::connect(other).await {
                self.address = other;
                self.reached();
                return Ok(stream);
            }
        }
        let (slot, epoch, port) = (self.slot, self.epoch, self.port);
        let refused = error.kind() == io::ErrorKind::ConnectionRefused;
        self.app.with(|core, now, acts| {
            core.ledger.doubt(slot, epoch, port, refused, now, acts);
        });
        Err(error)
    }

    /// Whether the Machine still lives the life in which it was given this.
    pub fn is_current(&self) -> bool {
        let (slot, epoch) = (self.slot, self.epoch);
        self.app
            .with(|core, _, _| core.ledger.is_current(slot, epoch))
    }

    fn reached(&mut self) {
        if !self.proven {
            self.proven = true;
            let mut core = self.app.core.lock();
            let ledger = &mut core.ledger;
            ledger.reached(self.slot, self.epoch, self.port, self.address);
        }
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut acts = Vec::new();
        let mut core = self.app.core.lock();
        let (slot, epoch, port) = (self.slot, self.epoch, self.port);
        core.ledger.end(slot, epoch, port, super::now(), &mut acts);
        drop(core);
        self.app.perform(acts, None);
    }
}
