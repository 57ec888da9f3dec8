//! What the gate asks of the agent of its host.

use std::net::Ipv4Addr;

use async_trait::async_trait;
use tern_catalog::MachineId;
use thiserror::Error;

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
}

/// Why a Machine could not be started.
#[derive(Debug, Clone, Error)]
#[error("{text}")]
pub struct StartError {
    /// For the operator; callers are told less.
    pub text: String,
}
