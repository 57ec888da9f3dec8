//! The output of one Machine's app: kept in a bounded file, told to whoever follows.
//!
//! Lines get numbers that only grow, over restarts of the Machine and of the agent. `console.log`
//! holds one JSON object per line; when it is full it becomes `console.log.1`, and what was there is
//! forgotten. A guest numbers its lines anew with each cold start, so a line also says of which
//! start it is; from the last one kept, the next agent knows where to go on.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Take, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tern_guest::message::Stream;
use tokio::sync::broadcast;

use crate::metrics::Metrics;

/// One line of output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Its number: it grows from line to line, with gaps where lines were lost.
    #[serde(rename = "n")]
    pub number: u64,
    /// When it was written, in milliseconds of Unix time, by the guest's clock.
    #[serde(rename = "t")]
    pub unix_ms: u64,
    /// Who wrote it.
    #[serde(rename = "s")]
    pub stream: Stream,
    /// The line.
    #[serde(rename = "l")]
    pub line: String,
    /// The cold start it belongs to.
    #[serde(rename = "b")]
    boot: u64,
    /// The guest's own number.
    #[serde(rename = "q")]
    seq: u64,
}

/// The output of one Machine.
#[derive(Debug)]
pub(crate) struct Logs {
    path: PathBuf,
    inner: Mutex<Inner>,
    news: broadcast::Sender<Arc<LogLine>>,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
struct Inner {
    file: Option<File>,
    length: u64,
    next: u64,
    /// Boot and number of the last line of the guest's.
    last: Option<(u64, u64)>,
}

/// Reads a Machine's output; see [`LogReader::next`].
#[derive(Debug)]
pub struct LogReader {
    kept: VecDeque<LogLine>,
    news: Option<broadcast::Receiver<Arc<LogLine>>>,
    next: u64,
    metrics: Arc<Metrics>,
}

/// What a reader is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogItem {
    /// A line.
    Line(LogLine),
    /// The reader was too slow: this many lines were not told, and nothing follows.
    Dropped(u64),
}

impl Logs {
    pub(crate) fn new(path: PathBuf, metrics: Arc<Metrics>) -> Self {
        let last = last_kept(&path).or_else(|| last_kept(&previous(&path)));
        let inner = Inner {
            file: None,
            length: 0,
            next: last.as_ref().map_or(0, |l| l.number + 1),
            last: last.map(|l| (l.boot, l.seq)),
        };
        Self {
            path,
            inner: Mutex::new(inner),
            news: broadcast::channel(FOLLOWED).0,
            metrics,
        }
    }

    /// The first of the guest's numbers that is not here yet.
    pub(crate) fn wanted_from(&self, boot: u64) -> u64 {
        match self.inner.lock().last {
            Some((last_boot, seq)) if last_boot == boot => seq + 1,
            _ => 0,
        }
    }

    /// Takes a line of the guest's.
    pub(crate) fn push(&self, boot: u64, seq: u64, stream: Stream, unix_ms: u64, line: String) {
        let mut inner = self.inner.lock();
        if let Some((last_boot, last)) = inner.last
            && last_boot == boot
        {
            if seq <= last {
                return;
            }
            self.metrics.log_lines_lost.add(seq - last - 1);
        }
        inner.last = Some((boot, seq));
        let line = LogLine {
            number: inner.next,
            unix_ms,
            stream,
            line,
            boot,
            seq,
        };
        inner.next += 1;
        self.metrics.log_lines.add(1);
        if let Err(error) = inner.keep(&self.path, &line) {
            tracing::warn!(path = %self.path.display(), %error, "output cannot be kept");
            inner.file = None;
        }
        // Told under the lock, so in order. Nobody listening is no error.
        let _ = self.news.send(Arc::new(line));
    }

    /// The lines from number `from` on, as far as they are kept; then, with `follow`, the new ones.
    pub(crate) fn read(&self, from: u64, follow: bool) -> io::Result<LogReader> {
        // Listening begins first: what comes in between is told twice and skipped once.
        let news = follow.then(|| self.news.subscribe());
        let kept = read_kept(self.open_kept()?, from)?;
        Ok(LogReader {
            kept,
            news,
            next: from,
            metrics: Arc::clone(&self.metrics),
        })
    }

    /// The last lines, for a reason that a person can act on.
    pub(crate) fn tail(&self, lines: usize) -> Vec<String> {
        let kept = self.open_kept().and_then(|files| read_kept(files, 0));
        let kept = kept.unwrap_or_default();
        let skip = kept.len().saturating_sub(lines);
        kept.into_iter().skip(skip).map(|l| l.line).collect()
    }

    /// Opens what is kept, the older file first. No line comes in meanwhile: one could rename the file that is not
    /// open yet to the one that already is. Each is read to where it ends now, which is the end of a line.
    fn open_kept(&self) -> io::Result<Vec<Take<File>>> {
        let _no_line_comes = self.inner.lock();
        let open = |path: &Path| match open_end(path, MAX_FILE) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            outcome => Some(outcome),
        };
        let files = [open(&previous(&self.path)), open(&self.path)];
        files.into_iter().flatten().collect()
    }
}

impl Inner {
    fn keep(&mut self, path: &Path, line: &LogLine) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        if self.file.is_none() {
            let mut file = File::options().create(true).append(true).open(path)?;
            self.length = file.metadata()?.len();
            if self.length > 0 {
                // A crash may have cut the last line: it must not take the next one with it.
                file.write_all(b"\n")?;
                self.length += 1;
            }
            self.file = Some(file);
        }
        if self.length + text.len() as u64 > MAX_FILE {
            std::fs::rename(path, previous(path))?;
            self.file = Some(File::options().create(true).append(true).open(path)?);
            self.length = 0;
        }
        if let Some(file) = &mut self.file {
            file.write_all(&text)?;
            self.length += text.len() as u64;
        }
        Ok(())
    }
}

impl LogReader {
    /// The next line; `None` when there is none and none is followed, or the Machine is gone.
    pub async fn next(&mut self) -> Option<LogItem> {
        while let Some(line) = self.kept.pop_front() {
            if line.number >= self.next {
                self.next = line.number + 1;
                return Some(LogItem::Line(line));
            }
        }
        loop {
            match self.news.as_mut()?.recv().await {
                Ok(line) if line.number < self.next => {}
                Ok(line) => {
                    self.next = line.number + 1;
                    return Some(LogItem::Line(LogLine::clone(&line)));
                }
                Err(broadcast::error::RecvError::Lagged(lines)) => {
                    self.metrics.log_readers_dropped.add(1);
                    self.news = None;
                    return Some(LogItem::Dropped(lines));
                }
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

fn previous(path: &Path) -> PathBuf {
    path.with_extension("log.1")
}

/// The last bytes of a file, this many at most, and nothing that is written later.
fn open_end(path: &Path, most: u64) -> io::Result<Take<File>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(most)))?;
    Ok(file.take(length.min(most)))
}

/// The last line of a file.
fn last_kept(path: &Path) -> Option<LogLine> {
    let mut bytes = Vec::new();
    let mut end = open_end(path, LONGEST_LINE).ok()?;
    end.read_to_end(&mut bytes).ok()?;
    let lines = bytes.rsplit(|&b| b == b'\n');
    // A line that was cut by a crash is not one.
    lines
        .filter_map(|line| serde_json::from_slice(line).ok())
        .next()
}

/// The lines kept in these files, from number `from` on, at most [`MAX_READ`] of them.
fn read_kept(files: Vec<Take<File>>, from: u64) -> io::Result<VecDeque<LogLine>> {
    let mut kept = VecDeque::new();
    for file in files {
        let mut reader = BufReader::new(file);
        let mut text = Vec::new();
        loop {
            text.clear();
            if reader.read_until(b'\n', &mut text)? == 0 {
                break;
            }
            // A line that was cut by a crash is not one.
            if let Ok(line) = serde_json::from_slice::<LogLine>(&text)
                && line.number >= from
            {
                if kept.len() == MAX_READ {
                    kept.pop_front();
                }
                kept.push_back(line);
            }
        }
    }
    Ok(kept)
}

/// A line as JSON, with every byte escaped, and one that was cut after it.
const LONGEST_LINE: u64 = 128 * 1024;
/// A Machine keeps between one and two of these.
const MAX_FILE: u64 = 4 << 20;
/// Lines a reader gets of what was kept.
const MAX_READ: usize = 10_000;
/// Lines a follower may be behind before it is dropped.
const FOLLOWED: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn logs(dir: &Path) -> Logs {
        Logs::new(dir.join("console.log"), Arc::default())
    }

    fn push(logs: &Logs, boot: u64, seq: u64) {
        logs.push(boot, seq, Stream::Stdout, 7, format!("line {boot}.{seq}"));
    }

    async fn numbers(reader: &mut LogReader, count: usize) -> Vec<u64> {
        let mut numbers = Vec::new();
        while numbers.len() < count {
            match reader.next().await {
                Some(LogItem::Line(line)) => numbers.push(line.number),
                other => panic!("{other:?} after {numbers:?}"),
            }
        }
        numbers
    }

    #[tokio::test]
    async fn lines_are_kept_followed_and_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let logs = logs(dir.path());
        push(&logs, 1, 0);
        push(&logs, 1, 1);
        push(&logs, 1, 1);
        let mut reader = logs.read(1, true).unwrap();
        push(&logs, 1, 2);
        push(&logs, 2, 0);
        assert_eq!(numbers(&mut reader, 3).await, [1, 2, 3]);
        let mut all = logs.read(0, false).unwrap();
        assert_eq!(numbers(&mut all, 4).await, [0, 1, 2, 3]);
        assert_eq!(all.next().await, None);
        drop(logs);
        assert_eq!(reader.next().await, None);
    }

    #[test]
    fn the_next_agent_goes_on_where_this_one_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let first = logs(dir.path());
        assert_eq!(first.wanted_from(3), 0);
        push(&first, 3, 0);
        push(&first, 3, 4);
        assert_eq!(first.metrics.log_lines_lost.get(), 3);
        drop(first);
        std::fs::OpenOptions::new()
            .append(true)
            .open(dir.path().join("console.log"))
            .unwrap()
            .write_all(b"{\"n\":9,\"t\"")
            .unwrap();
        let second = logs(dir.path());
        assert_eq!((second.wanted_from(3), second.wanted_from(4)), (5, 0));
        push(&second, 4, 0);
        assert_eq!(second.tail(5), ["line 3.0", "line 3.4", "line 4.0"]);
    }

    #[tokio::test]
    async fn a_slow_follower_is_dropped_with_a_notice() {
        let dir = tempfile::tempdir().unwrap();
        let logs = logs(dir.path());
        let mut reader = logs.read(0, true).unwrap();
        for seq in 0..=(FOLLOWED as u64) {
            push(&logs, 1, seq);
        }
        assert_eq!(reader.next().await, Some(LogItem::Dropped(1)));
        assert_eq!(reader.next().await, None);
        assert_eq!(logs.metrics.log_readers_dropped.get(), 1);
    }

    #[test]
    fn the_file_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let logs = logs(dir.path());
        let line = "x".repeat(8000);
        for seq in 0..1500 {
            logs.push(1, seq, Stream::Stderr, 0, line.clone());
        }
        let sizes: u64 = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().metadata().unwrap().len())
            .sum();
        assert!(sizes > MAX_FILE && sizes <= 2 * MAX_FILE, "{sizes}");
        assert_eq!(
            logs.read(0, false).unwrap().kept.back().unwrap().number,
            1499
        );
    }

    #[test]
    fn no_line_is_missing_where_a_file_is_full() {
        let dir = tempfile::tempdir().unwrap();
        let logs = logs(dir.path());
        let line = "x".repeat(8000);
        let mut seq = 0;
        let length = || std::fs::metadata(&logs.path).map_or(0, |m| m.len());
        let mut push_until_renamed = || {
            let mut before = 0;
            while length() >= before {
                before = length();
                logs.push(1, seq, Stream::Stdout, 0, line.clone());
                seq += 1;
            }
        };
        push_until_renamed();
        push_until_renamed();
        let files = logs.open_kept().unwrap();
        push_until_renamed();
        let read = read_kept(files, 0).unwrap();
        assert!(read.len() > 500, "{} lines", read.len());
        assert_without_gap(&read);
    }

    #[test]
    fn no_line_is_missing_while_others_come() {
        let dir = tempfile::tempdir().unwrap();
        let logs = logs(dir.path());
        std::thread::scope(|threads| {
            // Some ten files.
            let writer = threads.spawn(|| {
                let line = "x".repeat(8000);
                for seq in 0..5000 {
                    logs.push(1, seq, Stream::Stdout, 0, line.clone());
                }
            });
            while !writer.is_finished() {
                assert_without_gap(&logs.read(0, false).unwrap().kept);
            }
        });
    }

    fn assert_without_gap(lines: &VecDeque<LogLine>) {
        let numbers: Vec<u64> = lines.iter().map(|line| line.number).collect();
        for pair in numbers.windows(2) {
            assert_eq!(pair[0] + 1, pair[1], "of {} lines", numbers.len());
        }
    }
}
