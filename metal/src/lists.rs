//! The lists that a root disk is made from: Debian packages, and kernel modules for each kernel that
//! can be chosen.

use anyhow::{Result, bail};
use clap::ValueEnum as _;

use crate::kernel::Origin;

/// Debian packages, as the file has them.
pub const PACKAGES: &str = include_str!("../rootfs/packages");
/// Kernel modules, as the file has them.
pub const MODULES: &str = include_str!("../rootfs/modules");

/// Debian packages of the root file system.
pub fn packages() -> Vec<&'static str> {
    entries(PACKAGES)
}

/// Paths of the modules to take from this kernel. Each of them must be there.
pub fn modules(kernel: Origin) -> Result<Vec<&'static str>> {
    modules_in(MODULES, kernel)
}

/// A path alone is for every kernel; with the name of one behind it, for that one.
fn modules_in(list: &str, kernel: Origin) -> Result<Vec<&str>> {
    let mut chosen = Vec::new();
    for entry in entries(list) {
        let (path, only) = match entry.split_once(' ') {
            Some((path, name)) => (path, Some(name.trim())),
            None => (entry, None),
        };
        let wanted = match only.map(|name| Origin::from_str(name, false)) {
            None => true,
            Some(Ok(only)) => only == kernel,
            Some(Err(_)) => bail!("rootfs/modules: {entry:?} is for a kernel that does not exist"),
        };
        if wanted {
            chosen.push(path);
        }
    }
    Ok(chosen)
}

/// Lines of a list without comments.
fn entries(list: &str) -> Vec<&str> {
    list.lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .filter(|entry| !entry.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_have_comments() {
        assert_eq!(entries("# x\na\n\n b # why\n"), ["a", "b"]);
        assert!(packages().contains(&"nftables"));
    }

    #[test]
    fn a_module_is_for_every_kernel_or_for_the_one_named() {
        let list = "# x\nboth\nold stable # gone since\nnew  backports\n";
        let of = |kernel| modules_in(list, kernel).unwrap();
        assert_eq!(of(Origin::Stable), ["both", "old"]);
        assert_eq!(of(Origin::Backports), ["both", "new"]);
        let error = modules_in("path sid\n", Origin::Stable).unwrap_err();
        assert!(error.to_string().contains("path sid"), "{error}");
    }

    #[test]
    fn every_kernel_has_what_a_host_cannot_do_without() {
        for &kernel in Origin::value_variants() {
            let chosen = modules(kernel).unwrap();
            assert!(chosen.iter().all(|path| !path.contains(' ')), "{chosen:?}");
            for path in ["arch", "drivers/net/wireguard", "drivers/vhost", "fs/9p"] {
                assert!(chosen.contains(&path), "{kernel:?} {path}");
            }
        }
    }
}
