//! Which block device holds a directory, as control groups name it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::stat::{major, minor};

/// `MAJOR:MINOR` of the disk under the file system of `dir`; `None` where there is no single one, as with btrfs,
/// overlay and tmpfs.
pub(crate) fn holding(dir: &Path) -> io::Result<Option<String>> {
    disk_of(fs::metadata(dir)?.dev(), Path::new("/sys/dev/block"))
}

/// Requests are counted and throttled at whole disks, so a partition stands for its disk.
fn disk_of(device: u64, known: &Path) -> io::Result<Option<String>> {
    // Numbers that the kernel makes up for file systems without a device of their own.
    if major(device) == 0 {
        return Ok(None);
    }
    let number = format!("{}:{}", major(device), minor(device));
    // A link to the device's directory, which for a partition is in its disk's.
    let directory = fs::canonicalize(known.join(&number))?;
    if !directory.join("partition").exists() {
        return Ok(Some(number));
    }
    let disk = directory.parent().unwrap_or(&directory).join("dev");
    Ok(Some(fs::read_to_string(disk)?.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    use nix::sys::stat::makedev;

    #[test]
    fn a_partition_stands_for_its_disk() {
        let sys = tempfile::tempdir().unwrap();
        let (known, disk) = (sys.path().join("known"), sys.path().join("devices/vda"));
        fs::create_dir_all(disk.join("vda1")).unwrap();
        fs::create_dir(&known).unwrap();
        fs::write(disk.join("dev"), "254:0\n").unwrap();
        fs::write(disk.join("vda1/dev"), "254:1\n").unwrap();
        fs::write(disk.join("vda1/partition"), "1\n").unwrap();
        symlink("../devices/vda", known.join("254:0")).unwrap();
        symlink("../devices/vda/vda1", known.join("254:1")).unwrap();
        let of = |minor| disk_of(makedev(254, minor), &known);
        assert_eq!(of(0).unwrap().as_deref(), Some("254:0"));
        assert_eq!(of(1).unwrap().as_deref(), Some("254:0"));
        assert!(of(2).is_err(), "nobody knows it");
        assert_eq!(disk_of(makedev(0, 45), &known).unwrap(), None);
    }

    #[test]
    fn what_is_only_in_memory_is_on_no_disk() {
        assert_eq!(holding(Path::new("/proc")).unwrap(), None);
    }
}
