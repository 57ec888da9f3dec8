//! What the kernel says of a measured process: its memory, and when its guest first ran.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

const TRACEFS: &str = "/sys/kernel/tracing";

/// CLOCK_MONOTONIC in milliseconds: the clock that the trace is told to use.
pub fn now_ms() -> Result<f64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(now.tv_sec() as f64 * 1e3 + now.tv_nsec() as f64 / 1e6)
}

/// The kernel's `kvm:kvm_entry` events, written at each entry into a guest.
#[derive(Debug)]
pub struct EntryTrace {
    pipe: File,
}

impl EntryTrace {
    /// Begins with an empty buffer. No other guest may run on this host.
    pub fn start() -> Result<Self> {
        let tracing = Path::new(TRACEFS);
        if !tracing.join("trace_clock").exists() {
            let flags = nix::mount::MsFlags::empty();
            nix::mount::mount(
                Some("tracefs"),
                tracing,
                Some("tracefs"),
                flags,
                None::<&str>,
            )
            .context("cannot mount tracefs")?;
        }
        write(tracing, "trace_clock", "mono")?;
        write(tracing, "trace", "")?;
        write(tracing, "tracing_on", "1")?;
        write(tracing, "events/kvm/kvm_entry/enable", "1")?;
        let pipe = OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_NONBLOCK)
            .open(tracing.join("trace_pipe"))
            .context("cannot read the kernel's trace")?;
        Ok(Self { pipe })
    }

    /// The first entry's moment (ms of [`now_ms`]) and the guest's instruction pointer there.
    pub fn first(mut self, patience: Duration) -> Result<(f64, String)> {
        let deadline = Instant::now() + patience;
        let mut text = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            match self.pipe.read(&mut chunk) {
                Ok(0) => {}
                Ok(count) => text.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("cannot read the kernel's trace"),
            }
            let so_far = String::from_utf8_lossy(&text);
            if let Some(first) = so_far
                .split_inclusive('\n')
                .filter(|line| line.ends_with('\n'))
                .find_map(parse_entry)
            {
                return Ok(first);
            }
            // Asleep until there is an event: on a host of one processor, who looks is in the way.
            let left = deadline.saturating_duration_since(Instant::now());
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut ready = [PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, left).context("cannot wait for the kernel's trace")? == 0 {
                bail!("no guest was entered within {patience:?}");
            }
        }
    }
}

impl Drop for EntryTrace {
    fn drop(&mut self) {
        let _ = write(Path::new(TRACEFS), "events/kvm/kvm_entry/enable", "0");
    }
}

/// Uses nearly all free memory once. A virtual host gets its memory from its own host page by page at the
/// first touch, some ten times as slow as later, and whoever meets such pages would pay for that.
pub fn touch_memory() -> Result<()> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let free = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemFree:")?.split_whitespace().next())
        .context("/proc/meminfo has no MemFree")?;
    let bytes = free.parse::<usize>()?.saturating_sub(SPARED_KIB) << 10;
    let mut memory = vec![0_u8; bytes];
    for page in memory.chunks_mut(4096) {
        page[0] = 1;
    }
    std::hint::black_box(&memory);
    Ok(())
}

/// For the kernel and everything else meanwhile.
const SPARED_KIB: usize = 192 << 10;

/// Waits until the host has nothing else to do: what the last contender has left to the kernel to clear
/// away is not the next one's. On a host that never rests it gives up, and says so.
pub fn settle() -> Result<()> {
    let deadline = Instant::now() + SETTLE;
    let mut before = cpu_ticks()?;
    while Instant::now() < deadline {
        thread::sleep(SETTLE_WINDOW);
        let after = cpu_ticks()?;
        let (idle, all) = (after.0 - before.0, after.1 - before.1);
        if all > 0 && idle * 10 >= all * 9 {
            return Ok(());
        }
        before = after;
    }
    eprintln!("the host has been busy for {SETTLE:?}: what follows is measured on a busy host");
    Ok(())
}

const SETTLE: Duration = Duration::from_secs(20);
const SETTLE_WINDOW: Duration = Duration::from_millis(200);

/// Idle and all ticks of all processors since the host started (proc(5), `/proc/stat`).
fn cpu_ticks() -> Result<(u64, u64)> {
    let stat = fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().unwrap_or_default();
    let ticks: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .take(8)
        .filter_map(|word| word.parse().ok())
        .collect();
    // Fourth is idle, fifth is idle with I/O under way, which is work.
    let idle = ticks.get(3).context("/proc/stat has no idle time")?;
    Ok((*idle, ticks.iter().sum()))
}

fn write(tracing: &Path, file: &str, value: &str) -> Result<()> {
    fs::write(tracing.join(file), value).with_context(|| format!("cannot write {TRACEFS}/{file}"))
}

/// `vcpu0-812 [000] d..1.  103.412345: kvm_entry: vcpu 0, rip 0x1000000`
fn parse_entry(line: &str) -> Option<(f64, String)> {
    let (before, after) = line.split_once(": kvm_entry: ")?;
    let seconds: f64 = before.split_whitespace().next_back()?.parse().ok()?;
    let rip = after.split("rip ").nth(1)?.split_whitespace().next()?;
    Some((seconds * 1e3, rip.to_owned()))
}

/// One mapping of `/proc/<pid>/smaps`, sizes in KiB.
#[derive(Debug, Default)]
struct Mapping {
    path: String,
    size: u64,
    rss: u64,
    clean: u64,
}

/// Resident memory of a process without its guest's, in KiB, and what it is made of.
///
/// A mapping of at least half the guest's memory is the guest's: nothing else in a monitor comes near
/// (glibc reserves 64 MiB per arena). What was left out is told too.
pub fn memory(pid: u32, guest_mib: u64) -> Result<Value> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).context("cannot read smaps")?;
    let exe = fs::read_link(format!("/proc/{pid}/exe"))?
        .display()
        .to_string();
    Ok(account(&parse_smaps(&smaps), &exe, guest_mib))
}

fn parse_smaps(text: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if !first.ends_with(':') {
            let path = words.skip(4).collect::<Vec<_>>().join(" ");
            mappings.push(Mapping {
                path,
                ..Mapping::default()
            });
            continue;
        }
        let Some(mapping) = mappings.last_mut() else {
            continue;
        };
        let kib = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
        match first {
            "Size:" => mapping.size = kib,
            "Rss:" => mapping.rss = kib,
            "Shared_Clean:" | "Private_Clean:" => mapping.clean += kib,
            _ => {}
        }
    }
    mappings
}

fn account(mappings: &[Mapping], exe: &str, guest_mib: u64) -> Value {
    let (mut overhead, mut clean_file, mut guest) = (0, 0, 0);
    let (mut program, mut program_dirty, mut libraries, mut heap, mut stack, mut other) =
        (0, 0, 0, 0, 0, 0);
    for mapping in mappings {
        if mapping.size >= guest_mib * 1024 / 2 {
            guest += mapping.rss;
            continue;
        }
        overhead += mapping.rss;
        let of_file = mapping.path.starts_with('/');
        if of_file {
            clean_file += mapping.clean;
        }
        match mapping.path.as_str() {
            path if path == exe => {
                program += mapping.clean;
                program_dirty += mapping.rss - mapping.clean;
            }
            _ if of_file => libraries += mapping.rss,
            "[heap]" => heap += mapping.rss,
            "[stack]" => stack += mapping.rss,
            _ => other += mapping.rss,
        }
    }
    json!({
        "resident_kib": overhead, "file_clean_kib": clean_file, "guest_kib": guest,
        "program_clean_kib": program, "program_written_kib": program_dirty, "libraries_and_files_kib": libraries,
        "heap_kib": heap, "main_stack_kib": stack, "anonymous_kib": other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_an_entry_and_nothing_else() {
        let line = " vcpu0-812     [000] d..1.   103.412345: kvm_entry: vcpu 0, rip 0x1000000\n";
        assert_eq!(
            parse_entry(line),
            Some((103_412.345, "0x1000000".to_owned()))
        );
        assert_eq!(parse_entry("CPU:0 [LOST 3 EVENTS]"), None);
    }

    #[test]
    fn leaves_the_guests_memory_out_and_says_so() {
        let smaps = "55-56 r-xp 00000000 fe:00 12 /bin/m\nSize: 100 kB\nRss: 80 kB\nPrivate_Clean: 80 kB\n\
                     57-58 rw-p 00000000 00:00 0 [heap]\nSize: 100 kB\nRss: 20 kB\nPrivate_Dirty: 20 kB\n\
                     60-90 rw-p 00000000 00:00 0\nSize: 262144 kB\nRss: 5000 kB\n";
        let memory = account(&parse_smaps(smaps), "/bin/m", 256);
        assert_eq!(memory["resident_kib"], 100);
        assert_eq!(memory["guest_kib"], 5000);
        assert_eq!(memory["program_clean_kib"], 80);
        assert_eq!(memory["heap_kib"], 20);
    }
}
