//! The public ports that a Machine's services may have.

use tern_catalog::{
    AppName, MAX_EXCLUSIVE_PORTS, MachineConfig, PortKind, PublicPorts, ServiceProtocol,
};

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
    let mut alone = 0;
    for (n, service) in config.services.iter().enumerate() {
        for (m, port) in service.ports.iter().enumerate() {
            // What is no port is warned of elsewhere, and not served.
            let Some(mut numbers) = port.numbers() else {
                continue;
            };
            let udp = service.protocol == ServiceProtocol::Udp;
            if udp || port.kind() == Some(PortKind::Raw) {
                alone += numbers.len();
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
    if alone > MAX_EXCLUSIVE_PORTS {
        return Err(ApiError::invalid(format!(
            "config.services: {alone} ports would be this app's alone; {MAX_EXCLUSIVE_PORTS} are possible"
        )));
    }
    let snapshot = shared.view.snapshot();
    let others = snapshot.machines.values().filter(|m| m.app != *app);
    if config.services.iter().all(|s| s.ports.is_empty()) {
        return Ok(());
    }
    match PublicPorts::of(others.map(|m| &**m)).taken(&config.services) {
        Some(port) => Err(ApiError::conflict(format!(
            "config.services: public port {port} is another app's; take another. (Raw TCP and UDP have their port \
             alone; services with the handlers tls, pg_tls or http share one.)"
        ))),
        None => Ok(()),
    }
}
