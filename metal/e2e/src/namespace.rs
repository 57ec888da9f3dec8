//! Network and mount namespaces: a test's ports, devices, rules and `/etc/hosts` are its own.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::process::run;

/// Moves this thread, and what it starts from now on, into namespaces of its own.
pub fn isolate(scratch: &Path) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root() && Path::new("/dev/kvm").exists(),
        "end-to-end tests need root and true KVM: run them with `make test`, which starts tern-metal"
    );
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("unshare")?;
    let none: Option<&str> = None;
    // Nothing mounted from here on is seen outside.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("make / private")?;
    run("ip", ["link", "set", "lo", "up"])?;
    for (name, content) in [
        ("hosts", "127.0.0.1 localhost\n::1 localhost\n"),
        ("resolv.conf", ""),
    ] {
        let own = scratch.join(name);
        std::fs::write(&own, content)?;
        let shared = Path::new("/etc").join(name);
        if !shared.exists() {
            std::fs::write(&shared, "")?;
        }
        mount(Some(&own), &shared, none, MsFlags::MS_BIND, none)
            .with_context(|| format!("cover {}", shared.display()))?;
    }
    let netns = Path::new("/run/netns");
    std::fs::create_dir_all(netns)?;
    mount(Some("netns"), netns, Some("tmpfs"), MsFlags::empty(), none)
        .context("mount /run/netns")?;
    Ok(())
}

/// Adds a line to this namespace's `/etc/hosts`.
pub fn add_host(address: &str, name: &str) -> Result<()> {
    use std::io::Write as _;
    let mut hosts = std::fs::OpenOptions::new()
        .append(true)
        .open("/etc/hosts")?;
    writeln!(hosts, "{address} {name}")?;
    Ok(())
}
