//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};

use crate::forward::Forward;
use crate::kernel::Origin;
use crate::share::Share;

/// A bare-metal host with true KVM, for machines without virtualization hardware.
///
/// tern-metal starts a virtual server (QEMU, with AMD-V emulated in software) on which /dev/kvm,
/// network namespaces, nftables, WireGuard and control groups are those of a real one, and runs
/// commands on it as root. The checkout and what was built from it are visible there, read-only, at
/// the same paths. Each start is fresh: nothing written inside outlives the host, except in the
/// directory for results (see --results) and in shares of your own.
///
/// Where this machine has real virtualization, the same commands run directly on it
/// (TERN_METAL=auto, native or qemu).
#[derive(Debug, Parser)]
#[command(name = "tern-metal", version, max_term_width = 100, after_long_help = AFTER)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub action: Action,
}

const AFTER: &str = "\
EXIT CODES
  That of the command; 128 + N when signal N ended it; 124 at the time limit; 125 when tern-metal
  itself failed; 126 when the command is not executable; 127 when it does not exist.

ENVIRONMENT
  TERN_METAL        auto (default): this machine itself if it has working virtualization, else QEMU;
                    native: this machine, or fail and say why; qemu: always QEMU
  TERN_METAL_NAME   as --name: which of several hosts of one checkout
  TERN_METAL_KERNEL as --kernel: which kernel a virtual host runs
  TERN_METAL_CACHE  where root disks are kept (default: tern/metal in the user's cache directory)
  TMPDIR            where a host's data disk is, unnamed and sparse (default: /var/tmp)

EXAMPLES
  tern-metal run -- sh -c 'ls -l /dev/kvm; uname -a'
  tern-metal run --forward 8443:443 --timeout 5m -- ./serve
  tern-metal up && tern-metal exec -- nft list ruleset; tern-metal down
  CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER='tern-metal exec --' cargo test -p tern-e2e";

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// Make the root disk from Debian packages, if it is not in the cache yet
    Build {
        /// Make it again, with today's packages
        #[arg(long)]
        fresh: bool,
        #[command(flatten)]
        kernel: KernelArgs,
    },
    /// Start a host, run one command on it, end the host
    Run {
        #[command(flatten)]
        host: HostArgs,
        #[command(flatten)]
        command: CommandArgs,
        /// Say on standard error where the time of the start went
        #[arg(long)]
        timings: bool,
    },
    /// Start a host and keep it running in the background
    Up {
        #[command(flatten)]
        host: HostArgs,
        #[command(flatten)]
        name: NameArgs,
        /// End the host after so long without a command
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration)]
        idle: Duration,
        /// Stay in the foreground
        #[arg(long)]
        foreground: bool,
        /// Be the process in the background
        #[arg(long, hide = true)]
        detached: bool,
        /// Say on standard error where the time of the start went
        #[arg(long)]
        timings: bool,
    },
    /// Run a command on the host that is up
    Exec {
        #[command(flatten)]
        name: NameArgs,
        #[command(flatten)]
        command: CommandArgs,
    },
    /// End the host that is up
    Down {
        #[command(flatten)]
        name: NameArgs,
    },
    /// Say whether a host is up, and how to reach it
    Status {
        #[command(flatten)]
        name: NameArgs,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// First process inside a host
    #[command(hide = true)]
    Init {
        /// Its plan
        #[arg(long)]
        plan: PathBuf,
    },
    /// The server inside a host that runs commands
    #[command(hide = true)]
    Agent {
        /// The host's plan
        #[arg(long)]
        plan: PathBuf,
    },
}

/// What the host is like.
#[derive(Debug, Args)]
pub struct HostArgs {
    /// Lead a port of 127.0.0.1 here to a port inside; 0 takes any free one
    #[arg(long, value_name = "LOOPBACKPORT:GUESTPORT[/udp]")]
    pub forward: Vec<Forward>,
    /// Show another directory inside (default: writable, at the same path)
    #[arg(long, value_name = "HOSTDIR[:GUESTDIR][:ro]")]
    pub share: Vec<Share>,
    /// Writable directory for what should outlive the host, at the same path inside, where
    /// TERN_METAL_RESULTS names it [default: metal/results in Cargo's target directory]
    #[arg(long, value_name = "DIR")]
    pub results: Option<PathBuf>,
    /// Memory of the host
    #[arg(long, value_name = "MIB", default_value_t = 3072,
        value_parser = clap::value_parser!(u32).range(512..=1_048_576))]
    pub memory: u32,
    /// CPUs of the host; with more than one, QEMU's emulation of AMD-V now and then breaks a guest
    #[arg(long, value_name = "N", default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..=64))]
    pub cpus: u32,
    /// Processor of a virtual host, as QEMU names it [default: EPYC-Rome,+svm,+invtsc]
    #[arg(long, value_name = "MODEL")]
    pub cpu: Option<String>,
    #[command(flatten)]
    pub kernel: KernelArgs,
}

/// Which kernel a virtual host runs, and so which root disk it has.
#[derive(Debug, Args)]
pub struct KernelArgs {
    /// Which Linux a virtual host runs
    #[arg(long, env = "TERN_METAL_KERNEL", value_name = "ORIGIN", value_enum,
        default_value_t = Origin::Stable)]
    pub kernel: Origin,
}

/// What to run, and how.
#[derive(Debug, Args)]
pub struct CommandArgs {
    /// Program and arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    pub argv: Vec<String>,
    /// Set a variable, or with NAME alone, pass it on. CARGO_PKG_*, CARGO_MANIFEST_*,
    /// CARGO_BIN_EXE_*, NEXTEST*, RUST_* and TERN_* go along by themselves
    #[arg(long, short = 'e', value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Working directory inside [default: this one, if it is shared, else /root]
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<PathBuf>,
    /// Give the command a terminal
    #[arg(long, short = 't')]
    pub tty: bool,
    /// End the command after so long (in `run`, counted from the host's start) [default: 10m in
    /// `run`, none in `exec`]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// Let processes live on that the command leaves behind
    #[arg(long)]
    pub keep_background: bool,
}

/// Which host.
#[derive(Debug, Args)]
pub struct NameArgs {
    /// Which host of this checkout, where there are several
    #[arg(long, env = "TERN_METAL_NAME", default_value = "default", value_parser = name)]
    pub name: String,
}

/// `90s`, `10m`, `2h`, or seconds.
fn duration(text: &str) -> Result<Duration> {
    let (number, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(at) => text.split_at(at),
        None => (text, "s"),
    };
    let number: u64 = number
        .parse()
        .context("expected a number and a unit, as in 90s or 10m")?;
    let seconds = match unit {
        "s" => Some(number),
        "m" => number.checked_mul(60),
        "h" => number.checked_mul(3600),
        _ => None,
    };
    // A year: more is a mistake, and would overflow clocks.
    let seconds = seconds
        .filter(|&s| s <= 31_536_000)
        .context("units are s, m and h, up to a year")?;
    ensure!(seconds > 0, "a time must not be 0");
    Ok(Duration::from_secs(seconds))
}

fn name(text: &str) -> Result<String> {
    let fine = !text.is_empty()
        && text.len() <= 40
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    ensure!(fine, "a name is 1 to 40 letters, digits, - and _");
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn what_follows_the_command_is_the_commands() {
        let cli = Cli::try_parse_from(["tern-metal", "run", "--cpus", "1", "--", "ls", "--cpus"]);
        let Action::Run { host, command, .. } = cli.unwrap().action else {
            panic!("not run")
        };
        assert_eq!(host.cpus, 1);
        assert_eq!(command.argv, ["ls", "--cpus"]);
        let cli = Cli::try_parse_from(["tern-metal", "exec", "ls", "-l", "--name"]);
        let Action::Exec { command, .. } = cli.unwrap().action else {
            panic!("not exec")
        };
        assert_eq!(command.argv, ["ls", "-l", "--name"]);
    }

    #[test]
    fn a_host_and_its_root_disk_have_a_kernel_of_choice() {
        let kernel = |arguments: &[&str]| {
            let all = [&["tern-metal"], arguments].concat();
            match Cli::try_parse_from(all).unwrap().action {
                Action::Run { host, .. } | Action::Up { host, .. } => host.kernel.kernel,
                Action::Build { kernel, .. } => kernel.kernel,
                other => panic!("{other:?}"),
            }
        };
        for action in [&["build"][..], &["up"], &["run"]] {
            let with = |option: &[&'static str]| {
                let command = if action == ["run"] { &["x"][..] } else { &[] };
                kernel(&[action, option, command].concat())
            };
            assert_eq!(with(&["--kernel", "backports"]), Origin::Backports);
            assert_eq!(with(&["--kernel", "stable"]), Origin::Stable);
            assert_eq!(with(&["--kernel="]), Origin::Stable);
        }
        let command = <Cli as clap::CommandFactory>::command();
        for action in ["build", "up", "run"] {
            let action = command.find_subcommand(action).unwrap();
            let option = action.get_arguments().find(|a| a.get_id() == "kernel");
            let option = option.unwrap();
            assert_eq!(option.get_env().unwrap(), "TERN_METAL_KERNEL");
            assert_eq!(option.get_default_values(), ["stable"]);
        }
    }

    #[test]
    fn refuses_what_makes_no_sense() {
        for arguments in [
            &["run"][..],
            &["run", "--memory", "1", "--", "x"],
            &["run", "--cpus", "0", "--", "x"],
            &["run", "--timeout", "soon", "--", "x"],
            &["run", "--forward", "80", "--", "x"],
            &["up", "--kernel", "6.12"],
            &["up", "--name", "a/b"],
            &["up", "--name", ""],
            &["exec"],
        ] {
            let all = [&["tern-metal"], arguments].concat();
            assert!(Cli::try_parse_from(&all).is_err(), "{arguments:?}");
        }
    }

    #[test]
    fn times_have_units() {
        for (text, seconds) in [("90", 90), ("90s", 90), ("10m", 600), ("2h", 7200)] {
            assert_eq!(duration(text).unwrap(), Duration::from_secs(seconds));
        }
        for text in [
            "",
            "s",
            "1d",
            "-1s",
            "0",
            "1.5s",
            "9999999999999999999h",
            "99999h",
        ] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
