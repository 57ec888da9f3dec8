//! What the program says of itself for others to read: completion for shells, and the manual's pages.

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::args::Args;

/// Prints the completion for a shell.
pub fn completion(shell: Shell) -> Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "tern", &mut script);
    std::io::stdout().write_all(&script)?;
    Ok(ExitCode::SUCCESS)
}

/// Writes `tern.1` and a page for each command.
pub fn man_pages(directory: &Path) -> Result<ExitCode> {
    clap_mangen::generate_to(Args::command(), directory)
        .with_context(|| format!("{}", directory.display()))?;
    Ok(ExitCode::SUCCESS)
}
