//! A black-box client: how fast sleeping Machines wake, whether storms of requests are answered, and
//! how latency behaves under load. Knows nothing of Tern but URLs.

mod args;
mod exchange;
mod herd;
mod hook;
mod load;
mod plot;
mod report;
mod storm;
mod tally;
mod target;
#[cfg(test)]
mod testing;
mod wake;

use std::process::ExitCode;

use anyhow::{Result, bail};
use args::{Arguments, Command};
use clap::Parser;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = tokio::select! {
        outcome = run(&arguments) => outcome,
        // Ends shell commands, too: they are killed when they are dropped.
        _ = tokio::signal::ctrl_c() => interrupted(),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("tern-loadtest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn interrupted() -> Result<bool> {
    bail!("interrupted")
}

/// Does what the command line says. True if all went well.
async fn run(arguments: &Arguments) -> Result<bool> {
    match &arguments.command {
        Command::Wake(arguments) => wake::run(arguments).await,
        Command::Storm(arguments) => storm::run(arguments).await,
        Command::Load(arguments) => load::run(arguments).await,
    }
}
