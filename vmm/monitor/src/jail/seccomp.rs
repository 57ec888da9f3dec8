//! Turns the tables of [`filters`] into seccomp programs, and threads under them.

use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use super::filters::{self, Call, When};
use super::shortcut;
use crate::virtio::Kind;

/// The kinds of threads; each has its own filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// Owns the Machine: pause, snapshot, end.
    Main,
    /// The control API.
    Control,
    /// Runs the guest.
    Vcpu,
    /// Maps the pages of the last wake.
    Prefetch,
    /// Serves one device.
    Device(Kind),
    /// Serves a network card whose frames the kernel moves.
    VhostNet,
}

impl ThreadKind {
    /// Every kind.
    pub const ALL: [Self; 10] = [
        Self::Main,
        Self::Control,
        Self::Vcpu,
        Self::Prefetch,
        Self::Device(Kind::Net),
        Self::Device(Kind::Block),
        Self::Device(Kind::Rng),
        Self::Device(Kind::Vsock),
        Self::Device(Kind::Balloon),
        Self::VhostNet,
    ];

    /// As threads are named.
    pub fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Control => "control",
            Self::Vcpu => "vcpu",
            Self::Prefetch => "prefetch",
            Self::Device(kind) => kind.name(),
            Self::VhostNet => "vhost-net",
        }
    }
}

/// Why there are no filters.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// A table makes no sense to the compiler: a bug, which the unit tests find.
    #[error("cannot compile the filter of {0} threads: {1}")]
    Compile(&'static str, seccompiler::BackendError),
    /// It lists more calls than can be searched: a bug too, and found in the same way.
    #[error("the filter of {0} threads lists too many calls")]
    Shortcut(&'static str),
}

static PROGRAMS: OnceLock<Vec<(ThreadKind, BpfProgram)>> = OnceLock::new();

/// Compiles every filter. From then on [`confine`] is in earnest.
pub fn prepare() -> Result<(), FilterError> {
    one_arena();
    // As the process calls itself: in a PID namespace the kernel compares with that number.
    let pid = std::process::id();
    let programs = ThreadKind::ALL
        .into_iter()
        .map(|kind| Ok((kind, compile(kind, pid)?)))
        .collect::<Result<_, FilterError>>()?;
    let _ = PROGRAMS.set(programs); // the same as there are
    Ok(())
}

/// Has all threads allocate from one heap.
///
/// The ninth thread would otherwise have glibc read the number of processors from `/sys`, which no filter
/// allows; and a heap for each of a dozen threads is memory that every Machine would pay for. No thread
/// allocates where it moves the guest's data.
fn one_arena() {
    // SAFETY: takes numbers only, and takes malloc's own lock.
    let set = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    debug_assert_eq!(set, 1, "glibc knows M_ARENA_MAX");
}

/// Puts the calling thread under its filter, for good. Nothing happens before [`prepare`].
///
/// # Panics
///
/// If the kernel refuses: a thread that is not confined must not run.
pub fn confine(kind: ThreadKind) {
    let Some(programs) = PROGRAMS.get() else {
        return;
    };
    let program = programs.iter().find(|(of, _)| *of == kind);
    let applied = program
        .ok_or_else(|| io::Error::other("no such filter"))
        .and_then(|(_, program)| seccompiler::apply_filter(program).map_err(io::Error::other));
    if let Err(error) = applied {
        panic!("cannot confine a {} thread: {error}", kind.name());
    }
}

fn compile(kind: ThreadKind, pid: u32) -> Result<BpfProgram, FilterError> {
    let failed = |error| FilterError::Compile(kind.name(), error);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for Call { number, when, .. } in filters::calls(kind) {
        let known = rules.get(number).is_some_and(Vec::is_empty);
        let more = rules_of(*when, pid).map_err(failed)?;
        if more.is_empty() {
            rules.insert(*number, more); // whatever its arguments are, which no condition narrows
        } else if !known {
            rules.entry(*number).or_default().extend(more);
        }
    }
    let listed: Vec<_> = rules.keys().copied().collect();
    let program: BpfProgram = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )
    .and_then(TryInto::try_into)
    .map_err(failed)?;
    shortcut::prepend(&listed, program).ok_or(FilterError::Shortcut(kind.name()))
}

/// One of these must hold; none means always.
fn rules_of(when: When, pid: u32) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let rule = |argument, op, value: u64| {
        SeccompRule::new(vec![SeccompCondition::new(
            argument,
            Len::Dword,
            op,
            value,
        )?])
    };
    match when {
        When::Always => Ok(Vec::new()),
        When::OneOf { argument, values } => values
            .iter()
            .map(|value| rule(argument, Op::Eq, u64::from(*value)))
            .collect(),
        When::Without { argument, bits } => Ok(vec![rule(argument, Op::MaskedEq(bits.into()), 0)?]),
        When::OwnProcess { argument } => Ok(vec![rule(argument, Op::Eq, pid.into())?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_filter_compiles_and_is_short() {
        for kind in ThreadKind::ALL {
            let program = compile(kind, 1).unwrap();
            // The kernel takes 4096 instructions.
            assert!(program.len() < 1500, "{}: {}", kind.name(), program.len());
        }
    }

    #[test]
    fn every_call_says_why() {
        for kind in ThreadKind::ALL {
            for call in filters::calls(kind) {
                assert!(!call.why.is_empty(), "{}: {}", kind.name(), call.number);
            }
        }
    }

    #[test]
    fn what_no_monitor_needs_is_in_no_filter() {
        for kind in ThreadKind::ALL {
            for call in filters::calls(kind) {
                for never in [
                    libc::SYS_execve,
                    libc::SYS_execveat,
                    libc::SYS_fork,
                    libc::SYS_clone,
                    libc::SYS_clone3,
                    libc::SYS_ptrace,
                    libc::SYS_bpf,
                    libc::SYS_mount,
                    libc::SYS_setuid,
                    libc::SYS_kill,
                    libc::SYS_bind,
                    libc::SYS_io_uring_setup,
                ] {
                    assert_ne!(call.number, never, "{}", kind.name());
                }
            }
        }
    }
}
