//! The access log: one JSON object per request, written by a thread of its own. A request never waits for the disk:
//! what the disk is too slow for is lost, and counted.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use serde::Serialize;

use crate::metrics::Metrics;

/// How an access log is kept.
#[derive(Debug, Clone)]
pub struct AccessLogConfig {
    /// The file that lines are added to; standard output where there is none. One that was moved away is made anew.
    pub path: Option<PathBuf>,
    /// The part of all requests that is written, from 0 to 1.
    pub sample: f64,
}

/// One request. Documented in `docs/edge.md`.
#[derive(Debug, Serialize)]
pub struct Line<'a> {
    /// When its head had been read, RFC 3339.
    pub time: String,
    pub request_id: &'a str,
    pub client: &'a str,
    pub host: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub app: Option<&'a str>,
    /// The Machine that had it last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<&'a str>,
    pub method: &'a str,
    /// Path and query.
    pub path: &'a str,
    pub protocol: &'static str,
    pub port: u16,
    pub tls: bool,
    /// 0 where its client got none.
    pub status: u16,
    /// Bytes of content.
    pub received: u64,
    pub sent: u64,
    pub duration_ms: f64,
    /// For a place at a Machine, its start included.
    pub waited_ms: f64,
    /// Until the app's head was there, from when it was sent the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub app_ms: Option<f64>,
    /// Its reply is whole with its client.
    pub whole: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_agent: Option<&'a str>,
    /// Of W3C's `traceparent`, which is passed on as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<&'a str>,
}

/// Where lines are given. Clones share it.
#[derive(Debug, Clone)]
pub struct AccessLog {
    lines: SyncSender<Vec<u8>>,
    sample: f64,
    metrics: Arc<Metrics>,
}

/// Lines that wait for the disk.
const WAITING: usize = 8192;
/// Between two looks whether the file is still where it was.
const LOOK: Duration = Duration::from_secs(1);
/// Longest text of a client's that is written of one field.
const LONGEST: usize = 2048;

impl AccessLog {
    /// Opens the log, and begins its thread, which ends with the last clone.
    pub fn open(config: AccessLogConfig, metrics: Arc<Metrics>) -> io::Result<Self> {
        let sink = Sink::open(config.path)?;
        let (lines, incoming) = sync_channel(WAITING);
        let counted = Arc::clone(&metrics);
        thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || sink.write(&incoming, &counted))?;
        Ok(Self {
            lines,
            sample: config.sample,
            metrics,
        })
    }

    /// Whether the next request is among those that are written.
    pub fn takes(&self) -> bool {
        self.sample >= 1.0 || rand::random::<f64>() < self.sample
    }

    /// Has a line written, or loses it.
    pub fn give(&self, line: &Line<'_>) {
        let Ok(mut text) = serde_json::to_vec(line) else {
            return;
        };
        text.push(b'\n');
        if self.lines.try_send(text).is_err() {
            self.metrics.access_log_lost.add();
        }
    }
}

/// A client's text, as much of it as is written.
pub fn shortened(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(LONGEST)]).into_owned()
}

/// The trace that a request is part of: 32 hexadecimal digits (W3C Trace Context, section 3.2.2.3).
pub fn trace_id(traceparent: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(traceparent).ok()?;
    let id = text.split('-').nth(1)?;
    (id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit())).then_some(id)
}

enum Sink {
    Stdout,
    File(PathBuf, BufWriter<File>),
}

impl Sink {
    fn open(path: Option<PathBuf>) -> io::Result<Self> {
        let Some(path) = path else {
            return Ok(Self::Stdout);
        };
        let file = append(&path)?;
        Ok(Self::File(path, BufWriter::new(file)))
    }

    fn write(mut self, incoming: &Receiver<Vec<u8>>, metrics: &Metrics) {
        let mut well = true;
        loop {
            let next = incoming.recv_timeout(LOOK);
            let ended = next == Err(RecvTimeoutError::Disconnected);
            let mut taken = 0;
            let lines = next.ok().into_iter().chain(incoming.try_iter());
            let outcome = self.write_all(lines.inspect(|_| taken += 1));
            match outcome {
                Ok(()) => well = true,
                Err(error) => {
                    // Some of them may be there: those behind them are not.
                    metrics.access_log_lost.add_all(taken);
                    if std::mem::replace(&mut well, false) {
                        tracing::warn!(%error, "the access log cannot be written");
                    }
                }
            }
            if ended {
                return;
            }
        }
    }

    /// Writes what there is, into a new file where the old one was moved away (as `logrotate` does).
    fn write_all(&mut self, lines: impl Iterator<Item = Vec<u8>>) -> io::Result<()> {
        match self {
            Self::Stdout => {
                let mut out = io::stdout().lock();
                for line in lines {
                    out.write_all(&line)?;
                }
                out.flush()
            }
            Self::File(path, file) => {
                let here = std::fs::metadata(&*path).map(|m| (m.dev(), m.ino())).ok();
                let open = file.get_ref().metadata().map(|m| (m.dev(), m.ino())).ok();
                if here != open {
                    *file = BufWriter::new(append(path)?);
                }
                for line in lines {
                    file.write_all(&line)?;
                }
                file.flush()
            }
        }
    }
}

fn append(path: &PathBuf) -> io::Result<File> {
    let opened = OpenOptions::new().create(true).append(true).open(path);
    opened.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(id: &str) -> Line<'_> {
        Line {
            time: String::new(),
            request_id: id,
            client: "192.0.2.7",
            host: "shop.example",
            app: Some("shop"),
            machine: None,
            method: "GET",
            path: "/\"\n",
            protocol: "HTTP/2",
            port: 443,
            tls: true,
            status: 200,
            received: 0,
            sent: 3,
            duration_ms: 1.5,
            waited_ms: 0.0,
            app_ms: Some(1.0),
            whole: true,
            user_agent: None,
            trace_id: None,
        }
    }

    /// The lines of a file, once there are so many.
    fn lines(path: &std::path::Path, count: usize) -> Vec<serde_json::Value> {
        loop {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            let all: Vec<_> = text
                .lines()
                .map(|l| serde_json::from_str(l).unwrap())
                .collect();
            if all.len() >= count && text.ends_with('\n') {
                return all;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn lines_follow_the_file_s_name_and_are_one_object_each() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("access.log");
        let config = AccessLogConfig {
            path: Some(path.clone()),
            sample: 1.0,
        };
        let log = AccessLog::open(config, Arc::default()).unwrap();
        assert!(log.takes());
        log.give(&line("a"));
        log.give(&line("b"));
        let all = lines(&path, 2);
        assert_eq!(
            (&all[0]["request_id"], &all[1]["request_id"]),
            (&"a".into(), &"b".into())
        );
        assert_eq!(all[0]["path"], "/\"\n");
        assert!(all[0].get("machine").is_none());
        // Moved away, as logrotate does.
        let old = dir.path().join("access.log.1");
        std::fs::rename(&path, &old).unwrap();
        log.give(&line("c"));
        assert_eq!(lines(&path, 1)[0]["request_id"], "c");
        assert_eq!(lines(&old, 2).len(), 2);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_told_at_once() {
        let config = AccessLogConfig {
            path: Some("/nowhere/at/all".into()),
            sample: 1.0,
        };
        let error = AccessLog::open(config, Arc::default()).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
    }

    #[test]
    fn traces_are_known_by_their_ids() {
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        assert_eq!(
            trace_id(format!("00-{id}-00f067aa0ba902b7-01").as_bytes()),
            Some(id)
        );
        for bad in [
            "",
            "00",
            "00-zz-1-1",
            "00-4bf92f3577b34da6a3ce929d0e0e473-1-1",
        ] {
            assert_eq!(trace_id(bad.as_bytes()), None, "{bad}");
        }
    }
}
