//! Tern's monitor beside QEMU's `microvm`, with the same kernel, initramfs and disk, in one run.
//!
//! `tern-monitor-bench ROUNDS VMM QEMU_DIR KERNEL INITRAMFS WORK_DIR RESULTS_DIR`, as root, on a host with
//! true KVM on which no other guest runs. Rounds alternate, and so does who begins. Leaves `monitor.md` and
//! `monitor.json` (every sample) in RESULTS_DIR; `.ci/bench-monitor` prepares all this.

mod contender;
mod proc;
mod report;
mod told;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use contender::{Contender, Files, GUEST_MIB, Guest, Kind, PATIENCE};
use proc::EntryTrace;
use report::Measure;

/// Firecracker's medians in this rig (milliseconds and KiB), and the goals' shares of the first two. A
/// rig on a busy machine is slower than the idle one they were measured on.
const FIRECRACKER: [f64; 3] = [1155.0, 109.0, 2.8 * 1024.0];

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [rounds, vmm, qemu, kernel, initramfs, work, results] = arguments.as_slice() else {
        anyhow::bail!(
            "usage: tern-monitor-bench ROUNDS VMM QEMU_DIR KERNEL INITRAMFS WORK_DIR RESULTS_DIR"
        );
    };
    let rounds: usize = rounds
        .to_string_lossy()
        .parse()
        .context("ROUNDS is a number")?;
    ensure!(rounds > 0, "ROUNDS is at least 1");
    proc::touch_memory()?;
    let files = on_local_disk([vmm, qemu, kernel, initramfs], work)?;
    let both = |guest| -> Result<_> {
        let contender = |kind| Contender::new(kind, guest, &files, work);
        Ok([contender(Kind::Tern)?, contender(Kind::Qemu)?])
    };
    let talkers = both(Guest::Talks)?;
    let both = both(Guest::Serves)?;

    let mut bench = Bench::new(rounds, results.clone());
    bench.first_bytes(&talkers)?;
    bench.restores(&both)?;
    bench.boots(&both)
}

/// All samples so far; results are written after every round, so that a run cut short leaves what it has.
struct Bench {
    rounds: usize,
    results: PathBuf,
    entry: Measure,
    line: Measure,
    boot_http: Measure,
    byte: Measure,
    restore: Measure,
    memory: Measure,
    written: Measure,
    restored_memory: Measure,
    raw: Vec<Value>,
}

impl Bench {
    fn new(rounds: usize, results: PathBuf) -> Self {
        let measure = |what, unit, goal_ratio, goal_most| Measure {
            what,
            unit,
            goal_ratio,
            goal_most,
            ..Measure::default()
        };
        let [init, restored, resident] = FIRECRACKER;
        Self {
            rounds,
            results,
            entry: measure(
                "process start to first guest instruction",
                "ms",
                Some(0.3),
                None,
            ),
            line: measure(
                "process start to first line of init",
                "ms",
                Some(0.8),
                Some(0.8 * init),
            ),
            boot_http: measure("process start to first HTTP byte", "ms", None, None),
            byte: measure(
                "restore: process start to first byte of the guest (serial)",
                "ms",
                None,
                Some(0.5 * restored),
            ),
            restore: measure(
                "restore: process start to first HTTP byte",
                "ms",
                Some(0.4),
                Some(0.5 * restored),
            ),
            memory: measure(
                "resident memory beside the guest's",
                "KiB",
                None,
                Some(resident),
            ),
            written: measure("of that, not clean pages of files", "KiB", None, None),
            restored_memory: measure("resident memory, restored", "KiB", None, None),
            raw: Vec::new(),
        }
    }

    /// The byte that Firecracker's figure is of: a guest that was writing to its serial line goes on.
    fn first_bytes(&mut self, both: &[Contender; 2]) -> Result<()> {
        sleep_twice(both)?;
        for round in 0..=self.rounds {
            for contender in in_turn(both, round) {
                let running = contender.start(true)?;
                let took = contender.first_serial_byte()? - running.started_ms;
                let phases = phases(contender)?;
                if round == 0 {
                    continue; // as below
                }
                of(&mut self.byte, contender).push(took);
                let name = contender.name();
                eprintln!("first byte {round}/{} {name}: {took:.1} ms", self.rounds);
                self.raw.push(json!({"round": round, "who": name,
                    "byte": {"first_serial_ms": took, "phases": phases}}));
            }
            self.save(false)?;
        }
        Ok(())
    }

    /// From one snapshot each, made first, of a guest that has slept and answered before: so is every one of a
    /// Machine's life but the first, and a monitor may have learned from that.
    fn restores(&mut self, both: &[Contender; 2]) -> Result<()> {
        sleep_twice(both)?;
        for round in 0..=self.rounds {
            for contender in in_turn(both, round) {
                let running = contender.start(true)?;
                let took = contender.first_http_byte()? - running.started_ms;
                let used = proc::memory(running.pid(), GUEST_MIB)?;
                let phases = phases(contender)?;
                if round == 0 {
                    continue; // brings files into the page cache; not counted
                }
                of(&mut self.restore, contender).push(took);
                of(&mut self.restored_memory, contender).push(number(&used, "resident_kib"));
                let name = contender.name();
                eprintln!("restore {round}/{} {name}: {took:.1} ms", self.rounds);
                self.raw.push(json!({"round": round, "who": name,
                    "restore": {"first_http_ms": took, "memory": used, "phases": phases}}));
            }
            self.save(round == self.rounds)?;
        }
        Ok(())
    }

    fn boots(&mut self, both: &[Contender; 2]) -> Result<()> {
        for round in 0..=self.rounds {
            for contender in in_turn(both, round) {
                // Once for nothing: memory that the last guest's kernel ran in is slow to write the next
                // time, where processors are emulated.
                first_entry(contender)?;
                let first = first_entry(contender)?;
                let (running, boot) = booted(contender)?;
                drop(running);
                if round == 0 {
                    continue;
                }
                let used = &boot["memory"];
                let resident = number(used, "resident_kib");
                of(&mut self.entry, contender).push(number(&first, "first_entry_ms"));
                of(&mut self.line, contender).push(number(&boot, "first_line_ms"));
                of(&mut self.boot_http, contender).push(number(&boot, "first_http_ms"));
                of(&mut self.memory, contender).push(resident);
                of(&mut self.written, contender).push(resident - number(used, "file_clean_kib"));
                let name = contender.name();
                eprintln!(
                    "boot {round}/{} {name}: entry {:.1} ms, init {:.1} ms, {resident} KiB",
                    self.rounds,
                    number(&first, "first_entry_ms"),
                    number(&boot, "first_line_ms"),
                );
                self.raw
                    .push(json!({"round": round, "who": name, "start": first, "boot": boot}));
            }
            self.save(round == self.rounds)?;
        }
        Ok(())
    }

    fn save(&self, show: bool) -> Result<()> {
        let measures = [
            &self.entry,
            &self.line,
            &self.boot_http,
            &self.byte,
            &self.restore,
            &self.memory,
            &self.written,
            &self.restored_memory,
        ];
        write_results(&self.results, self.rounds, &measures, &self.raw, show)
    }
}

/// Leaves a snapshot of each that has answered, slept, and answered again.
fn sleep_twice(both: &[Contender; 2]) -> Result<()> {
    for contender in both {
        let (running, _) = booted(contender)?;
        contender.suspend(running)?;
        let running = contender.start(true)?;
        contender.first_http_byte()?;
        contender.suspend(running)?;
    }
    Ok(())
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or(f64::NAN)
}

/// Copies what is measured off the shares, whose page cache is another machine's.
fn on_local_disk([vmm, qemu, kernel, initramfs]: [&PathBuf; 4], work: &Path) -> Result<Files> {
    fs::create_dir_all(work)?;
    let copy = |from: &Path, name: &str| -> Result<PathBuf> {
        let to = work.join(name);
        fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        Ok(to)
    };
    for (inner, directory) in [("", "qemu"), ("lib", "qemu/lib"), ("share", "qemu/share")] {
        fs::create_dir_all(work.join(directory))?;
        for file in fs::read_dir(qemu.join(inner))? {
            let file = file?.path();
            if let (true, Some(name)) = (file.is_file(), file.file_name()) {
                copy(&file, &format!("{directory}/{}", name.to_string_lossy()))?;
            }
        }
    }
    Ok(Files {
        vmm: copy(vmm, "tern-vmm")?,
        qemu: work.join("qemu"),
        kernel: copy(kernel, "vmlinux")?,
        initramfs: copy(initramfs, "initramfs.cpio")?,
    })
}

/// Who begins changes with every round.
fn in_turn(both: &[Contender; 2], round: usize) -> [&Contender; 2] {
    if round.is_multiple_of(2) {
        [&both[0], &both[1]]
    } else {
        [&both[1], &both[0]]
    }
}

fn of<'a>(measure: &'a mut Measure, contender: &Contender) -> &'a mut Vec<f64> {
    match contender.kind {
        Kind::Tern => &mut measure.tern,
        Kind::Qemu => &mut measure.qemu,
    }
}

/// A start under the kernel's trace, ended at once; a run of its own, because tracing slows the guest.
fn first_entry(contender: &Contender) -> Result<Value> {
    let trace = EntryTrace::start()?;
    let running = contender.start(false)?;
    let (at, rip) = trace.first(PATIENCE)?;
    let phases = phases(contender)?;
    Ok(json!({"first_entry_ms": at - running.started_ms, "rip": rip, "phases": phases}))
}

fn booted(contender: &Contender) -> Result<(contender::Running, Value)> {
    let running = contender.start(false)?;
    let line = contender.first_line()? - running.started_ms;
    let http = contender.first_http_byte()? - running.started_ms;
    let memory = proc::memory(running.pid(), GUEST_MIB)?;
    let phases = phases(contender)?;
    Ok((
        running,
        json!({"first_line_ms": line, "first_http_ms": http, "memory": memory, "phases": phases}),
    ))
}

fn phases(contender: &Contender) -> Result<Value> {
    if contender.kind == Kind::Tern {
        contender.phases()
    } else {
        Ok(Value::Null)
    }
}

fn write_results(
    results: &Path,
    rounds: usize,
    measures: &[&Measure],
    raw: &[Value],
    show: bool,
) -> Result<()> {
    let table = report::table(measures);
    let own = |who: &str, kind: &str, inner: &str| medians(raw, who, kind, inner);
    let phases = json!({"boot": own("tern", "boot", "phases"), "first_byte": own("tern", "byte", "phases"),
            "restore": own("tern", "restore", "phases")});
    let memory =
        json!({"tern": own("tern", "boot", "memory"), "qemu": own("qemu", "boot", "memory")});
    let text = format!(
        "Medians of {rounds}, rounds alternating, {GUEST_MIB} MiB, 1 vCPU.\n\n{table}\n\
         Tern's own phases, median microseconds since its start:\n\n```json\n{phases:#}\n```\n\n\
         Memory after the first reply, median KiB:\n\n```json\n{memory:#}\n```\n"
    );
    fs::create_dir_all(results)?;
    fs::write(results.join("monitor.md"), &text)?;
    let all = json!({
        "rounds": rounds, "guest_mib": GUEST_MIB, "measures": measures.iter().map(|measure| measure.json()).collect::<Vec<_>>(),
        "tern_phases_us": phases, "memory_kib": memory, "raw": raw,
    });
    fs::write(results.join("monitor.json"), format!("{all:#}\n"))?;
    if show {
        println!("{text}");
    }
    Ok(())
}

/// The median of each number of a table that every round has.
fn medians(raw: &[Value], who: &str, kind: &str, inner: &str) -> Value {
    let rows: Vec<_> = raw
        .iter()
        .filter(|row| row["who"] == who)
        .filter_map(|row| row[kind][inner].as_object())
        .collect();
    let Some(first) = rows.first() else {
        return Value::Null;
    };
    let median = |key: &String| {
        let samples: Vec<_> = rows
            .iter()
            .filter_map(|row| row.get(key)?.as_f64())
            .collect();
        report::summary(&samples).map(|[median, ..]| median)
    };
    first
        .keys()
        .map(|key| (key.clone(), json!(median(key))))
        .collect::<serde_json::Map<_, _>>()
        .into()
}
