//! The system calls that change something outside of the process that makes them.

use std::fs;

use nix::sys::ptrace;
use nix::unistd::Pid;

/// A call at its entry.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Its number.
    pub number: i64,
    /// Its arguments.
    pub arguments: [u64; 6],
}

/// The name of a call that changes something outside of the process: files, devices, sockets, other
/// processes. `None` of one that does not.
///
/// Writes count where they go to a file; what is said on pipes, sockets and standard output is heard by
/// somebody who is another test's subject. Requests to the kernel's network and to a monitor count.
pub fn changes(thread: Pid, call: &Call) -> Option<&'static str> {
    let [first, second, third, ..] = call.arguments;
    let when = |so: bool, name| so.then_some(name);
    match call.number {
        libc::SYS_open => when(second & CREATE != 0, "open to create"),
        libc::SYS_openat => when(third & CREATE != 0, "openat to create"),
        libc::SYS_creat => Some("creat"),
        libc::SYS_write => when(is_file(thread, first), "write"),
        libc::SYS_pwrite64 => when(is_file(thread, first), "pwrite64"),
        libc::SYS_writev => when(is_file(thread, first), "writev"),
        libc::SYS_pwritev | libc::SYS_pwritev2 => when(is_file(thread, first), "pwritev"),
        libc::SYS_copy_file_range => Some("copy_file_range"),
        libc::SYS_sendfile => Some("sendfile"),
        libc::SYS_truncate | libc::SYS_ftruncate => Some("ftruncate"),
        libc::SYS_fallocate => Some("fallocate"),
        libc::SYS_fsync => Some("fsync"),
        libc::SYS_fdatasync => Some("fdatasync"),
        libc::SYS_sync_file_range | libc::SYS_syncfs => Some("sync"),
        libc::SYS_mkdir | libc::SYS_mkdirat => Some("mkdir"),
        libc::SYS_rmdir => Some("rmdir"),
        libc::SYS_rename | libc::SYS_renameat | libc::SYS_renameat2 => Some("rename"),
        libc::SYS_unlink | libc::SYS_unlinkat => Some("unlink"),
        libc::SYS_link | libc::SYS_linkat => Some("link"),
        libc::SYS_symlink | libc::SYS_symlinkat => Some("symlink"),
        libc::SYS_chmod | libc::SYS_fchmod | libc::SYS_fchmodat => Some("chmod"),
        libc::SYS_chown | libc::SYS_fchown | libc::SYS_lchown | libc::SYS_fchownat => Some("chown"),
        libc::SYS_mount => Some("mount"),
        libc::SYS_umount2 => Some("umount"),
        libc::SYS_pivot_root => Some("pivot_root"),
        libc::SYS_unshare => Some("unshare"),
        libc::SYS_setresuid => Some("setresuid"),
        libc::SYS_bind => Some("bind"),
        libc::SYS_connect => Some("connect"),
        libc::SYS_sendto | libc::SYS_sendmsg => Some("send"),
        libc::SYS_ioctl => when(
            DEVICE_REQUESTS.contains(&(second as u32)),
            "ioctl of a device",
        ),
        libc::SYS_clone => when(first & THREAD == 0, "clone"),
        libc::SYS_clone3 => {
            // The first field of `struct clone_args` is the flags.
            let flags = ptrace::read(thread, first as ptrace::AddressType).ok()?;
            when(flags as u64 & THREAD == 0, "clone3")
        }
        libc::SYS_fork | libc::SYS_vfork => Some("fork"),
        libc::SYS_execve => Some("execve"),
        libc::SYS_kill | libc::SYS_pidfd_send_signal => Some("kill"),
        _ => None,
    }
}

const CREATE: u64 = libc::O_CREAT as u64;
const THREAD: u64 = libc::CLONE_THREAD as u64;
/// TUNSETIFF, TUNSETPERSIST (`linux/if_tun.h`), KVM_CREATE_VM (`linux/kvm.h`), FICLONE (`linux/fs.h`).
const DEVICE_REQUESTS: [u32; 4] = [0x4004_54ca, 0x4004_54cb, 0xae01, 0x4004_9409];

/// Whether a descriptor is a file that others may see, and not a log on a standard stream.
fn is_file(thread: Pid, descriptor: u64) -> bool {
    if descriptor <= 2 {
        return false;
    }
    fs::read_link(format!("/proc/{thread}/fd/{descriptor}")).is_ok_and(|path| {
        path.is_absolute() && !path.starts_with("/dev") && !path.starts_with("/memfd:")
    })
}
