//! Whether the host is this machine itself or a virtual one (`TERN_METAL=auto|native|qemu`).

use std::fmt;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// What a host is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// This machine, in namespaces of its own.
    Native,
    /// QEMU with emulated AMD-V.
    Qemu,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Qemu => "qemu",
        })
    }
}

/// Decides. `wish` is the value of `TERN_METAL`; `own` the directory of this program, where
/// `tern-vmm` is looked for.
pub fn decide(wish: Option<&str>, own: Option<&Path>) -> Result<Mode> {
    decide_by(wish, || {
        let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        obstacle(&cpus, nix::unistd::geteuid().is_root(), || probe(own))
    })
}

fn decide_by(wish: Option<&str>, obstacle: impl Fn() -> Option<Obstacle>) -> Result<Mode> {
    match wish.unwrap_or("auto") {
        "qemu" => Ok(Mode::Qemu),
        "auto" | "" => match obstacle() {
            None => Ok(Mode::Native),
            Some(Obstacle::NoHardware) => Ok(Mode::Qemu),
            // Worth a word: the person may think this machine is used.
            Some(Obstacle::Other(reason)) => {
                eprintln!("tern-metal: using QEMU, although the CPU can virtualize: {reason}");
                Ok(Mode::Qemu)
            }
        },
        "native" => match obstacle() {
            None => Ok(Mode::Native),
            Some(obstacle) => bail!("TERN_METAL=native is not possible here: {obstacle}"),
        },
        other => bail!("TERN_METAL is {other:?}, which is none of auto, native and qemu"),
    }
}

/// Why this machine itself cannot be the host.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Obstacle {
    NoHardware,
    Other(String),
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoHardware => f.write_str(
                "/proc/cpuinfo shows neither vmx nor svm (no hardware, switched off in the \
                 firmware, or a virtual machine without nesting)",
            ),
            Self::Other(reason) => f.write_str(reason),
        }
    }
}

fn obstacle(
    cpus: &str,
    root: bool,
    probe: impl FnOnce() -> Result<(), String>,
) -> Option<Obstacle> {
    let virtualizes = cpus
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| {
            line.split_whitespace()
                .any(|flag| flag == "vmx" || flag == "svm")
        });
    if !virtualizes {
        return Some(Obstacle::NoHardware);
    }
    if !root {
        return Some(Obstacle::Other(
            "it takes root to use this machine itself".to_owned(),
        ));
    }
    probe().err().map(Obstacle::Other)
}

/// Lets the monitor measure /dev/kvm.
fn probe(own: Option<&Path>) -> Result<(), String> {
    let Some(monitor) = own
        .map(|own| own.join("tern-vmm"))
        .filter(|monitor| monitor.is_file())
    else {
        return Err(
            "tern-vmm, which would measure /dev/kvm, is not beside tern-metal: \
                    cargo build -p tern-vmm"
                .to_owned(),
        );
    };
    let output = Command::new(&monitor)
        .arg("probe")
        .output()
        .map_err(|error| format!("cannot run {}: {error}", monitor.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stderr, output.stdout].concat();
    Err(format!(
        "`tern-vmm probe` says: {}",
        String::from_utf8_lossy(&said).trim()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMD: &str = "processor : 0\nflags\t\t: fpu vme svm avx\n";
    const NONE: &str = "processor : 0\nflags\t\t: fpu vme avx\nbugs : svm_like vmx\n";

    #[test]
    fn a_machine_is_used_itself_when_nothing_is_in_the_way() {
        let fine = || Ok(());
        assert_eq!(obstacle(AMD, true, fine), None);
        assert_eq!(obstacle("flags : vmx", true, fine), None);
        assert_eq!(obstacle(NONE, true, fine), Some(Obstacle::NoHardware));
        assert!(matches!(
            obstacle(AMD, false, fine),
            Some(Obstacle::Other(_))
        ));
        let slow = || Err("emulated".to_owned());
        assert_eq!(
            obstacle(AMD, true, slow),
            Some(Obstacle::Other("emulated".to_owned()))
        );
    }

    #[test]
    fn wishes_are_granted_or_refused_with_the_reason() {
        let none = || None;
        let hardware = || Some(Obstacle::NoHardware);
        let probe = || Some(Obstacle::Other("emulated".to_owned()));
        assert_eq!(decide_by(None, none).unwrap(), Mode::Native);
        assert_eq!(decide_by(Some("auto"), hardware).unwrap(), Mode::Qemu);
        assert_eq!(decide_by(Some("auto"), probe).unwrap(), Mode::Qemu);
        assert_eq!(decide_by(Some("qemu"), none).unwrap(), Mode::Qemu);
        assert_eq!(decide_by(Some("native"), none).unwrap(), Mode::Native);
        let refused = |wish, obstacle: fn() -> Option<Obstacle>| {
            decide_by(Some(wish), obstacle).unwrap_err().to_string()
        };
        assert!(refused("native", hardware).contains("neither vmx nor svm"));
        assert!(refused("native", probe).contains("emulated"));
        assert!(refused("kvm", none).contains("none of auto, native and qemu"));
    }

    #[test]
    fn a_missing_monitor_is_a_reason_with_a_next_step() {
        let dir = tempfile::tempdir().unwrap();
        assert!(
            probe(Some(dir.path()))
                .unwrap_err()
                .contains("cargo build -p tern-vmm")
        );
        assert!(probe(None).is_err());
    }
}
