//! From command line arguments to a host and a command: what `run`, `up` and `exec` share.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::cli::{CommandArgs, HostArgs};
use crate::client::{self, Outcome};
use crate::host::{Host, Wanted};
use crate::inbox::Inbox;
use crate::kernel::Origin;
use crate::mode::{self, Mode};
use crate::place::{self, Place};
use crate::qemu::Size;
use crate::rootfs::{Cache, Rootfs};
use crate::share::{self, Share};
use crate::timings::Timings;
use crate::{variable, wire};

/// What the host is made of, and for a virtual one, its kernel and disks.
pub fn mode_and_rootfs(place: &Place, kernel: Origin) -> Result<(Mode, Option<Rootfs>)> {
    let mode = mode::decide(variable("TERN_METAL").as_deref(), place.own.as_deref())?;
    let rootfs = match mode {
        Mode::Native => {
            ensure!(
                kernel == Origin::default(),
                "--kernel (TERN_METAL_KERNEL) is for a virtual host, and this machine itself is \
                 used; set TERN_METAL=qemu"
            );
            None
        }
        Mode::Qemu => Some(Cache::of_user(variable)?.get(kernel, false)?),
    };
    Ok((mode, rootfs))
}

/// Starts a host: a virtual one from `rootfs`, without that this machine itself.
pub fn start(
    rootfs: Option<&Rootfs>,
    wanted: &Wanted,
    inbox: &Inbox,
    timings: &mut Timings,
) -> Result<Host> {
    match rootfs {
        Some(rootfs) => Host::start_virtual(rootfs, wanted, inbox, timings),
        None => Host::start_native(wanted, inbox, timings),
    }
}

/// The host that was asked for.
pub fn wanted(args: &HostArgs, place: &Place, idle: Option<Duration>) -> Result<Wanted> {
    let results = results(args, place)?;
    let shares = place
        .shares()
        .into_iter()
        .chain([Share::same(&results, false)])
        .chain(args.share.iter().cloned());
    Ok(Wanted {
        size: Size {
            cpus: args.cpus,
            memory_mib: args.memory,
        },
        cpu: args.cpu.clone(),
        shares: share::arrange(shares)?,
        forwards: args.forward.clone(),
        idle,
    })
}

/// The directory for results, made if it is missing.
pub fn results(args: &HostArgs, place: &Place) -> Result<PathBuf> {
    let path = match &args.results {
        Some(path) => place.cwd.join(path),
        None => place.results(),
    };
    fs::create_dir_all(&path)
        .with_context(|| format!("cannot make the results directory {}", path.display()))?;
    Ok(path)
}

/// The command that was asked for.
pub fn command(
    args: &CommandArgs,
    place: &Place,
    shares: &[Share],
    results: &Path,
) -> Result<wire::Command> {
    let mut env = place::environment(&args.env, place::own_environment())?;
    env.insert(
        "TERN_METAL_RESULTS".to_owned(),
        results.display().to_string(),
    );
    let cwd = match &args.cwd {
        Some(cwd) => cwd.clone(),
        None => share::inside(shares, &place.cwd).unwrap_or_else(|| "/root".into()),
    };
    let tty = match args.tty {
        true => Some(client::terminal_size().context("--tty: standard input is no terminal")?),
        false => None,
    };
    if tty.is_some() {
        let terminal = || variable("TERM").unwrap_or_else(|| "xterm".to_owned());
        env.entry("TERM".to_owned()).or_insert_with(terminal);
    }
    Ok(wire::Command {
        argv: args.argv.clone(),
        env,
        cwd: cwd.display().to_string(),
        tty,
        keep_background: args.keep_background,
    })
}

/// Says what the exit code alone does not.
pub fn explain(outcome: &Outcome, post_mortem: Option<&str>) {
    match outcome {
        Outcome::Exited(_) | Outcome::Forced(Signal::SIGPIPE) => {}
        Outcome::NotStarted(reason, _) => eprintln!("tern-metal: {reason}"),
        Outcome::TimedOut => eprintln!("tern-metal: the time limit has passed: command ended"),
        Outcome::Forced(signal) => {
            eprintln!("tern-metal: the command did not end after {signal}: killed");
        }
        Outcome::Lost(reason) => {
            let words = post_mortem.unwrap_or_default();
            eprintln!("tern-metal: the host was lost while the command ran: {reason}\n{words}");
        }
    }
}
