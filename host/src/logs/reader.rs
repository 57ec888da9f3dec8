//! Reads what was kept, then what comes, and falls back on what is kept where more comes than it takes.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use tokio::sync::broadcast::{Receiver, error::RecvError};

use super::{LogLine, Logs};
use crate::metrics::Metrics;

/// Reads a Machine's output; see [`LogReader::next`].
#[derive(Debug)]
pub struct LogReader {
    /// Told first.
    pub(super) kept: VecDeque<LogLine>,
    /// The first number that neither was told nor is in `kept`.
    next: u64,
    /// A line of the news that comes later than `next`.
    ahead: Option<Arc<LogLine>>,
    news: Option<Receiver<Arc<LogLine>>>,
    /// Not held: the news are over when the Machine is gone.
    logs: Weak<Logs>,
    metrics: Arc<Metrics>,
}

/// What a reader is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogItem {
    /// A line.
    Line(LogLine),
    /// The reader was too slow: this many lines were forgotten before it came to them. The next ones follow.
    Dropped(u64),
}

impl LogReader {
    pub(super) fn new(
        logs: &Arc<Logs>,
        kept: VecDeque<LogLine>,
        news: Option<Receiver<Arc<LogLine>>>,
        next: u64,
    ) -> Self {
        Self {
            kept,
            next,
            ahead: None,
            news,
            logs: Arc::downgrade(logs),
            metrics: Arc::clone(&logs.metrics),
        }
    }

    /// The next line; `None` when there is none and none is followed, or the Machine is gone.
    pub async fn next(&mut self) -> Option<LogItem> {
        loop {
            if let Some(line) = self.kept.pop_front() {
                self.next = self.next.max(line.number + 1);
                return Some(LogItem::Line(line));
            }
            let line = match self.ahead.take() {
                Some(line) => line,
                None => self.news().await?,
            };
            if line.number == self.next {
                self.next += 1;
                return Some(LogItem::Line(LogLine::clone(&line)));
            }
            let ahead = line.number;
            self.ahead = Some(line);
            self.catch_up(ahead).await;
            let found = self.kept.front().map_or(ahead, |line| line.number);
            let missed = found.saturating_sub(self.next);
            if missed > 0 {
                self.next = found;
                self.metrics.log_lines_missed.add(missed);
                return Some(LogItem::Dropped(missed));
            }
        }
    }

    /// The next new line that was not told yet.
    async fn news(&mut self) -> Option<Arc<LogLine>> {
        loop {
            match self.news.as_mut()?.recv().await {
                Ok(line) if line.number >= self.next => return Some(line),
                // What was left out is seen by the next line's number.
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return None,
            }
        }
    }

    /// Reads on in the files, before the line that has this number.
    async fn catch_up(&mut self, ahead: u64) {
        let Some(logs) = self.logs.upgrade() else {
            return;
        };
        let numbers = self.next..ahead;
        let path = logs.path.clone();
        match tokio::task::spawn_blocking(move || logs.kept(numbers)).await {
            Ok(Ok(kept)) => self.kept = kept,
            Ok(Err(error)) => {
                tracing::warn!(path = %path.display(), %error, "kept output cannot be read");
            }
            // The agent ends.
            Err(_) => {}
        }
    }
}
