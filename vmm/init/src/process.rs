//! Running a program as OCI says: found in the guest's `PATH`, as a user, in a directory, with an
//! environment, in a session of its own.

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use tern_guest::config::{Resource, Rlimit, merge_env};

use crate::children::{Children, Exit, Process};
use crate::users::Account;

/// What to run, as whom and where.
pub struct Program {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// Its environment, without the defaults.
    pub env: Vec<(String, String)>,
    /// Its directory.
    pub working_dir: String,
    /// Its user.
    pub account: Account,
    /// Its limits.
    pub rlimits: Vec<Rlimit>,
}

/// What its standard descriptors are.
pub struct Descriptors {
    /// Standard input.
    pub stdin: Stdio,
    /// Standard output.
    pub stdout: Stdio,
    /// Standard error.
    pub stderr: Stdio,
    /// Whether standard input is a terminal that the program's session shall have.
    pub controlling_terminal: bool,
}

impl Descriptors {
    /// All three on one terminal.
    pub fn terminal(terminal: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            stdin: terminal.try_clone()?.into(),
            stdout: terminal.try_clone()?.into(),
            stderr: terminal.into(),
            controlling_terminal: true,
        })
    }
}

/// Why a program did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// There is nothing to run.
    #[error("nothing to run: neither the image nor the Machine names a command")]
    Empty,
    /// It is nowhere in `PATH`, or the path leads nowhere.
    #[error("{program}: not found{hint}")]
    NotFound {
        /// What was looked for.
        program: String,
        /// Where.
        hint: String,
    },
    /// It is there, but cannot be run.
    #[error("{0}: is not an executable file")]
    NotExecutable(String),
    /// The kernel did not run it.
    #[error("{program}: {source}{hint}")]
    Exec {
        /// What was run.
        program: String,
        /// What usually causes this.
        hint: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl StartError {
    /// The code that a shell would return.
    pub fn code(&self) -> i32 {
        match self {
            Self::NotFound { .. } => 127,
            Self::Exec { source, .. } if source.kind() == io::ErrorKind::NotFound => 127,
            _ => 126,
        }
    }
}

impl Program {
    /// Starts the program.
    pub fn start(
        &self,
        children: &Children,
        descriptors: Descriptors,
    ) -> Result<(Arc<Process>, Exit), StartError> {
        let argv0 = self.argv.first().ok_or(StartError::Empty)?;
        let env = self.full_env();
        let working_dir = Path::new(if self.working_dir.is_empty() {
            "/"
        } else {
            &self.working_dir
        });
        let program = find(argv0, search_path(&env), working_dir)?;
        let mut command = Command::new(&program);
        command
            .arg0(argv0)
            .args(&self.argv[1..])
            .env_clear()
            .envs(env.iter().map(|(name, value)| (name, value)))
            .stdin(descriptors.stdin)
            .stdout(descriptors.stdout)
            .stderr(descriptors.stderr);
        let child = ChildSetup {
            working_dir: CString::new(working_dir.as_os_str().as_bytes())
                .map_err(|_| not_found(argv0))?,
            uid: self.account.uid,
            gid: self.account.gid,
            groups: self.account.groups.clone(),
            rlimits: self.rlimits.clone(),
            controlling_terminal: descriptors.controlling_terminal,
        };
        // SAFETY: between fork and exec `apply` only makes system calls with memory that was
        // allocated before.
        unsafe { command.pre_exec(move || child.apply()) };
        children.spawn(&mut command).map_err(|source| {
            let program = program.display().to_string();
            StartError::Exec {
                program,
                hint: exec_hint(&source),
                source,
            }
        })
    }

    /// The environment, with `PATH` and `HOME` where it has none.
    fn full_env(&self) -> Vec<(String, String)> {
        let pair = |name: &str, value: &str| (name.to_string(), value.to_string());
        merge_env(
            &[pair("PATH", DEFAULT_PATH), pair("HOME", &self.account.home)],
            &self.env,
        )
    }
}

/// What has to happen in the child, between fork and exec.
struct ChildSetup {
    working_dir: CString,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    rlimits: Vec<Rlimit>,
    controlling_terminal: bool,
}

impl ChildSetup {
    /// Makes nothing but system calls: other threads of the parent may have held any lock when it
    /// forked.
    fn apply(&self) -> io::Result<()> {
        reset_signals();
        // SAFETY: these calls take no pointers, or pointers to memory of `self`.
        unsafe {
            check(libc::setsid())?;
            if self.controlling_terminal {
                check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            }
            for limit in &self.rlimits {
                let value = libc::rlimit {
                    rlim_cur: limit.soft,
                    rlim_max: limit.hard,
                };
                check(libc::setrlimit(resource(limit.resource), &value))?;
            }
            check(libc::setgroups(self.groups.len(), self.groups.as_ptr()))?;
            check(libc::setresgid(self.gid, self.gid, self.gid))?;
            check(libc::setresuid(self.uid, self.uid, self.uid))?;
            check(libc::chdir(self.working_dir.as_ptr()))?;
            libc::umask(0o022);
        }
        Ok(())
    }
}

/// Every signal as the kernel would have it, none blocked: init itself blocks and ignores some.
fn reset_signals() {
    // SAFETY: the set is initialized by `sigemptyset` before use, and setting a signal's default
    // action runs none of our code.
    unsafe {
        for signo in 1..=64 {
            libc::signal(signo, libc::SIG_DFL);
        }
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn resource(resource: Resource) -> libc::__rlimit_resource_t {
    match resource {
        Resource::Nofile => libc::RLIMIT_NOFILE,
        Resource::Nproc => libc::RLIMIT_NPROC,
        Resource::Memlock => libc::RLIMIT_MEMLOCK,
        Resource::Core => libc::RLIMIT_CORE,
        Resource::Stack => libc::RLIMIT_STACK,
    }
}

fn search_path(env: &[(String, String)]) -> &str {
    env.iter()
        .find(|(name, _)| name == "PATH")
        .map_or("", |(_, value)| value)
}

/// Finds a program as `execvp` would, but tells the ways of not finding it apart.
fn find(argv0: &str, search_path: &str, working_dir: &Path) -> Result<PathBuf, StartError> {
    if argv0.is_empty() {
        return Err(StartError::Empty);
    }
    if argv0.contains('/') {
        let path = working_dir.join(argv0);
        return match executable(&path) {
            Some(true) => Ok(path),
            Some(false) => Err(StartError::NotExecutable(argv0.to_string())),
            None => Err(not_found(argv0)),
        };
    }
    let mut unusable = None;
    for directory in search_path.split(':') {
        let path = working_dir.join(directory).join(argv0);
        match executable(&path) {
            Some(true) => return Ok(path),
            Some(false) => unusable = Some(path),
            None => {}
        }
    }
    match unusable {
        Some(path) => Err(StartError::NotExecutable(path.display().to_string())),
        None => {
            let hint = format!(" in PATH={search_path}");
            Err(StartError::NotFound {
                program: argv0.to_string(),
                hint,
            })
        }
    }
}

/// Whether something is an executable file; none if it is not there.
fn executable(path: &Path) -> Option<bool> {
    let found = path.metadata().ok()?;
    Some(found.is_file() && found.permissions().mode() & 0o111 != 0)
}

fn not_found(program: &str) -> StartError {
    StartError::NotFound {
        program: program.to_string(),
        hint: String::new(),
    }
}

/// What usually causes an error for a file that is there and executable.
fn exec_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT) => {
            " (the file is there: its loader or the interpreter in its `#!` line is missing, \
             or the user may not enter the working directory)"
        }
        Some(libc::ENOEXEC) => " (no `#!` line, or built for another architecture)",
        Some(libc::EACCES) => " (the user may not run it, or not enter the working directory)",
        _ => "",
    }
}

/// What OCI runtimes use where the image sets no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn file(path: &Path, mode: u32) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn programs_are_found_as_a_shell_finds_them() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        file(&path("a/plain"), 0o644);
        file(&path("b/plain"), 0o755);
        file(&path("b/tool"), 0o755);
        file(&path("a/text"), 0o644);
        fs::create_dir(path("a/tool")).unwrap();
        let search = format!("{}:{}", path("a").display(), path("b").display());

        assert_eq!(find("tool", &search, root.path()).unwrap(), path("b/tool"));
        assert_eq!(
            find("plain", &search, root.path()).unwrap(),
            path("b/plain")
        );
        assert_eq!(find("b/tool", "", root.path()).unwrap(), path("b/tool"));
        assert_eq!(find("./tool", "", &path("b")).unwrap(), path("b/./tool"));
        assert_eq!(
            find("tool", "", &path("b")).unwrap(),
            path("b/tool"),
            "an empty entry is here"
        );
        assert_eq!(find("text", &search, root.path()).unwrap_err().code(), 126);
        assert_eq!(
            find("a/text", &search, root.path()).unwrap_err().code(),
            126
        );
        let missing = find("nothing", "/bin:/sbin", root.path()).unwrap_err();
        assert_eq!(missing.code(), 127);
        assert_eq!(missing.to_string(), "nothing: not found in PATH=/bin:/sbin");
        assert_eq!(
            find("/no/where", "", root.path()).unwrap_err().to_string(),
            "/no/where: not found"
        );
        assert!(matches!(find("", "", root.path()), Err(StartError::Empty)));
    }

    #[test]
    fn path_and_home_have_defaults_that_the_image_may_replace() {
        let account = Account {
            uid: 1,
            gid: 1,
            groups: vec![],
            home: "/home/app".into(),
        };
        let mut program = Program {
            argv: vec![],
            env: vec![("A".into(), "1".into())],
            working_dir: String::new(),
            account,
            rlimits: vec![],
        };
        let text = |program: &Program| {
            let env = program.full_env();
            env.iter()
                .map(|(n, v)| format!("{n}={v}"))
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(
            text(&program),
            format!("PATH={DEFAULT_PATH} HOME=/home/app A=1")
        );
        program.env = vec![("HOME".into(), "/x".into()), ("PATH".into(), "/bin".into())];
        assert_eq!(text(&program), "PATH=/bin HOME=/x");
    }
}
