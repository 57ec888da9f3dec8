//! The kernel's switches for forwarding, and who wanted them.
//!
//! Machines need a host that forwards, and the kernel knows no "forward only for these": once on, the
//! switches make a router for everybody whose packets arrive. Where they were on before an agent came, the
//! host's owner wanted a router and has rules of their own. Where they were off, the packet filter lets
//! no strangers through from outside (`rules::Guard`). Which of the two it was is not to be seen any more
//! afterwards, so it is written down, for as long as this boot of the host lasts. Where an agent has been and
//! nothing is written, they count as off: a router that is not one is noticed, and a host that is open is not.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::NetworkError;
use super::netfilter::Asking;
use super::rules::{self, Guard};
use super::slot::Slot;

/// What the switches said before an agent changed them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Before {
    boot_id: String,
    ipv4: bool,
    ipv6: bool,
}

const V4: &str = "/proc/sys/net/ipv4/ip_forward";
const V6: &str = "/proc/sys/net/ipv6/conf";
const ALL: &str = "all/forwarding";

/// Whether strangers are to be kept from passing, by what the switches were before an agent changed them.
/// `memory` is the file that says so in this boot; it is written before they are.
pub(super) fn before(memory: &Path, boot_id: &str) -> Result<Guard, NetworkError> {
    let told = |e: io::Error| NetworkError::Memory(memory.to_owned(), e);
    let before = match remembered(memory, boot_id).map_err(told)? {
        Some(before) => before,
        None => {
            // Its table outlives an agent, and so do the switches: one of a version that did not write down what
            // it found may have turned them on, and what they say now says nothing.
            let known = !was_here().map_err(NetworkError::Open)?;
            let before = Before {
                boot_id: boot_id.to_owned(),
                ipv4: known && is_on(Path::new(V4)),
                ipv6: known && is_on(&Path::new(V6).join(ALL)),
            };
            let text = serde_json::to_vec(&before).map_err(|e| told(e.into()))?;
            std::fs::write(memory, text).map_err(told)?;
            before
        }
    };
    let guard = Guard {
        ipv4: !before.ipv4,
        ipv6: !before.ipv6,
    };
    if guard.ipv4 || guard.ipv6 {
        tracing::info!(
            ipv4 = guard.ipv4,
            ipv6 = guard.ipv6,
            "forwarding was off and is on for Machines; other traffic from outside is not let through. If this \
             host is a router, say so in /etc/sysctl.d (net.ipv4.ip_forward, net.ipv6.conf.all.forwarding) and \
             restart it"
        );
    }
    Ok(guard)
}

/// Lets the host forward packets.
pub(super) fn switch_on() -> Result<(), NetworkError> {
    keep_believing_routers()?;
    set(Path::new(V4), "1")?;
    set(&Path::new(V6).join(ALL), "1")
}

/// Whether an agent has been here since the host booted.
fn was_here() -> io::Result<bool> {
    Asking::open()?.has_table(rules::TABLE)
}

fn remembered(memory: &Path, boot_id: &str) -> io::Result<Option<Before>> {
    let text = match std::fs::read(memory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    // One that cannot be read is of a write that was broken off: nothing had been changed then.
    let before: Option<Before> = serde_json::from_slice(&text).ok();
    Ok(before.filter(|before| before.boot_id == boot_id))
}

/// A host that forwards stops believing routers, and would lose its own IPv6 route to the outside, unless
/// it is told to go on (`ip-sysctl.rst`: `accept_ra` 2).
fn keep_believing_routers() -> Result<(), NetworkError> {
    for entry in std::fs::read_dir(V6).into_iter().flatten().flatten() {
        let path = entry.path().join("accept_ra");
        let name = entry.file_name();
        let own = name.to_str().is_none_or(|n| Slot::of_tap(n).is_some());
        if !own && is_on(&path) {
            set(&path, "2")?;
        }
    }
    Ok(())
}

fn is_on(path: &Path) -> bool {
    std::fs::read_to_string(path).is_ok_and(|now| now.trim() == "1")
}

fn set(path: &Path, value: &str) -> Result<(), NetworkError> {
    if std::fs::read_to_string(path).is_ok_and(|now| now.trim() == value) {
        return Ok(());
    }
    std::fs::write(path, value).map_err(|e| NetworkError::Sysctl(path.display().to_string(), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_is_remembered_for_one_boot() {
        let dir = tempfile::tempdir().unwrap();
        let memory = dir.path().join("forwarding.json");
        assert_eq!(remembered(&memory, "now").unwrap(), None);
        let before = Before {
            boot_id: "now".into(),
            ipv4: true,
            ipv6: false,
        };
        std::fs::write(&memory, serde_json::to_vec(&before).unwrap()).unwrap();
        assert_eq!(remembered(&memory, "now").unwrap(), Some(before));
        assert_eq!(remembered(&memory, "later").unwrap(), None);
        std::fs::write(&memory, "{\"boot_id\":").unwrap();
        assert_eq!(remembered(&memory, "now").unwrap(), None);
    }
}
