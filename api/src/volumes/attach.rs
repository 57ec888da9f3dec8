//! Who mounts a volume: one Machine, of its app, on its host.
//!
//! A volume's record names the Machine that mounts it, and a Machine's config the volume; the two are
//! written in one transaction. A volume is free again when that Machine is gone, or its config mounts it no
//! more, without another write.

use tern_catalog::{
    AppName, Compare, Machine, MachineConfig, Op, Record as _, Snapshot, Transaction, Volume,
};

use crate::error::ApiError;
use crate::server::Shared;

/// The volume that ties a Machine with this config to a host.
pub fn host<'a>(
    snapshot: &'a Snapshot,
    app: &AppName,
    config: &MachineConfig,
) -> Result<Option<&'a Volume>, ApiError> {
    let Some(mount) = config.mounts.first() else {
        return Ok(None);
    };
    let volume = snapshot.volumes.get(&mount.volume);
    // Of another app's nothing is told, where it is neither.
    let volume = volume.filter(|v| v.app == *app && !v.destroyed);
    let volume = volume.ok_or_else(|| ApiError::not_found(format!("volume {}", mount.volume)))?;
    Ok(Some(volume))
}

/// Adds to a transaction that writes `machine` what gives it its volumes. An error where somebody else has
/// one of them.
pub async fn add(shared: &Shared, machine: &Machine, to: &mut Transaction) -> Result<(), ApiError> {
    for mount in &machine.config.mounts {
        let found = shared.catalog.get::<Volume>(mount.volume.as_str()).await?;
        let (mut volume, revision) = found
            .filter(|(v, _)| v.app == machine.app && !v.destroyed)
            .ok_or_else(|| ApiError::not_found(format!("volume {}", mount.volume)))?;
        if volume.host != machine.host {
            return Err(ApiError::invalid(format!(
                "volume {} is on another host than machine {}; make a machine of its own for it",
                volume.id, machine.id
            )));
        }
        if let Some(other) = volume.machine.as_ref().filter(|m| **m != machine.id)
            && let Some((holder, _)) = shared.catalog.get::<Machine>(other.as_str()).await?
            && holder.config.mounts.iter().any(|m| m.volume == volume.id)
        {
            return Err(ApiError::invalid(format!(
                "volume {} is mounted by machine {other} already",
                volume.id
            )));
        }
        volume.machine = Some(machine.id.clone());
        to.compares.push(Compare {
            key: volume.key(),
            revision: Some(revision),
        });
        to.ops.push(Op::put(&volume));
    }
    Ok(())
}
