//! The agent's server: listens where the plan says, and runs one command per connection.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::gettid;

use super::Reporter;
use super::child;
use super::group::Groups;
use crate::plan::{Card, Event, Kind, Plan};
use crate::wire::{Failure, Frame};

/// How long a caller may take to say what it wants. Long, because the outer machine may be loaded;
/// bounded, so that strangers who only connect do not pile up.
const REQUEST_PATIENCE: Duration = Duration::from_secs(120);

/// Serves until the plan's idle time has passed without a command; without one, for ever.
pub fn serve(plan_file: &Path) -> Result<()> {
    let text = fs::read(plan_file)
        .with_context(|| format!("cannot read the plan {}", plan_file.display()))?;
    let plan: Plan = serde_json::from_slice(&text).context("the plan is not understood")?;
    let mut reporter = Reporter::open(&plan)?;
    let listener = match listen(&plan.kind) {
        Ok(listener) => listener,
        Err(error) => {
            reporter.report(&Event::Failed {
                message: format!("{error:#}"),
            })?;
            return Err(error);
        }
    };
    let groups = Arc::new(Groups::new(plan.groups.clone())?);
    reporter.report(&Event::Ready {
        port: listener.local_addr()?.port(),
    })?;

    let activity = Arc::new(Activity::new());
    let token: Arc<str> = plan.token.into();
    let counted = activity.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            match stream {
                Ok(stream) => {
                    let (token, counted) = (token.clone(), counted.clone());
                    let groups = groups.clone();
                    thread::spawn(move || converse(stream, &token, &groups, &counted));
                }
                // Out of descriptors or memory for a moment: the next connection may do better.
                Err(error) => eprintln!("tern-metal agent: cannot accept: {error}"),
            }
        }
    });
    match plan.idle_seconds {
        Some(limit) => {
            activity.wait_idle(Duration::from_secs(limit));
            reporter.report(&Event::Idle)
        }
        None => loop {
            thread::park();
        },
    }
}

fn listen(kind: &Kind) -> Result<TcpListener> {
    match kind {
        Kind::Virtual {
            control,
            control_port,
            ..
        } => listen_apart(control, *control_port),
        Kind::Native { .. } => TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen"),
    }
}

/// Moves the control card into a network namespace that only the listening socket keeps alive, and
/// listens there. Sockets stay in the namespace they were made in, so the rest of the agent, and
/// the commands, never see it.
fn listen_apart(card: &Card, port: u16) -> Result<TcpListener> {
    let (ask, asked) = mpsc::channel();
    let (answer, answered) = mpsc::channel();
    let (name, address) = (card.name.clone(), card.address);
    let inside = thread::spawn(move || -> Result<TcpListener> {
        unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
        ask.send(gettid())?;
        answered.recv().context("the control card was not moved")?;
        ip(&["addr", "add", &format!("{address}/24"), "dev", &name])?;
        ip(&["link", "set", "dev", &name, "up"])?;
        TcpListener::bind((address, port)).context("cannot listen on the control card")
    });
    if let Ok(thread) = asked.recv() {
        ip(&[
            "link",
            "set",
            "dev",
            &card.name,
            "netns",
            &thread.to_string(),
        ])?;
        // A failed send means the thread has ended, with an error that `join` brings.
        let _ = answer.send(());
    }
    inside
        .join()
        .unwrap_or_else(|_| Err(anyhow::anyhow!("setting up the control card panicked")))
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .context("cannot run ip")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "ip {}: {}",
        arguments.join(" "),
        said.trim()
    );
    Ok(())
}

fn converse(stream: TcpStream, token: &str, groups: &Groups, activity: &Activity) {
    if let Err(error) = converse_on(stream, token, groups, activity) {
        // The caller is gone or was never one of ours; there is nobody else to tell.
        eprintln!("tern-metal agent: {error:#}");
    }
}

fn converse_on(
    mut stream: TcpStream,
    token: &str,
    groups: &Groups,
    activity: &Activity,
) -> Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(REQUEST_PATIENCE))?;
    let request = match Frame::read_from(&mut stream).context("cannot read a request")? {
        Some(Frame::Request(request)) => request,
        None => return Ok(()),
        Some(other) => {
            return Err(io::Error::other(format!("expected a request, got {other:?}")).into());
        }
    };
    if !same(request.token.as_bytes(), token.as_bytes()) {
        let message = "this is not the host you started: its token differs".to_owned();
        return Ok(Frame::Failed(Failure { message, code: 125 }).write_to(&mut stream)?);
    }
    stream.set_read_timeout(None)?;
    let _busy = activity.begin();
    let answer = stream.try_clone()?;
    child::run(stream, request.command, groups).inspect_err(|error| {
        let message = format!("the agent failed: {error:#}");
        // The connection may be what failed.
        let _ = Frame::Failed(Failure { message, code: 125 }).write_to(&mut &answer);
    })
}

/// Compares in a time that does not tell how much was right.
fn same(left: &[u8], right: &[u8]) -> bool {
    left.len() == right.len() && left.iter().zip(right).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

/// Counts running commands, to know when the host was last of use.
#[derive(Debug)]
struct Activity {
    state: Mutex<(usize, Instant)>,
    changed: std::sync::Condvar,
}

impl Activity {
    fn new() -> Self {
        Self {
            state: Mutex::new((0, Instant::now())),
            changed: std::sync::Condvar::new(),
        }
    }

    fn begin(&self) -> Busy<'_> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0 += 1;
        Busy(self)
    }

    fn wait_idle(&self, limit: Duration) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let (running, since) = *state;
            let left = limit.saturating_sub(since.elapsed());
            if running == 0 && left.is_zero() {
                return;
            }
            let patience = if running == 0 { left } else { limit };
            state = self
                .changed
                .wait_timeout(state, patience)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// A running command.
#[derive(Debug)]
struct Busy<'a>(&'a Activity);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = (state.0 - 1, Instant::now());
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_match_only_when_equal() {
        assert!(same(b"abc", b"abc"));
        assert!(!same(b"abc", b"abd"));
        assert!(!same(b"abc", b"abcd"));
        assert!(!same(b"", b"a"));
    }

    #[test]
    fn is_not_idle_while_a_command_runs() {
        let activity = Arc::new(Activity::new());
        let busy = activity.begin();
        let (done, idle) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                activity.wait_idle(Duration::from_millis(1));
                done.send(()).unwrap();
            });
            assert!(idle.recv_timeout(Duration::from_millis(50)).is_err());
            drop(busy);
            idle.recv_timeout(Duration::from_secs(10)).unwrap();
        });
    }
}
