//! The output of one Machine's app: kept in a bounded file, told to whoever follows.
//!
//! Lines get numbers that only grow, over restarts of the Machine and of the agent. `console.log`
//! holds one JSON object per line; when it is full it becomes `console.log.1`, and what was there is
//! forgotten. Whoever follows is told new lines from memory, and one that is slow reads on in the files, as far as they
//! still have what it missed. A guest numbers its lines anew with each cold start, so a line also says of which
//! start it is; from the last one kept, the next agent knows where to go on.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Take, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tern_guest::message::Stream;
use tokio::sync::broadcast;

use crate::last_words::last_words;
use crate::metrics::Metrics;

mod reader;

pub use reader::{LogItem, LogReader};

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
            Some((last_boot, seq)) if last_boot == boot => seq.saturating_add(1),
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
            let lost = (seq - last - 1).min(MOST_LOST);
            self.metrics.log_lines_lost.add(lost);
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
    pub(crate) fn read(self: &Arc<Self>, from: u64, follow: bool) -> io::Result<LogReader> {
        let inner = self.inner.lock();
        // What is in the files now is read there, and all later lines are news.
        let news = follow.then(|| self.news.subscribe());
        let next = from.max(inner.next);
        let files = self.open_kept(&inner, MAX_FILE)?;
        drop(inner);
        Ok(LogReader::new(self, last_lines(files, from)?, news, next))
    }

    /// Lines with these numbers, the first of them, as far as they are kept.
    fn kept(&self, numbers: Range<u64>) -> io::Result<VecDeque<LogLine>> {
        let files = self.open_kept(&self.inner.lock(), MAX_FILE)?;
        lines(files, numbers).take(MAX_READ).collect()
    }

    /// The last lines, for a reason that a person can act on.
    pub(crate) fn last_words(&self) -> String {
        // Little is read, so that a task may do it that does other things too.
        let files = self.open_kept(&self.inner.lock(), LONGEST_LINE);
        let kept = lines(files.unwrap_or_default(), 0..u64::MAX).filter_map(Result::ok);
        let kept: Vec<LogLine> = kept.collect();
        last_words(kept.iter().map(|line| line.line.as_str()))
    }

    /// Opens the ends of what is kept, the older file first, to read this much of each at most. No line comes in
    /// meanwhile: one could rename the file that is not open yet to the one that already is. Each is read to
    /// where it ends now, which is the end of a line.
    fn open_kept(&self, _no_line_comes: &Inner, most: u64) -> io::Result<Vec<Take<File>>> {
        let open = |path: &Path| match open_end(path, most) {
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

/// The last lines in these files, from number `from` on, at most [`MAX_READ`] of them.
fn last_lines(files: Vec<Take<File>>, from: u64) -> io::Result<VecDeque<LogLine>> {
    let mut last = VecDeque::new();
    for line in lines(files, from..u64::MAX) {
        if last.len() == MAX_READ {
            last.pop_front();
        }
        last.push_back(line?);
    }
    Ok(last)
}

/// The lines in these files that have these numbers.
fn lines(files: Vec<Take<File>>, numbers: Range<u64>) -> impl Iterator<Item = io::Result<LogLine>> {
    let texts = files
        .into_iter()
        .flat_map(|file| BufReader::new(file).split(b'\n'));
    texts.filter_map(move |text| {
        let parse = |text: Vec<u8>| {
            // A line that was cut by a crash is not one.
            let line = serde_json::from_slice::<LogLine>(&text).ok()?;
            numbers.contains(&line.number).then_some(line)
        };
        text.map(parse).transpose()
    })
}

/// A line as JSON, with every byte escaped, and one that was cut after it.
const LONGEST_LINE: u64 = 128 * 1024;
/// A Machine keeps between one and two of these.
const MAX_FILE: u64 = 4 << 20;
/// Lines that count as lost at once: the guest says how many, and the count is all Machines' together. A busy app writes
/// as many in some seconds.
const MOST_LOST: u64 = 1_000_000;
/// Lines a reader gets of what was kept, and holds at once.
const MAX_READ: usize = 10_000;
/// Lines a follower may be behind before it has to look for the next ones in the files.
const FOLLOWED: usize = 1024;

#[cfg(test)]
mod tests;
