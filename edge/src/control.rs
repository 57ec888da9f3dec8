//! What the gate asks of the agent of its host.

use std::net::Ipv4Addr;
use std::time::Instant;

use async_trait::async_trait;
use tern_catalog::MachineId;
use thiserror::Error;
use tokio::sync::oneshot;

/// The way to the agent. `tern serve` implements it over `tern-host`.
#[async_trait]
pub trait MachineControl: Send + Sync + 'static {
    /// Makes a Machine run: resumes or boots it, and answers when its app's process runs. Idempotent: a
    /// Machine that runs is left alone; one that is being put to sleep is woken when it is. Once begun it goes on, also
    /// when nobody waits for it any more.
    async fn start(&self, machine: &MachineId) -> Result<(), StartError>;

    /// Answers when a connection to a Machine that is being started is worth a try: it is held until the guest runs,
    /// and answered sooner than the start is done. May never answer.
    async fn reachable(&self, machine: &MachineId);

    /// The IPv4 address at which this host reaches the Machine, for apps that listen on no other.
    fn ipv4(&self, machine: &MachineId) -> Option<Ipv4Addr>;

    /// Writes a Machine's memory to disk and frees it.
    async fn suspend(&self, machine: &MachineId) -> Result<(), String>;

    /// Stops a Machine: its next start is cold.
    async fn stop(&self, machine: &MachineId) -> Result<(), String>;

    /// When the Machine was last of use to somebody whom the gate does not see: it was started by hand, somebody
    /// is in it (now), it is called over its private network. `None` where nothing is known of it. The gate asks
    /// every few seconds of a Machine that it may put to sleep; what is noticed at that moment counts from then.
    fn last_use(&self, machine: &MachineId) -> Option<Instant>;

    /// Answers with the next Machine that is about to be put to sleep at whoever's wish. The gate calls this again
    /// and again, and may drop it: nothing is lost by that. May never answer.
    async fn leaving(&self) -> Leaving;
}

/// A Machine that is about to be suspended or stopped.
#[derive(Debug)]
pub struct Leaving {
    /// Which.
    pub machine: MachineId,
    /// Told when it has no requests any more. Closed when that has taken too long: it leaves all the same.
    pub ready: oneshot::Sender<()>,
    /// Told when it is suspended; dropped when it is not, or was stopped.
    pub suspended: oneshot::Receiver<()>,
}

/// Why a Machine could not be started.
#[derive(Debug, Clone, Error)]
#[error("{text}")]
pub struct StartError {
    /// For the operator; callers are told less.
    pub text: String,
}
