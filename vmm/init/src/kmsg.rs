//! The kernel's log: where init says what it does, and where the kernel says whom it killed.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;

/// Says something to whoever reads `dmesg`.
pub fn info(message: &str) {
    write(6, message);
}

/// Says something that belongs on the serial console too, even a quiet one.
pub fn error(message: &str) {
    write(2, message);
}

fn write(level: u8, message: &str) {
    // There is nobody to tell if this fails.
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") {
        for line in message.lines() {
            let _ = log.write_all(format!("<{level}>tern-init: {line}\n").as_bytes());
        }
    }
}

/// Listens for the kernel killing processes because memory has run out.
pub struct OomWatch {
    log: Option<File>,
}

impl OomWatch {
    /// Listens from now on.
    pub fn start() -> Self {
        let log = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg");
        let log = log.and_then(|mut log| log.seek(SeekFrom::End(0)).map(|_| log));
        Self { log: log.ok() }
    }

    /// The processes killed since the last call. The kernel logs before it kills, so the lines of a
    /// process that is already reaped are there.
    pub fn killed(&mut self) -> Vec<i32> {
        let Some(log) = &mut self.log else {
            return Vec::new();
        };
        let mut killed = Vec::new();
        let mut record = [0; MAX_RECORD];
        for _ in 0..MAX_RECORDS {
            match log.read(&mut record) {
                Ok(0) => break,
                Ok(length) => killed.extend(killed_pid(&record[..length])),
                // Records were overwritten before we came: the next read goes on behind the gap.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        killed
    }
}

/// The process that a kernel record says was killed for its memory.
fn killed_pid(record: &[u8]) -> Option<i32> {
    let text = String::from_utf8_lossy(record);
    let (prefix, message) = text.split_once(';')?;
    // The facility is in the bits above the level; the kernel's is 0. Anybody with root in the guest
    // can write here, but not in the kernel's name.
    let priority: u32 = prefix.split(',').next()?.parse().ok()?;
    if priority >> 3 != 0 || !message.contains("ut of memory: Killed process ") {
        return None;
    }
    let (_, rest) = message.split_once("Killed process ")?;
    rest.split(|c: char| !c.is_ascii_digit())
        .next()?
        .parse()
        .ok()
}

/// `PRINTKRB_RECORD_MAX` and more: a longer record would fail to be read.
const MAX_RECORD: usize = 8192;

/// A full kernel log has fewer; a flood must not hold up the end of the Machine.
const MAX_RECORDS: usize = 20_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_for_running_out_of_memory() {
        let global = "3,612,7291,-;Out of memory: Killed process 231 (app) total-vm:1052kB, \
                      anon-rss:940kB, UID:0 pgtables:40kB oom_score_adj:0\n SUBSYSTEM=x\n";
        assert_eq!(killed_pid(global.as_bytes()), Some(231));
        let group =
            "3,612,7291,-;Memory cgroup out of memory: Killed process 17 (x) total-vm:1kB\n";
        assert_eq!(killed_pid(group.as_bytes()), Some(17));
    }

    #[test]
    fn others_words_do_not_count() {
        for record in [
            "11,612,7291,-;Out of memory: Killed process 231 (app)\n",
            "6,1,2,-;Killed process\n",
            "3,1,2,-;Out of memory: Killed process x\n",
            "3,1,2,-;Out of memory: Killed process 99999999999999999999 (x)\n",
            "garbage",
            "",
            ";",
        ] {
            assert_eq!(killed_pid(record.as_bytes()), None, "{record}");
        }
    }
}
