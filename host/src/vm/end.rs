//! How a monitor or an app has ended, in words for people.

use tern_guest::message::ExitStatus;

use super::Vm;
use crate::dir::MachineDir;
use crate::last_words::last_words;
use crate::machine::core::End;
use crate::running::Running;

impl Vm {
    /// How a monitor has ended.
    pub(super) fn end(&self, running: &Running, signal: Option<i32>) -> End {
        match self.dir.exit() {
            // A monitor that its guest took over writes what it likes.
            Ok(Some(exit)) => end_of(&exit.reason, &last_words(exit.message.lines()), None),
            _ => {
                let pid = running.monitor.pid();
                let tail = MachineDir::tail(&self.dir.vmm_log());
                let mut end = end_of("", &tail, signal);
                end.reason = format!("{} (process {pid})", end.reason);
                if self.host.groups.out_of_memory(self.id.as_str()) {
                    end.reason
                        .push_str(", out of the memory that the host allows this Machine");
                }
                end
            }
        }
    }

    pub(super) fn why_app_ended(&self, exit: &ExitStatus) -> String {
        let lines = self.logs.last_words();
        let how = match exit.signal {
            Some(signal) => tern_guest::signal::signal_name(signal),
            None => format!("code {}", exit.code),
        };
        format!("the app ended with {how} before it was up; its last words: {lines}")
    }
}

/// What a monitor's `exit.json`, or its lack, means.
pub(super) fn end_of(reason: &str, message: &str, signal: Option<i32>) -> End {
    let by_guest = matches!(reason, "guest_shutdown" | "guest_reset");
    let what = match (reason, signal) {
        ("guest_shutdown" | "guest_reset", _) => "the guest ended".to_owned(),
        ("stopped", _) => "the monitor was stopped".to_owned(),
        ("snapshot_refused", _) => "the snapshot was refused".to_owned(),
        ("", Some(libc::SIGSYS)) => {
            "the monitor was killed by SIGSYS: it made a system call that its filter does not allow"
                .to_owned()
        }
        ("", Some(signal)) => format!(
            "the monitor was killed by {}",
            tern_guest::signal::signal_name(signal)
        ),
        ("", None) => "the monitor died without a word".to_owned(),
        _ => "the monitor failed".to_owned(),
    };
    let reason = if message.is_empty() {
        what
    } else {
        format!("{what}: {message}")
    };
    End { by_guest, reason }
}
