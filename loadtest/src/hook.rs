//! Shell commands that bring the target into the state to be measured.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::Command;

/// Characters of a failed command's output that are shown.
const SHOWN: usize = 2000;

/// Kills what a command has started, unless told that it has ended.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // It may have ended on its own just now.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

/// Runs `command` in a shell and waits until it has succeeded.
pub async fn run(command: &str, round: u64, timeout: Duration) -> Result<()> {
    let child = Command::new("sh")
        .args(["-c", command])
        .env("TERN_LOADTEST_ROUND", round.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot run `{command}`"))?;
    let pid = child
        .id()
        .and_then(|pid| i32::try_from(pid).ok())
        .map(Pid::from_raw);
    let mut group = Group(pid);
    let output = tokio::time::timeout(timeout, child.wait_with_output())
        .await
        .with_context(|| format!("`{command}` took longer than {timeout:?}"))??;
    group.0 = None;
    if !output.status.success() {
        let text = [output.stdout, output.stderr].concat();
        let text: String = String::from_utf8_lossy(&text).chars().take(SHOWN).collect();
        bail!("`{command}` failed: {}\n{text}", output.status);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn tells_the_round_and_reports_failure_with_its_output() {
        run("test $TERN_LOADTEST_ROUND = 7", 7, LONG).await.unwrap();
        let error = run("echo because; exit 3", 1, LONG)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("because") && error.contains('3'), "{error}");
    }

    #[tokio::test]
    async fn a_command_that_hangs_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        let mkfifo = format!("mkfifo {}", pipe.display());
        run(&mkfifo, 1, LONG).await.unwrap();
        // The child holds the pipe's writing end for as long as it lives.
        let command = format!("sh -c 'exec >{}; sleep 1000' & wait", pipe.display());
        let reader = tokio::task::spawn_blocking(move || std::fs::read(pipe).unwrap());
        let error = run(&command, 1, Duration::from_millis(500))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("took longer"), "{error}");
        assert!(reader.await.unwrap().is_empty());
    }
}
