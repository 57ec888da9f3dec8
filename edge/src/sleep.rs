//! Puts Machines to sleep that are of no use to anybody, and sees those off that others put to sleep.

use std::collections::HashMap;
use std::time::Duration;

use tern_catalog::{AppName, Autostop, MachineId, MachineState};
use tokio_util::sync::CancellationToken;

use crate::control::Leaving;
use crate::gate::Gate;

/// Looks at all Machines of this host now and then, until told to end.
///
/// From `ending` on nothing is put to sleep; who leaves is seen off until the last request has `ended`.
pub async fn run(
    gate: Gate,
    host: tern_catalog::HostId,
    idle: Duration,
    ending: CancellationToken,
    ended: CancellationToken,
) {
    let mut tick = tokio::time::interval((idle / 4).clamp(SHORTEST, LONGEST));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick(), if !ending.is_cancelled() => look(&gate, host, idle),
            leaving = gate.control().leaving() => {
                tokio::spawn(see_off(gate.clone(), leaving));
            }
            () = ended.cancelled() => return,
        }
    }
}

/// Between two looks. A Machine sleeps at most this much later than it could.
const SHORTEST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(15);

fn look(gate: &Gate, host: tern_catalog::HostId, idle: Duration) {
    let snapshot = gate.view().snapshot();
    gate.forget_others(&snapshot);
    let mut running: HashMap<&AppName, u32> = HashMap::new();
    for machine in snapshot.machines.values() {
        let status = snapshot.machine_status.get(&machine.id).map(|s| &**s);
        let (awake, in_flight) = gate.load(machine);
        *running.entry(&machine.app).or_default() += u32::from(awake);
        // Somebody put it to sleep while it had requests: they wait for it.
        let asleep = status.is_some_and(|s| matches!(s.state, MachineState::Suspended));
        if machine.host == host && in_flight > 0 && asleep && !awake {
            rouse(gate.clone(), machine.id.clone());
        }
    }
    for machine in snapshot
        .machines
        .values()
        .filter(|m| m.host == host && !m.cordoned)
    {
        let services = &machine.config.services;
        let Some(service) = services.iter().find(|s| s.autostop != Autostop::Off) else {
            continue;
        };
        // Each time, also where it may not sleep now: what is not asked for is not noticed.
        let last_use = gate.control().last_use(&machine.id);
        let Some(status) = snapshot.machine_status.get(&machine.id) else {
            continue;
        };
        // Its start is not over, though it may have answered already: there is nothing to put to sleep yet.
        if status.state == MachineState::Starting {
            continue;
        }
        let least = services
            .iter()
            .map(|s| s.min_machines_running)
            .max()
            .unwrap_or(0);
        let Some(count) = running
            .get_mut(&machine.app)
            .filter(|count| **count > least)
        else {
            continue;
        };
        if gate.lay_down(machine, idle, last_use) {
            *count -= 1;
            tokio::spawn(put_to_sleep(
                gate.clone(),
                machine.id.clone(),
                service.autostop,
            ));
        }
    }
}

async fn put_to_sleep(gate: Gate, id: MachineId, how: Autostop) {
    let outcome = match how {
        Autostop::Suspend => gate.control().suspend(&id).await,
        _ => gate.control().stop(&id).await,
    };
    if let Err(error) = &outcome {
        tracing::warn!(machine = %id, error, "not put to sleep");
    } else {
        gate.metrics().put_to_sleep.add();
    }
    gate.laid_down(&id, outcome.is_ok());
}

/// Has new requests wait while somebody puts a Machine to sleep, tells when those it has are done, and wakes it for
/// those that were not.
async fn see_off(gate: Gate, leaving: Leaving) {
    let Leaving {
        machine,
        mut ready,
        suspended,
    } = leaving;
    tokio::select! {
        () = gate.see_off(&machine) => {}
        () = ready.closed() => {}
    }
    // It may have left by now.
    let _ = ready.send(());
    let known = gate.view().snapshot().machines.get(&machine).cloned();
    if suspended.await.is_ok() && known.is_some_and(|m| gate.load(&m).1 > 0) {
        rouse(gate, machine);
    }
}

fn rouse(gate: Gate, id: MachineId) {
    tokio::spawn(async move {
        if let Err(error) = gate.control().start(&id).await {
            tracing::warn!(machine = %id, %error, "not woken for the requests it has");
        }
    });
}

#[cfg(test)]
mod tests;
