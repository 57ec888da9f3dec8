//! What has happened in the guest: lines of output, start and end of the app.
//!
//! The journal keeps the newest lines within a fixed amount of memory and never makes a writer
//! wait for a reader: a host that is away for long finds a gap in the sequence numbers. Readers are
//! woken through an event descriptor of their own, so that they can wait for the journal and for
//! their connection in one `poll`.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::eventfd::{EfdFlags, EventFd};
use tern_guest::message::{AppState, MAX_LINE, Stream};
use tern_guest::{Event, ExitStatus};

/// The journal of one guest, shared by all threads.
#[derive(Default)]
pub struct Journal {
    inner: Mutex<Inner>,
    delivered: Condvar,
}

#[derive(Default)]
struct Inner {
    lines: VecDeque<Line>,
    bytes: usize,
    next_seq: u64,
    started: Option<i32>,
    exited: Option<ExitStatus>,
    delivered: bool,
    readers: Vec<Weak<EventFd>>,
}

struct Line {
    seq: u64,
    stream: Stream,
    unix_ms: u64,
    text: String,
}

/// How far one reader has come.
#[derive(Debug)]
pub struct Cursor {
    next: u64,
    told_started: bool,
    told_exited: bool,
}

impl Cursor {
    /// Whether there is nothing more to come.
    pub fn is_finished(&self) -> bool {
        self.told_exited
    }
}

impl Journal {
    /// Adds a line. The app's come cut into lines of [`MAX_LINE`]; init's own are cut here, for of a
    /// longer one no host could be told, nor of anything after it.
    pub fn line(&self, stream: Stream, mut text: String) {
        if stream == Stream::Init {
            text.truncate(text.floor_char_boundary(MAX_LINE));
        }
        let unix_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| {
                u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
            });
        let mut inner = self.lock();
        let seq = inner.next_seq;
        inner.next_seq += 1;
        inner.bytes += text.len() + LINE_OVERHEAD;
        inner.lines.push_back(Line {
            seq,
            stream,
            unix_ms,
            text,
        });
        while inner.bytes > MAX_BYTES {
            let Some(oldest) = inner.lines.pop_front() else {
                break;
            };
            inner.bytes -= oldest.text.len() + LINE_OVERHEAD;
        }
        inner.wake();
    }

    /// Notes that the app runs.
    pub fn started(&self, pid: i32) {
        let mut inner = self.lock();
        inner.started = Some(pid);
        inner.wake();
    }

    /// Notes that the app has ended. Lines that come later are not reported any more.
    pub fn exited(&self, status: ExitStatus) {
        let mut inner = self.lock();
        inner.exited = Some(status);
        inner.wake();
    }

    /// Notes that a host has read of the end.
    pub fn set_delivered(&self) {
        self.lock().delivered = true;
        self.delivered.notify_all();
    }

    /// Waits until a host has read of the end, or for so long.
    pub fn wait_delivered(&self, at_most: Duration) -> bool {
        let deadline = Instant::now() + at_most;
        let mut inner = self.lock();
        while !inner.delivered {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.delivered.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// How far the app has come, its process id, and its end.
    pub fn state(&self) -> (AppState, Option<i32>, Option<ExitStatus>) {
        let inner = self.lock();
        match (inner.started, inner.exited) {
            (_, Some(exit)) => (AppState::Exited, None, Some(exit)),
            (Some(pid), None) => (AppState::Running, Some(pid), None),
            (None, None) => (AppState::Starting, None, None),
        }
    }

    /// The sequence number that the next line will get.
    pub fn next_seq(&self) -> u64 {
        self.lock().next_seq
    }

    /// A cursor at line `from`. A number from the future stems from an earlier boot: it counts as 0.
    pub fn cursor(&self, from: u64) -> Cursor {
        let next = if from > self.lock().next_seq { 0 } else { from };
        Cursor {
            next,
            told_started: false,
            told_exited: false,
        }
    }

    /// The next events for a reader, at most `max` of them; none if there is nothing new.
    pub fn read(&self, cursor: &mut Cursor, max: usize) -> Vec<Event> {
        let inner = self.lock();
        let mut events = Vec::new();
        if let (Some(pid), false) = (inner.started, cursor.told_started) {
            cursor.told_started = true;
            events.push(Event::Started { pid });
        }
        let first = inner.lines.front().map_or(inner.next_seq, |line| line.seq);
        let skip = usize::try_from(cursor.next.saturating_sub(first)).unwrap_or(usize::MAX);
        for line in inner.lines.iter().skip(skip).take(max) {
            cursor.next = line.seq + 1;
            events.push(Event::Log {
                seq: line.seq,
                stream: line.stream,
                unix_ms: line.unix_ms,
                line: line.text.clone(),
            });
        }
        let read_all = inner.lines.back().is_none_or(|line| cursor.next > line.seq);
        if let (Some(status), false, true) = (inner.exited, cursor.told_exited, read_all) {
            cursor.told_exited = true;
            events.push(Event::Exited(status));
        }
        events
    }

    /// A descriptor that becomes readable whenever there may be news, until it is dropped.
    pub fn subscribe(&self) -> io::Result<Arc<EventFd>> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let reader = Arc::new(EventFd::from_value_and_flags(1, flags)?);
        self.lock().readers.push(Arc::downgrade(&reader));
        Ok(reader)
    }

    /// The newest lines as text, for the console after a failure.
    pub fn tail(&self, lines: usize) -> Vec<String> {
        let inner = self.lock();
        let skip = inner.lines.len().saturating_sub(lines);
        inner
            .lines
            .iter()
            .skip(skip)
            .map(|line| line.text.clone())
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A thread that panicked while it held the lock left a usable journal behind.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn wake(&mut self) {
        self.readers.retain(|reader| match reader.upgrade() {
            Some(reader) => {
                // It can only fail because the counter is full, and then the reader is awake.
                let _ = reader.write(1);
                true
            }
            None => false,
        });
    }
}

/// What the lines may take: many screens, yet little in a guest of 128 MiB.
const MAX_BYTES: usize = 512 * 1024;

/// Counted for each line beside its text, so that empty lines are not free.
const LINE_OVERHEAD: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn seqs(events: &[Event]) -> Vec<u64> {
        let seq = |event: &Event| match event {
            Event::Log { seq, .. } => Some(*seq),
            _ => None,
        };
        events.iter().filter_map(seq).collect()
    }

    #[test]
    fn a_reader_goes_on_where_the_last_one_stopped() {
        let journal = Journal::default();
        for n in 0..5 {
            journal.line(Stream::Stdout, n.to_string());
        }
        let mut cursor = journal.cursor(0);
        assert_eq!(seqs(&journal.read(&mut cursor, 3)), [0, 1, 2]);
        assert_eq!(seqs(&journal.read(&mut cursor, 3)), [3, 4]);
        assert!(journal.read(&mut cursor, 3).is_empty());
        assert_eq!(seqs(&journal.read(&mut journal.cursor(4), 3)), [4]);
        assert_eq!(
            seqs(&journal.read(&mut journal.cursor(99), 9)),
            [0, 1, 2, 3, 4]
        );
    }

    #[test]
    fn the_end_comes_last_and_to_every_reader() {
        let journal = Journal::default();
        journal.started(7);
        journal.line(Stream::Stderr, "bye".into());
        journal.exited(ExitStatus {
            code: 3,
            ..Default::default()
        });
        for _ in 0..2 {
            let mut cursor = journal.cursor(0);
            let mut events = Vec::new();
            while !cursor.is_finished() {
                events.extend(journal.read(&mut cursor, 1));
            }
            assert!(matches!(
                events[..],
                [
                    Event::Started { pid: 7 },
                    Event::Log { .. },
                    Event::Exited(ExitStatus { code: 3, .. })
                ]
            ));
        }
    }

    #[test]
    fn the_oldest_lines_make_room() {
        let journal = Journal::default();
        for _ in 0..1000 {
            journal.line(Stream::Stdout, "x".repeat(4096));
        }
        assert!(journal.lock().bytes <= MAX_BYTES);
        let first = seqs(&journal.read(&mut journal.cursor(0), 1))[0];
        assert!(first > 800, "{first}");
        for _ in 0..100_000 {
            journal.line(Stream::Stdout, String::new());
        }
        assert!(journal.lock().lines.len() <= MAX_BYTES / LINE_OVERHEAD);
    }

    #[test]
    fn subscribers_are_woken_and_forgotten() {
        let journal = Journal::default();
        let reader = journal.subscribe().unwrap();
        assert_eq!(reader.read().unwrap(), 1, "the first look is free");
        assert!(reader.read().is_err());
        journal.line(Stream::Init, "a".into());
        assert_eq!(reader.read().unwrap(), 1);
        drop(reader);
        journal.line(Stream::Init, "b".into());
        assert!(journal.lock().readers.is_empty());
    }

    #[test]
    fn delivery_is_waited_for() {
        let journal = Arc::new(Journal::default());
        assert!(!journal.wait_delivered(Duration::from_millis(1)));
        let other = Arc::clone(&journal);
        let thread = std::thread::spawn(move || other.set_delivered());
        assert!(journal.wait_delivered(Duration::from_secs(10)));
        thread.join().unwrap();
    }
}
