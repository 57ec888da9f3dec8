//! Who dies first when the host is out of memory (proc_pid_oom_score_adj(5)).
//!
//! Monitors before whatever else the host's owner runs, those whose processors are shared before those whose are
//! their own, and `tern serve`, whose end would be everybody's, last of all.

use std::fs;
use std::io;

use tern_catalog::Guest;

/// Keeps this process from being killed while there is anybody else.
pub fn protect_this_process() -> io::Result<()> {
    set("self", SERVER)
}

/// Puts a monitor in its place. It has inherited that of who started it.
pub(crate) fn rank(pid: i32, guest: &Guest) -> io::Result<()> {
    set(&pid.to_string(), score(guest))
}

fn score(guest: &Guest) -> i32 {
    match guest.is_dedicated() {
        true => DEDICATED,
        false => SHARED,
    }
}

fn set(process: &str, score: i32) -> io::Result<()> {
    fs::write(format!("/proc/{process}/oom_score_adj"), score.to_string())
}

/// As much as a service manager gives its own.
const SERVER: i32 = -900;
const DEDICATED: i32 = 300;
const SHARED: i32 = 600;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_monitors_die_first_and_the_server_last() {
        let guest = |kind: &str| Guest {
            cpu_kind: kind.to_owned(),
            cpus: 1,
            memory_mb: 256,
        };
        assert!(score(&guest("shared")) > score(&guest("performance")));
        assert!(
            score(&guest("performance")) > 0,
            "whoever else the host has"
        );
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        rank(pid, &guest("shared")).unwrap();
        let now = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
        assert_eq!(now.trim(), "600");
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}
