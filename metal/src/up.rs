//! `up`, `exec`, `down` and `status`: a host that stays.
//!
//! `up` starts itself again in the background (`up --detached`), passes on what that one says
//! until it is ready, and returns. The one in the background owns the host: when it ends, however
//! it ends, the host ends.

use std::io::{self, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{self, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use nix::unistd::{dup2_stderr, dup2_stdout, setsid};

use crate::cli::{CommandArgs, HostArgs};
use crate::client;
use crate::inbox::{Event, Inbox};
use crate::mode::Mode;
use crate::place::Place;
use crate::plan;
use crate::session::{Session, State, open_log};
use crate::timings::Timings;
use crate::{prepare, variable};

/// Arguments of `up`.
#[derive(Debug)]
pub struct Up<'a> {
    /// What the host is like.
    pub host: &'a HostArgs,
    /// Which host of the checkout.
    pub name: &'a str,
    /// Without a command for so long, it ends.
    pub idle: Duration,
    /// Whether to show where the time went.
    pub timings: bool,
    /// Whether another `up` in the foreground waits for this one.
    pub detached: bool,
}

/// The session of the caller's checkout.
pub fn session(place: &Place, name: &str) -> Result<Session> {
    Session::of(
        &place.checkout,
        name,
        variable("XDG_RUNTIME_DIR").as_deref(),
    )
}

/// Starts the host in the background; returns when it takes commands.
pub fn start(up: &Up<'_>) -> Result<ExitCode> {
    let place = Place::discover()?;
    // Both again in the background; here, so that a refusal is quick and a build is seen.
    drop(session(&place, up.name)?.claim()?);
    prepare::mode_and_rootfs(&place, up.host.kernel.kernel)?;

    let mut arguments = std::env::args_os();
    let mut command = process::Command::new("/proc/self/exe");
    command
        .args(arguments.by_ref().skip(1))
        .arg("--detached")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // SAFETY: between fork and exec this makes one system call and nothing else.
    unsafe {
        command.pre_exec(|| Ok(setsid().map(drop)?));
    }
    let mut child = command.spawn().context("cannot start in the background")?;
    let mut words = child.stderr.take().context("its output is a pipe")?;
    let mut news = child.stdout.take().context("its output is a pipe")?;
    let passing = thread::spawn(move || io::copy(&mut words, &mut io::stderr()));
    let mut said = Vec::new();
    news.read_to_end(&mut said)
        .context("cannot hear the host in the background")?;
    let _ = passing.join();
    if said.is_empty() {
        let status = child.wait()?;
        return Ok(u8::try_from(status.code().unwrap_or(125))
            .unwrap_or(client::FAILED)
            .into());
    }
    io::stdout().write_all(&said)?;
    Ok(ExitCode::SUCCESS)
}

/// Is the host, until it ends or is told to.
pub fn stay(up: &Up<'_>) -> Result<ExitCode> {
    let place = Place::discover()?;
    let session = session(&place, up.name)?;
    let claim = session.claim()?;
    let wanted = prepare::wanted(up.host, &place, Some(up.idle))?;
    let (mode, rootfs) = prepare::mode_and_rootfs(&place, up.host.kernel.kernel)?;
    let mut timings = Timings::start();
    let inbox = Inbox::open()?;
    let mut host = prepare::start(rootfs.as_ref(), &wanted, &inbox, &mut timings)?;
    let state = State {
        pid: i32::try_from(process::id()).context("a process id out of range")?,
        agent: host.agent.clone(),
        mode,
        shares: wanted.shares.clone(),
        results: prepare::results(up.host, &place)?,
        forwards: host.forwards.clone(),
        memory_mib: wanted.size.memory_mib,
        cpus: wanted.size.cpus,
    };
    claim.publish(&state)?;
    if up.timings {
        eprint!("{}", timings.table());
    }
    // Fails when the `up` in the foreground was interrupted: then nobody wants the host.
    print!("{}", describe(&state));
    io::stdout()
        .flush()
        .context("nobody waits for this host any more")?;
    if up.detached {
        detach(&session)?;
    }
    let mut reason = "unexpectedly".to_owned();
    let ended = loop {
        match inbox.next(None) {
            Some(Event::Signal(Signal::SIGTERM | Signal::SIGINT | Signal::SIGHUP)) => break None,
            Some(Event::Host(plan::Event::Idle)) => reason = "no command for a while".to_owned(),
            Some(Event::Host(plan::Event::Failed { message })) => reason = message,
            Some(Event::HostEnded) | None => break Some(host.post_mortem()),
            Some(_) => {}
        }
    };
    drop(host);
    if let Some(words) = ended {
        eprintln!("tern-metal: the host ended: {reason}\n{words}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Lets go of the streams of the `up` in the foreground, which returns when they are closed.
fn detach(session: &Session) -> Result<()> {
    let log = open_log(&session.log())?;
    dup2_stdout(&log).context("cannot let go of standard output")?;
    dup2_stderr(&log).context("cannot let go of standard error")
}

/// Runs a command on the host that is up.
pub fn exec(name: &str, args: &CommandArgs) -> Result<ExitCode> {
    let place = Place::discover()?;
    let state = session(&place, name)?.require()?;
    let command = prepare::command(args, &place, &state.shares, &state.results)?;
    let inbox = Inbox::open()?;
    let limit = args.timeout.map(|limit| Instant::now() + limit);
    let outcome = client::run(&state.agent, command, limit, &inbox, &mut Timings::start())?;
    prepare::explain(&outcome, None);
    Ok((&outcome).into())
}

/// Ends the host that is up.
pub fn down(name: &str) -> Result<ExitCode> {
    if !session(&Place::discover()?, name)?.down()? {
        eprintln!("tern-metal: no host is up");
    }
    Ok(ExitCode::SUCCESS)
}

/// Says whether a host is up: exit code 0, else 1.
pub fn status(name: &str, json: bool) -> Result<ExitCode> {
    match session(&Place::discover()?, name)?.find()? {
        Some(state) if json => println!("{}", serde_json::to_string_pretty(&state)?),
        Some(state) => print!("{}", describe(&state)),
        None => {
            println!("{}", if json { "null" } else { "no host is up" });
            return Ok(ExitCode::FAILURE);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(state: &State) -> String {
    let State {
        pid,
        mode,
        memory_mib,
        cpus,
        results,
        shares,
        forwards,
        ..
    } = state;
    let mut text = format!("up ({mode}, {cpus} CPUs, {memory_mib} MiB), process {pid}\n");
    // A native host sees everything, and nothing is enforced.
    for share in shares.iter().filter(|_| *mode != Mode::Native) {
        let access = if share.read_only {
            "read-only"
        } else {
            "writable"
        };
        let note = if share.inner == *results {
            ", results"
        } else {
            ""
        };
        let (inner, outer) = (share.inner.display(), share.outer.display());
        let from = if share.inner == share.outer {
            String::new()
        } else {
            format!(" = {outer}")
        };
        text.push_str(&format!("  share    {inner}{from} ({access}{note})\n"));
    }
    for forward in forwards {
        text.push_str(&format!("  forward  {forward}\n"));
    }
    text
}
