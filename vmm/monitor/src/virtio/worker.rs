//! What the thread of one device does, from its driver's "ready" to a pause or reset.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::Device;
use super::queue::VirtQueue;
use crate::jail::threads::Hand;
use crate::memory::GuestRam;
use crate::trace::Trace;

/// A running device. [`Worker::stop`] gives it back.
#[derive(Debug)]
pub struct Worker {
    stop: EventFd,
}

/// A device at rest with its queues.
#[derive(Debug)]
pub struct Parked {
    /// The device.
    pub device: Box<dyn Device>,
    /// Its queues, where the device stopped.
    pub queues: Vec<VirtQueue>,
}

/// What a device works with while it runs.
#[derive(Debug)]
pub struct Context {
    /// The guest's memory.
    pub ram: Arc<GuestRam>,
    /// The device's queues.
    pub queues: Vec<VirtQueue>,
    /// What the driver accepted.
    pub features: u64,
    interrupt: Arc<Interrupt>,
    epoll: Epoll,
    trace: Arc<Trace>,
    /// Whether the driver has sent something since the worker started.
    spoke: bool,
}

/// What a watched descriptor is ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ready {
    /// There is something to read, or the end of it.
    pub read: bool,
    /// There is room to write.
    pub write: bool,
    /// The other side is gone altogether.
    pub hang_up: bool,
}

/// The interrupt of one device: a line into KVM, and the reason in the device's status register.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    /// Reasons that cannot be acknowledged, while somebody else than this process raises it.
    standing: AtomicU32,
    line: EventFd,
}

/// A queue has something for the driver.
const REASON_QUEUE: u32 = 1;
/// The device's configuration or status changed.
const REASON_CONFIG: u32 = 2;
/// Tokens below are queues, and the stop event; devices use others.
pub const FIRST_DEVICE_TOKEN: u64 = 0x100;
const STOP_TOKEN: u64 = FIRST_DEVICE_TOKEN - 1;
/// Enough for every descriptor of most devices in one call.
const EVENTS_PER_WAIT: usize = 32;

impl Worker {
    /// Has `hand` serve `parked`. Nothing else must be asked of it until [`Worker::stop`].
    pub fn start(
        hand: &mut Hand<Parked>,
        parked: Parked,
        ram: Arc<GuestRam>,
        features: u64,
        interrupt: Arc<Interrupt>,
        trace: Arc<Trace>,
    ) -> Result<Self, (io::Error, Box<Parked>)> {
        let prepared = (|| {
            hand.hire()?;
            let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
            let epoll = Epoll::new()?;
            watch(
                &epoll,
                ControlOperation::Add,
                stop.as_raw_fd(),
                EventSet::IN,
                STOP_TOKEN,
            )?;
            for (token, queue) in parked.queues.iter().enumerate() {
                let fd = queue.kick().as_raw_fd();
                watch(
                    &epoll,
                    ControlOperation::Add,
                    fd,
                    EventSet::IN,
                    token as u64,
                )?;
            }
            Ok((stop.try_clone()?, stop, epoll))
        })();
        let (stop, stopped, epoll) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return Err((error, Box::new(parked))),
        };
        let Parked { device, queues } = parked;
        let context = Context {
            ram,
            queues,
            features,
            interrupt,
            epoll,
            trace,
            spoke: false,
        };
        // Hired above, so that this cannot fail with the device on its way.
        let _ = hand.begin(move || run(device, context, &stopped));
        Ok(Self { stop })
    }

    /// Has the device finish what it is doing, and takes it back from `hand`. `None` after a panic of the
    /// device, which the process's panic hook has reported.
    pub fn stop(self, hand: &Hand<Parked>) -> Option<Parked> {
        // An eventfd that nobody has written to before takes a one.
        let _ = self.stop.write(1);
        hand.finish()
    }
}

fn run(mut device: Box<dyn Device>, mut cx: Context, stop: &EventFd) -> Parked {
    let kind = device.kind().name();
    let started = device.start(&mut cx);
    if started.is_ok() {
        for index in 0..cx.queues.len() {
            device.on_queue(&mut cx, index);
        }
        serve(&mut device, &mut cx);
    }
    // Also after a start that came half-way: what it has begun must not go on.
    device.stop(&mut cx);
    if let Err(error) = started {
        // A driver can repeat this without end; it must not be silent because the guest has said other things.
        if FAILED_STARTS.fetch_add(1, Ordering::Relaxed) < MOST_TOLD {
            tracing::error!(device = kind, %error, "cannot start; the guest sees it as hung");
        }
        wait_readable(stop);
    }
    Parked {
        device,
        queues: cx.queues,
    }
}

/// Starts that failed, and how many of them are told.
static FAILED_STARTS: AtomicU32 = AtomicU32::new(0);
const MOST_TOLD: u32 = 32;

fn serve(device: &mut Box<dyn Device>, cx: &mut Context) {
    let mut events = [EpollEvent::default(); EVENTS_PER_WAIT];
    loop {
        let timeout = device.deadline().map_or(-1, millis_until);
        let count = match cx.epoll.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                // Only programming errors are left: a bad descriptor, a bad buffer.
                panic!("epoll_wait: {error}");
            }
        };
        for event in &events[..count] {
            match event.data() {
                STOP_TOKEN => return,
                token if token < FIRST_DEVICE_TOKEN => {
                    let index = token as usize; // one of the queues registered in `start`
                    let _ = cx.queues[index].kick().read();
                    device.on_queue(cx, index);
                }
                token => device.on_io(cx, token, event.event_set().into()),
            }
        }
        if device
            .deadline()
            .is_some_and(|deadline| deadline <= Instant::now())
        {
            device.on_deadline(cx, Instant::now());
        }
    }
}

/// Rounded up, so that the deadline has passed when the wait ends.
fn millis_until(deadline: Instant) -> i32 {
    let left = deadline
        .saturating_duration_since(Instant::now())
        .as_millis()
        + 1;
    i32::try_from(left).unwrap_or(i32::MAX)
}

fn wait_readable(event: &EventFd) {
    // SAFETY: the descriptor is open as long as `event` is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let mut fds = [nix::poll::PollFd::new(fd, nix::poll::PollFlags::POLLIN)];
    while nix::poll::poll(&mut fds, nix::poll::PollTimeout::NONE).is_err() {}
}

fn watch(
    epoll: &Epoll,
    operation: ControlOperation,
    fd: i32,
    events: EventSet,
    token: u64,
) -> io::Result<()> {
    epoll.ctl(operation, fd, EpollEvent::new(events, token))
}

impl Context {
    /// Marks the guest's first word on this device, which ends the phase `name` of a start.
    pub fn spoken(&mut self, name: &'static str) {
        if !std::mem::replace(&mut self.spoke, true) {
            self.trace.mark(name);
        }
    }

    /// A context outside a worker: a device is driven step by step, in tests and by the fuzzer.
    #[doc(hidden)]
    pub fn detached(ram: Arc<GuestRam>, queues: Vec<VirtQueue>, features: u64) -> io::Result<Self> {
        Ok(Self {
            ram,
            queues,
            features,
            interrupt: Arc::new(Interrupt::new()?),
            epoll: Epoll::new()?,
            trace: Arc::new(Trace::new(Instant::now())),
            spoke: false,
        })
    }

    /// What a worker would be told now: tokens of descriptors, and what those are ready for.
    #[doc(hidden)]
    pub fn poll_detached(&self) -> io::Result<Vec<(u64, Ready)>> {
        let mut events = [EpollEvent::default(); EVENTS_PER_WAIT];
        let count = self.epoll.wait(0, &mut events)?;
        Ok(events[..count]
            .iter()
            .map(|event| (event.data(), event.event_set().into()))
            .collect())
    }

    /// [`Context::detached`], for a device's own tests.
    #[cfg(test)]
    pub fn for_test(ram: Arc<GuestRam>, queues: Vec<VirtQueue>, features: u64) -> Self {
        Self::detached(ram, queues, features).unwrap()
    }

    /// The events themselves.
    #[cfg(test)]
    pub fn poll_for_test(&self, events: &mut [EpollEvent]) -> usize {
        self.epoll.wait(0, events).unwrap()
    }

    /// Whether the driver accepted this feature bit.
    pub fn accepted(&self, bit: u32) -> bool {
        self.features & 1 << bit != 0
    }

    /// Interrupts the driver, if it wants to hear of what was pushed to queue `index`.
    pub fn interrupt(&mut self, index: usize) {
        if self.queues[index].needs_interrupt(&self.ram) {
            self.interrupt.raise_queue();
        }
    }

    /// Leaves the queues to the kernel: notifications are not heard here any more, and the kernel writes to
    /// the line returned when there is something for the driver. Until [`Context::take_queues_back`].
    pub fn lend_queues(&self) -> &EventFd {
        for queue in &self.queues {
            // Fails only where nothing is watched, outside a worker.
            let _ = watch(
                &self.epoll,
                ControlOperation::Delete,
                queue.kick().as_raw_fd(),
                EventSet::empty(),
                0,
            );
        }
        self.interrupt.lend();
        self.interrupt.line()
    }

    /// The kernel has stopped. Only for a worker that ends: it still hears nothing.
    pub fn take_queues_back(&self) {
        self.interrupt.take_back();
    }

    /// Has queue `index` looked at once more, after everything else that waits.
    pub fn again(&self, index: usize) {
        let _ = self.queues[index].kick().write(1);
    }

    /// Calls [`Device::on_io`] with `token` when `fd` is ready. A hang-up is always told.
    pub fn watch(&self, fd: impl AsFd, token: u64, read: bool, write: bool) -> io::Result<()> {
        let fd = fd.as_fd().as_raw_fd();
        watch(
            &self.epoll,
            ControlOperation::Add,
            fd,
            interest(read, write),
            token,
        )
    }

    /// Changes what a watched `fd` is watched for.
    pub fn rewatch(&self, fd: impl AsFd, token: u64, read: bool, write: bool) -> io::Result<()> {
        let fd = fd.as_fd().as_raw_fd();
        watch(
            &self.epoll,
            ControlOperation::Modify,
            fd,
            interest(read, write),
            token,
        )
    }

    /// Ends a watch. One that is not there is fine.
    pub fn unwatch(&self, fd: impl AsFd) {
        let fd = fd.as_fd().as_raw_fd();
        let _ = watch(
            &self.epoll,
            ControlOperation::Delete,
            fd,
            EventSet::empty(),
            0,
        );
    }
}

fn interest(read: bool, write: bool) -> EventSet {
    let mut events = EventSet::empty();
    events.set(EventSet::IN, read);
    events.set(EventSet::OUT, write);
    events
}

impl From<EventSet> for Ready {
    fn from(events: EventSet) -> Self {
        Self {
            read: events.contains(EventSet::IN),
            write: events.contains(EventSet::OUT),
            hang_up: events.intersects(EventSet::HANG_UP | EventSet::ERROR),
        }
    }
}

impl Interrupt {
    /// An interrupt that is not raised.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            status: AtomicU32::new(0),
            standing: AtomicU32::new(0),
            line: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// The event that KVM turns into an interrupt.
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// The reasons not yet acknowledged.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst) | self.standing.load(Ordering::SeqCst)
    }

    /// From now on the kernel writes to the line for the queues, without a word to this process.
    ///
    /// So the register says "a queue has something" at any time. That is as good as the truth: by virtio's
    /// rules a driver looks into its rings upon it, and may find them empty. The alternative, a thread that
    /// is told first, sets the reason and writes to the line itself, costs every interrupt a thread's wake-up.
    pub fn lend(&self) {
        self.standing.store(REASON_QUEUE, Ordering::SeqCst);
    }

    /// The kernel has stopped writing. Whether the driver has heard of everything nobody knows, so it is told
    /// once more, with the next interrupt or upon a resume.
    pub fn take_back(&self) {
        let standing = self.standing.swap(0, Ordering::SeqCst);
        self.status.fetch_or(standing, Ordering::SeqCst);
    }

    /// Sets the reasons, from a snapshot or at a reset.
    pub fn set_status(&self, status: u32) {
        self.status
            .store(status & (REASON_QUEUE | REASON_CONFIG), Ordering::SeqCst);
    }

    /// The driver has seen these reasons.
    pub fn acknowledge(&self, reasons: u32) {
        self.status.fetch_and(!reasons, Ordering::SeqCst);
    }

    /// A queue has something for the driver.
    pub fn raise_queue(&self) {
        self.raise(REASON_QUEUE);
    }

    /// The device's status has changed.
    pub fn raise_config(&self) {
        self.raise(REASON_CONFIG);
    }

    /// Raises once more what was not acknowledged: an interrupt may have been on its way when the
    /// Machine was paused. One too many is harmless.
    pub fn raise_pending(&self) {
        if self.status() != 0 {
            self.raise(0);
        }
    }

    fn raise(&self, reason: u32) {
        self.status.fetch_or(reason, Ordering::SeqCst);
        // Fails only when 2^64 - 2 interrupts wait.
        let _ = self.line.write(1);
    }
}
