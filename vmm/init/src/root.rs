//! The root file system: a read-only image, under an overlay whose upper layer is the Machine's own
//! disk; and on top of it all that a Linux program expects to find mounted.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount, umount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::statfs::fstatfs;
use nix::unistd::{chdir, chroot};
use tern_guest::archive::RUN_JSON;
use tern_guest::config::{DiskConfig, MountConfig, RootConfig};

use crate::users::Account;

/// The disks that have to be left in a good state at the end.
#[derive(Default)]
pub struct Disks {
    /// Where the own disk is mounted: hidden under the new root, but still ours to reach.
    own: Option<File>,
    volumes: Vec<String>,
}

/// Mounts what init itself needs to see: processes, devices, the kernel.
pub fn mount_early() -> Result<()> {
    for (fs, target) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        fs::create_dir_all(target)?;
        mount_fs(fs, target, fs, MsFlags::MS_NOSUID, "")?;
    }
    Ok(())
}

/// Puts the root file system together and moves into it.
pub fn enter(config: &RootConfig) -> Result<Disks> {
    for directory in [IMAGE, DISK, NEW_ROOT] {
        fs::create_dir_all(directory)?;
    }
    mount_disk(&config.image, IMAGE, MsFlags::MS_RDONLY).context("the image")?;
    match &config.disk {
        Some(disk) => {
            mount_disk(disk, DISK, MsFlags::MS_RELATIME).context("the Machine's own disk")?;
        }
        None => mount_fs("tmpfs", DISK, "tmpfs", MsFlags::empty(), "mode=0755")?,
    }
    make_upper().context("the upper layer")?;
    let layers = format!("lowerdir={IMAGE},upperdir={UPPER},workdir={WORK}");
    mount_fs(
        "overlay",
        NEW_ROOT,
        "overlay",
        MsFlags::MS_RELATIME,
        &layers,
    )?;
    let directory = libc::O_DIRECTORY | libc::O_PATH;
    let own = OpenOptions::new()
        .read(true)
        .custom_flags(directory)
        .open(DISK)?;
    switch_root()?;
    Ok(Disks {
        own: config.disk.as_ref().map(|_| own),
        volumes: Vec::new(),
    })
}

impl Disks {
    /// Mounts a volume for the app's user.
    pub fn mount_volume(&mut self, volume: &MountConfig, account: &Account) -> Result<()> {
        fs::create_dir_all(&volume.path)?;
        let disk = DiskConfig {
            device: volume.device.clone(),
            fs: volume.fs.clone(),
        };
        let mut flags = MsFlags::MS_RELATIME;
        flags.set(MsFlags::MS_RDONLY, volume.read_only);
        mount_disk(&disk, &volume.path, flags)?;
        self.volumes.push(volume.path.clone());
        if !volume.read_only {
            if volume.fs == "ext4" {
                grow_ext4(Path::new(&volume.path), Path::new(&volume.device))
                    .context("growing it")?;
            }
            chown(&volume.path, Some(account.uid), Some(account.gid))?;
        }
        Ok(())
    }

    /// Writes everything out and leaves the disks clean. Says what went wrong and goes on: the next
    /// boot replays the journal of a disk that was not.
    pub fn close(&self, say: impl Fn(&str)) {
        // SAFETY: it takes no arguments and cannot fail.
        unsafe { libc::sync() };
        for volume in self.volumes.iter().rev() {
            if let Err(error) = umount(volume.as_str()) {
                say(&format!("unmount {volume}: {error}"));
            }
        }
        let Some(own) = &self.own else { return };
        let own = format!("/proc/self/fd/{}", own.as_raw_fd());
        for target in ["/", own.as_str()] {
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            if let Err(error) = mount(None::<&str>, target, None::<&str>, flags, None::<&str>) {
                say(&format!("remount {target} read-only: {error}"));
            }
        }
    }
}

/// Makes a mounted file system as large as its disk, which may have grown since the last boot. The kernel
/// does it while the file system is in use (fs/ext4/resize.c), and nothing at all where it fits.
fn grow_ext4(mounted: &Path, device: &Path) -> Result<()> {
    let bytes = File::open(device)?.seek(SeekFrom::End(0))?;
    let root = File::open(mounted)?;
    let blocks: u64 = bytes / fstatfs(&root)?.block_size().unsigned_abs().max(1);
    // SAFETY: the kernel reads one number from where `blocks` is.
    let grown = unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const blocks) };
    if grown < 0 {
        return Err(io::Error::last_os_error().into());
    }
    Ok(())
}

/// `_IOW('f', 16, __u64)` of `linux/ext4.h`.
const EXT4_IOC_RESIZE_FS: libc::Ioctl = 0x4008_6610;

/// Mounts what programs expect, inside the new root.
pub fn mount_system() -> Result<()> {
    let private = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    let mounts = [
        (
            "devpts",
            "/dev/pts",
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
            "mode=0620,gid=5,ptmxmode=666",
        ),
        (
            "tmpfs",
            "/dev/shm",
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            "mode=1777",
        ),
        ("mqueue", "/dev/mqueue", private, ""),
        (
            "tmpfs",
            "/run",
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            "mode=0755",
        ),
        ("cgroup2", "/sys/fs/cgroup", private, "nsdelegate"),
    ];
    for (fs, target, flags, options) in mounts {
        // `/sys/fs/cgroup` is the kernel's own directory; the others may be anything in an image.
        if !target.starts_with("/sys/") {
            real_directory(Path::new(target))?;
        }
        match mount_fs(fs, target, fs, flags, options) {
            // A kernel without it has no use for it.
            Err(error) if is_missing_fs(&error) => {}
            result => result?,
        }
    }
    fs::create_dir_all("/run/lock")?;
    fs::set_permissions("/run/lock", Permissions::from_mode(0o1777))?;
    if !Path::new("/tmp").exists() {
        fs::create_dir("/tmp")?;
        fs::set_permissions("/tmp", Permissions::from_mode(0o1777))?;
    }
    let links = [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
        ("pts/ptmx", "/dev/ptmx"),
    ];
    for (target, link) in links {
        if fs::symlink_metadata(link).is_ok() {
            fs::remove_file(link).context(link)?;
        }
        symlink(target, link).context(link)?;
    }
    Ok(())
}

/// The upper layer's root becomes the root's owner and mode, so it has to look like the image's.
fn make_upper() -> Result<()> {
    fs::create_dir_all(WORK)?;
    if !Path::new(UPPER).exists() {
        let image = fs::metadata(IMAGE)?;
        // Built aside, so that a boot that was cut short here leaves nothing half done.
        let new = format!("{UPPER}.new");
        if !Path::new(&new).exists() {
            fs::create_dir(&new)?;
        }
        chown(&new, Some(image.uid()), Some(image.gid()))?;
        fs::set_permissions(&new, image.permissions())?;
        fs::rename(&new, UPPER)?;
    }
    Ok(())
}

/// Makes the new root the root of everything, and frees what the initramfs takes up.
fn switch_root() -> Result<()> {
    for name in ["dev", "proc", "sys"] {
        let target = Path::new(NEW_ROOT).join(name);
        real_directory(&target)?;
        let from = Path::new("/").join(name);
        mount(
            Some(&from),
            &target,
            None::<&str>,
            MsFlags::MS_MOVE,
            None::<&str>,
        )
        .with_context(|| format!("move /{name}"))?;
    }
    // The configuration holds secrets; the rest is just memory. What is left of init is its pages.
    for path in [RUN_JSON, "/lib/modules-list", "/init"] {
        // Some are not there with every kernel.
        let _ = fs::remove_file(path);
    }
    let _ = fs::remove_dir_all("/lib/modules");
    chdir(NEW_ROOT)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("move the root")?;
    chroot(".")?;
    chdir("/")?;
    Ok(())
}

/// Makes sure that there is a directory, not a link to who knows where.
fn real_directory(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => fs::remove_file(path).and_then(|()| fs::create_dir(path)),
        Err(_) => fs::create_dir_all(path),
    }
    .with_context(|| path.display().to_string())
}

fn mount_disk(disk: &DiskConfig, target: &str, flags: MsFlags) -> Result<()> {
    wait_for(Path::new(&disk.device), DEVICE_TIMEOUT)?;
    // The room of a deleted file goes back to the host with the next commit of the journal.
    let writable_ext4 = disk.fs == "ext4" && !flags.contains(MsFlags::MS_RDONLY);
    let options = if writable_ext4 { "discard" } else { "" };
    mount_fs(&disk.device, target, &disk.fs, flags, options)
}

fn mount_fs(source: &str, target: &str, fs: &str, flags: MsFlags, options: &str) -> Result<()> {
    mount(Some(source), target, Some(fs), flags, Some(options))
        .with_context(|| format!("mount {source} on {target} as {fs}"))
}

fn is_missing_fs(error: &anyhow::Error) -> bool {
    error.downcast_ref::<nix::errno::Errno>() == Some(&nix::errno::Errno::ENODEV)
}

/// Waits until a device is there: the kernel may still be looking at it.
fn wait_for(path: &Path, at_most: Duration) -> Result<()> {
    let (Some(directory), Some(_)) = (path.parent(), path.file_name()) else {
        bail!("{} is not a device", path.display());
    };
    let deadline = Instant::now() + at_most;
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    watch.add_watch(
        directory,
        AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO,
    )?;
    while !path.exists() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("{} has not appeared within {at_most:?}", path.display());
        }
        let mut fds = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
        poll(
            &mut fds,
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
        )?;
        // Which name it was does not matter: the loop looks.
        let _ = watch.read_events();
    }
    Ok(())
}

const IMAGE: &str = "/image";
const DISK: &str = "/disk";
const UPPER: &str = "/disk/upper";
const WORK: &str = "/disk/work";
const NEW_ROOT: &str = "/newroot";

/// Virtual disks appear at once; this is for a host whose cores are all taken.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_awaited() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vda");
        let error = wait_for(&path, Duration::from_millis(1))
            .unwrap_err()
            .to_string();
        assert!(error.contains("vda has not appeared within 1ms"), "{error}");
        let thread = std::thread::spawn({
            let path = path.clone();
            move || wait_for(&path, Duration::from_secs(20))
        });
        fs::write(&path, "").unwrap();
        thread.join().unwrap().unwrap();
        wait_for(&path, Duration::ZERO).unwrap();
    }

    #[test]
    fn what_is_no_directory_makes_room_for_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        symlink("/etc", path("link")).unwrap();
        fs::write(path("file"), "").unwrap();
        for name in ["link", "file", "new/deep"] {
            real_directory(&path(name)).unwrap();
            assert!(fs::symlink_metadata(path(name)).unwrap().is_dir(), "{name}");
        }
        assert!(Path::new("/etc").is_dir());
    }
}
