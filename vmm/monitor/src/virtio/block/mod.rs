//! The disk (virtio 1.2, section 5.2): a raw file, read-only or writable, with flushes. What the guest
//! discards is a hole in the file, so that a disk is as large on the host as what is in use of it.
//!
//! ```text
//! queue ──► request (checked) ──► engine: page cache and disk ──► answered, in any order
//! ```
//!
//! A write is answered when the page cache has it, and is on the disk after the guest's next flush, as the
//! driver has been told. Discards are done at once, in the device's thread.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};

use super::chain::Chain;
use super::held::Held;
use super::limit::Limiter;
use super::metrics::BlockMetrics;
use super::worker::{FIRST_DEVICE_TOKEN, Ready};
use super::{Context, Device, DeviceState, Kind, Metrics};
use crate::config::{DiskConfig, DiskEngine};
use engine::{Action, DEPTH, Engine};
use request::{Geometry, MAX_REQUEST_BYTES, Request};

mod engine;
mod ranges;
mod request;

pub use engine::Way;

/// A disk.
#[derive(Debug)]
pub struct Block {
    file: File,
    sectors: u64,
    read_only: bool,
    /// What `/sys/block/vda/serial` shows.
    serial: [u8; SERIAL_BYTES],
    engine: Engine,
    /// What the engine is working on, by token.
    pending: Box<[Option<Pending>]>,
    /// Bytes of that.
    under_way: usize,
    limiter: Limiter,
    metrics: Arc<BlockMetrics>,
    /// Something was given back of which the driver has not been told.
    answered: bool,
    /// When the queue is looked at again, though nobody calls: the limit's end, or the kernel's.
    deadline: Option<Instant>,
}

/// A request that the engine has.
#[derive(Debug)]
struct Pending {
    head: u16,
    action: Action,
    /// How many bytes it moves.
    bytes: usize,
    /// Where the answer goes.
    status: Held,
}

/// What a snapshot must hold: only what must not have changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    sectors: u64,
    read_only: bool,
}

const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 256;
/// Data pieces in one request: what fits a descriptor table beside header and status.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// After this many bytes the device looks whether it is to stop.
const MAX_ROUND_BYTES: usize = MAX_REQUEST_BYTES;
/// No more requests are taken while so much is under way: a pause waits for all of it, and 64 of the longest
/// requests would be minutes on a slow disk.
const MAX_BYTES_UNDER_WAY: usize = MAX_REQUEST_BYTES;
const STATUS_BYTES: usize = 1;
/// Where `max_discard_sectors` is in `struct virtio_blk_config`, and the length of that.
const DISCARD_AT: usize = 36;
const CONFIG_BYTES: usize = 60;
const SERIAL_BYTES: usize = 20;
/// The engine has finished something.
const ENGINE: u64 = FIRST_DEVICE_TOKEN;
/// When a kernel that is short of memory is asked again.
const SHORT: Duration = Duration::from_millis(10);

impl Block {
    /// Opens the disk's file.
    pub fn open(config: &DiskConfig, index: usize) -> io::Result<Self> {
        let way = config.engine.map(|engine| match engine {
            DiskEngine::IoUring => Way::Ring,
            DiskEngine::Threads => Way::Threads,
        });
        Self::with(config, index, |file| match way {
            Some(way) => Engine::of_way(way, &config.path, file, config.read_only),
            None => Engine::open(&config.path, file, config.read_only),
        })
    }

    /// The same, with its data going one way only.
    #[doc(hidden)]
    pub fn open_by(config: &DiskConfig, index: usize, way: Way) -> io::Result<Self> {
        Self::with(config, index, |file| {
            Engine::of_way(way, &config.path, file, config.read_only)
        })
    }

    fn with(
        config: &DiskConfig,
        index: usize,
        engine: impl FnOnce(&File) -> io::Result<Engine>,
    ) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(!config.read_only)
            .open(&config.path)?;
        if !config.read_only {
            // Two writers are the end of a file system. Whoever copies the disk takes this lock too.
            file.try_lock().map_err(|error| match error {
                TryLockError::WouldBlock => io::Error::other("it is in use by another process"),
                TryLockError::Error(error) => error,
            })?;
        }
        let len = file.metadata()?.len();
        if len == 0 || !len.is_multiple_of(SECTOR) {
            return Err(io::Error::other(format!(
                "{len} bytes long, a disk is a multiple of {SECTOR}"
            )));
        }
        let mut serial = [0; SERIAL_BYTES];
        let name = format!("tern-disk-{index}");
        serial[..name.len()].copy_from_slice(name.as_bytes());
        Ok(Self {
            engine: engine(&file)?,
            file,
            sectors: len / SECTOR,
            read_only: config.read_only,
            serial,
            pending: std::iter::repeat_with(|| None).take(DEPTH).collect(),
            under_way: 0,
            limiter: Limiter::new(config.rate_limit.as_ref()),
            metrics: Arc::default(),
            answered: false,
            deadline: None,
        })
    }

    /// Checks that a snapshot's guest finds the disk it knew.
    pub fn check(&self, state: &BlockState) -> io::Result<()> {
        let now = self.state();
        if *state == now {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "the disk had {} sectors ({}) when the snapshot was taken, and now has {} ({})",
            state.sectors,
            access(state.read_only),
            now.sectors,
            access(now.read_only),
        )))
    }

    fn state(&self) -> BlockState {
        BlockState {
            sectors: self.sectors,
            read_only: self.read_only,
        }
    }

    /// Takes what the guest asks for and gives back what is done, until there is nothing more of either for now.
    fn work(&mut self, cx: &mut Context) {
        self.deadline = None;
        let mut round = Round {
            requests: cx.queues[0].size(),
            bytes: 0,
        };
        loop {
            let taken = self.take(cx, &mut round);
            self.engine.hand_over();
            self.finish(cx);
            // After that, for what was moved in part goes back to the kernel.
            if !self.engine.hand_over() {
                self.deadline = Some(Instant::now() + SHORT);
            }
            match taken {
                // What the page cache had is done already, and there is room again.
                Taken::Full if self.token().is_some() => {}
                // The end of a request calls.
                Taken::Full | Taken::All => return,
                Taken::Round => {
                    let ram = cx.ram.clone();
                    if cx.queues[0].unmute(&ram) {
                        cx.again(0);
                    }
                    return;
                }
                Taken::Limited(until) => {
                    self.metrics.limited.add(1);
                    self.deadline = Some(self.deadline.map_or(until, |at| at.min(until)));
                    return;
                }
            }
        }
    }

    /// Takes requests from the queue.
    fn take(&mut self, cx: &mut Context, round: &mut Round) -> Taken {
        let ram = cx.ram.clone();
        cx.queues[0].mute(&ram);
        loop {
            let Some(token) = self.token() else {
                return Taken::Full;
            };
            if round.requests == 0 || round.bytes >= MAX_ROUND_BYTES {
                return Taken::Round;
            }
            let now = Instant::now();
            if let Some(until) = self.limiter.wait(now) {
                return Taken::Limited(until);
            }
            let queue = &mut cx.queues[0];
            let Some(descriptors) = queue.pop(&ram) else {
                if queue.unmute(&ram) {
                    continue;
                }
                return Taken::All;
            };
            round.requests -= 1;
            let head = descriptors.head_index();
            match Chain::map(&ram, descriptors) {
                Ok(chain) => {
                    let bytes = chain.readable.len() + chain.writable.len();
                    self.limiter.take(bytes.min(MAX_REQUEST_BYTES), now);
                    round.bytes += bytes + self.begin(cx, token, &chain);
                }
                Err(error) => {
                    tracing::debug!(%error, "the guest made a broken disk request");
                    queue.push(&ram, head, 0);
                    self.answered = true;
                }
            }
        }
    }

    /// A token that no request has, if there is room for one more.
    fn token(&self) -> Option<usize> {
        let free = self.pending.iter().position(Option::is_none);
        free.filter(|_| self.under_way < MAX_BYTES_UNDER_WAY)
    }

    /// Gives one request to the engine, or answers it. Returns what that took beyond the bytes moved: few bytes can
    /// discard a gigabyte, so a round has one of those.
    fn begin(&mut self, cx: &mut Context, token: usize, chain: &Chain<'_>) -> usize {
        let ram = cx.ram.clone();
        // The last byte the device may write is the status; where there is none, there is no answer.
        let Some(data_len) = chain.writable.len().checked_sub(STATUS_BYTES) else {
            cx.queues[0].push(&ram, chain.head, 0);
            self.answered = true;
            return 0;
        };
        // SAFETY: the chain was mapped from `cx.ram`.
        let status = unsafe { chain.writable.part(data_len, STATUS_BYTES).hold(&ram) };
        let disk = Geometry {
            sectors: self.sectors,
            read_only: self.read_only,
        };
        let mut extra = 0;
        let done = match Request::read(chain, &ram, data_len, disk) {
            Ok(Request::Job(job, bytes)) => {
                self.under_way += bytes;
                self.pending[token] = Some(Pending {
                    head: chain.head,
                    action: job.action,
                    bytes,
                    status,
                });
                self.engine.submit(token as u16, job); // below DEPTH
                return 0;
            }
            Ok(Request::Nothing) => Ok(0),
            Ok(Request::Serial(target)) => Ok(target.write(0, &self.serial) as u32),
            Ok(Request::Zero(ranges)) => {
                extra = MAX_ROUND_BYTES;
                let done = ranges.apply(&self.file);
                self.metrics.zeroes.add(u64::from(done.is_ok()));
                done.map(|()| 0)
            }
            Err(refusal) => Err(refusal),
        };
        self.answer(cx, chain.head, &status, done);
        extra
    }

    /// Answers what the engine has done.
    fn finish(&mut self, cx: &mut Context) {
        while let Some((token, result)) = self.engine.finished() {
            let pending = self.pending.get_mut(usize::from(token));
            if let Some(pending) = pending.and_then(Option::take) {
                self.under_way -= pending.bytes;
                let done = result.map(|()| self.count(&pending)).map_err(Refusal::Io);
                self.answer(cx, pending.head, &pending.status, done);
            }
        }
        if std::mem::take(&mut self.answered) {
            cx.interrupt(0);
        }
    }

    /// Counts a job that went well. Returns how many bytes of the guest's it wrote.
    fn count(&self, Pending { action, bytes, .. }: &Pending) -> u32 {
        let counts = &self.metrics;
        match action {
            Action::Read => {
                counts.reads.add(1);
                counts.read_bytes.add(*bytes as u64);
                *bytes as u32 // a chain has less than 2^32 bytes
            }
            Action::Write => {
                counts.writes.add(1);
                counts.written_bytes.add(*bytes as u64);
                0
            }
            Action::Flush => {
                counts.flushes.add(1);
                0
            }
        }
    }

    /// Gives a request back with its status and the number of bytes that were written for the guest, the status
    /// included.
    fn answer(&mut self, cx: &mut Context, head: u16, status: &Held, done: Result<u32, Refusal>) {
        let (code, written) = match done {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Refusal::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Refusal::Invalid(what)) => {
                tracing::debug!(what, "the guest made a senseless disk request");
                (VIRTIO_BLK_S_IOERR, 0)
            }
            Err(Refusal::Io(error)) => {
                if super::may_log() {
                    tracing::error!(%error, "disk request failed");
                }
                (VIRTIO_BLK_S_IOERR, 0)
            }
        };
        self.metrics.errors.add(u64::from(code != VIRTIO_BLK_S_OK));
        status.put(code as u8);
        let ram = cx.ram.clone();
        cx.queues[0].push(&ram, head, written + STATUS_BYTES as u32);
        self.answered = true;
    }
}

/// How much one call of the device takes.
struct Round {
    requests: u16,
    bytes: usize,
}

/// Why no more requests are taken.
enum Taken {
    /// There are none.
    All,
    /// The engine has all that it can have.
    Full,
    /// It is time to look whether to stop.
    Round,
    /// The rate limit, until then.
    Limited(Instant),
}

impl Device for Block {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn features(&self) -> u64 {
        let access = if self.read_only {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_SEG_MAX | access
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    /// `struct virtio_blk_config`: capacity (8 bytes), size_max (4), seg_max (4), then what is only
    /// there with features not offered, and after them the limits of discards.
    fn config(&self) -> Vec<u8> {
        let mut config = self.sectors.to_le_bytes().to_vec();
        config.extend_from_slice(&0_u32.to_le_bytes());
        config.extend_from_slice(&SEGMENTS.to_le_bytes());
        config.resize(DISCARD_AT, 0);
        if !self.read_only {
            config.extend_from_slice(&ranges::limits());
        }
        config.resize(CONFIG_BYTES, 0);
        config
    }

    fn hire(&mut self) -> io::Result<()> {
        self.engine.hire()
    }

    fn start(&mut self, cx: &mut Context) -> io::Result<()> {
        self.hire()?;
        cx.watch(self.engine.event(), ENGINE, true, false)
    }

    fn on_queue(&mut self, cx: &mut Context, _index: usize) {
        self.work(cx);
    }

    fn on_io(&mut self, cx: &mut Context, _token: u64, _ready: Ready) {
        self.work(cx);
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    fn on_deadline(&mut self, cx: &mut Context, _now: Instant) {
        self.work(cx);
    }

    fn stop(&mut self, cx: &mut Context) {
        while self.pending.iter().any(Option::is_some) {
            self.engine.wait();
            self.finish(cx);
        }
        cx.unwatch(self.engine.event());
        self.deadline = None;
    }

    fn metrics(&self) -> Metrics {
        Metrics::Block(self.metrics.clone())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(self.state())
    }
}

/// Why a request is answered with an error.
#[derive(Debug)]
enum Refusal {
    Unsupported,
    Invalid(&'static str),
    Io(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn access(read_only: bool) -> &'static str {
    if read_only { "read-only" } else { "writable" }
}

#[cfg(test)]
mod tests;
