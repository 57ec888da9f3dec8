//! Making Machines and changing what they run.

use axum::Json;
use axum::extract::{Path, State};
use http::HeaderMap;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::Value;
use tern_catalog::{
    App, AppName, Compare, Desired, DesiredState, Machine, MachineConfig, MachineId, Op,
    PrivateAddress, Record as _, Transaction,
};

use super::lease::must_hold;
use super::{At, find, place, shape};
use crate::auth::Caller;
use crate::error::ApiError;
use crate::number;
use crate::server::Shared;

/// Largest memory of a Machine.
const MAX_MEMORY_MB: u32 = 64 << 10;
/// Smallest: Debian's kernel and an init need some 60 MiB.
const MIN_MEMORY_MB: u32 = 128;

#[derive(Debug, Deserialize)]
pub struct Create {
    config: Value,
    name: Option<String>,
    region: Option<String>,
    #[serde(default)]
    skip_launch: bool,
}

#[derive(Debug, Deserialize)]
pub struct Update {
    config: Value,
    /// The version (`instance_id`) that the caller changes; another is refused.
    current_version: Option<String>,
    #[serde(default)]
    skip_launch: bool,
}

/// `POST …/machines`.
pub async fn create(
    State(shared): State<Shared>,
    caller: Caller,
    Path(app): Path<AppName>,
    Json(create): Json<Create>,
) -> Result<Json<Value>, ApiError> {
    let snapshot = shared.view.snapshot();
    let network = caller.app(&snapshot, &app)?.network;
    let config = accept(&shared, &caller, create.config)?;
    let region = create
        .region
        .unwrap_or_else(|| shared.config.region.clone());
    let host = place::choose(&snapshot, &region)?.id;
    let number = number::next_in_network(&**shared.catalog.store(), network).await?;
    let now = Timestamp::now();
    let id = MachineId::random();
    let state = if create.skip_launch {
        DesiredState::Created
    } else {
        DesiredState::Started
    };
    let machine = Machine {
        name: create
            .name
            .unwrap_or_else(|| format!("{app}-{}", &id.as_str()[..4])),
        id,
        app,
        network,
        host,
        region,
        number,
        private_ip: PrivateAddress::of_machine(network, host, number),
        config,
        instance_id: new_instance(now),
        version: 1,
        desired: Desired {
            state,
            generation: 1,
        },
        cordoned: false,
        created_at: now,
        updated_at: now,
    };
    // An app that is being deleted at this moment must not get a Machine that nobody sees.
    let (found, app_revision) = shared
        .catalog
        .get::<App>(machine.app.as_str())
        .await?
        .ok_or_else(|| ApiError::not_found(format!("app {}", machine.app)))?;
    let still_there = Compare {
        key: found.key(),
        revision: Some(app_revision),
    };
    let transaction = Transaction {
        compares: vec![still_there, Compare::absent(&machine)],
        ops: vec![Op::put(&machine)],
    };
    let revision = shared.catalog.store().commit(transaction).await?;
    shared.seen(revision).await;
    Ok(Json(shape::machine(&machine, None)))
}

/// `POST …/machines/{id}`: the whole configuration anew.
pub async fn update(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    headers: HeaderMap,
    Json(update): Json<Update>,
) -> Result<Json<Value>, ApiError> {
    let config = accept(&shared, &caller, update.config)?;
    let machine = edit(&shared, &caller, &at, &headers, |machine| {
        if update
            .current_version
            .as_ref()
            .is_some_and(|v| *v != machine.instance_id)
        {
            return Err(ApiError::precondition(format!(
                "machine {} has version {}, not the one you changed",
                machine.id, machine.instance_id
            )));
        }
        if matches!(machine.desired.state, DesiredState::Destroyed { .. }) {
            return Err(ApiError::precondition(format!(
                "machine {} is being destroyed",
                machine.id
            )));
        }
        machine.config = config.clone();
        machine.version += 1;
        machine.instance_id = new_instance(Timestamp::now());
        if !update.skip_launch {
            machine.desired.state = DesiredState::Started;
        }
        machine.desired.generation += 1;
        Ok(())
    })
    .await?;
    let snapshot = shared.view.snapshot();
    Ok(Json(shape::machine(
        &machine,
        snapshot.machine_status.get(&at.id).map(|s| &**s),
    )))
}

/// Changes a Machine's record, where the caller may and holds its lease, if there is one.
pub(super) async fn edit(
    shared: &Shared,
    caller: &Caller,
    at: &At,
    headers: &HeaderMap,
    mut change: impl FnMut(&mut Machine) -> Result<(), ApiError>,
) -> Result<Machine, ApiError> {
    find(&shared.view.snapshot(), caller, at)?;
    must_hold(shared, at, headers).await?;
    let changed = shared
        .catalog
        .update(at.id.as_str(), |machine: &mut Machine| {
            change(machine)?;
            machine.updated_at = Timestamp::now();
            Ok::<_, ApiError>(())
        })
        .await??;
    let machine = changed.ok_or_else(|| ApiError::not_found(format!("machine {}", at.id)))?;
    // The caller's next call must see this one.
    let entry = shared.catalog.store().get(&machine.key()).await?;
    shared.seen(entry.map_or(0, |e| e.revision)).await;
    Ok(machine)
}

/// A configuration that can be run, its image pinned to a digest where it is in our registry.
fn accept(shared: &Shared, caller: &Caller, config: Value) -> Result<MachineConfig, ApiError> {
    let mut config: MachineConfig =
        serde_json::from_value(config).map_err(|e| ApiError::invalid(format!("config: {e}")))?;
    let guest = &config.guest;
    if !(1..=8).contains(&guest.cpus) {
        return Err(ApiError::invalid(format!(
            "config.guest.cpus is {}; 1 to 8 are possible",
            guest.cpus
        )));
    }
    if !(MIN_MEMORY_MB..=MAX_MEMORY_MB).contains(&guest.memory_mb) {
        return Err(ApiError::invalid(format!(
            "config.guest.memory_mb is {}; {MIN_MEMORY_MB} to {MAX_MEMORY_MB} are possible",
            guest.memory_mb
        )));
    }
    if let Some(signal) = &config.stop_config.signal {
        super::SignalName::Name(signal.clone()).number()?;
    }
    for file in &config.files {
        if !file.guest_path.starts_with('/') {
            return Err(ApiError::invalid(format!(
                "config.files: \"{}\" is not absolute",
                file.guest_path
            )));
        }
    }
    config.image = shared.registry.pin(&config.image, |app| {
        // An image of another organization's app must not be had by naming it.
        let app: AppName = app.parse()?;
        caller.app(&shared.view.snapshot(), &app).map(drop)
    })?;
    Ok(config)
}

/// A ULID: 48 bits of milliseconds, 80 of randomness, in Crockford's base 32.
fn new_instance(now: Timestamp) -> String {
    const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    let millis = u128::from(now.as_millisecond().unsigned_abs()) & 0xffff_ffff_ffff;
    let bits = millis << 80 | (rand::random::<u128>() >> 48);
    (0..26)
        .rev()
        .map(|i| char::from(ALPHABET[(bits >> (i * 5) & 31) as usize]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_are_ordered_by_time() {
        let at = |ms| new_instance(Timestamp::from_millisecond(ms).unwrap());
        let (a, b) = (at(1_700_000_000_000), at(1_700_000_000_001));
        assert!(a < b && a.len() == 26, "{a} {b}");
        assert_ne!(at(0), at(0));
    }
}
