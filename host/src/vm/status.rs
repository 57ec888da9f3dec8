//! What monitor and guest of a Machine that runs say of it: where the time of its start went, and its memory.

use tern_guest::message::Status;

use super::Vm;
use crate::monitor::control::{self, VmState};
use crate::trace::{Marks, StartTrace};

/// The memory of a Machine that runs, in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    /// How much it may use.
    pub limit_mib: u32,
    /// What of that programs could still have.
    pub available_mib: u64,
}

impl Vm {
    /// Keeps where the time of a start went, and logs it when nobody waits for it any more.
    pub(super) fn report(&self, marks: Marks) {
        let what = if marks.is_cold() { "booted" } else { "woken" };
        *self.last_start.lock() = Some(marks.clone());
        let (id, socket) = (self.id.clone(), self.dir.control());
        tokio::spawn(async move {
            match control::describe(&socket).await {
                Ok(vm) => {
                    let trace = StartTrace::new(Some(&marks), &vm, &[]);
                    tracing::info!(machine = %id, phases_us = %trace, "{what}");
                }
                Err(error) => tracing::info!(machine = %id, ?marks, %error, "{what}"),
            }
        });
    }

    /// Where the time of the last start went.
    pub(crate) async fn start_trace(&self) -> Result<StartTrace, String> {
        let (vm, guest) = self.both_say().await?;
        let marks = self.last_start.lock().clone();
        Ok(StartTrace::new(marks.as_ref(), &vm, &guest.phases))
    }

    /// The memory that a started Machine may use, and what of it is left.
    pub(crate) async fn memory(&self) -> Result<MemoryUse, String> {
        let (vm, guest) = self.both_say().await?;
        let limit_mib = vm.memory_limit_mib.ok_or_else(|| {
            "its monitor is from before memory could be limited; restart the Machine".to_owned()
        })?;
        // While the balloon fills, the guest still has what it is about to give.
        let available_mib = (guest.memory_available_kib / 1024).min(limit_mib.into());
        Ok(MemoryUse {
            limit_mib,
            available_mib,
        })
    }

    /// Asks the guest of a started Machine to use no more than `mib`.
    pub(crate) async fn limit_memory(&self, mib: u32) -> Result<(), String> {
        control::limit_memory(&self.dir.control(), mib)
            .await
            .map_err(|e| e.to_string())
    }

    async fn both_say(&self) -> Result<(VmState, Status), String> {
        let vm = control::describe(&self.dir.control())
            .await
            .map_err(|e| e.to_string())?;
        let guest = self.guest.status().await.map_err(|e| e.to_string())?;
        Ok((vm, guest))
    }
}
