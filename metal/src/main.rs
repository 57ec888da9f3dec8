//! A bare-metal host with true KVM, for machines without virtualization hardware.
//!
//! `tern-metal run -- command` in short: [`rootfs`] makes (once) a kernel and disks from Debian
//! packages, [`host`] boots them under [`qemu`] (or makes this machine itself the host, [`native`]),
//! the [`agent`] inside takes commands over [`wire`], and [`client`] makes one look as if it ran here.
//! [`up`] keeps a host running for many commands.

mod agent;
mod cli;
mod client;
mod cpio;
mod forward;
mod host;
mod inbox;
mod kernel;
mod lists;
mod mode;
mod native;
mod place;
mod plan;
mod prepare;
mod process;
mod qemu;
mod relay;
mod rootfs;
mod session;
mod share;
mod tail;
mod timings;
mod up;
mod usernet;
mod wire;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser as _;

use crate::cli::{Action, Cli, CommandArgs, HostArgs};
use crate::client::Outcome;
use crate::host::Interrupted;
use crate::inbox::Inbox;
use crate::place::Place;
use crate::rootfs::Cache;
use crate::timings::Timings;
use crate::up::Up;

/// How long `run` may take unless told otherwise: a forgotten host costs two CPUs.
const RUN_LIMIT: Duration = Duration::from_secs(600);

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no failures; a closed pipe is nobody's concern here.
            let _ = error.print();
            return if error.use_stderr() {
                client::FAILED.into()
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match act(cli.action) {
        Ok(code) => code,
        Err(error) => match error.downcast_ref::<Interrupted>() {
            Some(Interrupted(signal)) => client::signal_code(*signal as i32).into(),
            None => {
                eprintln!("tern-metal: {error:#}");
                client::FAILED.into()
            }
        },
    }
}

fn act(action: Action) -> Result<ExitCode> {
    match action {
        Action::Build { fresh, kernel } => {
            let rootfs = Cache::of_user(variable)?.get(kernel.kernel, fresh)?;
            println!("{}", rootfs.directory().display());
            Ok(ExitCode::SUCCESS)
        }
        Action::Run {
            host,
            command,
            timings,
        } => run(&host, &command, timings),
        Action::Init { plan } => agent::init(&plan).map(|()| ExitCode::SUCCESS),
        Action::Agent { plan } => agent::serve(&plan).map(|()| ExitCode::SUCCESS),
        Action::Up {
            host,
            name,
            idle,
            foreground,
            detached,
            timings,
        } => {
            let up = Up {
                host: &host,
                name: &name.name,
                idle,
                timings,
                detached,
            };
            if foreground || detached {
                up::stay(&up)
            } else {
                up::start(&up)
            }
        }
        Action::Exec { name, command } => up::exec(&name.name, &command),
        Action::Down { name } => up::down(&name.name),
        Action::Status { name, json } => up::status(&name.name, json),
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn run(args: &HostArgs, command: &CommandArgs, show_timings: bool) -> Result<ExitCode> {
    let place = Place::discover()?;
    let wanted = prepare::wanted(args, &place, None)?;
    let results = prepare::results(args, &place)?;
    let wire = prepare::command(command, &place, &wanted.shares, &results)?;
    let (_, rootfs) = prepare::mode_and_rootfs(&place, args.kernel.kernel)?;
    let mut timings = Timings::start();
    let inbox = Inbox::open()?;
    let limit = Instant::now() + command.timeout.unwrap_or(RUN_LIMIT);
    let mut host = prepare::start(rootfs.as_ref(), &wanted, &inbox, &mut timings)?;
    for forward in host
        .forwards
        .iter()
        .filter(|forward| !wanted.forwards.contains(forward))
    {
        eprintln!("tern-metal: forwarding {forward}");
    }
    let outcome = client::run(&host.agent, wire, Some(limit), &inbox, &mut timings)?;
    let words = matches!(outcome, Outcome::Lost(_)).then(|| host.post_mortem());
    drop(host);
    timings.mark("host ended");
    prepare::explain(&outcome, words.as_deref());
    if show_timings {
        eprint!("{}", timings.table());
    }
    Ok((&outcome).into())
}
