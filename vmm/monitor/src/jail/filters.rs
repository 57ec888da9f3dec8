//! The system calls of each kind of thread: everything else kills the monitor.
//!
//! This is the one place where they stand, each with why it is needed. Numbers are those of x86-64, and
//! conditions look at the low 32 bits of an argument. Found by running the tests under `strace -f` and by
//! reading glibc's and Rust's thread code; a call that is missing shows as an end by SIGSYS, whose number
//! `dmesg` has (`audit: type=1326 … syscall=N`).

use super::seccomp::ThreadKind;
use crate::virtio::Kind;

/// An allowed call.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Its number.
    pub number: i64,
    /// Who makes it.
    pub why: &'static str,
    /// With which arguments.
    pub when: When,
}

/// A condition on one argument, counted from 0.
#[derive(Debug, Clone, Copy)]
pub enum When {
    /// None.
    Always,
    /// It is one of these.
    OneOf {
        /// Which.
        argument: u8,
        /// What it may be.
        values: &'static [u32],
    },
    /// None of these bits is set.
    Without {
        /// Which.
        argument: u8,
        /// What it may not have.
        bits: u32,
    },
    /// It is this process's id.
    OwnProcess {
        /// Which.
        argument: u8,
    },
}

const fn call(number: i64, why: &'static str) -> Call {
    let when = When::Always;
    Call { number, why, when }
}

const fn when(number: i64, why: &'static str, when: When) -> Call {
    Call { number, why, when }
}

const fn one_of(number: i64, why: &'static str, argument: u8, values: &'static [u32]) -> Call {
    let when = When::OneOf { argument, values };
    Call { number, why, when }
}

/// No memory of a monitor is ever executable but the program itself.
const NOT_EXECUTABLE: When = When::Without {
    argument: 2,
    bits: libc::PROT_EXEC as u32,
};

/// Every thread: memory, locks, logs, the end.
const EVERY: &[Call] = &[
    call(libc::SYS_futex, "locks, channels, joins"),
    call(libc::SYS_read, "eventfds, open files"),
    call(
        libc::SYS_write,
        "eventfds, the monitor's log on stderr, the serial log",
    ),
    call(libc::SYS_close, "what is dropped"),
    one_of(
        libc::SYS_fcntl,
        "std looks before it closes, with debug assertions",
        1,
        &[libc::F_GETFD as u32],
    ),
    when(libc::SYS_mmap, "malloc", NOT_EXECUTABLE),
    when(libc::SYS_mprotect, "malloc grows an arena", NOT_EXECUTABLE),
    call(libc::SYS_munmap, "free"),
    call(libc::SYS_mremap, "realloc"),
    call(libc::SYS_brk, "malloc in the main arena"),
    call(
        libc::SYS_madvise,
        "malloc trims, an ended thread's stack, a balloon's pages",
    ),
    call(
        libc::SYS_clock_gettime,
        "where the vDSO cannot tell the time",
    ),
    call(libc::SYS_clock_nanosleep, "sleep"),
    call(
        libc::SYS_sched_yield,
        "std's locks and channels spin a little",
    ),
    call(libc::SYS_getpid, "raising a signal to oneself"),
    call(libc::SYS_gettid, "abort"),
    call(libc::SYS_getrandom, "hash seeds, virtio-rng"),
    call(libc::SYS_rt_sigprocmask, "a thread's end, abort"),
    call(libc::SYS_rt_sigreturn, "after a kick"),
    call(libc::SYS_rt_sigaction, "abort"),
    call(libc::SYS_sigaltstack, "a thread's end"),
    call(
        libc::SYS_restart_syscall,
        "a wait that a stopped process goes on with",
    ),
    when(
        libc::SYS_tgkill,
        "kicks, abort",
        When::OwnProcess { argument: 0 },
    ),
    one_of(libc::SYS_openat, "a panic writes exit.json", 2, &[NEW_FILE]),
    call(libc::SYS_rename, "exit.json takes its place"),
    call(libc::SYS_exit, "a thread's end"),
    call(
        libc::SYS_exit_group,
        "the monitor's end, in any thread after a panic",
    ),
];

/// Threads that watch descriptors.
const EPOLL: &[Call] = &[
    call(libc::SYS_epoll_wait, "what is ready"),
    call(libc::SYS_epoll_pwait, "the same, by another glibc"),
    call(libc::SYS_epoll_ctl, "what to watch"),
];

/// Whoever hands a device to its worker, or takes it back: main at resume and pause, vCPUs when a
/// driver is ready or resets.
const WORKERS: &[Call] = &[
    call(
        libc::SYS_eventfd2,
        "the worker's stop event, queues of a reset device",
    ),
    call(libc::SYS_epoll_create1, "what the worker will wait with"),
    call(libc::SYS_epoll_ctl, "its queues' events"),
    one_of(
        libc::SYS_fcntl,
        "a second handle of the stop event",
        1,
        &[libc::F_DUPFD_CLOEXEC as u32],
    ),
];

const MAIN: &[Call] = &[
    call(
        libc::SYS_openat,
        "the snapshot's files, in a root that has nothing else",
    ),
    one_of(
        libc::SYS_flock,
        "the pid file, at the end",
        1,
        &[libc::LOCK_UN as u32],
    ),
    call(libc::SYS_mkdir, "the snapshot's directory"),
    call(libc::SYS_renameat2, "a snapshot replaces the last one"),
    call(
        libc::SYS_unlink,
        "the last snapshot's state; the sockets, at the end",
    ),
    call(libc::SYS_unlinkat, "an old snapshot"),
    call(libc::SYS_rmdir, "an old snapshot"),
    call(libc::SYS_getdents64, "an old snapshot"),
    call(libc::SYS_statx, "the memory file's seal"),
    call(libc::SYS_fstat, "an old snapshot's directory"),
    call(libc::SYS_newfstatat, "an old snapshot"),
    call(
        libc::SYS_ftruncate,
        "the memory file's length, the pid file's",
    ),
    call(libc::SYS_pread64, "pagemap"),
    call(libc::SYS_pwrite64, "guest memory to its file"),
    call(libc::SYS_lseek, "holes of the last memory file"),
    one_of(
        libc::SYS_fallocate,
        "pages that became zero leave the memory file",
        1,
        &[PUNCH_HOLE],
    ),
    one_of(
        libc::SYS_fcntl,
        "opening a directory",
        1,
        &[libc::F_GETFL as u32, libc::F_SETFD as u32],
    ),
    one_of(
        libc::SYS_ioctl,
        "the VM's state for a snapshot",
        1,
        &[kvm::GET_IRQCHIP, kvm::GET_PIT2, kvm::GET_CLOCK],
    ),
];

const CONTROL: &[Call] = &[
    call(libc::SYS_accept4, "a client"),
    call(libc::SYS_recvfrom, "its request"),
    call(libc::SYS_sendto, "its answer"),
    call(libc::SYS_writev, "its answer, head and body at once"),
    call(libc::SYS_shutdown, "the end of its answer"),
    call(libc::SYS_getsockopt, "whether a socket has failed"),
];

const VCPU: &[Call] = &[one_of(
    libc::SYS_ioctl,
    "the guest, and its processor's state for a snapshot",
    1,
    &[
        kvm::RUN,
        kvm::GET_REGS,
        kvm::GET_SREGS,
        kvm::GET_MSRS,
        kvm::GET_LAPIC,
        kvm::GET_MP_STATE,
        kvm::GET_VCPU_EVENTS,
        kvm::GET_DEBUGREGS,
        kvm::GET_XSAVE,
        kvm::GET_XSAVE2,
        kvm::GET_XCRS,
        kvm::GET_TSC_KHZ,
        kvm::GET_CPUID2,
        kvm::KVMCLOCK_CTRL,
    ],
)];

const BLOCK: &[Call] = &[
    call(
        libc::SYS_io_uring_enter,
        "reads, writes and flushes, by a ring that can do nothing else",
    ),
    call(libc::SYS_preadv, "reads, where there is no ring"),
    call(libc::SYS_pwritev, "writes, where there is no ring"),
    call(libc::SYS_fdatasync, "flushes, where there is no ring"),
    call(libc::SYS_fallocate, "discards and zeroes"),
];

const NET: &[Call] = &[
    call(libc::SYS_readv, "a frame from the TAP into guest memory"),
    call(libc::SYS_writev, "a frame of the guest's"),
    one_of(
        libc::SYS_ioctl,
        "what the guest's driver can do",
        1,
        &[TUNSETOFFLOAD],
    ),
];

/// No frame passes through it.
const VHOST_NET: &[Call] = &[
    one_of(
        libc::SYS_ioctl,
        "the kernel takes the queues and gives them back",
        1,
        VHOST_CALLS,
    ),
    one_of(
        libc::SYS_ioctl,
        "what the guest's driver can do",
        1,
        &[TUNSETOFFLOAD],
    ),
];

const VSOCK: &[Call] = &[
    call(libc::SYS_accept4, "a program of the host"),
    one_of(
        libc::SYS_socket,
        "a program of the guest calls the host",
        0,
        &[libc::AF_UNIX as u32],
    ),
    call(
        libc::SYS_connect,
        "the same, in a root where nobody listens",
    ),
    call(libc::SYS_recvfrom, "what a program of the host says"),
    call(libc::SYS_sendto, "what the guest answers"),
    call(libc::SYS_readv, "the same, into guest memory"),
    call(libc::SYS_writev, "the same, from guest memory"),
    call(libc::SYS_shutdown, "one direction ends"),
    one_of(
        libc::SYS_ioctl,
        "sockets that do not block",
        1,
        &[libc::FIONBIO as u32],
    ),
];

/// The worker of a device that cannot start waits to be stopped.
const WORKER: &[Call] = &[call(libc::SYS_poll, "the stop event alone")];

/// What `kind` may call.
pub fn calls(kind: ThreadKind) -> impl Iterator<Item = &'static Call> {
    let tables: &[&'static [Call]] = match kind {
        ThreadKind::Main => &[EVERY, WORKERS, MAIN],
        ThreadKind::Control => &[EVERY, EPOLL, CONTROL],
        ThreadKind::Vcpu => &[EVERY, WORKERS, VCPU],
        ThreadKind::Device(Kind::Block) => &[EVERY, EPOLL, WORKER, BLOCK],
        ThreadKind::Device(Kind::Net) => &[EVERY, EPOLL, WORKER, NET],
        ThreadKind::VhostNet => &[EVERY, EPOLL, WORKER, VHOST_NET],
        ThreadKind::Device(Kind::Vsock) => &[EVERY, EPOLL, WORKER, VSOCK],
        // Its work is `madvise`, and so is a balloon's.
        ThreadKind::Prefetch => &[EVERY],
        ThreadKind::Device(Kind::Rng | Kind::Balloon) => &[EVERY, EPOLL, WORKER],
    };
    tables.iter().flat_map(|table| table.iter())
}

/// How `std::fs::write` opens.
const NEW_FILE: u32 = (libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC | libc::O_CLOEXEC) as u32;
/// A file keeps its length.
const PUNCH_HOLE: u32 = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32;
/// `_IOW('T', 208, unsigned int)`, `linux/if_tun.h`.
const TUNSETOFFLOAD: u32 = ioctl(WRITE, b'T', 208, 4);

const WRITE: u32 = 1;
const READ: u32 = 2;

/// `asm-generic/ioctl.h`.
const fn ioctl(direction: u32, group: u8, number: u8, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | (group as u32) << 8 | number as u32
}

/// What is asked of vhost-net once a monitor is confined, in the order of the numbers.
pub(crate) const VHOST_CALLS: &[u32] = &[
    vhost::SET_FEATURES,
    vhost::SET_OWNER,
    vhost::SET_MEM_TABLE,
    vhost::SET_VRING_NUM,
    vhost::SET_VRING_ADDR,
    vhost::SET_VRING_BASE,
    vhost::GET_VRING_BASE,
    vhost::SET_VRING_KICK,
    vhost::SET_VRING_CALL,
    vhost::SET_VRING_ERR,
    vhost::NET_SET_BACKEND,
];

/// `linux/vhost.h`.
mod vhost {
    use super::{READ, WRITE, ioctl};

    const VHOST_VIRTIO: u8 = 0xaf;
    /// `struct vhost_vring_state` and `struct vhost_vring_file`.
    const RING: usize = 8;

    pub const SET_FEATURES: u32 = ioctl(WRITE, VHOST_VIRTIO, 0x00, 8);
    pub const SET_OWNER: u32 = ioctl(0, VHOST_VIRTIO, 0x01, 0);
    pub const SET_MEM_TABLE: u32 = ioctl(WRITE, VHOST_VIRTIO, 0x03, 8);
    pub const SET_VRING_NUM: u32 = ioctl(WRITE, VHOST_VIRTIO, 0x10, RING);
    pub const SET_VRING_ADDR: u32 = ioctl(WRITE, VHOST_VIRTIO, 0x11, 40);
    pub const SET_VRING_BASE: u32 = ioctl(WRITE, VHOST_VIRTIO, 0x12, RING);
    pub const GET_VRING_BASE: u32 = ioctl(READ | WRITE, VHOST_VIRTIO, 0x12, RING);
    pub const SET_VRING_KICK: u32 = ioctl(WRITE, VHOST_VIRTIO, 0x20, RING);
    pub const SET_VRING_CALL: u32 = ioctl(WRITE, VHOST_VIRTIO, 0x21, RING);
    pub const SET_VRING_ERR: u32 = ioctl(WRITE, VHOST_VIRTIO, 0x22, RING);
    pub const NET_SET_BACKEND: u32 = ioctl(WRITE, VHOST_VIRTIO, 0x30, RING);
}

/// `linux/kvm.h`.
mod kvm {
    use super::{READ, WRITE, ioctl};
    use kvm_bindings::*;

    const KVMIO: u8 = 0xae;

    const fn plain(number: u8) -> u32 {
        ioctl(0, KVMIO, number, 0)
    }

    const fn reads<T>(number: u8) -> u32 {
        ioctl(READ, KVMIO, number, size_of::<T>())
    }

    const fn reads_and_writes<T>(number: u8) -> u32 {
        ioctl(READ | WRITE, KVMIO, number, size_of::<T>())
    }

    pub const GET_IRQCHIP: u32 = reads_and_writes::<kvm_irqchip>(0x62);
    pub const GET_CLOCK: u32 = reads::<kvm_clock_data>(0x7c);
    pub const GET_PIT2: u32 = reads::<kvm_pit_state2>(0x9f);
    pub const RUN: u32 = plain(0x80);
    pub const GET_REGS: u32 = reads::<kvm_regs>(0x81);
    pub const GET_SREGS: u32 = reads::<kvm_sregs>(0x83);
    pub const GET_MSRS: u32 = reads_and_writes::<kvm_msrs>(0x88);
    pub const GET_LAPIC: u32 = reads::<kvm_lapic_state>(0x8e);
    pub const GET_CPUID2: u32 = reads_and_writes::<kvm_cpuid2>(0x91);
    pub const GET_MP_STATE: u32 = reads::<kvm_mp_state>(0x98);
    pub const GET_VCPU_EVENTS: u32 = reads::<kvm_vcpu_events>(0x9f);
    pub const GET_DEBUGREGS: u32 = reads::<kvm_debugregs>(0xa1);
    pub const GET_TSC_KHZ: u32 = plain(0xa3);
    pub const GET_XSAVE: u32 = reads::<kvm_xsave>(0xa4);
    pub const GET_XCRS: u32 = reads::<kvm_xcrs>(0xa6);
    pub const KVMCLOCK_CTRL: u32 = plain(0xad);
    pub const GET_XSAVE2: u32 = reads::<kvm_xsave>(0xcf);
}
