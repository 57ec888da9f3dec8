//! The end of a Machine: everybody is told, everything is written, the machine is reset.

use std::convert::Infallible;
use std::time::Duration;

use nix::sys::reboot::{RebootMode, reboot};
use tern_guest::ExitStatus;

use crate::guest::Guest;
use crate::kmsg;
use crate::root::Disks;

/// Ends the Machine, whose app has ended like this.
pub fn finish(guest: &Guest, status: ExitStatus, disks: &Disks) -> ! {
    // What a host started now would hold a disk open behind the last signal.
    guest.children.close();
    guest.journal.exited(status);
    // The rest has a moment to end, while the host reads of the app's end.
    signal_all(libc::SIGTERM);
    let delivered = guest.journal.wait_delivered(DELIVERY);
    if !delivered {
        kmsg::info("no host has asked how the app ended");
    }
    if !guest.children.wait_none(GRACE) {
        signal_all(libc::SIGKILL);
        guest.children.wait_none(GRACE);
    }
    disks.close(kmsg::error);
    let Err(error): Result<Infallible, _> = reboot(RebootMode::RB_AUTOBOOT);
    kmsg::error(&format!("cannot reset the machine: {error}"));
    // A kernel without its first process panics, and `panic=-1` resets the machine.
    std::process::exit(1)
}

/// Signals every process but this one.
fn signal_all(signo: i32) {
    // SAFETY: `kill` takes no pointers. That there may be nobody left is fine.
    unsafe { libc::kill(-1, signo) };
}

/// How long the news of the app's end is kept for a host. A host that is there takes milliseconds;
/// one whose agent is being restarted may just come back.
const DELIVERY: Duration = Duration::from_secs(10);

/// How long the rest of the processes may take to end.
const GRACE: Duration = Duration::from_secs(1);
