//! Loads the kernel modules that the initramfs brings along.
//!
//! `/lib/modules-list` names them in an order in which each finds what it needs; a kernel that has
//! everything built in comes with an empty list or none. Parameters come from the kernel's command
//! line, as they would for built-in code: `virtio_mmio.device=…` goes to `virtio_mmio`.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

/// Loads all modules named in the list of the initramfs.
pub fn load_all() -> Result<()> {
    let list = match fs::read_to_string(LIST) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        list => list.context(LIST)?,
    };
    if list.trim().is_empty() {
        return Ok(());
    }
    let cmdline = fs::read_to_string("/proc/cmdline").context("/proc/cmdline")?;
    for file in list.lines().filter(|line| !line.is_empty()) {
        load(
            &Path::new(DIRECTORY).join(file),
            &parameters(file, &cmdline),
        )
        .with_context(|| format!("kernel module {file}"))?;
    }
    Ok(())
}

fn load(path: &Path, parameters: &str) -> Result<()> {
    let parameters = CString::new(parameters)?;
    match finit_module(File::open(path)?, &parameters, ModuleInitFlags::empty()) {
        // It may be built in after all.
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The words of the command line that are for this module, without its name.
fn parameters(file: &str, cmdline: &str) -> String {
    let module = file.strip_suffix(".ko").unwrap_or(file).replace('-', "_");
    let mine = |word: &str| {
        let (name, parameter) = word.split_once('.')?;
        (name.replace('-', "_") == module).then(|| parameter.to_string())
    };
    // What follows `--` is for init.
    let words = cmdline
        .split_ascii_whitespace()
        .take_while(|word| *word != "--");
    words.filter_map(mine).collect::<Vec<_>>().join(" ")
}

const LIST: &str = "/lib/modules-list";
const DIRECTORY: &str = "/lib/modules";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_module_gets_its_own_parameters() {
        let cmdline = "quiet virtio_mmio.device=4K@0xd0000000:5 virtio-mmio.device=4K@0xd0001000:6 \
                       virtio_net.napi_tx=0 reboot=k -- virtio_mmio.x=1\n";
        assert_eq!(
            parameters("virtio_mmio.ko", cmdline),
            "device=4K@0xd0000000:5 device=4K@0xd0001000:6"
        );
        assert_eq!(parameters("virtio_net.ko", cmdline), "napi_tx=0");
        assert_eq!(parameters("virtio.ko", cmdline), "");
    }
}
