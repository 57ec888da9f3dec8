//! The end of what another program says, kept for an error message.

use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// Bytes kept: about a screen and a half.
const KEPT: usize = 4096;

/// Reads along until the other side ends, and remembers the last bytes.
#[derive(Debug)]
pub struct Tail {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Tail {
    /// Reads `from` to its end, and then calls `at_end`.
    pub fn of(
        mut from: impl Read + Send + 'static,
        at_end: impl FnOnce() + Send + 'static,
    ) -> Self {
        let bytes: Arc<Mutex<Vec<u8>>> = Arc::default();
        let kept = bytes.clone();
        let reader = thread::spawn(move || {
            let mut piece = [0; KEPT];
            while let Ok(length @ 1..) = from.read(&mut piece) {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend_from_slice(&piece[..length]);
                let surplus = kept.len().saturating_sub(KEPT);
                kept.drain(..surplus);
            }
            at_end();
        });
        Self {
            bytes,
            reader: Some(reader),
        }
    }

    /// The last lines. Waits for the end of the other side, which must have ended or be about to.
    pub fn last_lines(&mut self) -> Vec<String> {
        if let Some(reader) = self.reader.take() {
            // If it panicked, it kept something all the same.
            let _ = reader.join();
        }
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes)
            .lines()
            .map(|line| line.trim_end().to_owned())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn keeps_the_end_and_tells_when_it_comes() {
        let words = "filler\n".repeat(KEPT) + "the\r\nend \n";
        let (done, ended) = mpsc::channel();
        let mut tail = Tail::of(std::io::Cursor::new(words), move || done.send(()).unwrap());
        ended.recv().unwrap();
        let lines = tail.last_lines();
        assert_eq!(lines[lines.len() - 2..], ["the", "end"]);
        assert!(lines.iter().map(|line| line.len() + 1).sum::<usize>() <= KEPT);
    }
}
