//! The state that all threads of init share, and what can be done with the app.

use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::sys::resource::Resource::RLIMIT_NOFILE;
use nix::sys::resource::{getrlimit, setrlimit};
use tern_guest::config::{Resource, Rlimit};
use tern_guest::message::Stream;
use tern_guest::signal::{SIGKILL, is_signal};
use tern_guest::{ExecRequest, RunConfig};

use crate::children::{Children, Process};
use crate::journal::Journal;
use crate::kmsg;
use crate::process::Program;
use crate::users::{self, UserError};

/// One guest.
#[derive(Default)]
pub struct Guest {
    /// What has happened.
    pub journal: Journal,
    /// Everything that runs.
    pub children: Children,
    config: OnceLock<RunConfig>,
    app: OnceLock<Arc<Process>>,
}

impl Guest {
    /// Says something in the app's log, and in the kernel's.
    pub fn say(&self, message: &str) {
        kmsg::info(message);
        self.journal.line(Stream::Init, message.to_string());
    }

    /// Notes that the guest is set up as this says, so that programs can be started.
    pub fn set_ready(&self, config: RunConfig) -> &RunConfig {
        self.config.get_or_init(|| config)
    }

    /// Notes that the app runs.
    pub fn set_app(&self, app: Arc<Process>) {
        self.journal.started(app.pid());
        // There is one app in a guest's life.
        let _ = self.app.set(app);
    }

    /// The app as the configuration describes it.
    pub fn app_program(&self) -> Result<Program, ProgramError> {
        self.program(&ExecRequest {
            cmd: self.config()?.process.argv(),
            ..Default::default()
        })
    }

    /// A program that runs beside the app.
    pub fn program(&self, request: &ExecRequest) -> Result<Program, ProgramError> {
        let config = self.config()?;
        let user = request.user.as_ref().unwrap_or(&config.process.user);
        let working_dir = request
            .working_dir
            .as_ref()
            .unwrap_or(&config.process.working_dir);
        let mut env = config.process.env.clone();
        env.extend(request.env.iter().cloned());
        let has_nul = |text: &String| text.contains('\0');
        if request.cmd.iter().any(has_nul)
            || env
                .iter()
                .any(|(n, v)| n.is_empty() || n.contains(['=', '\0']) || has_nul(v))
        {
            return Err(ProgramError::Malformed);
        }
        Ok(Program {
            argv: request.cmd.clone(),
            env,
            working_dir: working_dir.clone(),
            account: users::lookup(Path::new("/"), user)?,
            rlimits: rlimits(&config.rlimits),
        })
    }

    /// Sends the app a signal.
    pub fn signal(&self, signo: i32) -> Result<(), ProgramError> {
        if !is_signal(signo) {
            return Err(ProgramError::NoSignal(signo));
        }
        let app = self.app.get().ok_or(ProgramError::NotRunning)?;
        app.signal(signo).map_err(|_| ProgramError::NotRunning)
    }

    /// Asks the app to end, and makes it end when the time is over.
    pub fn stop(&self, signo: Option<i32>, timeout: Option<Duration>) -> Result<(), ProgramError> {
        let stop = self.config()?.stop;
        let app = Arc::clone(self.app.get().ok_or(ProgramError::NotRunning)?);
        self.signal(signo.unwrap_or(stop.signal))?;
        let timeout = timeout
            .unwrap_or(Duration::from_millis(stop.timeout_ms))
            .min(MAX_STOP);
        let insist = move || {
            if !app.wait(timeout) {
                // It may have ended just now.
                let _ = app.signal(SIGKILL);
            }
        };
        let thread = std::thread::Builder::new().name("stop".into());
        thread
            .spawn(insist)
            .map(drop)
            .map_err(ProgramError::NoTimer)
    }

    fn config(&self) -> Result<&RunConfig, ProgramError> {
        self.config.get().ok_or(ProgramError::NotReady)
    }
}

/// Why nothing can be done with a program.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The guest is still being set up.
    #[error("the guest is not set up yet")]
    NotReady,
    /// There is no app, or it has ended.
    #[error("the app does not run")]
    NotRunning,
    /// No such signal.
    #[error("there is no signal {0}")]
    NoSignal(i32),
    /// Something no program can be given.
    #[error("a command's words and variables have no NUL, and a variable's name no `=`")]
    Malformed,
    /// The app was asked to stop, but nobody will insist.
    #[error("cannot wait for the app to stop: {0}")]
    NoTimer(#[source] io::Error),
    /// No such user.
    #[error(transparent)]
    User(#[from] UserError),
}

/// Lets this process, and all that it starts, have as many files as the kernel allows.
pub fn raise_own_limits() -> nix::Result<()> {
    setrlimit(RLIMIT_NOFILE, NOFILE_HARD, NOFILE_HARD)
}

/// Init's own choice, then the configuration's.
fn rlimits(configured: &[Rlimit]) -> Vec<Rlimit> {
    let hard = getrlimit(RLIMIT_NOFILE).map_or(NOFILE, |(_, hard)| hard);
    let mut limits = vec![Rlimit {
        resource: Resource::Nofile,
        soft: NOFILE.min(hard),
        hard,
    }];
    limits.extend_from_slice(configured);
    limits
}

/// As on Fly.io: the kernel's own 1024 is too few for a server.
const NOFILE: u64 = 10_240;

/// What the kernel allows at most (`fs.nr_open`): a program that knows it needs more may take it.
const NOFILE_HARD: u64 = 1_048_576;

/// Longer than any app may take to stop.
const MAX_STOP: Duration = Duration::from_secs(24 * 3600);

#[cfg(test)]
mod tests {
    use super::*;

    fn ready() -> Guest {
        let mut config = RunConfig::default();
        config.process.env = vec![("A".into(), "1".into())];
        config.process.cmd = vec!["serve".into()];
        config.process.working_dir = "/srv".into();
        config.process.user = "1234:5678".into();
        let guest = Guest::default();
        guest.set_ready(config);
        guest
    }

    #[test]
    fn a_command_beside_the_app_inherits_what_it_does_not_say() {
        let guest = ready();
        let program = guest.program(&ExecRequest {
            cmd: vec!["ls".into()],
            env: vec![("B".into(), "2".into())],
            ..Default::default()
        });
        let program = program.unwrap();
        assert_eq!((program.account.uid, program.account.gid), (1234, 5678));
        assert_eq!(program.working_dir, "/srv");
        assert_eq!(program.env.len(), 2);
        assert_eq!(guest.app_program().unwrap().argv, ["serve"]);

        let other = ExecRequest {
            user: Some("0".into()),
            working_dir: Some("/tmp".into()),
            ..Default::default()
        };
        let program = guest.program(&other).unwrap();
        assert_eq!(
            (program.account.uid, program.working_dir.as_str()),
            (0, "/tmp")
        );
    }

    #[test]
    fn what_no_program_can_be_given_is_refused() {
        let guest = ready();
        let request = |cmd: &str, name: &str| ExecRequest {
            cmd: vec![cmd.into()],
            env: vec![(name.into(), String::new())],
            ..Default::default()
        };
        for request in [request("a\0", "A"), request("a", ""), request("a", "A=B")] {
            assert!(matches!(
                guest.program(&request),
                Err(ProgramError::Malformed)
            ));
        }
    }

    #[test]
    fn nothing_runs_before_the_guest_is_ready() {
        let guest = Guest::default();
        assert!(matches!(guest.app_program(), Err(ProgramError::NotReady)));
        assert!(matches!(guest.signal(15), Err(ProgramError::NotRunning)));
        assert!(matches!(guest.signal(0), Err(ProgramError::NoSignal(0))));
        assert!(matches!(
            guest.stop(None, None),
            Err(ProgramError::NotReady)
        ));
    }
}
