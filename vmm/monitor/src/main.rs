//! `tern-vmm`: runs one Machine, or says whether this host can run any.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use clap::{Parser, Subcommand};
use tern_vmm::boot::template::CpuTemplate;
use tern_vmm::config::VmConfig;
use tern_vmm::exit::{Exit, Reason};
use tern_vmm::jail::Jail;
use tern_vmm::jail::seccomp::{self, ThreadKind};
use tern_vmm::trace::Trace;
use tern_vmm::{control, probe, run};
use tracing::Level;

/// The KVM monitor of one Tern Machine.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    /// Run a Machine to its end.
    Run {
        /// The Machine's vm.json.
        #[arg(long)]
        config: PathBuf,
        /// Resume from the snapshot directory instead of booting.
        #[arg(long)]
        restore: bool,
    },
    /// Measure /dev/kvm with a tiny guest; exits 3 if it cannot run Machines.
    Probe {
        /// Print JSON.
        #[arg(long)]
        json: bool,
        /// Ask also whether this host has all of a CPU template: host, x86-64-v2 or x86-64-v3.
        #[arg(long, default_value_t = CpuTemplate::Host)]
        cpu_template: CpuTemplate,
    },
    /// Makes a call that the filter of a kind of threads does not allow; for tests of the filters.
    #[command(hide = true)]
    Forbidden {
        /// The thread, as it is named.
        #[arg(long)]
        thread: String,
    },
}

const EXIT_ERROR: u8 = 1;
const EXIT_NO_KVM: u8 = 3;

fn main() -> ExitCode {
    let trace = Trace::new(Instant::now());
    let options = Options::parse();
    log_to_stderr();
    match options.command {
        Subcommands::Probe { json, cpu_template } => {
            ExitCode::from(report_probe(json, cpu_template))
        }
        Subcommands::Forbidden { thread } => forbidden(&thread),
        Subcommands::Run { config, restore } => match run_machine(&config, restore, trace) {
            Ok(exit) => {
                if exit.reason.code() != 0 {
                    eprintln!("tern-vmm: {}", exit.message);
                }
                // Not by returning: the control thread may be in the middle of something.
                std::process::exit(exit.reason.code().into())
            }
            Err(error) => {
                eprintln!("tern-vmm: {error:#}");
                ExitCode::from(EXIT_ERROR)
            }
        },
    }
}

fn run_machine(path: &Path, restore: bool, trace: Trace) -> anyhow::Result<Exit> {
    let config = VmConfig::load(path)?;
    trace.mark("config_read");
    control::block_signals().context("cannot block signals")?;
    let jail = Arc::new(Jail::new(config.jail.clone()));
    end_with_a_panic(config.exit_file.clone(), jail.clone());
    Ok(run::run(config, &jail, restore, trace)?)
}

/// A panic in any thread is a bug, and leaves a guest that looks alive and is not: better to end, and
/// say so where the host's agent looks.
fn end_with_a_panic(exit_file: PathBuf, jail: Arc<Jail>) {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        let _ = Exit::new(Reason::Error, format!("bug in the monitor: {panic}"))
            .write(&jail.inside(&exit_file));
        std::process::exit(EXIT_ERROR.into());
    }));
}

/// Events of level INFO and above go to stderr, or of the level in `TERN_VMM_LOG`.
///
/// Not by way of the `log` crate, whose users among the libraries log what a guest does: a hostile
/// guest must not fill the host's logs.
fn log_to_stderr() {
    let level = std::env::var("TERN_VMM_LOG")
        .ok()
        .and_then(|level| level.parse().ok());
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level.unwrap_or(Level::INFO))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .finish();
    // Fails only if it was done before.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// Ends by SIGSYS where the filter holds.
fn forbidden(thread: &str) -> ExitCode {
    let Some(kind) = ThreadKind::ALL.into_iter().find(|k| k.name() == thread) else {
        eprintln!("tern-vmm: no thread is called {thread:?}");
        return ExitCode::from(EXIT_ERROR);
    };
    if let Err(error) = seccomp::prepare() {
        eprintln!("tern-vmm: {error}");
        return ExitCode::from(EXIT_ERROR);
    }
    let _ = std::thread::spawn(move || {
        seccomp::confine(kind);
        // Allowed, so that an end before it is told from an end by what follows.
        eprintln!("confined");
        // SAFETY: takes numbers only; a socket that only root could have.
        unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW, 0) }
    })
    .join();
    eprintln!("not killed");
    ExitCode::from(EXIT_ERROR)
}

fn report_probe(json: bool, template: CpuTemplate) -> u8 {
    let mut out = std::io::stdout().lock();
    let (code, text) = match probe::probe(template) {
        Ok(report) if json => (
            0,
            serde_json::json!({ "ok": true, "mips": report.mips.round() }).to_string(),
        ),
        Ok(report) => (
            0,
            format!(
                "/dev/kvm works: {:.0} million instructions a second",
                report.mips
            ),
        ),
        Err(error) if json => (
            EXIT_NO_KVM,
            serde_json::json!({ "ok": false, "error": error.to_string() }).to_string(),
        ),
        Err(error) => {
            eprintln!("tern-vmm: {error}");
            return EXIT_NO_KVM;
        }
    };
    let _ = writeln!(out, "{text}");
    code
}
