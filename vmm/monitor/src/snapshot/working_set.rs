//! The working set of a wake: the pages that a guest touched from a restore until its first reply
//! ([`crate::wake`]), kept in its next snapshot so that the next restore can have them ready.
//!
//! ```text
//! working_set:  magic 8 │ format 4 │ age 4 (top bit: answered) │ memory bytes 8 │ runs 8 │ checksum 8
//!               runs, in the order of the memory file: first page 4 │ pages 4 (top bit: written)
//! ```
//!
//! A guest that wakes needs the same pages each time, some thousand of them, and meets them one fault
//! after the other (REAP, ASPLOS 2021, <https://doi.org/10.1145/3445814.3446714>). Here they are made ready in
//! file order. Where KVM can map pages into the guest beforehand (`KVM_PRE_FAULT_MEMORY`, Linux 6.11), that is done
//! before the guest runs, for a bounded time ([`WorkingSet::map_ahead`]). What is left, which elsewhere is all, is done
//! while the guest begins to run ([`WorkingSet::prefetch`]): those that it wrote are mapped as private copies, so that
//! a page that is read first and written then is not met twice; the others are read into the page cache, if
//! they are not there, all at once.
//!
//! This is advice. It holds nothing of the guest's memory, a wrong one costs a little time, and one
//! that is damaged, foreign or too long is ignored.
//!
//! A page that was made ready looks touched ever after, and often those around it too. So a set from before tells
//! more of the next wake than stock taken with it would, where pages are mapped into the guest: it is kept as it is
//! ([`WorkingSet::kept`]). Elsewhere stock is taken after each wake, and sets can only grow. In either case no set is used for more
//! than [`MAX_AGE`] wakes; the next one goes without and takes stock anew.

use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::OFlag;
use xxhash_rust::xxh3::xxh3_64;

use super::pagemap::Entries;
use crate::memory::{Memory, PAGE_SIZE};

/// The pages of a wake, in the order of the memory file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkingSet {
    memory_bytes: u64,
    /// How many wakes had a set from before that this one follows from.
    age: u32,
    /// Whether it is of a wake that ended with a reply.
    answered: bool,
    runs: Vec<Run>,
}

/// Pages that follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: u32,
    pages: u32,
    written: bool,
}

impl Run {
    /// Where it begins in a memory file, and how long it is.
    fn bytes(&self) -> (u64, u64) {
        let page = PAGE_SIZE as u64;
        (u64::from(self.first) * page, u64::from(self.pages) * page)
    }

    /// Whether `next`, the one behind it, is mapped together with it.
    fn is_near(&self, next: &Self) -> bool {
        next.first - (self.first + self.pages) <= GAP && next.first / TABLE == self.first / TABLE
    }
}

/// The parts of `len` bytes at `start` between which it is looked at the clock.
fn steps((start, len): (u64, u64)) -> impl Iterator<Item = (u64, u64)> {
    let step = AHEAD_STEP as u64;
    (0..len)
        .step_by(AHEAD_STEP)
        .map(move |at| (start + at, step.min(len - at)))
}

/// Why a working set is not used.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// It cannot be read.
    #[error("cannot read it: {0}")]
    Read(#[from] io::Error),
    /// It is not what was written.
    #[error("it is damaged, or not of this memory and format")]
    Damaged,
}

const MAGIC: [u8; 8] = *b"TERNWSET";
const FORMAT: u32 = 2;
const HEADER_BYTES: usize = 40;
const RUN_BYTES: usize = 8;
const WRITTEN: u32 = 1 << 31;
const ANSWERED: u32 = 1 << 31;
/// After so many wakes a set is taken anew.
const MAX_AGE: u32 = 8;
/// A guest that has touched more than this when it woke did something else than wake.
const MAX_PREFETCH: u64 = 64 << 20;
/// Pages that are mapped with those on both sides of them, touched or not: as long as one call for each side would take.
const GAP: u32 = 7;
/// Pages under one table of the guest's page tables (x86): runs in different ones are not mapped together.
const TABLE: u32 = 512;
/// Bytes between two looks whether to leave off: some milliseconds from a slow disk.
const STEP: usize = 256 << 10;
/// Bytes between two looks at the clock while the guest waits: what one read of a disk brings in.
const AHEAD_STEP: usize = 64 << 10;
/// A run for every second page of 4 GiB; a set like this is no use either.
const MAX_RUNS: usize = 1 << 19;
/// Entries of the page map read at once: 64 KiB.
const ENTRIES: usize = 8 << 10;

impl WorkingSet {
    /// What the guest has touched of a restored memory until now. `before` was prefetched.
    pub fn observe(memory: &Memory, before: Option<&Self>) -> io::Result<Self> {
        let mut runs: Vec<Run> = Vec::new();
        let mut entries = Entries::new(ENTRIES);
        for (range, host) in memory.mappings() {
            let pages = range.len as usize / PAGE_SIZE;
            for at in (0..pages).step_by(ENTRIES) {
                let host = host.wrapping_add(at * PAGE_SIZE);
                let first = range.file_offset / PAGE_SIZE as u64 + at as u64;
                let entries = entries.read(host, ENTRIES.min(pages - at))?;
                for (page, entry) in entries.iter().enumerate() {
                    if !entry.is_there() {
                        continue;
                    }
                    let page = u32::try_from(first + page as u64).map_err(io::Error::other)?;
                    let written = entry.holds_private_data();
                    match runs.last_mut() {
                        Some(run) if run.first + run.pages == page && run.written == written => {
                            run.pages += 1;
                        }
                        _ => runs.push(Run {
                            first: page,
                            pages: 1,
                            written,
                        }),
                    }
                }
            }
        }
        Ok(Self {
            memory_bytes: memory.size(),
            age: before.map_or(0, |before| before.age + 1),
            answered: false,
            runs,
        })
    }

    /// The same, of a wake that ended with a reply or not.
    pub fn of_reply(self, answered: bool) -> Self {
        Self { answered, ..self }
    }

    /// The same after one more wake with it. `None` if that was the first to be `answered`: it needed other pages, and
    /// its like must not go without them until a set is old.
    pub fn kept(&self, answered: bool) -> Option<Self> {
        (self.answered || !answered).then(|| Self {
            age: self.age + 1,
            ..self.clone()
        })
    }

    /// How many pages it has.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| u64::from(run.pages)).sum()
    }

    /// Whether it is time to take a new one, without this.
    pub fn is_old(&self) -> bool {
        self.age >= MAX_AGE
    }

    /// Puts its pages of `memory` into the guest's own page tables with `map`, in file order and no more than 64 MiB,
    /// until it `is_late`: how many of its runs are there. From a page cache that has them it is a matter of
    /// microseconds a page; a disk's time is [`Self::prefetch`]'s, beside the guest.
    pub fn map_ahead(
        &self,
        memory: &Memory,
        is_late: impl Fn() -> bool,
        mut map: impl FnMut(u64, u64) -> io::Result<()>,
    ) -> io::Result<usize> {
        let mut left = MAX_PREFETCH;
        let mut done = 0;
        for span in self.runs.chunk_by(Run::is_near) {
            let (first, last) = (span[0], span[span.len() - 1]); // never empty
            let (start, end) = (first.bytes().0, last.bytes().0 + last.bytes().1);
            if end - start > left {
                return Ok(done);
            }
            left -= end - start;
            for run in span.iter().filter(|run| run.written) {
                for (at, len) in steps(run.bytes()) {
                    if is_late() {
                        return Ok(done);
                    }
                    memory.populate(at, len, true)?;
                }
            }
            for (at, len) in steps((start, end - start)) {
                if is_late() {
                    return Ok(done);
                }
                for piece in memory.pieces(at, len) {
                    map(piece.start, piece.len)?;
                }
            }
            done += span.len();
        }
        Ok(self.runs.len())
    }

    /// How many runs it has, each of pages that follow one another.
    pub fn runs(&self) -> usize {
        self.runs.len()
    }

    /// Makes its pages of `memory` ready but for the first `done` runs, in file order and no more than 64 MiB, until
    /// that is `enough`. Stops where the host says no: the guest then takes its own faults.
    pub fn prefetch(&self, memory: &Memory, done: usize, enough: &AtomicBool) -> io::Result<()> {
        let before = self.runs.iter().take(done).map(|run| run.bytes().1);
        let mut left = MAX_PREFETCH.saturating_sub(before.sum());
        for run in self.runs.iter().skip(done) {
            let (start, bytes) = run.bytes();
            let bytes = bytes.min(left);
            for at in (0..bytes).step_by(STEP) {
                if enough.load(Ordering::Relaxed) {
                    return Ok(());
                }
                memory.populate(start + at, (bytes - at).min(STEP as u64), run.written)?;
            }
            left -= bytes;
        }
        Ok(())
    }

    /// The bytes of its file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let runs = self.runs.iter().take(MAX_RUNS);
        let mut body = Vec::with_capacity(self.runs.len() * RUN_BYTES);
        for run in runs {
            let mark = if run.written { WRITTEN } else { 0 };
            body.extend_from_slice(&run.first.to_le_bytes());
            body.extend_from_slice(&(run.pages | mark).to_le_bytes());
        }
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&FORMAT.to_le_bytes());
        let mark = if self.answered { ANSWERED } else { 0 };
        bytes.extend_from_slice(&(self.age | mark).to_le_bytes());
        bytes.extend_from_slice(&self.memory_bytes.to_le_bytes());
        bytes.extend_from_slice(&((body.len() / RUN_BYTES) as u64).to_le_bytes());
        let checksum = checksum(&bytes, &body);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// Reads the set at `path`, of a memory of `memory_bytes`; `None` if there is no file.
    pub fn read(path: &Path, memory_bytes: u64) -> Result<Option<Self>, Unusable> {
        let file = match super::open_plain(path, OFlag::O_RDONLY) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let most = HEADER_BYTES + MAX_RUNS * RUN_BYTES;
        let mut bytes = Vec::new();
        file.take(most as u64 + 1).read_to_end(&mut bytes)?;
        let set = Self::parse(&bytes).filter(|set| set.memory_bytes == memory_bytes);
        set.map(Some).ok_or(Unusable::Damaged)
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (head, body) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let (head, sum) = head.split_last_chunk::<8>()?;
        let word = |at: usize| Some(u32::from_le_bytes(*head.get(at..)?.first_chunk()?));
        let long = |at: usize| Some(u64::from_le_bytes(*head.get(at..)?.first_chunk()?));
        let whole = head.starts_with(&MAGIC)
            && word(8)? == FORMAT
            && long(24)? == (body.len() / RUN_BYTES) as u64
            && body.len() % RUN_BYTES == 0
            && u64::from_le_bytes(*sum) == checksum(head, body);
        let memory_bytes = long(16)?;
        let mut end = 0;
        let mut runs = Vec::with_capacity(body.len() / RUN_BYTES);
        for bytes in body.as_chunks::<RUN_BYTES>().0 {
            let (first, pages) = bytes.split_first_chunk::<4>()?;
            let first = u32::from_le_bytes(*first);
            let pages = u32::from_le_bytes(*pages.first_chunk()?);
            let run = Run {
                first,
                pages: pages & !WRITTEN,
                written: pages & WRITTEN != 0,
            };
            if run.pages == 0 || u64::from(first) < end {
                return None;
            }
            end = u64::from(first) + u64::from(run.pages);
            runs.push(run);
        }
        (whole && end * PAGE_SIZE as u64 <= memory_bytes).then_some(Self {
            memory_bytes,
            age: word(12)? & !ANSWERED,
            answered: word(12)? & ANSWERED != 0,
            runs,
        })
    }
}

fn checksum(head: &[u8], body: &[u8]) -> u64 {
    xxh3_64(&[head, body].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress};

    const BYTES: u64 = 32 << 20;

    fn memory() -> Memory {
        let mut file = tempfile::tempfile().unwrap();
        let mut pages = vec![0; BYTES as usize];
        for (number, page) in pages.chunks_mut(PAGE_SIZE).enumerate() {
            page[..4].copy_from_slice(&(number as u32 + 1).to_le_bytes());
        }
        file.write_all(&pages).unwrap();
        Memory::from_file(file, BYTES).unwrap()
    }

    fn set() -> WorkingSet {
        let memory = memory();
        for page in [3, 4, 700] {
            let at = GuestAddress(page * PAGE_SIZE as u64 + 8);
            memory.ram().write_slice(b"written", at).unwrap();
        }
        WorkingSet::observe(&memory, None).unwrap()
    }

    fn run(first: u32, pages: u32) -> Run {
        Run {
            first,
            pages,
            written: true,
        }
    }

    fn written(set: &WorkingSet) -> Vec<(u32, u32)> {
        let runs = set.runs.iter().filter(|run| run.written);
        runs.map(|run| (run.first, run.pages)).collect()
    }

    #[test]
    fn what_was_touched_is_prefetched_and_memory_stays_what_it_was() {
        let set = set();
        assert_eq!(written(&set), [(3, 2), (700, 1)]);
        let memory = memory();
        assert_eq!(WorkingSet::observe(&memory, None).unwrap().pages(), 0);
        set.prefetch(&memory, 0, &AtomicBool::new(true)).unwrap();
        assert_eq!(WorkingSet::observe(&memory, None).unwrap().pages(), 0);
        set.prefetch(&memory, 1, &AtomicBool::new(false)).unwrap();
        let rest = WorkingSet::observe(&memory, None).unwrap();
        assert_eq!(written(&rest), [(700, 1)]);
        set.prefetch(&memory, 0, &AtomicBool::new(false)).unwrap();
        let after = WorkingSet::observe(&memory, Some(&set)).unwrap();
        assert_eq!(written(&after), written(&set));
        assert_eq!((set.age, after.age), (0, 1));
        for page in 0..BYTES / PAGE_SIZE as u64 {
            let at = GuestAddress(page * PAGE_SIZE as u64);
            let number: u32 = memory.ram().read_obj(at).unwrap();
            assert_eq!(u64::from(number), page + 1);
        }
    }

    #[test]
    fn pages_near_each_other_are_mapped_together() {
        let memory = memory();
        let read = |first, pages| Run {
            written: false,
            ..run(first, pages)
        };
        let runs = vec![
            run(10, 2),
            read(12 + GAP, 1),
            read(13 + 2 * GAP + 1, 1),
            read(TABLE - 1, 1),
            run(TABLE, 1),
        ];
        let set = WorkingSet { runs, ..set() };
        let mut mapped = Vec::new();
        let all = set.map_ahead(
            &memory,
            || false,
            |start, len| {
                let page = PAGE_SIZE as u64;
                mapped.push(((start / page) as u32, (len / page) as u32));
                Ok(())
            },
        );
        assert_eq!(all.unwrap(), 5);
        let together = (10, 2 + GAP + 1);
        assert_eq!(
            mapped,
            [together, (14 + 2 * GAP, 1), (TABLE - 1, 1), (TABLE, 1)]
        );
        let after = WorkingSet::observe(&memory, None).unwrap();
        assert_eq!(written(&after), [(10, 2), (TABLE, 1)], "no more is copied");
    }

    #[test]
    fn pages_are_mapped_ahead_in_order_until_the_time_is_over() {
        let (set, memory) = (set(), memory());
        let page = PAGE_SIZE as u64;
        let mut mapped = Vec::new();
        let done = set.map_ahead(&memory, || true, |_, _| panic!("there was no time"));
        assert_eq!(done.unwrap(), 0);
        let in_time = || false;
        let done = set.map_ahead(&memory, in_time, |start, len| {
            mapped.push((start, len));
            Ok(())
        });
        assert_eq!(done.unwrap(), set.runs());
        assert_eq!(mapped, [(3 * page, 2 * page), (700 * page, page)]);
        let after = WorkingSet::observe(&memory, None).unwrap();
        assert_eq!(
            written(&after),
            written(&set),
            "copies are there before they are mapped"
        );
        // One that comes in the middle of a run: that one is done again, as a whole.
        let (long, first) = (
            WorkingSet {
                runs: vec![set.runs[0], run(64, 64)],
                ..set.clone()
            },
            1,
        );
        let late = std::cell::Cell::new(false);
        let is_late = || late.get();
        let done = long.map_ahead(&memory, is_late, |start, _| {
            late.set(start == 64 * page);
            Ok(())
        });
        assert_eq!(done.unwrap(), first);
        long.prefetch(&memory, first, &AtomicBool::new(false))
            .unwrap();
        let after = WorkingSet::observe(&memory, None).unwrap();
        assert_eq!(written(&after), [(3, 2), (64, 64), (700, 1)]);
        let refused = |_, _| Err(io::ErrorKind::Unsupported.into());
        assert!(set.map_ahead(&memory, in_time, refused).is_err());
    }

    #[test]
    fn a_set_is_read_as_it_was_written_and_any_damage_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("working_set");
        assert!(WorkingSet::read(&path, BYTES).unwrap().is_none());
        let set = set().of_reply(true).kept(true).unwrap();
        assert_eq!((set.age, set.answered), (1, true));
        let bytes = set.to_bytes();
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(WorkingSet::read(&path, BYTES).unwrap(), Some(set));
        assert!(WorkingSet::read(&path, 2 * BYTES).is_err(), "other memory");
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            assert!(WorkingSet::parse(&damaged).is_none(), "byte {at}");
            assert!(WorkingSet::parse(&bytes[..at]).is_none(), "{at} bytes");
        }
    }

    #[test]
    fn a_set_is_kept_until_it_is_old_or_a_better_one_can_be_had() {
        let asked = set().of_reply(true);
        let unasked = set().of_reply(false);
        assert_eq!(unasked.kept(true), None, "a request needs other pages");
        for set in [asked.kept(true), asked.kept(false), unasked.kept(false)] {
            assert_eq!(set.unwrap().age, 1);
        }
        let last = (0..MAX_AGE).fold(asked, |set, _| {
            assert!(!set.is_old());
            set.kept(true).unwrap()
        });
        assert!(last.is_old());
    }

    #[test]
    fn runs_that_do_not_fit_are_refused_whatever_their_checksum() {
        let run = |first, pages| Run {
            first,
            pages,
            written: false,
        };
        let all = (BYTES / PAGE_SIZE as u64) as u32;
        for runs in [
            vec![run(0, all + 1)],
            vec![run(all, 1)],
            vec![run(5, 2), run(6, 1)],
            vec![run(1, 0)],
            vec![run(u32::MAX, 0x7fff_ffff)],
        ] {
            let set = WorkingSet {
                memory_bytes: BYTES,
                age: 0,
                answered: false,
                runs,
            };
            assert!(WorkingSet::parse(&set.to_bytes()).is_none(), "{set:?}");
        }
    }
}
