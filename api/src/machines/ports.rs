//! The public ports that a Machine's services may have.

use std::collections::HashSet;

use tern_catalog::{AppName, MAX_PORTS_OF_APP, MachineConfig, Port, PublicPorts, ServiceProtocol};

use crate::error::ApiError;
use crate::server::Shared;

/// Open to all apps, whatever the operator says of others.
const ALWAYS: [u16; 2] = [80, 443];

/// An error unless an app's Machine may have the public ports of this configuration: they are open to services, and
/// those that one app has alone are no other's.
pub(super) fn check(
    shared: &Shared,
    app: &AppName,
    config: &MachineConfig,
) -> Result<(), ApiError> {
    let mut count = 0;
    for (n, service) in config.services.iter().enumerate() {
        for (m, port) in service.ports.iter().enumerate() {
            // What is no port is warned of elsewhere, and not served.
            let Some(mut numbers) = port.numbers() else {
                continue;
            };
            // Counted before anything is walked: a range may be long.
            count += numbers.len();
            if count > MAX_PORTS_OF_APP + ALWAYS.len() {
                return Err(too_many(MAX_PORTS_OF_APP));
            }
            let allowed = &shared.config.service_ports;
            let may = |number: &u16| ALWAYS.contains(number) || allowed.contains(*number);
            if let Some(number) = numbers.find(|number| !may(number)) {
                return Err(ApiError::invalid(format!(
                    "config.services[{n}].ports[{m}]: port {number} is not open to services here; those are 80, 443 \
                     and {allowed} (the operator's `tern serve --service-ports`)"
                )));
            }
        }
    }
    let snapshot = shared.view.snapshot();
    let others = snapshot.machines.values().filter(|m| m.app != *app);
    if config.services.iter().all(|s| s.ports.is_empty()) {
        return Ok(());
    }
    let mine = snapshot
        .machines_of(app)
        .map(|(machine, _)| &machine.config);
    let mut all: HashSet<(ServiceProtocol, u16)> = HashSet::new();
    for service in mine.chain([config]).flat_map(|c| &c.services) {
        let numbers = service.ports.iter().filter_map(Port::numbers).flatten();
        let numbers = numbers.filter(|number| !ALWAYS.contains(number));
        all.extend(numbers.map(|number| (service.protocol, number)));
    }
    if all.len() > 2 * MAX_PORTS_OF_APP {
        return Err(too_many(2 * MAX_PORTS_OF_APP));
    }
    match PublicPorts::of(others.map(|m| &**m)).taken(&config.services) {
        Some(port) => Err(ApiError::conflict(format!(
            "config.services: public port {port} is another app's; take another. (Raw TCP and UDP have their port \
             alone; services with the handlers tls, pg_tls or http share one.)"
        ))),
        None => Ok(()),
    }
}

fn too_many(most: usize) -> ApiError {
    ApiError::invalid(format!(
        "config.services: more than {most} public ports beside 80 and 443; name fewer, or a shorter range"
    ))
}
