//! A short way through a filter for the calls that it does not list.
//!
//! seccompiler compares a call's number with one of the table after the other. That is no matter when a call is made: for
//! those that are always allowed the kernel remembers the answer (since Linux 5.11). But to know it, it runs each new
//! filter for every number there is (`seccomp_cache_prepare`), some 450, most of which are in no table and go all the way.
//! With a binary search in front, over the ranges of numbers that are in the table, a thread is confined in a fifth of
//! the time; and a monitor has eight threads or more, before each of which a guest that wakes has to wait.

use seccompiler::{BpfProgram, sock_filter};

/// `program`, which ends the process at every number but `listed` (sorted, none twice), found out sooner.
///
/// `None` if there are so many ranges that a jump would be too long.
pub fn prepend(listed: &[i64], program: BpfProgram) -> Option<BpfProgram> {
    let search = search(&ranges(listed)?)?;
    let mut whole = vec![
        statement(LOAD, ARCH_OFFSET),
        jump(EQUAL, AUDIT_ARCH_X86_64, 1, 0),
        statement(RETURN, libc::SECCOMP_RET_KILL_PROCESS),
        statement(LOAD, NUMBER_OFFSET),
    ];
    whole.extend(search);
    let end = whole.len();
    for (at, instruction) in whole.iter_mut().enumerate() {
        if instruction.code == GO {
            instruction.k = u32::try_from(end - at - 1).ok()?;
        }
    }
    whole.extend(program);
    Some(whole)
}

/// Where numbers begin that are listed, or are not: each range ends where the next one begins, and the last never does.
fn ranges(listed: &[i64]) -> Option<Vec<(u32, bool)>> {
    let mut ranges = vec![(0, false)];
    for number in listed {
        let number = u32::try_from(*number).ok()?;
        if ranges.last()?.0 == number {
            ranges.pop(); // the end of what is listed, or zero
        }
        if !ranges.last().is_some_and(|(_, is_listed)| *is_listed) {
            ranges.push((number, true));
        }
        ranges.push((number + 1, false));
    }
    Some(ranges)
}

/// A tree over `ranges`. What is listed goes on behind its end, by jumps that are not long enough yet.
fn search(ranges: &[(u32, bool)]) -> Option<BpfProgram> {
    if let [(_, is_listed)] = ranges {
        return Some(vec![if *is_listed {
            statement(GO, 0)
        } else {
            statement(RETURN, libc::SECCOMP_RET_KILL_PROCESS)
        }]);
    }
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let (first, _) = high.first()?;
    let (low, high) = (search(low)?, search(high)?);
    let mut tree = vec![jump(AT_LEAST, *first, u8::try_from(low.len()).ok()?, 0)];
    tree.extend(low);
    tree.extend(high);
    Some(tree)
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

fn statement(code: u16, k: u32) -> sock_filter {
    jump(code, k, 0, 0)
}

/// `linux/bpf_common.h`: `BPF_LD | BPF_W | BPF_ABS` and so on.
const LOAD: u16 = 0x20;
const GO: u16 = 0x05;
const EQUAL: u16 = 0x15;
const AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;
/// `struct seccomp_data`, `linux/seccomp.h`.
const NUMBER_OFFSET: u32 = 0;
const ARCH_OFFSET: u32 = 4;
/// `linux/audit.h`.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use seccompiler::{SeccompAction, SeccompFilter, TargetArch};
    use std::collections::BTreeSet;

    fn plain(listed: &[i64]) -> BpfProgram {
        SeccompFilter::new(
            listed.iter().map(|number| (*number, Vec::new())).collect(),
            SeccompAction::KillProcess,
            SeccompAction::Allow,
            TargetArch::x86_64,
        )
        .and_then(TryInto::try_into)
        .unwrap()
    }

    /// What `program` says to a call, and after how many instructions.
    fn run(program: &[sock_filter], number: u32, arch: u32) -> (u32, usize) {
        let (mut at, mut value, mut steps) = (0, 0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            let branch = |yes: bool| usize::from(if yes { jt } else { jf });
            steps += 1;
            at += 1;
            match code {
                LOAD if k == NUMBER_OFFSET => value = number,
                LOAD if k == ARCH_OFFSET => value = arch,
                GO => at += k as usize,
                EQUAL => at += branch(value == k),
                AT_LEAST => at += branch(value >= k),
                RETURN => return (k, steps),
                _ => panic!("{code:#x} {k}"),
            }
        }
    }

    proptest! {
        #[test]
        fn every_call_is_answered_as_before(listed: BTreeSet<u8>, more in 0..1000_u32) {
            let listed: Vec<_> = listed.into_iter().map(i64::from).collect();
            let plain = plain(&listed);
            let whole = prepend(&listed, plain.clone());
            prop_assume!(whole.is_some());
            let whole = whole.unwrap();
            const X32: u32 = 1 << 30;
            for number in (0..260).chain([more, X32, X32 + 1, u32::MAX - more]) {
                for arch in [AUDIT_ARCH_X86_64, 0x4000_0003] {
                    let (answer, steps) = run(&whole, number, arch);
                    prop_assert_eq!(answer, run(&plain, number, arch).0, "{} {:#x}", number, arch);
                    let is_listed = listed.contains(&i64::from(number));
                    prop_assert!(is_listed || steps < 4 + 12, "{} steps", steps);
                }
            }
        }
    }

    #[test]
    fn a_table_as_large_as_any_here_fits() {
        let listed: Vec<_> = (0..60).map(|number| number * 5).collect();
        assert!(prepend(&listed, plain(&listed)).is_some());
        let no_number = [-1];
        assert!(prepend(&no_number, plain(&[])).is_none());
    }
}
