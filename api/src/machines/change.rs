//! Making Machines and changing what they run.

use axum::extract::State;
use http::HeaderMap;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::Value;
use tern_catalog::{
    AppName, Compare, Desired, DesiredState, Machine, MachineId, Op, PrivateAddress, Record as _,
    StoreError, Transaction,
};

use super::config::accept;
use super::lease::{MachineLease, must_hold};
use super::{At, find, place, ports, shape};
use crate::apps;
use crate::auth::Caller;
use crate::error::ApiError;
use crate::extract::{Json, Path};
use crate::number;
use crate::secrets;
use crate::server::Shared;
use crate::volumes::attach;

/// How often a change that others are faster with is tried.
const ATTEMPTS: u32 = 16;

#[derive(Debug, Deserialize)]
pub struct Create {
    config: Value,
    name: Option<String>,
    region: Option<String>,
    #[serde(default)]
    skip_launch: bool,
    /// As [`Update::min_secrets_version`].
    min_secrets_version: Option<u64>,
    /// Whether requests are kept from it until it is uncordoned.
    #[serde(default)]
    skip_service_registration: bool,
    /// Seconds; more than 0 takes the Machine's lease with the same stroke.
    #[serde(default)]
    lease_ttl: i64,
}

#[derive(Debug, Deserialize)]
pub struct Update {
    config: Value,
    /// The version (`instance_id`) that the caller changes; another is refused.
    current_version: Option<String>,
    #[serde(default)]
    skip_launch: bool,
    /// The secrets that the caller has set, which the Machine is to get: as the answer to that told.
    min_secrets_version: Option<u64>,
    /// Seconds; more than 0 takes the Machine's lease too.
    #[serde(default)]
    lease_ttl: i64,
}

impl Update {
    fn may_change(&self, machine: &Machine) -> Result<(), ApiError> {
        let of_another = |v: &String| *v != machine.instance_id;
        if self.current_version.as_ref().is_some_and(of_another) {
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
        Ok(())
    }
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
    let (config, mut warnings) = accept(&shared, &caller, create.config)?;
    secrets::must_have(&snapshot, &app, create.min_secrets_version)?;
    ports::check(&shared, &app, &config)?;
    // A volume's data is on one host, and where it is not said otherwise its region is meant.
    let volume = attach::host(&snapshot, &app, &config)?;
    let tied = volume.map(|v| v.region.as_str());
    let wish = create.region.as_ref().unwrap_or(&shared.config.region);
    let wanted = place::Wanted {
        app: &app,
        region: tied.unwrap_or(wish),
        guest: Some(&config.guest),
        starts: !create.skip_launch,
        volume: volume.map(|v| (&v.id, v.host)),
        image_on: is_ours(&config.image).then_some(shared.config.host),
    };
    let chosen = place::on(&snapshot, &wanted)?;
    if chosen.region != wanted.region {
        warnings.push(format!(
            "no host is in region \"{}\"; the only region there is, \"{}\", was taken",
            wanted.region, chosen.region
        ));
    }
    let (host, region) = (chosen.id, chosen.region.clone());
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
        cordoned: create.skip_service_registration,
        created_at: now,
        updated_at: now,
    };
    let still_there = apps::still_there(&shared, &caller, &machine.app).await?;
    let mut transaction = Transaction {
        compares: vec![still_there, Compare::absent(&machine)],
        ops: vec![Op::put(&machine)],
    };
    let still_open = place::still_open(&shared, host).await?;
    transaction.compares.extend(still_open);
    attach::add(&shared, &machine, &mut transaction).await?;
    let mut answer = shape::machine(&machine, None);
    warn(&mut answer, warnings);
    if create.lease_ttl > 0 {
        let lease = MachineLease::new(&machine.id, create.lease_ttl);
        transaction.ops.push(Op::put(&lease));
        answer["nonce"] = lease.nonce.into();
    }
    let revision = shared.catalog.store().commit(transaction).await?;
    shared.seen(revision).await;
    Ok(Json(answer))
}

/// `POST …/machines/{id}`: the whole configuration anew.
pub async fn update(
    State(shared): State<Shared>,
    caller: Caller,
    Path(at): Path<At>,
    headers: HeaderMap,
    Json(mut update): Json<Update>,
) -> Result<Json<Value>, ApiError> {
    let wanted = std::mem::take(&mut update.config);
    let (config, warnings) = accept(&shared, &caller, wanted)?;
    let snapshot = shared.view.snapshot();
    let machine = find(&snapshot, &caller, &at)?;
    update.may_change(machine)?;
    secrets::must_have(&snapshot, &at.app, update.min_secrets_version)?;
    ports::check(&shared, &machine.app, &config)?;
    must_hold(&shared, &at, &headers).await?;
    // Before anything is changed: what runs goes on until its successor's image is beside it, and an image that
    // cannot be had changes nothing.
    let prepared = shared.gateway.prepare(&at.id, &config.image).await;
    prepared.map_err(|e| ApiError::invalid(format!("{e}. Machine {} is left as it was", at.id)))?;
    let ttl = Some(update.lease_ttl).filter(|ttl| *ttl > 0);
    let (machine, lease) = edit_leased(&shared, &caller, &at, &headers, ttl, |machine| {
        update.may_change(machine)?;
        machine.config = config.clone();
        machine.version += 1;
        machine.instance_id = new_instance(Timestamp::now());
        // Otherwise nothing is asked of the host: what runs goes on, and the next start is of this configuration.
        if !update.skip_launch {
            machine.desired.state = DesiredState::Started;
            machine.desired.generation += 1;
        }
        Ok(())
    })
    .await?;
    let snapshot = shared.view.snapshot();
    let status = snapshot.machine_status.get(&at.id).map(|s| &**s);
    let mut answer = shape::machine(&machine, status);
    warn(&mut answer, warnings);
    if let Some(lease) = lease {
        answer["nonce"] = lease.nonce.into();
    }
    Ok(Json(answer))
}

/// Whether an image is in the registry of the host that is spoken to, where no other host has it.
fn is_ours(image: &str) -> bool {
    image
        .split_once('/')
        .is_some_and(|(registry, _)| registry == crate::REGISTRY_NAME)
}

/// What was asked for in vain, told beside what was done.
fn warn(answer: &mut Value, warnings: Vec<String>) {
    if !warnings.is_empty() {
        answer["warnings"] = warnings.into();
    }
}

/// Changes a Machine's record, where the caller may and holds its lease, if there is one.
pub(super) async fn edit(
    shared: &Shared,
    caller: &Caller,
    at: &At,
    headers: &HeaderMap,
    change: impl FnMut(&mut Machine) -> Result<(), ApiError>,
) -> Result<Machine, ApiError> {
    let (machine, _) = edit_leased(shared, caller, at, headers, None, change).await?;
    Ok(machine)
}

/// [`edit`], and with `ttl` the lease for so many seconds in the same stroke: who changes nothing takes none.
async fn edit_leased(
    shared: &Shared,
    caller: &Caller,
    at: &At,
    headers: &HeaderMap,
    ttl: Option<i64>,
    mut change: impl FnMut(&mut Machine) -> Result<(), ApiError>,
) -> Result<(Machine, Option<MachineLease>), ApiError> {
    find(&shared.view.snapshot(), caller, at)?;
    for _ in 0..ATTEMPTS {
        let held = must_hold(shared, at, headers).await?;
        let lease = ttl.map(|ttl| held.lasting(&at.id, ttl));
        let found = shared.catalog.get::<Machine>(at.id.as_str()).await?;
        let (before, revision) =
            found.ok_or_else(|| ApiError::not_found(format!("machine {}", at.id)))?;
        let mut machine = before.clone();
        change(&mut machine)?;
        machine.updated_at = Timestamp::now();
        let mut transaction = Transaction {
            compares: vec![
                Compare {
                    key: machine.key(),
                    revision: Some(revision),
                },
                held.unchanged(&at.id),
            ],
            ops: vec![Op::put(&machine)],
        };
        transaction.ops.extend(lease.as_ref().map(Op::put));
        if machine.config.mounts != before.config.mounts {
            attach::add(shared, &machine, &mut transaction).await?;
        }
        match shared.catalog.store().commit(transaction).await {
            Ok(revision) => {
                // The caller's next call must see this one.
                shared.seen(revision).await;
                return Ok((machine, lease));
            }
            Err(StoreError::Conflict { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Err(ApiError::conflict(format!(
        "machine {} is changed by others all the time; try again",
        at.id
    )))
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
