//! The host's kernel, initramfs, root disk and data disk template: made once from Debian packages,
//! kept in a cache outside the checkout under a name that is the hash of everything that went in.
//!
//! A finished entry is complete: it is made under a temporary name and renamed. One builder works at
//! a time; others wait for its result.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use sha2::{Digest as _, Sha256};

use crate::kernel::{self, Origin};
use crate::lists;
use crate::process::spawn_bound;

/// Debian release. The root file system's C library must be as new as the one that the checkout's
/// programs are linked to.
pub const SUITE: &str = "bookworm";
/// Raised when the Rust side of the build changes what it makes.
const FORMAT: u32 = 1;
/// Size of the data disk. Sparse: it takes what is written to it.
const DATA_DISK_BYTES: u64 = 32 << 30;

const CUSTOMIZE: &str = include_str!("../rootfs/customize.sh");
const INITRAMFS: &str = include_str!("../rootfs/initramfs.sh");

/// What a host is started from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rootfs {
    directory: PathBuf,
}

impl Rootfs {
    /// ELF kernel with a PVH entry.
    pub fn kernel(&self) -> PathBuf {
        self.directory.join("vmlinux")
    }

    /// cpio archive, to be continued by another one with the agent and its plan.
    pub fn initramfs(&self) -> PathBuf {
        self.directory.join("initramfs.cpio")
    }

    /// Root file system, EROFS.
    pub fn root(&self) -> PathBuf {
        self.directory.join("root.erofs")
    }

    /// Empty ext4 to be copied for each start, sparse.
    pub fn data(&self) -> PathBuf {
        self.directory.join("data.ext4")
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    fn is_complete(&self) -> bool {
        [self.kernel(), self.initramfs(), self.root(), self.data()]
            .iter()
            .all(|f| f.is_file())
    }
}

/// A directory of root file systems.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// `$TERN_METAL_CACHE`, else `tern/metal` in the user's cache directory.
    pub fn of_user(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let root = if let Some(path) = set("TERN_METAL_CACHE") {
            PathBuf::from(path)
        } else if let Some(path) = set("XDG_CACHE_HOME") {
            Path::new(&path).join("tern/metal")
        } else if let Some(home) = set("HOME") {
            Path::new(&home).join(".cache/tern/metal")
        } else {
            bail!("none of TERN_METAL_CACHE, XDG_CACHE_HOME and HOME is set: set one");
        };
        ensure!(
            root.is_absolute(),
            "the cache directory {} must be absolute",
            root.display()
        );
        Ok(Self { root })
    }

    /// The entry for today's inputs with this kernel, made first if it is missing or `fresh` is
    /// asked for.
    pub fn get(&self, kernel: Origin, fresh: bool) -> Result<Rootfs> {
        let rootfs = Rootfs {
            directory: self.root.join(key(kernel)),
        };
        if !fresh && rootfs.is_complete() {
            return Ok(rootfs);
        }
        fs::create_dir_all(&self.root)
            .with_context(|| format!("cannot make the cache {}", self.root.display()))?;
        let _builder = self.lock()?;
        if !fresh && rootfs.is_complete() {
            return Ok(rootfs);
        }
        self.sweep()?;
        let work = tempfile::Builder::new()
            .prefix(WORK_PREFIX)
            .tempdir_in(&self.root)
            .context("cannot make a directory to build in")?;
        build(work.path(), kernel)?;
        if rootfs.directory.exists() {
            // Only when made afresh: hosts that run from the old one hold its files open.
            fs::remove_dir_all(&rootfs.directory).context("cannot remove the old root disk")?;
        }
        fs::set_permissions(work.path(), fs::Permissions::from_mode(0o755))?;
        fs::rename(work.keep(), &rootfs.directory).context("cannot name the finished root disk")?;
        Ok(rootfs)
    }

    fn lock(&self) -> Result<Flock<File>> {
        let path = self.root.join("lock");
        let open =
            || File::create(&path).with_context(|| format!("cannot open {}", path.display()));
        match Flock::lock(open()?, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                eprintln!("tern-metal: another build of the root disk is running: waiting for it");
            }
            Err((_, error)) => return Err(error).context("cannot lock the cache"),
        }
        Flock::lock(open()?, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .context("cannot lock the cache")
    }

    /// Removes what builders left that were killed. The lock says that none is running.
    fn sweep(&self) -> Result<()> {
        for entry in fs::read_dir(&self.root).context("cannot list the cache")? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(WORK_PREFIX) {
                fs::remove_dir_all(entry.path())
                    .with_context(|| format!("cannot remove {}", entry.path().display()))?;
            }
        }
        Ok(())
    }
}

/// Marks a directory in the cache as unfinished.
const WORK_PREFIX: &str = ".building-";

/// Hash of all inputs.
fn key(kernel: Origin) -> String {
    let format = FORMAT.to_string();
    let mut inputs = vec![
        format.as_str(),
        SUITE,
        std::env::consts::ARCH,
        lists::PACKAGES,
        lists::MODULES,
        CUSTOMIZE,
        INITRAMFS,
    ];
    // The release's own kernel is no input of its own: SUITE stands for it.
    if kernel != Origin::Stable {
        inputs.push(kernel.name());
    }
    key_of(&inputs)
}

fn key_of(inputs: &[&str]) -> String {
    let mut hash = Sha256::new();
    for input in inputs {
        hash.update((input.len() as u64).to_le_bytes());
        hash.update(input.as_bytes());
    }
    hex::encode(&hash.finalize()[..8])
}

fn build(work: &Path, kernel: Origin) -> Result<()> {
    let started = Instant::now();
    let report = |step: &str| {
        eprintln!(
            "tern-metal: [{:5.1} s] {step}",
            started.elapsed().as_secs_f64()
        );
    };
    report(
        "building the root disk from Debian packages, once (half a minute, or more on a busy machine)",
    );
    let assets = work.join("assets");
    fs::create_dir(&assets)?;
    let modules = lists::modules(kernel)?.join("\n") + "\n";
    for (name, contents) in [
        ("customize.sh", CUSTOMIZE),
        ("initramfs.sh", INITRAMFS),
        ("modules", &modules),
    ] {
        fs::write(assets.join(name), contents)?;
        fs::set_permissions(assets.join(name), fs::Permissions::from_mode(0o755))?;
    }
    bootstrap(work, &assets, kernel, &report)?;

    report("unpacking the kernel");
    let compressed = work.join("vmlinuz");
    let kernel = kernel::unpack(&fs::read(&compressed).context("the build made no kernel")?)?;
    fs::write(work.join("vmlinux"), kernel).context("cannot write the kernel")?;
    fs::remove_file(compressed)?;

    report("making the data disk");
    let data = work.join("data.ext4");
    File::create(&data)?
        .set_len(DATA_DISK_BYTES)
        .context("cannot make the data disk")?;
    let made = Command::new("mkfs.ext4")
        .args([
            "-q",
            "-F",
            "-E",
            "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
        ])
        .arg(&data)
        .output()
        .context("cannot run mkfs.ext4: apt-get install e2fsprogs")?;
    ensure!(
        made.status.success(),
        "mkfs.ext4 failed: {}",
        String::from_utf8_lossy(&made.stderr).trim()
    );
    fs::remove_dir_all(assets)?;
    if work.join("tmp").exists() {
        fs::remove_dir_all(work.join("tmp")).context("cannot remove mmdebstrap's scratch files")?;
    }
    report("the root disk is ready");
    Ok(())
}

/// Runs mmdebstrap, showing its steps as they come and all it said if it fails.
fn bootstrap(work: &Path, assets: &Path, kernel: Origin, report: &impl Fn(&str)) -> Result<()> {
    let mut command = isolated("mmdebstrap", work)?;
    command
        .arg("--variant=essential")
        .arg(format!("--include={}", lists::packages().join(",")))
        .arg("--aptopt=Apt::Install-Recommends \"false\"");
    for path in ["doc", "man", "info", "locale", "lintian"] {
        command.arg(format!("--dpkgopt=path-exclude=/usr/share/{path}/*"));
    }
    command
        .arg(format!(
            "--customize-hook={}",
            assets.join("customize.sh").display()
        ))
        .arg(copy_out(work, "vmlinuz"))
        .arg(copy_out(work, "initramfs.cpio"))
        .arg(copy_out(work, "root.erofs"))
        .args(["--format=null", SUITE, "-"])
        .env("TERN_METAL_ASSETS", assets)
        .env("TERN_METAL_SUITE", SUITE)
        .env("TERN_METAL_KERNEL", kernel.name())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = spawn_bound(&mut command, Signal::SIGKILL)
        .context("cannot run mmdebstrap: apt-get install mmdebstrap")?;
    let mut said = Vec::new();
    for line in BufReader::new(child.stderr.take().context("its output is a pipe")?).lines() {
        let line = line.context("cannot read what mmdebstrap says")?;
        if let Some(step) = line
            .strip_prefix("I: ")
            .filter(|step| !step.starts_with("running -") && !step.starts_with("running special"))
        {
            report(step);
        }
        said.push(line);
    }
    let status = child.wait()?;
    if !status.success() {
        let mut stderr = std::io::stderr().lock();
        for line in &said {
            writeln!(stderr, "mmdebstrap: {line}")?;
        }
        bail!(
            "mmdebstrap ended with {status}; its words are above. It needs a Debian mirror (does \
             `apt-get update` work?) and root, or user namespaces with `newuidmap` (uidmap)"
        );
    }
    Ok(())
}

/// A command that leaves nothing behind when it is killed. As root, mmdebstrap mounts file systems
/// in its new root: in namespaces of its own they vanish with it, and what it wrote is in `work`,
/// to be swept. (Otherwise it makes such namespaces by itself, where it may write to /tmp only.)
fn isolated(program: &str, work: &Path) -> Result<Command> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Command::new(program));
    }
    let scratch = work.join("tmp");
    fs::create_dir(&scratch)?;
    let mut command = Command::new("unshare");
    command
        .args([
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--",
            program,
        ])
        .env("TMPDIR", scratch);
    Ok(command)
}

/// The hook that takes a file out of the new root.
fn copy_out(work: &Path, name: &str) -> String {
    // mmdebstrap splits this as a shell would.
    let to = work.join(name).display().to_string().replace('\'', r"'\''");
    format!("--customize-hook=download /tern-metal/{name} '{to}'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_changes_with_every_input_and_only_then() {
        assert_eq!(key(Origin::Stable), key(Origin::Stable));
        assert_eq!(key(Origin::Stable).len(), 16);
        assert_ne!(key_of(&["a", "b"]), key_of(&["a", "c"]));
        assert_ne!(key_of(&["ab", "c"]), key_of(&["a", "bc"]));
    }

    #[test]
    fn each_kernel_has_its_own_key_and_the_usual_one_that_of_the_files() {
        let files = [
            &FORMAT.to_string(),
            SUITE,
            std::env::consts::ARCH,
            lists::PACKAGES,
            lists::MODULES,
            CUSTOMIZE,
            INITRAMFS,
        ];
        assert_eq!(key(Origin::Stable), key_of(&files));
        assert_ne!(key(Origin::Backports), key(Origin::Stable));
    }

    #[test]
    fn the_cache_is_where_the_user_keeps_caches() {
        let with = |set: &'static [(&str, &str)]| {
            Cache::of_user(move |name| {
                set.iter()
                    .find(|(n, _)| *n == name)
                    .map(|(_, v)| (*v).to_owned())
            })
            .map(|cache| cache.root)
        };
        assert_eq!(
            with(&[("HOME", "/h")]).unwrap(),
            Path::new("/h/.cache/tern/metal")
        );
        assert_eq!(
            with(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/c")]).unwrap(),
            Path::new("/c/tern/metal")
        );
        assert_eq!(
            with(&[("TERN_METAL_CACHE", "/t"), ("HOME", "/h")]).unwrap(),
            Path::new("/t")
        );
        assert!(with(&[("XDG_CACHE_HOME", ""), ("HOME", "relative")]).is_err());
        assert!(with(&[]).is_err());
    }

    #[test]
    fn a_finished_entry_is_used_and_leftovers_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache {
            root: dir.path().to_owned(),
        };
        let entry = dir.path().join(key(Origin::Stable));
        fs::create_dir(&entry).unwrap();
        for file in ["vmlinux", "initramfs.cpio", "root.erofs"] {
            fs::write(entry.join(file), "x").unwrap();
        }
        assert!(
            !Rootfs {
                directory: entry.clone()
            }
            .is_complete()
        );
        fs::write(entry.join("data.ext4"), "x").unwrap();
        let found = cache.get(Origin::Stable, false).unwrap();
        assert_eq!(found.directory(), entry);

        let left = dir.path().join(format!("{WORK_PREFIX}1"));
        fs::create_dir(&left).unwrap();
        cache.sweep().unwrap();
        assert!(!left.exists() && entry.exists());
    }
}
